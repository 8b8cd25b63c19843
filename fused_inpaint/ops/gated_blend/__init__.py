# SPDX-License-Identifier: Apache-2.0
from .api import gated_blend

__all__ = ["gated_blend"]
