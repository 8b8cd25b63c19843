# SPDX-License-Identifier: Apache-2.0
"""Custom-kernel acceleration for image inpainting with PyTorch. Masks are 1 = valid, 0 = hole everywhere."""

import importlib
from typing import Any

from . import nn, ops
from ._backends import NoBackendError, use_backend
from .nn import PartialConv2d, PartialUpConv2d, prepack

__version__ = "0.1.0"
__all__ = ["NoBackendError", "PartialConv2d", "PartialUpConv2d", "models", "nn", "ops", "prepack", "use_backend"]


def __getattr__(name: str) -> Any:
    # The networks load on first use; the layers alone stay light.
    if name == "models":
        return importlib.import_module(".models", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
