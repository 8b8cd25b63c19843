# SPDX-License-Identifier: Apache-2.0
"""Schemas, output shapes and derivatives of the partial convolution's operators (kernels: csrc/partial_conv)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._library import define
from ..._library import ops as ops
from ..checks import output_size
from ..derivative import by_reference, has_kernels, wants_graph
from ..flops import convolution, convolution_backward
from . import reference

GEOMETRY = "int[] upsample, int[] stride, int[] padding, int[] dilation, int groups, int[] zeroed"
EPILOGUE = "str activation, float slope, int fold_from"


def channels_last(like: Tensor, size: Sequence[Any]) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def joint_batch(masks: Sequence[Tensor]) -> Any:
    """1 if all masks are shared."""
    batch: Any = 1
    for m in masks:
        batch = m.size(0) if isinstance(batch, int) and batch == 1 else batch
    return batch


def _window_fake(masks, channels, upsample, kernel_size, stride, padding, dilation):  # type: ignore[no-untyped-def]
    batch = joint_batch(masks)
    height, width = (
        output_size(masks[0].size(2 + d) * upsample[0], kernel_size[d], stride[d], padding[d], dilation[d])
        for d in (0, 1)
    )
    count = masks[0].new_empty((batch, 1, height, width), dtype=torch.int32)
    return count, torch.empty_like(count, dtype=torch.uint8)


def _window_chain_fake(masks, steps):  # type: ignore[no-untyped-def]
    known, counts = list(masks), []
    for inputs, geometry in parse_steps(steps):
        count, mask = _window_fake([known[i] for i, _, _ in inputs], None, [up for _, _, up in inputs], *geometry)
        known.append(mask)
        counts.append(count)
    return counts, known[len(masks) :]


def parse_steps(steps: Sequence[int]) -> list[tuple[list[tuple[int, int, int]], list[list[int]]]]:
    """The flat steps of partial_window_chain: for each step its (index, channels, upsample) and its (kernel, stride,
    padding, dilation)."""
    found, at = [], 0
    while at < len(steps):
        n = steps[at]
        inputs = [(steps[i], steps[i + 1], steps[i + 2]) for i in range(at + 1, at + 1 + 3 * n, 3)]
        at += 1 + 3 * n
        found.append((inputs, [list(steps[i : i + 2]) for i in range(at, at + 8, 2)]))
        at += 8
    return found


def _output_fake(sources: Sequence[Tensor], count: Tensor, weight: Tensor) -> Tensor:
    return channels_last(sources[0], (sources[0].size(0), weight.size(0), count.size(2), count.size(3)))


def _conv_fake(sources, masks, count, weight, *_):  # type: ignore[no-untyped-def]
    return _output_fake(sources, count, weight)


def _gradients_fake(sources, weight, need_sources, need_weight):  # type: ignore[no-untyped-def]
    return (
        [channels_last(s, s.shape) if need_sources else s.new_empty(0) for s in sources],
        channels_last(weight, weight.shape) if need_weight else weight.new_empty(0),
    )


def _statistic(like: Tensor, n: Any) -> Tensor:
    return like.new_empty(n, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _conv_backward_fake(grad, y, sources, masks, count, weight, *rest):  # type: ignore[no-untyped-def]
    need_sources, need_weight, need_bias = rest[-3:]
    grad_bias = _statistic(y, weight.size(0)) if need_bias else y.new_empty(0)
    return *_gradients_fake(sources, weight, need_sources, need_weight), grad_bias


def _bn_fake(sources, masks, count, weight, *_):  # type: ignore[no-untyped-def]
    y = _output_fake(sources, count, weight)
    return y, torch.empty_like(y), _statistic(y, weight.size(0)), _statistic(y, weight.size(0))


def _bn_backward_fake(grad, conv, mean, var, sources, masks, count, weight, norm_weight, norm_bias, *rest):  # type: ignore[no-untyped-def]
    gradients = _gradients_fake(sources, weight, *rest[-2:])
    return *gradients, torch.empty_like(norm_weight), torch.empty_like(norm_bias)


def _track_fake(*_: Any) -> None:
    return None


def _normed_backward(ctx: Any, grad: Tensor) -> Any:
    raise RuntimeError("partial_conv2d_normed: grad mode must be off, got a backward; it is for inference")


def save(ctx: Any, sources: Sequence[Tensor], masks: Sequence[Tensor], *tensors: Tensor | None) -> None:
    ctx.n = len(sources)
    ctx.save_for_backward(*sources, *masks, *tensors)


def _saved(ctx: Any) -> tuple[list[Tensor], list[Tensor], Sequence[Any]]:
    t, n = ctx.saved_tensors, ctx.n
    return list(t[:n]), list(t[n : 2 * n]), t[2 * n :]


def conv_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    sources, masks, count, weight, bias, scale, *geometry = inputs
    activation = geometry[6]
    # Without an activation the output says nothing that its gradient does not.
    save(ctx, sources, masks, count, weight, bias, scale, None if activation == "none" else output)
    ctx.geometry = geometry[:-1]


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_sources, grad_weight, grad_bias = gradients(ctx, grad, *ctx.needs_input_grad[3:6])
    n = ctx.n
    return grad_sources, [None] * n, None, grad_weight, grad_bias, *[None] * (len(ctx.geometry) + 2)


def gradients(ctx: Any, grad: Tensor, need_weight: bool, need_bias: bool, need_scale: bool) -> tuple[Any, Any, Any]:
    """(of the sources, of the weight, of the bias) for a layer whose operands were kept by `save` and whose geometry
    and epilogue are in `ctx.geometry`."""
    sources, masks, (count, weight, bias, scale, output) = _saved(ctx)
    need_sources = any(s.requires_grad for s in sources)
    if need_scale:
        raise RuntimeError("partial_conv2d: scale must not require a gradient here; multiply the weight by it instead")
    grad_sources: Any
    if wants_graph() or not has_kernels(weight):

        def forward(*inputs: Any) -> Tensor:
            *x, w, b = inputs
            return reference.partial_conv2d(x, masks, count, w, b, scale, *ctx.geometry[:-1])

        *grad_sources, grad_weight, grad_bias = by_reference(forward, [*sources, weight, bias], grad)
    else:
        grad_sources, grad_weight, grad_bias = ops.partial_conv2d_backward(
            grad,
            grad if output is None else output,
            sources,
            [_plane(m) for m in masks],
            count,
            weight,
            scale,
            *ctx.geometry,
            need_sources,
            need_weight,
            need_bias,
        )
        if bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
    return (
        grad_sources if need_sources else [None] * len(sources),
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
    )


def _plane(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.uint8 else (mask != 0).to(torch.uint8)


def _bn_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    sources, masks, count, weight, norm_weight, norm_bias, *rest = inputs
    _, conv, mean, var = output
    ctx.mark_non_differentiable(conv, mean, var)
    ctx.set_materialize_grads(False)
    save(ctx, sources, masks, count, weight, norm_weight, norm_bias, conv, mean, var)
    ctx.rest = rest


def _bn_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    sources, masks, (count, weight, norm_weight, norm_bias, conv, mean, var) = _saved(ctx)
    _, _, _, need_weight, need_gain, need_shift = ctx.needs_input_grad[:6]
    need_sources = any(s.requires_grad for s in sources)
    none: Any = ([None] * len(sources), [None] * len(masks), None, None, None, None, *[None] * len(ctx.rest))
    if grad is None:
        return none
    grad_sources: Any
    if wants_graph():

        def forward(*inputs: Any) -> Tensor:
            *x, w, gain, shift = inputs
            return reference.partial_conv2d_bn(x, masks, count, w, gain, shift, *ctx.rest[:-1])[0]

        *grad_sources, grad_weight, grad_gain, grad_shift = by_reference(
            forward, [*sources, weight, norm_weight, norm_bias], grad
        )
    else:
        grad_sources, grad_weight, grad_gain, grad_shift = ops.partial_conv2d_bn_backward(
            grad,
            conv,
            mean,
            var,
            sources,
            masks,
            count,
            weight,
            norm_weight,
            norm_bias,
            *ctx.rest,
            need_sources,
            need_weight,
        )
    return (
        grad_sources if need_sources else none[0],
        none[1],
        None,
        grad_weight if need_weight else None,
        grad_gain if need_gain else None,
        grad_shift if need_shift else None,
        *[None] * len(ctx.rest),
    )


define(
    "partial_window(Tensor[] masks, int[] channels, int[] upsample, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation) -> (Tensor, Tensor)",
    _window_fake,
)
define("partial_window_chain(Tensor[] masks, int[] steps) -> (Tensor[], Tensor[])", _window_chain_fake)
define(
    "norm_constants(Tensor weight, Tensor bias, Tensor mean, Tensor var, float eps) -> (Tensor, Tensor)",
    lambda weight, bias, mean, var, eps: (_statistic(weight, weight.size(0)), _statistic(weight, weight.size(0))),
)
define(
    "partial_conv2d(Tensor[] sources, Tensor[] masks, Tensor count, Tensor weight, Tensor? bias, Tensor? scale, "
    f"{GEOMETRY}, {EPILOGUE}, Tensor[]? packed) -> Tensor",
    _conv_fake,
    _conv_backward,
    conv_setup,
    convolution,
)
define(
    "partial_conv2d_normed(Tensor[] sources, Tensor[] masks, Tensor count, Tensor weight, Tensor norm_weight, "
    f"Tensor norm_bias, Tensor mean, Tensor var, float eps, {GEOMETRY}, {EPILOGUE}, Tensor[]? packed) -> Tensor",
    _conv_fake,
    _normed_backward,
    lambda ctx, inputs, output: None,
    convolution,
)
define(
    "partial_conv2d_backward(Tensor grad, Tensor y, Tensor[] sources, Tensor[] masks, Tensor count, Tensor weight, "
    f"Tensor? scale, {GEOMETRY}, {EPILOGUE}, bool need_sources, bool need_weight, bool need_bias) "
    "-> (Tensor[], Tensor, Tensor)",
    _conv_backward_fake,
    flops=convolution_backward,
)
define(
    "partial_conv2d_bn(Tensor[] sources, Tensor[] masks, Tensor count, Tensor weight, Tensor norm_weight, "
    f"Tensor norm_bias, float eps, {GEOMETRY}, {EPILOGUE}) -> (Tensor, Tensor, Tensor, Tensor)",
    _bn_fake,
    _bn_backward,
    _bn_setup,
    convolution,
)
define(
    "norm_track(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum, "
    "float factor) -> ()",
    _track_fake,
)
define(
    "partial_conv2d_bn_backward(Tensor grad, Tensor conv, Tensor mean, Tensor var, Tensor[] sources, Tensor[] masks, "
    f"Tensor count, Tensor weight, Tensor norm_weight, Tensor norm_bias, float eps, {GEOMETRY}, {EPILOGUE}, "
    "bool need_sources, bool need_weight) -> (Tensor[], Tensor, Tensor, Tensor)",
    _bn_backward_fake,
    flops=convolution_backward,
)
