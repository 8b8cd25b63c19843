# SPDX-License-Identifier: Apache-2.0
"""What the rows of self-attention and of the correlation loss share: sizes, layers and their calls."""

import torch
from harness import DEVICE, SMOKE
from region_rivals import BATCH, DTYPE, filled, fresh
from torch import Tensor, nn

from fused_inpaint import SelfAttention2d, ops
from fused_inpaint.baselines import CorrelationL1, NonLocalBlock

SIDE = 8 if SMOKE else 64
ATTENDED = (BATCH, 8 if SMOKE else 64, SIDE, SIDE)
CORRELATED = (1, 8 if SMOKE else 128, SIDE, SIDE)


class GramL1(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return ops.gram_l1(a, b, over="positions")


def attention_layers() -> tuple[nn.Module, nn.Module]:
    """(ours, published) with the same parameters."""
    ours = filled(SelfAttention2d(ATTENDED[1]))
    published = NonLocalBlock(ATTENDED[1])
    convs = (published.theta, published.phi, published.g)
    parts = zip(convs, ours.qkv.weight.chunk(3), ours.qkv.bias.chunk(3), strict=True)
    with torch.no_grad():
        for conv, weight, bias in (*parts, (published.W, ours.out.weight, ours.out.bias)):
            conv.weight.copy_(weight), conv.bias.copy_(bias)
    return ours, published


class PairwiseStep:
    """Forward and backward of "attention ours" and others at `side` x `side`, for the memory it takes. The second map
    of the correlation loss is a target, without a gradient."""

    def __init__(self, form: str, side: int) -> None:
        op, kind = form.split()
        ours, published = attention_layers() if op == "attention" else (GramL1(), CorrelationL1())
        self.layer = (ours if kind == "ours" else published).to(DEVICE, DTYPE)
        channels = (ATTENDED if op == "attention" else CORRELATED)[1]
        maps = fresh(*[(1, channels, side, side)] * (1 if op == "attention" else 2))
        self.maps = [m.to(DEVICE, DTYPE).contiguous(memory_format=torch.channels_last) for m in maps]
        self.maps[0].requires_grad_()

    def __call__(self) -> None:
        self.layer(*self.maps).sum().backward()

    def forget(self) -> None:
        for leaf in (*self.maps, *self.layer.parameters()):
            leaf.grad = None
