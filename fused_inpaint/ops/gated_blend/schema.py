# SPDX-License-Identifier: Apache-2.0
"""Schemas, output shapes and derivatives of the gated blend (kernels: csrc/gated_blend, triton_impl.py).

Maps are (N, C, H, W) of one dtype. Beside the output come the gate's statistics for the derivative, (N, 3, C) in
float32 (float64 for float64): the mean, what rounding took from it, and std.
"""

from typing import Any

import torch
from torch import Tensor

from ..._library import define, implement_in_triton
from ..._library import ops as ops
from ..derivative import by_reference, wants_graph
from . import reference


def _like(t: Tensor, wanted: bool = True) -> Tensor:
    return torch.empty_like(t, memory_format=torch.channels_last) if wanted else t.new_empty(0)


def _fake(x: Tensor, f: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return _like(x), x.new_empty((x.size(0), 3, x.size(1)), dtype=wide)


def _backward_fake(grad, x, f, gate, statistics, *needs):  # type: ignore[no-untyped-def]
    return tuple(_like(x, need) for need in needs)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    statistics = output[1]
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, statistics)


def _backward(suffix: str) -> Any:
    def backward(ctx: Any, grad: Tensor | None, _: None) -> Any:
        if grad is None:
            return None, None, None
        *maps, statistics = ctx.saved_tensors
        if wants_graph():
            return tuple(by_reference(reference.gated_blend, maps, grad))
        needs = ctx.needs_input_grad
        found = getattr(ops, f"gated_blend_backward{suffix}")(grad, *maps, statistics, *needs)
        return tuple(g if need else None for g, need in zip(found, needs, strict=True))

    return backward


for suffix in ("", "_triton"):
    define(
        f"gated_blend{suffix}(Tensor x, Tensor f, Tensor gate) -> (Tensor, Tensor)", _fake, _backward(suffix), _setup
    )
    define(
        f"gated_blend_backward{suffix}(Tensor grad, Tensor x, Tensor f, Tensor gate, Tensor statistics, bool need_x, "
        "bool need_f, bool need_gate) -> (Tensor, Tensor, Tensor)",
        _backward_fake,
    )

for name in ("gated_blend", "gated_blend_backward"):
    implement_in_triton(__package__, name)
