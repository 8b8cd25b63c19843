# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of region normalization and region-wise convolution without a GPU: in Triton's interpreter, and
compiled for sm_80 and sm_90. As in test_partial_conv_triton.py, the interpreter has processes of its own, which
`test_interpreter` starts."""

import dataclasses
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import pytest
import test_region_conv as conv
import test_region_norm as norm
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

from fused_inpaint import ops, use_backend

if INTERPRETED and not no_interpreter():
    from fused_inpaint.ops import triton_common
    from fused_inpaint.ops.region_conv import triton_impl as conv_triton
    from fused_inpaint.ops.region_norm import triton_impl as norm_triton


@pytest.fixture
def triton(poisoned: None, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend, with small tiles, of which chunks have several."""
    monkeypatch.setattr(norm_triton, "_ELEMENTS", 512)
    monkeypatch.setattr(norm_triton, "_PROGRAMS", 2)
    with use_backend("triton"):
        yield


# The interpreter cuts bfloat16 off where a GPU rounds, which is as much as two roundings.
TYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)]
FEW_NORMS = ("leaky_relu", "maps_relu")


@interpreted
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    "case, dtype, rtol",
    [
        pytest.param(case, dtype, rtol, id=f"{case.name}-{dtype}")
        for case in norm.CASES
        for dtype, rtol in TYPES
        if case.name not in ("many_chunks", "empty_batch") and (dtype == torch.float32 or case.name in FEW_NORMS)
    ],
)
def test_norm(case: norm.Case, dtype: torch.dtype, rtol: float) -> None:
    """Output and gradients; and twice the same bits."""
    grad = torch.randn(case.size).to(dtype)
    found = norm.results(*norm.sample(case, dtype), grad)
    expected = norm.truth(*norm.sample(case, dtype), grad)
    for name, value in found.items():
        assert_close(value, expected[name], rtol, what=name)
    if case.name in FEW_NORMS:
        again = norm.results(*norm.sample(case, dtype), grad)
        assert all(torch.equal(value, again[name]) for name, value in found.items())


@interpreted
@pytest.mark.usefixtures("triton")
# NaN is what the test is about; numpy warns of it.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("planes", ["n1", "1c"])
@pytest.mark.parametrize("poisoned_region", [0, 1])
def test_norm_does_not_leak(poisoned_region: int, planes: str) -> None:
    """NaN and infinity in one region, and in its gradient, leave the other as it is."""
    case = norm.Case("leak", mask="box", activation="relu", planes=planes)
    x, mask, rest = norm.sample(case, torch.float32)
    grad = torch.randn(case.size)
    clean = norm.results(x, mask, rest, grad)
    poisoned = (mask == poisoned_region).expand_as(x)
    assert poisoned.any() and not poisoned.all()
    x2, _, rest2 = norm.sample(case, torch.float32)
    with torch.no_grad():
        x2[poisoned] = torch.nan
        x2[0, 0][poisoned[0, 0]] = torch.inf
    dirty = norm.results(x2, mask, rest2, grad.masked_fill(poisoned, torch.nan))
    for name in ("y", "x"):
        assert torch.equal(dirty[name][~poisoned], clean[name][~poisoned])
    assert dirty["y"][poisoned].isnan().all()
    for name in ("weight", "bias"):
        assert torch.equal(dirty[name][1 - poisoned_region], clean[name][1 - poisoned_region])


@interpreted
@pytest.mark.usefixtures("triton")
def test_norm_of_large_means() -> None:
    """Mean 1e4, deviation 1e-2: float32 has ten steps in it."""
    x, mask = 1e4 + 1e-2 * torch.randn(2, 5, 20, 15), torch.rand(2, 1, 20, 15) > 0.5
    with use_backend("reference"):
        expected = ops.region_norm(x.double(), mask)
    assert_close(ops.region_norm(x, mask), expected, 1e-5)


@interpreted
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype, rtol", TYPES)
@pytest.mark.parametrize("channels", [1, 5, 70])
def test_pool(channels: int, dtype: torch.dtype, rtol: float) -> None:
    """Of values that tie, the first takes the gradient."""
    x = torch.randint(-4, 4, (2, channels, 3, 5)).to(dtype).requires_grad_()
    grad = torch.randn(2, 2, 3, 5).to(dtype)
    y = ops.channel_pool(x)
    y.backward(grad)
    wide = x.detach().double()
    assert_close(y, torch.cat([wide.mean(1, keepdim=True), wide.amax(1, keepdim=True)], 1), rtol)
    first = torch.zeros_like(wide).scatter_(1, wide.argmax(1, keepdim=True), 1.0)
    assert_close(x.grad, grad[:, :1].double() / channels + grad[:, 1:].double() * first, rtol)


@interpreted
@pytest.mark.usefixtures("triton")
def test_pool_of_nan() -> None:
    """It is the largest value, and takes the gradient."""
    x = torch.randn(1, 40, 2, 3)
    x[:, [7, 30], 1, 2] = torch.nan
    x[:, 35, 0, 0] = torch.inf
    x.requires_grad_()
    y = ops.channel_pool(x)
    assert y.isnan().sum() == 2 and y[0, :, 1, 2].isnan().all() and y[0, 1, 0, 0] == torch.inf
    y[:, 1].sum().backward()
    assert x.grad is not None
    assert x.grad.sum() == 6 and x.grad[0, 7, 1, 2] == 1 and x.grad[0, 35, 0, 0] == 1


def forward(case: conv.Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(y, the reference's in float64), of NaN and infinities under the other source's region."""
    s = conv.sample(case, dtype, nan=True)
    with torch.no_grad():
        y = s()
        with use_backend("reference"):
            return y, s.wide()()


FEW_CONVOLUTIONS = ("output_wide", "pair_elu", "up_reflect")
SMALL = {"batch": 1, "size": (5, 9)}  # the interpreter takes its time


@interpreted
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    "case, dtype, rtol",
    [
        pytest.param(case, dtype, rtol, id=f"{case.name}-{dtype}")
        for case in conv.CASES
        for dtype, rtol in TYPES
        if "tiles" not in case.name
        and case.name != "empty_batch"
        and (dtype == torch.float32 or case.name in FEW_CONVOLUTIONS)
    ],
)
def test_conv(case: conv.Case, dtype: torch.dtype, rtol: float) -> None:
    case = dataclasses.replace(case, **(SMALL if case.name in FEW_CONVOLUTIONS else {"batch": 1}))
    y, expected = forward(case, dtype)
    assert_close(y, expected, 5 * rtol if case.upsample == 2 and dtype == torch.float32 else rtol)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    if dtype == torch.bfloat16:
        assert torch.equal(y, forward(case, dtype)[0])


@interpreted
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("shape", [(8, 16), (8, 8)], ids=str)
@pytest.mark.parametrize("name", ["output_elu", "pair_elu", "up_zeros"])
def test_conv_tiles(name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps take small tiles; here they take the others."""
    monkeypatch.setattr(triton_common, "SHAPES", (shape,))
    case = next(case for case in conv.CASES if case.name == name)
    y, expected = forward(dataclasses.replace(case, batch=2, shared=True, size=(5, 9)), torch.float32)
    assert_close(y, expected, 5e-5 if case.upsample == 2 else 1e-5)


@interpreted
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("select", ["output", "input"])
def test_conv_leaves_out(select: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles in one region multiply by one filter, or one source; only those across the edge by both."""
    products = 0
    dot = triton_common.dot

    def counting(*arguments: Any) -> Any:
        nonlocal products
        products += 1
        return dot(*arguments)

    monkeypatch.setattr(triton_common, "dot", counting)
    channels = (3,) if select == "output" else (3, 2)
    case = conv.Case("left_out", select, channels, size=(8, 24), batch=1, kernel=(1, 1), padding=(0, 0))
    s = conv.sample(case)
    found = []
    for width in (0, 8, 12, 24):
        s.mask = torch.zeros(1, 1, 8, 24)
        s.mask[..., :width] = 1
        products = 0
        with torch.no_grad():
            s()
        found.append(products)
    # 2 x 3 tiles of 4 x 8 pixels
    assert found == [6, 6, 8, 6]


@interpreted
def test_conv_refusals() -> None:
    case = conv.Case("large", "input", (1, 1), kernel=(8, 8), padding=(4, 4))
    with (
        use_backend("triton"),
        pytest.raises((ValueError, RuntimeError), match="it takes kernels of at most 62 taps, not 64"),
    ):
        conv.sample(case)()
    assert "not float64" in conv_triton.refusal(torch.float64, "output", (3, 3))
    assert not conv_triton.refusal(torch.float16, "output", (9, 9))


@interpreted
@pytest.mark.usefixtures("triton")
def test_moments_of_an_empty_share() -> None:
    """A process of a group may have no image of a batch."""
    found = norm_triton.region_moments(torch.empty(0, 3, 4, 4), torch.empty(0, 1, 4, 4, dtype=torch.uint8), False)
    assert [tuple(t.shape) for t in found] == [(1, 2, 1), (1, 2, 3), (1, 2, 3)]
    assert not any(t.any() for t in found)


@interpreted
def test_launches(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    launch = triton_common.launch

    def counting(kernel: Any, *arguments: Any, **options: Any) -> None:
        launched.append(kernel.fn.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(triton_common, "launch", counting)
    x, mask, rest = norm.sample(norm.Case("launches"), torch.float32)
    norm.results(x, mask, rest, torch.ones(x.shape))
    assert launched == ["moments_kernel", "merge_kernel", "normalize_kernel", "sums_kernel", "gradient_kernel"]
    launched.clear()
    for name in ("output", "pair", "up_zeros"):
        forward(next(case for case in conv.CASES if case.name == name), torch.float32)
    assert launched == ["output_kernel", "input_kernel", "fold_kernel", "input_kernel"]


def run_interpreted(selections: list[tuple[int, list[str], str]]) -> None:
    """A process with the interpreter for each selection, (least number of tests that pass, files, -k)."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("FUSED_INPAINT_BACKEND", None)
    tests = ROOT / "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    running = [
        subprocess.Popen(
            [*command, *(tests / file for file in files), "-k", chosen],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _, files, chosen in selections
    ]
    for process, (least, _, _) in zip(running, selections, strict=True):
        output, _ = process.communicate()
        assert process.returncode == 0, output[-6000:]
        passed = re.search(r"(\d+) passed", output)
        assert passed is not None and int(passed[1]) >= least, output[-2000:]


starts_interpreter = pytest.mark.skipif(
    bool(no_interpreter()) or INTERPRETED, reason=no_interpreter() or "this process is the one that it would start"
)


@starts_interpreter
def test_interpreter() -> None:
    """All of the above, and the operators' own suites on a few cases, in two processes."""
    selections = [
        (40, ["test_region_triton.py"], "test_conv"),
        (
            40,
            ["test_region_triton.py", "test_region_norm.py", "test_region_conv.py"],
            "(test_region_triton and (norm or pool or launches)) or (triton and (published_rn or test_opcheck-maps))"
            " or (triton and float32 and (output_elu or up_zeros) and test_reference)",
        ),
    ]
    run_interpreted(selections)


def record_launches(precision: str, capability: int) -> dict[str, Compiled]:
    """From here on launches of kernels compile them, into the dictionary that is returned."""
    from triton.runtime.driver import driver

    from fused_inpaint.ops import triton_common

    driver.set_active(Driver(capability))
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    found: dict[str, Compiled] = {}

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        built = kernel.warmup(*arguments, grid=grid, **options, enable_fp_fusion=True)
        found.setdefault(built.hash, inspect("", kernel, options, built))

    triton_common.launch = launch
    return found


def compile_kernels(dtype: torch.dtype, precision: str, capability: int) -> list[Compiled]:
    """Each kernel once, as a middle layer at 256 x 256 launches it."""
    from fused_inpaint.ops.region_conv import triton_impl as conv_triton
    from fused_inpaint.ops.region_norm import triton_impl as norm_triton

    found = record_launches(precision, capability)

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        like = {"memory_format": torch.channels_last} if len(size) == 4 else {}
        return torch.empty(size, dtype=dtype, device="meta", **like)

    pairs = [(value, value) for value in (1, 1, 1)]
    x, mask = empty(4, 64, 128, 128), empty(4, 1, 128, 128, dtype=torch.uint8)
    constant = empty(64, dtype=torch.float32)
    conv_triton.region_conv2d_output(x, mask, empty(2, 64, 64, 3, 3), empty(2, 64), *pairs, "reflect", "elu")
    conv_triton.region_conv2d_input(x, x, mask, empty(64, 128, 3, 3), constant, 2, *pairs, "reflect", "elu")
    if precision == "half":
        conv_triton.region_conv2d_input(x, x, mask, empty(64, 128, 5, 5), constant, 2, *pairs, "zeros", "none")
    if precision != "tf32":
        statistics = empty(1, 2, 64, dtype=torch.float64)
        parameters = (None, None, *[empty(4, 1, 128, 128, dtype=torch.float32)] * 2)
        if precision == "half":
            parameters = (*[empty(2, 64, dtype=torch.float32)] * 2, None, None)
        point = (*parameters, False, "leaky_relu", 0.2)
        norm_triton.region_moments(x, mask, False)
        norm_triton.region_norm(x, mask, statistics, statistics, statistics, *point, 1e-5, False, "")
        norm_triton.region_norm_sums(x, x, mask, statistics, statistics, *point)
        means = empty(1, 2, 2, 64, dtype=torch.float64)
        norm_triton.region_norm_gradient(x, x, mask, statistics, statistics, means, *point)
        pooled = norm_triton.channel_pool(x)
        norm_triton.channel_pool_backward(pooled, x, pooled)
    return list(found.values())


TARGETS = [
    pytest.param(torch.bfloat16, "half", 90, id="bfloat16-sm_90"),
    pytest.param(torch.float32, "ieee", 80, id="float32-sm_80"),
    pytest.param(torch.float16, "half", 80, id="float16-sm_80"),
    pytest.param(torch.float32, "tf32", 90, id="tf32-sm_90"),
]
CONVOLUTIONS = {"output_kernel", "input_kernel", "fold_kernel"}
PASSES = {"moments_kernel", "merge_kernel", "normalize_kernel", "sums_kernel", "gradient_kernel", "pool_kernel"}
PASSES |= {"pool_backward_kernel"}


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
    assert {result.kernel for result in results} == CONVOLUTIONS | (PASSES if precision != "tf32" else set())
    old = capability == 80 and bool(no_interpreter())
    for result in results:
        most = 24 if old and result.options.get("MODE") == "reflect" else 0  # of Triton 3.6
        assert result.cubin > 0 and result.shared <= SHARED_MEMORY[capability] and result.spilled <= most, result
        if result.kernel in ("output_kernel", "input_kernel"):
            wgmma = capability == 90
            assert (result.wgmma, result.mma) == ((False, False) if precision == "ieee" else (wgmma, not wgmma)), result
            assert result.wide_copies and result.conversions == 0, result
