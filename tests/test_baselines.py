# SPDX-License-Identifier: Apache-2.0
"""The benchmark baselines compute what the published layers and network computed."""

import numpy as np
import pytest
import torch
import vectors
from torch import Tensor

from fused_inpaint.baselines import FullChannelPartialConv2d, NvidiaPartialConv2d, PConvUNet

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
