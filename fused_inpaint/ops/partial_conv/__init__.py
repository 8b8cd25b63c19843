# SPDX-License-Identifier: Apache-2.0
from .api import BatchNorm, Window, partial_conv2d, partial_upconv2d, partial_window

__all__ = ["BatchNorm", "Window", "partial_conv2d", "partial_upconv2d", "partial_window"]
