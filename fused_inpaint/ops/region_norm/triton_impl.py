# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-untyped, import-not-found"
"""Region normalization in Triton: what csrc/region_norm/region_norm.h says in words.

A program takes a chunk of one group's pixels for a tile of channels. Maps are read and written as (N, H, W, C), masks
as (N or 1, H, W, 1 or C). A value is selected by its region, never multiplied by 0. Sums are float32, over few values
each, and merged in float64 in a fixed order; no atomics. The mean is the sum of two floats, so that x less the mean
keeps its digits where the mean is large and the deviations are small.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_common as common


@triton.jit
def _chunk(per_group, size, pixels):  # type: ignore[no-untyped-def]
    """(group, first pixel, end) of this program; `pixels` are those of a group."""
    group = tl.program_id(0) // per_group
    begin = group * pixels + tl.program_id(0) % per_group * size
    return group, begin, tl.minimum(begin + size, (group + 1) * pixels)


@triton.jit
def _region(mask, p, alive, c, c_alive, channels, plane, SHARED: tl.constexpr, EACH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether the mask is 1: (BLOCK_P, BLOCK_C) with a mask for each channel, else (BLOCK_P, 1)."""
    at = p % plane if SHARED else p
    if EACH:
        values = tl.load(
            mask + ((at * channels)[:, None] + c[None, :]), mask=alive[:, None] & c_alive[None, :], other=0
        )
    else:
        values = tl.load(mask + at[:, None], mask=alive[:, None], other=0)
    return values != 0


@triton.jit
def _statistics(mean, invstd, at, alive):  # type: ignore[no-untyped-def]
    """(mean rounded, what is left of it, 1 / deviation) in float32."""
    exact = tl.load(mean + at, mask=alive, other=0.0)
    rounded = exact.to(tl.float32)
    rest = (exact - rounded.to(tl.float64)).to(tl.float32)
    return rounded[None, :], rest[None, :], tl.load(invstd + at, mask=alive, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _parameters(weight, bias, c, alive, channels, SHARED_BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights and biases of both regions, (1, BLOCK_C) each."""
    w0 = tl.full(c.shape, 1.0, tl.float32)
    w1 = w0
    b0 = tl.full(c.shape, 0.0, tl.float32)
    b1 = b0
    if weight is not None:
        w0 = tl.load(weight + c, mask=alive, other=0.0)
        w1 = tl.load(weight + channels + c, mask=alive, other=0.0)
    if bias is not None:
        b0 = tl.load(bias + c, mask=alive, other=0.0)
        b1 = tl.load(bias + channels + c, mask=alive, other=0.0)
        if SHARED_BIAS:
            b0 += b1
            b1 = b0
    return w0[None, :], w1[None, :], b0[None, :], b1[None, :]


@triton.jit
def _x_hat(x, region, mean0, rest0, invstd0, mean1, rest1, invstd1):  # type: ignore[no-untyped-def]
    centred = (x - tl.where(region, mean1, mean0)) - tl.where(region, rest1, rest0)
    return centred * tl.where(region, invstd1, invstd0)


@triton.jit
def _pixel_maps(scale, shift, p, alive):  # type: ignore[no-untyped-def]
    """(BLOCK_P, 1); 1 and 0 without maps."""
    if scale is not None:
        factor = tl.load(scale + p, mask=alive, other=0.0)[:, None]
        summand = tl.load(shift + p, mask=alive, other=0.0)[:, None]
    else:
        factor = tl.full((p.shape[0], 1), 1.0, tl.float32)
        summand = tl.full((p.shape[0], 1), 0.0, tl.float32)
    return factor, summand


@triton.jit
def _activate(u, slope, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    # NaN is not below 0, and stays.
    if ACTIVATION == "relu":
        u = tl.where(u < 0, 0.0, u)
    if ACTIVATION == "leaky_relu":
        u = tl.where(u < 0, u * slope, u)
    return u


@triton.jit
def _through(g, u, slope, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient in front of the activation, whose input was u."""
    if ACTIVATION == "relu":
        g = tl.where(u <= 0, 0.0, g)
    if ACTIVATION == "leaky_relu":
        g = tl.where(u > 0, g, g * slope)
    return g


@triton.jit
def _collect(here, x, n, base, total, square):  # type: ignore[no-untyped-def]
    """Takes x in where `here`. Each place of the tile has sums of its own, around the first value that it took."""
    base = tl.where(here & (n == 0), x, base)
    apart = tl.where(here, x - base, 0.0)
    return n + here.to(tl.int32), base, total + apart, square + apart * apart


@triton.jit
def _store_moments(to, c, alive, channels, n, base, total, square):  # type: ignore[no-untyped-def]
    """Joins a tile's places: count, centre, mean - centre, m2."""
    n = n.to(tl.float32)
    values = tl.maximum(n, 1.0)
    mean = total / values
    square -= total * mean
    square = tl.where(square < 0, 0.0, square)
    count = tl.sum(n, 0)
    values = tl.maximum(count, 1.0)
    centre = tl.sum(n * (base + mean), 0) / values
    apart = tl.where(n > 0, (base - centre[None, :]) + mean, 0.0)
    rest = tl.sum(n * apart, 0) / values
    m2 = tl.sum(square + n * apart * apart, 0) - count * rest * rest
    to += c
    tl.store(to, count + tl.zeros(c.shape, tl.float32), mask=alive)
    tl.store(to + 2 * channels, centre, mask=alive)
    tl.store(to + 4 * channels, rest, mask=alive)
    tl.store(to + 6 * channels, tl.where(m2 < 0, 0.0, m2), mask=alive)


# What only takes part in index arithmetic.
_PLAIN = ["per_group", "size", "pixels", "plane"]


@triton.jit(do_not_specialize=_PLAIN)
def moments_kernel(  # type: ignore[no-untyped-def]
    x, mask, partial,  # (chunks, 4, 2, C): count, centre, mean - centre, m2
    per_group, size, pixels, plane, channels,
    SHARED: tl.constexpr, EACH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _, begin, end = _chunk(per_group, size, pixels)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_alive = c < channels
    zeros = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    none = tl.zeros((BLOCK_P, BLOCK_C if EACH else 1), tl.int32)
    n0, base0, total0, square0 = none, zeros, zeros, zeros
    n1, base1, total1, square1 = none, zeros, zeros, zeros
    for first in range(begin, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        alive = p < end
        region = _region(mask, p, alive, c, c_alive, channels, plane, SHARED, EACH)
        at = (p * channels)[:, None] + c[None, :]
        v = tl.load(x + at, mask=alive[:, None] & c_alive[None, :], other=0.0).to(tl.float32)
        n0, base0, total0, square0 = _collect(alive[:, None] & (region == 0), v, n0, base0, total0, square0)
        n1, base1, total1, square1 = _collect(alive[:, None] & region, v, n1, base1, total1, square1)
    to = partial + tl.program_id(0) * 8 * channels
    _store_moments(to, c, c_alive, channels, n0, base0, total0, square0)
    _store_moments(to + channels, c, c_alive, channels, n1, base1, total1, square1)


@triton.jit(do_not_specialize=["per_group", "columns", "planes"])
def merge_kernel(  # type: ignore[no-untyped-def]
    partial, count, mean, m2, per_group, columns, channels, planes,
    BLOCK_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chan's rule for all chunks of a group at once, in float64; `columns` are groups x regions x channels."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = i < columns
    group = i // (2 * channels)
    start = partial + group * per_group * 8 * channels + i % (2 * channels)
    n = tl.zeros((BLOCK_B, BLOCK), tl.float64)
    total = tl.zeros((BLOCK_B, BLOCK), tl.float64)
    for first in range(0, per_group, BLOCK_B):
        chunk = first + tl.arange(0, BLOCK_B)
        read = (chunk < per_group)[:, None] & alive[None, :]
        at = start[None, :] + (chunk * 8 * channels)[:, None]
        values = tl.load(at, mask=read, other=0.0).to(tl.float64)
        centre = tl.load(at + 2 * channels, mask=read, other=0.0).to(tl.float64)
        rest = tl.load(at + 4 * channels, mask=read, other=0.0).to(tl.float64)
        n += values
        total += values * (centre + rest)
    number = tl.sum(n, 0)
    middle = tl.sum(total, 0) / tl.where(number > 0, number, 1.0)
    squares = tl.zeros((BLOCK_B, BLOCK), tl.float64)
    for first in range(0, per_group, BLOCK_B):
        chunk = first + tl.arange(0, BLOCK_B)
        read = (chunk < per_group)[:, None] & alive[None, :]
        at = start[None, :] + (chunk * 8 * channels)[:, None]
        values = tl.load(at, mask=read, other=0.0).to(tl.float64)
        centre = tl.load(at + 2 * channels, mask=read, other=0.0).to(tl.float64)
        rest = tl.load(at + 4 * channels, mask=read, other=0.0).to(tl.float64)
        own = tl.load(at + 6 * channels, mask=read, other=0.0).to(tl.float64)
        apart = centre + rest - middle[None, :]
        # An infinite mean is apart from a chunk without values, too.
        squares += own + tl.where(values > 0, values * apart * apart, 0.0)
    tl.store(mean + i, middle, mask=alive)
    tl.store(m2 + i, tl.sum(squares, 0), mask=alive)
    c = i % channels
    tl.store(count + i // channels * planes + c, number, mask=alive & (c < planes))


@triton.jit(do_not_specialize=_PLAIN)
def normalize_kernel(  # type: ignore[no-untyped-def]
    x, mask, mean, invstd, weight, bias, scale, shift, y,
    per_group, size, pixels, plane, channels, slope,
    SHARED: tl.constexpr, EACH: tl.constexpr, SHARED_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    group, begin, end = _chunk(per_group, size, pixels)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_alive = c < channels
    column = group * 2 * channels + c
    mean0, rest0, invstd0 = _statistics(mean, invstd, column, c_alive)
    mean1, rest1, invstd1 = _statistics(mean, invstd, column + channels, c_alive)
    w0, w1, b0, b1 = _parameters(weight, bias, c, c_alive, channels, SHARED_BIAS)
    for first in range(begin, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        alive = p < end
        region = _region(mask, p, alive, c, c_alive, channels, plane, SHARED, EACH)
        at = (p * channels)[:, None] + c[None, :]
        live = alive[:, None] & c_alive[None, :]
        v = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        x_hat = _x_hat(v, region, mean0, rest0, invstd0, mean1, rest1, invstd1)
        factor, summand = _pixel_maps(scale, shift, p, alive)
        u = (x_hat * tl.where(region, w1, w0) + tl.where(region, b1, b0)) * factor + summand
        tl.store(y + at, _activate(u, slope, ACTIVATION).to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=[*_PLAIN, "all_pixels"])
def sums_kernel(  # type: ignore[no-untyped-def]
    grad, x, mask, mean, invstd, weight, bias, scale, shift,
    partial,  # (chunks, 2, 2, C): sums of g * s and of g * s * x_hat, each by region
    map_partial,  # (tiles, 2, N * H * W): a tile's sums over channels of g * x_hat and of g; None without maps
    per_group, size, pixels, plane, channels, slope, all_pixels,
    SHARED: tl.constexpr, EACH: tl.constexpr, SHARED_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    group, begin, end = _chunk(per_group, size, pixels)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_alive = c < channels
    column = group * 2 * channels + c
    mean0, rest0, invstd0 = _statistics(mean, invstd, column, c_alive)
    mean1, rest1, invstd1 = _statistics(mean, invstd, column + channels, c_alive)
    w0, w1, b0, b1 = _parameters(weight, bias, c, c_alive, channels, SHARED_BIAS)
    zeros = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum0, sum1, dot0, dot1 = zeros, zeros, zeros, zeros
    for first in range(begin, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        alive = p < end
        region = _region(mask, p, alive, c, c_alive, channels, plane, SHARED, EACH)
        at = (p * channels)[:, None] + c[None, :]
        live = alive[:, None] & c_alive[None, :]
        v = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=live, other=0.0).to(tl.float32)
        x_hat = _x_hat(v, region, mean0, rest0, invstd0, mean1, rest1, invstd1)
        factor, summand = _pixel_maps(scale, shift, p, alive)
        u = (x_hat * tl.where(region, w1, w0) + tl.where(region, b1, b0)) * factor + summand
        g = _through(g, u, slope, ACTIVATION)
        if scale is not None:
            to = map_partial + tl.program_id(1) * 2 * all_pixels + p
            tl.store(to, tl.sum(tl.where(live, g * x_hat, 0.0), 1), mask=alive)
            tl.store(to + all_pixels, tl.sum(tl.where(live, g, 0.0), 1), mask=alive)
        g *= factor
        dot = g * x_hat
        here0 = live & (region == 0)
        here1 = live & region
        sum0 += tl.where(here0, g, 0.0)
        sum1 += tl.where(here1, g, 0.0)
        dot0 += tl.where(here0, dot, 0.0)
        dot1 += tl.where(here1, dot, 0.0)
    to = partial + tl.program_id(0) * 4 * channels + c
    tl.store(to, tl.sum(sum0, 0), mask=c_alive)
    tl.store(to + channels, tl.sum(sum1, 0), mask=c_alive)
    tl.store(to + 2 * channels, tl.sum(dot0, 0), mask=c_alive)
    tl.store(to + 3 * channels, tl.sum(dot1, 0), mask=c_alive)


@triton.jit(do_not_specialize=_PLAIN)
def gradient_kernel(  # type: ignore[no-untyped-def]
    grad, x, mask, mean, invstd,
    means,  # (G, 2, 2, C): of g * s and of g * s * x_hat, each by region
    weight, bias, scale, shift, grad_x,
    per_group, size, pixels, plane, channels, slope,
    SHARED: tl.constexpr, EACH: tl.constexpr, SHARED_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = invstd * w * (g * s - means[0] - x_hat * means[1])"""
    group, begin, end = _chunk(per_group, size, pixels)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_alive = c < channels
    column = group * 2 * channels + c
    mean0, rest0, invstd0 = _statistics(mean, invstd, column, c_alive)
    mean1, rest1, invstd1 = _statistics(mean, invstd, column + channels, c_alive)
    w0, w1, b0, b1 = _parameters(weight, bias, c, c_alive, channels, SHARED_BIAS)
    of_group = means + group * 4 * channels + c
    pull0 = tl.load(of_group, mask=c_alive, other=0.0).to(tl.float32)[None, :]
    pull1 = tl.load(of_group + channels, mask=c_alive, other=0.0).to(tl.float32)[None, :]
    slant0 = tl.load(of_group + 2 * channels, mask=c_alive, other=0.0).to(tl.float32)[None, :]
    slant1 = tl.load(of_group + 3 * channels, mask=c_alive, other=0.0).to(tl.float32)[None, :]
    for first in range(begin, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        alive = p < end
        region = _region(mask, p, alive, c, c_alive, channels, plane, SHARED, EACH)
        at = (p * channels)[:, None] + c[None, :]
        live = alive[:, None] & c_alive[None, :]
        v = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=live, other=0.0).to(tl.float32)
        x_hat = _x_hat(v, region, mean0, rest0, invstd0, mean1, rest1, invstd1)
        factor, summand = _pixel_maps(scale, shift, p, alive)
        w = tl.where(region, w1, w0)
        u = (x_hat * w + tl.where(region, b1, b0)) * factor + summand
        g = _through(g, u, slope, ACTIVATION) * factor
        d = g - tl.where(region, pull1, pull0) - x_hat * tl.where(region, slant1, slant0)
        d *= tl.where(region, invstd1, invstd0) * w
        tl.store(grad_x + at, d.to(grad_x.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["pixels", "plane"])
def pool_kernel(  # type: ignore[no-untyped-def]
    x, pooled, pixels, plane, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """pooled: (N, 2, H, W), the mean first. NaN is more than any number, as in torch."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    alive = p < pixels
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    most = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
    nan = tl.zeros((BLOCK_P, BLOCK_C), tl.int32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        live = alive[:, None] & (c < channels)[None, :]
        v = tl.load(x + ((p * channels)[:, None] + c[None, :]), mask=live, other=0.0).to(tl.float32)
        total += v
        most = tl.where(live & (v > most), v, most)
        nan |= (v != v).to(tl.int32)
    largest = tl.where(tl.max(nan, 1) > 0, float("nan"), tl.max(most, 1))
    to = pooled + (p // plane * 2 * plane + p % plane)
    tl.store(to, (tl.sum(total, 1) / channels).to(pooled.dtype.element_ty), mask=alive)
    tl.store(to + plane, largest.to(pooled.dtype.element_ty), mask=alive)


@triton.jit(do_not_specialize=["pixels", "plane"])
def pool_backward_kernel(  # type: ignore[no-untyped-def]
    grad, x, pooled, grad_x, pixels, plane, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """The largest value's gradient goes to its first place."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    alive = p < pixels
    at = p // plane * 2 * plane + p % plane
    share = tl.load(grad + at, mask=alive, other=0.0).to(tl.float32) / channels
    whole = tl.load(grad + at + plane, mask=alive, other=0.0).to(tl.float32)
    most = tl.load(pooled + at + plane, mask=alive, other=0.0).to(tl.float32)[:, None]
    place = tl.full((BLOCK_P, BLOCK_C), 2**31 - 1, tl.int32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        live = alive[:, None] & (c < channels)[None, :]
        v = tl.load(x + ((p * channels)[:, None] + c[None, :]), mask=live, other=0.0).to(tl.float32)
        found = live & ((v == most) | ((v != v) & (most != most)))
        place = tl.minimum(place, tl.where(found, c[None, :], 2**31 - 1))
    where = tl.min(place, 1)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        live = alive[:, None] & (c < channels)[None, :]
        d = share[:, None] + tl.where(c[None, :] == where[:, None], whole[:, None], 0.0)
        tl.store(grad_x + ((p * channels)[:, None] + c[None, :]), d.to(grad_x.dtype.element_ty), mask=live)


_ELEMENTS = 1024  # of a tile: 8 for each thread, as many as fill 16 bytes of a half type
_PROGRAMS = 2048  # enough to fill any GPU; above, chunks grow


class _Cut(NamedTuple):
    """How a map is cut into chunks of pixels and tiles of channels."""

    groups: int
    per_group: int  # chunks
    tiles: int
    sizes: tuple[int, int, int, int, int]  # of moments_kernel and others: per_group .. channels
    flags: dict[str, Any]

    @property
    def grid(self) -> tuple[int, int]:
        return self.groups * self.per_group, self.tiles


def _tile(channels: int) -> tuple[int, int]:
    """(pixels, channels)"""
    block_c = min(64, triton.next_power_of_2(channels))
    return _ELEMENTS // block_c, block_c


def _cut(x: Tensor, mask: Tensor, groups: int) -> _Cut:
    images, channels, height, width = x.shape
    plane = height * width
    pixels = images * plane // groups
    block_p, block_c = _tile(channels)
    tiles = triton.cdiv(channels, block_c)
    # An empty batch has no programs, but its neighbours in a process group may have pixels.
    size = block_p * max(1, triton.cdiv(images * plane * tiles, block_p * _PROGRAMS))
    per_group = triton.cdiv(pixels, size)
    flags = {"SHARED": mask.size(0) < images, "EACH": mask.size(1) > 1, "BLOCK_P": block_p, "BLOCK_C": block_c}
    return _Cut(groups, per_group, tiles, (per_group, size, pixels, plane, channels), flags)


def region_moments(x: Tensor, mask: Tensor, instance: bool) -> tuple[Tensor, Tensor, Tensor]:
    """count (G, 2, 1 or C), mean and m2 (G, 2, C), float64."""
    x, mask = common.nhwc(x), common.nhwc(mask)
    groups, channels, planes = x.size(0) if instance else 1, x.size(1), mask.size(1)
    cut = _cut(x, mask, groups)
    partial = torch.empty(cut.grid[0], 4, 2, channels, dtype=torch.float32, device=x.device)
    common.launch(moments_kernel, cut.grid, x, mask, partial, *cut.sizes, **cut.flags)
    count = x.new_empty((groups, 2, planes), dtype=torch.float64)
    mean = x.new_empty((groups, 2, channels), dtype=torch.float64)
    m2 = torch.empty_like(mean)
    columns = mean.numel()
    sizes = (cut.per_group, columns, channels, planes)
    common.launch(merge_kernel, (triton.cdiv(columns, 32),), partial, count, mean, m2, *sizes, BLOCK_B=16, BLOCK=32)
    return count, mean, m2


def region_norm(
    x: Tensor,
    mask: Tensor,
    mean: Tensor,
    invstd: Tensor,
    count: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    shared_bias: bool,
    activation: str,
    slope: float,
    eps: float,
    instance: bool,
    group: str,
) -> Tensor:
    """count, eps, instance and group are for the derivative."""
    x, mask = common.nhwc(x), common.nhwc(mask)
    cut = _cut(x, mask, mean.size(0))
    y = torch.empty_like(x)
    tensors = (x, mask, *_contiguous(mean, invstd, weight, bias, scale, shift), y)
    flags = {**cut.flags, "SHARED_BIAS": shared_bias, "ACTIVATION": activation}
    common.launch(normalize_kernel, cut.grid, *tensors, *cut.sizes, slope, **flags)
    return y


def region_norm_sums(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    shared_bias: bool,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """sums (G, 2, 2, C) float64; gradients of scale and shift, (N, 1, H, W) float32, empty without maps."""
    grad, x, mask = common.nhwc(grad), common.nhwc(x), common.nhwc(mask)
    images, channels, height, width = x.shape
    cut = _cut(x, mask, mean.size(0))
    pixels = images * height * width
    partial = torch.empty(cut.groups, cut.per_group, 2, 2, channels, dtype=torch.float32, device=x.device)
    maps = None
    if scale is not None:
        maps = torch.empty(cut.tiles, 2, images, 1, height, width, dtype=torch.float32, device=x.device)
    tensors = (grad, x, mask, *_contiguous(mean, invstd, weight, bias, scale, shift), partial, maps)
    flags = {**cut.flags, "SHARED_BIAS": shared_bias, "ACTIVATION": activation}
    common.launch(sums_kernel, cut.grid, *tensors, *cut.sizes, slope, pixels, **flags)
    sums = partial.sum(1, dtype=torch.float64)
    if maps is None:
        return sums, partial.new_empty(0), partial.new_empty(0)
    # Operators' outputs share no memory.
    return sums, maps[:, 0].sum(0), maps[:, 1].sum(0)


def region_norm_gradient(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    mean: Tensor,
    invstd: Tensor,
    means: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    shared_bias: bool,
    activation: str,
    slope: float,
) -> Tensor:
    grad, x, mask = common.nhwc(grad), common.nhwc(x), common.nhwc(mask)
    cut = _cut(x, mask, mean.size(0))
    grad_x = torch.empty_like(x)
    tensors = (grad, x, mask, *_contiguous(mean, invstd, means, weight, bias, scale, shift), grad_x)
    flags = {**cut.flags, "SHARED_BIAS": shared_bias, "ACTIVATION": activation}
    common.launch(gradient_kernel, cut.grid, *tensors, *cut.sizes, slope, **flags)
    return grad_x


def channel_pool(x: Tensor) -> Tensor:
    x = common.nhwc(x)
    images, channels, height, width = x.shape
    pooled = x.new_empty((images, 2, height, width))
    _launch_pool(pool_kernel, (x, pooled), images, channels, height * width)
    return pooled


def channel_pool_backward(grad: Tensor, x: Tensor, pooled: Tensor) -> Tensor:
    x = common.nhwc(x)
    images, channels, height, width = x.shape
    grad_x = torch.empty_like(x)
    tensors = (grad.contiguous(), x, pooled.contiguous(), grad_x)
    _launch_pool(pool_backward_kernel, tensors, images, channels, height * width)
    return grad_x


def _launch_pool(kernel: Any, tensors: tuple[Tensor, ...], images: int, channels: int, plane: int) -> None:
    block_p, block_c = _tile(channels)
    pixels = images * plane
    grid = (triton.cdiv(pixels, block_p),)
    common.launch(kernel, grid, *tensors, pixels, plane, channels, BLOCK_P=block_p, BLOCK_C=block_c)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]
