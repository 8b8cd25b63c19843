# SPDX-License-Identifier: Apache-2.0
from .api import tap_conv2d

__all__ = ["tap_conv2d"]
