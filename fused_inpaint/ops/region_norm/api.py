# SPDX-License-Identifier: Apache-2.0
"""Region normalization: the public functions. A call goes on to torch.ops (csrc/region_norm)."""

from typing import Any

import torch
from torch import Tensor

from ... import _backends
from ..checks import FLOATS, check_feature_map, check_mask, error
from ..masks import plane_of
from . import reference, sync
from .schema import ops


def region_norm(
    x: Tensor,
    mask: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    stats: str = "batch",
    shared_bias: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.2,
    process_group: Any = None,
) -> Tensor:
    """Region normalization (Yu et al., "Region Normalization for Image Inpainting", AAAI 2020, eq. 1 to 4).

        y = act(weight_r * (x - mean_r) / sqrt(var_r + eps * total / count_r) + bias_r)         for x in region r

    Region 1 is where the mask is 1, region 0 where it is 0; each has its own statistics per channel, and a value of one
    never reaches the other. var_r is biased. count_r is the number of the region's values and total that of both: eps
    weighs more in a small region, as in the published code. A region of equal values gives bias_r.

    Args:
        x: features (N, C, H, W), any memory format; channels_last is fastest.
        mask: (N or 1, 1 or C, H, W) uint8, bool or float, 0 or 1, on x's device.
        weight, bias: (2, C) or None (1 and 0), region 0 first.
        eps: added to the variance, scaled as above; more than 0.
        stats: "batch": over N, H, W, in training and evaluation alike, as published; "instance": over H, W of each
            sample, as in the paper.
        shared_bias: add both regions' biases everywhere, as the published code does.
        scale, shift: (N or 1, 1, H, W), a factor and a summand for each pixel instead of weight and bias (RN-L).
        activation: "none", "relu" or "leaky_relu" with `slope`, in the same pass.
        process_group: a `torch.distributed` group whose processes join their statistics of the batch (a sample is never
            on two of them); each must call it and its backward. Not in compiled graphs.

    Returns:
        y (N, C, H, W) in x's dtype, channels_last.

    Dtypes: float32, float64 (CPU), float16, bfloat16. Statistics are shifted sums in float32, merged in float64.

    Raises:
        ValueError: an argument of wrong rank, size, dtype or device.
        NoBackendError: a backend asked for by name cannot run this call.

    >>> import torch
    >>> from fused_inpaint import ops
    >>> x, mask = torch.rand(2, 3, 8, 8), torch.ones(2, 1, 8, 8)
    >>> mask[..., :4] = 0
    >>> y = ops.region_norm(x, mask)
    >>> y[..., :4].mean().abs().item() < 1e-6, y[..., 4:].mean().abs().item() < 1e-6
    (True, True)
    """
    op = "region_norm"
    check_feature_map(op, "x", x, x)
    check_mask(op, mask, x)
    _check_parameters(op, x, weight, bias, scale, shift)
    if not eps > 0:
        raise error(op, "eps", "more than 0", eps)
    if stats not in ("batch", "instance"):
        raise error(op, "stats", "batch or instance", stats)
    if activation not in ("none", "relu", "leaky_relu"):
        raise error(op, "activation", "none, relu or leaky_relu", activation)
    if not slope >= 0:
        raise error(op, "slope", "0 or more", slope)
    instance = stats == "instance"
    if process_group is not None and torch.compiler.is_compiling():
        raise error(op, "process_group", "None in a compiled graph", "a group")
    group = "" if instance else sync.named(process_group)
    backend = _backends.choose(op, x.device.type, refusal=lambda name: _refusal(name, x.dtype))
    plane = plane_of(op, mask)
    if backend == "reference" or (x.numel() == 0 and not group):
        point = (weight, bias, scale, shift, eps, instance, shared_bias, activation, slope)
        return reference.region_norm(x, plane, *point, sync.differentiable_sum(group))
    # A CPU computes float16 faster, and with one rounding less, in float32.
    inner = torch.float32 if backend == "cpu" and x.dtype == torch.float16 else x.dtype
    v = x.to(inner).contiguous(memory_format=torch.channels_last)
    plane = plane.contiguous(memory_format=torch.channels_last)
    suffix = "_triton" if backend == "triton" else ""
    with torch.no_grad():
        count, mean, m2 = getattr(ops, f"region_moments{suffix}")(v.detach(), plane, instance)
        count, mean, m2 = sync.joined(count, mean, m2, group)
        total = count.sum(1, keepdim=True)
        values = count.clamp(min=1)
        wide = torch.float64 if inner == torch.float64 else torch.float32
        invstd = (m2 / values + eps * total / values).rsqrt().clamp(max=torch.finfo(wide).max)
    parameters = [None if t is None else t.to(wide) for t in (weight, bias)]
    maps = [None if t is None else t.to(wide).expand(x.size(0), -1, -1, -1).contiguous() for t in (scale, shift)]
    y = getattr(ops, f"region_norm{suffix}")(
        v, plane, mean, invstd, count, *parameters, *maps, shared_bias, activation, slope, eps, instance, group
    )
    return y.to(x.dtype)


def channel_pool(x: Tensor) -> Tensor:
    """Mean and maximum over the channels in one read: what RN-L makes its map from.

    x (N, C, H, W), C at least 1, to (N, 2, H, W) in x's dtype, the mean first. The maximum's gradient goes to its first
    occurrence.

    >>> import torch
    >>> from fused_inpaint import ops
    >>> ops.channel_pool(torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)).flatten().tolist()
    [2.0, 3.0]
    """
    op = "channel_pool"
    check_feature_map(op, "x", x, x)
    if x.size(1) < 1:
        raise error(op, "x", "of at least one channel", tuple(x.shape))
    backend = _backends.choose(op, x.device.type, refusal=lambda name: _refusal(name, x.dtype))
    if backend == "reference" or x.numel() == 0:
        return reference.channel_pool(x)
    inner = torch.float32 if backend == "cpu" and x.dtype == torch.float16 else x.dtype
    v = x.to(inner).contiguous(memory_format=torch.channels_last)
    return getattr(ops, f"channel_pool{'_triton' if backend == 'triton' else ''}")(v).to(x.dtype)


def _refusal(name: str, dtype: torch.dtype) -> str:
    return "it computes in float32, not float64" if name == "triton" and dtype == torch.float64 else ""


def _check_parameters(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> None:
    n, c, h, w = x.shape
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != (2, c):
            raise error(op, name, f"(2, {c})", tuple(t.shape))
    for name, t in (("scale", scale), ("shift", shift)):
        if t is not None and (t.dim() != 4 or t.size(0) not in (1, n) or t.shape[1:] != (1, h, w)):
            raise error(op, name, f"({n} or 1, 1, {h}, {w})", tuple(t.shape))
    if (scale is None) != (shift is None):
        raise error(op, "scale and shift", "given together", "one of them")
    for name, t in (("weight", weight), ("bias", bias)):
        if scale is not None and t is not None:
            raise error(op, name, "None with scale and shift", "a tensor")
    for name, t in (("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)):
        if t is not None and (t.dtype not in FLOATS or t.device != x.device):
            raise error(op, name, f"a float tensor on {x.device}", f"{t.dtype} on {t.device}")
