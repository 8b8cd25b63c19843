# SPDX-License-Identifier: Apache-2.0
from .api import partial_conv2d, partial_upconv2d, partial_window
from .types import BatchNorm, Window

__all__ = ["BatchNorm", "Window", "partial_conv2d", "partial_upconv2d", "partial_window"]
