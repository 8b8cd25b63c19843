# SPDX-License-Identifier: Apache-2.0
"""What the readers of published checkpoints share."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]


class Source(NamedTuple):
    """One kind of published file."""

    name: str  # load_published's `source`
    key: str  # of the model
    part: str  # "generator" or "discriminator"
    mark: re.Pattern[str]  # of a key that only this kind has
    read: Callable[..., nn.Module]  # (state, **config) -> InpaintingModel or Discriminator

    def made(self, state: State) -> bool:
        return any(self.mark.fullmatch(k) for k in state)


def require(holds: bool, argument: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"load_published: {argument} must be {expected}, got {got}")


def fill(module: nn.Module, state: State, names: Mapping[str, str] | None = None) -> None:
    """Copy `state` into the module; `names` maps the module's keys to the file's, for the message."""
    names = names or {}
    own = module.state_dict()
    # Files of before batch norm counted its batches lack the count; it only matters to a cumulative average.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    shaped = [k for k in own if k in state and own[k].shape != state[k].shape]
    told = [f"missing {names.get(k, k)}" for k in missing[:1]] + [
        f"unexpected {names.get(k, k)}" for k in unexpected[:1]
    ]
    told += [f"{names.get(k, k)} of {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in shaped[:1]]
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(shaped)} mis-shaped"
    require(not told, "checkpoint", "a state dict of this network", f"{'; '.join(told)} ({counts})")
    if any(v.dtype == torch.float64 for v in state.values()):
        module.double()
    module.load_state_dict(dict(state), strict=False)


class Renamed(NamedTuple):
    """A state under the module's names, and the file's name of each."""

    state: dict[str, Tensor]
    names: dict[str, str]


def rename(state: State, rules: Iterable[tuple[str, str]]) -> Renamed:
    """Each key by the first rule (pattern of the whole key, replacement) that matches it; others keep their name."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    found = Renamed({}, {})
    for name, value in state.items():
        own = name
        for pattern, replacement in compiled:
            match = pattern.fullmatch(name)
            if match:
                own = match.expand(replacement)
                break
        found.state[own], found.names[own] = value, name
    return found


def stack(renamed: Renamed, prefix: str, parts: Iterable[str], to: str) -> None:
    """Join `<prefix><part>.weight` and `.bias` of all parts, along the outputs, to `<to>.weight` and `<to>.bias`.

    A part that is missing leaves all of them as they are, for the message.
    """
    for kind in ("weight", "bias"):
        keys = [f"{prefix}{part}.{kind}" for part in parts]
        if all(key in renamed.state for key in keys):
            renamed.state[f"{to}.{kind}"] = torch.cat([renamed.state.pop(key) for key in keys])
            renamed.names[f"{to}.{kind}"] = renamed.names[keys[0]]


# Of torch's former spectral norm, whose weight_u and weight_v are named as ours.
SPECTRAL = ((r"(.+)\.weight_orig", r"\1.weight"),)


def unwrap(given: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """The state dict inside of what a file held: training files keep it under one of `names`."""
    for name in names:
        if isinstance(given.get(name), Mapping):
            return unwrap(given[name], names)
    tensors = {k.removeprefix("module."): v for k, v in given.items() if isinstance(v, Tensor)}
    require(bool(tensors), "checkpoint", "a mapping of names to tensors", some(given))
    return tensors


def some(state: Mapping[str, Any]) -> str:
    return f"keys such as {', '.join(list(state)[:3])}" if state else "no keys"
