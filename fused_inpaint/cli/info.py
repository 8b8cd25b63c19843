# SPDX-License-Identifier: Apache-2.0
"""`fused-inpaint info`: versions, backends, how it was built, and the processor."""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    verb = verbs.add_parser("info", help="versions, backends and why one is missing, how it was built")
    verb.add_argument("--json", action="store_true", help="one JSON object")
    verb.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2, default=str))
        return
    for title, section in facts.items():
        print(title)
        for key, value in section.items():
            print(f"  {key:<16} {_plain(value)}")


def collect() -> dict[str, dict[str, Any]]:
    import torch

    from .. import __version__, _backends, _extension

    versions = {"fused_inpaint": __version__, "python": platform.python_version(), "torch": torch.__version__}
    # Read from package metadata: importing Triton looks for a GPU driver.
    versions |= {name: version(name) for name in ("numpy", "triton", "scikit-image", "pillow")}
    backends = {name: reason or "usable" for name, reason in _backends.status().items()}
    try:
        _backends.require_runnable()
        backends["selected"] = _backends.current()
    except (ValueError, _backends.NoBackendError) as error:
        backends["selected"] = f"none: FUSED_INPAINT_BACKEND: {error}"
    machine = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    return {"versions": versions, "backends": backends, "build": _extension.build_info(), "machine": machine}


def version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)
