# SPDX-License-Identifier: Apache-2.0
from .api import region_conv2d

__all__ = ["region_conv2d"]
