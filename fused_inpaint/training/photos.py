# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation data: photos of a folder, cut to a size, each with a mask.

What a sample holds depends on the seed and its position in the stream alone: not on the number of workers, processes
or interruptions before it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .. import images, masks

# (side, generator) -> (S, S), 1 = valid
MakeMask = Callable[[int, np.random.Generator], Tensor]


class MadeMasks:
    """Masks of a network's paper, or of a kind (see `fused_inpaint.masks.random_mask`)."""

    def __init__(self, kind: masks.Kind) -> None:
        self.kind = kind

    def __str__(self) -> str:
        return f"made as for {self.kind}"

    def __call__(self, side: int, rng: np.random.Generator) -> Tensor:
        return masks.random_mask(self.kind, side, rng)


class MasksOfFolder:
    """Masks of a folder, one at random each time, mirrored at random. One that cannot be used is passed over for the
    next."""

    def __init__(self, folder: str | os.PathLike[str], hole: str = "white") -> None:
        self._files = masks.MaskFolder(folder, None, hole)
        self._name = f"{folder} ({hole} holes)"

    def __str__(self) -> str:
        return self._name

    def __call__(self, side: int, rng: np.random.Generator) -> Tensor:
        self._files.size = (side, side)
        first = int(rng.integers(len(self._files)))
        for step in range(len(self._files)):
            try:
                mask = self._files[(first + step) % len(self._files)][0]
                break
            except images.ImageError as error:
                unusable = error
        else:
            raise unusable
        return mask.flip([axis for axis in (0, 1) if rng.random() < 0.5])

    def look(self, most: int = 32) -> tuple[list[float], list[str]]:
        """The shares of hole of some masks spread over the folder, and what is wrong with those that cannot be used."""
        shares, wrong = [], []
        for item in np.unique(np.linspace(0, len(self._files) - 1, most).round().astype(int)).tolist():
            path = self._files.paths[item]
            try:
                shares.append(masks.hole_ratio(images.read_mask(path, None, self._files.hole)[0]))
            except images.ImageError as error:
                wrong.append(f"{path.name}: {error}")
        return shares, wrong


class Photos(Dataset[tuple[Tensor, Tensor]]):
    """Photos of a folder and its subfolders, with masks.

    `photos[position, item]` is (image (3, S, S) in [0, 1], mask (1, S, S) with 1 = valid), both float32: photo `item`,
    shrunk at random so far that a random square of side `size` is cut from it, mirrored at random; or with
    `augment=False` its largest middle square. Files that are no readable picture are skipped; `skipped` counts those
    seen so far by this process.

    Args:
        folder: of pictures in any format that Pillow knows; turned upright by their EXIF orientation.
        size: S.
        make_mask: called with S and the sample's own generator.
        seed: of everything random.

    Raises:
        images.ImageError: a folder that is none or holds no picture.
    """

    def __init__(
        self, folder: str | os.PathLike[str], size: int, make_mask: MakeMask, seed: int = 0, augment: bool = True
    ) -> None:
        self.folder, self.size, self.make_mask, self.seed, self.augment = Path(folder), size, make_mask, seed, augment
        if not self.folder.is_dir():
            raise images.ImageError(f"data must be an existing folder, got {folder}")
        known = Image.registered_extensions()
        found = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in known and p.is_file())
        self.files = [path for path in found if _is_picture(path)]
        self.skipped = len(found) - len(self.files)
        self._named: set[Path] = set()
        if not self.files:
            raise images.ImageError(f"data must hold pictures, got none that can be read in {folder}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, at: tuple[int, int]) -> tuple[Tensor, Tensor]:
        position, item = at
        rng = np.random.default_rng([self.seed, position])
        for step in range(len(self.files)):
            image = self._read(self.files[(item + step) % len(self.files)])
            if image is not None:
                break
        else:
            raise images.ImageError(f"data must hold pictures, got none that can be read in {self.folder}")
        planes = _planes(self._random_square(image, rng)) if self.augment else self._middle(image)
        mask = self.make_mask(self.size, rng)
        return planes, mask.to(torch.float32)[None]

    def middle(self, item: int) -> Tensor | None:
        """The largest middle square of photo `item`, (3, S, S); None for a file that cannot be read, which is counted
        in `skipped`."""
        image = self._read(self.files[item])
        return None if image is None else self._middle(image)

    def _middle(self, image: Image.Image) -> Tensor:
        return _planes(ImageOps.fit(image, (self.size, self.size)))

    def _read(self, path: Path) -> Image.Image | None:
        try:
            with warnings.catch_warnings(), Image.open(path) as image:
                warnings.simplefilter("ignore")
                if self.augment:
                    # JPEG decodes to an eighth of its size in a fraction of the time; the crop needs no more pixels.
                    image.draft("RGB", (2 * self.size, 2 * self.size))
                return ImageOps.exif_transpose(image).convert("RGB")
        except images.UNREADABLE:
            self.skipped += 1
            if path not in self._named:
                self._named.add(path)
                warnings.warn(f"{path} cannot be read and is skipped", stacklevel=1)
            return None

    def _random_square(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        shorter = min(image.size)
        side = int(rng.uniform(min(self.size, shorter), shorter + 1)) if shorter > self.size else shorter
        left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
        box = (left, top, left + side, top + side)
        square = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box, reducing_gap=2.0)
        return ImageOps.mirror(square) if rng.random() < 0.5 else square


def _planes(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [0, 1]"""
    return torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255)


def _is_picture(path: Path) -> bool:
    """By its header alone; what is broken further on shows when it is read."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            return image.width * image.height <= images.MAX_MEGAPIXELS * 1e6
    except images.UNREADABLE:
        return False


class Stream(Sampler[tuple[int, int]]):
    """Endless (position, item) pairs: every item once in each pass, in an order of the pass's own.

    Of `world` processes each takes every `world`-th position, so that their joined batches are those of one process.
    `start` is the position to go on from.
    """

    def __init__(self, length: int, seed: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> None:
        self.length, self.seed, self.start, self.rank, self.world = length, seed, start, rank, world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order, current = np.empty(0, dtype=np.int64), -1
        position = self.start + self.rank
        while True:
            turn, at = divmod(position, self.length)
            if turn != current:
                order, current = np.random.default_rng([self.seed, turn, 1]).permutation(self.length), turn
            yield position, int(order[at])
            position += self.world
