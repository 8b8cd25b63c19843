# SPDX-License-Identifier: Apache-2.0
"""Derivatives by an operator's reference, where its own kernels do not serve."""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _backends


def wants_graph() -> bool:
    # Only create_graph=True runs a backward with grad mode on in eager mode; tracing a compiled backward does so too,
    # but differentiates it no further.
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def has_kernels(t: Tensor) -> bool:
    """Whether the compiled library has kernels for a tensor: it may be missing while Triton has a forward, and on a
    CPU it has none for float16."""
    device = t.device.type
    return _backends.native(device) and (t.dtype != torch.float16 or device == _backends.DEVICE["cuda"])


def by_reference(forward: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """Gradients of `forward(*inputs)`, None for an input without one; differentiable if a graph is wanted, so that
    second derivatives are autograd's own."""
    graph = wants_graph()
    # The forward was computed in these types, whatever autocast is in force now.
    autocast = contextlib.nullcontext() if grad.is_meta else torch.autocast(grad.device.type, enabled=False)
    with torch.enable_grad(), autocast:
        # Stand-ins: saved tensors may depend on each other, and on this path nothing may be counted that their own
        # backward counts again.
        leaves = [None if t is None else t.view_as(t) for t in inputs]
        output = forward(*leaves)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=graph, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in leaves]
