# SPDX-License-Identifier: Apache-2.0
"""Metrics that are networks: FID and LPIPS, by torchmetrics, where it and the weights are at hand. Nothing is
downloaded."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .metrics import UnavailableError


class Frechet:
    """Fréchet inception distance (Heusel et al. 2017) of each method's images from the photos, by torchmetrics.

    Args:
        weights: file of the feature network, as torchmetrics and torch-fidelity take it.
        methods: names.

    Raises:
        UnavailableError: a package is missing, or the file is not the network's.
    """

    def __init__(self, weights: str, methods: list[str]) -> None:
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError as error:
            raise UnavailableError(f"FID is left out, torchmetrics cannot be imported ({_reason(error)})") from None
        try:
            self._of = {
                name: FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=weights, normalize=True)
                for name in methods
            }
        except (
            Exception
        ) as error:  # a package that torchmetrics needs for it, or whatever a wrong file makes torch raise
            raise UnavailableError(f"FID is left out, its network cannot be built ({_reason(error)})") from None
        self._photos, self._added = 0, dict.fromkeys(methods, 0)

    def add_photo(self, image: Tensor) -> None:  # (1, 3, H, W)
        for distance in self._of.values():
            distance.update(image, real=True)
        self._photos += 1

    def add(self, method: str, image: Tensor) -> None:  # (1, 3, H, W)
        self._of[method].update(image, real=False)
        self._added[method] += 1

    def values(self) -> dict[str, float]:
        """By method, of those with two images at least. Raises UnavailableError when there is none."""
        enough = [name for name, count in self._added.items() if min(count, self._photos) > 1]
        if not enough:
            raise UnavailableError("FID is left out, it needs at least two photos")
        return {name: float(self._of[name].compute()) for name in enough}


class Perceptual:
    """LPIPS (Zhang et al. 2018) with AlexNet by torchmetrics: `of(truth, filled)`, both (1, 3, H, W) in [0, 1].

    Args:
        weights: torchvision's file of AlexNet; None: the one in torch's cache.

    Raises:
        UnavailableError: torchmetrics or torchvision is missing, or AlexNet's weights are, or the file has others.
    """

    def __init__(self, weights: str | None = None) -> None:
        try:
            import torchmetrics.image.lpip as lpip
            from torchvision.models import AlexNet_Weights
        except Exception as error:  # a torchvision of another torch raises RuntimeError
            raise UnavailableError(
                f"LPIPS is left out, torchmetrics and torchvision cannot be imported ({_reason(error)})"
            ) from None
        name = AlexNet_Weights.DEFAULT.url.rsplit("/", 1)[-1]
        cached = Path(torch.hub.get_dir(), "checkpoints", name)
        if weights is None and not cached.is_file():
            raise UnavailableError(f"LPIPS is left out, {name} is not in {cached.parent}; give it by --lpips-weights")
        try:
            with _as_cached(weights or str(cached), name):
                self._metric = lpip.LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval()
        except Exception as error:  # whatever a wrong file makes torch raise
            raise UnavailableError(f"LPIPS is left out, its network cannot be built ({_reason(error)})") from None

    def __call__(self, truth: Tensor, filled: Tensor) -> float:
        with torch.no_grad():
            return float(self._metric(filled, truth))


@contextlib.contextmanager
def _as_cached(path: str, name: str) -> Iterator[None]:
    """Torchvision takes weights from torch's cache alone: for a while the cache is a folder with this file in it."""
    torch.load(path, map_location="cpu", weights_only=True)  # torchvision would run code that it holds
    hub: Any = torch.hub
    before = hub._hub_dir  # None where the environment says it; get_dir() would settle it for good
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder, "checkpoints")
        checkpoints.mkdir()
        os.symlink(os.path.abspath(path), checkpoints / name)
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            hub._hub_dir = before


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
