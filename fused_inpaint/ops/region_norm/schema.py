# SPDX-License-Identifier: Apache-2.0
"""Schemas, output shapes and derivatives of region normalization (kernels: csrc/region_norm, triton_impl.py).

One normalization is two operators with the statistics between them, where several processes can join theirs:
region_moments, then region_norm; backwards region_norm_sums, then region_norm_gradient. x is channels_last, mask uint8
(N or 1, 1 or C, H, W) channels_last; G is 1 for the statistics of the batch, N for those of each sample. mean and
invstd are (G, 2, C) float64 with region 0 (mask 0) first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._library import define, implement_in_triton
from ..._library import ops as ops
from ..derivative import by_reference, wants_graph
from . import reference

_POINT = "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, bool shared_bias, str activation, float slope"


def _moments_fake(x: Tensor, mask: Tensor, instance: bool) -> tuple[Tensor, Tensor, Tensor]:
    groups = x.size(0) if instance else 1
    count = x.new_empty((groups, 2, mask.size(1)), dtype=torch.float64)
    mean = x.new_empty((groups, 2, x.size(1)), dtype=torch.float64)
    return count, mean, torch.empty_like(mean)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _norm_fake(x: Tensor, *_: Any) -> Tensor:
    return _like(x)


def _sums_fake(grad, x, mask, mean, invstd, weight, bias, scale, *_):  # type: ignore[no-untyped-def]
    groups, _, channels = mean.shape
    size = (x.size(0), 1, *x.shape[2:]) if scale is not None else (0,)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return mean.new_empty((groups, 2, 2, channels)), x.new_empty(size, dtype=wide), x.new_empty(size, dtype=wide)


def _gradient_fake(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return _like(x)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask, mean, invstd, count, weight, bias, scale, shift, *ctx.rest = inputs
    ctx.save_for_backward(x, mask, mean, invstd, count, weight, bias, scale, shift)


def _norm_backward(suffix: str) -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *epilogue, eps, instance, group = ctx.rest
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint has them no second time
        point = (*saved[5:], *epilogue)
        gradients: Any
        if wants_graph():
            gradients = _by_reference(saved, grad, point, eps, instance, group)
        else:
            gradients = _by_kernels(saved, ctx.needs_input_grad[0], suffix, grad, point, group)
        grad_x, grad_weight, grad_bias, grad_scale, grad_shift = gradients
        return grad_x, None, None, None, None, grad_weight, grad_bias, grad_scale, grad_shift, *[None] * len(ctx.rest)

    return backward


def _by_kernels(
    saved: Sequence[Any], need_x: bool, suffix: str, grad: Tensor, point: tuple[Any, ...], group: str
) -> tuple[Any, ...]:
    from .sync import summed

    x, mask, mean, invstd, count, weight, bias, scale, shift = saved
    shared_bias = point[4]
    sums_of = getattr(ops, f"region_norm_sums{suffix}")
    sums, grad_scale, grad_shift = sums_of(grad, x, mask, mean, invstd, *point)
    grad_x = grad_weight = grad_bias = None
    # Of all processes, whether or not this one needs it: the others may.
    joint = summed(sums, group)
    if need_x:
        means = joint / count.clamp(min=1).unsqueeze(1)
        grad_x = getattr(ops, f"region_norm_gradient{suffix}")(grad, x, mask, mean, invstd, means, *point)
    if weight is not None:
        grad_weight = sums[:, 1].sum(0).to(weight.dtype)
    if bias is not None:
        each = sums[:, 0].sum(0)
        grad_bias = (each.sum(0).expand_as(each) if shared_bias else each).to(bias.dtype)
    if scale is not None:
        grad_scale, grad_shift = grad_scale.to(scale.dtype), grad_shift.to(shift.dtype)
    else:
        grad_scale = grad_shift = None
    return grad_x, grad_weight, grad_bias, grad_scale, grad_shift


def _by_reference(
    saved: Sequence[Any], grad: Tensor, point: tuple[Any, ...], eps: float, instance: bool, group: str
) -> list[Any]:
    from .sync import differentiable_sum

    x, mask = saved[:2]

    def forward(x: Tensor, *parameters: Tensor | None) -> Tensor:
        arguments = (*parameters, eps, instance, *point[4:], differentiable_sum(group))
        return reference.region_norm(x, mask, *arguments)

    return by_reference(forward, [x, *point[:4]], grad)


def _pool_fake(x: Tensor) -> Tensor:
    return x.new_empty((x.size(0), 2, *x.shape[2:]))


def _pool_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _pool_backward(suffix: str) -> Any:
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        x, pooled = ctx.saved_tensors
        if wants_graph():
            return by_reference(reference.channel_pool, [x], grad)[0]
        return getattr(ops, f"channel_pool_backward{suffix}")(grad, x, pooled)

    return backward


for suffix in ("", "_triton"):
    define(f"region_moments{suffix}(Tensor x, Tensor mask, bool instance) -> (Tensor, Tensor, Tensor)", _moments_fake)
    define(
        f"region_norm{suffix}(Tensor x, Tensor mask, Tensor mean, Tensor invstd, Tensor count, {_POINT}, float eps, "
        "bool instance, str group) -> Tensor",
        _norm_fake,
        _norm_backward(suffix),
        _norm_setup,
    )
    define(
        f"region_norm_sums{suffix}(Tensor grad, Tensor x, Tensor mask, Tensor mean, Tensor invstd, {_POINT}) "
        "-> (Tensor, Tensor, Tensor)",
        _sums_fake,
    )
    define(
        f"region_norm_gradient{suffix}(Tensor grad, Tensor x, Tensor mask, Tensor mean, Tensor invstd, Tensor means, "
        f"{_POINT}) -> Tensor",
        _gradient_fake,
    )
    define(f"channel_pool{suffix}(Tensor x) -> Tensor", _pool_fake, _pool_backward(suffix), _pool_setup)
    define(f"channel_pool_backward{suffix}(Tensor grad, Tensor x, Tensor pooled) -> Tensor", _gradient_fake)


for name in (
    "region_moments",
    "region_norm",
    "region_norm_sums",
    "region_norm_gradient",
    "channel_pool",
    "channel_pool_backward",
):
    implement_in_triton(__package__, name)
