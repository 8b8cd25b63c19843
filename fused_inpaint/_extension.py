# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled library, once, and remembers why when it cannot.

Loading it registers its kernels with torch.ops. The library is built on torch's stable ABI, so it serves every torch
from `MIN_TORCH` on, whichever it was compiled with; other versions are named only to explain a failure.
"""

import ctypes
import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

MIN_TORCH = (2, 10)
# A library to load in place of the one that setup.py built: the tests' sanitized one, or their emulation of a GPU's.
LIBRARY = "FUSED_INPAINT_LIBRARY"
REBUILD = "pip install -e . --no-build-isolation"
_PACKAGE = Path(__file__).parent


def load() -> bool:
    """True if the compiled kernels are registered with torch.ops; the first call loads the library."""
    return _attempt()[0] is None


def native_error() -> str | None:
    """Why the compiled kernels are missing, as one sentence with its cure; None if they are there."""
    return _attempt()[0]


def without_cuda() -> str:
    """Why the library holds no CUDA kernels; empty if it does."""
    recorded = _recorded()
    if recorded["kind"] == "cuda" or emulated():
        return ""
    return f"the extension was built without CUDA: {recorded['reason']}"


def emulated() -> bool:
    """True if the library holds the GPU's kernels compiled for the CPU (tests/cuda_emulation)."""
    return bool(_attempt()[1].get("emulated"))


def build_info() -> dict[str, Any]:
    """What setup.py recorded (kind, requested, reason, torch, cuda, compiler, flags), what the library says of itself
    (`library_facts`, empty if it is not loaded) and `running_torch`."""
    return {**_recorded(), "library_facts": _attempt()[1], "running_torch": str(torch.__version__)}


def _recorded() -> dict[str, Any]:
    if library := os.environ.get(LIBRARY):
        reason = f"{LIBRARY} names another library"
        return {"kind": "replaced", "reason": reason, "torch": str(torch.__version__), "library": library}
    try:
        facts = dict(json.loads((_PACKAGE / "_build.json").read_text()))
        missing = {"kind", "reason", "torch", "library"} - facts.keys()
        if missing:
            raise ValueError(f"without {', '.join(sorted(missing))}")
        return facts
    except FileNotFoundError:
        return {"kind": "none", "reason": "it has not been built here"}
    except (OSError, ValueError, TypeError) as error:
        return {"kind": "none", "reason": f"the record {_PACKAGE / '_build.json'} cannot be read ({error})"}


@functools.cache
def _attempt() -> tuple[str | None, dict[str, Any]]:
    """(error or None, facts compiled into the library)."""
    recorded = _recorded()
    if recorded["kind"] == "none":
        return (
            f"fused_inpaint: no compiled extension: {recorded['reason']}; to build it, in the checkout: {REBUILD}",
            {},
        )

    built, running = recorded["torch"], str(torch.__version__)
    if _release(running) < MIN_TORCH:
        wanted = ".".join(map(str, MIN_TORCH))
        error = f"torch must be {wanted} or newer for the extension, built with torch {built}, got {running}"
        return f"fused_inpaint: {error}; upgrade torch, then rebuild in the checkout: {REBUILD}", {}
    try:
        library = ctypes.CDLL(str(_PACKAGE / recorded["library"]))
        describe = library.fused_inpaint_build_facts
    except (OSError, AttributeError) as failure:
        error = f"the extension, built with torch {built}, does not load with torch {running}"
        return f"fused_inpaint: {error} ({str(failure).splitlines()[0]}); rebuild it in the checkout: {REBUILD}", {}
    describe.restype = ctypes.c_char_p
    return None, dict(json.loads(describe()))


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])
