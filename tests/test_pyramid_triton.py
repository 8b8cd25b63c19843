# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of parallel dilated convolutions without a GPU: in Triton's interpreter, and compiled for sm_80 and
sm_90. As in test_region_triton.py, the interpreter has a process of its own, which `test_interpreter` starts."""

import dataclasses
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import pytest
import test_pyramid_conv as conv
import torch
from cases import assert_close
from test_partial_conv_triton import INTERPRETED, NO_PTXAS, SHARED_MEMORY, Compiled, interpreted, no_line_numbers
from test_region_triton import TARGETS, TYPES, record_launches, run_interpreted, starts_interpreter
from torch import Tensor

from fused_inpaint import NoBackendError, ops, use_backend


@pytest.fixture
def triton(poisoned: None, one_thread: None) -> Iterator[None]:
    with use_backend("triton"):
        yield


def forward(case: conv.Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(y, the reference's in float64)"""
    s = conv.sample(case, dtype)
    with torch.no_grad():
        y = s()
        with use_backend("reference"):
            return y, s.wide()()


# The interpreter takes its time: small maps, and where they are small, few branches.
CASES = [
    dataclasses.replace(case, batch=1, size=case.size if case.size < (5, 9) else (5, 9))
    for case in conv.CASES
    if "tiled" not in case.name and case.name not in ("eight", "as_far_as_reflects", "empty_batch")
]


@interpreted
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    "case, dtype, rtol",
    [
        pytest.param(case, dtype, rtol, id=f"{case.name}-{dtype}")
        for case in CASES
        for dtype, rtol in TYPES
        if dtype == torch.float32 or case.name == "nine_outputs"
    ],
)
def test_forward(case: conv.Case, dtype: torch.dtype, rtol: float) -> None:
    y, expected = forward(case, dtype)
    assert_close(y, expected, rtol)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    if dtype == torch.bfloat16:
        assert torch.equal(y, forward(case, dtype)[0])


@interpreted
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("shape", [(8, 16), (8, 8)], ids=str)
def test_tiles(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps take small tiles; here they take the others. Two tiles of outputs for each branch."""
    from fused_inpaint.ops import triton_common

    monkeypatch.setattr(triton_common, "SHAPES", (shape,))
    case = conv.Case("shapes", (1, 3), "replicate", channels=18, outputs=35, size=(9, 11), batch=2)
    y, expected = forward(case, torch.float32)
    assert_close(y, expected, 1e-5)


@interpreted
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", ["reflect", "no_activation"])
def test_one_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all branches; and the gradients come from the compiled library or the reference."""
    from fused_inpaint.ops import triton_common

    launched: list[str] = []
    launch = triton_common.launch

    def counting(kernel: Any, *arguments: Any, **options: Any) -> None:
        launched.append(kernel.fn.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(triton_common, "launch", counting)
    s = conv.sample(next(case for case in CASES if case.name == name))
    grad = conv.cotangent(s)
    actual, expected = conv.results(s, grad), conv.truth(s, grad)
    assert launched == ["pyramid_kernel"]
    for key, value in actual.items():
        assert_close(value, expected[key], 1e-5, what=key)


@interpreted
def test_refuses_float64() -> None:
    with use_backend("triton"), pytest.raises(NoBackendError, match="it computes in float32, not float64"):
        ops.pyramid_conv2d(torch.ones(1, 1, 3, 3).double(), torch.ones(1, 1, 3, 3).double(), None, (1,))
    with pytest.raises(ValueError, match="x must be float16, bfloat16 or float32 for the triton backend, got float64"):
        x = torch.ones(1, 1, 3, 3).double()
        torch.ops.fused_inpaint.pyramid_conv2d_triton(x, x, None, [1], "reflect", "relu")


@starts_interpreter
def test_interpreter() -> None:
    """All of the above, and the operator's own suite on a few cases."""
    chosen = "test_pyramid_triton or (triton and (one_pixel-grad or test_nan_stays) and not tiled)"
    run_interpreted([(24, ["test_pyramid_triton.py", "test_pyramid_conv.py"], chosen)])


def compile_kernels(dtype: torch.dtype, precision: str, capability: int) -> list[Compiled]:
    """The kernel as AOT-GAN at 512 x 512 launches it, and as DeepGIN at 256 x 256."""
    from fused_inpaint.ops.pyramid_conv.triton_impl import pyramid_conv2d

    found = record_launches(precision, capability)

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta", memory_format=torch.channels_last)

    bias = torch.empty(256, device="meta")
    weight = empty(256, 256, 3, 3)
    pyramid_conv2d(empty(1, 256, 128, 128), weight, bias, [1, 2, 4, 8], "reflect", "relu")
    pyramid_conv2d(empty(1, 256, 32, 32), weight, bias, list(conv.SPD8), "replicate", "relu")
    if precision == "half":
        pyramid_conv2d(empty(1, 256, 32, 32), weight, None, [1], "zeros", "none")
    return list(found.values())


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[str, Future[list[Compiled]]]]:
    """By precision and architecture; two processes compile, and this one never loads Triton."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=no_line_numbers) as pool:
        yield {str(target.id): pool.submit(compile_kernels, *target.values) for target in TARGETS}


@pytest.mark.skipif(bool(NO_PTXAS) or INTERPRETED, reason=NO_PTXAS or "Triton's interpreter is on in this process")
@pytest.mark.parametrize(("dtype", "precision", "capability"), TARGETS)
def test_compiles(
    compiled: dict[str, Future[list[Compiled]]],
    request: pytest.FixtureRequest,
    dtype: torch.dtype,
    precision: str,
    capability: int,
) -> None:
    """Machine code that fits, spills nothing, and multiplies on tensor cores."""
    results = compiled[request.node.callspec.id].result()
    assert [result.kernel for result in results] == ["pyramid_kernel"] * (3 if precision == "half" else 2)
    for result in results:
        assert result.cubin > 0 and result.shared <= SHARED_MEMORY[capability] and result.spilled == 0, result
        # Of 32 pixels, where the map is small, there is none.
        wgmma = capability == 90 and result.options["BLOCK_H"] * result.options["BLOCK_W"] >= 64
        assert (result.wgmma, result.mma) == ((False, False) if precision == "ieee" else (wgmma, not wgmma)), result
        assert result.wide_copies and result.conversions == 0, result
