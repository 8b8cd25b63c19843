# SPDX-License-Identifier: Apache-2.0
"""The five papers' losses. Images are (N, C, H, W); masks (N or 1, 1 or C, H, W), 1 = valid and 0 = hole."""

from .adversarial import (
    discriminator_bce,
    discriminator_hinge,
    discriminator_region_wise,
    discriminator_soft_mask,
    generator_bce,
    generator_hinge,
    generator_region_wise,
    generator_soft_mask,
)
from .features import VGG, correlation, perceptual, style
from .pixels import composite, total_variation, total_variation_of_hole, valid_and_hole_l1

__all__ = [
    "VGG",
    "composite",
    "correlation",
    "discriminator_bce",
    "discriminator_hinge",
    "discriminator_region_wise",
    "discriminator_soft_mask",
    "generator_bce",
    "generator_hinge",
    "generator_region_wise",
    "generator_soft_mask",
    "perceptual",
    "style",
    "total_variation",
    "total_variation_of_hole",
    "valid_and_hole_l1",
]
