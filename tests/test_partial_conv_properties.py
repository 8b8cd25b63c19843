# SPDX-License-Identifier: Apache-2.0
"""The partial convolution against its equation, written out here once more, on random shapes and masks."""

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close, leave_out_refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_inpaint import ops

# The fixtures (backend, device) are constant within a test, so sharing them between examples is sound.
SHARED = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def equation(
    xs: list[Tensor], masks: list[Tensor], ups: list[int], weight: Tensor, bias: Tensor, geometry: tuple
) -> tuple[Tensor, Tensor]:
    """(y, count) in float64: conv(x, holes replaced by 0) * window / count + bias, 0 where count is 0."""
    maps, valid = [], []
    for x, m, up in zip(xs, masks, ups, strict=True):
        m = m.expand(x.shape).double()
        maps.append(F.interpolate(torch.where(m == 1, x.double(), torch.zeros(())), scale_factor=up, mode="nearest"))
        valid.append(F.interpolate(m, scale_factor=up, mode="nearest"))
    stride, padding, dilation, groups = geometry
    inputs, mask = torch.cat(maps, 1), torch.cat(valid, 1)
    total = F.conv2d(inputs, weight.double(), None, stride, padding, dilation, groups)
    count = F.conv2d(mask, torch.ones(1, mask.size(1), *weight.shape[2:]).double(), None, stride, padding, dilation)
    window = mask.size(1) * weight.size(2) * weight.size(3)
    y = total * window / torch.where(count == 0, torch.ones(()), count) + bias.double().view(1, -1, 1, 1)
    return torch.where(count == 0, torch.zeros(()), y), count


def holes(draw: st.DrawFn, n: int, c: int, h: int, w: int, seed: int) -> Tensor:
    shape = (draw(st.sampled_from([1, n])), draw(st.sampled_from([1, c])), h, w)
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= share).to(torch.uint8)


@st.composite
def geometries(draw: st.DrawFn) -> dict:
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = (draw(st.integers(0, 5)), draw(st.integers(0, 5)))
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in (0, 1)]
    h, w = (draw(st.integers(least[i], least[i] + 9)) for i in (0, 1))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    seed = draw(st.integers(0, 2**16))
    n, sources = draw(st.integers(1, 3)), 1 if groups > 1 else draw(st.integers(1, 3))
    channels = [draw(st.integers(1, 3)) * groups for _ in range(sources)]
    g = torch.Generator().manual_seed(seed)
    outputs = groups * draw(st.integers(1, 3))
    return {
        "x": [torch.randn(n, c, h, w, generator=g) for c in channels],
        "masks": [holes(draw, n, c, h, w, seed + i) for i, c in enumerate(channels)],
        "ups": [1] * sources,
        "weight": torch.randn(outputs, sum(channels) // groups, *kernel, generator=g),
        "bias": torch.randn(outputs, generator=g),
        "geometry": ((draw(st.integers(1, 4)), draw(st.integers(1, 4))), padding, dilation, groups),
    }


@st.composite
def decoders(draw: st.DrawFn) -> dict:
    k, n = draw(st.sampled_from([1, 3, 5, 7])), draw(st.integers(1, 2))
    h, w = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    ups = draw(st.lists(st.sampled_from([1, 2]), min_size=1, max_size=3).filter(lambda u: 2 in u))
    seed = draw(st.integers(0, 2**16))
    g = torch.Generator().manual_seed(seed)
    channels = [draw(st.integers(1, 4)) for _ in ups]
    sizes = [(2 * h // up, 2 * w // up) for up in ups]
    return {
        "x": [torch.randn(n, c, *s, generator=g) for c, s in zip(channels, sizes, strict=True)],
        "masks": [holes(draw, n, c, *s, seed + i) for i, (c, s) in enumerate(zip(channels, sizes, strict=True))],
        "ups": ups,
        "weight": torch.randn(draw(st.integers(1, 4)), sum(channels), k, k, generator=g),
        "bias": torch.randn(1, generator=g),
        "geometry": ((1, 1), (k // 2, k // 2), (1, 1), 1),
    }


def check(problem: dict, device: torch.device, rtol: float, fold: bool | None) -> None:
    """Value, count, new mask and the gradients of value and equation agree."""
    leave_out_refused(len(problem["x"]))
    xs = [x.requires_grad_() for x in problem["x"]]
    weight, geometry = problem["weight"].requires_grad_(), problem["geometry"]
    bias = problem["bias"].expand(weight.size(0)).clone().requires_grad_()
    expected, count = equation(xs, problem["masks"], problem["ups"], weight, bias, geometry)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    leaves = [*xs, weight, bias]
    wanted = torch.autograd.grad(expected, leaves, grad.double())

    masks = [m.to(device) for m in problem["masks"]]
    window = ops.partial_window(
        masks, [x.size(1) for x in xs], tuple(weight.shape[2:]), *geometry[:3], upsample=problem["ups"]
    )
    assert torch.equal(window.counts.cpu().double().expand_as(count), count)
    poisoned = [x.detach().masked_fill(m == 0, torch.nan) for x, m in zip(xs, problem["masks"], strict=True)]
    mine = [t.detach().to(device).requires_grad_() for t in [*poisoned, weight, bias]]
    y, mask = ops.partial_conv2d(
        mine[: len(xs)], masks, mine[-2], mine[-1], *geometry, upsample=problem["ups"], fold=fold
    )
    assert torch.equal(mask.cpu().expand_as(count), (count > 0).to(torch.uint8))
    assert_close(y, expected, rtol, what="y")
    y.backward(grad.to(device))
    for i, (leaf, want) in enumerate(zip(mine, wanted, strict=True)):
        assert leaf.grad is not None
        assert_close(leaf.grad, want, rtol, what=f"gradient {i}")


@pytest.fixture(autouse=True)
def _tiny(one_thread: None) -> None:
    pass


@SHARED
@given(problem=geometries())
def test_equation(backend: str, device: torch.device, problem: dict) -> None:
    check(problem, device, 1e-5, None)


@pytest.mark.parametrize("fold, rtol", [(True, 5e-5), (False, 1e-5)], ids=["folded", "direct"])
@SHARED
@given(problem=decoders())
def test_decoder_equation(backend: str, device: torch.device, fold: bool, rtol: float, problem: dict) -> None:
    check(problem, device, rtol, fold)


@SHARED
@given(problem=geometries(), junk=st.sampled_from([0.0, 1e30, torch.nan, torch.inf]))
def test_hole_contents_are_irrelevant(backend: str, device: torch.device, problem: dict, junk: float) -> None:
    leave_out_refused(len(problem["x"]))
    masks = [m.to(device) for m in problem["masks"]]
    weight = problem["weight"].to(device)
    outputs = []
    for content in (0.0, junk):
        xs = [x.to(device).masked_fill(m == 0, content) for x, m in zip(problem["x"], masks, strict=True)]
        outputs.append(ops.partial_conv2d(xs, masks, weight, None, *problem["geometry"])[0])
    assert torch.equal(*outputs)
