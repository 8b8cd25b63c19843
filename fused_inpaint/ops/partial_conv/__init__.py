# SPDX-License-Identifier: Apache-2.0
from .api import partial_conv2d, partial_upconv2d, partial_window, partial_window_chain
from .types import BatchNorm, Window, WindowStep

__all__ = [
    "BatchNorm",
    "Window",
    "WindowStep",
    "partial_conv2d",
    "partial_upconv2d",
    "partial_window",
    "partial_window_chain",
]
