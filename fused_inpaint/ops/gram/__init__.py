# SPDX-License-Identifier: Apache-2.0
from .api import gram_l1

__all__ = ["gram_l1"]
