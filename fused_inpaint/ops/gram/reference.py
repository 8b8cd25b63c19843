# SPDX-License-Identifier: Apache-2.0
"""L1 distance of Gram matrices in plain PyTorch; every other implementation is compared with it.

    y = sum |A A^T - B B^T|          for each sample, A and B being its features

with A (C, H W) over the channels (style losses) and (H W, C) over the positions (correlation loss).
"""

import torch
from torch import Tensor


def gram_l1(
    a: Tensor,  # (N, C, H, W)
    b: Tensor,  # (N, C, H, W)
    positions: bool,
) -> Tensor:  # (N,)
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    x, y = (t.to(wide).flatten(2) for t in (a, b))
    if positions:
        x, y = x.mT, y.mT
    return (x @ x.mT - y @ y.mT).abs().sum((1, 2))
