# SPDX-License-Identifier: Apache-2.0
"""Gaps in gridded data, which are marked by NaN, as masks."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Array = TypeVar("Array", Tensor, np.ndarray)


def from_nan(array: Array) -> Array:
    """The mask of an array with gaps: 1 where there is a finite number, 0 at NaN and infinities.

    The array itself can be given to the layers and networks as it is: they never read a hole.

    Args:
        array: (H, W), (C, H, W) or (N, C, H, W), floating point; of NumPy, or a tensor on any device.

    Returns:
        uint8, of the array's shape and library, on its device. `mask.amin(-3, keepdim=True)`, in NumPy
        `mask.min(-3, keepdims=True)`, is the one plane that the networks take: valid where all channels are.

    Raises:
        ValueError: another number of dimensions, or another kind of dtype, which has no NaN.

    >>> from_nan(np.array([[1.0, np.nan]]))
    array([[1, 0]], dtype=uint8)
    """
    _check("from_nan", array)
    if isinstance(array, Tensor):
        return torch.isfinite(array).to(torch.uint8)
    return np.isfinite(array).astype(np.uint8)


def without_nan(array: Array) -> Array:
    """A copy of the array with 0 in its gaps, for what does not take a mask. Arguments as from_nan's.

    >>> without_nan(np.array([[1.0, np.nan]]))
    array([[1., 0.]])
    """
    _check("without_nan", array)
    if isinstance(array, Tensor):
        return torch.where(torch.isfinite(array), array, 0)
    return np.where(np.isfinite(array), array, array.dtype.type(0))


def _check(name: str, array: Tensor | np.ndarray) -> None:
    floating = array.is_floating_point() if isinstance(array, Tensor) else np.issubdtype(array.dtype, np.floating)
    if not floating:
        raise ValueError(f"{name}: array must be floating point, got {array.dtype}")
    if array.ndim not in (2, 3, 4):
        raise ValueError(
            f"{name}: array must have the shape (H, W), (C, H, W) or (N, C, H, W), got {tuple(array.shape)}"
        )
