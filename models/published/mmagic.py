# SPDX-License-Identifier: Apache-2.0
"""OpenMMLab's AOT-GAN: generator and discriminator, alone or side by side under "generator." and "disc."."""

import re
from typing import Any

from ..aot_gan import AOTGAN, AOTGANDiscriminator
from . import aot_gan
from .common import Source, State, fill, rename

_GENERATOR = (
    (r"encoder\.encoder\.1\.conv\.(.+)", r"encoder.0.\1"),
    (r"encoder\.encoder\.2\.conv\.(.+)", r"encoder.2.\1"),
    (r"encoder\.encoder\.3\.conv\.(.+)", r"encoder.4.\1"),
    (r"dilation_neck\.model\.(\d+)\.(fuse|gate)\.1\.conv\.(.+)", r"blocks.\1.\2.\3"),
    (r"decoder\.decoder\.0\.conv\.(.+)", r"decoder.1.\1"),
    (r"decoder\.decoder\.1\.conv\.(.+)", r"decoder.4.\1"),
    (r"decoder\.decoder\.2\.conv\.(.+)", r"decoder.6.\1"),
)
_DISCRIMINATOR = (
    *((rf"model\.{i}\.conv\.weight_orig", f"conv.{2 * i}.weight") for i in range(4)),
    *((rf"model\.{i}\.conv\.(weight_[uv])", rf"conv.{2 * i}.\1") for i in range(4)),
    (r"model\.4\.(.+)", r"conv.8.\1"),
)


def read(state: State, **config: Any) -> AOTGAN:
    renamed = rename(_part(state, "generator."), _GENERATOR)
    return aot_gan.build(renamed, "dilation_neck.model.{}.blocks.{}.1.conv", config)


def read_discriminator(state: State, **config: Any) -> AOTGANDiscriminator:
    model = AOTGANDiscriminator(**config)
    fill(model.net, *rename(_part(state, "disc."), _DISCRIMINATOR))
    return model


def _part(state: State, prefix: str) -> State:
    """What lies under the prefix, without it; everything if nothing does. A whole file has losses' weights, too."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or state


SOURCES = (
    Source(
        "mmagic",
        "aot_gan",
        "generator",
        re.compile(r"(generator\.)?dilation_neck\.model\.\d+\.(fuse|gate)\.1\.conv\.weight"),
        read,
    ),
    Source(
        "mmagic",
        "aot_gan",
        "discriminator",
        re.compile(r"(disc\.)?model\.\d+\.conv\.weight_orig"),
        read_discriminator,
    ),
)
