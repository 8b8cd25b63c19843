# SPDX-License-Identifier: Apache-2.0
"""The project's CUDA C++ without a GPU: run on the CPU under the whole op suite, and compiled by nvcc. With sanitizers,
the CPU's kernels, too."""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_emulation import build
from torch.utils.cpp_extension import include_paths

KERNELS = sorted((build.ROOT / "csrc").glob("*/*_cuda.cu"))
VALUES = [
    f"tests/test_{op}.py"
    for op in (
        "partial_conv",
        "partial_conv_gpu_ops",
        "region_norm",
        "region_norm_kernels",
        "region_conv",
        "gated_blend",
        "pyramid_conv",
    )
]
SUITE = [*VALUES, "tests/test_library.py", "tests/test_strides.py", "tests/test_flops.py"] + [
    f"tests/test_partial_conv_{part}.py" for part in ("numerics", "properties", "layers", "norm", "errors", "compile")
]
emulated = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "available")


def run_suite(library: Path, arguments: list[str], sanitize: bool, reverse: bool) -> None:
    env = build.environment(library, sanitize, reverse)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=build.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 50, done.stdout[-2000:]


@emulated
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_op_suite_on_emulated_kernels(reverse: bool) -> None:
    """Every test of the operators, with the kernels' threads and blocks in either order."""
    # The second route is the partial convolution's, and tracing does not depend on the kernel inside.
    selected = "cuda and not (cuda_vendor and (region or gated or pyramid or opcheck or compile or export))"
    if reverse:
        selected += " and not (opcheck or compile)"
    run_suite(build.build(KERNELS), [*(VALUES if reverse else SUITE), "-k", selected], sanitize=False, reverse=reverse)


@emulated
def test_sanitized_kernels() -> None:
    """Out-of-bounds and undefined behaviour, on the samples in float32."""
    run_suite(
        build.build(KERNELS, sanitize=True),
        [*VALUES, "-k", "cuda and not cuda_vendor and float32 and (test_reference or gpu_ops)"],
        sanitize=True,
        reverse=False,
    )


@pytest.mark.skipif(bool(build.missing(cuda=False)), reason=build.missing(cuda=False) or "available")
def test_sanitized_cpu_kernels() -> None:
    """The same of the CPU's own kernels, also on random arguments."""
    run_suite(
        build.build(sorted((build.ROOT / "csrc").glob("*/*_cpu.cpp")), sanitize=True),
        [
            *VALUES,
            "tests/test_hardening.py",
            "tests/test_convolution.py",
            "-k",
            "any_arguments or few_pixels or test_gradients or (cpu and float32 and test_reference)",
        ],
        sanitize=True,
        reverse=False,
    )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_nvcc_compiles_without_spills(tmp_path: Path) -> None:
    """For sm_80 and sm_90, warnings being errors; no kernel spills registers."""

    def compiled(source: Path) -> str:
        command = ["nvcc", "-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        command += ["-Werror", "all-warnings", "-Xptxas", "-v", f"-I{build.ROOT / 'csrc'}"]
        command += [argument for folder in include_paths() for argument in ("-isystem", folder)]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
        command += ["-c", str(source), "-o", str(tmp_path / f"{source.stem}.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stderr

    with ThreadPoolExecutor(2) as pool:
        report = "".join(pool.map(compiled, KERNELS))
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) > 50 and all(store == load == "0" for store, load in spills)
