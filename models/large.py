# SPDX-License-Identifier: Apache-2.0
"""Images larger than a network was made for, in bounded memory: shrunk, in tiles, around the holes, or in samples.

Each strategy takes `fill(image, mask)`, which completes an image (N, C, h, w) of moderate size, mask (N, 1, h, w)
float with 1 = valid, and gives the whole picture back, (N, C, H, W); what it gives for known pixels is not used.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Fill = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[float, str], None]


class Bounds(NamedTuple):
    """What a strategy may use."""

    size: int  # longest side that the network is given
    overlap: int  # pixels that tiles share, and that are kept around a hole
    progress: Progress


def resize(fill: Fill, image: Tensor, mask: Tensor, bounds: Bounds) -> Tensor:
    """Completed at a smaller size; the fill is enlarged again."""
    high, wide = image.shape[2:]
    scale = min(1.0, bounds.size / max(high, wide))
    if scale == 1.0:
        return fill(image, mask)
    small = (max(1, round(high * scale)), max(1, round(wide * scale)))
    # A small pixel is the mean of the known ones in it, and known where there is one.
    share = F.interpolate(mask, small, mode="area")
    mean = F.interpolate(torch.where(mask > 0, image, 0), small, mode="area") / share.clamp(min=1e-6)
    filled = fill(mean, (share > 0).to(mask.dtype)).clamp(0, 1)
    return F.interpolate(filled, (high, wide), mode="bicubic", align_corners=False)


def tile(fill: Fill, image: Tensor, mask: Tensor, bounds: Bounds) -> Tensor:
    """Tiles of `size` that share `overlap` pixels, over which they fade into each other; those without a hole are left
    out."""
    high, wide = image.shape[2:]
    size, overlap = bounds.size, min(bounds.overlap, bounds.size // 2)
    boxes = [
        (top, left, min(top + size, high), min(left + size, wide))
        for top in _starts(high, size, overlap)
        for left in _starts(wide, size, overlap)
    ]
    boxes = [box for box in boxes if _has_hole(mask, box)]
    total, weights = torch.zeros_like(image), torch.zeros_like(mask[:1])
    for done, (top, left, bottom, right) in enumerate(boxes):
        part = (..., slice(top, bottom), slice(left, right))
        weight = _fade(bottom - top, overlap, mask)[:, None] * _fade(right - left, overlap, mask)
        total[part] += fill(image[part], mask[part]) * weight
        weights[part] += weight
        bounds.progress((done + 1) / len(boxes), f"tile {done + 1} of {len(boxes)}")
    return total / weights.clamp(min=1e-12)


def crop(fill: Fill, image: Tensor, mask: Tensor, bounds: Bounds) -> Tensor:
    """Each group of holes with `overlap` pixels around it, by itself; shrunk where that is more than `size`."""
    whole = image.clone()
    boxes = [(index, box) for index in range(len(image)) for box in _boxes(mask[index, 0], bounds.overlap)]
    for done, (index, (top, left, bottom, right)) in enumerate(boxes):
        part = (slice(index, index + 1), slice(None), slice(top, bottom), slice(left, right))
        whole[part] = resize(fill, image[part], mask[part], bounds)
        bounds.progress((done + 1) / len(boxes), f"hole {done + 1} of {len(boxes)}")
    return whole


def subsample(fill: Fill, image: Tensor, mask: Tensor, bounds: Bounds) -> Tensor:
    """DeepGIN's: every k-th pixel makes an image of its own (pixel-unshuffle), each is completed, and put back (Li et
    al., "DeepGIN: Deep Generative Inpainting Network for Extreme Image Inpainting", 2020, section 4)."""
    high, wide = image.shape[2:]
    k = math.ceil(max(high, wide) / bounds.size)
    whole = torch.empty_like(image)
    for done in range(k * k):
        part = (..., slice(done // k, None, k), slice(done % k, None, k))
        if whole[part].numel():
            known = mask[part]
            whole[part] = fill(image[part], known) if bool((known == 0).any()) else image[part]
        bounds.progress((done + 1) / (k * k), f"sample {done + 1} of {k * k}")
    return whole


STRATEGIES: dict[str, Callable[[Fill, Tensor, Tensor, Bounds], Tensor]] = {
    "whole": lambda fill, image, mask, bounds: fill(image, mask),
    "resize": resize,
    "tile": tile,
    "crop": crop,
    "subsample": subsample,
}


def _starts(length: int, size: int, overlap: int) -> list[int]:
    """Where tiles begin: evenly apart, by at most size - overlap, the first and the last at the edges."""
    if length <= size:
        return [0]
    count = math.ceil((length - overlap) / (size - overlap))
    return [round(i * (length - size) / (count - 1)) for i in range(count)]


def _fade(length: int, overlap: int, like: Tensor) -> Tensor:
    """(length,): a ramp up from either end, above 0."""
    at = torch.arange(length, dtype=like.dtype, device=like.device) + 0.5
    return (torch.minimum(at, length - at) / max(1, overlap)).clamp(max=1.0)


def _has_hole(mask: Tensor, box: tuple[int, int, int, int]) -> bool:
    top, left, bottom, right = box
    return bool((mask[..., top:bottom, left:right] == 0).any())


def _boxes(mask: Tensor, grow: int) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right) around the holes of a plane (H, W), each grown by `grow` pixels; holes that are at
    most that far apart share one."""
    high, wide = mask.shape

    def cut(top: int, left: int, bottom: int, right: int) -> Iterator[tuple[int, int, int, int]]:
        hole = mask[top:bottom, left:right] == 0
        rows, columns = _runs(hole.any(1), grow), _runs(hole.any(0), grow)
        if len(rows) == len(columns) == 1:
            (a, b), (c, d) = rows[0], columns[0]
            yield top + a, left + c, top + b, left + d
            return
        for a, b in rows:
            for c, d in columns:
                if bool(hole[a:b, c:d].any()):
                    yield from cut(top + a, left + c, top + b, left + d)

    return [
        (max(0, top - grow), max(0, left - grow), min(high, bottom + grow), min(wide, right + grow))
        for top, left, bottom, right in cut(0, 0, high, wide)
    ]


def _runs(there: Tensor, gap: int) -> list[tuple[int, int]]:
    """[begin, end) of the stretches of True that more than `gap` of False part."""
    at = there.nonzero().flatten().tolist()
    runs: list[tuple[int, int]] = []
    for i in at:
        if runs and i - runs[-1][1] <= gap:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs
