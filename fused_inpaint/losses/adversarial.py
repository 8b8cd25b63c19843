# SPDX-License-Identifier: Apache-2.0
"""Adversarial losses on raw scores (no sigmoid), a map or the maps of several scales, whose losses are added.

A discriminator's loss takes its scores of real and of filled images, a generator's those of filled ones.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .pixels import wide

Scores = Tensor | Sequence[Tensor]


def discriminator_bce(real: Scores, fake: Scores) -> Tensor:
    """-log sigmoid(real) - log(1 - sigmoid(fake)), means (Shi et al.; the vanilla loss).

    >>> import torch
    >>> from fused_inpaint import losses
    >>> round(losses.discriminator_bce(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).item(), 4)
    1.3863
    """
    return _scales(real, lambda s: F.softplus(-s).mean()) + _scales(fake, lambda s: F.softplus(s).mean())


def generator_bce(fake: Scores) -> Tensor:
    """-log sigmoid(fake), mean: the form that does not saturate."""
    return _scales(fake, lambda s: F.softplus(-s).mean())


def discriminator_hinge(real: Scores, fake: Scores) -> Tensor:
    """max(0, 1 - real) + max(0, 1 + fake), means (DeepGIN)."""
    return _scales(real, lambda s: F.relu(1 - s).mean()) + _scales(fake, lambda s: F.relu(1 + s).mean())


def generator_hinge(fake: Scores) -> Tensor:
    """-fake, mean."""
    return _scales(fake, lambda s: -s.mean())


def discriminator_soft_mask(real: Tensor, fake: Tensor, mask: Tensor, kernel: int = 71, sigma: float = 10.0) -> Tensor:
    """Squared distance of the scores, brought to the mask's size, from 1 for real and blurred validity for filled
    images (Zeng et al. 2021, eq. 5 and 6, soft mask-guided PatchGAN).

    As published in code the labels are turned round: filled images are to give the blurred hole, real ones 0.

    >>> import torch
    >>> from fused_inpaint import losses
    >>> scores, mask = torch.zeros(1, 1, 6, 6), torch.ones(1, 1, 64, 64)
    >>> losses.discriminator_soft_mask(scores, scores, mask).item()
    0.0
    """
    blurred = _blur((mask == 0).any(1, keepdim=True).to(wide(fake).dtype), kernel, sigma)
    real, fake = (_enlarged(scores, mask) for scores in (real, fake))
    return (fake - blurred).square().mean() + real.square().mean()


def generator_soft_mask(fake: Tensor, mask: Tensor) -> Tensor:
    """Squared distance of the scores, brought to the mask's size, from 1, mean over the whole image.

    The paper weighs by the hole; its code multiplies the mean that is already taken by the hole over its own mean,
    which changes nothing, and so it is here.
    """
    return (_enlarged(fake, mask) - 1).square().mean()


def discriminator_region_wise(real: Tensor, fakes: Sequence[Tensor], mask: Tensor, alpha: float = 0.01) -> Tensor:
    """`alpha |M' - real| + sum |fake|`, added over everything, with M' = 1 where the scores' patch is a hole.

    Ma et al. 2022, eq. 6, whose plain differences are absolute values in the published code.

    `fakes` are the scores of both networks' outputs.

    >>> import torch
    >>> from fused_inpaint import losses
    >>> scores, mask = torch.ones(1, 2, 1, 1), torch.zeros(1, 1, 64, 64)
    >>> losses.discriminator_region_wise(scores, [scores, scores], mask).item()
    4.0
    """
    label = _holes(mask, real)
    return alpha * (label - wide(real)).abs().sum() + _scales(fakes, lambda s: s.abs().sum())


def generator_region_wise(fakes: Sequence[Tensor], mask: Tensor) -> Tensor:
    """`|M' - fake|`, added over everything: what the generator fills in is to count as real."""
    return _scales(fakes, lambda s: (_holes(mask, s) - s).abs().sum())


def _holes(mask: Tensor, scores: Tensor) -> Tensor:
    """(N or 1, 1, h, w): 1 where the pixel nearest to a score is a hole."""
    hole = (mask == 0).any(1, keepdim=True).to(wide(scores).dtype)
    return F.interpolate(hole, scores.shape[2:], mode="nearest")


def _scales(scores: Scores, loss: Callable[[Tensor], Tensor]) -> Tensor:
    maps = [scores] if isinstance(scores, Tensor) else list(scores)
    return torch.stack([loss(wide(s)) for s in maps]).sum()


def _enlarged(scores: Tensor, mask: Tensor) -> Tensor:
    return F.interpolate(wide(scores), mask.shape[2:], mode="bilinear", align_corners=True)


def _blur(plane: Tensor, kernel: int, sigma: float) -> Tensor:
    """Gaussian, zero outside of the image."""
    at = torch.arange(kernel, dtype=torch.float64, device="cpu") - kernel // 2
    weights = torch.exp(-at.square() / (2 * sigma**2))
    weights = (weights / weights.sum()).to(plane)
    for size in ((1, 1, kernel, 1), (1, 1, 1, kernel)):
        plane = F.conv2d(plane, weights.view(size), padding=(size[2] // 2, size[3] // 2))
    return plane
