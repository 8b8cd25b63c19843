# SPDX-License-Identifier: Apache-2.0
"""Whether and how a call runs, decided once for calls that look alike: deciding takes longer than the launches."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _backends
from ..._library import is_eager
from ..checks import autocast_dtype, autocasts, convolution_dtype, error, output_size
from . import routes
from .checks import check_call, check_chain, check_masks, check_window
from .types import BatchNorm, Epilogue, Geometry, Inputs, WindowStep


class Plan(NamedTuple):
    """How a call runs."""

    kernel: str  # a name of routes.choose
    dtype: torch.dtype  # of the output: what x, or autocast, asks for
    rounded: torch.dtype  # what x and the weight are cast to first
    inner: torch.dtype  # what the kernel reads
    casts: bool  # whether something is to be cast at all
    fold_from: int
    geometry: Geometry
    packs: bool  # takes packed weights
    autocasts: bool
    rows: int  # output pixels, batch included
    normed: bool  # a batch norm of fixed statistics goes into the operator, if no gradient is asked for
    eager: bool  # is_eager said so, and what the plan was found by could be kept


_plans: dict[tuple[object, ...], Plan] = {}
_chains: set[tuple[object, ...]] = set()
_MOST = 4096  # of each
# Whether a device has autocast, which is quicker to ask than whether a certain one has; torch leaves some devices out.
_any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_PLAIN = {int, float, str, bool, type(None)}  # the types of what may be kept: others have no hash, or no lasting one


def forget() -> None:
    """To be called after what routes.py decides by has changed."""
    _plans.clear()


def plan_of(given: Inputs) -> Plan:
    """Refuses what does not fit, in words."""
    selected = _backends.current()
    facts = _facts(given, selected) if is_eager() else None
    plan = None
    if facts is not None:
        try:
            plan = _plans.get(facts)
        except TypeError:  # a fake tensor's sizes may be symbols, which have no hash
            facts = None
    if plan is None:
        op, sources, masks, names, weight, bias, window, written, epilogue, _ = given
        geometry = written.checked(op)
        check_call(op, sources, weight, bias, geometry, epilogue)
        if window is not None:
            check_window(op, window, sources, weight, geometry)
        if masks is not None:
            check_masks(op, sources, masks, names)
        plan = _decide(given, geometry, selected, facts is not None)
        if facts is not None:
            if len(_plans) >= _MOST:
                _plans.clear()
            _plans[facts] = plan
    return plan


def check_steps(op: str, masks: list[Tensor], steps: Sequence[WindowStep]) -> None:
    """check_chain, once for chains that look alike."""
    facts = _chain_facts(masks, steps) if is_eager() else None
    if facts is None or facts not in _chains:
        check_chain(op, [tuple(m.shape) for m in masks], steps)
        if facts is not None:
            if len(_chains) >= _MOST:
                _chains.clear()
            _chains.add(facts)


def _chain_facts(masks: list[Tensor], steps: Sequence[WindowStep]) -> tuple[object, ...] | None:
    facts: list[object] = [m.shape for m in masks]
    try:
        for step in steps:
            for numbers in step:
                facts += numbers
                facts.append(None)
        hash(tuple(facts))
    except TypeError:  # not steps, which the check says in words
        return None
    # With the types: 3.0 equals 3, and yet is refused.
    return *facts, *map(type, facts)


def _facts(given: Inputs, selected: str) -> tuple[object, ...] | None:
    """All that `plan_of` looks at; None if it cannot be kept. Of few steps, since each takes a microsecond."""
    op, sources, masks, _, weight, bias, window, geometry, epilogue, fold = given
    upsample, stride, padding, dilation, groups, zeroed = geometry
    activation, slope, norm = epilogue
    plain: list[object] = [activation, slope, fold, groups, *upsample, *zeroed]
    facts: list[object] = [op, selected, len(upsample), len(zeroed), *plain]
    for value in (stride, padding, dilation):
        if isinstance(value, tuple | list):
            facts.append(tuple(value))
            plain += value
        else:
            facts.append(value)
            plain.append(value)
    tensors = [weight, *sources]
    if bias is not None:
        tensors.append(bias)
    if masks is not None:
        tensors += masks
    if norm is not None:
        plain.append(norm.training)
        facts += (
            norm.training,
            norm.training or trains_gain(norm),
            norm.running_mean is None,
            norm.running_var is None,
        )
        tensors += (t for t in norm[:4] if t is not None)
    if window is not None:
        plain.append(window.full)
        facts += (window.full, len(window.planes))
        tensors += (window.counts, window.mask, *window.planes)
    # With the types, since 1.0 equals 1, and yet is refused.
    kinds = tuple(map(type, plain))
    if not _PLAIN.issuperset(kinds):
        return None
    none = (weight.is_cpu or weight.is_cuda) and not _any_autocast()
    autocast = None if none else autocast_dtype(weight.device.type)
    facts += (kinds, autocast, bias is None, None if masks is None else len(masks), len(sources))
    try:
        for t in tensors:
            facts += (t.shape, t.dtype, t.device)
    except AttributeError:  # not tensors, which the check says in words
        return None
    return tuple(facts)


def _decide(given: Inputs, geometry: Geometry, selected: str, eager: bool) -> Plan:
    op, sources, _, _, weight, bias, window, _, epilogue, fold = given
    dtype = _result_dtype(op, sources, weight, bias)
    # A trained gain over fixed statistics is a factor of the weight, and a half type would round that product, too.
    inner = torch.float32 if dtype != torch.float64 and trains_gain(epilogue.norm) else dtype
    call = _describe(sources, weight, inner, geometry, epilogue, fold)
    if call.batch_statistics and call.rows == 1:
        raise error(op, "x", "more than one value per channel for batch statistics", "1 (.eval() takes none)")
    kernel = routes.choose(op, call, selected)
    if kernel == "reference":  # to which the gain is a factor of its own
        inner = dtype
    oneDNN = kernel == "vendor" and call.device != _backends.DEVICE["cuda"]
    rounded, inner = convolution_dtype(dtype, oneDNN), convolution_dtype(inner, oneDNN)
    autocast = autocast_dtype(weight.device.type) is not None
    fold_from = routes.fold_from("plain" if oneDNN else "gpu", fold)
    casts = any(t.dtype != kind for t in (*sources, weight) for kind in (rounded, inner))
    normed = eager and kernel == "vendor" and window is not None and _is_fixed(epilogue.norm, wide_of(inner))
    return Plan(kernel, dtype, rounded, inner, casts, fold_from, geometry, oneDNN, autocast, call.rows, normed, eager)


def _describe(
    sources: list[Tensor], weight: Tensor, dtype: torch.dtype, geometry: Geometry, epilogue: Epilogue, fold: bool | None
) -> routes.Call:
    up, (stride, padding, dilation) = geometry.upsample[0], geometry[1:4]
    outputs, _, *kernel = weight.shape
    size = [output_size(sources[0].size(2 + d) * up, kernel[d], stride[d], padding[d], dilation[d]) for d in (0, 1)]
    return routes.Call(
        weight.device.type,
        dtype,
        len(sources),
        sum(s.size(1) for s in sources),
        outputs,
        kernel,
        stride,
        dilation,
        geometry.groups,
        sources[0].size(0) * size[0] * size[1],
        2 in geometry.upsample,
        epilogue.norm is not None and epilogue.norm.training,
        bool(fold) and 2 in geometry.upsample,
    )


def _result_dtype(op: str, sources: list[Tensor], weight: Tensor, bias: Tensor | None) -> torch.dtype:
    if autocasts(weight) and all(autocasts(s) for s in sources):
        return torch.get_autocast_dtype(weight.device.type)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype != sources[0].dtype:
            raise error(op, name, f"{sources[0].dtype} as x", parameter.dtype)
    return sources[0].dtype


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """What a kernel of this type takes parameters and statistics in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_fixed(norm: BatchNorm | None, dtype: torch.dtype) -> bool:
    return norm is not None and not norm.training and all(isinstance(t, Tensor) and t.dtype == dtype for t in norm[:4])


def trains_gain(norm: BatchNorm | None) -> bool:
    return norm is not None and not norm.training and norm.weight.requires_grad and torch.is_grad_enabled()
