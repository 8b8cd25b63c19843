# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the gated blend without a GPU: in Triton's interpreter, and compiled for sm_80 and sm_90. As in
test_partial_conv_triton.py, the interpreter has a process of its own, which `test_interpreter` starts."""

import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import test_gated_blend as gated
import torch
from cases import assert_close
from test_partial_conv_triton import (
    INTERPRETED,
    NO_PTXAS,
    ROOT,
    SHARED_MEMORY,
    Compiled,
    Driver,
    inspect,
    interpreted,
    no_interpreter,
    no_line_numbers,
)
from torch import Tensor

from fused_inpaint import use_backend

if INTERPRETED and not no_interpreter():
    from fused_inpaint.ops import triton_common
    from fused_inpaint.ops.gated_blend import triton_impl


@pytest.fixture
def triton(poisoned: None, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend, with small tiles, of which chunks have several."""
    monkeypatch.setattr(triton_impl, "_ELEMENTS", 512)
    monkeypatch.setattr(triton_impl, "_PROGRAMS", 2)
    with use_backend("triton"):
        yield


# The interpreter cuts bfloat16 off where a GPU rounds, which is as much as two roundings.
TYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)]


@interpreted
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    "case, dtype, rtol",
    [
        pytest.param(case, dtype, rtol, id=f"{case.name}-{dtype}")
        for case in gated.CASES
        for dtype, rtol in TYPES
        if not case.name.startswith(("empty", "many")) and (dtype == torch.float32 or case.name in ("plain", "wide"))
    ],
)
def test_blend(case: gated.Case, dtype: torch.dtype, rtol: float) -> None:
    """Output and gradients; and twice the same bits."""
    maps, grad = gated.sample(case, dtype), torch.randn(case.size).to(dtype)
    found, expected = gated.results(maps, grad), gated.truth(maps, grad)
    for name, value in found.items():
        assert_close(value, expected[name], rtol, 4 * rtol if case.name == "two_pixels" else 0.0, name)
    if case.name in ("plain", "wide"):
        again = gated.results(maps, grad)
        assert all(torch.equal(value, again[name]) for name, value in found.items())


@interpreted
def test_launches(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    launch = triton_common.launch

    def counting(kernel: Any, *arguments: Any, **options: Any) -> None:
        launched.append(kernel.fn.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(triton_common, "launch", counting)
    maps = gated.sample(gated.SMALL)
    gated.results(maps, torch.ones(gated.SMALL.size))
    forward = ["moments_kernel", "merge_kernel", "blend_kernel"]
    assert launched == [*forward, "sums_kernel", "merge_sums_kernel", "gradient_kernel"]
    launched.clear()
    maps[2].requires_grad_(False)
    gated.ops.gated_blend(*maps).sum().backward()
    assert launched == [*forward, "gradient_kernel"]


@pytest.mark.skipif(
    bool(no_interpreter()) or INTERPRETED, reason=no_interpreter() or "this process is the one that it would start"
)
def test_interpreter() -> None:
    """All of the above, and what the operator's own suite says of other things than numbers."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("FUSED_INPAINT_BACKEND", None)
    files = [ROOT / "tests" / f"test_gated_blend{part}.py" for part in ("_triton", "")]
    chosen = "test_gated_blend_triton or (triton and not (test_reference or test_compile or threads))"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 30, done.stdout[-2000:]


def compile_kernels(dtype: torch.dtype, capability: int) -> list[Compiled]:
    """Each kernel as AOT-GAN's block at 512 x 512 launches it."""
    from triton.runtime.driver import driver

    from fused_inpaint.ops import triton_common
    from fused_inpaint.ops.gated_blend import triton_impl

    driver.set_active(Driver(capability))
    found: list[Compiled] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        built = kernel.warmup(*arguments, grid=grid, **options, enable_fp_fusion=True)
        found.append(inspect("", kernel, options, built))

    triton_common.launch = launch

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta", memory_format=torch.channels_last)

    maps = [empty(1, 256, 128, 128) for _ in range(4)]
    _, statistics = triton_impl.gated_blend(*maps[:3])
    triton_impl.gated_blend_backward(*maps, statistics, True, True, True)
    return found


@pytest.mark.skipif(bool(NO_PTXAS) or INTERPRETED, reason=NO_PTXAS or "Triton's interpreter is on in this process")
def test_compiles() -> None:
    """Machine code that fits and spills nothing; this process never loads Triton."""
    dtypes, capabilities = (torch.bfloat16, torch.float32), (90, 80)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=no_line_numbers) as pool:
        for capability, results in zip(capabilities, pool.map(compile_kernels, dtypes, capabilities), strict=True):
            assert len({result.kernel for result in results}) == len(results) == 6
            for result in results:
                assert result.cubin > 0 and result.shared <= SHARED_MEMORY[capability] and result.spilled == 0, result
