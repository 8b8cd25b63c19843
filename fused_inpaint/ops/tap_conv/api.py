# SPDX-License-Identifier: Apache-2.0
"""Convolution at the resolution of its input: the public function. A call goes on to torch.ops (csrc/tap_conv)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _backends
from ..checks import LIMIT, autocasts, check_feature_map, error
from . import reference
from .schema import ops

UPSAMPLINGS, PADDINGS = ("none", "nearest", "bilinear"), ("zeros", "reflect", "replicate")
ACTIVATIONS = ("none", "relu", "leaky_relu", "elu")


def tap_conv2d(
    x: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    upsampling: str = "none",
    padding_mode: str = "zeros",
    activation: str = "none",
    slope: float = 0.2,
) -> Tensor:
    """Upsampling by 2, padding that keeps the size, convolution and activation in one, computed at the resolution of x:

        y = act(weight * pad(up(concat(x))) + bias)

    Upsampling and padding act on pixels, each tap of the kernel on channels, so that a tap can be multiplied first, at
    a quarter of the pixels. Nothing upsampled, padded or concatenated is stored. Without upsampling this is of use for
    few output channels.

    For inference: on a CPU a kernel of its own in float32 and float64; everything else, and each derivative, runs as
    written above.

    Args:
        x: features (N, C, H, W), any memory format, channels_last is fastest; or several that stand for their
            concatenation.
        weight: (O, C, k, k), k odd.
        bias: (O,) or None.
        upsampling: "none", "nearest" or "bilinear" (aligned corners), by 2.
        padding_mode: "zeros", "reflect" or "replicate", by k // 2 after the upsampling.
        activation: "none", "relu", "leaky_relu" (of `slope`) or "elu".

    Returns:
        y (N, O, H', W') in x's dtype, channels_last; H', W' are 2 H, 2 W, or H, W without upsampling.

    Raises:
        ValueError: an argument of wrong rank, size, dtype or device; a map too small to reflect.
        NoBackendError: a backend asked for by name cannot run this call.

    >>> import torch
    >>> from fused_inpaint import ops
    >>> weight = torch.zeros(1, 1, 3, 3)
    >>> weight[..., 1, 1] = 1
    >>> x = torch.tensor([0.0, 3.0]).view(1, 1, 1, 2)
    >>> [round(v, 6) for v in ops.tap_conv2d(x, weight, upsampling="bilinear")[0, 0, 0].tolist()]
    [0.0, 1.0, 2.0, 3.0]
    """
    op = "tap_conv2d"
    maps = [x] if isinstance(x, Tensor) else list(x)
    for name, value, known in (
        ("upsampling", upsampling, UPSAMPLINGS),
        ("padding_mode", padding_mode, PADDINGS),
        ("activation", activation, ACTIVATIONS),
    ):
        if value not in known:
            raise error(op, name, f"{', '.join(known[:-1])} or {known[-1]}", value)
    _check(op, maps, weight, bias, 1 if upsampling == "none" else 2, padding_mode)
    dtype = torch.get_autocast_dtype(weight.device.type) if autocasts(maps[0]) else maps[0].dtype
    backend = _backends.choose(op, weight.device.type, refusal=lambda name: _refusal(name, dtype))
    maps, weight = [m.to(dtype) for m in maps], weight.to(dtype)
    bias = None if bias is None else bias.to(dtype).contiguous()
    if backend == "reference" or maps[0].size(0) == 0:
        with torch.autocast(weight.device.type, enabled=False):
            steps = reference.tap_conv2d(maps, weight, bias, upsampling, padding_mode, activation, slope)
        return steps.contiguous(memory_format=torch.channels_last)
    y: Tensor = ops.tap_conv2d(maps, weight, bias, upsampling, padding_mode, activation, float(slope))
    return y


def runs_at_input(maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a call has the kernel, and no derivative is asked for, which would take all steps anew."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*maps, weight, bias)):
        return False
    x = maps[0]
    kernels = x.dtype in (torch.float32, torch.float64) and not autocasts(x)
    return kernels and _backends.chosen("cpu", x.device.type)


def _refusal(name: str, dtype: torch.dtype) -> str:
    if name in ("cuda", "triton"):
        return "it has no kernel of this operator"
    if name == "cpu" and dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, not {dtype}"
    return ""


def _check(op: str, maps: list[Tensor], weight: Tensor, bias: Tensor | None, factor: int, padding_mode: str) -> None:
    if not maps:
        raise error(op, "x", "(N, C, H, W), or several", "none")
    for m in maps:
        check_feature_map(op, "x", m, maps[0])
        if (m.size(0), *m.shape[2:]) != (maps[0].size(0), *maps[0].shape[2:]) or 0 in m.shape[1:]:
            n, _, h, w = maps[0].shape
            raise error(op, "x", f"({n}, C, {h}, {w}) of at least one channel and pixel", tuple(m.shape))
    n, _, h, w = maps[0].shape
    channels, kernel = sum(m.size(1) for m in maps), weight.shape[-1] if weight.dim() else 0
    if weight.dim() != 4 or weight.shape[1:] != (channels, kernel, kernel) or kernel % 2 == 0 or weight.size(0) < 1:
        raise error(op, "weight", f"(O, {channels}, k, k) with k odd", tuple(weight.shape))
    if bias is not None and bias.shape != weight.shape[:1]:
        raise error(op, "bias", tuple(weight.shape[:1]), tuple(bias.shape))
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.device != maps[0].device:
            raise error(op, name, f"on {maps[0].device} as x", t.device)
        if t is not None and t.dtype != maps[0].dtype and not autocasts(maps[0]):
            raise error(op, name, f"{maps[0].dtype} as x", t.dtype)
    if padding_mode == "reflect" and kernel // 2 >= factor * min(h, w):
        raise error(op, "weight", f"of a kernel whose half is smaller than the map ({h}, {w}) to reflect", kernel)
    if n * max(weight.size(0), channels) * factor**2 * h * w >= LIMIT:
        raise error(op, "x and output", "smaller than 2^31 elements", tuple(maps[0].shape))
