# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-untyped, import-not-found"
"""The gated blend in Triton: what csrc/gated_blend/gated_blend.h says in words.

A program takes a chunk of one sample's pixels for a tile of channels. Maps are read and written as (N, H, W, C). Sums
are float32, over few values each, and merged in float64 in a fixed order; no atomics.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_common as common


@triton.jit
def _chunk(per_sample, size, pixels):  # type: ignore[no-untyped-def]
    """(sample, first pixel, end) of this program; `pixels` are those of a sample."""
    sample = tl.program_id(0) // per_sample
    begin = sample * pixels + tl.program_id(0) % per_sample * size
    return sample, begin, tl.minimum(begin + size, (sample + 1) * pixels)


@triton.jit
def _columns(statistics, sample, c, alive, channels):  # type: ignore[no-untyped-def]
    """centre, gain and offset: z = (gate - centre) * gain + offset."""
    at = statistics + sample * 3 * channels + c
    centre = tl.load(at, mask=alive, other=0.0)
    rest = tl.load(at + channels, mask=alive, other=0.0)
    gain = 10.0 / (tl.load(at + 2 * channels, mask=alive, other=0.0) + 1e-9)
    return centre[None, :], gain[None, :], (-5.0 - rest * gain)[None, :]


@triton.jit
def _open(z):  # type: ignore[no-untyped-def]
    """(g, 1 - g)"""
    # Beyond, what is added is below anything that rounding leaves; a NaN stays.
    z = tl.where(z < -80.0, -80.0, z)
    z = tl.where(z > 80.0, 80.0, z)
    e = tl.exp(-z)
    g = 1.0 / (1.0 + e)
    return g, e * g


@triton.jit
def _load(pointer, at, alive):  # type: ignore[no-untyped-def]
    return tl.load(pointer + at, mask=alive, other=0.0).to(tl.float32)


# What only takes part in index arithmetic.
_PLAIN = ["per_sample", "size", "pixels"]


@triton.jit(do_not_specialize=_PLAIN)
def moments_kernel(  # type: ignore[no-untyped-def]
    gate, partial,  # (chunks, 4, C): count, centre, mean - centre, m2
    per_sample, size, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each place of the tile has sums of its own around the first value that it took; they are joined last."""
    _, begin, end = _chunk(per_sample, size, pixels)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_alive = c < channels
    p = begin + tl.arange(0, BLOCK_P)
    base = _load(gate, (p * channels)[:, None] + c[None, :], (p < end)[:, None] & c_alive[None, :])
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(begin + BLOCK_P, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        live = (p < end)[:, None] & c_alive[None, :]
        v = _load(gate, (p * channels)[:, None] + c[None, :], live)
        apart = tl.where(live, v - base, 0.0)
        total += apart
        square += apart * apart
    place = tl.arange(0, BLOCK_P)
    n = tl.where(begin + place < end, (end - begin - place + BLOCK_P - 1) // BLOCK_P, 0).to(tl.float32)[:, None]
    mean = total / tl.maximum(n, 1.0)
    square -= total * mean
    square = tl.where(square < 0, 0.0, square)
    count = (end - begin).to(tl.float32)
    # From a value that the chunk has, so that equal values have themselves as their mean, to the last bit.
    value = tl.sum(tl.where(place[:, None] == 0, base, 0.0), 0)
    centre = value + tl.sum(n * tl.where(n > 0, (base - value[None, :]) + mean, 0.0), 0) / count
    apart = tl.where(n > 0, (base - centre[None, :]) + mean, 0.0)
    rest = tl.sum(n * apart, 0) / count
    apart = tl.where(n > 0, apart - rest[None, :], 0.0)
    to = partial + tl.program_id(0) * 4 * channels + c
    tl.store(to, count + tl.zeros((BLOCK_C,), tl.float32), mask=c_alive)
    tl.store(to + channels, centre, mask=c_alive)
    tl.store(to + 2 * channels, rest, mask=c_alive)
    tl.store(to + 3 * channels, tl.sum(square + n * apart * apart, 0), mask=c_alive)


@triton.jit(do_not_specialize=["per_sample", "columns"])
def merge_kernel(  # type: ignore[no-untyped-def]
    partial, statistics,  # (chunks, 4, C), (N, 3, C)
    per_sample, columns, channels, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chan's rule in float64, chunk after chunk, for BLOCK of all (sample, channel)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = i < columns
    sample = i // channels
    c = i % channels
    at = partial + sample * per_sample * 4 * channels + c
    n = tl.zeros((BLOCK,), tl.float64)
    mean = tl.zeros((BLOCK,), tl.float64)
    m2 = tl.zeros((BLOCK,), tl.float64)
    for _ in range(per_sample):
        count = tl.load(at, mask=alive, other=1.0).to(tl.float64)
        there = tl.load(at + channels, mask=alive, other=0.0).to(tl.float64)
        there += tl.load(at + 2 * channels, mask=alive, other=0.0).to(tl.float64)
        apart = there - mean
        mean = tl.where(n > 0, mean + apart * (count / (n + count)), there)
        m2 += tl.load(at + 3 * channels, mask=alive, other=0.0).to(tl.float64) + apart * apart * (
            n * count / (n + count)
        )
        n += count
        at += 4 * channels
    rounded = mean.to(tl.float32)
    to = statistics + sample * 3 * channels + c
    tl.store(to, rounded, mask=alive)
    tl.store(to + channels, (mean - rounded.to(tl.float64)).to(tl.float32), mask=alive)
    tl.store(to + 2 * channels, tl.sqrt(m2 / tl.maximum(n - 1, 1.0)).to(tl.float32), mask=alive)


@triton.jit(do_not_specialize=_PLAIN)
def blend_kernel(  # type: ignore[no-untyped-def]
    x, f, gate, statistics, y,
    per_sample, size, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sample, begin, end = _chunk(per_sample, size, pixels)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_alive = c < channels
    centre, gain, offset = _columns(statistics, sample, c, c_alive, channels)
    for first in range(begin, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        at = (p * channels)[:, None] + c[None, :]
        live = (p < end)[:, None] & c_alive[None, :]
        g, shut = _open((_load(gate, at, live) - centre) * gain + offset)
        out = _load(x, at, live) * shut + _load(f, at, live) * g
        tl.store(y + at, out.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=_PLAIN)
def sums_kernel(  # type: ignore[no-untyped-def]
    grad, x, f, gate, statistics, partial,  # (chunks, 2, C): of p and of p * (gate - centre)
    per_sample, size, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sample, begin, end = _chunk(per_sample, size, pixels)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_alive = c < channels
    centre, gain, offset = _columns(statistics, sample, c, c_alive, channels)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    dot = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(begin, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        at = (p * channels)[:, None] + c[None, :]
        live = (p < end)[:, None] & c_alive[None, :]
        apart = _load(gate, at, live) - centre
        g, shut = _open(apart * gain + offset)
        part = tl.where(live, _load(grad, at, live) * (_load(f, at, live) - _load(x, at, live)) * (g * shut), 0.0)
        total += part
        dot += part * apart
    to = partial + tl.program_id(0) * 2 * channels + c
    tl.store(to, tl.sum(total, 0), mask=c_alive)
    tl.store(to + channels, tl.sum(dot, 0), mask=c_alive)


@triton.jit(do_not_specialize=["per_sample", "columns", "pixels"])
def merge_sums_kernel(  # type: ignore[no-untyped-def]
    partial, statistics, gradient_columns,  # (chunks, 2, C), (N, 3, C), (N, 2, C): pull and slant
    per_sample, columns, pixels, channels, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = i < columns
    sample = i // channels
    c = i % channels
    at = partial + sample * per_sample * 2 * channels + c
    total = tl.zeros((BLOCK,), tl.float64)
    dot = tl.zeros((BLOCK,), tl.float64)
    for _ in range(per_sample):
        total += tl.load(at, mask=alive, other=0.0).to(tl.float64)
        dot += tl.load(at + channels, mask=alive, other=0.0).to(tl.float64)
        at += 2 * channels
    at = statistics + sample * 3 * channels + c
    rest = tl.load(at + channels, mask=alive, other=0.0).to(tl.float64)
    std = tl.load(at + 2 * channels, mask=alive, other=0.0).to(tl.float64)
    n = pixels.to(tl.float64)
    below = (n - 1) * std * (std + 1e-9)
    slant = tl.where(std > 0, (dot - rest * total) / tl.where(std > 0, below, 1.0), 0.0)
    to = gradient_columns + sample * 2 * channels + c
    tl.store(to, (total / n - rest * slant).to(tl.float32), mask=alive)
    tl.store(to + channels, slant.to(tl.float32), mask=alive)


@triton.jit(do_not_specialize=_PLAIN)
def gradient_kernel(  # type: ignore[no-untyped-def]
    grad, x, f, gate, statistics,
    gradient_columns, grad_x, grad_f, grad_gate,  # None where not needed
    per_sample, size, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sample, begin, end = _chunk(per_sample, size, pixels)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_alive = c < channels
    centre, gain, offset = _columns(statistics, sample, c, c_alive, channels)
    if grad_gate is not None:
        known = gradient_columns + sample * 2 * channels + c
        pull = tl.load(known, mask=c_alive, other=0.0)[None, :]
        slant = tl.load(known + channels, mask=c_alive, other=0.0)[None, :]
    for first in range(begin, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        at = (p * channels)[:, None] + c[None, :]
        live = (p < end)[:, None] & c_alive[None, :]
        d = _load(grad, at, live)
        apart = _load(gate, at, live) - centre
        g, shut = _open(apart * gain + offset)
        if grad_x is not None:
            tl.store(grad_x + at, (d * shut).to(grad_x.dtype.element_ty), mask=live)
        if grad_f is not None:
            tl.store(grad_f + at, (d * g).to(grad_f.dtype.element_ty), mask=live)
        if grad_gate is not None:
            part = d * (_load(f, at, live) - _load(x, at, live)) * (g * shut)
            out = (part - pull - apart * slant) * gain
            tl.store(grad_gate + at, out.to(grad_gate.dtype.element_ty), mask=live)


_ELEMENTS = 1024  # of a tile: 8 for each thread, as many as fill 16 bytes of a half type
_PROGRAMS = 2048  # enough to fill any GPU; above, chunks grow
_MERGED = 32  # channels that one program merges


class _Cut(NamedTuple):
    """How maps are cut into chunks of pixels and tiles of channels."""

    grid: tuple[int, int]
    sizes: tuple[int, int, int, int]  # per_sample .. channels of the kernels
    blocks: dict[str, Any]


def _cut(x: Tensor) -> _Cut:
    images, channels, height, width = x.shape
    pixels = height * width
    block_c = min(64, triton.next_power_of_2(channels))
    block_p = _ELEMENTS // block_c
    tiles = triton.cdiv(channels, block_c)
    size = block_p * triton.cdiv(images * pixels * tiles, block_p * _PROGRAMS)
    per_sample = triton.cdiv(pixels, size)
    blocks = {"BLOCK_P": block_p, "BLOCK_C": block_c}
    return _Cut((images * per_sample, tiles), (per_sample, size, pixels, channels), blocks)


def gated_blend(x: Tensor, f: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """y, and the statistics (N, 3, C) float32."""
    _require_alike(x, f, gate)
    x, f, gate = (common.nhwc(t) for t in (x, f, gate))
    images, channels = x.shape[:2]
    cut = _cut(x)
    partial = torch.empty(cut.grid[0], 4, channels, dtype=torch.float32, device=x.device)
    statistics = partial.new_empty((images, 3, channels))
    common.launch(moments_kernel, cut.grid, gate, partial, *cut.sizes, **cut.blocks)
    columns = images * channels
    merge = (triton.cdiv(columns, _MERGED),)
    common.launch(merge_kernel, merge, partial, statistics, cut.sizes[0], columns, channels, BLOCK=_MERGED)
    y = torch.empty_like(x)
    common.launch(blend_kernel, cut.grid, x, f, gate, statistics, y, *cut.sizes, **cut.blocks)
    return y, statistics


def gated_blend_backward(
    grad: Tensor, x: Tensor, f: Tensor, gate: Tensor, statistics: Tensor, need_x: bool, need_f: bool, need_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, f and gate; (0,) for one that is not needed."""
    _require_alike(x, f, gate, grad)
    if statistics.shape != (x.size(0), 3, x.size(1)) or statistics.dtype != torch.float32:
        raise ValueError(f"gated_blend: statistics must be (N, 3, C) float32, got {tuple(statistics.shape)}")
    grad, x, f, gate = (common.nhwc(t) for t in (grad, x, f, gate))
    statistics = statistics.contiguous()
    images, channels = x.shape[:2]
    cut = _cut(x)
    columns = None
    if need_gate:
        partial = torch.empty(cut.grid[0], 2, channels, dtype=torch.float32, device=x.device)
        columns = partial.new_empty((images, 2, channels))
        common.launch(sums_kernel, cut.grid, grad, x, f, gate, statistics, partial, *cut.sizes, **cut.blocks)
        per_sample, _, pixels, _ = cut.sizes
        sizes = (per_sample, images * channels, pixels, channels)
        merge = (triton.cdiv(images * channels, _MERGED),)
        common.launch(merge_sums_kernel, merge, partial, statistics, columns, *sizes, BLOCK=_MERGED)
    needs = (need_x, need_f, need_gate)
    results = [torch.empty_like(x) if need else None for need in needs]
    tensors = (grad, x, f, gate, statistics, columns, *results)
    common.launch(gradient_kernel, cut.grid, *tensors, *cut.sizes, **cut.blocks)
    grad_x, grad_f, grad_gate = (x.new_empty(0) if t is None else t for t in results)
    return grad_x, grad_f, grad_gate


def _require_alike(x: Tensor, *others: Tensor) -> None:
    """What a direct call of the operator could read past the end of."""
    for t in others:
        if x.dim() != 4 or t.shape != x.shape or t.dtype != x.dtype:
            raise ValueError(
                f"gated_blend: each map must be {tuple(x.shape)} {x.dtype}, got {tuple(t.shape)} {t.dtype}"
            )
