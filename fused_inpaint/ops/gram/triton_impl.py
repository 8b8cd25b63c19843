# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-untyped, import-not-found"
"""L1 distance of Gram matrices over positions in Triton: a program goes along a strip of rows of

    D = A A^T - B B^T          A, B (H W, C)

tile by tile. A tile never leaves the registers: its magnitudes are summed, its signs multiplied with the features of
its columns. Without a gradient to form, a strip begins at the diagonal.

Products of half types are exact and summed in float32, in the same order for A and B, so that D is 0 where they agree.
In float32 D is (P + P^T) / 2 with P = (A - B) (A + B)^T, which does not cancel. Maps are read as (N, H W, C).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_common as common
from ..triton_common import dot
from .tiles import product_like


@triton.jit
def _rows(x, at, c, pixels, channels):  # type: ignore[no-untyped-def]
    """(rows, columns) of one sample (H W, C); 0 outside."""
    inside = (at < pixels)[:, None] & (c < channels)[None, :]
    return tl.load(x + ((at * channels)[:, None] + c[None, :]), mask=inside, other=0.0)


@triton.jit(do_not_specialize=["pixels"])
def positions_kernel(  # type: ignore[no-untyped-def]
    a,  # (N, H W, C)
    b,  # (N, H W, C)
    sums,  # (N, H W) float32: of a row, from the diagonal on twice if there is no product
    product_a,  # (N, H W, C) float32: signs times a, or None
    product_b,
    pixels,  # H W
    channels,
    BLOCK: tl.constexpr,  # rows and columns of a tile
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,  # channels of the products in one program
):
    FULL: tl.constexpr = product_a is not None or product_b is not None
    WIDE: tl.constexpr = a.dtype.element_ty == tl.float32
    sample = tl.program_id(1)
    a += sample * pixels * channels
    b += sample * pixels * channels
    own = tl.program_id(0) * BLOCK
    i = own + tl.arange(0, BLOCK)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_i = tl.zeros((BLOCK,), tl.float32)
    if product_a is not None:
        with_a = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    if product_b is not None:
        with_b = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for first in range(0 if FULL else own, pixels, BLOCK):
        j = first + tl.arange(0, BLOCK)
        tile = tl.zeros((BLOCK, BLOCK), tl.float32)
        other = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in range(0, channels, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a_i = _rows(a, i, k, pixels, channels)
            b_i = _rows(b, i, k, pixels, channels)
            a_j = _rows(a, j, k, pixels, channels)
            b_j = _rows(b, j, k, pixels, channels)
            if WIDE:
                tile = dot(a_i - b_i, tl.trans(a_j + b_j), tile, "ieee")
                tile = dot(a_i + b_i, tl.trans(a_j - b_j), tile, "ieee")
            else:
                tile = dot(a_i, tl.trans(a_j), tile, "ieee")
                other = dot(b_i, tl.trans(b_j), other, "ieee")
        tile = tile * 0.5 if WIDE else tile - other
        weight = 1.0 if FULL else tl.where(first == own, 1.0, 2.0)
        sum_i += tl.sum(tl.abs(tile), 1) * weight
        if FULL:
            sign = ((tile > 0).to(tl.float32) - (tile < 0).to(tl.float32)).to(a.dtype.element_ty)
        if product_a is not None:
            with_a = dot(sign, _rows(a, j, c, pixels, channels), with_a, "ieee")
        if product_b is not None:
            with_b = dot(sign, _rows(b, j, c, pixels, channels), with_b, "ieee")
    if tl.program_id(2) == 0:
        tl.store(sums + sample * pixels + i, sum_i, mask=i < pixels)
    to = sample * pixels * channels + (i * channels)[:, None] + c[None, :]
    inside = (i < pixels)[:, None] & (c < channels)[None, :]
    if product_a is not None:
        tl.store(product_a + to, with_a, mask=inside)
    if product_b is not None:
        tl.store(product_b + to, with_b, mask=inside)


class _Tile(NamedTuple):
    block: int
    block_k: int
    block_c: int
    warps: int
    stages: int


def _tile(x: Tensor) -> _Tile:
    """float32 has no tensor cores to keep its operands for."""
    side = common.power_of_2(x.size(1))
    wide = x.dtype == torch.float32
    return _Tile(32, 16, min(64, side), 8, 2) if wide else _Tile(64, min(64, side), min(128, side), 8, 2)


def gram_l1_positions(a: Tensor, b: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (N,), and the products of the differences' signs with a and with b: (N, C, H, W) channels_last, or (0,)."""
    if a.dim() != 4 or a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"gram_l1: b must be {tuple(a.shape)} {a.dtype}, got {tuple(b.shape)} {b.dtype}")
    a, b = common.nhwc(a), common.nhwc(b)
    n, channels, pixels = a.size(0), a.size(1), a.size(2) * a.size(3)
    products = [product_like(t, need) for t, need in ((a, need_a), (b, need_b))]
    sums = a.new_empty((n, pixels), dtype=torch.float32)
    tile = _tile(a)
    chunks = triton.cdiv(channels, tile.block_c) if need_a or need_b else 1
    options: dict[str, Any] = {"BLOCK": tile.block, "BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c}
    options |= {"num_warps": tile.warps, "num_stages": tile.stages}
    given = [p if need else None for p, need in zip(products, (need_a, need_b), strict=True)]
    grid = (triton.cdiv(pixels, tile.block), n, chunks)
    common.launch(positions_kernel, grid, a, b, sums, *given, pixels, channels, **options)
    return sums.sum(1, dtype=torch.float64).to(torch.float32), products[0], products[1]
