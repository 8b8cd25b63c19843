# SPDX-License-Identifier: Apache-2.0
"""Custom-kernel acceleration for image inpainting with PyTorch. Masks are 1 = valid, 0 = hole everywhere."""

import importlib
from typing import Any

from . import nn as nn
from . import ops
from ._backends import NoBackendError, use_backend
from .nn import (
    AOTBlock,
    LearnedRegionNorm2d,
    PartialConv1d,
    PartialConv2d,
    PartialConv3d,
    PartialUpConv2d,
    PyramidConv2d,
    RegionConv2d,
    RegionNorm2d,
    SelfAttention2d,
    SPDBlock,
    TapConv2d,
    prepack,
)

__version__ = "0.1.0"
# Without `nn`, which a star import would put in the place of torch's.
__all__ = [
    "AOTBlock",
    "LearnedRegionNorm2d",
    "NoBackendError",
    "PartialConv1d",
    "PartialConv2d",
    "PartialConv3d",
    "PartialUpConv2d",
    "PyramidConv2d",
    "RegionConv2d",
    "RegionNorm2d",
    "SPDBlock",
    "SelfAttention2d",
    "TapConv2d",
    "losses",
    "masks",
    "models",
    "ops",
    "prepack",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use; the layers alone stay light.
    if name in ("losses", "masks", "models"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
