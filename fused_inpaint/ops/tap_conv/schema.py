# SPDX-License-Identifier: Apache-2.0
"""Schema, output shape and derivative of the convolution at its input's resolution (kernel: csrc/tap_conv)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._library import define
from ..._library import ops as ops
from ..derivative import by_reference
from ..flops import convolution
from . import reference


def _fake(maps, weight, bias, upsampling, *rest):  # type: ignore[no-untyped-def]
    n, _, height, width = maps[0].shape
    factor = 1 if upsampling == "none" else 2
    size = (n, weight.size(0), factor * height, factor * width)
    return torch.empty(size, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    maps, weight, bias, *ctx.arguments = inputs
    ctx.save_for_backward(*maps, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    def call(*t: Any) -> Tensor:
        return reference.tap_conv2d(t[:-2], *t[-2:], *ctx.arguments)

    *maps, weight, bias = by_reference(call, ctx.saved_tensors, grad)
    return maps, weight, bias, None, None, None, None


define(
    "tap_conv2d(Tensor[] maps, Tensor weight, Tensor? bias, str upsampling, str padding_mode, str activation, "
    "float slope) -> Tensor",
    _fake,
    _backward,
    _setup_context,
    convolution,
)
