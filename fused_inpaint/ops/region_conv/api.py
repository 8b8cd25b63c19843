# SPDX-License-Identifier: Apache-2.0
"""Region-wise convolution: the public function. A call goes on to torch.ops (csrc/region_conv)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _backends
from ..checks import (
    LIMIT,
    Pair,
    autocasts,
    check_feature_map,
    check_mask_type,
    convolution_dtype,
    error,
    output_size,
    pair,
)
from ..masks import plane_of, resized
from . import reference
from .schema import ops


def region_conv2d(
    x: Tensor | Sequence[Tensor],
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    *,
    select: str = "output",
    upsample: int = 1,
    padding_mode: str = "zeros",
    activation: str = "none",
) -> Tensor:
    """Region-wise convolution (Ma et al., "Region-Wise Generative Adversarial Image Inpainting for Large Missing
    Areas", 2022): one filter for the valid region, another for the hole.

        select="output":  y = act(W_r . x + b_r)  for an output location in region r              (eq. 1)
        select="input":   y = act(W . concat(E where m = 1, X where m = 0) + b)                   (published code)

    A location pays for one filter, but near the region's edge. With "input" neither the selected maps nor their
    concatenation is stored, and a value under the wrong region (NaN, too) reaches neither y nor a gradient.

    Args:
        x: features (N, C, H, W), any memory format; channels_last is fastest. With "input" the pair (E, X), which may
            differ in channels: E for the valid region (in the paper with the skip connection), X for the hole.
        mask: (N or 1, 1, h, w) uint8, bool or float, 1 = valid and 0 = hole, on x's device; brought to the output's
            size ("output") or the input's ("input") as `torch.nn.functional.interpolate` with
            mode="nearest" does.
        weight: "output": (2, O, C, kh, kw), the hole's filter first; "input": (O, Ce + Cx, kh, kw), E's channels first.
        bias: "output": (2, O); "input": (O,); or None.
        stride, padding, dilation: an int or two (rows, columns).
        upsample: 1, or 2 for nearest x2 before padding and convolution ("input" only, stride 1).
        padding_mode: "zeros", "reflect" or "replicate".
        activation: "none" or "elu", in the same pass.

    Returns:
        y (N, O, H', W') in x's dtype, channels_last. No gradient flows to the mask.

    Dtypes: float32, float64 (CPU), float16, bfloat16; half types accumulate in float32.

    Raises:
        ValueError: an argument of wrong rank, size, dtype or device; reflect padding that is not smaller than the map.
        NoBackendError: a backend asked for by name cannot run this call.

    >>> import torch
    >>> from fused_inpaint import ops
    >>> x, mask = torch.ones(1, 1, 4, 4), torch.tensor([[1.0, 0.0]]).view(1, 1, 1, 2)
    >>> weight = torch.tensor([10.0, 1.0]).view(2, 1, 1, 1, 1)
    >>> ops.region_conv2d(x, mask, weight)[0, 0, 0].tolist()
    [1.0, 1.0, 10.0, 10.0]
    """
    op = "region_conv2d"
    if select not in ("output", "input"):
        raise error(op, "select", "output or input", select)
    geometry = [
        list(pair(op, n, v, least))
        for n, v, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    ]
    if padding_mode not in ("zeros", "reflect", "replicate"):
        raise error(op, "padding_mode", "zeros, reflect or replicate", padding_mode)
    if activation not in ("none", "elu"):
        raise error(op, "activation", "none or elu", activation)
    if upsample not in (1, 2) or (upsample == 2 and (select == "output" or geometry[0] != [1, 1])):
        raise error(op, "upsample", '1, or 2 with select="input" and stride 1', upsample)
    maps = [x] if isinstance(x, Tensor) else list(x)
    if len(maps) != (1 if select == "output" else 2):
        expected = "a tensor" if select == "output" else "two tensors, for the valid region and the hole,"
        raise error(op, "x", f'{expected} with select="{select}"', f"{len(maps)}")
    out = _check(op, maps, mask, weight, bias, geometry, select, upsample, padding_mode)
    dtype = torch.get_autocast_dtype(maps[0].device.type) if autocasts(maps[0]) else maps[0].dtype
    taps = weight.size(-1) * weight.size(-2) if select == "input" else 0
    backend = _backends.choose(op, maps[0].device.type, refusal=lambda name: _refusal(name, dtype, taps))
    size = out if select == "output" else tuple(maps[0].shape[2:])
    plane = resized(plane_of(op, mask), size).contiguous()
    inner = convolution_dtype(dtype, backend == "cpu")
    maps, weight = [m.to(inner) for m in maps], weight.to(inner)
    if bias is not None:
        bias = bias.to(torch.float64 if inner == torch.float64 else torch.float32).contiguous()
    arguments = (
        *maps,
        plane,
        weight,
        bias,
        *([upsample] if select == "input" else []),
        *geometry,
        padding_mode,
        activation,
    )
    if backend == "reference" or maps[0].size(0) == 0:
        with torch.autocast(maps[0].device.type, enabled=False):
            return getattr(reference, f"region_conv2d_{select}")(*arguments).to(dtype)
    suffix = "_triton" if backend == "triton" else ""
    return getattr(ops, f"region_conv2d_{select}{suffix}")(*arguments).to(dtype)


def _refusal(name: str, dtype: torch.dtype, taps: int) -> str:
    if name == "triton" and dtype == torch.float64:
        return "it computes in float32, not float64"
    # A word holds a bit for each tap.
    return f"it takes kernels of at most 62 taps, not {taps}" if name == "triton" and taps > 62 else ""


def _check(
    op: str,
    maps: list[Tensor],
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: list[list[int]],
    select: str,
    upsample: int,
    padding_mode: str,
) -> tuple[int, int]:
    """(H', W')"""
    for m in maps:
        check_feature_map(op, "x", m, maps[0])
        if (m.size(0), *m.shape[2:]) != (maps[0].size(0), *maps[0].shape[2:]) or m.size(1) < 1:
            n, _, h, w = maps[0].shape
            raise error(op, "x", f"({n}, C, {h}, {w}) with C at least 1", tuple(m.shape))
    channels, x = sum(m.size(1) for m in maps), maps[0]
    shape = f"(2, O, {channels}, kh, kw)" if select == "output" else f"(O, {channels}, kh, kw)"
    rank = 5 if select == "output" else 4
    if (
        weight.dim() != rank
        or weight.size(-3) != channels
        or 0 in weight.shape[-2:]
        or (rank == 5 and weight.size(0) != 2)
    ):
        raise error(op, "weight", shape, tuple(weight.shape))
    if bias is not None and bias.shape != weight.shape[: rank - 3]:
        raise error(op, "bias", tuple(weight.shape[: rank - 3]), tuple(bias.shape))
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise error(op, name, f"on {x.device} as x", t.device)
        if t is not None and t.dtype != x.dtype and not autocasts(x):
            raise error(op, name, f"{x.dtype} as x", t.dtype)
    if mask.dim() != 4 or mask.size(0) not in (1, x.size(0)) or mask.size(1) != 1 or 0 in mask.shape[2:]:
        raise error(op, "mask", f"({x.size(0)} or 1, 1, h, w)", tuple(mask.shape))
    check_mask_type(op, mask)
    if mask.device != x.device:
        raise error(op, "mask", f"on {x.device} as x", mask.device)
    stride, padding, dilation = geometry
    size = (x.size(2) * upsample, x.size(3) * upsample)
    if padding_mode == "reflect" and not (padding[0] < size[0] and padding[1] < size[1]):
        raise error(op, "padding", f"smaller than the map {size} to reflect", tuple(padding))
    if padding_mode == "replicate" and 0 in size:
        raise error(op, "x", "of at least one pixel to replicate", tuple(x.shape))
    kernel = weight.shape[-2:]
    height, width = (output_size(size[d], kernel[d], stride[d], padding[d], dilation[d]) for d in (0, 1))
    if height < 1 or width < 1:
        raise error(op, "x", f"at least as large as the kernel {tuple(kernel)}", size)
    if x.size(0) * max(weight.size(-4) * height * width, channels * size[0] * size[1]) >= LIMIT:
        raise error(op, "x and output", "smaller than 2^31 elements", (x.size(0), weight.size(-4), height, width))
    return height, width
