# SPDX-License-Identifier: Apache-2.0
"""The operators as functions."""

from .gated_blend import gated_blend
from .gram import gram_l1
from .partial_conv import (
    BatchNorm,
    Window,
    WindowStep,
    partial_conv2d,
    partial_upconv2d,
    partial_window,
    partial_window_chain,
)
from .pyramid_conv import pyramid_conv2d
from .region_conv import region_conv2d
from .region_norm import channel_pool, region_norm
from .tap_conv import tap_conv2d

__all__ = [
    "BatchNorm",
    "Window",
    "WindowStep",
    "channel_pool",
    "gated_blend",
    "gram_l1",
    "partial_conv2d",
    "partial_upconv2d",
    "partial_window",
    "partial_window_chain",
    "pyramid_conv2d",
    "region_conv2d",
    "region_norm",
    "tap_conv2d",
]
