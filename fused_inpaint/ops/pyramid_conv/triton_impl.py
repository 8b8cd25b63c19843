# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-untyped, import-not-found"
"""Parallel dilated convolutions as one implicit GEMM in Triton, all branches in one launch.

    y = concat over branches b of act(W_b * x + bias_b)

A program takes a tile of neighbouring pixels and some outputs of one branch; programs that follow each other share
the pixels. Padding is index arithmetic, and bias and activation come before the only store, to the branch's place in y.
Products are accumulated in float32. Maps are read and written as (N, H, W, C), the weight is read as (O, 3, 3, C).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_common as common
from ..triton_common import pixels, rounded, walk


@triton.jit(do_not_specialize=["bias", "height", "width"])
def pyramid_kernel(  # type: ignore[no-untyped-def]
    x,  # (N, H, W, C)
    weight,  # (D, outputs, 3, 3, C)
    bias,  # (D, outputs) or None
    y,  # (N, H, W, D, outputs)
    channels,
    height,
    width,
    outputs,  # of one branch
    DILATIONS: tl.constexpr,  # D
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BRANCHES: tl.constexpr = len(DILATIONS)
    tiles = tl.cdiv(outputs, BLOCK_N)
    column = tl.program_id(0) % (tiles * BRANCHES)
    branch = column // tiles
    dilation = 0
    for b in tl.static_range(BRANCHES):
        dilation = tl.where(branch == b, DILATIONS[b], dilation)
    o = column % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    o_alive = o < outputs
    n, i, j, alive = pixels(tl.program_id(0) // (tiles * BRANCHES), height, width, BLOCK_H, BLOCK_W)
    first = branch * outputs
    acc = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), tl.float32)
    acc = walk(
        acc, True, None, x + n * height * width * channels, weight + first * 9 * channels, i - dilation, j - dilation,
        alive, o, o_alive, channels, channels, height, width, dilation, dilation, 3, 3, 1, MODE, PRECISION, BLOCK_K,
    )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + first + o, mask=o_alive, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "relu":
        acc = tl.where(acc < 0, 0.0, acc)  # a NaN stays one
    result = rounded(acc, y.dtype.element_ty)
    pixel = (n * height + i) * width + j
    to = y + ((pixel * (BRANCHES * outputs))[:, None] + (first + o)[None, :])
    tl.store(to, result, mask=alive[:, None] & o_alive[None, :])


def pyramid_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilations: Sequence[int], padding_mode: str, activation: str
) -> Tensor:
    """x (N, C, H, W), weight (O, C, 3, 3), bias (O,) to (N, O, H, W)."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        found = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"pyramid_conv2d: x must be float16, bfloat16 or float32 for the triton backend, got {found}")
    images, channels, height, width = x.shape
    size = (images, weight.size(0), height, width)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    outputs = weight.size(0) // len(dilations)
    plan = common.plan(x, images * len(dilations), height, width, outputs, channels)
    common.launch(
        pyramid_kernel,
        plan.grid,
        common.nhwc(x),
        common.nhwc(weight.to(x.dtype)),
        None if bias is None else bias.contiguous(),
        y,
        channels,
        height,
        width,
        outputs,
        DILATIONS=tuple(dilations),
        MODE=padding_mode,
        ACTIVATION=activation,
        **plan.options,
    )
    return y
