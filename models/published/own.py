# SPDX-License-Identifier: Apache-2.0
"""What this library saved: our own names, with or without the network's prefix."""

from typing import Any

import torch
from torch import nn

from ..registry import build_discriminator, build_model
from . import aot_gan
from .common import State, fill
from .naoto0804 import sizes

NAME = "fused_inpaint"


def read(key: str, part: str, state: State, **config: Any) -> nn.Module:
    """`config` as recorded in the file, or as given; variants and the sizes of some generators are seen in the keys."""
    state = {k.removeprefix("net."): v for k, v in state.items()}
    if key == "cgan_pc_rn":
        config = {**_variant(part, state), **config}
    generator = part == "generator" and key in ("pconv", "cgan_pc_rn")
    if generator and not config.keys() & {"levels", "blocks", "channels", "width"}:
        depth, side = ("blocks", "blocks.") if config.get("variant") == "rn" else ("levels", "encoder.")
        number = len({k.split(".")[1] for k in state if k.startswith(side)})
        channels, width = sizes(state, "encoder.0.conv.weight", number, NAME)
        config = {depth: number, "channels": channels, "width": width, **config}
    if key == "aot_gan" and part == "generator":
        config = {**aot_gan.sizes(state), **config}
    model = (build_model if part == "generator" else build_discriminator)(key, **config)
    net: torch.nn.Module = model.net
    fill(net, state)
    return model


def _variant(part: str, state: State) -> dict[str, Any]:
    """What tells the networks of `cgan_pc_rn` apart."""
    if part == "discriminator":
        return {"variant": "rn"} if any(k.endswith("weight_u") for k in state) else {}
    if any(k.startswith("blocks.") for k in state):
        return {"variant": "rn"}
    return {"norm": "batch"} if any(k.endswith("running_mean") for k in state) else {}
