# SPDX-License-Identifier: Apache-2.0
"""Folders of mask files: read as masks of one size, and sorted by hole size and distance from the border."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .. import images
from .buckets import BUCKETS, Bucket, border_distance, bucket_of, hole_ratio
from .draw import Size

PLACES = ("free", "border")  # the hole keeps clear of the image's border, or comes near it
SMALL, LARGE = f"under {BUCKETS[0][0]:.0%} hole", f"over {BUCKETS[-1][1]:.0%} hole"
REASONS = ("unreadable", "not black and white", SMALL, LARGE)


class Sorted(NamedTuple):
    """The numbers of a folder's masks, by class."""

    classes: dict[tuple[Bucket, str], list[int]]  # by bucket and one of PLACES, all of them, in this order
    skipped: dict[str, list[int]]  # by one of REASONS, likewise


class MaskFolder(Dataset[Tensor]):
    """The mask files of a folder, in the order of their names; each (1, H, W) uint8, 1 = valid and 0 = hole.

    Args:
        folder: holds the files. What is no picture is not looked at, nor are folders in it.
        size: pixels, (height, width) or one side of a square, to which masks are brought by nearest neighbour, from
            which a thin hole may vanish; None: as stored.
        hole: the colour of holes, "white" or "black". It is not guessed: either half of a mask may be the hole.

    Raises:
        ValueError: a folder that is none or has no pictures, or another colour; on reading, a file that is no mask,
            has no hole, or is all hole.
    """

    def __init__(self, folder: str | os.PathLike[str], size: int | Size | None = None, hole: str = "white") -> None:
        if hole not in ("white", "black"):
            raise images.ImageError(f"hole must be white or black, got {hole}")
        if not Path(folder).is_dir():
            raise images.ImageError(f"masks must be an existing folder, got {folder}")
        self.paths = images.pictures(folder)
        if not self.paths:
            raise images.ImageError(f"masks must be a folder with pictures, got none in {folder}")
        self.size = (size, size) if isinstance(size, int) else size
        self.hole = hole

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        try:
            known, _ = images.read_mask(path, None, self.hole)
        except images.ImageError as error:
            raise images.ImageError(f"masks must all be usable, got {path.name}, which is not: {error}") from None
        return self._resized(known.byte())[0]

    def sort(self, border: int = 50, progress: Callable[[float, str], None] | None = None) -> Sorted:
        """Which masks are in which of BUCKETS, with a hole at least `border` pixels from the image's edges ("free") or
        nearer ("border"), at the folder's size; and which cannot be used, by reason. Reads all files.

        Liu et al. 2018 (table 1) have 50 pixels at 512x512, and call the two N and B.
        """
        classes: dict[tuple[Bucket, str], list[int]] = {(bucket, place): [] for bucket in BUCKETS for place in PLACES}
        skipped: dict[str, list[int]] = {reason: [] for reason in REASONS}
        for index in range(len(self)):
            found = self._class_of(index, border)
            (skipped[found] if isinstance(found, str) else classes[found]).append(index)
            if progress is not None:
                progress((index + 1) / len(self), f"{index + 1} of {len(self)}")
        return Sorted(classes, skipped)

    def _class_of(self, index: int, border: int) -> tuple[Bucket, str] | str:
        """A class, or the reason why there is none."""
        try:
            hole, grey = images.read_hole(self.paths[index], self.hole)
        except images.ImageError:
            return REASONS[0]
        if grey > images.GREY_LIMIT:
            return REASONS[1]
        mask = self._resized(torch.from_numpy((~hole).astype(np.uint8))[None, None])
        bucket = bucket_of(mask)
        if bucket is None:
            return SMALL if hole_ratio(mask) <= BUCKETS[0][0] else LARGE
        return bucket, PLACES[border_distance(mask) < border]

    def _resized(self, mask: Tensor) -> Tensor:  # (1, 1, H, W)
        return mask if self.size is None else F.interpolate(mask, self.size, mode="nearest-exact")
