# SPDX-License-Identifier: Apache-2.0
"""Every refusal is one sentence with the argument, what was expected and what came."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import OPERATORS
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fused_inpaint
from fused_inpaint import PartialConv2d, PartialUpConv2d, _backends, ops, use_backend
from fused_inpaint.ops.partial_conv import dispatch


def refused(sentence: str, call: Callable[[], Any], error: type[Exception] = ValueError) -> None:
    """The call raises exactly this sentence."""
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        call()


def conv(device: torch.device, **changes: Any) -> Callable[[], Any]:
    arguments: dict[str, Any] = {
        "x": torch.zeros(4, 32, 64, 64),
        "mask": torch.ones(4, 1, 64, 64),
        "weight": torch.zeros(8, 32, 3, 3),
        "bias": torch.zeros(8),
        "padding": 1,
    }
    arguments = on(device, {**arguments, **changes})
    return lambda: ops.partial_conv2d(**arguments)


def on(device: torch.device, value: Any) -> Any:
    """Its tensors moved to a device, except those that are on the meta device to be refused."""

    def moved(t: Tensor) -> Tensor:
        once = t[tuple(slice(None if stride else 1) for stride in t.stride())]  # an expanded tensor stays one
        return t if t.is_meta else once.to(device).expand(t.shape)

    return tree_map_only(Tensor, moved, value)


def norm(channels: int = 8, training: bool = True, running: bool = False) -> ops.BatchNorm:
    one = torch.ones(channels)
    return ops.BatchNorm(one, one, one if running else None, one if running else None, training, 0.1, 1e-5)


def ones(*size: int) -> Tensor:
    return torch.ones(size)


HUGE = torch.zeros(1).expand(2, 1024, 1024, 1024)  # 2^31 elements, one number in memory
REFUSED = {
    "mask channels": (
        dict(mask=ones(4, 3, 64, 64)),
        "mask must be (4, 1, 64, 64) or (4, 32, 64, 64), got (4, 3, 64, 64)",
    ),
    "mask batch": (dict(mask=ones(2, 1, 64, 64)), "mask must be (4, 1, 64, 64) or (4, 32, 64, 64), got (2, 1, 64, 64)"),
    "mask size": (dict(mask=ones(4, 1, 64, 63)), "mask must be (4, 1, 64, 64) or (4, 32, 64, 64), got (4, 1, 64, 63)"),
    "mask rank": (dict(mask=ones(4, 64, 64)), "mask must be (4, 1, 64, 64) or (4, 32, 64, 64), got (4, 64, 64)"),
    "mask dtype": (dict(mask=ones(4, 1, 64, 64).long()), "mask must be uint8, bool or float, got torch.int64"),
    "mask device": (dict(mask=ones(4, 1, 64, 64).to("meta")), "mask must be on cpu as x, got meta"),
    "mask number": (dict(mask=[ones(4, 1, 64, 64)] * 2), "mask must be a sequence of 1, one for each x, got 2"),
    "x rank": (dict(x=ones(32, 64, 64)), "x must be (N, C, H, W), got (32, 64, 64)"),
    "x dtype": (dict(x=ones(4, 32, 64, 64).long()), "x must be float32, float64, float16 or bfloat16, got torch.int64"),
    "x none": (dict(x=[]), "x must be a tensor or a sequence of at least one, got none"),
    "x dtypes": (
        dict(x=[ones(1, 16, 8, 8), ones(1, 16, 8, 8).double()], mask=[ones(1, 1, 8, 8)] * 2),
        "x must be torch.float32 on cpu, got torch.float64 on cpu",
    ),
    "x sizes": (
        dict(x=[ones(1, 16, 8, 8), ones(1, 16, 8, 9)], mask=None),
        "x must be (1, C, 8, 8) after upsampling, got (1, 16, 8, 9)",
    ),
    "x batches": (
        dict(x=[ones(2, 16, 4, 4), ones(1, 16, 8, 8)], mask=None, upsample=(2, 1)),
        "x must be (2, C, 8, 8) after upsampling, got (1, 16, 8, 8)",
    ),
    "x below the kernel": (
        dict(x=ones(1, 32, 2, 9), mask=None, weight=ones(8, 32, 5, 5)),
        "x must be at least as large as the kernel (5, 5), got (2, 9)",
    ),
    "x too large": (dict(x=HUGE, mask=None), "x must be smaller than 2^31 elements, got (2, 1024, 1024, 1024)"),
    "output too large": (
        dict(x=torch.zeros(1).expand(1, 1, 32768, 32768), mask=None, weight=ones(2, 1, 1, 1), bias=None, padding=0),
        "output must be smaller than 2^31 elements, got (1, 2, 32768, 32768)",
    ),
    "weight rank": (dict(weight=ones(8, 32, 3)), "weight must be (O, C / groups, kh, kw), got (8, 32, 3)"),
    "weight channels": (
        dict(weight=ones(8, 31, 3, 3)),
        "x must be of 31 channels for a weight of (8, 31, 3, 3), got 32",
    ),
    "weight groups": (
        dict(groups=4),
        "x must be of 128 channels for a weight of (8, 32, 3, 3) in 4 groups, got 32",
    ),
    "weight outputs": (
        dict(weight=ones(9, 16, 3, 3), bias=None, groups=2),
        "weight must be (a multiple of 2, 32 / 2, kh, kw) for x of 32 channels, got (9, 16, 3, 3)",
    ),
    "weight dtype": (dict(weight=ones(8, 32, 3, 3).double()), "weight must be torch.float32 as x, got torch.float64"),
    "weight device": (dict(weight=ones(8, 32, 3, 3).to("meta")), "weight must be on cpu as x, got meta"),
    "weight without a tap": (
        dict(weight=ones(8, 32, 0, 3)),
        "weight must be (O, C / groups, kh, kw) with a kernel of at least 1 x 1, got (8, 32, 0, 3)",
    ),
    "bias size": (dict(bias=ones(7)), "bias must be (8,), got (7,)"),
    "bias dtype": (dict(bias=ones(8).half()), "bias must be torch.float32 as x, got torch.float16"),
    "bias device": (dict(bias=ones(8).to("meta")), "bias must be on cpu as x, got meta"),
    "bias with norm": (dict(batch_norm=norm()), "bias must be None with batch_norm, got a tensor"),
    "no channel": (
        dict(x=ones(4, 0, 64, 64), mask=ones(4, 0, 64, 64), weight=ones(8, 0, 3, 3)),
        "x must be of at least one channel, got (4, 0, 64, 64)",
    ),
    "norm bias size": (
        dict(bias=None, batch_norm=norm()._replace(bias=ones(1))),
        "batch_norm must be of 8 channels, got (1,)",
    ),
    "norm size": (dict(bias=None, batch_norm=norm(7)), "batch_norm must be of 8 channels, got (7,)"),
    "norm statistics": (
        dict(bias=None, batch_norm=norm(training=False)),
        "batch_norm must be training or with running statistics, got neither",
    ),
    "norm of one value": (
        dict(x=ones(1, 32, 3, 3), mask=None, bias=None, padding=0, batch_norm=norm()),
        "x must be more than one value per channel for batch statistics, got 1 (.eval() takes none)",
    ),
    "groups": (dict(groups=0), "groups must be a positive int, 1 with several sources, got 0"),
    "groups of several": (
        dict(x=[ones(1, 16, 8, 8)] * 2, mask=None, groups=2),
        "groups must be a positive int, 1 with several sources, got 2",
    ),
    "stride": (dict(stride=0), "stride must be an int or two of at least 1, got 0"),
    "stride length": (dict(stride=(1, 1, 1)), "stride must be an int or two of at least 1, got (1, 1, 1)"),
    "stride type": (dict(stride=1.5), "stride must be an int or two of at least 1, got 1.5"),
    "padding": (dict(padding=-1), "padding must be an int or two of at least 0, got -1"),
    "paddings": (dict(padding=(1, -2)), "padding must be an int or two of at least 0, got (1, -2)"),
    "padding type": (dict(padding="same"), "padding must be an int or two of at least 0, got same"),
    "dilation": (dict(dilation=(0, 1)), "dilation must be an int or two of at least 1, got (0, 1)"),
    "upsample": (dict(upsample=3), "upsample must be 1 or 2 for each of 1 sources, got [3]"),
    "upsample length": (dict(upsample=(2, 1)), "upsample must be 1 or 2 for each of 1 sources, got [2, 1]"),
    "upsample kernel": (
        dict(weight=ones(8, 32, 4, 4), upsample=2),
        "upsample must be 1 unless the kernel is odd, square, stride 1 and padded by k // 2, got [2]",
    ),
    "upsample stride": (
        dict(stride=2, upsample=2),
        "upsample must be 1 unless the kernel is odd, square, stride 1 and padded by k // 2, got [2]",
    ),
    "activation": (dict(activation="gelu"), "activation must be none, relu or leaky_relu, got gelu"),
    "slope": (dict(slope=-0.1), "slope must be 0 or more, got -0.1"),
}


@pytest.mark.parametrize("changes, sentence", REFUSED.values(), ids=REFUSED)
def test_arguments(backend: str, device: torch.device, changes: dict, sentence: str) -> None:
    sentence = re.sub(r"\bon cpu\b", f"on {torch.empty(0, device=device).device}", sentence)
    refused(f"partial_conv2d: {sentence}", conv(device, **changes))


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "value, shown, dtype",
    [(2, "2", torch.uint8), (255, "255", torch.uint8), (0.5, "0.5", torch.float32), (-1.0, "-1", torch.float32),
     (torch.nan, "nan", torch.float32), (2.0, "2", torch.bfloat16), (0.25, "0.25", torch.float16)],
)  # fmt: skip
def test_mask_values(backend: str, value: float, shown: str, dtype: torch.dtype) -> None:
    mask = torch.ones(2, 1, 6, 6, dtype=dtype)
    mask[1, 0, 5, 4:] = torch.tensor([value, 3.0])  # the first is shown
    x, weight = torch.zeros(2, 3, 6, 6), torch.zeros(4, 3, 3, 3)
    with pytest.raises(ValueError, match=rf"^partial_conv2d: mask must be 0 or 1 everywhere, got {shown}(\.0)?$"):
        ops.partial_conv2d(x, mask, weight)
    with pytest.raises(ValueError, match=rf"^partial_window: mask must be 0 or 1 everywhere, got {shown}(\.0)?$"):
        ops.partial_window(mask, 3, 3)


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["mask", "skip_mask"])
def test_which_mask(backend: str, name: str) -> None:
    masks = {"mask": torch.ones(1, 1, 3, 3), "skip_mask": torch.ones(1, 1, 6, 6)}
    masks[name][0, 0, 1, 2] = 0.5
    x, skip, weight = torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 6, 6), torch.zeros(4, 3, 3, 3)
    with pytest.raises(ValueError, match=rf"^partial_upconv2d: {name} must be 0 or 1 everywhere, got 0\.5$"):
        ops.partial_upconv2d(x, masks["mask"], skip, masks["skip_mask"], weight)


def test_what_is_no_fault_of_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure within the operator is handed on as it is."""
    if _backends.status()["cpu"]:
        pytest.skip(_backends.status()["cpu"])

    def full(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    x, mask, weight = torch.zeros(1, 3, 6, 6), torch.ones(1, 1, 6, 6), torch.zeros(4, 3, 3, 3)
    for name in ("partial_conv2d_masked", "mask_plane"):
        monkeypatch.setattr(dispatch.ops, name, full)
    with use_backend("cpu"):
        for call in (lambda: ops.partial_conv2d(x, mask, weight), lambda: ops.partial_window(mask, 3, 3)):
            with pytest.raises(RuntimeError, match=r"^out of memory$"):
                call()


def test_upconv(backend: str, device: torch.device) -> None:
    x, skip = ones(1, 4, 4, 4).to(device), ones(1, 2, 8, 8).to(device)
    m, s = ones(1, 1, 4, 4).to(device), ones(1, 1, 8, 8).to(device)

    def weight(*size: int) -> Tensor:
        return ones(*size).to(device)

    sentence = "partial_upconv2d: weight must be (O, Cu + Cs, k, k) with k odd, got "
    refused(f"{sentence}(5, 6, 2, 2)", lambda: ops.partial_upconv2d(x, m, skip, s, weight(5, 6, 2, 2)))
    refused(f"{sentence}(5, 6, 3, 1)", lambda: ops.partial_upconv2d(x, m, skip, s, weight(5, 6, 3, 1)))
    refused(f"{sentence}(5, 6, 3)", lambda: ops.partial_upconv2d(x, m, skip, s, weight(5, 6, 3)))
    with pytest.raises(ValueError, match=r"^partial_upconv2d: mask must be \(1, 1, 4, 4\) or .*, got \(1, 1, 8, 8\)$"):
        ops.partial_upconv2d(x, s, skip, s, weight(5, 6, 3, 3))
    with pytest.raises(
        ValueError, match=r"^partial_upconv2d: (skip_)?mask must be \(1, 1, 8, 8\) or .*, got \(1, 1, 4, 4\)$"
    ):
        ops.partial_upconv2d(x, m, skip, m, weight(5, 6, 3, 3))


WRONG = {
    "scale": lambda a: a | {"scale": torch.ones(1)},
    "bias": lambda a: a | {"bias": torch.ones(3)},
    "channels": lambda a: a | {"sources": [torch.ones(1, 5, 8, 8)]},
    "mask batch": lambda a: a | {"masks": [torch.ones(3, 1, 8, 8, dtype=torch.uint8)]},
    "mask dtype": lambda a: a | {"masks": [torch.ones(1, 1, 8, 8)]},
    "count size": lambda a: a | {"count": torch.ones(1, 1, 9, 8, dtype=torch.int32)},
    "even kernel": lambda a: a | {"weight": torch.ones(4, 2, 2, 2), "upsample": [2]},
}


@OPERATORS
@pytest.mark.parametrize("wrong", WRONG)
def test_operators_stay_inside_their_memory(backend: str, device: torch.device, wrong: str) -> None:
    """A direct call of the operator with sizes that do not fit is refused before anything is read."""
    arguments: dict[str, Any] = {
        "sources": [torch.ones(1, 2, 8, 8)],
        "masks": [torch.ones(1, 1, 8, 8, dtype=torch.uint8)],
        "count": torch.ones(1, 1, 8, 8, dtype=torch.int32),
        "weight": torch.ones(4, 2, 3, 3),
        "bias": None,
        "scale": None,
        "upsample": [1],
    }
    rest = ([1, 1], [1, 1], [1, 1], 1, [0], "none", 0.2, 0, None)
    call = torch.ops.fused_inpaint.partial_conv2d
    assert call(*on(device, arguments).values(), *rest).shape == (1, 4, 8, 8)
    with pytest.raises(RuntimeError, match=r"partial_conv2d: .* must "):
        call(*on(device, WRONG[wrong](arguments)).values(), *rest)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((ones(6, 6), 3, 3), "mask must be (N, 1, H, W) or (N, 3, H, W), got (6, 6)"),
        ((ones(1, 2, 6, 6), 3, 3), "mask must be (N, 1, H, W) or (N, 3, H, W), got (1, 2, 6, 6)"),
        ((ones(1, 1, 6, 6), 3, 0), "kernel_size must be an int or two of at least 1, got 0"),
        ((ones(1, 1, 6, 6), 3, 3, 0), "stride must be an int or two of at least 1, got 0"),
        ((ones(1, 1, 6, 6), 3, 3, 1, -1), "padding must be an int or two of at least 0, got -1"),
        (([ones(1, 1, 6, 6)] * 2, 3, 3), "mask, channels and upsample must be of one length, got 2, 1 and 2"),
        ((ones(1, 1, 6, 6).long(), 3, 3), "mask must be uint8, bool or float, got torch.int64"),
        (([ones(2, 1, 6, 6), ones(4, 1, 6, 6)], [3, 3], 3), "mask must be of one batch or 1, got [2, 4]"),
        ((ones(1, 0, 6, 6), 0, 3), "channels must be 1 or more, got 0"),
    ],
)
def test_window_arguments(backend: str, device: torch.device, arguments: tuple, sentence: str) -> None:
    refused(f"partial_window: {sentence}", lambda: ops.partial_window(*on(device, arguments)))


@pytest.mark.parametrize("size, batch, stride", [(10, 1, 1), (8, 3, 1), (8, 1, 2)], ids=["size", "batch", "stride"])
def test_window_of_another_call(backend: str, device: torch.device, size: int, batch: int, stride: int) -> None:
    """A window made for other masks or another geometry is refused rather than read out of bounds.

    The output is never larger than the window's counts here, so that a failing test does not read out of bounds either.
    """
    window = ops.partial_window(torch.ones(batch, 1, size, size, device=device), 3, 3, padding=1)
    x, weight = on(device, (ones(2, 3, 8, 8), ones(4, 3, 3, 3)))
    with pytest.raises(ValueError, match=r"^partial_conv2d: (window|mask) must be .*, got .*"):
        ops.partial_conv2d(x, None, weight, None, stride, 1, window=window)


def test_masks_that_are_not_the_windows(backend: str, device: torch.device) -> None:
    """Twice each: the first refusal must not let the second call through."""
    window = ops.partial_window(torch.ones(1, 1, 6, 6, device=device), 2, 3, padding=1)
    x, weight = torch.ones(1, 2, 6, 6, device=device), torch.ones(4, 2, 3, 3, device=device)
    other = torch.ones(1, 1, 3, 3, device=device)
    small = window._replace(mask=window.mask[..., :2, :2])
    for _ in range(2):
        assert ops.partial_conv2d(x, None, weight, padding=1, window=window)[1].shape == (1, 1, 6, 6)
        with pytest.raises(
            ValueError, match=r"^partial_conv2d: mask must be \(1, 1, 6, 6\) or .*, got \(1, 1, 3, 3\)$"
        ):
            ops.partial_conv2d(x, other, weight, padding=1, window=window)
        with pytest.raises(ValueError, match=r"^partial_conv2d: window must be of a mask as its counts .*, got .*"):
            ops.partial_conv2d(x, None, weight, padding=1, window=small)


def test_layers() -> None:
    refused(
        "PartialConv2d: padding must be an int or two of at least 0, got -1", lambda: PartialConv2d(3, 4, 3, padding=-1)
    )
    refused(
        "PartialConv2d: padding must be an int or two of at least 0, got same",
        lambda: PartialConv2d(3, 4, 3, padding="same"),  # type: ignore[arg-type]
    )
    refused("PartialUpConv2d: kernel_size must be an odd int, got 4", lambda: PartialUpConv2d(3, 4, 5, 4))
    with pytest.raises(
        ValueError, match=r"^partial_conv2d: x must be of 3 channels for a weight of \(4, 3, 3, 3\), got 2$"
    ):
        PartialConv2d(3, 4, 3)(torch.zeros(1, 2, 8, 8))


def test_backend_names() -> None:
    sentence = "use_backend: name must be one of auto, reference, cpu, cuda, triton, got tpu"
    refused(sentence, lambda: fused_inpaint.use_backend("tpu"))
