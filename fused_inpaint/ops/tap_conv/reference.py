# SPDX-License-Identifier: Apache-2.0
"""Convolution at the resolution of its input, in plain PyTorch as it is defined; every other implementation is compared
with it.

    y = act(W * pad(up(concat(maps))) + b)      odd kernel k, stride 1, padding k // 2
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..padding import pad


def tap_conv2d(
    maps: Sequence[Tensor],  # each (N, C, H, W)
    weight: Tensor,  # (O, sum of C, k, k)
    bias: Tensor | None,  # (O,)
    upsampling: str,
    padding_mode: str,
    activation: str,
    slope: float,
) -> Tensor:  # (N, O, H', W')
    x = maps[0] if len(maps) == 1 else torch.cat(list(maps), 1)
    if upsampling == "nearest":
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    elif upsampling == "bilinear":
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
    around = weight.size(-1) // 2
    if padding_mode != "zeros":
        x, around = pad(x, [around] * 4, padding_mode), 0
    y = F.conv2d(x, weight, bias, padding=around)
    # In place, as training takes these steps, too.
    if activation == "relu":
        return F.relu(y, inplace=True)
    if activation == "leaky_relu":
        return F.leaky_relu(y, slope, inplace=True)
    return F.elu(y, inplace=True) if activation == "elu" else y
