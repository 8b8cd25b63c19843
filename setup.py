# SPDX-License-Identifier: Apache-2.0
"""Builds the shared library fused_inpaint/_C against the torch that is already installed.

Environment: FUSED_INPAINT_BUILD   auto (default), cpu, cuda or none
             CXX                   the C++ compiler; else c++, g++ or clang++ from PATH
             TORCH_CUDA_ARCH_LIST  GPU architectures; else "8.0;9.0+PTX"
             MAX_JOBS              parallel compilations
"""

import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "cpu", "cuda", "none")
MIN_SETUPTOOLS = 77
MIN_TORCH = (2, 10)
TORCH_TARGET = f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"
FACTS_FILE = "_build.json"
COMPILING = {"dist_info", "build", "build_py", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}
WITHOUT = "FUSED_INPAINT_BUILD=none installs without the compiled extension"


def stop(message):
    raise SystemExit(f"fused_inpaint: {message}")


def find_torch():
    """The torch of the environment being installed into, from inside pip's isolated build too; None if absent."""
    if find_spec("torch") is None:
        roots = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
        if sys.prefix == sys.base_prefix:
            roots.append(site.getusersitepackages())
        # addsitedir appends, so the isolated setuptools and ninja stay first, and follows .pth files as Python does.
        for root in dict.fromkeys(roots):
            site.addsitedir(root)
    if find_spec("torch") is None:
        return None
    import torch

    return torch


def find_compiler():
    """The C++ compiler as a command line, or None."""
    named = shlex.split(os.environ.get("CXX", ""))
    commands = [named] if named else [[name] for name in ("c++", "g++", "clang++")]
    return next((command for command in commands if compiler_version(command)), None)


def compiler_version(command):
    """The first line it says of itself; "" if it does not run."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        run = subprocess.run([*command, "--version"], capture_output=True, text=True)
    except OSError:  # not of this machine's format
        return ""
    return run.stdout.split("\n")[0] if run.returncode == 0 else ""


def decide(choice, torch, compiler):
    """What to build: (kind, why it is not more)."""
    if choice == "none":
        return "none", "FUSED_INPAINT_BUILD=none was set"
    if torch is None:
        stop(f"install torch first, then run this command again; {WITHOUT}")
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < MIN_TORCH:
        wanted = ".".join(map(str, MIN_TORCH))
        stop(f"torch must be {wanted} or newer, got {torch.__version__}; upgrade it first; {WITHOUT}")

    blocked = ""
    if not sys.platform.startswith("linux"):
        blocked = f"the extension is compiled on Linux only, and this is {sys.platform}"
    elif compiler is None:
        wanted = f"CXX={os.environ['CXX']}" if os.environ.get("CXX") else "c++, g++ or clang++"
        blocked = f"no C++ compiler was found ({wanted} is not on PATH, or does not run)"
    if blocked:
        if choice != "auto":
            stop(f"FUSED_INPAINT_BUILD={choice} cannot be done: {blocked}; {WITHOUT}")
        return "none", blocked

    if choice == "cpu":
        return "cpu", "FUSED_INPAINT_BUILD=cpu was set"
    no_cuda = ""
    if torch.version.cuda is None:
        no_cuda = f"torch {torch.__version__} is built without CUDA"
    elif (toolkit := find_toolkit()) is None:
        no_cuda = "no CUDA toolkit was found (nvcc is not on PATH, and neither CUDA_HOME nor CUDA_PATH is set)"
    elif not has_runtime(compiler):
        no_cuda = f"the linker finds no libcudart, with the CUDA toolkit {toolkit} (is CUDA_HOME its folder?)"
    elif not glob("csrc/*/*_cuda.cu"):
        no_cuda = "there are no csrc/*/*_cuda.cu sources"
    if choice == "cuda" and no_cuda:
        stop(f"FUSED_INPAINT_BUILD=cuda cannot be done: {no_cuda}")
    return ("cpu", no_cuda) if no_cuda else ("cuda", "")


def find_toolkit():
    """The CUDA toolkit's folder, or None."""
    if not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        folder = toolkit_on_path()
        if folder is not None:
            os.environ["CUDA_HOME"] = str(folder)
    from torch.utils.cpp_extension import CUDA_HOME  # which is looked up as this is imported

    return CUDA_HOME


def toolkit_on_path():
    """The folder of the nvcc on PATH, or None. torch takes the one above the file, which a link or a script that calls
    the nvcc of a toolkit is not in; a script is asked."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    try:
        command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60).stderr
    except (OSError, subprocess.TimeoutExpired):
        return None
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    folder = Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent
    return folder if (folder / "bin/nvcc").exists() else None


def has_runtime(compiler):
    """Whether a library can be linked with the CUDA runtime. A linker that cannot link at all is for the build to
    show."""
    from torch.utils.cpp_extension import library_paths

    paths = [f"-L{path}" for path in library_paths("cuda")]
    return links(compiler, *paths, "-lcudart") or not links(compiler)


def links(compiler, *words):
    words = [*words, *shlex.split(os.environ.get("LDFLAGS", ""))]
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, "-shared", "-x", "c++", os.devnull, "-x", "none", "-o", f"{folder}/empty.so", *words]
        return subprocess.run(command, capture_output=True).returncode == 0


def standard_library(compiler):
    """How the linker is to find libstdc++: shared, whatever the compiler has."""
    found = subprocess.run([*compiler, "-print-file-name=libstdc++.so"], capture_output=True, text=True).stdout.strip()
    # A toolchain with the static one alone, which answers with the bare name, would put a copy into the library. A
    # process with two of them crashes at the first exception, and every refusal is one.
    return "-lstdc++" if os.path.isabs(found) else "-l:libstdc++.so.6"


def make_extension(kind, compiler):
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = ["csrc/module.cpp", *sorted(glob("csrc/*/*_cpu.cpp"))]
    # errno and floating-point traps are read by nobody here; without them loops vectorise, and no result changes.
    numerics = ["-fno-math-errno", "-fno-trapping-math"]
    cxx = ["-O3", "-g0", "-std=c++20", "-fopenmp", *numerics, "-fvisibility=hidden", "-Wall", TORCH_TARGET]
    flags = {"cxx": cxx}
    if kind == "cuda":
        # Fixed rather than read from the GPU in sight: a container that builds without one must give the same library.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        cxx += ["-DUSE_CUDA", "-DFUSED_INPAINT_CUDA"]
        sources += sorted(glob("csrc/*/*_cuda.cu"))
        flags["nvcc"] = ["-O3", "-std=c++20", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden", TORCH_TARGET]
    extension = (CUDAExtension if kind == "cuda" else CppExtension)(
        "fused_inpaint._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)),
        extra_compile_args=flags,
        # CPython's free-threaded builds have no limited API.
        py_limited_api=not sysconfig.get_config_var("Py_GIL_DISABLED"),
    )
    # --as-needed records only the libraries the stable ABI really uses. libstdc++ comes first because torch's libraries
    # export some of its symbols as well, and ours must not bind to those.
    libraries = [f"-l{name}" for name in extension.libraries if name != "torch_python"]
    extension.extra_link_args = ["-fopenmp", "-Wl,--as-needed", standard_library(compiler), *libraries]
    extension.libraries = []
    return extension, flags


def with_facts(command, writes):
    """`command`, leaving _build.json beside the library: what was built, or why nothing was."""

    class WithFacts(command):
        def facts_files(self):
            folders = [Path(self.build_lib) / "fused_inpaint"]
            if getattr(self, "inplace", False) or getattr(self, "editable_mode", False):
                folders.append(ROOT / "fused_inpaint")
            return [folder / FACTS_FILE for folder in folders]

        def run(self):
            if not writes:
                return super().run()
            # A failed rebuild must not leave the old facts to vouch for the old library.
            for path in self.facts_files():
                path.unlink(missing_ok=True)
            try:
                super().run()
            except Exception as error:
                if not self.distribution.ext_modules:
                    raise
                stop(f"compiling the extension failed, see the compiler's output above ({error}); {WITHOUT}")
            if self.distribution.ext_modules:
                FACTS["library"] = Path(self.get_ext_filename("fused_inpaint._C")).name
            for path in self.facts_files():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(FACTS, indent=2) + "\n")

        def get_outputs(self, *args, **kwargs):
            outputs = super().get_outputs(*args, **kwargs)
            return [*outputs, str(self.facts_files()[0])] if writes else outputs

    return WithFacts


choice = os.environ.get("FUSED_INPAINT_BUILD") or "auto"
if choice not in CHOICES:
    stop(f"FUSED_INPAINT_BUILD must be auto, cpu, cuda or none, got {choice!r}")
if int(setuptools.__version__.split(".")[0]) < MIN_SETUPTOOLS:
    actual = setuptools.__version__
    stop(f"setuptools must be {MIN_SETUPTOOLS} or newer, got {actual}; pip install -U setuptools ninja")

FACTS = {"kind": "none", "requested": choice, "reason": "", "library": None, "torch": None, "cuda": None}
arguments = {"cmdclass": {"build_py": with_facts(build_py, True), "build_ext": with_facts(build_ext, True)}}

# Listing requirements and packing an sdist compile nothing and must work where torch is not installed. dist_info is
# among the others because pip runs it before it downloads the dependencies, which is the time to ask for torch.
if COMPILING & set(sys.argv):
    torch = None if choice == "none" else find_torch()
    compiler = find_compiler()
    FACTS["kind"], FACTS["reason"] = decide(choice, torch, compiler)
    if FACTS["kind"] != "none":
        from torch.utils.cpp_extension import BuildExtension

        os.environ["CXX"] = shlex.join(compiler)
        extension, flags = make_extension(FACTS["kind"], compiler)
        FACTS["compiler"] = compiler_version(compiler)
        FACTS["flags"] = {language: shlex.join(words) for language, words in flags.items()}
        FACTS["torch"] = str(torch.__version__)
        if FACTS["kind"] == "cuda":
            FACTS["cuda"] = torch.version.cuda
            FACTS["arch_list"] = os.environ["TORCH_CUDA_ARCH_LIST"]
        arguments["ext_modules"] = [extension]
        arguments["cmdclass"] = {"build_py": with_facts(build_py, False), "build_ext": with_facts(BuildExtension, True)}
        if extension.py_limited_api:
            arguments["options"] = {"bdist_wheel": {"py_limited_api": "cp310"}}
    for key, value in FACTS.items():
        if value:
            print(f"fused_inpaint: {key} = {value}", flush=True)

setuptools.setup(**arguments)
