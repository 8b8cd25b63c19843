# SPDX-License-Identifier: Apache-2.0
"""Region normalization in plain PyTorch, straight from the equation; every other implementation is compared with it.

    y = act(weight_r * (x - mean_r) / sqrt(var_r + eps * total / count_r) + bias_r)         for x in region r

mean_r and var_r (biased) run over the values of region r of one channel, in the whole batch or in one sample; count_r
is their number and total that of both regions (Yu et al., "Region Normalization for Image Inpainting", AAAI 2020, as
published in code: its batch norm over a map filled with the mean scales eps so). Region 1 is where the mask is 1.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _activate(y: Tensor, activation: str, slope: float) -> Tensor:
    if activation == "relu":
        return F.relu(y)
    # A choice of two values rather than F.leaky_relu, which ONNX runtimes do not have in float64.
    return torch.where(y > 0, y, slope * y) if activation == "leaky_relu" else y


def region_norm(
    x: Tensor,  # (N, C, H, W)
    mask: Tensor,  # (N or 1, 1 or C, H, W)
    weight: Tensor | None,  # (2, C): region 0, region 1
    bias: Tensor | None,  # (2, C)
    scale: Tensor | None,  # (N, 1, H, W), instead of weight
    shift: Tensor | None,  # (N, 1, H, W), instead of bias
    eps: float,
    instance: bool,
    shared_bias: bool,
    activation: str,
    slope: float,
    reduce: Callable[[Tensor], Tensor] = lambda t: t,
) -> Tensor:  # (N, C, H, W)
    """`reduce` adds a sum to those of the other processes."""
    # float64 is exact enough for any mean; MPS has none.
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    v, over = x.to(wide), (2, 3) if instance else (0, 2, 3)
    y = torch.zeros_like(v)
    for region, side in enumerate((mask == 0, mask != 0)):
        inside = side.expand_as(v)
        count = reduce(inside.sum(over, keepdim=True).to(wide))
        total = reduce(torch.full_like(count, v.size(2) * v.size(3) * (1 if instance else v.size(0))))
        values = count.clamp(min=1)
        mean = reduce(torch.where(inside, v, 0.0).sum(over, keepdim=True)) / values
        centred = torch.where(inside, v - mean, 0.0)
        var = reduce(centred.square().sum(over, keepdim=True)) / values
        out = centred * (var + eps * total / values).rsqrt()
        if weight is not None:
            out = out * weight[region].to(wide).view(1, -1, 1, 1)
        if scale is not None:
            out = out * scale.to(wide)
        if bias is not None and not shared_bias:
            out = out + bias[region].to(wide).view(1, -1, 1, 1)
        y = torch.where(inside, out, y)
    if bias is not None and shared_bias:
        y = y + bias.to(wide).sum(0).view(1, -1, 1, 1)
    if shift is not None:
        y = y + shift.to(wide)
    return _activate(y, activation, slope).to(x.dtype)


def channel_pool(x: Tensor) -> Tensor:
    """(N, 2, H, W): mean and maximum over the channels."""
    return torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
