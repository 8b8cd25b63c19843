# SPDX-License-Identifier: Apache-2.0
"""Differences of Gram matrices by tiles, with the vendor's matrix products, on any device.

    X X^T - Y Y^T = (P + P^T) / 2          P = (X - Y) (X + Y)^T

costs one product where the equation has two, is exactly 0 between rows in which X and Y agree, and does not cancel
where they nearly do. Over positions, a tile is summed, replaced by its sign and multiplied with the features while it
is in the cache, and the tiles below the diagonal are those above it.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class _Cut(NamedTuple):
    samples: int  # side by side
    tile: int  # elements
    factor: int  # elements of a product's factor


def _cut(x: Tensor) -> _Cut:
    """Of x (N, m, k). A CPU's cores share a tile, which lies in their cache; a GPU wants few launches."""
    return _Cut(1, 2**18, 2**17) if x.device.type == "cpu" else _Cut(x.size(0), 2**22, 2**24)


def wide_type(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def features(t: Tensor) -> Tensor:
    """(N, H W, C) of a map, which is not copied if it lies in either memory format."""
    if not t.is_contiguous():
        t = t.contiguous(memory_format=torch.channels_last)
    return t.flatten(2).mT


def _parts(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    count = _cut(x).samples
    for first in range(0, x.size(0), count):
        samples = slice(first, min(first + count, x.size(0)))
        yield samples, x[samples], y[samples]


def _twice_difference(x: Tensor, y: Tensor, rows: slice, columns: slice) -> Tensor:
    """2 (x x^T - y y^T), of which `rows` and `columns`: (B, rows, columns); x and y are (B, m, k)."""
    wide = wide_type(x)

    def factors(of: slice, depth: slice) -> tuple[Tensor, Tensor]:
        u, v = (t[:, of, depth].to(wide) for t in (x, y))
        return u - v, u + v

    height, width = rows.stop - rows.start, columns.stop - columns.start
    total = x.new_zeros((x.size(0), height, width), dtype=wide)
    step = max(1, _cut(x).factor // (x.size(0) * max(height, width)))
    for first in range(0, x.size(2), step):
        depth = slice(first, first + step)
        less, more = factors(rows, depth)
        if rows == columns:
            total.baddbmm_(less, more.mT)
        else:
            other_less, other_more = factors(columns, depth)
            total.baddbmm_(less, other_more.mT).baddbmm_(more, other_less.mT)
    return total + total.mT if rows == columns else total


def _half_sum(difference: Tensor) -> Tensor:
    """(B,) float64 of (B, rows, columns). Rows first: torch cuts the sum of a whole tile by the number of threads."""
    return difference.abs().sum(2).sum(1, dtype=torch.float64) / 2


def gram_l1_channels(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (N,), and the signs of the differences (N, C, C) int8."""
    n, c = a.shape[:2]
    sums, signs = a.new_empty(n, dtype=wide_type(a)), a.new_empty((n, c, c), dtype=torch.int8)
    with torch.autocast(a.device.type, enabled=False):
        for samples, x, y in _parts(features(a).mT, features(b).mT):
            difference = _twice_difference(x, y, slice(0, c), slice(0, c))
            sums[samples] = _half_sum(difference)
            signs[samples] = difference.sign_()
    return sums, signs


def gram_l1_positions(a: Tensor, b: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (N,), and the products of the differences' signs with a and with b: (N, C, H, W) channels_last, or (0,)."""
    n, pixels = a.size(0), a.size(2) * a.size(3)
    sums = a.new_zeros(n, dtype=torch.float64)
    products = [product_like(t, need).zero_() for t, need in ((a, need_a), (b, need_b))]
    with torch.autocast(a.device.type, enabled=False):
        for samples, x, y in _parts(features(a), features(b)):
            # (B, H W, C) each
            wanted = [(features(p)[samples], z) for p, z in zip(products, (x, y), strict=True) if p.dim() > 1]
            side = max(16, math.isqrt(_cut(a).tile // x.size(0)) // 16 * 16)
            blocks = [slice(first, min(first + side, pixels)) for first in range(0, pixels, side)]
            for i, rows in enumerate(blocks):
                for columns in blocks[i:]:
                    tile = _twice_difference(x, y, rows, columns)
                    sums[samples] += _half_sum(tile) * (1 if rows == columns else 2)
                    tile.sign_()
                    for product, z in wanted:
                        product[:, rows].baddbmm_(tile, z[:, columns].to(tile.dtype))
                        if rows != columns:
                            product[:, columns].baddbmm_(tile.mT, z[:, rows].to(tile.dtype))
    return sums.to(wide_type(a)), products[0], products[1]


def product_like(t: Tensor, need: bool) -> Tensor:
    """Memory for the product of signs with the map t, if it is needed."""
    if not need:
        return t.new_empty(0, dtype=wide_type(t))
    return torch.empty_like(t, dtype=wide_type(t), memory_format=torch.channels_last)
