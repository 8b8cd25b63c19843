# SPDX-License-Identifier: Apache-2.0
"""Partial convolution: the public functions. A call goes on to dispatch.run and torch.ops (csrc/partial_conv)."""

from collections.abc import Sequence

from torch import Tensor

from ..checks import Pair, check_mask_type, error, pair
from ..masks import plane_of
from .checks import check_one_device, check_output_size
from .dispatch import count, count_chain, run
from .packing import PackedWeight
from .plan import check_steps, plan_of
from .types import BatchNorm, Epilogue, GivenGeometry, Inputs, Window, WindowStep


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
    holes_zero: bool | Sequence[bool] = False,
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
        window: the result of `partial_window` for these masks, to save summing them again. Without a mask beside it the
            new mask that is returned is the window's own, uint8.
        fold: do an upsampling inside the kernel (exact, less work) or not; None lets a table decide.
        holes_zero: a promise that x already holds 0 in its holes and that whatever wrote the zeros takes no gradient
            there, as the outputs of this function do: x is then not looked at or copied, and its gradient is left as
            it falls in the holes. One for each map of a sequence.
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
    sources = [x] if isinstance(x, Tensor) else list(x)
    masks = None if mask is None else [mask] if isinstance(mask, Tensor) else list(mask)
    ups = [upsample] * len(sources) if isinstance(upsample, int) else list(upsample)
    op, names = "partial_conv2d", ["mask"] * len(sources)
    zeroed = [holes_zero] * len(sources) if isinstance(holes_zero, bool) else list(holes_zero)
    geometry = GivenGeometry(ups, stride, padding, dilation, groups, zeroed)
    epilogue = Epilogue(activation, slope, batch_norm)
    given = Inputs(op, sources, masks, names, weight, bias, window, geometry, epilogue, fold)
    return _convolve(given, packed, multi_channel)


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
        y (N, O, 2H, 2W) and the new mask (N or 1, 1, 2H, 2W); dtypes and errors are those of `partial_conv2d`.

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
    geometry = GivenGeometry([2, 1], 1, k // 2, 1, 1, [False, False])
    epilogue = Epilogue(activation, slope, batch_norm)
    names = ["mask", "skip_mask"]
    return _convolve(Inputs(op, [x, skip], [mask, skip_mask], names, weight, bias, window, geometry, epilogue, fold))


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
        if c < 1:
            raise error(op, "channels", "1 or more", c)
        if m.dim() != 4 or m.size(1) not in (1, c):
            raise error(op, "mask", f"(N, 1, H, W) or (N, {c}, H, W)", tuple(m.shape))
        check_mask_type(op, m)
    check_one_device(op, masks)
    batch = masks[0].size(0)
    for m in masks:
        if m.size(0) != batch and m.size(0) != 1 and batch != 1:
            raise error(op, "mask", "of one batch or 1", [m.size(0) for m in masks])
        batch = m.size(0) if batch == 1 else batch
    for m, up in zip(masks, ups, strict=True):
        if (m.size(2) * up, m.size(3) * up) != (masks[0].size(2) * ups[0], masks[0].size(3) * ups[0]):
            raise error(op, "mask", "of one size after upsampling", tuple(m.shape))
    kernel = pair(op, "kernel_size", kernel_size, 1)
    geometry = GivenGeometry(ups, stride, padding, dilation, 1, [False] * len(masks)).checked(op)
    check_output_size(op, "mask", (masks[0].size(2) * ups[0], masks[0].size(3) * ups[0]), kernel, geometry[1:4])
    return count(op, [plane_of(op, m) for m in masks], counts, kernel, geometry)


def partial_window_chain(mask: Tensor | Sequence[Tensor], steps: Sequence[WindowStep]) -> list[Window]:
    """The windows of a whole network of partial convolutions in one call: `partial_window` for each step.

    Args:
        mask: (N or 1, 1 or C, H, W), 1 = valid, 0 = hole, or a sequence of them: the masks that are known at the start.
        steps: the partial convolutions in an order in which each one's masks are known; the new mask of step i is
            number i after the given ones.

    Returns:
        A `Window` for each step.

    Raises:
        ValueError: a mask or a step of wrong rank, size, dtype or device; a step whose masks are not known by then.

    >>> import torch
    >>> from fused_inpaint import ops
    >>> plain = dict(channels=[3], upsample=[1], kernel=[3, 3], stride=[2, 2], padding=[1, 1], dilation=[1, 1])
    >>> steps = [ops.WindowStep(inputs=[0], **plain), ops.WindowStep(inputs=[1], **plain)]
    >>> [tuple(w.mask.shape) for w in ops.partial_window_chain(torch.ones(1, 1, 8, 8), steps)]
    [(1, 1, 4, 4), (1, 1, 2, 2)]
    """
    op = "partial_window_chain"
    planes = []
    for m in [mask] if isinstance(mask, Tensor) else mask:
        if m.dim() != 4:
            raise error(op, "mask", "(N, C, H, W)", tuple(m.shape))
        check_mask_type(op, m)
        planes.append(m)
    if not planes:
        raise error(op, "mask", "a tensor or a sequence of at least one", "none")
    check_one_device(op, planes)
    check_steps(op, planes, steps)
    planes = [plane_of(op, m) for m in planes]
    return count_chain(op, planes, steps)


def _convolve(given: Inputs, packed: PackedWeight | None = None, multi_channel: bool = False) -> tuple[Tensor, Tensor]:
    y, mask = run(plan_of(given), given, packed)
    masks = given.masks
    if given.window is None:
        dtype = masks[0].dtype if masks else y.dtype
        mask = mask if mask.dtype == dtype else mask.to(dtype)
    elif masks is not None:
        # A copy of a window that others may share.
        mask = mask.to(masks[0].dtype, copy=True)
    return y, mask.expand(-1, given.weight.size(0), -1, -1) if multi_channel else mask
