# SPDX-License-Identifier: Apache-2.0
"""Classes of masks by how much is hole and how near it comes to the image's border (Liu et al. 2018, section 4.1)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

Bucket = tuple[float, float]  # (low, high]: share of pixels that are hole

BUCKETS: tuple[Bucket, ...] = ((0.01, 0.1), (0.1, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5), (0.5, 0.6))


def hole_ratio(mask: Tensor | np.ndarray) -> float:
    """The share of pixels that are hole.

    Args:
        mask: any shape, 1 = valid and 0 = hole, of any dtype.

    Raises:
        ValueError: a mask without pixels, or with other values than 0 and 1.

    >>> hole_ratio(np.array([[0, 1], [1, 1]]))
    0.25
    """
    pixels = math.prod(mask.shape)
    if pixels == 0:
        raise ValueError(f"hole_ratio: mask must have pixels, got the shape {tuple(mask.shape)}")
    return int(_holes("hole_ratio", mask).sum()) / pixels


def bucket_of(mask: Tensor | np.ndarray) -> Bucket | None:
    """Which of BUCKETS a mask is in; None for one with no more than 1 % or more than 60 % hole. Raises as hole_ratio.

    >>> bucket_of(np.array([[0, 1], [1, 1]]))
    (0.2, 0.3)
    """
    ratio = hole_ratio(mask)
    return next((bucket for bucket in BUCKETS if bucket[0] < ratio <= bucket[1]), None)


def bucket_name(bucket: Bucket) -> str:
    """
    >>> bucket_name(BUCKETS[0])
    '0.01-0.1'
    """
    return f"{bucket[0]:g}-{bucket[1]:g}"


def border_distance(mask: Tensor | np.ndarray) -> int:
    """How many pixels lie between the hole and the nearest edge of the image: 0 where they touch, and the shorter side
    where there is no hole.

    Args:
        mask: (..., H, W), 1 = valid and 0 = hole, of any dtype.

    Raises:
        ValueError: fewer than two dimensions, or other values than 0 and 1.

    >>> mask = np.ones((8, 8))
    >>> mask[2:4, 3:5] = 0
    >>> border_distance(mask)
    2
    """
    if mask.ndim < 2:
        raise ValueError(f"border_distance: mask must have the shape (..., H, W), got {tuple(mask.shape)}")
    high, wide = mask.shape[-2:]
    *_, down, across = _holes("border_distance", mask).nonzero()
    if down.size == 0:
        return min(high, wide)
    return int(min(down.min(), across.min(), high - 1 - down.max(), wide - 1 - across.max()))


def _holes(name: str, mask: Tensor | np.ndarray) -> np.ndarray:
    """Where the mask is 0."""
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu()
        mask = (mask.float() if mask.dtype == torch.bfloat16 else mask).numpy()  # NumPy has no bfloat16
    holes: np.ndarray = mask == 0
    odd = ~(holes | (mask == 1))
    if odd.any():
        raise ValueError(f"{name}: mask must be 0 or 1 everywhere, got {mask[odd][0].item()}")
    return holes
