# SPDX-License-Identifier: Apache-2.0
"""The region normalization network, as its authors published it."""

import re
from typing import Any

import torch

from ..rn import RN, RNDiscriminator
from .common import SPECTRAL, Renamed, Source, State, fill, rename, require


def read(state: State, **config: Any) -> RN:
    """encoder_conv<i>, encoder_in<i> from 1; middle.<i>.conv_block and decoder are sequences, in whose numbers what has
    no weights is counted. Their RN-B holds gamma, our weight less 1, and beta, of the foreground (the hole) and of the
    background."""
    channels, width = _sizes(state, "encoder_conv1.weight")
    blocks = len({k.split(".")[1] for k in state if k.startswith("middle.")})
    renamed = rename(state, _RULES)
    for i in range(3):
        _join_regions(renamed, f"encoder_in{i + 1}", f"encoder.{i}.norm")
    model = RN(channels, width, blocks, **config)
    fill(model.net, *renamed)
    return model


def read_discriminator(state: State, **config: Any) -> RNDiscriminator:
    """conv<i>.0 from 1, under torch's former spectral norm."""
    model = RNDiscriminator(*_sizes(state, "conv1.0.weight_orig"), **config)
    numbered = rename(state, ((rf"conv{i + 1}\.0\.(.+)", rf"convs.{i}.\1") for i in range(5)))
    renamed = rename(numbered.state, SPECTRAL)
    names = {own: numbered.names[theirs] for own, theirs in renamed.names.items()}
    fill(model.net, renamed.state, names)
    return model


def _layer(theirs: str, ours: str, conv: int, norm: int) -> tuple[tuple[str, str], ...]:
    """The rules of a convolution and an RN-L at two places of a sequence."""
    return (
        (rf"{theirs}\.{conv}\.(?P<rest>.+)", rf"{ours}.conv.\g<rest>"),
        (rf"{theirs}\.{norm}\.sa\.conv1\.(?P<rest>.+)", rf"{ours}.norm.map_conv.\g<rest>"),
        (rf"{theirs}\.{norm}\.sa\.(?P<rest>.+)", rf"{ours}.norm.\g<rest>"),
    )


_RULES = (
    *((rf"encoder_conv{i + 1}\.(.+)", rf"encoder.{i}.conv.\1") for i in range(3)),
    *_layer(r"middle\.(\d+)\.conv_block", r"blocks.\1.first", 1, 2),
    *_layer(r"middle\.(\d+)\.conv_block", r"blocks.\1.second", 5, 6),
    *_layer("decoder", "decoder.0", 0, 2),
    *_layer("decoder", "decoder.1", 4, 6),
    (r"decoder\.9\.(.+)", r"exit.\1"),
)


def _join_regions(renamed: Renamed, theirs: str, ours: str) -> None:
    """The hole's and the valid region's vectors (C,) as one (2, C)."""
    for kind, own, neutral in (("gamma", f"{ours}.weight", 1.0), ("beta", f"{ours}.bias", 0.0)):
        keys = [f"{theirs}.{region}_{kind}" for region in ("foreground", "background")]
        missing = [key for key in keys if key not in renamed.state]
        renamed.names[own] = (missing or keys)[0]
        vectors = [renamed.state.pop(key) for key in keys if key not in missing]
        if missing:
            continue
        shapes = [tuple(v.shape) for v in vectors]
        require(shapes[0] == shapes[1], "checkpoint", f"one with {keys[0]} and {keys[1]} of one shape", shapes)
        # In half precision the sum would lose digits that the model keeps.
        joined = torch.stack(vectors)
        renamed.state[own] = joined.to(torch.promote_types(joined.dtype, torch.float32)) + neutral


def _sizes(state: State, entrance: str) -> tuple[int, int]:
    """(channels, width) from the first convolution's weight."""
    weight = state.get(entrance)
    shape = "none" if weight is None else tuple(weight.shape)
    fits = weight is not None and weight.dim() == 4
    require(fits, "checkpoint", f"one with a 4-dimensional {entrance}", shape)
    assert weight is not None
    return weight.size(1), weight.size(0)


SOURCES = (
    Source("rn", "cgan_pc_rn", "generator", re.compile(r"encoder_conv1\.weight"), read),
    Source("rn", "cgan_pc_rn", "discriminator", re.compile(r"conv1\.0\.weight_orig"), read_discriminator),
)
