# SPDX-License-Identifier: Apache-2.0
"""The DeepGIN authors' generator and discriminator."""

import re
from typing import Any

from ..deepgin import DeepGIN, DeepGINDiscriminator
from .common import Source, State, fill, rename, require, stack

# Places in their list of the coarse stage, where padding, upsampling and activations have one each, too.
_COARSE = (1, 4, 7, 10, 12, 13, 14, 15, 16, 17, 20, 24, 28, 31)
# The middle of the refinement, in the order it runs.
_MIDDLE = ("mres1", "mres2", "mres5", "satn1", "mres3", "mres4", "mres6")
_MODULES = {
    **{rf"lr_coarse_tinker\.{place}": f"coarse.{i}" for i, place in enumerate(_COARSE)},
    **{f"r_en_conv{i + 1}": f"refinement.encoder.{i}" for i in range(5)},
    **{f"r_md_{name}": f"refinement.middle.{i}" for i, name in enumerate(_MIDDLE)},
    "r_en_skp_conv4": "refinement.skip32.0",
    "r_de_satn2": "refinement.skip32.1",
    "r_en_skp_conv3": "refinement.skip64.0",
    "r_de_satn3": "refinement.skip64.1",
    "r_de_conv1": "refinement.up32",
    "r_de_mix_conv1": "refinement.mix32",
    "r_de_conv2": "refinement.up64",
    "r_de_mix_conv2": "refinement.mix64",
    "r_de_conv2_lr": "refinement.low.0",
    "r_de_conv3_lr": "refinement.low.1",
    "r_de_conv3": "refinement.up128",
    "r_de_conv4": "refinement.up256",
    "r_de_conv5": "refinement.out",
    "r_de_conv5_lr_alpha": "refinement.alpha",
}
_PARTS = (
    (r"(weight|bias)", r"\1"),
    (r"(branch\d)\.conv\.(weight|bias)", r"\1.\2"),
    (r"fusion\d\.conv\.(weight|bias)", r"fuse.\1"),
    (r"(theta|phi|g)\.(weight|bias)", r"\1.\2"),
    (r"W\.(weight|bias)", r"out.\1"),
)
_RULES = [(rf"{theirs}\.{a}", f"{ours}.{b}") for theirs, ours in _MODULES.items() for a, b in _PARTS]


def read(state: State, **config: Any) -> DeepGIN:
    """lr_coarse_tinker.<place>, r_en_*, r_md_*, r_de_*; branches of a pyramid and theta, phi, g one by one."""
    first = "lr_coarse_tinker.1.weight"
    fits = first in state and state[first].dim() == 4
    require(fits, "checkpoint", f"a gin generator with a 4-dimensional {first}", "another one")
    renamed = rename(state, _RULES)
    for module in _MODULES.values():
        stack(
            renamed,
            f"{module}.",
            [f"branch{i + 1}" for i in range(8 if "coarse" in module else 4)],
            f"{module}.pyramid",
        )
        stack(renamed, f"{module}.", ("theta", "phi", "g"), f"{module}.qkv")
    model = DeepGIN(width=2 * state[first].size(0), **config)
    fill(model.net, *renamed)
    return model


def read_discriminator(state: State, **config: Any) -> DeepGINDiscriminator:
    """layer<i>.<place>.module.(bias, weight_bar, weight_u, weight_v), the last layer being that of the full scale."""
    scales = len({key.split(".")[0] for key in state if key.startswith("layer")})
    first = "layer0.0.module.bias"
    require(first in state, "checkpoint", f"a gin discriminator with {first}", "another one")
    rules = []
    for i in range(scales):
        theirs, ours = rf"layer{i}\.(\d)\.module", rf"scales.{scales - 1 - i}.\1"
        rules += [
            (rf"{theirs}\.bias", f"{ours}.bias"),
            (rf"{theirs}\.weight_bar", f"{ours}.weight"),
            (rf"{theirs}\.(weight_[uv])", rf"{ours}.\2"),
        ]
    model = DeepGINDiscriminator(scales, state[first].numel(), **config)
    fill(model.net, *rename(state, rules))
    return model


SOURCES = (
    Source("gin", "deepgin", "generator", re.compile(r"lr_coarse_tinker\.\d+\.weight"), read),
    Source("gin", "deepgin", "discriminator", re.compile(r"layer\d\.\d\.module\.weight_bar"), read_discriminator),
)
