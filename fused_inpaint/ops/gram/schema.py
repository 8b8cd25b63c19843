# SPDX-License-Identifier: Apache-2.0
"""Schemas, output shapes and derivatives of the L1 distance of Gram matrices (kernels: tiles.py, triton_impl.py).

With D = X X^T - Y Y^T and g the gradient of sum |D|, X gets 2 g sign(D) X and Y the same with the other sign. Over
channels the forward keeps sign(D), which is small; over positions it keeps the products, formed tile by tile.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._library import define, implement, implement_in_triton
from ..._library import ops as ops
from ..derivative import by_reference, wants_graph
from ..flops import operations
from . import reference, tiles


def _channels_fake(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    n, c = a.shape[:2]
    return a.new_empty(n, dtype=tiles.wide_type(a)), a.new_empty((n, c, c), dtype=torch.int8)


def _positions_fake(a: Tensor, b: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor, Tensor]:
    sums = a.new_empty(a.size(0), dtype=tiles.wide_type(a))
    return sums, tiles.product_like(a, need_a), tiles.product_like(b, need_b)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    # Else zeros as large as the maps would come with the sums' gradient.
    ctx.set_materialize_grads(False)


def _by_reference(a: Tensor, b: Tensor, grad: Tensor, positions: bool) -> list[Tensor | None]:
    return by_reference(lambda x, y: reference.gram_l1(x, y, positions), [a, b], grad)


def _channels_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    a, b, sign = ctx.saved_tensors
    if grad is None:
        return None, None
    if wants_graph():
        found = _by_reference(a, b, grad, False)
        return found[0], found[1]

    def gradient(t: Tensor, factor: int) -> Tensor:
        weight = (factor * grad).view(-1, 1, 1) * sign
        with torch.autocast(t.device.type, enabled=False):
            product = torch.bmm(tiles.features(t).to(weight.dtype), weight)  # (N, H W, C)
        return product.to(t.dtype).mT.unflatten(2, t.shape[2:])

    need_a, need_b = ctx.needs_input_grad
    return gradient(a, 2) if need_a else None, gradient(b, -2) if need_b else None


def _positions_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    a, b, *products = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    found: list[Tensor | None] = [None, None]
    if grad is None:
        return *found, None, None
    if wants_graph() or any(need and p.dim() == 1 for need, p in zip(needs, products, strict=True)):
        found = _by_reference(a, b, grad, True)
    else:
        for i, factor in enumerate((2, -2)):
            if needs[i]:
                found[i] = (products[i] * (factor * grad).view(-1, 1, 1, 1)).to(a.dtype)
    return *found, None, None


def _channels_flops(given: dict[str, Any], _: Any) -> int:
    n, c, h, w = given["a"].shape
    return 2 * operations(n, c, c, h * w)


def _positions_flops(given: dict[str, Any], _: Any) -> int:
    n, c, h, w = given["a"].shape
    return (2 + given["need_a"] + given["need_b"]) * operations(n, h * w, h * w, c)


define(
    "gram_l1_channels(Tensor a, Tensor b) -> (Tensor, Tensor)",
    _channels_fake,
    _channels_backward,
    _setup,
    _channels_flops,
)
for suffix in ("", "_triton"):
    define(
        f"gram_l1_positions{suffix}(Tensor a, Tensor b, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
        _positions_fake,
        _positions_backward,
        _setup,
        _positions_flops,
    )

kernels: tuple[Callable[..., Any], ...] = (tiles.gram_l1_channels, tiles.gram_l1_positions)
for kernel in kernels:
    implement(kernel.__name__, kernel)
implement_in_triton(__package__, "gram_l1_positions")
