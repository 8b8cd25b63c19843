# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs a layer: two tables, by size and dtype, and one list of what each kernel refuses.

routes.json: the form of the decoder's convolution on the CPU, measured by benchmarks/tune_routes.py. gpu_routes.json:
the kernel of a layer on the GPU; the first rule that fits wins, and without one it is the vendor's convolution.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import _backends


def _table(name: str) -> dict[str, Any]:
    return dict(json.loads(Path(__file__).with_name(name).read_text()))


_NEVER = 2**62
_BACKEND = {"direct": "cuda", "triton": "triton"}
_GPU = _table("gpu_routes.json")
_FOLD_FROM: dict[str, int] = {**_table("routes.json")["fold_from_pixels"], "gpu": _GPU["fold_from_pixels"]}
_LAYERS = [
    (rule["kernel"], [getattr(torch, name) for name in rule["dtypes"]], rule["at_most"], rule.get("where", {}))
    for rule in _GPU["layers"]
]


class Call(NamedTuple):
    """What the choice depends on."""

    device: str
    dtype: torch.dtype
    sources: int
    channels: int  # of all sources
    outputs: int
    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    groups: int
    rows: int  # output pixels, batch included
    upsampled: bool  # one of the sources
    batch_statistics: bool
    folded: bool  # asked for by name

    @property
    def products(self) -> int:
        return self.rows * self.outputs * self.channels // self.groups * self.kernel[0] * self.kernel[1]


def refusal(kernel: str, call: Call) -> str:
    """Why "direct" or "triton" can't run a call; empty if it can. "vendor" and "reference" run all of them."""
    if kernel not in ("direct", "triton"):
        return ""
    if call.dtype == torch.float64:
        return "it computes in float32, not float64"
    if call.sources > 2:
        return f"it takes one or two sources, got {call.sources}"
    if kernel == "triton":
        return ""
    if call.channels > 4 and call.outputs > 4:
        return "it is for at most 4 input or output channels"
    if call.groups > 1:
        return "it has no groups"
    if call.folded:
        return "it does not fold the upsampling into the kernel"
    span = [(k - 1) * d + 1 for k, d in zip(call.kernel, call.dilation, strict=True)]
    if max(call.kernel) > 7 or max(span) > 16 or max(call.stride) > 2:
        return "it takes kernels up to 7 x 7 that span up to 16 pixels, and strides of 1 or 2"
    return ""


def choose(op: str, call: Call, selected: str | None = None) -> str:
    """The kernel for a call: "vendor" (of the cpu and cuda backends), "direct" (of cuda), "triton" or "reference"."""
    wanted = _wanted(call)
    prefer = [_BACKEND[kernel] for kernel in wanted]
    backend = _backends.choose(op, call.device, prefer, lambda name: refusal(name, call), selected)
    for kernel in wanted:
        if _BACKEND[kernel] == backend:
            return kernel
    return "vendor" if backend in ("cpu", "cuda") else backend


def _wanted(call: Call) -> list[str]:
    """The table's kernels for a call on the GPU, the best one first."""
    if call.device != _backends.DEVICE["cuda"] or call.batch_statistics:  # statistics are the vendor route's
        return []
    # A graph compiled or exported for sizes that may change must not depend on them.
    sizes = set() if torch.compiler.is_compiling() else {"rows", "products"}
    return [
        kernel
        for kernel, dtypes, bounds, where in _LAYERS
        if call.dtype in dtypes
        and all(getattr(call, name) == value for name, value in where.items())
        and all(name in ("channels", "outputs") or name in sizes for name in bounds)
        and all(getattr(call, name) <= bound for name, bound in bounds.items())
        and not refusal(kernel, call)
    ]


def fold_from(mode: str, forced: bool | None = None) -> int:
    """From how many low-resolution pixels on (batch included) the upsample is folded into the kernel.

    The folded form does 4/9 of the work on the upsampled channels but streams 16/9 of their weights and folds them
    first, which small maps do not repay. `mode` is "plain", "packed" (weights folded and laid out beforehand), both on
    the CPU, or "gpu"; `forced` overrules the table.
    """
    if forced is None:
        return _FOLD_FROM[mode]
    return 0 if forced else _NEVER
