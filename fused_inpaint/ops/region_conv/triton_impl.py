# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-untyped, import-not-found"
"""Region-wise convolution as one implicit GEMM in Triton, over tiles of neighbouring output pixels.

    output:  y = act(W_r . x + b_r)                                  for an output pixel in region r
    input:   y = act(W . concat(E where m = 1, X where m = 0) + b)

A tile looks at the mask first and leaves out the whole depth of a filter, or of a source, that no pixel of it needs:
so all but the tiles across the regions' edge do the work of one. With "input", whether the pixel under a tap is of a
source's region is one bit of a word per output pixel, gathered before the walk over the depth: a value of the other
region is never read. Products are accumulated in float32. Maps are read and written as (N, H, W, C), weights are read
as (O, kh, kw, C).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_common as common
from ..checks import output_size
from ..triton_common import first_tap, pixels, rounded, under, walk


@triton.jit
def _region_bits(  # type: ignore[no-untyped-def]
    mask, h0, w0, alive, dil_h, dil_w, height, width,
    KH: tl.constexpr, KW: tl.constexpr, UP: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """(valid, hole): bit t is set where tap t's pixel is in that region."""
    BITS: tl.constexpr = tl.int32 if KH * KW < 32 else tl.int64
    tap = tl.arange(0, triton.next_power_of_2(KH * KW))
    dh = (tap // KW * dil_h)[:, None]
    dw = (tap % KW * dil_w)[:, None]
    # (taps, BLOCK_M): neighbouring threads have neighbouring pixels.
    under_tap = alive[None, :] & (tap < KH * KW)[:, None]
    at, inside = under(h0[None, :] + dh, w0[None, :] + dw, under_tap, height, width, UP, MODE)
    valid = tl.load(mask + at, mask=inside, other=0) != 0
    one = (inside & valid).to(BITS) << tap.to(BITS)[:, None]
    other = (inside & (valid == 0)).to(BITS) << tap.to(BITS)[:, None]
    return tl.sum(one, 0), tl.sum(other, 0)


@triton.jit
def _tile(height, width, outputs, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """(phase, image, row, column, alive, output, whether there is one) of this program.

    Columns of the GEMM go first, then the phases: neighbours in time share the pixels that they read.
    """
    tiles = tl.cdiv(outputs, BLOCK_N)
    o = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    image, i, j, alive = pixels(tl.program_id(0) // tiles, height, width, BLOCK_H, BLOCK_W)
    return image, i, j, alive, o, o < outputs


@triton.jit
def _finish(y, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == "elu":
        # exp only of what is not above 0: it would overflow.
        y = tl.where(y > 0, y, tl.exp(tl.where(y > 0, 0.0, y)) - 1.0)
    return rounded(y, DTYPE)


_PLAIN = ["bias", "mask", "mask_stride", "height", "width", "to_height", "to_width"]
_PLAIN += ["stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w"]


@triton.jit(do_not_specialize=_PLAIN)
def output_kernel(  # type: ignore[no-untyped-def]
    x,  # (N, H, W, C)
    mask,  # (N or 1, H', W')
    weight,  # (2, O, kh, kw, C): hole, valid
    bias,  # (2, O) or None
    y,  # (N, H', W', O)
    mask_stride,  # from one image's mask to the next, 0 if shared
    channels, height, width, outputs, to_height, to_width,
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    KH: tl.constexpr, KW: tl.constexpr, MODE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, i, j, alive, o, o_alive = _tile(to_height, to_width, outputs, BLOCK_H, BLOCK_W, BLOCK_N)
    pixel = i * to_width + j
    valid = tl.load(mask + n * mask_stride + pixel, mask=alive, other=0) != 0
    x += n * height * width * channels
    h0 = i * stride_h - pad_h
    w0 = j * stride_w - pad_w
    in_hole = tl.max((alive & (valid == 0)).to(tl.int32), 0) > 0
    in_valid = tl.max(valid.to(tl.int32), 0) > 0
    zeros = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)
    hole = walk(
        zeros, in_hole, None, x, weight, h0, w0, alive, o, o_alive, channels, channels, height, width,
        dil_h, dil_w, KH, KW, 1, MODE, PRECISION, BLOCK_K,
    )  # fmt: skip
    weight += outputs * (KH * KW) * channels
    acc = walk(
        zeros, in_valid, None, x, weight, h0, w0, alive, o, o_alive, channels, channels, height, width,
        dil_h, dil_w, KH, KW, 1, MODE, PRECISION, BLOCK_K,
    )  # fmt: skip
    if bias is not None:
        hole += tl.load(bias + o, mask=o_alive, other=0.0).to(tl.float32)[None, :]
        acc += tl.load(bias + outputs + o, mask=o_alive, other=0.0).to(tl.float32)[None, :]
    result = _finish(tl.where(valid[:, None], acc, hole), ACTIVATION, y.dtype.element_ty)
    to = y + (((n * to_height * to_width + pixel) * outputs)[:, None] + o[None, :])
    tl.store(to, result, mask=alive[:, None] & o_alive[None, :])


@triton.jit(do_not_specialize=_PLAIN)
def input_kernel(  # type: ignore[no-untyped-def]
    existing,  # (N, H, W, Ce)
    missing,  # (N, H, W, Cx)
    mask,  # (N or 1, H, W)
    weight,  # (O, kh, kw, Ce + Cx), or (4, O, 2, 2, Ce + Cx) if FOLD
    bias,  # (O,) or None
    y,  # (N, H', W', O)
    mask_stride,  # from one image's mask to the next, 0 if shared
    channels, others, height, width, outputs, to_height, to_width,
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    KH: tl.constexpr, KW: tl.constexpr, UP: tl.constexpr,
    FOLD: tl.constexpr,  # the grid runs over 4 phases (row parity, column parity) of 2 x 2 kernels at low resolution
    MODE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    depth = channels + others
    if FOLD:
        image, i, j, alive, o, o_alive = _tile(height, width, outputs, BLOCK_H, BLOCK_W, BLOCK_N)
        n = image // 4
        odd_h = image % 4 // 2
        odd_w = image % 2
        h0 = i + first_tap(odd_h, 3)
        w0 = j + first_tap(odd_w, 3)
        pixel = (i * 2 + odd_h) * to_width + j * 2 + odd_w
        weight += image % 4 * outputs * (KH * KW) * depth
    else:
        n, i, j, alive, o, o_alive = _tile(to_height, to_width, outputs, BLOCK_H, BLOCK_W, BLOCK_N)
        h0 = i * stride_h - pad_h
        w0 = j * stride_w - pad_w
        pixel = i * to_width + j
    valid, hole = _region_bits(
        mask + n * mask_stride, h0, w0, alive, dil_h, dil_w, height, width, KH, KW, UP, MODE
    )  # fmt: skip
    plane = height * width
    acc = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)
    acc = walk(
        acc, tl.max((valid != 0).to(tl.int32), 0) > 0, valid, existing + n * plane * channels, weight, h0, w0, alive,
        o, o_alive, channels, depth, height, width, dil_h, dil_w, KH, KW, UP, MODE, PRECISION, BLOCK_K,
    )  # fmt: skip
    acc = walk(
        acc, tl.max((hole != 0).to(tl.int32), 0) > 0, hole, missing + n * plane * others, weight + channels, h0, w0,
        alive, o, o_alive, others, depth, height, width, dil_h, dil_w, KH, KW, UP, MODE, PRECISION, BLOCK_K,
    )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + o, mask=o_alive, other=0.0).to(tl.float32)[None, :]
    to = y + (((n * to_height * to_width + pixel) * outputs)[:, None] + o[None, :])
    result = _finish(acc, ACTIVATION, y.dtype.element_ty)
    tl.store(to, result, mask=alive[:, None] & o_alive[None, :])


def refusal(dtype: torch.dtype, select: str, kernel: Sequence[int]) -> str:
    """Why this backend can't run a call; empty if it can."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    taps = kernel[0] * kernel[1]
    return (
        f"it takes kernels of at most {common.BITS} taps, not {taps}"
        if select == "input" and taps > common.BITS
        else ""
    )


def _output(
    like: Tensor,
    weight: Tensor,
    upsample: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    height, width = (
        output_size(like.size(2 + d) * upsample, weight.size(d - 2), stride[d], padding[d], dilation[d]) for d in (0, 1)
    )
    size = (like.size(0), weight.size(-4), height, width)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def region_conv2d_output(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_mode: str,
    activation: str,
) -> Tensor:
    """x (N, C, H, W), mask (N or 1, 1, H', W') uint8, weight (2, O, C, kh, kw), bias (2, O) to (N, O, H', W')."""
    _require(x.dtype, "output", weight)
    y = _output(x, weight, 1, stride, padding, dilation)
    if y.numel() == 0:
        return y
    images, outputs, height, width = y.shape
    plan = common.plan(x, images, height, width, outputs, x.size(1))
    common.launch(
        output_kernel,
        plan.grid,
        common.nhwc(x),
        mask.contiguous(),
        weight.to(x.dtype).permute(0, 1, 3, 4, 2).contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        0 if mask.size(0) == 1 else mask[0].numel(),
        *x.shape[1:],
        outputs,
        height,
        width,
        *stride,
        *padding,
        *dilation,
        KH=weight.size(3),
        KW=weight.size(4),
        MODE=padding_mode,
        ACTIVATION=activation,
        **plan.options,
    )
    return y


def region_conv2d_input(
    existing: Tensor,
    missing: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    upsample: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_mode: str,
    activation: str,
) -> Tensor:
    """existing (N, Ce, H, W), missing (N, Cx, H, W), mask (N or 1, 1, H, W) uint8, weight (O, Ce + Cx, kh, kw) and bias
    (O,) to (N, O, H', W')."""
    _require(existing.dtype, "input", weight)
    y = _output(existing, weight, upsample, stride, padding, dilation)
    if y.numel() == 0:
        return y
    images, outputs = y.shape[:2]
    channels, height, width = existing.shape[1:]
    weight = common.nhwc(weight.to(existing.dtype))
    kernel = weight.shape[2:]
    # A 3 x 3 kernel reaches one pixel beyond the map, which reflects to the same low-resolution pixel as it replicates.
    fold = upsample == 2 and kernel[0] == 3 and common.folds(kernel, stride, padding, dilation, 1)
    if fold:
        padding_mode = "replicate" if padding_mode == "reflect" else padding_mode
    cells = (4 * images, height, width) if fold else (images, y.size(2), y.size(3))
    plan = common.plan(existing, *cells, outputs, max(channels, missing.size(1)))
    common.launch(
        input_kernel,
        plan.grid,
        common.nhwc(existing),
        common.nhwc(missing),
        mask.contiguous(),
        common.fold(weight, 0, weight.size(1)) if fold else weight,
        None if bias is None else bias.contiguous(),
        y,
        0 if mask.size(0) == 1 else height * width,
        channels,
        missing.size(1),
        height,
        width,
        outputs,
        y.size(2),
        y.size(3),
        *stride,
        *padding,
        *dilation,
        KH=2 if fold else kernel[0],
        KW=2 if fold else kernel[1],
        UP=1 if fold else upsample,
        FOLD=fold,
        MODE=padding_mode,
        ACTIVATION=activation,
        **plan.options,
    )
    return y


def _require(dtype: torch.dtype, select: str, weight: Tensor) -> None:
    if reason := refusal(dtype, select, weight.shape[-2:]):
        raise ValueError(f"region_conv2d: the call must be one that the triton backend can run: {reason}")
