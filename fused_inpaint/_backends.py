# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs: one list of candidates, each with the reason why it can't."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from types import TracebackType

import torch

from . import _extension

NAMES = ("auto", "reference", "cpu", "cuda", "triton")
_PRIORITY = ("cuda", "cpu", "triton", "reference")

_selected = os.environ.get("FUSED_INPAINT_BACKEND") or "auto"
# Read once: the loader is opaque to torch.compile, a string is not.
_native_error = _extension.native_error() or ""
_emulated = _extension.emulated()
_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _without_triton() -> str:
    # Found, not imported: importing it looks for a GPU driver.
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed (pip install 'fused-inpaint[triton]')"
    if not (
        _interpreted or any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang", "cc") if name)
    ):
        return "Triton needs a C compiler, and none is on PATH"
    return ""


# Where each backend's tensors live. Tests run the GPU's kernels on the CPU.
DEVICE = {
    "reference": "cpu",
    "cpu": "cpu",
    "cuda": "cpu" if _emulated else "cuda",
    "triton": "cpu" if _interpreted else "cuda",
}
_MISSING = {
    "reference": "",
    "cpu": _native_error or ("the library in place of the extension emulates the GPU's kernels" if _emulated else ""),
    "cuda": _native_error or _extension.without_cuda(),
    "triton": _without_triton(),
}


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


def _runs(name: str, device: str) -> bool:
    """Whether `_refusal` is empty, in a fraction of the time that its words take."""
    return not _MISSING[name] and (name == "reference" or device == DEVICE[name])


def _refusal(name: str, device: str) -> str:
    """Why backend `name` can't run any call on `device`; empty if it can."""
    if name != "reference" and device != DEVICE[name]:
        return f"it runs on {DEVICE[name].upper()} tensors, these are on {device}"
    return _MISSING[name]


def current() -> str:
    """The choice in force. Under torch.jit.trace `"auto"` is the reference: TorchScript does not run every operator,
    and what is traced needs nothing but torch then."""
    return "reference" if _selected == "auto" and torch.jit.is_tracing() else _selected  # type: ignore[attr-defined]


def choose(
    op: str,
    device: str,
    prefer: Sequence[str] = (),
    refusal: Callable[[str], str] = lambda name: "",
    selected: str | None = None,
) -> str:
    """The backend for one call of `op` on tensors of a device type.

    `prefer`: backends that are faster for this call than the usual order says. `refusal`: why a backend that runs here
    can't run this call; empty if it can. `selected`: by `use_backend`, if not what it is now.
    """
    if selected is None:
        selected = current()  # read once: another thread may select another
    if selected == "auto":
        for name in (*prefer, *_PRIORITY):
            if _runs(name, device) and not refusal(name):
                return name
    _require_known(selected)
    reason = _refusal(selected, device) or refusal(selected)
    if reason:
        raise NoBackendError(f"{op}: backend must be able to run this call, got {selected}: {reason}")
    return selected


def chosen(name: str, device: str) -> bool:
    """Whether backend `name` is the selected one, or may be chosen, and runs on a device type."""
    return current() in ("auto", name) and _runs(name, device)


def native(device: str) -> bool:
    """Whether the compiled library has kernels for tensors of a device type."""
    return _runs("cuda", device) or _runs("cpu", device)


def require_runnable() -> None:
    """Raise now, in words, if the selected backend is unknown or can run on no tensor here."""
    _require_known(_selected)
    reason = "" if _selected == "auto" else status()[_selected]
    if reason:
        raise NoBackendError(f"backend must be able to run here, got {_selected}: {reason}")


def status() -> dict[str, str]:
    """Each backend and the reason why it can't run on this machine (empty if it can)."""
    reasons = {name: _MISSING[name] for name in NAMES[1:]}
    for name in reasons:
        if DEVICE[name] == "cuda" and not reasons[name] and not torch.cuda.is_available():
            reasons[name] = "torch finds no GPU"
    return reasons
