# SPDX-License-Identifier: Apache-2.0
"""The networks by their keys."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .aot_gan import AOTGAN, AOTGANDiscriminator
from .base import Discriminator, InpaintingModel
from .cgan_pc_rn import CGANPCRN, CGANPCRNDiscriminator
from .deepgin import DeepGIN, DeepGINDiscriminator
from .pconv import PConv
from .region_wise import RegionWise, RegionWiseDiscriminator
from .rn import RN, RNDiscriminator


def _variants(key: str, **classes: type[Any]) -> Callable[..., Any]:
    """One of several classes under one key, the first when no `variant` is named."""

    def build(variant: str = next(iter(classes)), **config: Any) -> Any:
        if variant not in classes:
            raise ValueError(f"{key}: variant must be {' or '.join(classes)}, got {variant}")
        return _made(key, classes[variant], config)

    return build


def _made(key: str, build: Callable[..., Any], config: dict[str, Any]) -> Any:
    if isinstance(build, type):
        names = list(inspect.signature(build).parameters)
        if strange := [name for name in config if name not in names]:
            raise ValueError(f"{key}: configuration must be of {', '.join(names)}, got {strange[0]}")
    return build(**config)


MODELS: dict[str, Callable[..., InpaintingModel]] = {
    "pconv": PConv,
    "cgan_pc_rn": _variants("cgan_pc_rn", unet=CGANPCRN, rn=RN),
    "region_wise": RegionWise,
    "deepgin": DeepGIN,
    "aot_gan": AOTGAN,
}
DISCRIMINATORS: dict[str, Callable[..., Discriminator]] = {
    "cgan_pc_rn": _variants("cgan_pc_rn", unet=CGANPCRNDiscriminator, rn=RNDiscriminator),
    "region_wise": RegionWiseDiscriminator,
    "deepgin": DeepGINDiscriminator,
    "aot_gan": AOTGANDiscriminator,
}


def build_model(key: str, **config: Any) -> InpaintingModel:
    """A generator with fresh weights, by its key; `config` are the arguments of its class.

    Keys: "pconv" (`PConv`), "cgan_pc_rn" (`CGANPCRN`, or with variant="rn" the published `RN`), "region_wise"
    (`RegionWise`), "deepgin" (`DeepGIN`), "aot_gan" (`AOTGAN`).

    >>> from fused_inpaint.models import build_model
    >>> model = build_model("pconv")
    >>> sum(p.numel() for p in model.parameters() if p.dim() == 4)
    32848849
    """
    return _made(key, known("build_model", key, MODELS), config)


def build_discriminator(key: str, **config: Any) -> Discriminator:
    """The discriminator that the network of this key is trained against, with fresh weights."""
    return _made(key, known("build_discriminator", key, DISCRIMINATORS), config)


def known(function: str, key: str, table: Mapping[str, Any]) -> Any:
    if key not in table:
        raise ValueError(f"{function}: key must be one of {', '.join(table)}, got {key}")
    return table[key]
