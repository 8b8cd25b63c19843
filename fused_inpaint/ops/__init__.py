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

__all__ = [
    "BatchNorm",
    "Window",
    "WindowStep",
    "partial_conv2d",
    "partial_upconv2d",
    "partial_window",
    "partial_window_chain",
]
