# SPDX-License-Identifier: Apache-2.0
"""Partial convolution along one and three axes, and padding that continues the map: against the equation in float64."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_close
from torch import Tensor, nn

from fused_inpaint import PartialConv1d, PartialConv2d, PartialConv3d, use_backend

LAYERS = {1: PartialConv1d, 2: PartialConv2d, 3: PartialConv3d}
MODES = ["zeros", "reflect", "replicate", "circular"]
NUMPY = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def by_equation(layer: Any, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and the new mask, window by window."""
    axes = x.dim() - 2
    x, weight = x.detach().cpu().double().numpy(), layer.weight.detach().cpu().double().numpy()
    bias = layer.bias.detach().cpu().double().numpy()
    valid = np.ones((1, 1, *x.shape[2:])) if mask is None else mask.cpu().double().numpy()
    valid = np.broadcast_to(valid, x.shape)
    around = [(0, 0), (0, 0), *((p, p) for p in layer.padding)]
    x, valid = (np.pad(a, around, mode=NUMPY[layer.padding_mode]) for a in (np.where(valid == 1, x, 0), valid))
    size = [
        (x.shape[2 + d] - layer.dilation[d] * (layer.kernel_size[d] - 1) - 1) // layer.stride[d] + 1
        for d in range(axes)
    ]
    y, new = np.zeros((x.shape[0], len(weight), *size)), np.zeros((x.shape[0], 1, *size))
    each = weight.shape[1]
    for at in itertools.product(range(len(x)), *map(range, size)):
        part = tuple(
            slice(i * s, i * s + d * (k - 1) + 1, d)
            for i, s, d, k in zip(at[1:], layer.stride, layer.dilation, layer.kernel_size, strict=True)
        )
        window, seen = x[(at[0], slice(None), *part)], valid[(at[0], slice(None), *part)]
        if seen.sum() == 0:
            continue
        new[(at[0], 0, *at[1:])] = 1
        for o in range(len(weight)):
            first = o // (len(weight) // layer.groups) * each
            dot = (weight[o] * window[first : first + each]).sum()
            y[(at[0], o, *at[1:])] = dot * seen.size / seen.sum() + bias[o]
    return torch.from_numpy(y), torch.from_numpy(new)


def sample(axes: int, channels: int = 3, batch: int = 2) -> tuple[Tensor, Tensor]:
    size = (5, 6, 7)[:axes] if axes < 3 else (3, 5, 4)
    x = torch.randn(batch, channels, *size)
    mask = (torch.rand(batch, 1, *size) > 0.6).float()
    return x.masked_fill(mask == 0, torch.nan), mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "dilation": 2, "kernel_size": 2}, {"groups": 3}], ids=str)
def test_equation(axes: int, mode: str, options: dict[str, Any], backend: str, device: torch.device) -> None:
    if axes == 3 and backend not in ("cpu", "reference"):
        pytest.skip("a volume's convolution is torch's, whatever the backend")
    options = {"kernel_size": 3, "padding": 2 if axes < 3 else (1, 2, 2), "return_mask": True, **options}
    layer = LAYERS[axes](3, 6, padding_mode=mode, **options).to(device)
    x, mask = sample(axes)
    for given in (mask, None):
        values = x.nan_to_num(0.5) if given is None else x
        y, new_mask = layer(values.to(device), None if given is None else given.to(device))
        expected, expected_mask = by_equation(layer, values, given)
        assert_close(y.detach(), expected, 1e-5)
        assert torch.equal(new_mask.cpu().double().expand_as(expected_mask), expected_mask)


@pytest.mark.parametrize("axes, mode", [(1, "reflect"), (2, "circular"), (3, "zeros"), (3, "replicate")])
def test_gradcheck(axes: int, mode: str) -> None:
    layer = LAYERS[axes](2, 2, 3, padding=1, padding_mode=mode).double()
    x, mask = sample(axes, channels=2, batch=1)
    x = torch.where(mask == 1, x, 0.0).double().requires_grad_()

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, mask))

    assert torch.autograd.gradcheck(call, (x, layer.weight, layer.bias))


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("dtype, rtol", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_half_types(axes: int, dtype: torch.dtype, rtol: float) -> None:
    layer = LAYERS[axes](3, 4, 3, padding=1).to(dtype)
    x, mask = sample(axes)
    expected, _ = by_equation(layer, x.to(dtype), mask)
    assert_close(layer(x.to(dtype), mask).detach(), expected, rtol)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_nothing_valid_gives_exactly_zero(axes: int) -> None:
    layer = LAYERS[axes](3, 4, 3, padding=1, return_mask=True, padding_mode="circular")
    x, mask = sample(axes)
    x.requires_grad_()
    y, new_mask = layer(x, torch.zeros_like(mask))
    y.sum().backward()
    assert not y.any() and not new_mask.any() and not x.grad.any() and not layer.weight.grad.any()
    assert layer(x[:0], mask[:0])[0].shape == (0, *y.shape[1:])


@pytest.mark.parametrize("axes", [1, 3])
def test_masks_of_many_channels(axes: int) -> None:
    """Each channel with its own holes; the new mask with the outputs' channels."""
    layer = LAYERS[axes](3, 4, 3, padding=1, multi_channel=True, return_mask=True)
    x, mask = sample(axes)
    mask = torch.cat([mask, 1 - mask, mask], 1)
    x = torch.randn_like(x).masked_fill(mask == 0, torch.nan)
    y, new_mask = layer(x, mask)
    expected, expected_mask = by_equation(layer, x, mask)
    assert_close(y.detach(), expected, 1e-5)
    assert torch.equal(new_mask.double(), expected_mask.expand_as(y).double())


@pytest.mark.parametrize("axes", [1, 3])
def test_names_and_values_of_torchs_layer(axes: int) -> None:
    """A checkpoint of the plain layer loads, and where nothing is missing the two agree but at the border."""
    plain = {1: nn.Conv1d, 3: nn.Conv3d}[axes](3, 4, 3)
    layer = LAYERS[axes](3, 4, 3)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, *(6,) * axes)
    assert_close(layer(x).detach(), plain(x).detach(), 1e-5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    mask = (torch.rand(2, 1, *(6,) * axes) > 0.5).float()
    assert_close(compiled(x, mask).detach(), layer(x, mask).detach(), 1e-6)


def test_window_of_a_padded_layer() -> None:
    layer = PartialConv2d(3, 4, 3, padding=1, padding_mode="circular", return_mask=True)
    x, mask = sample(2)
    y, new_mask = layer(x, mask)
    window = layer.window(mask)
    assert torch.equal(window.mask.float(), new_mask)
    assert torch.equal(layer.block(x, window), y)
    with pytest.raises(
        ValueError, match=r"^PartialConv2d: padding_mode must be zeros in a chain of masks, got circular$"
    ):
        layer.window_step(0)


def test_mask_bytes_keep_their_type() -> None:
    layer = PartialConv2d(3, 4, 3, padding=1, padding_mode="reflect", return_mask=True)
    x, mask = sample(2)
    for dtype in (torch.uint8, torch.bool, torch.float64):
        assert layer(x, mask.to(dtype))[1].dtype == dtype


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: PartialConv1d(3, 4, 3, padding=-1),
         "PartialConv1d: padding must be an int or one of at least 0, got -1"),
        (lambda: PartialConv3d(3, 4, 3, padding=(1, 1, -1)),
         r"PartialConv3d: padding must be an int or three of at least 0, got \(1, 1, -1\)"),
        (lambda: PartialConv2d(3, 4, 3, padding_mode="mirror"),
         "PartialConv2d: padding_mode must be one of zeros, reflect, replicate, circular, got mirror"),
        (lambda: PartialConv3d(3, 4, 3, return_mask=1), "PartialConv3d: return_mask must be a bool, got 1"),
        (lambda: PartialConv1d(3, 4, 3)(torch.ones(3, 5)), r"partial_conv1d: x must be \(N, C, L\), got \(3, 5\)"),
        (lambda: PartialConv3d(3, 4, 3)(torch.ones(1, 2, 5, 5, 5)),
         r"partial_conv3d: x must be \(N, 3, D, H, W\), got \(1, 2, 5, 5, 5\)"),
        (lambda: PartialConv3d(3, 4, 3)(torch.ones(2, 3, 5, 5, 5), torch.ones(2, 2, 5, 5, 5)),
         r"partial_conv3d: mask must be \(2, 1, 5, 5, 5\) or \(2, 3, 5, 5, 5\), got \(2, 2, 5, 5, 5\)"),
        (lambda: PartialConv3d(3, 4, 3)(torch.ones(1, 3, 5, 5, 5), torch.full((1, 1, 5, 5, 5), 0.5)),
         "partial_conv3d: mask must be 0 or 1 everywhere, got 0.5"),
    ],
)  # fmt: skip
def test_refusals(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        call()


def test_mask_planes_of_any_rank() -> None:
    """The operator writes as much as the mask holds."""
    for size in ((5,), (2, 3), (1, 1, 2, 3, 4)):
        mask = (torch.rand(size) > 0.5).float()
        with use_backend("auto"):
            assert torch.equal(torch.ops.fused_inpaint.mask_plane(mask, "m").float(), mask)
