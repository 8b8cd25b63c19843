# SPDX-License-Identifier: Apache-2.0
"""Smooth fills that need no training: push-pull (torch only) and biharmonic (scikit-image)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The sparse factors grow faster than the hole: 40 000 unknowns take 0.4 s, 160 000 take 3.5 s and 0.6 GB, 360 000 13 s.
BIHARMONIC_MAX_UNKNOWNS = 150_000
BIHARMONIC_REACH, BIHARMONIC_MARGIN = 2, 8  # pixels: of its stencil, and kept around a hole
ITERATIONS = 30  # at every scale: within 0.1 dB of biharmonic in strokes; hundreds would be needed in a 40 pixel box


def push_pull(image: Tensor, known: Tensor) -> Tensor:
    """Averages of known pixels on ever coarser grids, read back bilinearly wherever a pixel is missing."""
    return smooth(image, known, iterations=0)


def smooth(image: Tensor, known: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Push-pull, and at every scale some steps towards the least-bent surface: nearly biharmonic, without scikit-image.

    image (N, C, H, W), known (N, 1, H, W) float 0/1 -> (N, C, H, W), known pixels untouched.
    """
    with _one_thread():
        return _smooth(image, known, iterations)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations: a second thread gains nothing, on a busy machine waiting for it costs 100-fold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _smooth(image: Tensor, known: Tensor, iterations: int) -> Tensor:
    image = torch.where(known > 0, image, 0)
    height, width = image.shape[-2:]
    if max(height, width) == 1 or bool((known > 0).all()):
        return image
    pad = (0, width % 2, 0, height % 2)
    count = F.avg_pool2d(F.pad(known, pad), 2)
    coarse = F.avg_pool2d(F.pad(image, pad), 2) / count.clamp(min=0.25)
    coarse = _smooth(coarse, (count > 0).to(known.dtype), iterations)
    fine = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)[..., :height, :width]
    return _unbend(torch.where(known > 0, image, fine), 1 - known, iterations)


def _unbend(surface: Tensor, free: Tensor, iterations: int) -> Tensor:
    """Conjugate gradients on the sum of squared Laplacians over the `free` pixels, one system per image and channel."""
    if iterations == 0:
        return surface
    residual = -_laplacian(_laplacian(surface)) * free
    direction = residual
    size = residual.square().sum((2, 3), keepdim=True)
    for _ in range(iterations):
        bent = _laplacian(direction)
        step = size / bent.square().sum((2, 3), keepdim=True).clamp(min=1e-20)
        surface = surface + step * direction
        residual = residual - step * _laplacian(bent) * free
        new_size = residual.square().sum((2, 3), keepdim=True)
        direction = residual + new_size / size.clamp(min=1e-20) * direction
        size = new_size
    return surface


def _laplacian(surface: Tensor) -> Tensor:
    """Five points; the border is continued by itself, which keeps the operator symmetric."""
    result = torch.zeros_like(surface)
    down = surface[..., 1:, :] - surface[..., :-1, :]
    result[..., :-1, :] += down
    result[..., 1:, :] -= down
    across = surface[..., 1:] - surface[..., :-1]
    result[..., :-1] += across
    result[..., 1:] -= across
    return result


class CannotFillError(ValueError):
    """One sentence: why this fill is out of the running for this picture."""


def biharmonic(image: Tensor, known: Tensor, where: Tensor | None = None) -> Tensor:
    """scikit-image's biharmonic inpainting, clamped to [0, 1]; (1, C, H, W), (1, 1, H, W) -> (1, C, H, W).

    With `where`, only the holes it touches are filled. Raises CannotFillError without scikit-image, or when a hole is
    too large for its sparse solver.
    """
    try:
        from scipy import ndimage  # type: ignore[import-untyped]
        from skimage.restoration import inpaint_biharmonic
    except ImportError:
        raise CannotFillError(
            "biharmonic is left out, scikit-image is not installed: pip install 'fused-inpaint[demo]'"
        ) from None

    hole = (known[0, 0] <= 0).numpy()
    # Holes closer than the stencil's reach are one.
    labels = ndimage.label(ndimage.binary_dilation(hole, iterations=BIHARMONIC_REACH))[0] * hole
    sizes = np.bincount(labels.ravel())
    wanted = np.arange(1, len(sizes)) if where is None else np.unique(labels[where[0, 0].numpy() > 0])
    result = image.clone()
    for batch in _batches([int(label) for label in wanted if label > 0], sizes):
        chosen = np.isin(labels, batch)
        rows, columns = np.flatnonzero(chosen.any(1)), np.flatnonzero(chosen.any(0))
        top, left = (max(int(along[0]) - BIHARMONIC_MARGIN, 0) for along in (rows, columns))
        area = (
            slice(top, int(rows[-1]) + 1 + BIHARMONIC_MARGIN),
            slice(left, int(columns[-1]) + 1 + BIHARMONIC_MARGIN),
        )
        crop = image[0, :, area[0], area[1]].permute(1, 2, 0).double().numpy()
        filled = torch.from_numpy(inpaint_biharmonic(crop, chosen[area], channel_axis=-1)).permute(2, 0, 1)
        inside = torch.from_numpy(chosen[area])
        result[0, :, area[0], area[1]] = torch.where(
            inside, filled.to(image.dtype).clamp(0, 1), result[0, :, area[0], area[1]]
        )
    return result


def _batches(labels: list[int], sizes: np.ndarray) -> list[list[int]]:
    """Holes to solve together: few calls, none with more unknowns than the solver can take."""
    batches: list[list[int]] = []
    room = 0
    for label in sorted(labels, key=lambda label: -int(sizes[label])):
        size = int(sizes[label])
        if size > BIHARMONIC_MAX_UNKNOWNS:
            raise CannotFillError(
                f"biharmonic is left out, it takes holes of at most {BIHARMONIC_MAX_UNKNOWNS} pixels and here is one "
                f"of {size}"
            )
        if size > room:
            batches.append([])
            room = BIHARMONIC_MAX_UNKNOWNS
        batches[-1].append(label)
        room -= size
    return batches
