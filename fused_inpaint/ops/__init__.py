# SPDX-License-Identifier: Apache-2.0
"""The operators as functions."""

from .partial_conv import BatchNorm, Window, partial_conv2d, partial_upconv2d, partial_window

__all__ = ["BatchNorm", "Window", "partial_conv2d", "partial_upconv2d", "partial_window"]
