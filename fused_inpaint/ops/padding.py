# SPDX-License-Identifier: Apache-2.0
"""Padding of maps that are channels_last."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pad(x: Tensor, around: Sequence[int], mode: str) -> Tensor:
    """`F.pad` of maps (N, C, H, W) by (left, right, top, bottom), in the layout that they have."""
    if torch.compiler.is_compiling():
        return _replicated(x, *around) if mode == "replicate" and x.requires_grad else F.pad(x, list(around), mode)
    if mode in ("reflect", "replicate") and x.device.type != "cpu" and x.size(0):
        # As a volume (H, W, C), which torch pads as it lies; a map it brings to NCHW and back.
        return F.pad(x.permute(0, 2, 3, 1), (0, 0, *around), mode).permute(0, 3, 1, 2)
    return F.pad(x, list(around), mode)


def _replicated(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """In steps whose derivative Inductor makes itself. Of that of torch's own step, before a convolution, it expects
    another layout than torch 2.13 gives, and stops."""
    x = torch.cat([x[..., :1].expand(-1, -1, -1, left), x, x[..., -1:].expand(-1, -1, -1, right)], 3)
    return torch.cat([x[:, :, :1].expand(-1, -1, top, -1), x, x[:, :, -1:].expand(-1, -1, bottom, -1)], 2)
