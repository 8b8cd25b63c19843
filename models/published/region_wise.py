# SPDX-License-Identifier: Apache-2.0
"""Region-wise inpainting, the authors' TensorFlow variables."""

import re
from typing import Any

import torch.nn.functional as F

from ..region_wise import RegionWise, RegionWiseDiscriminator
from .common import Renamed, Source, State, fill, rename, require

_GENERATOR, _DISCRIMINATOR = "inpaint_net", "discriminator"

# Layers are conv<number>, conv<number>_atrous and the like; the region-wise ones com_<number>_fusion.
_LAYERS = tuple(
    (rf"{theirs}/(?:conv|com_)(\d+)(?:_[a-z]+)?(?:_1)?/{values}(?::0)?", rf"{ours}.conv\1.{name}")
    for theirs, ours in (("inpaint_net", "inferring"), ("inpaint_net_1", "perceiving"))
    for values, name in (("kernel", "weight"), ("bias", "bias"))
)
_DISCRIMINATOR_LAYERS = tuple(
    (rf"discriminator/d_conv{i + 1}{theirs}(?::0)?", f"convs.{i}.{ours}")
    for i in range(6)
    for theirs, ours in (("_w", "weight"), ("u", "weight_u"), ("_bias", "bias"))
)


def read_generator(state: State, **config: Any) -> RegionWise:
    """inpaint_net/<layer>/kernel and bias of the first network, inpaint_net_1/... of the second."""
    renamed = _renamed(state, _GENERATOR, _LAYERS)
    model = RegionWise(_width(renamed, "inferring.conv1.weight", "inpaint_net/conv1_1/kernel"), **config)
    fill(model.net, *renamed)
    return model


def read_discriminator(state: State, **config: Any) -> RegionWiseDiscriminator:
    """discriminator/d_conv<i>_w, d_conv<i>_bias, and d_conv<i>u of the spectral norm."""
    renamed = _renamed(state, _DISCRIMINATOR, _DISCRIMINATOR_LAYERS)
    model = RegionWiseDiscriminator(_width(renamed, "convs.0.weight", "discriminator/d_conv1_w"), **config)
    for i in range(6):
        weight, u = (renamed.state.get(f"convs.{i}.{name}") for name in ("weight", "weight_u"))
        if weight is not None and u is not None and u.numel() == weight.size(0):
            renamed.state[f"convs.{i}.weight_u"] = u.flatten()
            # Not in the file: the next step makes it of u.
            renamed.state[f"convs.{i}.weight_v"] = F.normalize(weight.flatten(1).T @ u.flatten(), dim=0)
    fill(model.net, *renamed)
    return model


def _renamed(state: State, scope: str, rules: tuple[tuple[str, str], ...]) -> Renamed:
    """This part's variables, kernels as (O, C, kh, kw) from (kh, kw, C, O). A file of training holds the other part
    and the optimiser's variables beside them."""
    ours = {k: v for k, v in state.items() if k.startswith(scope) and not re.search(r"/Adam(_1)?(:0)?$", k)}
    renamed = rename(ours, rules)
    for name, value in renamed.state.items():
        if value.dim() == 4:
            renamed.state[name] = value.permute(3, 2, 0, 1)
    return renamed


def _width(renamed: Renamed, first: str, theirs: str) -> int:
    """Channels of the first layer."""
    weight = renamed.state.get(first)
    shape = "none" if weight is None else tuple(weight.shape)
    fits = weight is not None and weight.dim() == 4
    require(fits, "checkpoint", f"variables of region-wise inpainting with a 4-dimensional {theirs}", shape)
    assert weight is not None
    return weight.size(0)


SOURCES = (
    Source("region-wise", "region_wise", "generator", re.compile(r"inpaint_net/conv1_1/kernel(:0)?"), read_generator),
    Source(
        "region-wise",
        "region_wise",
        "discriminator",
        re.compile(r"discriminator/d_conv1_w(:0)?"),
        read_discriminator,
    ),
)
