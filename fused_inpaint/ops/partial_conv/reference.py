# SPDX-License-Identifier: Apache-2.0
"""Partial convolution in plain PyTorch, straight from the equation; every other implementation is compared with it.

    y = act(scale * (W . X~) * window / count + bias)   where count > 0, else 0        (Liu et al. 2018, eq. 1)
    new mask = count > 0                                                                (eq. 2)

X~ is X where the mask is 1 and 0 elsewhere, selected, not multiplied; count is the number of valid values under the
kernel window (over channels, too) and window that number where everything is valid. Masks are 1 = valid, 0 = hole.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _upsample(t: Tensor, factor: int) -> Tensor:
    return t if factor == 1 else t.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def partial_window(
    masks: Sequence[Tensor],  # (N or 1, 1 or C_i, H_i, W_i) uint8
    channels: Sequence[int],  # C_i
    upsample: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """(count int32, new mask uint8), both (N or 1, 1, H', W')."""
    valid = sum(
        _upsample(m.sum(1, keepdim=True, dtype=torch.int64) * (c // m.size(1)), up)
        for m, c, up in zip(masks, channels, upsample, strict=True)
    )
    assert isinstance(valid, Tensor)
    # float64 counts exactly on every device that has it; MPS and ONNX runtimes have not, and float32 does up to 2^24.
    narrow = valid.device.type == "mps" or torch.onnx.is_in_onnx_export()
    exact = torch.float32 if narrow else torch.float64
    ones = torch.ones(1, 1, *kernel_size, dtype=exact, device=valid.device)
    count = F.conv2d(valid.to(exact), ones, None, tuple(stride), tuple(padding), tuple(dilation))
    count = count.round().to(torch.int32)
    return count, (count > 0).to(torch.uint8)


def _activate(y: Tensor, activation: str, slope: float) -> Tensor:
    if activation == "relu":
        return F.relu(y)
    return F.leaky_relu(y, slope) if activation == "leaky_relu" else y


def _renormalised(
    sources: Sequence[Tensor],
    masks: Sequence[Tensor],
    count: Tensor,
    weight: Tensor,
    upsample: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """(W . X~) * window / count, 0 where the window is empty; half types are computed in float32."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    x = torch.cat(
        [
            _upsample(torch.where(m.bool(), s.to(wide), 0.0), up)
            for s, m, up in zip(sources, masks, upsample, strict=True)
        ],
        1,
    )
    y = F.conv2d(x, weight.to(wide), None, tuple(stride), tuple(padding), tuple(dilation), groups)
    window = sum(s.size(1) for s in sources) * weight.size(2) * weight.size(3)
    ratio = window / count.clamp(min=1).to(wide)
    return torch.where(count > 0, y * ratio, 0.0)


def partial_conv2d(
    sources: Sequence[Tensor],  # (N, C_i, H_i, W_i)
    masks: Sequence[Tensor],  # (N or 1, 1 or C_i, H_i, W_i) uint8
    count: Tensor,  # (N or 1, 1, H', W') int32
    weight: Tensor,  # (O, sum C_i / groups, kh, kw)
    bias: Tensor | None,  # (O,)
    scale: Tensor | None,  # (O,)
    upsample: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    zeroed: Sequence[int],  # not needed here: holes are selected away in any case
    activation: str,
    slope: float,
) -> Tensor:  # (N, O, H', W')
    y = _renormalised(sources, masks, count, weight, upsample, stride, padding, dilation, groups)
    if scale is not None:
        y = y * scale.to(y.dtype).view(1, -1, 1, 1)
    if bias is not None:
        y = y + bias.to(y.dtype).view(1, -1, 1, 1)
    y = torch.where(count > 0, _activate(y, activation, slope), 0.0)
    return y.to(sources[0].dtype)


def partial_conv2d_bn(
    sources: Sequence[Tensor],
    masks: Sequence[Tensor],
    count: Tensor,
    weight: Tensor,
    norm_weight: Tensor,  # (O,)
    norm_bias: Tensor,  # (O,)
    eps: float,
    upsample: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    zeroed: Sequence[int],  # not needed here: holes are selected away in any case
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, biased variance): batch norm over N, H', W' of the renormalised map, holes (0) included, then the
    activation, then 0 in holes, which is what the next partial convolution would read there."""
    v = _renormalised(sources, masks, count, weight, upsample, stride, padding, dilation, groups)
    y, mean, var = batch_norm(v, count, norm_weight, norm_bias, eps, activation, slope)
    return y.to(sources[0].dtype), mean, var


def batch_norm(
    v: Tensor,  # (N, O, H', W') renormalised, 0 in empty windows
    count: Tensor,  # (N or 1, 1, H', W') int32
    norm_weight: Tensor,  # (O,)
    norm_bias: Tensor,  # (O,)
    eps: float,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(act(norm(v)), 0 in empty windows; mean; biased variance)"""
    if v.numel() == 0:  # no value: nothing to normalise, and the running statistics keep theirs
        moved = mean = var = v.new_zeros(1, v.size(1), 1, 1)
    else:
        # Moved by about the mean, a constant that no statistic sees: on a GPU torch.var_mean rounds a mean to v's type
        # in every step, which for values far from 0 leaves the variance hardly a correct digit.
        moved = v.detach().mean((0, 2, 3), keepdim=True)
        v = v - moved
        var, mean = torch.var_mean(v, (0, 2, 3), correction=0, keepdim=True)
    y = (v - mean) * (var + eps).rsqrt()
    y = y * norm_weight.to(y.dtype).view(1, -1, 1, 1) + norm_bias.to(y.dtype).view(1, -1, 1, 1)
    y = torch.where(count > 0, _activate(y, activation, slope), 0.0)
    return y, (moved + mean).detach().flatten(), var.detach().flatten()
