# SPDX-License-Identifier: Apache-2.0
"""How far a filled image is from the true one, and how sure a mean over images is.

As in Liu et al. 2018, "Image Inpainting for Irregular Holes Using Partial Convolutions", table 1, on images in [0, 1]:

- l1: mean absolute difference over all pixels and colours, times 100 (percent of the range);
- psnr: -10 log10 of the mean squared difference over all pixels and colours, in dB; infinite for equal images;
- ssim: Wang et al. 2004, "Image Quality Assessment", by scikit-image: Gaussian window of sigma 1.5 (11x11), population
  covariance, mean over the colours and over the pixels whose window is in the image.

Known pixels of a completed photo are the photo's own, so these depend on how large the hole is. hole_l1 and hole_psnr
are the same means over the hole's pixels alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Metric(NamedTuple):
    label: str
    digits: int  # in tables


METRICS = {
    "l1": Metric("l1 %", 2),
    "psnr": Metric("PSNR dB", 2),
    "ssim": Metric("SSIM", 3),
    "lpips": Metric("LPIPS", 3),
    "hole_l1": Metric("hole l1 %", 2),
    "hole_psnr": Metric("hole PSNR dB", 2),
}
LEAST_SIDE = 11  # pixels: SSIM's window
RESAMPLES = 1000


class UnavailableError(ValueError):
    """One sentence: why a metric is left out."""


def l1_percent(truth: Tensor, filled: Tensor, where: Tensor | None = None) -> float:
    """Mean absolute difference in percent of the range.

    Args:
        truth, filled: (N, C, H, W), float in [0, 1].
        where: (N or 1, 1, H, W) bool, of which pixels; all when None.

    >>> import torch
    >>> l1_percent(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.25))
    25.0
    """
    return 100 * float(_difference(truth, filled, where).abs().mean())


def psnr(truth: Tensor, filled: Tensor, where: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB; arguments as l1_percent's.

    >>> import torch
    >>> round(psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1)), 4)
    20.0
    """
    error = float(_difference(truth, filled, where).square().mean())
    return -10 * math.log10(error) if error > 0 else math.inf if error == 0 else math.nan


class Similarity:
    """Structural similarity: `of(truth, filled)`, both (1, C, H, W) float in [0, 1], of sides from LEAST_SIDE on.

    Raises:
        UnavailableError: scikit-image is not installed.
    """

    def __init__(self) -> None:
        try:
            from skimage.metrics import structural_similarity
        except ImportError:
            raise UnavailableError(
                "SSIM is left out, scikit-image is not installed: pip install 'fused-inpaint[evaluate]'"
            ) from None
        self._ssim = structural_similarity

    def __call__(self, truth: Tensor, filled: Tensor) -> float:
        pair = (image[0].double().numpy() for image in (truth, filled))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        return float(self._ssim(*pair, data_range=1.0, channel_axis=0, **options))


def scores(truth: Tensor, filled: Tensor, known: Tensor) -> dict[str, float]:
    """The metrics by their keys in METRICS, all but "ssim" and "lpips", which need other packages.

    truth, filled (1, C, H, W); known (1, 1, H, W), 1 = valid and 0 = hole, with a hole.
    """
    hole = known == 0
    return {
        "l1": l1_percent(truth, filled),
        "psnr": psnr(truth, filled),
        "hole_l1": l1_percent(truth, filled, hole),
        "hole_psnr": psnr(truth, filled, hole),
    }


def _difference(truth: Tensor, filled: Tensor, where: Tensor | None) -> Tensor:
    difference = filled.double() - truth.double()
    return difference if where is None else difference[where.expand_as(difference)]


class Interval(NamedTuple):
    """A mean, and between what it lies with the wanted confidence."""

    mean: float
    low: float
    high: float


def interval(values: list[float] | np.ndarray, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean over images with its percentile bootstrap interval (Efron 1979), of RESAMPLES resamples.

    The same seed and number of images draw the same resamples. Infinite values make an infinite mean.

    Raises:
        ValueError: no values.

    >>> interval([2.0, 2.0, 2.0])
    Interval(mean=2.0, low=2.0, high=2.0)
    """
    given = np.asarray(values, dtype=np.float64)
    if given.size == 0:
        raise ValueError("interval: values must hold at least one number, got none")
    rng = np.random.default_rng(seed)
    rows = max(1, 2**20 // given.size)  # at a time, for memory
    parts = (min(rows, RESAMPLES - first) for first in range(0, RESAMPLES, rows))
    means = np.concatenate([given[rng.integers(given.size, size=(part, given.size))].mean(1) for part in parts])
    mean = float(given.mean())
    # No interpolation, which is NaN between infinities.
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return Interval(mean, min(float(low), mean), max(float(high), mean))
