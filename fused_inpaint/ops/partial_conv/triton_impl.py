# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-untyped, import-not-found"
"""Partial convolution as one implicit GEMM in Triton: selection, mask sum, renormalisation, epilogue and mask update.

    y = act(scale * (W . X~) * window / count + bias)   where count > 0, else 0;   new mask = count > 0

What is launched, and how: tiles, the walk over the depth, the split. The kernels are in triton_kernels.py.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import triton_common as common
from ..checks import output_size
from .triton_kernels import convolve_kernel, reduce_kernel

_RULES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("triton_configs.json").read_text())["rules"]
_BLOCK = 512  # of the elementwise kernels
_THIN = 16  # channels from which on one tap fills a step; tl.dot takes no less
_WIDEST = 128  # (tap, channel) pairs in a row of the kernel, up to which the walk is flat


@functools.lru_cache(maxsize=1024)
def configuration(precision: str, fold: bool, rows: int, depth: int, outputs: int) -> common.Config:
    """The first rule of triton_configs.json for a GEMM of `rows` (of one phase) x `depth` x `outputs` (of one group).

    `precision` is "half", "tf32" or "ieee". The table is made by benchmarks/tune_triton.py.
    """
    sizes = {"rows": rows, "depth": depth, "outputs": outputs}
    for rule in _RULES:
        within = (rule.get(name, (0, size))[0] <= size <= rule.get(name, (0, size))[1] for name, size in sizes.items())
        if precision in rule["precision"] and rule.get("fold", fold) == fold and all(within):
            return common.Config(*rule["config"])
    raise LookupError(f"triton_configs.json must have a rule for every size, got none for {precision} {sizes}")


class _Walk(NamedTuple):
    """How the kernel walks over one source's part of the depth."""

    kind: str
    planes: str
    block_k: int
    span: int
    steps: int


def _walk(channels: int, planes: int, taps_h: int, taps_w: int, block_k: int) -> _Walk:
    """`channels` and the product with the taps are those of one group."""
    kind = "many" if planes > 1 else "one" if taps_h * taps_w <= common.BITS else "large"
    row = taps_w * channels
    if channels >= _THIN or row > _WIDEST:
        block_k = min(block_k, common.power_of_2(channels))
        return _Walk("chunks", kind, block_k, 1, taps_h * taps_w * triton.cdiv(channels, block_k))
    block_k = min(max(block_k, common.power_of_2(row)), common.power_of_2(taps_h * row))
    span = min(block_k // row, taps_h)
    return _Walk("flat", kind, block_k, span, triton.cdiv(taps_h, span))


def _as_bytes(mask: Tensor) -> Tensor:
    mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def partial_conv2d(
    sources: Sequence[Tensor],  # (N, C_i, H_i, W_i)
    masks: Sequence[Tensor],  # (N or 1, 1 or C_i, H_i, W_i), contiguous
    count: Tensor | None,  # (N or 1, 1, H', W') int32
    weight: Tensor,  # (O, sum C_i / groups, kh, kw)
    bias: Tensor | None,  # (O,)
    scale: Tensor | None,  # (O,)
    upsample: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    slope: float,
    fold: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, count, new mask) of one or two sources, each upsampled by 1 or 2 (nearest), and concatenated.

    Args:
        masks: any dtype; valid where not 0.
        count: valid values under each window; None sums the masks in the kernel.
        fold: run an upsampled source at low resolution, where `folds` says that it can be.

    Returns:
        y: (N, O, H', W') channels_last, in the sources' dtype.
        count: (N or 1, 1, H', W') int32, given or summed; of one image if all masks are shared.
        new mask: count > 0 in the dtype of masks[0]; empty if the count was given, since who made it has the mask.
    """
    images, (outputs, _, kernel_h, kernel_w) = sources[0].size(0), weight.shape
    height, width = (
        output_size(sources[0].size(2 + d) * upsample[0], weight.size(2 + d), stride[d], padding[d], dilation[d])
        for d in (0, 1)
    )
    given = count is not None
    if count is None:
        batch = 1 if all(m.size(0) == 1 for m in masks) else images
        count = torch.empty((batch, 1, height, width), dtype=torch.int32, device=weight.device)
        new_mask = torch.empty_like(count, dtype=masks[0].dtype)
        if images == 0 and batch:
            # Shared masks have a count even where there is no image.
            one = [s.new_zeros(1, *s.shape[1:]) for s in sources]
            rest = (weight, bias, scale, upsample, stride, padding, dilation, groups, activation, slope, fold)
            y, count, new_mask = partial_conv2d(one, masks, None, *rest)
            return y[:0], count, new_mask
    else:
        new_mask = masks[0].new_empty(0)
    size, like = (images, outputs, height, width), torch.channels_last
    y = torch.empty(size, dtype=sources[0].dtype, device=weight.device, memory_format=like)
    if y.numel() == 0:
        return y, count, new_mask

    fold = fold and 2 in upsample and common.folds((kernel_h, kernel_w), stride, padding, dilation, groups)
    sources, weight = (
        [common.nhwc(s) for s in sources],
        common.nhwc(weight if weight.dtype == y.dtype else weight.to(y.dtype)),
    )
    bias, scale = None if bias is None else bias.contiguous(), None if scale is None else scale.contiguous()
    weights, depth, first = [], 0, 0
    for source, up in zip(sources, upsample, strict=True):
        channels, low = source.size(1), fold and up == 2
        weights.append(common.fold(weight, first, channels) if low else weight)
        taps = (kernel_h + 1) // 2 * ((kernel_w + 1) // 2) if low else kernel_h * kernel_w
        depth += channels // groups * taps
        first += channels

    precision = common.precision(y.dtype)
    plan = _plan(
        configuration(precision, fold, images * height * width // (4 if fold else 1), depth, outputs // groups),
        precision,
        y.element_size(),
        y.device,
        tuple(s.shape for s in sources),
        tuple(m.shape[:2] for m in masks),
        weight.shape,
        (count.size(0), height, width),
        tuple(upsample),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        activation,
        slope,
        fold,
        given,
    )
    split = plan.split
    out = y if split == 1 else torch.empty((split, *size), dtype=torch.float32, device=y.device)
    counts = count.contiguous()
    # The kernel has arguments for two sources; of one, the second's are not read.
    common.launch(
        convolve_kernel,
        plan.grid,
        sources[0],
        sources[-1],
        _as_bytes(masks[0]),
        _as_bytes(masks[-1]),
        weights[0],
        weights[-1],
        # A part of the depth is summed and no more.
        bias if split == 1 else None,
        scale if split == 1 else None,
        counts,
        None if given else _as_bytes(new_mask),
        out,
        *plan.numbers,
        **plan.options,
    )
    if split > 1:
        total = y.numel()
        arguments = (total, height * width * count.size(0), outputs, split, plan.window, slope)
        options = {"ACTIVATION": activation, "BLOCK": _BLOCK}
        common.launch(reduce_kernel, (-(-total // _BLOCK),), out, bias, scale, counts, y, *arguments, **options)
    return y, count, new_mask


class _Plan(NamedTuple):
    """One launch of `convolve_kernel`, without its tensors."""

    grid: tuple[int, int]
    split: int
    window: float
    numbers: tuple[float, ...]  # the arguments after the tensors
    options: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def _plan(
    tile: common.Config,
    precision: str,
    element_size: int,
    device: torch.device,
    sources: Sequence[Sequence[int]],  # (N, C_i, H_i, W_i)
    masks: Sequence[Sequence[int]],  # (N or 1, 1 or C_i)
    weight: Sequence[int],  # (O, sum C_i / groups, kh, kw)
    output: Sequence[int],  # (N or 1 for the count, H', W')
    upsample: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    slope: float,
    fold: bool,
    given: bool,
) -> _Plan:
    """Kept, because working it out takes longer than the launch."""
    outputs, _, kernel_h, kernel_w = weight
    count_images, height, width = output
    columns = outputs // groups
    phases, step = (4, 2) if fold else (1, 1)
    images = sources[0][0]
    rows = images * height * width // phases
    tile = tile._replace(block_n=min(tile.block_n, common.power_of_2(columns)))
    walks = []
    for (_, channels, _, _), (_, planes), up in zip(sources, masks, upsample, strict=True):
        low = fold and up == 2
        taps = ((kernel_h + 1) // 2, (kernel_w + 1) // 2) if low else (kernel_h, kernel_w)
        walks.append(_walk(channels // groups, planes, *taps, tile.block_k))
    tile = common.fit(tile, max(w.block_k for w in walks), element_size, device)
    # Partial sums, too, are indexed in 32 bits.
    split = max(1, min(tile.split, sum(w.steps for w in walks), (2**31 - 1) // (images * outputs * height * width)))
    window = float(sum(s[1] for s in sources) * kernel_h * kernel_w)
    numbers = (
        rows,
        height // step,
        width // step,
        outputs,
        groups,
        split,
        *(value for i in (0, -1) for value in _sizes(sources[i], masks[i], walks[i])),
        count_images,
        0 if count_images == 1 else height * width,
        window,
        slope,
        *stride,
        *padding,
        *dilation,
    )
    options = {
        "KH": kernel_h,
        "KW": kernel_w,
        "SOURCES": len(sources),
        "UP0": upsample[0],
        "UP1": upsample[-1],
        "FOLD": fold,
        "WALK0": walks[0].kind,
        "WALK1": walks[-1].kind,
        "PLANES0": walks[0].planes,
        "PLANES1": walks[-1].planes,
        "COUNT": not given,
        "ACTIVATION": activation if split == 1 else "none",
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "PARTIAL": split > 1,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K0": walks[0].block_k,
        "BLOCK_K1": walks[-1].block_k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    blocks = triton.cdiv(rows, tile.block_m) * phases * groups * triton.cdiv(columns, tile.block_n)
    return _Plan((blocks, split), split, window, numbers, options)


def _sizes(source: Sequence[int], mask: Sequence[int], walk: _Walk) -> tuple[int, ...]:
    """(channels, height, width, mask_stride, steps, span) of one source."""
    _, channels, height, width = source
    images, planes = mask
    return channels, height, width, 0 if images == 1 else planes * height * width, walk.steps, walk.span
