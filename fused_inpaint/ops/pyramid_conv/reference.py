# SPDX-License-Identifier: Apache-2.0
"""Parallel dilated convolutions in plain PyTorch; every other implementation is compared with it (AOT block, Zeng et
al., "Aggregated Contextual Transformations for High-Resolution Image Inpainting", 2021; spatial pyramid dilation block,
Li et al., "DeepGIN: Deep Generative Inpainting Network for Extreme Image Inpainting", 2020).

    y = concat over branches b of act(W_b * pad_b(x) + bias_b)      dilation and padding d_b
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..padding import pad


def pyramid_conv2d(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (O, C, 3, 3): O / D rows for each dilation
    bias: Tensor | None,  # (O,)
    dilations: Sequence[int],  # D
    padding_mode: str,
    activation: str,
) -> Tensor:  # (N, O, H, W)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mode = "constant" if padding_mode == "zeros" else padding_mode
    maps = []
    for d, rows in zip(dilations, weight.to(wide).chunk(len(dilations)), strict=True):
        maps.append(F.conv2d(pad(x.to(wide), [d] * 4, mode), rows, dilation=d))
    y = torch.cat(maps, 1)
    if bias is not None:
        y = y + bias.to(wide).view(1, -1, 1, 1)
    return (F.relu(y) if activation == "relu" else y).to(x.dtype)
