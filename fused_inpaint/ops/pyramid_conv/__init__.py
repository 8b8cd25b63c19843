# SPDX-License-Identifier: Apache-2.0
from .api import pyramid_conv2d

__all__ = ["pyramid_conv2d"]
