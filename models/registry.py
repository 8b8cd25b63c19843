# SPDX-License-Identifier: Apache-2.0
"""The networks by their keys."""

from collections.abc import Mapping
from typing import Any

from .base import Discriminator, InpaintingModel
from .pconv import PConv

MODELS: dict[str, type[InpaintingModel]] = {"pconv": PConv}
DISCRIMINATORS: dict[str, type[Discriminator]] = {}


def build_model(key: str, **config: Any) -> InpaintingModel:
    """A generator with fresh weights, by its key; `config` are the arguments of its class.

    Keys: "pconv" (`PConv`).

    >>> from fused_inpaint.models import build_model
    >>> model = build_model("pconv")
    >>> sum(p.numel() for p in model.parameters() if p.dim() == 4)
    32848849
    """
    return known("build_model", key, MODELS)(**config)


def build_discriminator(key: str, **config: Any) -> Discriminator:
    """The discriminator that the network of this key is trained against, with fresh weights."""
    return known("build_discriminator", key, DISCRIMINATORS)(**config)


def known(function: str, key: str, table: Mapping[str, Any]) -> Any:
    if key not in table:
        raise ValueError(f"{function}: key must be one of {', '.join(table)}, got {key}")
    return table[key]
