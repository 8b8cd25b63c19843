# SPDX-License-Identifier: Apache-2.0
"""Values and gradients of the partial convolution on every backend, against its reference in float64."""

import dataclasses

import pytest
import torch
from cases import ALL, CASES, PRECISIONS, Case, assert_close, cotangent, named, results, sample, truth
from torch import Tensor, nn

from fused_inpaint import _backends, ops, use_backend

OPTIONS = ("none", "relu", "leaky_relu")


def skip_unsupported(device: torch.device, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and (device.type != "cpu" or _backends._selected == "triton"):
        pytest.skip("float64 runs on the CPU only")


@pytest.fixture(autouse=True)
def _tiny(one_thread: None) -> None:
    """test_partial_conv_numerics.py compares numbers of threads."""


@pytest.mark.parametrize("dtype, rtol, folded_rtol, atol", PRECISIONS)
@ALL
def test_reference(
    case: Case, dtype: torch.dtype, rtol: float, folded_rtol: float, atol: float, backend: str, device: torch.device
) -> None:
    """Output, mask, statistics and every gradient; NaN and infinities lie under all holes and in the gradient of all
    empty windows."""
    skip_unsupported(device, dtype)
    s = sample(case, dtype, device)
    grad = cotangent(s)
    expected = truth(s, grad)
    actual = results(s, grad)
    assert torch.equal(
        actual.pop("mask").cpu(), expected.pop("mask").to(s.x[0].dtype if s.masks is None else torch.uint8)
    )
    assert actual["y"].dtype == dtype
    if backend != "reference":
        assert actual["y"].is_contiguous(memory_format=torch.channels_last)
    empty = grad.isnan().to(device)
    assert torch.equal(actual["y"][empty], torch.zeros_like(actual["y"][empty]))
    for i, x in enumerate(s.x):
        if s.masks is not None:
            hole = (s.masks[i] == 0).expand_as(x)
            assert torch.equal(x.grad[hole], torch.zeros_like(x.grad[hole])), f"gradient under a hole of source {i}"
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, expected[name], folded_rtol if case.fold else rtol, atol, name)


@pytest.mark.parametrize("dtype, rtol, folded_rtol, atol", PRECISIONS[1:])
@pytest.mark.parametrize("name", ["relu", "train_relu", "two_sources_train", "up_folded", "up_channel_masks_direct"])
def test_promised_zeros(
    name: str, dtype: torch.dtype, rtol: float, folded_rtol: float, atol: float, backend: str, device: torch.device
) -> None:
    """Where the holes hold 0 and no gradient is taken from them, the promise of it changes nothing."""
    s, promised = (sample(named(name), dtype, device, nan=False) for _ in range(2))
    assert s.masks is not None
    for t in (s, promised):
        for x, mask in zip(t.x, s.masks, strict=True):
            x.data.masked_fill_(mask == 0, 0)
    grad = cotangent(s).nan_to_num(0)
    expected, actual = results(s, grad), results(promised, grad, holes_zero=True)
    for i, mask in enumerate(s.masks):
        actual[f"grad_x{i}"] = actual[f"grad_x{i}"].masked_fill(mask == 0, 0)
    for key, value in actual.items():
        assert_close(value, expected[key], folded_rtol, atol, key)


@pytest.mark.parametrize("activation", OPTIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_upconv(backend: str, device: torch.device, activation: str, bias: bool) -> None:
    """The decoder's step is interpolate, concatenate, convolve."""
    case = dataclasses.replace(named("up_kernel5_direct"), activation=activation, bias=bias)
    s, plain = sample(case, device=device, nan=False), sample(case, device=device, nan=False)
    assert s.masks is not None and plain.masks is not None
    grad = cotangent(s).nan_to_num(0).to(device, torch.float32)
    y, mask = ops.partial_upconv2d(s.x[0], s.masks[0], s.x[1], s.masks[1], s.weight, s.bias, activation=activation)
    y.backward(grad)
    double = nn.Upsample(scale_factor=2)
    joined = torch.cat([double(plain.x[0]), plain.x[1]], 1)
    masks = [double(plain.masks[0].float()).expand(-1, 4, -1, -1), plain.masks[1].float().expand(-1, 3, -1, -1)]
    y2, mask2 = ops.partial_conv2d(
        joined, torch.cat(masks, 1), plain.weight, plain.bias, padding=2, activation=activation
    )
    y2.backward(grad)
    assert torch.equal(mask.float(), mask2)
    assert_close(y, y2, 5e-5, what="y")
    for name, leaf in s.leaves().items():
        assert leaf.grad is not None
        assert_close(leaf.grad, plain.leaves()[name].grad, 5e-5, what=name)


def test_upconv_batch_norm(backend: str, device: torch.device) -> None:
    s, t = (sample(named("up_train_folded"), device=device) for _ in range(2))
    assert s.masks is not None
    y, mask = ops.partial_upconv2d(
        s.x[0], s.masks[0], s.x[1], s.masks[1], s.weight, activation="leaky_relu", batch_norm=s.norm, fold=True
    )
    y2, mask2 = t()
    assert torch.equal(y, y2) and torch.equal(mask, mask2)
    assert s.norm is not None and t.norm is not None and torch.equal(s.norm.running_var, t.norm.running_var)


@pytest.mark.parametrize("other", [False, None], ids=["direct", "by the table"])
@pytest.mark.parametrize("name", [case.name for case in CASES if case.name.startswith("up_") and case.fold])
def test_fold_changes_nothing(backend: str, device: torch.device, name: str, other: bool | None) -> None:
    a, b = sample(named(name), device=device), sample(named(name), device=device)
    grad = cotangent(a)
    left, right = results(a, grad, fold=True), results(b, grad, fold=other)
    for key, value in left.items():
        assert_close(value, right[key], 5e-5, what=key)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", OPTIONS)
@pytest.mark.parametrize("name", ["train", "up_train_folded", "up_train_direct"])
def test_batch_norm_is_torchs(backend: str, device: torch.device, name: str, activation: str, training: bool) -> None:
    """Three steps of convolution, norm and activation in one call equal nn.BatchNorm2d on the plain call's output."""
    masks = ("random", "pixel")[: len(named(name).channels)]
    case = dataclasses.replace(named(name), norm=None, activation="none", masks=masks)
    norm, theirs = (nn.BatchNorm2d(case.outputs, momentum=0.3).to(device).train(training) for _ in range(2))
    for module in (norm, theirs):
        with torch.no_grad():
            for i, t in enumerate([module.weight, module.bias, module.running_mean, module.running_var]):
                t.copy_(torch.linspace(0.5, 1.5 + i, case.outputs))
    act = {"none": nn.Identity(), "relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(0.1)}[activation]
    for step in range(3):
        s, plain = (sample(case, device=device, nan=False) for _ in range(2))
        with torch.no_grad():
            s.weight.mul_(step + 1), plain.weight.mul_(step + 1)
        fused = ops.BatchNorm(*_state(norm), training, 0.3, norm.eps)
        y, mask = s(batch_norm=fused, activation=activation, slope=0.1)
        expected = torch.where(mask.bool(), act(theirs(plain()[0])), 0.0)
        assert_close(y, expected, 5e-5, what="y")
    g = torch.randn_like(y) * (expected.detach().abs() > 1e-4)
    y.backward(g)
    expected.backward(g)
    for key, leaf in s.leaves().items():
        assert_close(leaf.grad, plain.leaves()[key].grad, 5e-5, what=key)
    for mine, other in zip(_state(norm), _state(theirs), strict=True):
        assert_close(mine, other, 1e-5, what="state")
        if other.grad is not None:
            assert_close(mine.grad, other.grad, 5e-5, what="gradient of the norm")


def _state(norm: nn.BatchNorm2d) -> list[Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    return [norm.weight, norm.bias, norm.running_mean, norm.running_var]


def test_batch_norm_without_running_statistics(backend: str, device: torch.device) -> None:
    s, t = sample(named("train"), device=device), sample(named("train"), device=device)
    assert s.norm is not None
    y, _ = s(batch_norm=s.norm._replace(running_mean=None, running_var=None))
    assert torch.equal(y, t()[0])


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.float32, torch.float16, torch.bfloat16, torch.float64]
)
@pytest.mark.parametrize("name", ["plain", "channel_masks", "multi_channel", "up_folded"])
def test_mask_dtypes(backend: str, device: torch.device, name: str, dtype: torch.dtype) -> None:
    s = sample(named(name), device=device)
    y, mask = s()
    assert s.masks is not None
    s.masks = [m.to(dtype) for m in s.masks]
    y2, mask2 = s()
    assert mask2.dtype == dtype and torch.equal(mask2, mask.to(dtype)) and torch.equal(y, y2)


@pytest.mark.parametrize("name", ["shared_mask", "shared_channel_masks", "up_leaky_relu_folded"])
def test_shared_mask_is_the_repeated_mask(backend: str, device: torch.device, name: str) -> None:
    s = sample(named(name), device=device)
    y, mask = s()
    assert mask.size(0) == 1 and s.masks is not None
    s.masks = [m.repeat(s.x[0].size(0), 1, 1, 1) for m in s.masks]
    y2, mask2 = s()
    assert torch.equal(y, y2) and torch.equal(mask.expand_as(mask2), mask2)


@pytest.mark.parametrize("name", ["no_mask", "up_folded", "up_train_direct", "groups_channel_masks"])
def test_no_mask_is_all_ones(backend: str, device: torch.device, name: str) -> None:
    case = dataclasses.replace(named(name), masks=("ones",) * len(named(name).channels))
    s, t = sample(case, device=device), sample(case, device=device)
    t.masks = None
    y, mask = s()
    y2, mask2 = t()
    assert torch.equal(y, y2) and mask2.dtype == torch.float32 and bool((mask2 == 1).all() and (mask == 1).all())


def test_calls_leave_nothing_behind(backend: str, device: torch.device) -> None:
    """NVIDIA's layer re-uses the former call's ratio when called without a mask; this one must not."""
    s = sample(named("plain"), device=device, nan=False)
    with_mask, without = s()[0], ops.partial_conv2d(s.x[0], None, s.weight, s.bias, padding=1)[0]
    assert not torch.equal(with_mask, without)
    assert torch.equal(s()[0], with_mask)
    assert torch.equal(ops.partial_conv2d(s.x[0], None, s.weight, s.bias, padding=1)[0], without)


@pytest.mark.parametrize(
    "name", ["plain", "channel_masks", "anisotropic", "up_folded", "up_direct", "train", "eval_relu"]
)
def test_inputs_are_left_alone(backend: str, device: torch.device, name: str) -> None:
    s, untouched = sample(named(name), device=device), sample(named(name), device=device)
    for t in (s, untouched):
        t.x = [x.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for x in t.x]
    y, _ = s()
    g = torch.randn_like(y)
    kept = g.clone()
    y.backward(g)
    assert s.masks is not None and untouched.masks is not None
    assert torch.equal(g, kept)
    for mine, theirs in zip(
        [*s.leaves().values(), *s.masks], [*untouched.leaves().values(), *untouched.masks], strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def spread(t: Tensor, layout: str) -> Tensor:
    """The values of t (4-d) in another memory layout; expanded repeats the first image."""
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "strided":
        wide = torch.full((*t.shape[:3], 2 * t.size(3)), torch.nan if t.is_floating_point() else 1).to(t)
        wide[..., ::2] = t
        return wide[..., ::2]
    if layout == "offset":
        flat = torch.zeros(t.numel() + 3).to(t)
        flat[3:] = t.flatten()
        return flat[3:].view(t.shape)
    if layout == "expanded":
        return t[:1].expand(t.shape)
    return t.contiguous()


LAYOUTS = ["contiguous", "channels_last", "transposed", "strided", "offset", "expanded"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["plain", "channel_masks", "groups", "kernel1", "up_folded", "up_direct", "train", "eval"]
)
def test_memory_layouts(backend: str, device: torch.device, name: str, layout: str) -> None:
    """Features, masks, weights and incoming gradients."""
    s, t = sample(named(name), device=device), sample(named(name), device=device)
    assert s.masks is not None and t.masks is not None
    grad = spread(torch.randn(s()[0].shape, device=device), layout)
    s, t = sample(named(name), device=device), sample(named(name), device=device)
    assert s.masks is not None and t.masks is not None
    for u, change in ((s, lambda v: spread(v, layout)), (t, lambda v: spread(v, layout).clone().contiguous())):
        u.masks = [change(m) for m in u.masks]
        u.x = [change(x.detach()).requires_grad_() for x in u.x]
        if layout != "expanded":
            u.weight = change(u.weight.detach()).requires_grad_()
    left, right = results(s, grad), results(t, grad.contiguous())
    for key, value in left.items():
        assert_close(value, right[key], 5e-5 if s.case.fold else 1e-5, what=key)


@pytest.mark.parametrize("name", ["plain", "relu", "up_folded", "train_relu"])
def test_stride_0_gradient(backend: str, device: torch.device, name: str) -> None:
    """What sum() sends back is one number, expanded.

    Of a constant gradient a norm alone leaves what holes make of it: with "train", a gradient 138 times smaller than
    the terms it sums, so that one rounding of float32 in a term is 8e-6 of it. An activation keeps it from that.
    """
    s, t = sample(named(name), device=device), sample(named(name), device=device)
    y, _ = s()
    y.sum().backward()
    y2, _ = t()
    y2.backward(torch.ones_like(y2))
    for key, leaf in s.leaves().items():
        assert_close(leaf.grad, t.leaves()[key].grad, 1e-5, what=key)


@pytest.mark.parametrize("name", ["plain", "up_folded", "up_direct", "train", "up_train_folded", "eval"])
def test_only_the_gradients_asked_for(backend: str, device: torch.device, name: str) -> None:
    whole = sample(named(name), device=device)
    grad = cotangent(whole)
    expected = results(whole, grad)
    for wanted in whole.leaves():
        s = sample(named(name), device=device)
        for key, leaf in s.leaves().items():
            leaf.requires_grad_(key == wanted)
        y, _ = s()
        y.backward(grad.to(y))
        for key, leaf in s.leaves().items():
            assert (leaf.grad is None) == (key != wanted)
        assert_close(s.leaves()[wanted].grad, expected[f"grad_{wanted}"], 1e-5, what=wanted)


@pytest.mark.parametrize("name", ["plain", "channel_masks", "up_folded", "anisotropic"])
def test_window_is_reusable(backend: str, device: torch.device, name: str) -> None:
    s = sample(named(name), device=device)
    c = s.case
    window = ops.partial_window(s.masks, c.channels, c.kernel, c.stride, c.padding, c.dilation, upsample=c.upsample)
    assert window.counts.dtype == torch.int32 and window.mask.dtype == torch.uint8
    y, mask = s()
    x = s.x[0] if len(s.x) == 1 else s.x
    y2, mask2 = ops.partial_conv2d(
        x, None, s.weight, s.bias, c.stride, c.padding, c.dilation,
        upsample=c.upsample if len(s.x) > 1 else 1, window=window, fold=c.fold,
    )  # fmt: skip
    assert torch.equal(y, y2) and torch.equal(mask, window.mask) and torch.equal(mask2, mask.to(mask2.dtype))
    with use_backend("reference"):
        truth_window = ops.partial_window(
            s.masks, c.channels, c.kernel, c.stride, c.padding, c.dilation, upsample=c.upsample
        )
    assert torch.equal(window.counts, truth_window.counts)
