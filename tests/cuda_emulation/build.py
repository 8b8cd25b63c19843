# SPDX-License-Identifier: Apache-2.0
"""Compiles the project's CUDA C++ with a C++ compiler, or the CPU's own kernels, and runs tests on the result.

python tests/cuda_emulation/build.py [--cpu] [--sanitize] [--reverse] [-- pytest arguments]
"""

import argparse
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

from fused_inpaint import _extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "cuda_emulation"
ORDER = "FUSED_INPAINT_EMULATION_ORDER"
# Without the library the tests would pass on the reference alone.
PYTEST = """import sys, pytest
from fused_inpaint import _extension
sys.exit(_extension.native_error() or pytest.main(sys.argv[1:]))"""
SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@functools.cache
def toolkit() -> list[str]:
    """The include folders of the CUDA toolkit; empty if there is none."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    if nvcc:
        # nvcc may be a wrapper somewhere else, so it is asked where it is.
        report = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        homes += [Path(top) for top in re.findall(r"^#\$ TOP=(.+)$", report, re.MULTILINE)]
    for include in (home.resolve() / "include" for home in (*homes, Path("/usr/local/cuda"))):
        if (include / "cuda_bf16.h").is_file():
            return [str(folder) for folder in (include, include / "cccl") if folder.is_dir()]
    return []


@functools.cache
def contraction() -> list[str]:
    """Flags for what nvcc does, too: a product and the sum that follows become one operation, where this CPU has it."""
    fused = re.search(r"^flags\b.* fma( |$)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return ["-mfma", "-ffp-contract=fast"] if fused else []


@functools.cache
def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def missing(cuda: bool = True) -> str:
    """Why nothing can be emulated here, or with `cuda=False` sanitized; empty if it can."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return f"this needs Linux on x86_64, and this is {sys.platform} on {platform.machine()}"
    if shutil.which(compiler()[0]) is None:
        return f"{compiler()[0]} is not on PATH"
    if "Free Software Foundation" not in _version():
        return f"{compiler()[0]} is not GCC"
    return "" if toolkit() or not cuda else "no CUDA toolkit with cuda_bf16.h was found"


@functools.cache
def _version() -> str:
    return subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def _flags(sanitize: bool, cuda: bool) -> list[str]:
    major, minor = _extension.MIN_TORCH
    numerics = ["-fno-math-errno", "-fno-trapping-math", *(contraction() if cuda else [])]
    emulation = ["-DFUSED_INPAINT_EMULATE", "-DFUSED_INPAINT_CUDA_KEY=CPU", "-include", str(HERE / "cuda_emulation.h")]
    return [
        *(SANITIZE if sanitize else ["-O2", "-g0"]),
        *["-std=c++20", "-fPIC", *numerics, "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"],
        *[f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000", f"-I{ROOT / 'csrc'}"],
        *[f"-isystem{folder}" for folder in (*include_paths(), *(toolkit() if cuda else ()))],
        *(emulation if cuda else ["-fopenmp"]),
    ]


def _run(command: list[str], out: Path) -> None:
    """Runs a compiler that writes `out`, which appears complete or not at all."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        part = Path(folder) / out.name
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
        sys.stderr.write(done.stderr)
        part.rename(out)


def build(sources: Iterable[Path], out: Path = FOLDER, sanitize: bool = False) -> Path:
    """The shared library of `sources`, all CUDA or none, and csrc/module.cpp; `out` is a cache by content."""
    sources = list(sources)
    flags = _flags(sanitize, cuda=any(source.suffix == ".cu" for source in sources))
    out.mkdir(parents=True, exist_ok=True)
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *HERE.glob("*.h")]
    common = hashlib.sha256(repr((_version(), torch.__version__, flags)).encode())
    for header in sorted(headers):
        common.update(header.read_bytes())

    def compiled(source: Path) -> Path:
        key = common.copy()
        key.update(source.read_bytes())
        target = out / f"{source.stem}-{key.hexdigest()[:16]}.o"
        if not target.exists():
            _run([*compiler(), *flags, "-x", "c++", "-c", str(source)], target)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compiled, [ROOT / "csrc" / "module.cpp", *sources]))
    name = hashlib.sha256(" ".join(sorted(o.name for o in objects)).encode()).hexdigest()[:16]
    library = out / f"kernels-{name}{'-sanitized' if sanitize else ''}.so"
    if not library.exists():
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lstdc++", "-ltorch", "-ltorch_cpu", "-lc10"]
        linking = [*(SANITIZE if sanitize else []), "-shared", "-Wl,--as-needed"]
        _run([*compiler(), *linking, *map(str, objects), *libraries], library)
    return library


def environment(library: Path, sanitize: bool = False, reverse: bool = False) -> dict[str, str]:
    """Environment of a Python process whose operators are those of `library`."""
    env = {**os.environ, _extension.LIBRARY: str(library), ORDER: "reverse" if reverse else "forward"}
    if sanitize:
        # The sanitizer comes before everything else, and libstdc++ with it, whose exceptions it intercepts.
        names = ("libasan.so", "libubsan.so", "libstdc++.so")
        find = [[*compiler(), f"-print-file-name={name}"] for name in names]
        found = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for command in find]
        # Python never frees all it has.
        options = "detect_leaks=0:abort_on_error=0:" + os.environ.get("ASAN_OPTIONS", "")
        env |= {"LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}
    return env


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the CPU's own kernels, nothing emulated")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    parser.add_argument("--reverse", action="store_true", help="threads and blocks in the opposite order")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest")
    arguments = parser.parse_args()
    if reason := missing(cuda=not arguments.cpu):
        raise SystemExit(f"cuda_emulation: {reason}")
    library = build(
        sorted((ROOT / "csrc").glob("*/*_cpu.cpp" if arguments.cpu else "*/*_cuda.cu")), sanitize=arguments.sanitize
    )
    print(library, flush=True)
    command = [sys.executable, "-c", PYTEST, *arguments.pytest]
    env = environment(library, arguments.sanitize, arguments.reverse)
    return subprocess.run(command, cwd=ROOT, env=env).returncode if arguments.pytest else 0


if __name__ == "__main__":
    sys.exit(main())
