# SPDX-License-Identifier: Apache-2.0
"""Region-wise convolution in plain PyTorch; every other implementation is compared with it (Ma et al., "Region-wise
Generative Adversarial Image Inpainting for Large Missing Areas", 2022).

    output:  y = act(W_r . x + b_r)                                  for an output location in region r       (eq. 1)
    input:   y = act(W . concat(E where m = 1, X where m = 0) + b)   a filter for each input region (published code)

Masks are 1 = valid, 0 = hole. Values are selected by region, not multiplied. Padding follows the upsampling.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..padding import pad


def _activate(y: Tensor, activation: str) -> Tensor:
    return F.elu(y) if activation == "elu" else y


def _convolve(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], mode: str
) -> Tensor:
    around = (padding[1], padding[1], padding[0], padding[0])
    x = F.pad(x, around) if mode == "zeros" else pad(x, around, mode)
    return F.conv2d(x, weight, None, tuple(stride), 0, tuple(dilation))


def region_conv2d_output(
    x: Tensor,  # (N, C, H, W)
    mask: Tensor,  # (N or 1, 1, H', W') uint8
    weight: Tensor,  # (2, O, C, kh, kw): hole, valid
    bias: Tensor | None,  # (2, O)
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_mode: str,
    activation: str,
) -> Tensor:  # (N, O, H', W')
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    hole, valid = (_convolve(x.to(wide), w, stride, padding, dilation, padding_mode) for w in weight.to(wide).unbind())
    if bias is not None:
        hole, valid = (y + b.view(1, -1, 1, 1) for y, b in zip((hole, valid), bias.to(wide).unbind(), strict=True))
    return _activate(torch.where(mask != 0, valid, hole), activation).to(x.dtype)


def region_conv2d_input(
    existing: Tensor,  # (N, Ce, H, W)
    missing: Tensor,  # (N, Cx, H, W)
    mask: Tensor,  # (N or 1, 1, H, W) uint8
    weight: Tensor,  # (O, Ce + Cx, kh, kw)
    bias: Tensor | None,  # (O,)
    upsample: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_mode: str,
    activation: str,
) -> Tensor:  # (N, O, H', W')
    wide = torch.float64 if existing.dtype == torch.float64 else torch.float32
    valid = torch.where(mask != 0, existing.to(wide), 0.0)
    hole = torch.where(mask == 0, missing.to(wide), 0.0)
    x = torch.cat([valid, hole], 1).repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
    y = _convolve(x, weight.to(wide), stride, padding, dilation, padding_mode)
    if bias is not None:
        y = y + bias.to(wide).view(1, -1, 1, 1)
    return _activate(y, activation).to(existing.dtype)
