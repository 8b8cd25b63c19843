# SPDX-License-Identifier: Apache-2.0
"""Padding of maps that are channels_last."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pad(x: Tensor, around: Sequence[int], mode: str) -> Tensor:
    """`F.pad` of maps (N, C, H, W) by (left, right, top, bottom)."""
    if torch.compiler.is_compiling():
        return _replicated(x, *around) if mode == "replicate" and x.requires_grad else F.pad(x, list(around), mode)
    laid = x.device.type != "cpu" and x.is_contiguous(memory_format=torch.channels_last)
    if mode in ("reflect", "replicate") and laid and x.size(0):
        return _as_volume(x, around, mode)
    return F.pad(x, list(around), mode)


def _as_volume(x: Tensor, around: Sequence[int], mode: str) -> Tensor:
    """(H, W, C), which torch pads as it lies on a GPU; a map it brings to NCHW and back."""
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, *around), mode).permute(0, 3, 1, 2)


def _replicated(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """In steps whose derivative Inductor makes itself. Of that of torch's own step, before a convolution, it expects
    another layout than torch 2.13 gives, and stops. Can go with a torch that passes tests/test_inductor.py without.
    """
    x = torch.cat([x[..., :1].expand(-1, -1, -1, left), x, x[..., -1:].expand(-1, -1, -1, right)], 3)
    return torch.cat([x[:, :, :1].expand(-1, -1, top, -1), x, x[:, :, -1:].expand(-1, -1, bottom, -1)], 2)
