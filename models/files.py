# SPDX-License-Identifier: Apache-2.0
"""Networks on disk: safetensors, with what built the network in the file's own metadata."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

_ENTRY = "fused_inpaint"


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, {"key", "part", "config"} if this library wrote the file, else {})"""
    from safetensors import safe_open

    with safe_open(os.fspath(path), framework="pt") as file:
        metadata = file.metadata() or {}
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata.get(_ENTRY, "{}"))  # noqa: SIM118


def write_safetensors(path: str | os.PathLike[str], state: dict[str, Tensor], about: dict[str, Any]) -> None:
    """The file appears whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # safetensors makes a file that is its owner's alone
        save_file(tensors, str(partial), metadata={_ENTRY: json.dumps(about), "format": "pt"})
        partial.chmod(mode)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
