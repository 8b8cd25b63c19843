# SPDX-License-Identifier: Apache-2.0
"""Partial convolution: public functions, their checks, and the choice of implementation."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _backends
from ..checks import LIMIT, Pair, check_feature_map, check_mask, check_mask_type, error, pair
from . import reference, routes
from .packing import PackedWeight
from .schema import ops, output_size


class Window(NamedTuple):
    """What one partial convolution reads and leaves behind of its masks; a function of the input masks alone."""

    planes: tuple[Tensor, ...]  # (N or 1, 1 or C_i, H_i, W_i) uint8, one for each source
    counts: Tensor  # (N or 1, 1, H', W') int32, valid values under each window
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
        ValueError: an argument of wrong rank, size, dtype or device; a mask (on the CPU) with a value but 0 and 1.
        NoBackendError: a backend asked for by name cannot run this call.

    >>> import torch
    >>> from fused_inpaint import ops
    >>> x, mask, weight = torch.rand(1, 3, 8, 8), torch.ones(1, 1, 8, 8), torch.rand(4, 3, 3, 3)
    >>> y, new_mask = ops.partial_conv2d(x, mask, weight, padding=1)
    >>> tuple(y.shape), tuple(new_mask.shape)
    ((1, 4, 8, 8), (1, 1, 8, 8))
    """
    op = "partial_conv2d"
    sources = [x] if isinstance(x, Tensor) else list(x)
    ups = [upsample] * len(sources) if isinstance(upsample, int) else list(upsample)
    stride, padding, dilation = (
        pair(op, "stride", stride, 1),
        pair(op, "padding", padding, 0),
        pair(op, "dilation", dilation, 1),
    )
    _check(op, sources, ups, weight, bias, stride, padding, dilation, groups, activation, slope, batch_norm)
    given = None if mask is None else [mask] if isinstance(mask, Tensor) else list(mask)
    if window is not None:
        _check_window(op, window, sources)
    else:
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
    y = _convolve(
        backend,
        sources,
        planes,
        window.counts,
        weight.to(inner),
        bias,
        geometry,
        activation,
        slope,
        batch_norm,
        fold,
        packed,
    )
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
    """The decoder's step of the partial-convolution U-Net: nearest x2 of (x, mask), concatenation with (skip,
    skip_mask), partial convolution with padding k // 2. Nothing upsampled or concatenated is stored.

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
    if k % 2 == 0 or weight.size(3) != k:
        raise error(op, "weight", "(O, Cu + Cs, k, k) with k odd", tuple(weight.shape))
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
    >>> ops.partial_window(torch.ones(1, 1, 4, 4), 3, 3, padding=1).counts[0, 0, 0].tolist()
    [12, 18, 18, 12]
    """
    op = "partial_window"
    masks = [mask] if isinstance(mask, Tensor) else list(mask)
    counts = [channels] if isinstance(channels, int) else list(channels)
    ups = [upsample] * len(masks) if isinstance(upsample, int) else list(upsample)
    if not len(masks) == len(counts) == len(ups) > 0:
        raise error(op, "mask, channels and upsample", "of one length", f"{len(masks)}, {len(counts)} and {len(ups)}")
    for m, c in zip(masks, counts, strict=True):
        if m.dim() != 4 or m.size(1) not in (1, c):
            raise error(op, "mask", f"(N, 1, H, W) or (N, {c}, H, W)", tuple(m.shape))
        check_mask_type(op, m)
    for m, up in zip(masks, ups, strict=True):
        if (m.size(2) * up, m.size(3) * up) != (masks[0].size(2) * ups[0], masks[0].size(3) * ups[0]):
            raise error(op, "mask", "of one size after upsampling", tuple(m.shape))
    kernel = pair(op, "kernel_size", kernel_size, 1)
    stride, padding, dilation = (
        pair(op, "stride", stride, 1),
        pair(op, "padding", padding, 0),
        pair(op, "dilation", dilation, 1),
    )
    for d in (0, 1):
        size = masks[0].size(2 + d) * ups[0]
        if output_size(size, kernel[d], stride[d], padding[d], dilation[d]) < 1:
            raise error(op, "mask", f"at least as large as the kernel {kernel}", tuple(masks[0].shape))
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
    scale = None if scale is None else scale.to(_wide(weight))
    bias = None if bias is None else bias.to(_wide(weight))
    with _no_autocast(weight):
        if backend == "reference":
            return reference.partial_conv2d(sources, planes, count, weight, bias, scale, *geometry, activation, slope)
        y: Tensor = ops.partial_conv2d(
            sources,
            planes,
            count,
            weight,
            bias,
            scale,
            *geometry,
            activation,
            slope,
            fold,
            list(packed.weights) if packed else [],
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
    if values == 1:
        raise error("partial_conv2d", "x", "more than one value per channel for batch statistics", 1)
    gain, shift = norm.weight.to(_wide(weight)), norm.bias.to(_wide(weight))
    arguments = (sources, planes, count, weight, gain, shift, norm.eps, *geometry, activation, slope)
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


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


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
        if t is not None and t.dtype != sources[0].dtype:
            raise error(op, name, f"{sources[0].dtype} as x", t.dtype)
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
        if len(masks) != len(sources):
            raise error(op, "mask", f"a sequence of {len(sources)}, one for each x", len(masks))
        for source, mask in zip(sources, masks, strict=True):
            check_mask(op, mask, source)
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
    if _backends.choose(op, mask.device.type) == "reference":
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            odd = mask[(mask != 0) & (mask != 1)]
            if odd.numel():
                raise error(op, "mask", "0 or 1 everywhere", odd[0].item())
        return (mask != 0).to(torch.uint8)
    if torch.compiler.is_compiling():
        plane: Tensor = ops.mask_plane(mask, op)
        return plane
    try:
        return ops.mask_plane(mask, op)
    except RuntimeError as failure:
        # The kernel's own sentence, without the source line that torch puts before it.
        sentence = str(failure).splitlines()[0]
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
    if not sources:
        raise error(op, "x", "a tensor or a sequence of at least one", "none")
    if len(upsample) != len(sources) or not all(u in (1, 2) for u in upsample):
        raise error(op, "upsample", f"1 or 2 for each of {len(sources)} sources", upsample)
    for s in sources:
        check_feature_map(op, "x", s, sources[0])
    n, h, w = sources[0].size(0), sources[0].size(2) * upsample[0], sources[0].size(3) * upsample[0]
    for s, up in zip(sources, upsample, strict=True):
        if s.size(0) != n or s.size(2) * up != h or s.size(3) * up != w:
            raise error(op, "x", f"({n}, C, {h}, {w}) after upsampling", tuple(s.shape))
    if not isinstance(groups, int) or groups < 1 or (groups > 1 and len(sources) > 1):
        raise error(op, "groups", "a positive int, 1 with several sources", groups)
    _check_weight(op, weight, sum(s.size(1) for s in sources), groups, sources[0])
    outputs, _, *kernel = weight.shape
    if bias is not None and bias.shape != (outputs,):
        raise error(op, "bias", f"({outputs},)", tuple(bias.shape))
    if norm is not None:
        if bias is not None:
            raise error(op, "bias", "None with batch_norm", "a tensor")
        if norm.weight.shape != (outputs,):
            raise error(op, "batch_norm", f"of {outputs} channels", tuple(norm.weight.shape))
        if not norm.training and (norm.running_mean is None or norm.running_var is None):
            raise error(op, "batch_norm", "training or with running statistics", "neither")
    out = [output_size((h, w)[d], kernel[d], stride[d], padding[d], dilation[d]) for d in (0, 1)]
    if out[0] < 1 or out[1] < 1:
        raise error(op, "x", f"at least as large as the kernel {tuple(kernel)}", (h, w))
    if n * outputs * out[0] * out[1] >= LIMIT:
        raise error(op, "output", "smaller than 2^31 elements", (n, outputs, *out))
    if activation not in ("none", "relu", "leaky_relu"):
        raise error(op, "activation", "none, relu or leaky_relu", activation)
    if slope < 0:
        raise error(op, "slope", "0 or more", slope)
    if 2 in upsample:
        k = kernel[0]
        if kernel[1] != k or k % 2 == 0 or padding != (k // 2, k // 2) or stride != (1, 1) or dilation != (1, 1):
            raise error(op, "upsample", "1 unless the kernel is odd, square, stride 1 and padded by k // 2", upsample)


def _check_weight(op: str, weight: Tensor, channels: int, groups: int, x: Tensor) -> None:
    if weight.dim() != 4:
        raise error(op, "weight", "(O, C / groups, kh, kw)", tuple(weight.shape))
    if weight.device != x.device:
        raise error(op, "weight", f"on {x.device} as x", weight.device)
    if weight.size(1) * groups != channels or weight.size(0) % groups:
        expected = f"(a multiple of {groups}, {channels} / {groups}, kh, kw) for x of {channels} channels"
        raise error(op, "weight", expected, tuple(weight.shape))


def _check_window(op: str, window: Window, sources: list[Tensor]) -> None:
    if len(window.planes) != len(sources):
        raise error(op, "window", f"of {len(sources)} masks", len(window.planes))
    for plane, source in zip(window.planes, sources, strict=True):
        check_mask(op, plane, source)
