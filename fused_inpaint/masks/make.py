# SPDX-License-Identifier: Apache-2.0
"""Random masks of a kind, of a hole size if asked for, and an endless supply of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .buckets import Bucket
from .draw import KINDS, Size, grown

# What each network's paper trains with, by the network's name.
MIXES: dict[str, dict[str, float]] = {
    "pconv": {"irregular": 1},
    "cgan_pc_rn": {"irregular": 1},
    "region_wise": {"discontiguous": 1, "contiguous": 1},
    "deepgin": {"rectangle": 1, "free_form": 1, "cellular": 1},
    "aot_gan": {"irregular_turned": 1},
}
Kind = str | Sequence[str] | Mapping[str, float]

DRAWS = 5  # before the one that comes nearest to the wanted hole is grown or shrunk


def random_mask(
    kind: Kind,
    size: int | Size,
    rng: int | np.random.Generator,
    ratio: Bucket | None = None,
    border: int | None = None,
) -> Tensor:
    """A mask with at least one hole pixel and one valid pixel.

    A seed gives the same mask on every machine with the same NumPy and Pillow.

    Args:
        kind: one of KINDS; one of MIXES, by its network's name; several of these; or kinds with weights.
        size: pixels, (height, width) or one side of a square.
        rng: a generator, which moves on, or a seed.
        ratio: (low, high], the wanted share of hole pixels, such as one of BUCKETS. A few draws are tried; then the
            hole that comes nearest is grown or shrunk along its outline.
        border: how many pixels at least lie between the hole and the image's edges (50 at 512x512 in Liu et al. 2018).
            The hole is drawn on what is left in the middle.

    Returns:
        (H, W) uint8, 1 = valid and 0 = hole.

    Raises:
        ValueError: an unknown kind, sizes or a ratio out of range, or a ratio that no mask of this size and border has.

    >>> mask = random_mask("irregular", 64, rng=0, ratio=(0.2, 0.3), border=6)
    >>> mask.shape, 0.2 < (mask == 0).float().mean() <= 0.3
    (torch.Size([64, 64]), tensor(True))
    """
    names, shares = _mix(kind)
    high, wide = (size, size) if isinstance(size, int) else size
    margin = 0 if border is None else border
    _check(high, wide, ratio, margin)
    rng = np.random.default_rng(rng)
    room = (high - 2 * margin, wide - 2 * margin)
    fewest, most = _counts(ratio, high * wide, room, margin)

    nearest, miss, name = np.zeros(room, bool), high * wide, ""
    for _ in range(DRAWS):
        drawn = names[int(np.searchsorted(shares, rng.random(), side="right"))]
        hole = KINDS[drawn](room, rng)
        pixels = int(np.count_nonzero(hole))
        off = max(fewest - pixels, pixels - most, 0)
        if off < miss:
            nearest, miss, name = hole, off, drawn
        if miss == 0:
            break
    else:
        nearest = _fitted(nearest, fewest, most, rng, square=name == "rectangle")
    mask = np.ones((high, wide), np.uint8)
    mask[margin : high - margin, margin : wide - margin] -= nearest
    return torch.from_numpy(mask)


class Masks(IterableDataset[Tensor]):
    """An endless, seeded supply: `masks[i]` is mask number i, (1, H, W) uint8, whoever asks and in whatever order.

    To iterate gives 0, 1, 2 ...; the workers of a DataLoader share the numbers out. So a batch is (N, 1, H, W), as
    the networks take it. The arguments are those of random_mask, which says what is raised, at once.

    >>> masks = Masks("deepgin", 32, seed=1)
    >>> torch.equal(next(iter(masks)), masks[0]), masks[7].shape
    (True, torch.Size([1, 32, 32]))
    """

    def __init__(
        self, kind: Kind, size: int | Size, seed: int = 0, ratio: Bucket | None = None, border: int | None = None
    ) -> None:
        self.kind, self.size, self.seed, self.ratio, self.border = kind, size, seed, ratio, border
        _ = self[0]

    def __getitem__(self, index: int) -> Tensor:
        rng = np.random.default_rng((self.seed, index))
        return random_mask(self.kind, self.size, rng, self.ratio, self.border)[None]

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return (self[index] for index in count(first, step))


def _mix(kind: Kind) -> tuple[list[str], np.ndarray]:
    """Kinds, and for each the share of it and those before."""
    weights: dict[str, float] = {}
    parts = {kind: 1.0} if isinstance(kind, str) else kind if isinstance(kind, Mapping) else dict.fromkeys(kind, 1.0)
    for name, weight in parts.items():
        if name not in KINDS and name not in MIXES:
            raise ValueError(f"random_mask: kind must be one of {', '.join((*KINDS, *MIXES))}, got {name}")
        if not (weight > 0 and np.isfinite(weight)):
            raise ValueError(f"random_mask: kind must have positive weights, got {weight} for {name}")
        mix = MIXES.get(name, {name: 1.0})
        for part, share in mix.items():
            weights[part] = weights.get(part, 0.0) + weight * share / sum(mix.values())
    if not weights:
        raise ValueError("random_mask: kind must name at least one, got none")
    shares = np.cumsum(list(weights.values()))
    # One draw below 1 must not fall behind the last through rounding.
    return list(weights), (shares / shares[-1])[:-1]


def _check(high: int, wide: int, ratio: Bucket | None, margin: int) -> None:
    if min(high, wide) < 1 or high * wide < 2:
        raise ValueError(f"random_mask: size must be at least two pixels, got {high}x{wide}")
    if margin < 0:
        raise ValueError(f"random_mask: border must be at least 0, got {margin}")
    if 2 * margin >= min(high, wide):
        raise ValueError(f"random_mask: border must be under half of a side of {high}x{wide}, got {margin}")
    if ratio is not None and not 0 <= ratio[0] < ratio[1] <= 1:
        raise ValueError(f"random_mask: ratio must be (low, high] within 0 to 1, got ({ratio[0]}, {ratio[1]}]")


def _counts(ratio: Bucket | None, pixels: int, room: Size, margin: int) -> tuple[int, int]:
    """The fewest and the most hole pixels that are wanted and possible."""
    space = min(room[0] * room[1], pixels - 1)
    if ratio is None:
        return 1, space
    low, high = ratio
    # From just outside inwards: the product may be rounded to either side of a whole number.
    fewest = next(n for n in count(max(1, int(low * pixels) - 1)) if n / pixels > low)
    most = next(n for n in count(int(high * pixels) + 1, -1) if n / pixels <= high)
    if fewest > space:
        raise ValueError(
            f"random_mask: ratio must begin under {space / pixels:.3g}, which is all that a border of {margin} pixels "
            f"leaves, got ({low}, {high}]"
        )
    if fewest > most:
        raise ValueError(f"random_mask: ratio must hold a whole number of {pixels} pixels, got ({low}, {high}]")
    return fewest, min(most, space)


def _fitted(hole: np.ndarray, fewest: int, most: int, rng: np.random.Generator, square: bool) -> np.ndarray:
    """The hole (H, W) with its outline moved until it has `fewest` to `most` pixels."""
    wanted = int(rng.integers(fewest, most + 1))
    if np.count_nonzero(hole) < fewest:
        return _enlarged(hole, wanted, most, rng, square)
    return ~_enlarged(~hole, hole.size - wanted, hole.size - fewest, rng, square)


def _enlarged(region: np.ndarray, wanted: int, most: int, rng: np.random.Generator, square: bool) -> np.ndarray:
    """The region (H, W), grown ring by ring until it has `wanted` to `most` pixels; of a last ring that is too much,
    one side of the picture is taken. Corners grow with every ring (`square`) or every other."""
    region = region.copy()
    pixels = int(np.count_nonzero(region))
    if pixels == 0:
        region.flat[rng.integers(region.size)] = True
        pixels = 1
    corners = False
    while pixels < wanted:
        corners = square or not corners
        larger = grown(region, corners)
        ring = np.flatnonzero(larger & ~region)
        if pixels + len(ring) > most:
            down, across = np.divmod(ring, region.shape[1])
            angle = rng.uniform(0, 2 * np.pi)
            order = np.argsort(down * np.sin(angle) + across * np.cos(angle), kind="stable")
            region.flat[ring[order[: wanted - pixels]]] = True
            return region
        region, pixels = larger, pixels + len(ring)
    return region
