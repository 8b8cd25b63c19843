# SPDX-License-Identifier: Apache-2.0
"""The papers' networks on the fused ops: `build_model`, `load_published`."""

from typing import Any

from .base import InpaintingModel, Prediction
from .pconv import PConv, PConvUNet
from .published import load_published

__all__ = ["InpaintingModel", "PConv", "PConvUNet", "Prediction", "build_model", "load_published"]

_MODELS: dict[str, type[InpaintingModel]] = {"pconv": PConv}


def build_model(key: str, **config: Any) -> InpaintingModel:
    """A network with fresh weights, by its key; `config` are the arguments of its class.

    Keys: "pconv" (`PConv`: levels, channels, width, upsampling).

    >>> from fused_inpaint.models import build_model
    >>> model = build_model("pconv")
    >>> sum(p.numel() for p in model.parameters() if p.dim() == 4)
    32848849
    """
    if key not in _MODELS:
        raise ValueError(f"build_model: key must be one of {', '.join(_MODELS)}, got {key}")
    return _MODELS[key](**config)
