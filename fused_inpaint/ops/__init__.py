# SPDX-License-Identifier: Apache-2.0
"""The operators as functions."""

from .partial_conv import (
    BatchNorm,
    Window,
    WindowStep,
    partial_conv2d,
    partial_upconv2d,
    partial_window,
    partial_window_chain,
)
from .region_conv import region_conv2d
from .region_norm import channel_pool, region_norm

__all__ = [
    "BatchNorm",
    "Window",
    "WindowStep",
    "channel_pool",
    "partial_conv2d",
    "partial_upconv2d",
    "partial_window",
    "partial_window_chain",
    "region_conv2d",
    "region_norm",
]
