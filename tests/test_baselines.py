# SPDX-License-Identifier: Apache-2.0
"""The benchmark baselines compute what the published layers and network computed."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import vectors
from cases import assert_close
from torch import Tensor, nn

from fused_inpaint import baselines, ops, use_backend
from fused_inpaint.baselines import FullChannelPartialConv2d, NvidiaPartialConv2d, PConvUNet
from fused_inpaint.nn import (
    LearnedRegionNorm2d,
    PyramidConv2d,
    RegionConv2d,
    RegionNorm2d,
    SelfAttention2d,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def check_layer(layer: torch.nn.Conv2d, name: str, case: dict, dtype: torch.dtype) -> None:
    """Outputs, mask and every recorded gradient of sum(out * g)."""
    data = vectors.tensors(name, case, dtype)
    layer.to(dtype)
    with torch.no_grad():
        layer.weight.copy_(data["weight"])
        if "bias" in data:
            layer.bias.copy_(data["bias"])
    x = data["x"].requires_grad_()
    out, mask = layer(x, data.get("mask"))
    (out * data["g"]).sum().backward()
    actual = {"out": out.detach(), "out_mask": mask, "gx": x.grad, "gw": layer.weight.grad}
    if layer.bias is not None:
        actual["gb"] = layer.bias.grad
    assert set(actual) == set(case["check"])
    for field, value in actual.items():
        vectors.assert_close(value, data[field], case, field)


@DTYPES
@pytest.mark.parametrize("case", vectors.cases("nvidia_partialconv2d"))
def test_nvidia_layer(case: dict, dtype: torch.dtype) -> None:
    args = [case[key] for key in ("cin", "cout", "kernel", "stride", "padding", "dilation", "groups", "bias")]
    layer = NvidiaPartialConv2d(*args, multi_channel=case["multi_channel"])
    check_layer(layer, "nvidia_partialconv2d", case, dtype)


@DTYPES
@pytest.mark.parametrize("case", vectors.cases("naoto_partialconv"))
def test_full_channel_layer(case: dict, dtype: torch.dtype) -> None:
    args = [case[key] for key in ("cin", "cout", "kernel", "stride", "padding")]
    check_layer(FullChannelPartialConv2d(*args, bias=case["bias"]), "naoto_partialconv", case, dtype)


@DTYPES
@pytest.mark.parametrize("case", vectors.cases("naoto_pconvunet"))
def test_full_channel_unet(case: dict, dtype: torch.dtype) -> None:
    network = vectors.meta("naoto_pconvunet")["networks"][case["network"]]
    levels = case["layer_size"]
    filled = vectors.naoto_names(vectors.state(network, case["set_seed"]), levels)
    model = PConvUNet("full_channel", levels, window_factor=False).to(dtype).eval()
    missing, unexpected = model.load_state_dict(filled, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    data = vectors.tensors("naoto_pconvunet", case, dtype)
    with torch.inference_mode():
        out, mask = model(data["input"], data["mask"])
    vectors.assert_close(out, data["out"], case, "out")
    vectors.assert_close(mask, data["out_mask"], case, "out_mask")


def holed(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    mask = torch.ones(shape[0], 1, *shape[2:], dtype=torch.float64)
    mask[:, :, 5:23, 9:30] = 0
    return mask * (torch.rand(mask.shape, generator=generator) > 0.1)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_kinds_agree(train: bool) -> None:
    """One state dict serves every kind, and the two partial ones agree; the plain one hands the mask back."""
    generator = torch.Generator().manual_seed(3)
    nets = {kind: PConvUNet(kind, levels=3, width=8).double() for kind in ("full_channel", "nvidia", "plain")}
    shared = nets["full_channel"].state_dict()
    for net in nets.values():
        net.load_state_dict(shared)
        net.train(train)
    x = torch.randn(2, 3, 32, 40, dtype=torch.float64, generator=generator)
    mask = holed(x.shape, generator)
    full, full_mask = nets["full_channel"](x, mask)
    nvidia, nvidia_mask = nets["nvidia"](x, mask)
    torch.testing.assert_close(nvidia, full, rtol=1e-6, atol=1e-6)
    assert torch.equal(full_mask, nvidia_mask)
    plain, plain_mask = nets["plain"](x, mask)
    assert plain.shape == full.shape and plain_mask is mask


def test_kind_is_checked() -> None:
    with pytest.raises(ValueError, match="kind must be"):
        PConvUNet("partial")
    with pytest.raises(ValueError, match="levels must be 1 to 8, got 9"):
        PConvUNet(levels=9)


@pytest.mark.skipif(vectors.ABSENT is not None, reason=str(vectors.ABSENT))
def test_parameter_fill() -> None:
    """The helper that makes every other test's weights reproduces the recorded values."""
    for case in vectors.meta("fill_check")["cases"]:
        values = vectors.fill_tensor(case["key"], tuple(case["shape"]), case["set_seed"], case["hwio"]).ravel()
        np.testing.assert_allclose(values[: len(case["first"])], case["first"], rtol=1e-14)
        np.testing.assert_allclose(
            [values[-1], values.sum(), abs(values).sum()], [case["last"], case["sum"], case["sum_abs"]], rtol=1e-12
        )


class GramL1(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return ops.gram_l1(a, b, over="positions")


X, OTHER, MASK = (4, 8, 12, 10), (4, 4, 12, 10), (4, 1, 12, 10)  # MASK: zeros and ones


def same(*names: str) -> Callable[[nn.Module], list[Tensor]]:
    return lambda module: [module.get_parameter(name) for name in names]


def joined(names: list[str]) -> Callable[[nn.Module], list[Tensor]]:
    """Weights of several layers as one, and their biases."""
    return lambda module: [
        torch.cat([module.get_parameter(f"{n}.{kind}") for n in names]) for kind in ("weight", "bias")
    ]


def attention(module: nn.Module) -> list[Tensor]:
    return [*joined(["theta", "phi", "g"])(module), *joined(["W"])(module)]


def learned(module: nn.Module) -> list[Tensor]:
    return list(module.parameters())


INPUT = {"padding": 1, "select": "input", "missing_channels": 4, "padding_mode": "reflect", "activation": "elu"}
# (as published, ours, the published parameters as ours has them, sizes of the inputs)
PUBLISHED = {
    "region norm": (
        lambda: baselines.TwoPassRegionNorm2d(8),
        lambda: RegionNorm2d(8, shared_bias=True),
        same("weight", "bias"),
        (X, MASK),
    ),
    "learned region norm": (
        lambda: baselines.TwoPassLearnedRegionNorm2d(8, 0.5),
        lambda: LearnedRegionNorm2d(8, 0.5),
        learned,
        (X,),
    ),
    "region conv, input": (
        lambda: baselines.DenseRegionConv2d(8, 4, 6),
        lambda: RegionConv2d(8, 6, 3, **INPUT),
        same("conv.weight", "conv.bias"),
        (X, MASK, OTHER),
    ),
    "region conv, input, upsampled": (
        lambda: baselines.DenseRegionConv2d(8, 4, 6, 2),
        lambda: RegionConv2d(8, 6, 3, upsample=2, **INPUT),
        same("conv.weight", "conv.bias"),
        (X, MASK, OTHER),
    ),
    "region conv, output": (
        lambda: baselines.TwoFilterConv2d(8, 6),
        lambda: RegionConv2d(8, 6, 3, padding=1),
        same("weight", "bias"),
        (X, MASK),
    ),
    "pyramid": (
        lambda: baselines.SeparateBranches(8, (1, 2)),
        lambda: PyramidConv2d(8, (1, 2)),
        joined(["block00.1", "block01.1"]),
        (X,),
    ),
    "attention": (lambda: baselines.NonLocalBlock(8), lambda: SelfAttention2d(8), attention, (X,)),
    "correlation": (baselines.CorrelationL1, GramL1, learned, (X, X)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layers(name: str) -> None:
    """Each rival of the benchmarks computes what the op's reference does, gradients of the inputs too."""
    theirs, ours, parameters, sizes = PUBLISHED[name]
    torch.manual_seed(0)
    theirs, ours = theirs().double(), ours().double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(0.3 * torch.randn_like(p))
        taken = parameters(theirs)
        assert len(taken) == len(list(ours.parameters()))
        for mine, other in zip(ours.parameters(), taken, strict=True):
            mine.copy_(other.view_as(mine))
    inputs = [torch.randn(size, dtype=torch.float64).requires_grad_() for size in sizes]
    if MASK in sizes:
        inputs[1] = (torch.rand(MASK) > 0.4).double()

    def found(layer: nn.Module) -> list[Tensor]:
        y = layer(*inputs)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        wanted = [t for t in inputs if t.requires_grad]
        return [y.detach(), *torch.autograd.grad((y * g).sum(), wanted)]

    with use_backend("reference"):
        expected = found(ours)
    for actual, right in zip(found(theirs), expected, strict=True):
        assert right.abs().max() > 1e-3
        assert_close(actual, right, 1e-10)


def test_two_mask_channels_are_refused() -> None:
    net = PConvUNet("nvidia", 2, 4)
    with pytest.raises(ValueError, match=r"^PConvUNet: mask must have 1 channel for kind 'nvidia', got 3$"):
        net(torch.rand(1, 3, 8, 8), torch.ones(1, 3, 8, 8))
