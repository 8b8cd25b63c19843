# SPDX-License-Identifier: Apache-2.0
"""The operators as layers."""

from .partial_conv import PartialConv2d, PartialUpConv2d, prepack
from .partial_conv_nd import PartialConv1d, PartialConv3d
from .region_conv import RegionConv2d
from .region_norm import LearnedRegionNorm2d, RegionNorm2d

__all__ = [
    "LearnedRegionNorm2d",
    "PartialConv1d",
    "PartialConv2d",
    "PartialConv3d",
    "PartialUpConv2d",
    "RegionConv2d",
    "RegionNorm2d",
    "prepack",
]
