# SPDX-License-Identifier: Apache-2.0
from .api import channel_pool, region_norm

__all__ = ["channel_pool", "region_norm"]
