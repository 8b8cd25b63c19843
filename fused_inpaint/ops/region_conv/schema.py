# SPDX-License-Identifier: Apache-2.0
"""Schemas, output shapes and derivatives of region-wise convolution's operators (kernels: csrc/region_conv,
triton_impl.py)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._library import define, implement_in_triton
from ..._library import ops as ops
from ..checks import output_size
from ..derivative import by_reference, has_kernels, wants_graph
from ..flops import convolution, convolution_backward
from . import reference

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, str padding_mode, str activation"


def _map(like: Tensor, channels: Any, weight: Tensor, upsample: int, *geometry: Sequence[int]) -> Tensor:
    stride, padding, dilation = geometry
    height, width = (
        output_size(like.size(2 + d) * upsample, weight.size(d - 2), stride[d], padding[d], dilation[d]) for d in (0, 1)
    )
    size = (like.size(0), channels, height, width)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _like(t: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(t, memory_format=torch.channels_last) if wanted else t.new_empty(0)


def _contiguous(t: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format) if wanted else t.new_empty(0)


def _wide(like: Tensor, size: Sequence[Any], wanted: bool) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(size if wanted else 0, dtype=dtype)


def _output_fake(x, mask, weight, bias, *rest):  # type: ignore[no-untyped-def]
    return _map(x, weight.size(1), weight, 1, *rest[:3])


def _output_backward_fake(grad, y, x, mask, weight, *rest):  # type: ignore[no-untyped-def]
    need_x, need_weight, need_bias = rest[-3:]
    return _like(x, need_x), _contiguous(weight, need_weight), _wide(x, weight.shape[:2], need_bias)


def _input_fake(existing, missing, mask, weight, bias, upsample, *rest):  # type: ignore[no-untyped-def]
    return _map(existing, weight.size(0), weight, upsample, *rest[:3])


def _input_backward_fake(grad, y, existing, missing, mask, weight, *rest):  # type: ignore[no-untyped-def]
    need_existing, need_missing, need_weight, need_bias = rest[-4:]
    return (
        _like(existing, need_existing),
        _like(missing, need_missing),
        _like(weight, need_weight),
        _wide(existing, weight.shape[:1], need_bias),
    )


def _derivative(name: str, tensors: int) -> tuple[Callable[..., Any], Callable[..., None]]:
    """backward and setup_context of an operator that begins with `tensors` tensors: maps, mask, weight, bias."""
    maps = tensors - 3

    def setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        kept = inputs[: tensors - 1]
        ctx.geometry = inputs[tensors:]
        # Without an activation the output says nothing that its gradient does not.
        ctx.save_for_backward(*kept, inputs[tensors - 1], None if ctx.geometry[-1] == "none" else output)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *kept, bias, output = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (*range(maps), maps + 1, maps + 2)]
        gradients: list[Any]
        if wants_graph() or not has_kernels(kept[0]):
            gradients = by_reference(
                lambda *t: getattr(reference, name)(*t[:maps], kept[maps], *t[maps:], *ctx.geometry),
                [*kept[:maps], kept[maps + 1], bias],
                grad,
            )
        else:
            call = getattr(ops, f"{name}_backward")
            gradients = list(call(grad, grad if output is None else output, *kept, *ctx.geometry, *needs))
            if bias is not None:
                gradients[-1] = gradients[-1].to(bias.dtype)
        given = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        return *given[:maps], None, *given[maps:], *[None] * len(ctx.geometry)

    return backward, setup


_OUTPUT = f"Tensor x, Tensor mask, Tensor weight, Tensor? bias, {_GEOMETRY}"
_INPUT = f"Tensor existing, Tensor missing, Tensor mask, Tensor weight, Tensor? bias, int upsample, {_GEOMETRY}"

for suffix in ("", "_triton"):
    for name, arguments, fake, tensors in (
        ("region_conv2d_output", _OUTPUT, _output_fake, 4),
        ("region_conv2d_input", _INPUT, _input_fake, 5),
    ):
        define(f"{name}{suffix}({arguments}) -> Tensor", fake, *_derivative(name, tensors), convolution)
define(
    f"region_conv2d_output_backward(Tensor grad, Tensor y, Tensor x, Tensor mask, Tensor weight, {_GEOMETRY}, "
    "bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    _output_backward_fake,
    flops=convolution_backward,
)
define(
    "region_conv2d_input_backward(Tensor grad, Tensor y, Tensor existing, Tensor missing, Tensor mask, Tensor weight, "
    f"int upsample, {_GEOMETRY}, bool need_existing, bool need_missing, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _input_backward_fake,
    flops=convolution_backward,
)


for name in ("region_conv2d_output", "region_conv2d_input"):
    implement_in_triton(__package__, name)
