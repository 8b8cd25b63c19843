# SPDX-License-Identifier: Apache-2.0
"""The gated blend of AOT-GAN's block in plain PyTorch; every other implementation is compared with it (Zeng et al.,
"Aggregated Contextual Transformations for High-Resolution Image Inpainting", 2021, with the gate of the published
code).

    y = x * (1 - g) + f * g,  g = sigmoid(10 * (gate - mean) / (std + 1e-9) - 5)

mean and the unbiased std run over H and W of one sample's channel. The std of equal values is 0 and passes no gradient,
as torch's does; that of a single pixel, which is NaN there, is 0 too.
"""

import torch
from torch import Tensor


def gated_blend(
    x: Tensor,  # (N, C, H, W)
    f: Tensor,  # (N, C, H, W)
    gate: Tensor,  # (N, C, H, W)
) -> Tensor:  # (N, C, H, W)
    # MPS has no float64.
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    # Moved by a constant, which no statistic sees, so that the mean of equal values is their value to the last bit.
    v = gate.to(wide)
    v = v - v[..., :1, :1].detach()
    centred = v - v.mean((2, 3), keepdim=True)
    var = centred.square().sum((2, 3), keepdim=True) / max(gate.size(2) * gate.size(3) - 1, 1)
    std = torch.where(var > 0, torch.where(var > 0, var, 1.0).sqrt(), var)
    g = torch.sigmoid(10 * centred / (std + 1e-9) - 5)
    return (x.to(wide) * (1 - g) + f.to(wide) * g).to(x.dtype)
