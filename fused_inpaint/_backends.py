# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs: one list of candidates, each with the reason why it can't."""

import os
from types import TracebackType

import torch

from . import _extension

NAMES = ("auto", "reference", "cpu", "cuda", "triton")
_PRIORITY = ("cuda", "cpu", "reference")

_selected = os.environ.get("FUSED_INPAINT_BACKEND") or "auto"
# Read once: the loader is opaque to torch.compile, a string is not.
_native_error = _extension.native_error() or ""
_no_cuda = _native_error or _extension.without_cuda()

NEVER_RUN = {"cuda": "compiled, and tested in emulation on a CPU, but never run on a GPU yet"}


class NoBackendError(RuntimeError):
    """The backend that was asked for cannot run this call."""


class use_backend:
    """Select the implementation of every op: `"auto"`, `"reference"`, `"cpu"`, `"cuda"` or `"triton"`.

    Takes effect at once; as a context manager it puts the former choice back. A backend asked for by name never falls
    back: a call it can't run raises `NoBackendError` with the reason. The choice is the whole process's, all threads
    included. The environment variable FUSED_INPAINT_BACKEND sets it at import.

    >>> from fused_inpaint import use_backend
    >>> with use_backend("reference"):
    ...     pass
    """

    def __init__(self, name: str) -> None:
        global _selected
        _require_known(name)
        self._name, self._former = name, _selected
        _selected = name

    def __enter__(self) -> "use_backend":
        global _selected
        if _selected != self._name:  # entered again, after an exit
            self._former = _selected
            _selected = self._name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _selected
        _selected = self._former


def _require_known(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"use_backend: name must be one of {', '.join(NAMES)}, got {name}")


def _refusal(name: str, device: str) -> str:
    """Why backend `name` can't run a call on `device`; empty if it can."""
    if name == "reference":
        return ""
    if name == "cpu":
        return f"it runs on CPU tensors, these are on {device}" if device != "cpu" else _native_error
    if name == "cuda":
        return f"it runs on CUDA tensors, these are on {device}" if device != "cuda" else _no_cuda
    return f"this version of fused_inpaint has no {name} kernels"


def choose(op: str, device: str) -> str:
    """The backend for one call of `op` on tensors of a device type."""
    if _selected == "auto":
        for name in _PRIORITY:
            if not _refusal(name, device):
                return name
    _require_known(_selected)
    reason = _refusal(_selected, device)
    if reason:
        raise NoBackendError(f"{op}: backend must be able to run this call, got {_selected}: {reason}")
    return _selected


def require_runnable() -> None:
    """Raise now, in words, if the selected backend is unknown or can run on no tensor here."""
    _require_known(_selected)
    reason = "" if _selected == "auto" else status()[_selected]
    if reason:
        raise NoBackendError(f"backend must be able to run here, got {_selected}: {reason}")


def status() -> dict[str, str]:
    """Each backend and the reason why it can't run on this machine (empty if it can)."""
    device = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda", "reference": "cpu"}
    reasons = {name: _refusal(name, device[name]) for name in NAMES[1:]}
    if not reasons["cuda"] and not torch.cuda.is_available():
        reasons["cuda"] = "torch finds no GPU"
    return reasons
