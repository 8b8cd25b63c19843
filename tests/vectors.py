# SPDX-License-Identifier: Apache-2.0
"""Reader for the recorded outputs of published implementations in ../shared/vectors; their README defines all of it."""

import functools
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

FOLDER = Path(os.environ.get("FUSED_INPAINT_VECTORS", Path(__file__).parents[2] / "shared" / "vectors"))
ABSENT = None if FOLDER.is_dir() else "../shared/vectors is absent (FUSED_INPAINT_VECTORS names another folder)"


@functools.cache
def meta(name: str) -> dict[str, Any]:
    """The configuration beside the arrays; skips the calling test when the vectors are absent."""
    if ABSENT:
        pytest.skip(ABSENT)
    return json.loads((FOLDER / f"{name}.json").read_text())


@functools.cache
def load(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(configuration, arrays named "<case id>.<field>"); skips the calling test when the vectors are absent."""
    configuration = meta(name)
    with np.load(FOLDER / f"{name}.npz") as archive:
        return configuration, {key: archive[key] for key in archive.files}


def cases(name: str) -> list[Any]:
    """The cases of one file as pytest parameters, or a single skipped one that says why there are none."""
    if ABSENT:
        return [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=ABSENT))]
    return [pytest.param(case, id=case["id"]) for case in meta(name)["cases"]]


def tensors(name: str, case: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All arrays of one case, by field, as tensors of `dtype`."""
    prefix = case["id"] + "."
    arrays = load(name)[1]
    return {
        key.removeprefix(prefix): torch.from_numpy(value).to(dtype)
        for key, value in arrays.items()
        if key.startswith(prefix)
    }


def tolerance(case: dict[str, Any], field: str, dtype: torch.dtype = torch.float32) -> float:
    """Largest allowed absolute difference: tol64 for float64, tol32 for float32."""
    return case["check"][field]["tol64" if dtype == torch.float64 else "tol32"]


def assert_close(actual: Tensor, expected: Tensor, case: dict[str, Any], field: str) -> None:
    """Compare with a stored result within the case's own tolerance for the dtype of `actual`; masks must be equal."""
    assert actual.shape == expected.shape, f"{field}: shape {tuple(actual.shape)}, recorded {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    limit = 0.0 if "mask" in field else tolerance(case, field, actual.dtype)
    assert error <= limit, f"{field}: differs by {error:.3g}, allowed {limit:.3g}"


def _splitmix64(state: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser on uint64, where overflow wraps."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return state ^ (state >> np.uint64(31))


def fill_tensor(key: str, shape: tuple[int, ...], set_seed: int, hwio: bool = False) -> np.ndarray:
    """The float64 values that stand for the parameter `key`: a function of its name, its shape and the case's seed.

    hwio: TensorFlow's kernel order, where the fan-in is the product of all dimensions but the last.
    """
    count = math.prod(shape)
    seed = np.uint64(zlib.crc32(key.encode()) << 32 ^ set_seed)
    weyl = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    unit = (_splitmix64(weyl + seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53  # in [0, 1)
    centred = 2.0 * unit - 1.0
    power_vector = key.endswith(("weight_u", "weight_v")) or (hwio and key.endswith("u") and shape[0] == 1)
    if key.endswith("running_var"):
        values = 0.5 + unit
    elif power_vector:
        values = centred / np.linalg.norm(centred)
    elif len(shape) < 2:
        values = 0.1 * centred
    else:
        fan_in = math.prod(shape[:-1] if hwio else shape[1:])
        values = centred * math.sqrt(3.0 / fan_in)
    return values.reshape(shape)


def state(network: dict[str, Any], set_seed: int) -> dict[str, Tensor]:
    """The float32 state dict of one of a file's "networks" or "blocks", under the published names.

    Entries that the network keeps as they are built (`untouched`: batch counters) are left out.
    """
    hwio = network.get("layout") == "HWIO"
    filled = {}
    for key, shape in network["keys"].items():
        if key in network["untouched"]:
            continue
        multiply, add = network["adjust"].get(key, (1.0, 0.0))
        values = np.ones(shape) if key in network["ones"] else None
        if values is None:
            values = add + multiply * fill_tensor(key, tuple(shape), set_seed, hwio)
        filled[key] = torch.from_numpy(values.astype(np.float32))
    return filled


def naoto_names(filled: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The published U-Net's parameters under our names: enc_1.. -> encoder.0.., dec_<levels>..dec_1 -> decoder.0.."""
    renamed = {}
    for key, value in filled.items():
        block, part, *rest = key.split(".")
        side, number = block.split("_")
        if rest[0] == "mask_conv":
            continue
        index = int(number) - 1 if side == "enc" else levels - int(number)
        tail = ["conv", *rest[1:]] if part == "conv" else ["norm", *rest]
        renamed[".".join(["encoder" if side == "enc" else "decoder", str(index), *tail])] = value
    return renamed
