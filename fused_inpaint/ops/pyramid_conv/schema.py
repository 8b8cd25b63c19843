# SPDX-License-Identifier: Apache-2.0
"""Schemas, output shapes and derivatives of the dilated pyramid's operators (kernels: csrc/pyramid_conv,
triton_impl.py)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._library import define, implement_in_triton
from ..._library import ops as ops
from ..derivative import by_reference, has_kernels, wants_graph
from ..flops import convolution, convolution_backward
from . import reference

_GEOMETRY = "int[] dilations, str padding_mode, str activation"


def _fake(x, weight, bias, *geometry):  # type: ignore[no-untyped-def]
    size = (x.size(0), weight.size(0), *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _backward_fake(grad, y, x, weight, *rest):  # type: ignore[no-untyped-def]
    need_x, need_weight, need_bias = rest[-3:]
    maps = (
        torch.empty_like(t, memory_format=torch.channels_last) if need else t.new_empty(0)
        for t, need in ((x, need_x), (weight, need_weight))
    )
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return *maps, x.new_empty(weight.size(0) if need_bias else 0, dtype=wide)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    x, weight, bias, *ctx.geometry = inputs
    # Without an activation the output says nothing that its gradient does not.
    ctx.save_for_backward(x, weight, bias, None if ctx.geometry[-1] == "none" else output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias, output = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients: list[Any]
    if wants_graph() or not has_kernels(x):
        gradients = by_reference(lambda *t: reference.pyramid_conv2d(*t, *ctx.geometry), [x, weight, bias], grad)
    else:
        y = grad if output is None else output
        gradients = list(ops.pyramid_conv2d_backward(grad, y, x, weight, *ctx.geometry, *needs))
        if bias is not None:
            gradients[2] = gradients[2].to(bias.dtype)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None


for suffix in ("", "_triton"):
    schema = f"pyramid_conv2d{suffix}(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor"
    define(schema, _fake, _backward, _setup_context, convolution)
define(
    f"pyramid_conv2d_backward(Tensor grad, Tensor y, Tensor x, Tensor weight, {_GEOMETRY}, bool need_x, "
    "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    flops=convolution_backward,
)
implement_in_triton(__package__, "pyramid_conv2d")
