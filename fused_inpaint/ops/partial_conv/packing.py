# SPDX-License-Identifier: Apache-2.0
"""Weights folded and brought into oneDNN's blocked layout ahead of time, for inference on the CPU.

The deep layers of a U-Net spend most of their time on reordering their weights, anew in every call. oneDNN's packing is
reached through torch's operators for compiled graphs, which are not a public interface: where they are missing,
nothing is packed and the layers run as they are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import convolution_dtype
from . import routes


class PackedWeight(NamedTuple):
    """A weight made ready for one form of the convolution."""

    fold: bool
    weights: tuple[Tensor, ...]  # one for each source if folded, else one


def fold_weight(weight: Tensor) -> Tensor:
    """The kernel of the low-resolution convolution that equals nearest x2, then `weight` (O, C, k, k).

    Returns (4 O, C, t, t), t = (k + 1) // 2, phases (row parity, column parity) first. Output row 2 i + a reads low
    rows i + floor((a - k // 2 + u) / 2) for the taps u; taps that meet in a row are added.
    """
    outputs, channels, k, _ = weight.shape
    taps = (k + 1) // 2
    folded = weight.new_zeros(2, 2, outputs, channels, taps, taps)
    for a in (0, 1):
        for b in (0, 1):
            for u in range(k):
                for v in range(k):
                    folded[a, b, :, :, _tap(k, a, u), _tap(k, b, v)] += weight[:, :, u, v]
    return folded.view(4 * outputs, channels, taps, taps)


def _tap(kernel: int, phase: int, u: int) -> int:
    return (phase - kernel // 2 + u) // 2 - (phase - kernel // 2) // 2


def folds(size: Sequence[int], upsample: Sequence[int]) -> bool:
    """Whether a layer with packed weights folds the upsample for a first source of this (N, C, H, W)."""
    n, _, h, w = size
    return 2 in upsample and n * h * w >= routes.fold_from("packed")


def pack(
    weight: Tensor,
    sizes: Sequence[Sequence[int]],
    upsample: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    fold: bool | None = None,
) -> PackedWeight | None:
    """Pack a layer's weight for sources of the given (N, C, H, W); None where there is nothing to pack with."""
    if not _available() or weight.device.type != "cpu" or weight.dtype == torch.float64:
        return None
    weight = weight.to(convolution_dtype(weight.dtype))
    n, _, h, w = sizes[0]
    if fold is None:
        fold = folds(sizes[0], upsample)
    if not fold:
        whole = [n, sum(s[1] for s in sizes), h * upsample[0], w * upsample[0]]
        return PackedWeight(False, (_reorder(weight, padding, stride, dilation, groups, whole),))
    parts = weight.split([s[1] for s in sizes], 1)
    around = (weight.size(2) // 2 + 1) // 2
    return PackedWeight(
        True,
        tuple(
            _reorder(fold_weight(part.float()).to(part.dtype), (around, around), (1, 1), (1, 1), 1, size)
            if up == 2
            else _reorder(part, padding, stride, dilation, groups, size)
            for part, up, size in zip(parts, upsample, sizes, strict=True)
        ),
    )


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_convolution_weight", "_convolution_pointwise")
    )


def _reorder(
    weight: Tensor,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    size: Sequence[int],
) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight.detach().contiguous(memory_format=torch.channels_last), padding, stride, dilation, groups, size
    )
    return packed
