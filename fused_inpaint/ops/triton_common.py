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


def nhwc(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    if 0 in grid:
        return
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Contraction to FMA is asked for in words, since Triton's default for it is about to change.
        kernel[grid](*arguments, **options, enable_fp_fusion=True)


def fold(weight: Tensor, first: int, channels: int) -> Tensor:
    """(4, O, t, t, C): the folded kernel of one source's channels of a channels_last weight."""
    outputs, depth, k, _ = weight.shape
    taps = (k + 1) // 2
    folded = weight.new_empty(4, outputs, taps, taps, channels)
    total = folded.numel()
    sizes = (total, outputs, depth, first, channels)
    launch(fold_kernel, (triton.cdiv(total, _BLOCK),), weight, folded, *sizes, K=k, BLOCK=_BLOCK)
    return folded
