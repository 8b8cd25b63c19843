# SPDX-License-Identifier: Apache-2.0
"""Schemas, output shapes and derivatives of the operators that do a whole layer, masks included.

partial_conv2d_masked is partial_conv2d after the masks' own operators, entered once instead of three times. The others
do a layer on the GPU in one launch (kernels: csrc/partial_conv/partial_direct_cuda.cu for thin layers, triton_impl.py).
In all of them the new mask goes back in the dtype in which the masks came, so nothing else is launched.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._library import define, implement
from ..checks import output_size
from ..flops import convolution
from . import routes
from .schema import EPILOGUE, GEOMETRY, channels_last, conv_setup, gradients, joint_batch, save

_LAYER = "int[] upsample, int[] stride, int[] padding, int[] dilation, int groups, str activation, float slope"


def _shapes(sources, masks, weight, upsample, stride, padding, dilation):  # type: ignore[no-untyped-def]
    size = [
        output_size(sources[0].size(2 + d) * upsample[0], weight.size(2 + d), stride[d], padding[d], dilation[d])
        for d in (0, 1)
    ]
    y = channels_last(sources[0], (sources[0].size(0), weight.size(0), *size))
    count = weight.new_empty((joint_batch(masks), 1, *size), dtype=torch.int32)
    return y, count, torch.empty_like(count, dtype=masks[0].dtype)


def _masked_fake(sources, masks, weight, bias, scale, upsample, stride, padding, dilation, *_):  # type: ignore[no-untyped-def]
    planes = [torch.empty(m.shape, dtype=torch.uint8, device=m.device) for m in masks]
    y, count, mask = _shapes(sources, masks, weight, upsample, stride, padding, dilation)
    return y, planes, count, mask


def _direct_fake(sources, masks, weight, bias, scale, upsample, stride, padding, dilation, *_):  # type: ignore[no-untyped-def]
    return _shapes(sources, masks, weight, upsample, stride, padding, dilation)


def _triton_fake(sources, masks, count, weight, bias, scale, upsample, stride, padding, dilation, *_):  # type: ignore[no-untyped-def]
    y, counts, mask = _shapes(sources, masks, weight, upsample, stride, padding, dilation)
    return (y, counts, mask) if count is None else (y, counts.new_empty(0), mask.new_empty(0))


def _save_layer(  # type: ignore[no-untyped-def]
    ctx, output, sources, masks, count, weight, bias, scale, upsample, stride, padding, dilation, groups, *epilogue
):
    """For `gradients`, which is that of the operator `partial_conv2d`."""
    y, counts, mask = output
    ctx.mark_non_differentiable(counts, mask)
    ctx.set_materialize_grads(False)
    count = counts if count is None else count
    activation, slope, *fold_from = epilogue
    save(ctx, sources, masks, count, weight, bias, scale, None if activation == "none" else y)
    geometry = [upsample, stride, padding, dilation, groups, [0] * len(sources)]
    ctx.geometry = [*geometry, activation, slope, *(fold_from or [routes.fold_from("gpu")])]


def _masked_setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    sources, _, weight, bias, scale, *geometry = inputs
    y, planes, counts, mask = output
    ctx.mark_non_differentiable(*planes, counts, mask)
    ctx.set_materialize_grads(False)
    conv_setup(ctx, (sources, planes, counts, weight, bias, scale, *geometry), y)
    ctx.counted = ()


def _direct_setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    sources, masks, *rest = inputs
    _save_layer(ctx, output, sources, masks, None, *rest)
    ctx.counted = ()


def _triton_setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    _save_layer(ctx, output, *inputs)
    ctx.counted = (None,)


def _layer_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    n = ctx.n
    if grad is None:
        grad_sources, grad_weight, grad_bias = [None] * n, None, None
    else:
        needs = ctx.needs_input_grad[2 + len(ctx.counted) :]
        grad_sources, grad_weight, grad_bias = gradients(ctx, grad, *needs[:3])
    rest = len(ctx.needs_input_grad) - 5 - len(ctx.counted)
    return grad_sources, [None] * n, *ctx.counted, grad_weight, grad_bias, None, *[None] * rest


def _triton(sources, masks, count, weight, bias, scale, *rest):  # type: ignore[no-untyped-def]
    from . import triton_impl  # importing Triton looks for a GPU driver

    *layer, fold_from = rest
    fold = False
    for s, up in zip(sources, layer[0], strict=True):
        fold = fold or (up == 2 and s.size(0) * s.size(2) * s.size(3) >= fold_from)
    arguments = (sources, masks, count, weight, bias, scale, *layer, fold)
    y, counts, mask = triton_impl.partial_conv2d(*arguments)
    # An operator may not give back what it was given.
    return (y, counts, mask) if count is None else (y, weight.new_empty(0, dtype=torch.int32), masks[0].new_empty(0))


define(
    "partial_conv2d_masked(Tensor[] sources, Tensor[] masks, Tensor weight, Tensor? bias, Tensor? scale, "
    f"{GEOMETRY}, {EPILOGUE}, Tensor[]? packed) -> (Tensor, Tensor[], Tensor, Tensor)",
    _masked_fake,
    _layer_backward,
    _masked_setup,
    convolution,
)
define(
    "partial_conv2d_direct(Tensor[] sources, Tensor[] masks, Tensor weight, Tensor? bias, Tensor? scale, "
    f"{_LAYER}) -> (Tensor, Tensor, Tensor)",
    _direct_fake,
    _layer_backward,
    _direct_setup,
    convolution,
)
define(
    "partial_conv2d_triton(Tensor[] sources, Tensor[] masks, Tensor? count, Tensor weight, Tensor? bias, "
    f"Tensor? scale, {_LAYER}, int fold_from) -> (Tensor, Tensor, Tensor)",
    _triton_fake,
    _layer_backward,
    _triton_setup,
    convolution,
)
implement("partial_conv2d_triton", _triton)
