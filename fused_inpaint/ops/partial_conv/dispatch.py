# SPDX-License-Identifier: Apache-2.0
"""From checked arguments to the chosen implementation."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._library import is_eager, tangents_exist
from ..masks import SOFT, counted_by_reference, plane_of
from . import layer_ops as layer_ops  # defines operators
from . import reference, routes
from .packing import PackedWeight
from .plan import Plan, trains_gain, wide_of
from .schema import ops
from .types import BatchNorm, Epilogue, Geometry, Inputs, Window, WindowStep


def run(plan: Plan, given: Inputs, packed: PackedWeight | None) -> tuple[Tensor, Tensor]:
    """The layer's output, in the dtype that x (or autocast) asks for, and its new mask."""
    if plan.autocasts:
        with torch.autocast(given.weight.device.type, enabled=False):
            return _run(plan, given, packed)
    return _run(plan, given, packed)


def _run(plan: Plan, given: Inputs, packed: PackedWeight | None) -> tuple[Tensor, Tensor]:
    _, sources, masks, _, weight, _, window, _, epilogue, _ = given
    kernel, inner, fold_from, geometry = plan.kernel, plan.inner, plan.fold_from, plan.geometry
    statistics = epilogue.norm is not None and epilogue.norm.training
    if window is not None:
        planes = list(window.planes)
    elif kernel in ("direct", "triton"):
        planes = [mask.contiguous() for mask in _given(sources, masks)]  # summed in the same launch, in any type
    elif kernel == "vendor" and masks is not None and not statistics and plan.eager:
        planes = _given(sources, masks)  # made planes and summed in the same call
    else:
        window = _window_of(given, geometry)
        planes = list(window.planes)
    if packed is not None:
        if plan.packs and inner == packed.weights[0].dtype:
            fold_from = routes.fold_from("plain", packed.fold)
        else:
            packed = None
    if plan.casts:
        sources = [_to(_to(s, plan.rounded), inner) for s in sources]
        if packed is None or torch.is_grad_enabled():  # else the weight itself is but looked at
            weight = _to(_to(weight, plan.rounded), inner)
    layer = Layer(sources, planes, window, weight, geometry)
    if statistics:
        y, mask = _with_batch_statistics(kernel, layer, epilogue, fold_from, plan.rows)
    else:
        y, mask = _with_constants(plan, layer, given, fold_from, packed)
    return _to(y, plan.dtype), mask if window is None else window.mask


def _to(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


class Layer(NamedTuple):
    """The convolution without what follows it."""

    sources: list[Tensor]  # (N, C_i, H_i, W_i)
    masks: list[Tensor]  # (N or 1, 1 or C_i, H_i, W_i), uint8 where there is a window, else as the user gave them
    window: Window | None
    weight: Tensor  # (O, sum C_i / groups, kh, kw)
    geometry: Geometry


def _with_constants(
    plan: Plan, layer: Layer, given: Inputs, fold_from: int, packed: PackedWeight | None
) -> tuple[Tensor, Tensor]:
    kernel, epilogue, norm = plan.kernel, given.epilogue, given.epilogue.norm
    sources, masks, window, weight, geometry = layer
    if plan.normed and not torch.is_grad_enabled():
        assert window is not None and norm is not None
        y = ops.partial_conv2d_normed(
            sources,
            masks,
            window.counts,
            weight,
            *norm[:4],
            norm.eps,
            *geometry,
            *epilogue[:2],
            fold_from,
            list(packed.weights) if packed else None,
        )
        return y, window.mask
    weight, bias, scale = _as_constants(weight, given.bias, norm, kernel)
    if kernel == "direct":
        y, _, mask = ops.partial_conv2d_direct(sources, masks, weight, bias, scale, *geometry[:5], *epilogue[:2])
        return y, mask
    if kernel == "triton":
        y, _, mask = _triton(layer._replace(weight=weight), bias, scale, epilogue, fold_from)
        return y, mask
    constants = (weight, bias, scale, *geometry, *epilogue[:2])
    if kernel == "reference":
        assert window is not None
        return reference.partial_conv2d(sources, masks, window.counts, *constants), window.mask
    # A packed weight has no gain in it.
    weights = list(packed.weights) if packed and weight is layer.weight else None
    if window is not None:
        return ops.partial_conv2d(sources, masks, window.counts, *constants, fold_from, weights), window.mask
    try:
        y, _, _, mask = ops.partial_conv2d_masked(sources, masks, *constants, fold_from, weights)
    except RuntimeError as failure:
        if SOFT in str(failure):
            _window_of(given, geometry)  # which names the mask
        raise
    return y, mask


def _triton(
    layer: Layer, bias: Tensor | None, scale: Tensor | None, epilogue: Epilogue, fold_from: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, counts, new mask)"""
    sources, masks, window, weight, geometry = layer
    counts = None if window is None else window.counts
    y, summed, mask = ops.partial_conv2d_triton(
        sources, masks, counts, weight, bias, scale, *geometry[:5], *epilogue[:2], fold_from
    )
    return (y, summed, mask) if window is None else (y, window.counts, window.mask)


def _as_constants(
    weight: Tensor, bias: Tensor | None, norm: BatchNorm | None, kernel: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(weight, bias, scale) of the epilogue; a batch norm with fixed statistics is a scale and a bias."""
    wide = wide_of(weight.dtype)
    if norm is None:
        # Kernels read it by address.
        return weight, None if bias is None else _to(bias, wide).contiguous(), None
    assert norm.running_mean is not None and norm.running_var is not None
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    trained = torch.is_grad_enabled() and (norm.weight.requires_grad or norm.bias.requires_grad)
    if not trained and _are_constants(tensors, wide):
        scale, bias = ops.norm_constants(*tensors, norm.eps)
        return weight, bias, scale
    scale = norm.weight.to(wide) * torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    bias = torch.addcmul(norm.bias.to(wide), norm.running_mean.to(wide), scale, value=-1)
    if trains_gain(norm) and kernel != "reference":
        # The kernels take the scale as a constant.
        return (weight.to(wide) * scale.view(-1, 1, 1, 1)).to(weight.dtype), bias, None
    return weight, bias, scale


def _are_constants(tensors: Sequence[Tensor], wide: torch.dtype) -> bool:
    """Whether the kernel of `norm_constants` takes them: five launches less in each layer of a network."""
    if torch.compiler.is_compiling():  # whose graph fuses the steps
        return False
    for t in tensors:
        if t.dtype != wide or not t.is_contiguous():
            return False
    return not counted_by_reference("partial_conv2d", tensors[0])


def _with_batch_statistics(
    kernel: str, layer: Layer, epilogue: Epilogue, fold_from: int, values: int
) -> tuple[Tensor, Tensor]:
    sources, masks, window, weight, geometry = layer
    norm = epilogue.norm
    assert norm is not None
    wide = wide_of(weight.dtype)
    gain, shift = (t.to(wide).contiguous() for t in (norm.weight, norm.bias))  # kernels read them by address
    if kernel == "triton":  # statistics need the whole map first, so nothing can follow in the same launch
        v, counts, mask = _triton(layer, None, None, Epilogue("none", 0.0, None), fold_from)
        y, mean, var = reference.batch_norm(v.to(gain.dtype), counts, gain, shift, norm.eps, *epilogue[:2])
    else:
        assert window is not None
        mask = window.mask
        arguments = (sources, masks, window.counts, weight, gain, shift, norm.eps, *geometry, *epilogue[:2])
        if kernel == "reference":
            y, mean, var = reference.partial_conv2d_bn(*arguments)
        else:
            y, _, mean, var = ops.partial_conv2d_bn(*arguments, fold_from)
    if values:
        _track(norm, mean, var, values / (values - 1))
    return y, mask


def _track(norm: BatchNorm, mean: Tensor, var: Tensor, factor: float) -> None:
    """Moves the running statistics, if there are any, towards a batch's."""
    running_mean, running_var, momentum = norm.running_mean, norm.running_var, norm.momentum
    if running_mean is None or running_var is None:
        return
    fits = running_mean.dtype == running_var.dtype == mean.dtype
    fits = fits and running_mean.is_contiguous() and running_var.is_contiguous()
    with torch.no_grad():
        # A compiled graph fuses the steps; out of one, each is a launch.
        if (
            fits
            and is_eager()
            and not isinstance(momentum, Tensor)
            and not counted_by_reference("partial_conv2d", mean)
        ):
            ops.norm_track(running_mean, running_var, mean, var, momentum, factor)
            torch.autograd.graph.increment_version((running_mean, running_var))
        else:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * factor).to(running_var.dtype), momentum)


def _window_of(given: Inputs, geometry: Geometry) -> Window:
    op, sources, masks, names = given[:4]
    planes = [mask.contiguous() for mask in _given(sources, masks)]
    if masks is not None:
        planes = [plane_of(op, mask, name) for mask, name in zip(planes, names, strict=True)]
    return count(op, planes, [s.size(1) for s in sources], given.weight.shape[2:], geometry)


def _given(sources: list[Tensor], masks: list[Tensor] | None) -> list[Tensor]:
    """The masks without derivatives, which no output has by them; all valid if there are none."""
    if masks is None:
        return [torch.ones((1, 1, *s.shape[2:]), dtype=torch.uint8, device=s.device) for s in sources]
    dual = tangents_exist()
    return [mask.detach() if dual or mask.requires_grad else mask for mask in masks]


def count(op: str, planes: list[Tensor], channels: list[int], kernel: Sequence[int], geometry: Geometry) -> Window:
    upsample, stride, padding, dilation = geometry[:4]
    arguments = (planes, channels, upsample, list(kernel), stride, padding, dilation)
    if counted_by_reference(op, planes[0]):
        counts, mask = reference.partial_window(*arguments)
    else:
        counts, mask = ops.partial_window(*arguments)
    return Window(tuple(planes), counts, mask, sum(channels) * kernel[0] * kernel[1])


def count_chain(op: str, planes: list[Tensor], steps: Sequence[WindowStep]) -> list[Window]:
    if counted_by_reference(op, planes[0]):
        known, counts = list(planes), []
        for step in steps:
            given = [known[i] for i in step.inputs]
            found = reference.partial_window(given, *step[1:])
            counts.append(found[0])
            known.append(found[1])
    else:
        counts, masks = ops.partial_window_chain(planes, [value for step in steps for value in step.flat()])
        known = [*planes, *masks]
    return [
        Window(
            tuple(known[i] for i in step.inputs),
            counts[at],
            known[len(planes) + at],
            sum(step.channels) * step.kernel[0] * step.kernel[1],
        )
        for at, step in enumerate(steps)
    ]
