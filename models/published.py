# SPDX-License-Identifier: Apache-2.0
"""Readers for the published checkpoints, under their own key names."""

import re
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from .base import InpaintingModel
from .pconv import PConv

State = Mapping[str, Tensor]


def load_published(
    key: str,
    path_or_state_dict: str | PathLike[str] | State,
    source: str | None = None,
    part: str = "generator",
    **config: Any,
) -> InpaintingModel:
    """Build a network from a published checkpoint, or from one that this library saved.

    Args:
        key: "pconv".
        path_or_state_dict: a .safetensors file, a torch file (read with weights_only=True), or a state dict. Training
            files that keep the network under "model", "state_dict" or "net" are looked through.
        source: "naoto0804" (the common PyTorch port of the PConv U-Net: 5 to 7 levels, weights without the factor
            sum(1)) or "fused_inpaint"; guessed from the keys when None.
        part: "generator"; the PConv paper has no discriminator.
        config: what no checkpoint records, as in `build_model`: upsampling="bilinear" where the file was trained so.

    Returns:
        The model in eval mode, float32 (float64 if the file is); `model.net` is called as the published module is.

    Raises:
        ValueError: an unknown key, source or part, a file that is not a checkpoint, or keys and shapes that do not fit
            (the first missing, unexpected and mis-shaped ones are named).

    >>> from fused_inpaint.models import build_model, load_published
    >>> load_published("pconv", build_model("pconv", levels=3, width=8).state_dict()).net.levels
    3
    """
    _require(key in _READERS, "key", "one of " + ", ".join(_READERS), key)
    _require(part == "generator", "part", "generator", part)
    state = _unwrap(_read(path_or_state_dict))
    readers = _READERS[key]
    if source is None:
        source = next((name for name, (mark, _) in readers.items() if any(mark.search(k) for k in state)), None)
        _require(source is not None, "checkpoint", f"one of a known source ({', '.join(readers)})", _some(state))
    _require(source in readers, "source", "one of " + ", ".join(readers), source)
    assert source is not None
    return readers[source][1](state, **config).eval()


def _read(given: str | PathLike[str] | State) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        return given
    path = fspath(given)
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"load_published: path must be an existing file, got {path}") from None
    except Exception as error:  # whatever the two readers raise, the cause stays attached
        raise ValueError(f"load_published: path must be a checkpoint of nothing but tensors, got {path}") from error
    _require(isinstance(loaded, Mapping), "path", "a checkpoint with a state dict", type(loaded).__name__)
    return loaded


def _unwrap(state: Mapping[str, Any]) -> dict[str, Tensor]:
    for name in ("model", "state_dict", "net"):
        if isinstance(state.get(name), Mapping):
            return _unwrap(state[name])
    tensors = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    _require(bool(tensors), "checkpoint", "a mapping of names to tensors", _some(state))
    return tensors


def _load(model: torch.nn.Module, state: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Copy `state` into the model; `names` maps the model's keys to the file's, for the message."""
    own = model.state_dict()
    # Files of before batch norm counted its batches lack the count; it only matters to a cumulative average.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    shaped = [k for k in own if k in state and own[k].shape != state[k].shape]
    told = [f"missing {names.get(k, k)}" for k in missing[:1]] + [
        f"unexpected {names.get(k, k)}" for k in unexpected[:1]
    ]
    told += [f"{names.get(k, k)} of {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in shaped[:1]]
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(shaped)} mis-shaped"
    _require(not told, "checkpoint", "a state dict of this network", f"{'; '.join(told)} ({counts})")
    if any(v.dtype == torch.float64 for v in state.values()):
        model.double()
    model.load_state_dict(dict(state), strict=False)


def _sizes(state: State, first: str, levels: int, source: str) -> tuple[int, int]:
    """(channels, width) from the first convolution's weight."""
    weight = state.get(first)
    shape = "none" if weight is None else tuple(weight.shape)
    fits = weight is not None and weight.dim() == 4 and levels > 0
    _require(fits, "checkpoint", f"a {source} U-Net with a 4-dimensional {first}", shape)
    assert weight is not None
    return weight.size(1), weight.size(0)


def _read_own(state: State, **config: Any) -> PConv:
    state = {k.removeprefix("net."): v for k, v in state.items()}
    levels = len({k.split(".")[1] for k in state if k.startswith("encoder.")})
    channels, width = _sizes(state, "encoder.0.conv.weight", levels, "fused_inpaint")
    model = PConv(levels, channels, width, **config)
    _load(model.net, state, {})
    return model


def _read_naoto0804(state: State, **config: Any) -> PConv:
    """enc_<i>/dec_<i>.conv.input_conv, .conv.mask_conv (all ones) and .bn, i from 1, dec_1 last. Its layer divides by
    sum(M) without the factor sum(1), the number of weights of an output; here the weight is divided by that factor."""
    levels = len({k.split(".")[0] for k in state if k.startswith("enc_")})
    channels, width = _sizes(state, "enc_1.conv.input_conv.weight", levels, "naoto0804")
    renamed, names = {}, {}
    for name, value in state.items():
        if ".mask_conv." in name:
            continue
        match = re.fullmatch(r"(enc|dec)_(\d+)\.(.+)", name)
        if match is None:
            renamed[name] = value
            continue
        side, number, rest = match.groups()
        index = int(number) - 1 if side == "enc" else levels - int(number)
        rest = rest.replace("conv.input_conv.", "conv.").replace("bn.", "norm.")
        own = f"{'encoder' if side == 'enc' else 'decoder'}.{index}.{rest}"
        if rest == "conv.weight":
            # In half precision the quotient would lose digits that the model keeps.
            value = value.to(torch.promote_types(value.dtype, torch.float32)) / value[0].numel()
        renamed[own] = value
        names[own] = name
    model = PConv(levels, channels, width, **config)
    _load(model.net, renamed, names)
    return model


_READERS = {
    "pconv": {
        "naoto0804": (re.compile(r"^enc_1\.conv\.input_conv\.weight$"), _read_naoto0804),
        "fused_inpaint": (re.compile(r"^(net\.)?encoder\.0\.conv\.weight$"), _read_own),
    }
}


def _some(state: Mapping[str, Any]) -> str:
    return f"keys such as {', '.join(list(state)[:3])}" if state else "no keys"


def _require(holds: bool, argument: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"load_published: {argument} must be {expected}, got {got}")
