# SPDX-License-Identifier: Apache-2.0
"""The papers' networks on the fused ops: `build_model`, `build_discriminator`, `load_published`."""

from .base import Discriminator, InpaintingModel, Prediction
from .pconv import PConv, PConvUNet
from .published import load_published
from .registry import build_discriminator, build_model

__all__ = [
    "Discriminator",
    "InpaintingModel",
    "PConv",
    "PConvUNet",
    "Prediction",
    "build_discriminator",
    "build_model",
    "load_published",
]
