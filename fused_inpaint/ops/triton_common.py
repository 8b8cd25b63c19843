# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-untyped, import-not-found"
"""What the operators' Triton kernels share: the product, tiles, launches, and a kernel folded for nearest x2."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter multiplies the bits of bfloat16 numbers, not the numbers.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + a @ b, summed in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def first_tap(odd, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Low-resolution offset of the folded kernel's first tap: floor((odd - k // 2) / 2)."""
    return (odd - K // 2) >> 1


@triton.jit(do_not_specialize=["total", "first"])
def fold_kernel(  # type: ignore[no-untyped-def]
    weight,  # (O, k, k, depth)
    folded,  # (4, O, t, t, C), t = (k + 1) // 2
    total,  # 4 * O * t * t * C
    outputs,  # O
    depth,
    first,
    channels,  # C
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Channels [first, first + C) of the low-resolution convolution that equals nearest x2, then `weight`.

    For each phase (row parity, column parity), the taps that meet in a low-resolution pixel are added in float32.
    """
    TAPS: tl.constexpr = (K + 1) // 2
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = at % channels
    tap = at // channels
    h = tap // TAPS % TAPS
    w = tap % TAPS
    o = tap // (TAPS * TAPS) % outputs
    phase = tap // (TAPS * TAPS) // outputs
    sums = tl.zeros((BLOCK,), tl.float32)
    for pair in tl.static_range(4):
        u = 2 * (first_tap(phase // 2, K) + h) + pair // 2 - phase // 2 + K // 2
        v = 2 * (first_tap(phase % 2, K) + w) + pair % 2 - phase % 2 + K // 2
        alive = (at < total) & (u >= 0) & (u < K) & (v >= 0) & (v < K)
        value = tl.load(weight + (((o * K + u) * K + v) * depth + first + c), mask=alive, other=0.0)
        sums += value.to(tl.float32)
    tl.store(folded + at, sums.to(folded.dtype.element_ty), mask=at < total)


@triton.jit
def inward(h, size, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row or column that padding reads in place of h."""
    if MODE == "reflect":
        h = tl.abs(h)
        h = size - 1 - tl.abs(size - 1 - h)
    if MODE == "replicate":
        h = tl.minimum(tl.maximum(h, 0), size - 1)
    return h


@triton.jit
def under(h, w, alive, height, width, UP: tl.constexpr, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(index of the stored pixel within its image, whether there is one) at (h, w) of the map nearest x UP."""
    inside = alive
    if MODE == "zeros":
        inside = inside & (h >= 0) & (h < height * UP) & (w >= 0) & (w < width * UP)
    else:
        h = inward(h, height * UP, MODE)
        w = inward(w, width * UP, MODE)
    if UP == 2:
        h = h >> 1
        w = w >> 1
    return h * width + w, inside


@triton.jit
def walk(  # type: ignore[no-untyped-def]
    acc,  # (BLOCK_M, BLOCK_N) float32
    wanted,  # whether to walk at all
    bits,  # (BLOCK_M,): bit t is set where tap t is read; None: wherever there is a pixel
    x,  # (N, H, W, C), from the tile's image on
    weight,  # (O, kh, kw, depth), from the source's first channel on
    h0,  # (BLOCK_M,) where windows begin
    w0,
    alive,
    o,  # (BLOCK_N,)
    o_alive,
    channels,
    depth,
    height,
    width,
    dil_h,
    dil_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    UP: tl.constexpr,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + W . x; a step is one tap and BLOCK_K channels."""
    NEVER: tl.constexpr = 31 if KH * KW < 32 else 63  # a bit that is not set
    k = tl.arange(0, BLOCK_K)
    weight += o[None, :] * (KH * KW * depth)
    chunks = tl.cdiv(channels, BLOCK_K)
    # No steps rather than a branch: the compiler pipelines the loop all the same.
    for step in range(0, tl.where(wanted, KH * KW * chunks, 0)):
        tap = step // chunks
        c = (step - tap * chunks) * BLOCK_K + k
        c_alive = c < channels
        at, inside = under(h0 + tap // KW * dil_h, w0 + tap % KW * dil_w, alive, height, width, UP, MODE)
        if bits is None:
            read = inside[:, None] & c_alive[None, :]
        else:
            # Written so, the compiler moves the bits to the layout of the loads once, not in every step.
            read = ((bits[:, None] >> tl.where(c_alive, tap, NEVER)[None, :]) & 1) != 0
        a = tl.load(x + ((at * channels)[:, None] + c[None, :]), mask=read, other=0.0)
        b = tl.load(weight + (tap * depth + c)[:, None], mask=c_alive[:, None] & o_alive[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def pixels(tile, height, width, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):  # type: ignore[no-untyped-def]
    """(image, row, column, whether there is such a pixel) of a tile of neighbouring pixels."""
    across = tl.cdiv(width, BLOCK_W)
    down = tl.cdiv(height, BLOCK_H)
    m = tl.arange(0, BLOCK_H * BLOCK_W)
    i = tile // across % down * BLOCK_H + m // BLOCK_W
    j = tile % across * BLOCK_W + m % BLOCK_W
    return tile // (across * down), i, j, (i < height) & (j < width)


@triton.jit
def rounded(y, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """y, which is float32, in another type."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        # Triton's interpreter cuts off; a GPU rounds to the nearest.
        bits = y.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        y = tl.where(y == y, nearest, y)
    return y.to(DTYPE)


class Config(NamedTuple):
    """How one GEMM is cut into tiles."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split: int


BITS = 62  # taps whose validity fits into a word
_BLOCK = 512  # of fold_kernel


def folds(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> bool:
    """Whether this convolution, after a nearest x2, is one at low resolution for each phase of the output."""
    k = kernel[0]
    return (
        kernel[1] == k
        and k % 2 == 1
        and all(s == 1 for s in (*stride, *dilation, groups))
        and all(p == k // 2 for p in padding)
    )


def fit(tile: Config, block_k: int, size: int, device: torch.device) -> Config:
    """With as many stages as the device has shared memory for; the table's own GPU has more than most."""
    if device.type != "cuda":
        return tile
    properties: Any = torch.cuda.get_device_properties(device)
    stage = (tile.block_m + tile.block_n) * block_k * size
    stages = properties.shared_memory_per_block_optin // stage
    return tile._replace(stages=max(1, min(tile.stages, stages)))


def power_of_2(n: int) -> int:
    """The smallest from n on that tl.dot takes as a side."""
    return max(16, triton.next_power_of_2(n))


def precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "half"
    # What cuDNN's convolutions do with float32; unlike cudnn.allow_tf32, readable whichever way it was set.
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if conv.fp32_precision == "tf32" else "ieee"


class Plan(NamedTuple):
    """The grid of one launch and what the kernel is compiled for."""

    grid: tuple[int]
    options: dict[str, Any]


SHAPES = ((8, 16), (8, 8), (4, 8))  # of a tile, in pixels
ENOUGH = 264  # programs: two for each processor of a large GPU


def plan(like: Tensor, images: int, height: int, width: int, outputs: int, channels: int) -> Plan:
    """`images` is counted once for each phase; `channels` are those of the wider source."""
    kind = precision(like.dtype)
    # Products in float32 proper run on the ordinary cores, from registers.
    block_n = min(32 if kind == "ieee" else 64, power_of_2(outputs))
    block_k = min(64 if kind == "half" else 32 if kind == "tf32" else 16, power_of_2(channels))
    for shape in SHAPES:
        tiles = images * triton.cdiv(height, shape[0]) * triton.cdiv(width, shape[1]) * triton.cdiv(outputs, block_n)
        if tiles >= ENOUGH:
            break
    # A third stage would spill registers where a tile has few pixels.
    stages = 3 if shape[0] * shape[1] >= 64 else 2
    tile = fit(Config(shape[0] * shape[1], block_n, block_k, 4, stages, 1), block_k, like.element_size(), like.device)
    options = {
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "BLOCK_H": shape[0],
        "BLOCK_W": shape[1],
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return Plan((tiles,), options)


def nhwc(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    if 0 in grid:
        return
    device = arguments[0].device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        # Contraction to FMA is asked for in words, since Triton's default for it is about to change.
        kernel[grid](*arguments, **options, enable_fp_fusion=True)


def fold(weight: Tensor, first: int, channels: int) -> Tensor:
    """(4, O, t, t, C): the folded kernel of one source's channels of a channels_last weight."""
    outputs, depth, k, _ = weight.shape
    taps = (k + 1) // 2
    folded = weight.new_empty(4, outputs, taps, taps, channels)
    total = folded.numel()
    sizes = (total, outputs, depth, first, channels)
    launch(fold_kernel, (-(-total // _BLOCK),), weight, folded, *sizes, K=k, BLOCK=_BLOCK)
    return folded
