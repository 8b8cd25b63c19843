# SPDX-License-Identifier: Apache-2.0
"""The AOT-GAN authors' files, G<iteration>.pt and D<iteration>.pt."""

import re
from typing import Any

from ..aot_gan import AOTGAN, AOTGANDiscriminator
from .common import SPECTRAL, Renamed, Source, State, fill, rename, stack

_NAMES = (
    (r"encoder\.1\.(.+)", r"encoder.0.\1"),
    (r"encoder\.3\.(.+)", r"encoder.2.\1"),
    (r"encoder\.5\.(.+)", r"encoder.4.\1"),
    (r"middle\.(\d+)\.(fuse|gate)\.1\.(.+)", r"blocks.\1.\2.\3"),
    (r"decoder\.0\.conv\.(.+)", r"decoder.1.\1"),
    (r"decoder\.2\.conv\.(.+)", r"decoder.4.\1"),
    (r"decoder\.4\.(.+)", r"decoder.6.\1"),
)


def read(state: State, **config: Any) -> AOTGAN:
    """`config` may give the rates, which a file does not tell."""
    return build(rename(state, _NAMES), "middle.{}.block{:02}.1", config)


def build(renamed: Renamed, branch: str, config: dict[str, Any]) -> AOTGAN:
    """`branch`: the file's name of a dilated convolution, to be formatted with the numbers of its block and its own."""
    model = AOTGAN(**{**sizes(renamed.state), **config})
    for i in range(len(model.net.blocks)):
        stack(renamed, "", [branch.format(i, j) for j in range(len(model.net.rates))], f"blocks.{i}.pyramid")
    fill(model.net, *renamed)
    return model


def sizes(state: State) -> dict[str, int]:
    """The network's arguments that its keys, under our names, and their shapes tell."""
    blocks = {k.split(".")[1] for k in state if k.startswith("blocks.")}
    first = state.get("encoder.0.weight")
    return {
        **({"blocks": len(blocks)} if blocks else {}),
        **({"width": first.size(0)} if first is not None and first.dim() == 4 else {}),
    }


def read_discriminator(state: State, **config: Any) -> AOTGANDiscriminator:
    model = AOTGANDiscriminator(**config)
    fill(model.net, *rename(state, SPECTRAL))
    return model


SOURCES = (
    Source("aot-gan", "aot_gan", "generator", re.compile(r"middle\.\d+\.(fuse|gate)\.1\.weight"), read),
    Source("aot-gan", "aot_gan", "discriminator", re.compile(r"conv\.\d+\.weight_orig"), read_discriminator),
)
