# SPDX-License-Identifier: Apache-2.0
"""Numerics of the partial convolution: holes, empty windows, statistics, determinism, derivatives of both orders."""

import dataclasses

import pytest
import torch
from cases import Case, Sample, assert_close, assert_same, cotangent, named, results, sample
from test_partial_conv import skip_unsupported
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fused_inpaint import ops, use_backend

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
HOLED = [
    "relu",
    "channel_masks",
    "two_sources",
    "up_leaky_relu_folded",
    "up_direct",
    "train_relu",
    "up_train_folded",
    "eval",
]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", HOLED)
def test_hole_contents_reach_nothing(backend: str, device: torch.device, name: str, value: float) -> None:
    """Not a bit of output, statistics or any gradient changes with what lies under the holes."""
    runs = []
    for content in (0.0, value):
        s = sample(named(name), device=device, nan=False)
        assert s.masks is not None
        holes = [(m == 0).expand_as(x) for x, m in zip(s.x, s.masks, strict=True)]
        s.x = [x.detach().masked_fill(h, content).requires_grad_() for x, h in zip(s.x, holes, strict=True)]
        runs.append(results(s, cotangent(s)))
        for x, h in zip(s.x, holes, strict=True):
            assert x.grad is not None and not x.grad[h].any()
    assert_same(*runs)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_outside_holes_do_reach(backend: str, device: torch.device, value: float) -> None:
    """Selecting must not turn into cleaning: a NaN that is valid shows."""
    x = torch.ones(1, 1, 5, 5, device=device)
    x[0, 0, 2, 2] = value
    y, _ = ops.partial_conv2d(
        x, torch.ones_like(x), torch.ones(1, 1, 3, 3, device=device), padding=1, activation="relu"
    )
    inner = torch.zeros_like(y, dtype=torch.bool)
    inner[..., 1:-1, 1:-1] = True
    assert torch.equal(y.isfinite(), ~inner)


@DTYPES
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
def test_empty_windows_are_exactly_zero(
    backend: str, device: torch.device, dtype: torch.dtype, activation: str
) -> None:
    """An all-hole picture, NaN weights and bias: output, mask and every gradient are 0."""
    skip_unsupported(device, dtype)
    s = sample(dataclasses.replace(named("all_hole"), activation=activation), dtype, device)
    with torch.no_grad():
        s.weight.fill_(torch.nan)
        assert s.bias is not None
        s.bias.fill_(torch.nan)
    for name, value in results(s, torch.full((2, 4, 9, 11), torch.nan)).items():
        assert not value.any(), name


@DTYPES
@pytest.mark.parametrize("name", ["plain", "up_folded", "up_direct", "channel_masks"])
def test_nan_weights_stay_out_of_empty_windows(
    backend: str, device: torch.device, dtype: torch.dtype, name: str
) -> None:
    skip_unsupported(device, dtype)
    case = dataclasses.replace(named(name), masks=("pixel", "zeros")[: len(named(name).channels)])
    s = sample(case, dtype, device)
    with torch.no_grad():
        s.weight.fill_(torch.nan)
    y, mask = s()
    assert 0 < mask.sum() < mask.numel()
    valid = mask.bool().expand_as(y)
    assert not y[~valid].any() and bool(y[valid].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_window_in_a_hole(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Where an eps of 1e-8 underflows, 0 / (0 + eps) is NaN; here nothing is divided."""
    x = torch.full((1, 8, 12, 12), 100.0, dtype=dtype, device=device, requires_grad=True)
    mask = torch.ones(1, 1, 12, 12, dtype=dtype, device=device)
    mask[..., 2:10, 2:10] = 0
    weight = torch.ones(2, 8, 3, 3, dtype=dtype, device=device, requires_grad=True)
    y, new_mask = ops.partial_conv2d(x, mask, weight, padding=1)
    y.backward(torch.ones_like(y))
    assert torch.equal(y.bool()[:, :1], new_mask.bool()) and not new_mask[..., 3:9, 3:9].any()
    # 72 values of 100 in each window, however few of them are valid.
    assert torch.equal(y[new_mask.bool().expand_as(y)], torch.full_like(y[new_mask.bool().expand_as(y)], 7200))
    assert x.grad is not None and not x.grad[..., 2:10, 2:10].any() and bool(x.grad.isfinite().all())


def test_half_sums_are_wide(backend: str, device: torch.device) -> None:
    """A numerator beyond float16's range is renormalised before it is rounded; long sums keep every term."""
    x = torch.full((1, 64, 4, 4), 32.0, dtype=torch.float16, device=device)
    weight = torch.full((1, 64, 3, 3), 1.0, dtype=torch.float16, device=device)
    y, _ = ops.partial_conv2d(x, None, weight, padding=1)
    assert torch.equal(y, torch.full_like(y, 18432))
    ones = torch.ones(1, 600, 4, 4, dtype=torch.bfloat16, device=device)
    y, _ = ops.partial_conv2d(ones, None, torch.ones(1, 600, 3, 3, dtype=torch.bfloat16, device=device), padding=1)
    assert torch.equal(y, torch.full_like(y, 5400).bfloat16())


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-8), (torch.float32, 5e-5)], ids=str)
@pytest.mark.parametrize("name, up", [("plain", 1), ("folded", 2), ("direct", 2)], ids=["plain", "folded", "direct"])
def test_large_mean_small_variance(
    backend: str, device: torch.device, name: str, up: int, dtype: torch.dtype, rtol: float
) -> None:
    """Values of 1e4 +- 1e-2: E[x^2] - E[x]^2 has no correct digit in float32 (1e8 against 1e-4).

    The inputs are multiples of float32's step at 1e4 (2^-10), so they and the identity convolution are exact.
    """
    skip_unsupported(device, dtype)
    n, c, size = 4, 3, 64
    step = torch.randint(-10, 11, (n, c, size, size), generator=torch.Generator().manual_seed(0)).double()
    values = (1e4 + step * 2**-10).to(device, dtype)
    weight = torch.eye(c, device=device, dtype=dtype).view(c, c, 1, 1)
    ones = torch.ones(c, device=device, dtype=dtype)
    mean, var = torch.zeros_like(ones), torch.zeros_like(ones)
    norm = ops.BatchNorm(ones, 0 * ones, mean, var, True, 1.0, 1e-12)
    y, _ = ops.partial_conv2d(values, None, weight, upsample=up, fold=name == "folded", batch_norm=norm)
    exact_mean, exact_var = values.double().mean((0, 2, 3)), values.double().var((0, 2, 3), correction=0)
    total = n * size * size * up * up
    assert_close(mean, exact_mean, 1e-6)
    assert_close(var, exact_var * total / (total - 1), rtol)
    expected = (values.double() - exact_mean.view(1, -1, 1, 1)) * exact_var.rsqrt().view(1, -1, 1, 1)
    if up == 2:
        expected = expected.repeat_interleave(2, 2).repeat_interleave(2, 3)
    # The mean itself is rounded to float32, half a step of 2^-10 away at most.
    assert (y.double() - expected).abs().max() < (
        1e-6 if dtype == torch.float64 else 0.51 * 2**-10 / exact_var.min() ** 0.5
    )


DETERMINISTIC = ["plain", "wide", "anisotropic", "depthwise", "up_folded", "up_direct", "up_train_folded", "train_wide"]


def bigger(name: str) -> Case:
    """Large enough that two threads share the work."""
    case = named(name)
    size = tuple(4 * s for s in case.size)
    return dataclasses.replace(case, size=size, batch=3, outputs=case.outputs * 4)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_run_to_run(backend: str, device: torch.device, name: str) -> None:
    s = sample(bigger(name), device=device)
    grad = cotangent(s)
    first = results(s, grad)
    for _ in range(3):
        assert_same(results(sample(bigger(name), device=device), grad), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_thread_count(backend: str, device: torch.device, name: str, dtype: torch.dtype) -> None:
    """All but the weight's gradient has the same bits for any number of threads; oneDNN splits that sum by thread, and
    in float64, where the convolution is MKL's product, MKL splits any on some processors."""
    if device.type != "cpu":
        pytest.skip("threads are the CPU's")
    before = torch.get_num_threads()
    grad = cotangent(sample(bigger(name), dtype))
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(results(sample(bigger(name), dtype), grad))
    finally:
        torch.set_num_threads(before)
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    of_vendor = runs[0].keys() - {"mask"} if dtype == torch.float64 else {"grad_weight"}
    for other in runs[1:]:
        mine = [{k: v for k, v in run.items() if k not in of_vendor} for run in (other, runs[0])]
        assert_same(*mine)
        for key in of_vendor:
            assert_close(other[key], runs[0][key], rtol, what=key)


def small(name: str, **changes: object) -> Sample:
    """A sample for finite differences: float64, and no value under a hole (a difference with a NaN is a NaN)."""
    case = dataclasses.replace(named(name), activation="leaky_relu", outputs=2, **changes)  # type: ignore[arg-type]
    return sample(case, torch.float64, nan=False)


def as_function(s: Sample) -> tuple[object, list[Tensor]]:
    leaves = list(s.leaves().values())

    def function(*values: Tensor) -> Tensor:
        it = iter(values)
        t = dataclasses.replace(s, x=[next(it) for _ in s.x], weight=next(it))
        t.bias = next(it) if s.bias is not None else None
        if s.norm is not None:
            gain_and_shift = [next(it), next(it)] if s.case.norm != "frozen" else list(s.norm[:2])
            t.norm = ops.BatchNorm(*gain_and_shift, s.norm[2].clone(), s.norm[3].clone(), *s.norm[4:])
        return t()[0]

    return function, leaves


TINY = [
    ("plain", {"size": (4, 3)}),
    ("channel_masks", {"size": (4, 3)}),
    ("two_sources", {"size": (3, 4)}),
    ("groups", {"size": (4, 3)}),
    ("anisotropic", {"size": (7, 6), "batch": 1}),
    ("train", {"size": (3, 4)}),
    ("eval", {"size": (3, 4)}),
    ("frozen", {"size": (3, 4)}),
    ("up_folded", {"size": (4, 4), "batch": 1, "channels": (2, 1)}),
    ("up_direct", {"size": (4, 4), "batch": 1, "channels": (2, 1)}),
    ("up_kernel5_folded", {"size": (4, 4), "batch": 1, "channels": (1, 1)}),
    ("up_train_folded", {"size": (4, 4), "batch": 1, "channels": (2, 1)}),
    ("up_eval_folded", {"size": (4, 4), "batch": 1, "channels": (2, 1)}),
]
TINY_CASES = pytest.mark.parametrize("name, changes", TINY, ids=[name for name, _ in TINY])


@TINY_CASES
def test_gradcheck(backend: str, device: torch.device, one_thread: None, name: str, changes: dict) -> None:
    skip_unsupported(device, torch.float64)
    function, leaves = as_function(small(name, **changes))
    assert gradcheck(function, leaves)


@TINY_CASES
def test_second_derivative(backend: str, device: torch.device, one_thread: None, name: str, changes: dict) -> None:
    """create_graph=True gives autograd's own derivatives of the reference: a gradient penalty's gradient."""
    skip_unsupported(device, torch.float64)

    def penalty() -> list[Tensor]:
        s = small(name, **changes)
        y, _ = s()
        leaves = list(s.leaves().values())
        first = torch.autograd.grad(
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).pow(2).sum(), leaves, create_graph=True
        )
        return list(torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)) + [g.detach() for g in first]

    actual = penalty()
    with use_backend("reference"):
        expected = penalty()
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-10)


@pytest.mark.parametrize("name", ["plain", "train", "up_folded", "up_train_folded"])
def test_gradgradcheck(backend: str, device: torch.device, one_thread: None, name: str) -> None:
    skip_unsupported(device, torch.float64)
    function, leaves = as_function(small(name, **dict(TINY)[name] | {"batch": 1}))
    assert gradgradcheck(function, leaves)


def test_second_derivative_ignores_holes(backend: str, device: torch.device) -> None:
    runs = []
    for nan in (True, False):
        s = sample(named("leaky_relu"), device=device, nan=nan)
        y, _ = s()
        grads = torch.autograd.grad(y.pow(2).sum(), [s.x[0], s.weight], create_graph=True)
        runs.append(torch.autograd.grad(sum(g.pow(2).sum() for g in grads), [s.x[0], s.weight]))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_double_backward_of_a_layer_twice(backend: str, device: torch.device) -> None:
    """retain_graph: two backward passes add the same gradient twice."""
    s = sample(named("relu"), device=device)
    y, _ = s()
    grad = cotangent(s).to(y)
    y.backward(grad, retain_graph=True)
    once = s.weight.grad
    assert once is not None
    once = once.clone()
    y.backward(grad)
    assert s.weight.grad is not None and torch.equal(s.weight.grad, 2 * once)
