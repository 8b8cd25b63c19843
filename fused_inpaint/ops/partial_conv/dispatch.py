# SPDX-License-Identifier: Apache-2.0
"""From checked arguments to the chosen implementation."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _backends
from ..checks import autocasts, check_mask, error
from . import reference, routes
from .packing import PackedWeight
from .schema import ops
from .types import BatchNorm, Epilogue, Geometry, Window


def run(
    op: str,
    sources: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    geometry: Geometry,
    epilogue: Epilogue,
    fold: bool | None,
    packed: PackedWeight | None,
) -> Tensor:
    """The layer's output for masks whose window is known, in the dtype that x (or autocast) asks for."""
    backend = _backends.choose(op, weight.device.type)
    dtype = _result_dtype(op, sources, weight, bias)
    # oneDNN has no fast float16 convolution without AVX512-FP16; float32 is quicker and rounds once. A trained gain
    # over fixed statistics is a factor of the weight, and bfloat16 would round that product, too.
    wanted = dtype == torch.float16 or (dtype == torch.bfloat16 and _trains_gain(epilogue.norm))
    inner = torch.float32 if backend == "cpu" and wanted else dtype
    sources, planes = [s.to(dtype).to(inner) for s in sources], list(window.planes)
    weight = weight.to(dtype).to(inner)
    if packed is not None and (backend != "cpu" or inner != packed.weights[0].dtype):
        packed = None
    fold_from = routes.fold_from("plain", fold if packed is None else packed.fold)
    with _no_autocast(weight):
        norm = epilogue.norm
        if norm is not None and norm.training:
            y = _with_batch_statistics(
                op, backend, sources, planes, window.counts, weight, norm, geometry, epilogue, fold_from
            )
            return y.to(dtype)
        weight, bias, scale = _as_constants(weight, bias, norm)
        arguments = (sources, planes, window.counts, weight, bias, scale, *geometry, *epilogue[:2])
        if backend == "reference":
            return reference.partial_conv2d(*arguments).to(dtype)
        y = ops.partial_conv2d(*arguments, fold_from, list(packed.weights) if packed else [])
        return y.to(dtype)


def _trains_gain(norm: BatchNorm | None) -> bool:
    return norm is not None and not norm.training and norm.weight.requires_grad and torch.is_grad_enabled()


def _as_constants(
    weight: Tensor, bias: Tensor | None, norm: BatchNorm | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(weight, bias, scale) of the epilogue; a batch norm with fixed statistics is a scale and a bias."""
    wide = _wide(weight)
    if norm is None:
        return weight, None if bias is None else bias.to(wide), None
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.to(wide) * torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    bias = norm.bias.to(wide) - norm.running_mean.to(wide) * scale
    if _trains_gain(norm):
        # The kernels take the scale as a constant.
        return (weight.to(wide) * scale.view(-1, 1, 1, 1)).to(weight.dtype), bias, None
    return weight, bias, scale


def _with_batch_statistics(
    op: str,
    backend: str,
    sources: list[Tensor],
    planes: list[Tensor],
    counts: Tensor,
    weight: Tensor,
    norm: BatchNorm,
    geometry: Geometry,
    epilogue: Epilogue,
    fold_from: int,
) -> Tensor:
    values = sources[0].size(0) * counts.size(2) * counts.size(3)
    if values == 1:
        raise error(op, "x", "more than one value per channel for batch statistics", 1)
    gain, shift = norm.weight.to(_wide(weight)), norm.bias.to(_wide(weight))
    arguments = (sources, planes, counts, weight, gain, shift, norm.eps, *geometry, *epilogue[:2])
    if backend == "reference":
        y, mean, var = reference.partial_conv2d_bn(*arguments)
    else:
        y, _, mean, var = ops.partial_conv2d_bn(*arguments, fold_from)
    if norm.running_mean is not None and norm.running_var is not None and values:
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            unbiased = var * (values / (values - 1))
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
    return y


def window_of(
    op: str,
    sources: list[Tensor],
    masks: list[Tensor] | None,
    names: Sequence[str],
    kernel: Sequence[int],
    geometry: Geometry,
) -> Window:
    """Masks as given, checked against their sources, to the window."""
    if masks is None:
        planes = [torch.ones((1, 1, *s.shape[2:]), dtype=torch.uint8, device=s.device) for s in sources]
    else:
        if len(masks) != len(sources):
            raise error(op, "mask", f"a sequence of {len(sources)}, one for each x", len(masks))
        for source, mask, name in zip(sources, masks, names, strict=True):
            check_mask(op, mask, source, name)
        planes = [plane_of(op, mask, name) for mask, name in zip(masks, names, strict=True)]
    return count(op, planes, [s.size(1) for s in sources], kernel, geometry)


def count(op: str, planes: list[Tensor], channels: list[int], kernel: Sequence[int], geometry: Geometry) -> Window:
    upsample, stride, padding, dilation, _ = geometry
    arguments = (planes, channels, upsample, list(kernel), stride, padding, dilation)
    if _backends.choose(op, planes[0].device.type) == "reference":
        counts, mask = reference.partial_window(*arguments)
    else:
        counts, mask = ops.partial_window(*arguments)
    return Window(tuple(planes), counts, mask, sum(channels) * kernel[0] * kernel[1])


def plane_of(op: str, mask: Tensor, name: str = "mask") -> Tensor:
    """The mask as bytes, checked to hold nothing but 0 and 1 where looking costs no synchronisation."""
    if _backends.choose(op, mask.device.type) == "reference":
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            odd = mask[(mask != 0) & (mask != 1)]
            if odd.numel():
                raise error(op, name, "0 or 1 everywhere", odd[0].item())
        return (mask != 0).to(torch.uint8)
    if torch.compiler.is_compiling():
        plane: Tensor = ops.mask_plane(mask, f"{op}: {name}")
        return plane
    try:
        return ops.mask_plane(mask, f"{op}: {name}")
    except RuntimeError as failure:
        # The kernel's own sentence, without the source line that torch puts before it.
        sentence = str(failure).splitlines()[0]
        raise ValueError(sentence[max(sentence.find(f"{op}: "), 0) :]) from None


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _result_dtype(op: str, sources: list[Tensor], weight: Tensor, bias: Tensor | None) -> torch.dtype:
    if autocasts(weight) and all(autocasts(s) for s in sources):
        return torch.get_autocast_dtype(weight.device.type)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype != sources[0].dtype:
            raise error(op, name, f"{sources[0].dtype} as x", parameter.dtype)
    return sources[0].dtype
