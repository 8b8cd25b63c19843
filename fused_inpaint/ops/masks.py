# SPDX-License-Identifier: Apache-2.0
"""Mask planes, which the operators share: bytes, 1 = valid and 0 = hole (kernels: csrc/partial_conv/partial_window_*).

A soft mask, one with values between 0 and 1, is refused wherever the values can be looked at without waiting for a GPU.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backends
from .._library import define, ops
from .checks import error

SOFT = "0 or 1 everywhere"
"""What a mask must be, in the kernels' sentence about one that is not."""


def _mask_plane_fake(mask: Tensor, name: str) -> Tensor:
    return torch.empty(mask.shape, dtype=torch.uint8, device=mask.device)


define("mask_plane(Tensor mask, str name) -> Tensor", _mask_plane_fake)


def counted_by_reference(op: str, mask: Tensor) -> bool:
    """Whether what a layer needs beside its convolution, its mask above all, is plain PyTorch's work: Triton has no
    kernel for it, and uses the library's if there is."""
    device = mask.device.type
    backend = _backends.choose(op, device)
    return backend == "reference" or (backend == "triton" and not _backends.native(device))


def plane_of(op: str, mask: Tensor, name: str = "mask") -> Tensor:
    """The mask as bytes, checked to hold nothing but 0 and 1 where looking costs no synchronisation."""
    if counted_by_reference(op, mask):
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            odd = mask[(mask != 0) & (mask != 1)]
            if odd.numel():
                raise error(op, name, SOFT, odd[0].item())
        return (mask != 0).to(torch.uint8)
    if torch.compiler.is_compiling():
        plane: Tensor = ops.mask_plane(mask, f"{op}: {name}")
        return plane
    try:
        return ops.mask_plane(mask, f"{op}: {name}")
    except RuntimeError as failure:
        if SOFT not in str(failure):
            raise
        # The kernel's own sentence, without the source line that torch puts before it.
        sentence = str(failure).splitlines()[0]
        raise ValueError(sentence[max(sentence.find(f"{op}: "), 0) :]) from None


def resized(plane: Tensor, size: Sequence[int]) -> Tensor:
    """The plane at the size of another map, by nearest neighbour."""
    size = tuple(size)
    return plane if tuple(plane.shape[2:]) == size else F.interpolate(plane, size, mode="nearest")
