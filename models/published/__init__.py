# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints, under their own key names: one file for each source."""

import zipfile
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from torch import nn

from ..files import read_safetensors
from ..registry import DISCRIMINATORS, MODELS
from . import aot_gan, gin, mmagic, naoto0804, own, region_wise, rn
from .common import Source, State, require, some, unwrap

SOURCES: tuple[Source, ...] = tuple(
    source for file in (naoto0804, rn, region_wise, gin, aot_gan, mmagic) for source in file.SOURCES
)

# Where training files keep the network.
_WRAPPED = {
    "generator": ("model", "state_dict", "net", "generator", "netG"),
    "discriminator": ("model", "state_dict", "net", "discriminator", "netD"),
}


def load_published(
    key: str,
    path_or_state_dict: str | PathLike[str] | State | Mapping[str, np.ndarray],
    source: str | None = None,
    part: str = "generator",
    **config: Any,
) -> Any:
    """Build a network from a published checkpoint, or from one that this library saved.

    Args:
        key: of the network, as in `build_model`.
        path_or_state_dict: a .safetensors file, a .npz of arrays, a torch file (read with weights_only=True), or a
            state dict (of tensors, or of arrays). Training files that keep the network under "model", "state_dict",
            "net", "generator" or "discriminator" are looked through.
        source: whose file it is, guessed from the keys when None: "naoto0804" (pconv; weights without the factor
            sum(1)), "rn" (cgan_pc_rn: its variant "rn", both parts), "region-wise" (region_wise; TensorFlow variables,
            a .npz or dict of arrays), "gin" (deepgin), "aot-gan" (aot_gan; the authors' G*.pt and D*.pt), "mmagic"
            (aot_gan; of both parts or of one), or "fused_inpaint".
        part: "generator" or "discriminator".
        config: what no checkpoint records, as in `build_model`: upsampling="bilinear" where the file was trained so,
            threshold, stats, rates.

    Returns:
        The `InpaintingModel` or `Discriminator` in eval mode, float32 (float64 if the file is); its `.net` is called as
        the published module is.

    Raises:
        ValueError: an unknown key, source or part, a file that is not a checkpoint, or keys and shapes that do not fit
            (the first missing, unexpected and mis-shaped ones are named).

    >>> from fused_inpaint.models import build_model, load_published
    >>> load_published("pconv", build_model("pconv", levels=3, width=8).state_dict()).net.levels
    3
    """
    require(key in MODELS, "key", "one of " + ", ".join(MODELS), key)
    parts = ("generator", "discriminator") if key in DISCRIMINATORS else ("generator",)
    require(part in parts, "part", " or ".join(parts), part)
    given, recorded = _read(path_or_state_dict)
    state = unwrap(given, _WRAPPED[part])
    if recorded:
        require(recorded["key"] == key, "key", f"that of the file, {recorded['key']}", key)
        require(recorded["part"] == part, "part", f"that of the file, {recorded['part']}", part)
        source, config = source or own.NAME, {**recorded["config"], **config}
    sources = {s.name: s for s in SOURCES if (s.key, s.part) == (key, part)}
    names = [*sources, own.NAME]
    if source is None:
        source = next((s.name for s in sources.values() if s.made(state)), None)
        if source is None:
            ours = ("net.", *_own_names(key, part))
            known = any(k.startswith(ours) for k in state)
            require(known, "checkpoint", f"one of a known source ({', '.join(names)})", some(state))
            source = own.NAME
    require(source in names, "source", "one of " + ", ".join(names), source)
    model = sources[source].read(state, **config) if source in sources else own.read(key, part, state, **config)
    return model.eval()


def key_of(path: str | PathLike[str], source: str | None = None, part: str = "generator") -> str | None:
    """The key of the network that a file holds: as this library recorded it, or of the source that has such names.

    None if neither tells. Raises ValueError for a file that is no checkpoint.
    """
    given, recorded = _read(path)
    if recorded:
        return str(recorded["key"])
    state = unwrap(given, _WRAPPED[part])
    fits = (s for s in SOURCES if s.part == part and source in (None, s.name))
    return next((s.key for s in fits if source or s.made(state)), None)


def _own_names(key: str, part: str) -> tuple[str, ...]:
    """The first words of the keys of a network that this library builds."""
    with torch.device("meta"):
        model: nn.Module = (MODELS if part == "generator" else DISCRIMINATORS)[key]().net
    return tuple({f"{k.split('.')[0]}." for k in model.state_dict()})


SUFFIXES = ".pth, .safetensors, .npz"


def _read(given: str | PathLike[str] | Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """(what the file holds, what this library recorded in it about the network)"""
    if isinstance(given, Mapping):
        return _tensors(given), {}
    path = fspath(given)
    try:
        if path.endswith(".safetensors"):
            return read_safetensors(path)
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as arrays:
                return _tensors(dict(arrays)), {}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"load_published: path must be an existing file, got {path}") from None
    except Exception as error:  # whatever the readers raise, the cause stays attached
        what = "checkpoint of nothing but tensors" if _is_pickled(path) else f"whole checkpoint ({SUFFIXES})"
        raise ValueError(f"load_published: path must be a {what}, got {path}") from error
    require(isinstance(loaded, Mapping), "path", "a checkpoint with a state dict", type(loaded).__name__)
    if {"step", "key", "model", "optimiser"} <= loaded.keys():
        raise ValueError(
            f"load_published: path must be a network's weights, got a state of its training in {path}; "
            "model.safetensors beside it, written at the end, has them"
        )
    return loaded, {}


def _is_pickled(path: str) -> bool:
    """Whether it is a file of torch.save, a whole zip archive or as it was before."""
    try:
        with open(path, "rb") as file:
            return zipfile.is_zipfile(file) or (file.seek(0) == 0 and file.read(1) == b"\x80")
    except OSError:  # a folder
        return False


def _tensors(given: Mapping[str, Any]) -> dict[str, Any]:
    return {k: torch.from_numpy(np.array(v)) if isinstance(v, np.ndarray) else v for k, v in given.items()}
