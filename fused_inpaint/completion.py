# SPDX-License-Identifier: Apache-2.0
"""The ways to fill the holes of a photo, for every command: the network of a checkpoint, or internal learning."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .images import ImageError
from .training import fills, internal

Progress = Callable[[float, str], None]  # the share that is done, and a word for it; what it raises ends the work


class Completion(NamedTuple):
    image: Tensor  # (1, 3, H, W) in [0, 1]; in the hole, elsewhere it is not to be used
    how: str  # one line for the user
    notes: tuple[str, ...] = ()  # what went otherwise than one may expect


# (image (1, 3, H, W) in [0, 1], known (1, 1, H, W) float with 1 = known and 0 = hole, progress)
Method = Callable[[Tensor, Tensor, Progress], Completion]


@dataclass(frozen=True)
class InternalLearning:
    """A small network fitted to the photo's own known pixels, or what does better on pixels held out; see
    `training.internal`."""

    seconds: float = 60.0
    steps: int | None = None  # instead of seconds
    seed: int = 0

    def __call__(self, image: Tensor, known: Tensor, progress: Progress) -> Completion:
        result, report = internal.restore(
            image, known, seconds=self.seconds, steps=self.steps, seed=self.seed, progress=progress
        )
        steps = "1 step" if report.steps == 1 else f"{report.steps} steps"
        how = f"{report.sentence()} ({steps}, {report.seconds:.0f} s)"
        return Completion(result, how, report.notes)


class Network:
    """The network of a checkpoint, ours or a published one.

    Args:
        weights: the file.
        key: the network in it (None: what the file says, else pconv).
        strategy, size, overlap: how photos larger than `size` are treated, as for `InpaintingModel.inpaint`.

    Raises:
        ValueError: a file that is no checkpoint of such a network. When called: arguments that `inpaint` refuses;
            ImageError for a photo that memory does not hold.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str],
        key: str | None = None,
        strategy: str = "whole",
        size: int = 512,
        overlap: int = 64,
    ) -> None:
        from . import models

        self.key = key or models.key_of(weights) or "pconv"
        self.model = models.load_published(self.key, weights)
        self.strategy = strategy
        self.bounds = {"size": size, "overlap": overlap}
        self.how = f"filled by {self.key} with {os.fspath(weights)}"

    def __call__(self, image: Tensor, known: Tensor, progress: Progress) -> Completion:
        try:
            if self.strategy == "whole":
                return self._whole(image, known)
            filled = self.model.inpaint(image, known, self.strategy, progress=progress, **self.bounds)
            return Completion(filled, self.how)
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            high, wide = known.shape[-2:]
            raise ImageError(
                f"photo must be small enough for memory, got {wide}x{high}; --strategy tile takes any size"
            ) from None

    def _whole(self, image: Tensor, known: Tensor) -> Completion:
        """In one pass; partial convolutions may leave the middle of a large hole without a prediction."""
        with torch.no_grad():
            prediction: Any = self.model(image, known)
        out_of_reach = (getattr(prediction, "mask", known.new_ones(())) == 0) & (known == 0)
        if not out_of_reach.any():
            return Completion(prediction.image, self.how)
        count = int(out_of_reach.sum())
        how = f"{self.how}; {count} hole pixels were out of the network's reach and are a smooth fill"
        return Completion(torch.where(out_of_reach, fills.smooth(image, known), prediction.image), how)
