# SPDX-License-Identifier: Apache-2.0
"""A network beside simple fills on photos with holes, in the classes of Liu et al. 2018, table 1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import images, masks
from ..masks.folder import PLACES
from . import fills, learned_metrics, metrics
from .photos import Photos

# (image (1, 3, S, S) with 0 in the holes, known (1, 1, S, S) float, 1 = valid) -> (1, 3, S, S)
Fill = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[float, str], None]

KIND = "irregular"  # of the masks that are made: the paper's
OTHER = "other"  # the bucket of masks in none of masks.BUCKETS
TELEA_RADIUS = 3  # pixels
SHEET_ROWS = 6


class Case(NamedTuple):
    """A photo and a mask for it."""

    photo: str  # path within the folder
    mask: str  # file name, or what drew it
    truth: Tensor  # (1, 3, S, S) float32 in [0, 1]
    known: Tensor  # (1, 1, S, S) float32, 1 = valid and 0 = hole
    bucket: str  # as masks.bucket_name has it, or OTHER
    place: str  # one of PLACES


class Score(NamedTuple):
    """One method's metrics on one case."""

    photo: str
    mask: str
    ratio: float
    bucket: str
    place: str
    method: str
    metrics: dict[str, float]  # by the keys of metrics.METRICS


@dataclass
class Results:
    scores: list[Score] = field(default_factory=list)
    fid: dict[str, float] = field(default_factory=dict)  # by method
    left_out: list[str] = field(default_factory=list)  # metrics: a sentence for each
    unfilled: dict[str, list[str]] = field(default_factory=dict)  # a sentence for each image, by method
    sheet: list[tuple[Case, dict[str, Tensor]]] = field(default_factory=list)  # composites (1, 3, S, S) by method


class MaskSource(Protocol):
    per_photo: int

    def of(self, item: int) -> Iterator[tuple[str, Tensor]]:
        """(name, mask (S, S) uint8, 1 = valid) for photo number `item`."""


class MadeMasks:
    """A random mask for each photo, of each bucket and place: its hole at least `border` pixels from the edges
    ("free"), or nearer ("border").

    What photo `item` gets depends on the seed and `item` alone.

    Raises:
        ValueError: a border that leaves no room for the largest bucket.
    """

    def __init__(self, size: int, border: int, seed: int = 0) -> None:
        self.size, self.border, self.seed = size, border, seed
        self.classes = [(bucket, place) for bucket in masks.BUCKETS for place in PLACES]
        self.per_photo = len(self.classes)
        least = masks.BUCKETS[-1][0]
        if (size - 2 * border) / size <= math.sqrt(least):
            raise ValueError(f"border must leave room for {least:.0%} hole, got {border} pixels of {size}x{size}")

    def of(self, item: int) -> Iterator[tuple[str, Tensor]]:
        for number, (bucket, place) in enumerate(self.classes):
            rng = np.random.default_rng((self.seed, item, number))
            mask = masks.random_mask(KIND, self.size, rng, bucket, self.border if place == "free" else None)
            if place == "border" and masks.border_distance(mask) >= self.border:
                rows = (mask == 0).any(1).nonzero()
                mask = mask.roll(-int(rows[0]), 0)  # by chance clear of all edges: moved to touch one
            yield f"{KIND} {masks.bucket_name(bucket)} {place}", mask


class GivenMasks:
    """A mask of a folder for each photo: the one of its name, when all photos have one; else in turn, in an order
    drawn by the seed. The largest middle square of a mask, like the photo's, brought to `size` by nearest neighbour.

    Files that are no usable mask are counted in `unusable`; a photo gets the next one in turn, or none where it is the
    one of its name.

    Raises:
        images.ImageError: a folder that is none or holds no picture; in use, one without a usable mask.
    """

    per_photo = 1

    def __init__(self, folder: str, hole: str, size: int, photos: list[Path], seed: int = 0) -> None:
        self.files, self.size = masks.MaskFolder(folder, None, hole), size
        self._named = {path.stem: number for number, path in enumerate(self.files.paths)}
        self._photos = photos
        self.matching = sum(path.stem in self._named for path in photos)
        self.paired = self.matching == len(photos)
        self._turn = itertools.cycle(np.random.default_rng(seed).permutation(len(self.files)).tolist())
        self._bad: set[int] = set()

    @property
    def unusable(self) -> int:
        return len(self._bad)

    def of(self, item: int) -> Iterator[tuple[str, Tensor]]:
        if self.paired:
            candidates = iter([self._named[self._photos[item].stem]])
        else:
            candidates = itertools.islice(self._turn, len(self.files))
        for number in candidates:
            mask = None if number in self._bad else self._read(number)
            if mask is not None:
                yield self.files.paths[number].name, mask
                return
            self._bad.add(number)
        if len(self._bad) == len(self.files):
            raise images.ImageError(f"masks must be usable, got none that is in {self.files.paths[0].parent}")

    def _read(self, number: int) -> Tensor | None:
        try:
            mask = self.files[number]  # (1, H, W)
        except images.ImageError:
            return None
        high, wide = mask.shape[1:]
        side = min(high, wide)
        top, left = (high - side) // 2, (wide - side) // 2
        square = mask[None, :, top : top + side, left : left + side]
        mask = F.interpolate(square, (self.size, self.size), mode="nearest-exact")[0, 0]
        return mask if mask.any() and not mask.all() else None


def cases(photos: Photos, source: MaskSource, border: int, count: int | None = None) -> Iterator[Case]:
    """What is evaluated: `count` photos in an order drawn by their seed (None: all, by name), each with the masks that
    `source` has for it. Photos that cannot be read are skipped, and counted by `photos`."""
    items = list(range(len(photos)))
    if count is not None and count < len(items):
        items = np.random.default_rng(photos.seed).permutation(len(items)).tolist()
    taken = 0
    for item in items:
        if taken == count:
            return
        planes = photos.middle(item)
        if planes is None:
            continue
        taken += 1
        name = photos.files[item].relative_to(photos.folder).as_posix()
        for label, mask in source.of(item):
            bucket = masks.bucket_of(mask)
            place = PLACES[masks.border_distance(mask) < border]
            known = mask.to(torch.float32)[None, None]
            yield Case(name, label, planes[None], known, masks.bucket_name(bucket) if bucket else OTHER, place)


def mean_colour(image: Tensor, known: Tensor) -> Tensor:
    """Every pixel the mean of the known ones; a Fill."""
    return ((image * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)).expand_as(image)


def telea(image: Tensor, known: Tensor) -> Tensor:
    """Telea 2004 by OpenCV, on 8 bits, reading TELEA_RADIUS pixels around; a Fill."""
    try:
        import cv2
    except ImportError:
        raise fills.CannotFillError("telea is left out, OpenCV is not installed") from None

    pixels = (image[0].permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous().numpy()
    hole = (known[0, 0] == 0).to(torch.uint8).numpy()
    filled = cv2.inpaint(pixels, hole, TELEA_RADIUS, cv2.INPAINT_TELEA)
    return torch.from_numpy(np.asarray(filled)).permute(2, 0, 1)[None].to(image.dtype) / 255


BASELINES: dict[str, Fill] = {"mean": mean_colour, "biharmonic": fills.biharmonic, "telea": telea}


def evaluate(
    found: Iterator[Case],
    total: int,
    methods: Mapping[str, Fill],
    fid_weights: str | None = None,
    lpips_weights: str | None = None,
    progress: Progress = lambda fraction, text: None,
) -> Results:
    """Every method on every case: what it fills, composed with the known pixels, against the photo.

    Methods are given photos with 0 in the holes. Composites are compared as they are, in [0, 1], not rounded to 8 bits.
    A metric or method whose package is missing is left out, with the reason.

    Args:
        found: the cases, at most `total`.
        methods: by name.
        fid_weights, lpips_weights: files of the networks of `learned_metrics.Frechet` and `Perceptual`.
        progress: called with the share that is done and a word for it.
    """
    results = Results()
    frechet, extras = _optional(results, list(methods), fid_weights, lpips_weights)
    shown = set(np.linspace(0, total - 1, SHEET_ROWS).round().astype(int).tolist())
    photo = ""
    for number, case in enumerate(found):
        if frechet and case.photo != photo:
            frechet.add_photo(case.truth)
            photo = case.photo
        composites = {}
        for name, fill in methods.items():
            try:
                composites[name] = composed(case, fill)
            except fills.CannotFillError as error:
                results.unfilled.setdefault(name, []).append(str(error))
                continue
            values = metrics.scores(case.truth, composites[name], case.known)
            values |= {key: extra(case.truth, composites[name]) for key, extra in extras.items()}
            ratio = masks.hole_ratio(case.known)
            results.scores.append(Score(case.photo, case.mask, ratio, case.bucket, case.place, name, values))
            if frechet:
                frechet.add(name, composites[name])
        if number in shown:
            results.sheet.append((case, composites))
        progress((number + 1) / total, f"{number + 1} of {total}")
    if frechet:
        try:
            results.fid = frechet.values()
        except metrics.UnavailableError as error:
            results.left_out.append(str(error))
    return results


def composed(case: Case, fill: Fill) -> Tensor:
    """(1, 3, S, S): the photo where it is known, the fill, cut to [0, 1], in the hole."""
    filled = fill(torch.where(case.known > 0, case.truth, 0), case.known)
    return torch.where(case.known > 0, case.truth, filled.clamp(0, 1).to(case.truth.dtype))


def _optional(
    results: Results, methods: list[str], fid_weights: str | None, lpips_weights: str | None
) -> tuple[learned_metrics.Frechet | None, dict[str, Callable[[Tensor, Tensor], float]]]:
    """What needs other packages: FID, and metrics of (truth, composite) by their keys."""
    frechet = None
    extras: dict[str, Callable[[Tensor, Tensor], float]] = {}
    perceptual = partial(learned_metrics.Perceptual, lpips_weights)
    for key, make in (("ssim", metrics.Similarity), ("lpips", perceptual)):
        try:
            extras[key] = make()
        except metrics.UnavailableError as error:
            results.left_out.append(str(error))
    try:
        if fid_weights is None:
            raise metrics.UnavailableError("FID is left out, no file of its network's weights is given")
        frechet = learned_metrics.Frechet(fid_weights, methods)
    except metrics.UnavailableError as error:
        results.left_out.append(str(error))
    return frechet, extras
