# SPDX-License-Identifier: Apache-2.0
"""The common PyTorch port of the PConv U-Net, 5 to 7 levels."""

import re
from typing import Any

import torch

from ..pconv import PConv
from .common import Renamed, Source, State, fill, require


def read(state: State, **config: Any) -> PConv:
    """enc_<i>/dec_<i>.conv.input_conv, .conv.mask_conv (all ones) and .bn, i from 1, dec_1 last. Its layer divides by
    sum(M) without the factor sum(1), the number of weights of an output; here the weight is divided by that factor."""
    levels = len({k.split(".")[0] for k in state if k.startswith("enc_")})
    channels, width = sizes(state, "enc_1.conv.input_conv.weight", levels, "naoto0804")
    renamed = Renamed({}, {})
    for name, value in state.items():
        if ".mask_conv." in name:
            continue
        match = re.fullmatch(r"(enc|dec)_(\d+)\.(.+)", name)
        if match is None:
            renamed.state[name] = value
            continue
        side, number, rest = match.groups()
        index = int(number) - 1 if side == "enc" else levels - int(number)
        rest = rest.replace("conv.input_conv.", "conv.").replace("bn.", "norm.")
        own = f"{'encoder' if side == 'enc' else 'decoder'}.{index}.{rest}"
        if rest == "conv.weight":
            # In half precision the quotient would lose digits that the model keeps.
            value = value.to(torch.promote_types(value.dtype, torch.float32)) / value[0].numel()
        renamed.state[own], renamed.names[own] = value, name
    model = PConv(levels, channels, width, **config)
    fill(model.net, *renamed)
    return model


def sizes(state: State, first: str, levels: int, source: str) -> tuple[int, int]:
    """(channels, width) from the first convolution's weight."""
    weight = state.get(first)
    shape = "none" if weight is None else tuple(weight.shape)
    fits = weight is not None and weight.dim() == 4 and levels > 0
    require(fits, "checkpoint", f"a {source} U-Net with a 4-dimensional {first}", shape)
    assert weight is not None
    return weight.size(1), weight.size(0)


SOURCES = (Source("naoto0804", "pconv", "generator", re.compile(r"enc_1\.conv\.input_conv\.weight"), read),)
