# SPDX-License-Identifier: Apache-2.0
"""What this library saved: our own names, with or without the network's prefix."""

from typing import Any

import torch
from torch import nn

from ..registry import build_discriminator, build_model
from .common import State, fill
from .naoto0804 import sizes

NAME = "fused_inpaint"


def read(key: str, part: str, state: State, **config: Any) -> nn.Module:
    """`config` as recorded in the file, or as given; the PConv U-Net's sizes are seen in its keys."""
    state = {k.removeprefix("net."): v for k, v in state.items()}
    if key == "pconv" and not config.keys() & {"levels", "channels", "width"}:
        levels = len({k.split(".")[1] for k in state if k.startswith("encoder.")})
        channels, width = sizes(state, "encoder.0.conv.weight", levels, NAME)
        config = {"levels": levels, "channels": channels, "width": width, **config}
    model = (build_model if part == "generator" else build_discriminator)(key, **config)
    net: torch.nn.Module = model.net
    fill(net, state)
    return model
