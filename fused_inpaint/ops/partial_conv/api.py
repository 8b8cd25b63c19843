# SPDX-License-Identifier: Apache-2.0
"""Partial convolution: public functions, their checks, and the choice of implementation."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _backends
from . import reference, routes
from .packing import PackedWeight
from .schema import ops, output_size

Pair = int | Sequence[int]
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MASKS = (torch.uint8, torch.bool, *_FLOATS)
_LIMIT = 2**31


class Window(NamedTuple):
    """What one partial convolution reads and leaves behind of its masks; a function of the input masks alone."""

    planes: tuple[Tensor, ...]  # (N or 1, 1 or C_i, H_i, W_i) uint8, one for each source
    count: Tensor  # (N or 1, 1, H', W') int32, valid values under each window
    mask: Tensor  # (N or 1, 1, H', W') uint8, the updated mask


class BatchNorm(NamedTuple):
    """Batch normalisation between a partial convolution and its activation, as `torch.nn.functional.batch_norm`."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float


def partial_conv2d(
    x: Tensor | Sequence[Tensor],
    mask: Tensor | Sequence[Tensor] | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    multi_channel: bool = False,
    upsample: Pair = 1,
    activation: str = "none",
    slope: float = 0.2,
    batch_norm: BatchNorm | None = None,
    window: Window | None = None,
    fold: bool | None = None,
    packed: PackedWeight | None = None,
) -> tuple[Tensor, Tensor]:
    """Partial convolution (Liu et al., "Image Inpainting for Irregular Holes Using Partial Convolutions", eq. 1 and 2).

        y = act(norm((W . X~) * window / count + bias))   where count > 0, else exactly 0
        new mask = count > 0

    X~ holds x where the mask is 1 and 0 in the holes: selected, so a NaN under a hole reaches neither y nor a gradient.
    count is the number of valid values under the kernel window, zero padding counting as hole; window is that number
    where everything is valid. There is no eps. No gradient flows to the masks.

    Args:
        x: features (N, C, H, W), any memory format; channels_last is fastest. Or a sequence of such maps, read as if
            concatenated along the channels; nothing is concatenated or upsampled in memory.
        mask: (N or 1, 1 or C, H, W) uint8, bool or float, 1 = valid and 0 = hole, on x's device; one for each map of a
            sequence. None: everything is valid ("partial convolution as padding").
        weight: (O, C / groups, kh, kw), in x's dtype (autocast casts both).
        bias: (O,) or None.
        stride, padding, dilation: an int or two (rows, columns). groups: as in `torch.nn.functional.conv2d`.
        multi_channel: return the new mask with O channels instead of one. With groups > 1 the count runs over all
            input channels, as in NVIDIA's layer.
        upsample: 1, or 2 for a nearest x2 upsampling of map and mask before the convolution; one for each map.
        activation: "none", "relu" or "leaky_relu" with `slope`; the output stays 0 where the new mask is 0.
        batch_norm: normalisation before the activation; statistics include the holes (as 0). Replaces the bias.
        window: the result of `partial_window` for these masks, to save summing them again.
        fold: do an upsampling inside the kernel (exact, less work) or not; None lets a measured table decide.
        packed: the same weight made ready by `fused_inpaint.prepack`, for inference on the CPU.

    Returns:
        y (N, O, H', W') in x's dtype, channels_last, and the new mask (N or 1, 1 or O, H', W') in the mask's dtype (x's
        dtype without a mask).

    Dtypes: float32, float64 (CPU), float16, bfloat16; half types accumulate in float32.

    Raises:
        ValueError: an argument of wrong rank, size, dtype or device, or a mask (on the CPU) with a value other than 0, 1.
        NoBackendError: a backend asked for by name cannot run this call.

    >>> import torch
    >>> from fused_inpaint import ops
    >>> y, new_mask = ops.partial_conv2d(torch.rand(1, 3, 8, 8), torch.ones(1, 1, 8, 8), torch.rand(4, 3, 3, 3), padding=1)
    >>> tuple(y.shape), tuple(new_mask.shape)
    ((1, 4, 8, 8), (1, 1, 8, 8))
    """
    op = "partial_conv2d"
    sources = [x] if isinstance(x, Tensor) else list(x)
    ups = [upsample] * len(sources) if isinstance(upsample, int) else list(upsample)
    stride, padding, dilation = _pair(op, "stride", stride, 1), _pair(op, "padding", padding, 0), _pair(op, "dilation", dilation, 1)
    _check(op, sources, ups, weight, bias, stride, padding, dilation, groups, activation, slope, batch_norm)
    given = None if mask is None else [mask] if isinstance(mask, Tensor) else list(mask)
    if window is None:
        window = _window(op, sources, given, ups, (weight.size(2), weight.size(3)), stride, padding, dilation)
    backend = _backends.choose(op, weight.device.type)
    dtype = _result_dtype(op, sources, weight, bias)
    # oneDNN has no fast float16 convolution without AVX512-FP16; float32 is quicker and rounds once.
    inner = torch.float32 if backend == "cpu" and dtype == torch.float16 else dtype
    sources = [s.to(inner) for s in sources]
    geometry = (ups, list(stride), list(padding), list(dilation), groups)
    planes = list(window.planes)
    if packed is not None and (backend != "cpu" or inner != packed.weights[0].dtype):
        packed = None
    if packed is not None:
        fold = packed.fold
    elif fold is None or 2 not in ups:
        fold = 2 in ups and routes.fold(sources[0].size(0) * sources[0].size(2) * sources[0].size(3), "plain")
    y = _convolve(backend, sources, planes, window.count, weight.to(inner), bias, geometry, activation, slope, batch_norm, fold, packed)
    new_mask = window.mask.to(dtype if given is None else given[0].dtype)
    if multi_channel:
        new_mask = new_mask.expand(-1, weight.size(0), -1, -1)
    return y.to(dtype), new_mask


def partial_upconv2d(
    x: Tensor,
    mask: Tensor,
    skip: Tensor,
    skip_mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    slope: float = 0.2,
    batch_norm: BatchNorm | None = None,
    window: Window | None = None,
    fold: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The decoder's step of the partial-convolution U-Net: nearest x2 of (x, mask), concatenated with (skip, skip_mask),
    partial convolution with padding k // 2. Nothing upsampled or concatenated is stored.

    Args:
        x: (N, Cu, H, W). mask: (N or 1, 1 or Cu, H, W), 1 = valid, 0 = hole.
        skip: (N, Cs, 2H, 2W). skip_mask: (N or 1, 1 or Cs, 2H, 2W).
        weight: (O, Cu + Cs, k, k) with k odd, x's channels first. bias: (O,) or None.
        activation, slope, batch_norm, window, fold: as in `partial_conv2d`.

    Returns:
        y (N, O, 2H, 2W) and the new mask (N or 1, 1, 2H, 2W). Dtypes and errors: as in `partial_conv2d`.

    >>> import torch
    >>> from fused_inpaint import ops
    >>> x, skip, weight = torch.rand(1, 4, 4, 4), torch.rand(1, 2, 8, 8), torch.rand(5, 6, 3, 3)
    >>> y, new_mask = ops.partial_upconv2d(x, torch.ones(1, 1, 4, 4), skip, torch.ones(1, 1, 8, 8), weight)
    >>> tuple(y.shape)
    (1, 5, 8, 8)
    """
    op = "partial_upconv2d"
    k = weight.size(2) if weight.dim() == 4 else 0
    _require(k % 2 == 1 and weight.size(3) == k, op, "weight", "(O, Cu + Cs, k, k) with k odd", tuple(weight.shape))
    return partial_conv2d(
        [x, skip],
        [mask, skip_mask],
        weight,
        bias,
        padding=k // 2,
        upsample=(2, 1),
        activation=activation,
        slope=slope,
        batch_norm=batch_norm,
        window=window,
        fold=fold,
    )


def partial_window(
    mask: Tensor | Sequence[Tensor],
    channels: Pair,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    *,
    upsample: Pair = 1,
) -> Window:
    """The masks' part of `partial_conv2d`: how many valid values each window holds, and the new mask.

    All masks of a network depend on its input mask alone, so a network calls this once for each layer and hands the
    results on; `window.mask` is the next layer's mask.

    Args:
        mask: (N or 1, 1 or C, H, W), 1 = valid, 0 = hole, or a sequence of them, one for each source.
        channels: C of each source (an int for one source). kernel_size, stride, padding, dilation, upsample: as in
            `partial_conv2d`.

    >>> import torch
    >>> from fused_inpaint import ops
    >>> ops.partial_window(torch.ones(1, 1, 4, 4), 3, 3, padding=1).count[0, 0, 0].tolist()
    [12, 18, 18, 12]
    """
    op = "partial_window"
    masks = [mask] if isinstance(mask, Tensor) else list(mask)
    counts = [channels] if isinstance(channels, int) else list(channels)
    ups = [upsample] * len(masks) if isinstance(upsample, int) else list(upsample)
    kernel = _pair(op, "kernel_size", kernel_size, 1)
    stride, padding, dilation = _pair(op, "stride", stride, 1), _pair(op, "padding", padding, 0), _pair(op, "dilation", dilation, 1)
    return _count(op, [_plane(op, m) for m in masks], counts, ups, kernel, stride, padding, dilation)


def _convolve(
    backend: str,
    sources: list[Tensor],
    planes: list[Tensor],
    count: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[list[int], list[int], list[int], list[int], int],
    activation: str,
    slope: float,
    norm: BatchNorm | None,
    fold: bool,
    packed: PackedWeight | None,
) -> Tensor:
    scale = None
    if norm is not None and norm.training:
        return _convolve_and_normalise(backend, sources, planes, count, weight, geometry, activation, slope, norm, fold)
    if norm is not None:
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        bias = norm.bias - norm.running_mean * scale
        if scale.requires_grad and torch.is_grad_enabled():
            # The kernels take the scale as a constant; a trained one is a factor of the weight.
            weight, scale = weight * scale.to(weight.dtype).view(-1, 1, 1, 1), None
    with _no_autocast(weight):
        if backend == "reference":
            return reference.partial_conv2d(
                sources, planes, count, weight, bias, scale, *geometry, activation, slope
            )
        y: Tensor = ops.partial_conv2d(
            sources, planes, count, weight, bias, scale, *geometry, activation, slope, fold, list(packed.weights) if packed else []
        )
        return y


def _convolve_and_normalise(
    backend: str,
    sources: list[Tensor],
    planes: list[Tensor],
    count: Tensor,
    weight: Tensor,
    geometry: tuple[list[int], list[int], list[int], list[int], int],
    activation: str,
    slope: float,
    norm: BatchNorm,
    fold: bool,
) -> Tensor:
    values = sources[0].size(0) * count.size(2) * count.size(3)
    _require(values != 1, "partial_conv2d", "batch statistics", "over more than one value per channel", values)
    arguments = (sources, planes, count, weight, norm.weight, norm.bias, norm.eps, *geometry, activation, slope)
    with _no_autocast(weight):
        if backend == "reference":
            y, mean, var = reference.partial_conv2d_bn(*arguments)
        else:
            y, _, mean, var = ops.partial_conv2d_bn(*arguments, fold)
    if norm.running_mean is not None and norm.running_var is not None and values:
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            unbiased = var * (values / (values - 1))
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
    return y


def _no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _result_dtype(op: str, sources: list[Tensor], weight: Tensor, bias: Tensor | None) -> torch.dtype:
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    for name, t in [("weight", weight), ("bias", bias)]:
        if t is not None:
            _require(t.dtype == sources[0].dtype, op, name, f"{sources[0].dtype} as x", t.dtype)
    return sources[0].dtype


def _window(
    op: str,
    sources: list[Tensor],
    masks: list[Tensor] | None,
    upsample: list[int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Window:
    if masks is None:
        planes = [torch.ones((1, 1, *s.shape[2:]), dtype=torch.uint8, device=s.device) for s in sources]
    else:
        _require(len(masks) == len(sources), op, "mask", f"a sequence of {len(sources)}, one for each x", len(masks))
        for source, mask in zip(sources, masks, strict=True):
            _check_mask(op, source, mask)
        planes = [_plane(op, m) for m in masks]
    return _count(op, planes, [s.size(1) for s in sources], upsample, kernel, stride, padding, dilation)


def _count(
    op: str,
    planes: list[Tensor],
    channels: list[int],
    upsample: list[int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Window:
    arguments = (planes, channels, upsample, list(kernel), list(stride), list(padding), list(dilation))
    if _backends.choose(op, planes[0].device.type) == "reference":
        count, mask = reference.partial_window(*arguments)
    else:
        count, mask = ops.partial_window(*arguments)
    return Window(tuple(planes), count, mask)


def _plane(op: str, mask: Tensor) -> Tensor:
    """The mask as bytes, checked to hold nothing but 0 and 1 where looking costs no synchronisation."""
    backend = _backends.choose(op, mask.device.type)
    if torch.compiler.is_compiling() and backend == "reference":
        return (mask != 0).to(torch.uint8)
    if backend == "reference":
        odd = mask[(mask != 0) & (mask != 1)] if mask.device.type == "cpu" else mask[:0]
        _require(odd.numel() == 0, op, "mask", "0 or 1 everywhere", odd.flatten()[0].item() if odd.numel() else None)
        return (mask != 0).to(torch.uint8)
    if torch.compiler.is_compiling():
        plane: Tensor = ops.mask_plane(mask, op)
        return plane
    try:
        return ops.mask_plane(mask, op)  # type: ignore[no-any-return]
    except RuntimeError as error:
        sentence = str(error).splitlines()[0]
        raise ValueError(sentence[max(sentence.find(f"{op}: "), 0) :]) from None


def _check(
    op: str,
    sources: list[Tensor],
    upsample: list[int],
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str,
    slope: float,
    norm: BatchNorm | None,
) -> None:
    _require(len(sources) > 0, op, "x", "a tensor or a sequence of at least one", "none")
    _require(
        len(upsample) == len(sources) and all(u in (1, 2) for u in upsample),
        op, "upsample", f"1 or 2 for each of {len(sources)} sources", upsample,
    )  # fmt: skip
    first = sources[0]
    for s in sources:
        _require(s.dim() == 4, op, "x", "(N, C, H, W)", tuple(s.shape))
        _require(s.dtype in _FLOATS, op, "x", "float32, float64, float16 or bfloat16", s.dtype)
        _require(s.dtype == first.dtype and s.device == first.device, op, "x", f"all {first.dtype} on {first.device}",
                 f"{s.dtype} on {s.device}")  # fmt: skip
        _require(s.numel() < _LIMIT, op, "x", "smaller than 2^31 elements", tuple(s.shape))
    size = [(s.size(0), s.size(2) * u, s.size(3) * u) for s, u in zip(sources, upsample, strict=True)]
    for s in size:
        _require(s == size[0], op, "x", f"of one batch and size {size[0]} after upsampling", s)
    _require(weight.dim() == 4, op, "weight", "(O, C / groups, kh, kw)", tuple(weight.shape))
    _require(weight.device == first.device, op, "weight", f"on {first.device} as x", weight.device)
    channels = sum(s.size(1) for s in sources)
    _require(isinstance(groups, int) and groups >= 1 and (groups == 1 or len(sources) == 1),
             op, "groups", "a positive int, 1 with several sources", groups)  # fmt: skip
    _require(weight.size(1) * groups == channels, op, "weight",
             f"({weight.size(0)}, {channels // groups}, {weight.size(2)}, {weight.size(3)}) for x of {channels} channels "
             f"and groups={groups}", tuple(weight.shape))  # fmt: skip
    _require(weight.size(0) % groups == 0, op, "weight", f"of a multiple of {groups} outputs", tuple(weight.shape))
    if bias is not None:
        _require(bias.shape == (weight.size(0),), op, "bias", (weight.size(0),), tuple(bias.shape))
        _require(norm is None, op, "bias", "None with batch_norm", "a tensor")
    if norm is not None:
        _require(norm.weight.shape == (weight.size(0),), op, "batch_norm", f"of {weight.size(0)} channels", tuple(norm.weight.shape))
        _require(norm.training or norm.running_mean is not None, op, "batch_norm", "training or with running statistics", "neither")
    out = [output_size(size[0][1 + d], weight.size(2 + d), stride[d], padding[d], dilation[d]) for d in (0, 1)]
    _require(out[0] > 0 and out[1] > 0, op, "x", f"at least as large as the kernel {tuple(weight.shape[2:])}", size[0][1:])
    _require(size[0][0] * weight.size(0) * out[0] * out[1] < _LIMIT, op, "output", "smaller than 2^31 elements",
             (size[0][0], weight.size(0), *out))  # fmt: skip
    _require(activation in ("none", "relu", "leaky_relu"), op, "activation", "none, relu or leaky_relu", activation)
    _require(slope >= 0, op, "slope", "0 or more", slope)
    if 2 in upsample:
        k = weight.size(2)
        same = weight.size(3) == k and k % 2 == 1 and padding == (k // 2, k // 2) and stride == (1, 1) == dilation
        _require(same, op, "upsample", "1 unless the kernel is odd, square, stride 1 and padded by k // 2", upsample)


def _check_mask(op: str, x: Tensor, mask: Tensor) -> None:
    n, c, h, w = x.shape
    fits = mask.dim() == 4 and mask.shape[2:] == x.shape[2:] and mask.size(0) in (n, 1) and mask.size(1) in (c, 1)
    _require(fits, op, "mask", f"({n}, 1, {h}, {w}) or ({n}, {c}, {h}, {w})", tuple(mask.shape))
    _require(mask.dtype in _MASKS, op, "mask", "uint8, bool or float", mask.dtype)
    _require(mask.device == x.device, op, "mask", f"on {x.device} as x", mask.device)


def _pair(op: str, name: str, value: Pair, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    _require(
        len(pair) == 2 and all(isinstance(v, int) and v >= least for v in pair),
        op, name, f"an int or two of at least {least}", value,
    )  # fmt: skip
    return pair[0], pair[1]


def _require(holds: bool, op: str, argument: str, expected: object, got: object) -> None:
    if not holds:
        raise ValueError(f"{op}: {argument} must be {expected}, got {got}")
