# SPDX-License-Identifier: Apache-2.0
"""What partial convolution refuses, in words."""

from collections.abc import Sequence

from torch import Tensor

from ..checks import LIMIT, check_feature_map, check_mask, error, output_size, pair
from .types import BatchNorm, Epilogue, Geometry, Window, WindowStep


def check_call(
    op: str, sources: list[Tensor], weight: Tensor, bias: Tensor | None, geometry: Geometry, epilogue: Epilogue
) -> None:
    upsample, groups = geometry.upsample, geometry.groups
    if not sources:
        raise error(op, "x", "a tensor or a sequence of at least one", "none")
    if len(upsample) != len(sources) or not all(u in (1, 2) for u in upsample):
        raise error(op, "upsample", f"1 or 2 for each of {len(sources)} sources", upsample)
    if len(geometry.zeroed) != len(sources):
        raise error(op, "holes_zero", f"a bool, or one for each of {len(sources)} sources", geometry.zeroed)
    for s in sources:
        check_feature_map(op, "x", s, sources[0])
        if s.size(1) < 1:
            raise error(op, "x", "of at least one channel", tuple(s.shape))
    n, h, w = sources[0].size(0), sources[0].size(2) * upsample[0], sources[0].size(3) * upsample[0]
    for s, up in zip(sources, upsample, strict=True):
        if s.size(0) != n or s.size(2) * up != h or s.size(3) * up != w:
            raise error(op, "x", f"({n}, C, {h}, {w}) after upsampling", tuple(s.shape))
    if not isinstance(groups, int) or groups < 1 or (groups > 1 and len(sources) > 1):
        raise error(op, "groups", "a positive int, 1 with several sources", groups)
    _check_parameters(op, weight, bias, sum(s.size(1) for s in sources), groups, sources[0])
    out = check_output_size(op, "x", (h, w), weight.shape[2:], geometry[1:4])
    if n * weight.size(0) * out[0] * out[1] >= LIMIT:
        raise error(op, "output", "smaller than 2^31 elements", (n, weight.size(0), *out))
    if epilogue.activation not in ("none", "relu", "leaky_relu"):
        raise error(op, "activation", "none, relu or leaky_relu", epilogue.activation)
    if epilogue.slope < 0:
        raise error(op, "slope", "0 or more", epilogue.slope)
    if epilogue.norm is not None:
        _check_norm(op, epilogue.norm, bias, weight)
    if 2 in upsample:
        k, plain = weight.size(2), [1, 1]
        same = weight.size(3) == k and k % 2 == 1 and geometry.padding == [k // 2, k // 2]
        if not same or geometry.stride != plain or geometry.dilation != plain:
            raise error(op, "upsample", "1 unless the kernel is odd, square, stride 1 and padded by k // 2", upsample)


def check_masks(op: str, sources: list[Tensor], masks: list[Tensor], names: Sequence[str]) -> None:
    if len(masks) != len(sources):
        raise error(op, "mask", f"a sequence of {len(sources)}, one for each x", len(masks))
    for source, mask, name in zip(sources, masks, names, strict=True):
        check_mask(op, mask, source, name)


def check_one_device(op: str, masks: Sequence[Tensor]) -> None:
    for m in masks:
        if m.device != masks[0].device:
            raise error(op, "mask", f"on {masks[0].device} as the first", m.device)


def check_chain(op: str, masks: list[tuple[int, ...]], steps: Sequence[WindowStep]) -> None:
    """`masks`: (N, C, H, W) of the given ones; those of the steps are added as they become known."""
    for i, step in enumerate(steps):
        at = f"of step {i}"
        if not step.inputs or not all(0 <= j < len(masks) for j in step.inputs):
            raise error(op, f"inputs {at}", f"masks known by then, 0 to {len(masks) - 1}", step.inputs)
        if not len(step.inputs) == len(step.channels) == len(step.upsample) or set(step.upsample) - {1, 2}:
            expected = f"{len(step.inputs)} numbers each, upsample 1 or 2"
            raise error(op, f"channels and upsample {at}", expected, f"{step.channels} and {step.upsample}")
        for name, least in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            pair(op, f"{name} {at}", getattr(step, name), least)
        found = [masks[j] for j in step.inputs]
        batch = max(n for n, *_ in found)
        for (n, planes, _, _), channels in zip(found, step.channels, strict=True):
            if channels < 1 or planes not in (1, channels):
                raise error(op, f"mask {at}", f"of 1 or {channels} channels", planes)
            if n not in (1, batch):
                raise error(op, f"masks {at}", f"of a batch of 1 or {batch}", n)
        sizes = [(h * up, w * up) for (_, _, h, w), up in zip(found, step.upsample, strict=True)]
        if any(size != sizes[0] for size in sizes):
            raise error(op, f"masks {at}", "of one size after upsampling", sizes)
        geometry = (step.stride, step.padding, step.dilation)
        masks.append((batch, 1, *check_output_size(op, f"mask {at}", sizes[0], step.kernel, geometry)))


def check_output_size(
    op: str, name: str, size: tuple[int, int], kernel: Sequence[int], geometry: Sequence[Sequence[int]]
) -> tuple[int, int]:
    """(H', W') of a convolution over maps of this size; `geometry` is its stride, padding and dilation."""
    stride, padding, dilation = geometry
    height, width = (output_size(size[d], kernel[d], stride[d], padding[d], dilation[d]) for d in (0, 1))
    if height < 1 or width < 1:
        raise error(op, name, f"at least as large as the kernel {tuple(kernel)}", size)
    return height, width


def check_window(op: str, window: Window, sources: list[Tensor], weight: Tensor, geometry: Geometry) -> None:
    if len(window.planes) != len(sources):
        raise error(op, "window", f"of {len(sources)} masks", len(window.planes))
    for plane, source in zip(window.planes, sources, strict=True):
        check_mask(op, plane, source)
    up = geometry.upsample[0]
    size = (sources[0].size(2) * up, sources[0].size(3) * up)
    out = check_output_size(op, "x", size, weight.shape[2:], geometry[1:4])
    full = sum(s.size(1) for s in sources) * weight.size(2) * weight.size(3)
    if window.full != full:
        raise error(op, "window", f"of {full} values", window.full)
    if window.counts.device != sources[0].device:
        raise error(op, "window", f"on {sources[0].device} as x", window.counts.device)
    if window.counts.shape[1:] != (1, *out) or window.counts.size(0) not in (1, sources[0].size(0)):
        raise error(op, "window", f"of {out[0]} x {out[1]} counts", tuple(window.counts.shape))
    if window.mask.shape != window.counts.shape:
        raise error(op, "window", f"of a mask as its counts {tuple(window.counts.shape)}", tuple(window.mask.shape))


def _check_parameters(op: str, weight: Tensor, bias: Tensor | None, channels: int, groups: int, x: Tensor) -> None:
    if weight.dim() != 4 or weight.size(2) < 1 or weight.size(3) < 1:
        taps = " with a kernel of at least 1 x 1" if weight.dim() == 4 else ""
        raise error(op, "weight", f"(O, C / groups, kh, kw){taps}", tuple(weight.shape))
    if weight.size(1) * groups != channels and weight.size(0) % groups == 0:
        within = f" in {groups} groups" if groups > 1 else ""
        expected = f"of {weight.size(1) * groups} channels for a weight of {tuple(weight.shape)}{within}"
        raise error(op, "x", expected, channels)
    if weight.size(0) % groups:
        expected = f"(a multiple of {groups}, {channels} / {groups}, kh, kw) for x of {channels} channels"
        raise error(op, "weight", expected, tuple(weight.shape))
    if bias is not None and bias.shape != (weight.size(0),):
        raise error(op, "bias", f"({weight.size(0)},)", tuple(bias.shape))
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.device != x.device:
            raise error(op, name, f"on {x.device} as x", parameter.device)


def _check_norm(op: str, norm: BatchNorm, bias: Tensor | None, weight: Tensor) -> None:
    outputs = weight.size(0)
    if bias is not None:
        raise error(op, "bias", "None with batch_norm", "a tensor")
    for values in norm[:4]:
        if isinstance(values, Tensor) and values.shape != (outputs,):
            raise error(op, "batch_norm", f"of {outputs} channels", tuple(values.shape))
        if isinstance(values, Tensor) and values.device != weight.device:
            raise error(op, "batch_norm", f"on {weight.device} as the weight", values.device)
    if not norm.training and (norm.running_mean is None or norm.running_var is None):
        raise error(op, "batch_norm", "training or with running statistics", "neither")
