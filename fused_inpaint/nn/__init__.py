# SPDX-License-Identifier: Apache-2.0
"""The operators as layers."""

from .attention import SelfAttention2d
from .blocks import AOTBlock, SPDBlock
from .partial_conv import PartialConv2d, PartialUpConv2d, prepack
from .partial_conv_nd import PartialConv1d, PartialConv3d
from .pyramid_conv import PyramidConv2d
from .region_conv import RegionConv2d
from .region_norm import LearnedRegionNorm2d, RegionNorm2d
from .tap_conv import TapConv2d

__all__ = [
    "AOTBlock",
    "LearnedRegionNorm2d",
    "PartialConv1d",
    "PartialConv2d",
    "PartialConv3d",
    "PartialUpConv2d",
    "PyramidConv2d",
    "RegionConv2d",
    "RegionNorm2d",
    "SPDBlock",
    "SelfAttention2d",
    "TapConv2d",
    "prepack",
]
