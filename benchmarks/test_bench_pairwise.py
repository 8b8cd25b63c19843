# SPDX-License-Identifier: Apache-2.0
"""Blocks and losses that compare all positions of a map with each other, beside their published forms."""

from typing import Any

import memory_probe
import pytest
import torch
from harness import DEVICE, LAYOUTS, SMOKE, Record, Row
from pairwise_rivals import ATTENDED, CORRELATED, DTYPE, SIDE, GramL1, attention_layers
from region_rivals import LIMIT, fresh, rival, row
from torch import Tensor, nn

from fused_inpaint.baselines import CorrelationL1


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_attention(training: bool, measure) -> None:
    """DeepGIN's non-local block at 64 x 64, 64 channels; the published one as scores, softmax and product."""
    maps = fresh(ATTENDED)

    def alone(module: nn.Module, x: Tensor) -> Tensor:
        return module(x)

    ours, published = attention_layers()
    rivals = {"ours": rival(ours, maps, alone, training=training)}
    rivals |= {f"published {layout}": rival(published, maps, alone, layout, training=training) for layout in LAYOUTS}
    truth = rival(published, maps, alone, "nchw", torch.float64, training)
    measure(row(f"attention {'training' if training else 'forward'}", rivals, truth, not training))


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("gradients", [1, 2])
def test_gram_l1(gradients: int, training: bool, measure) -> None:
    """The correlation loss of two maps, 128 channels at 64 x 64; with one gradient the second is the target."""
    if gradients == 2 and not training:
        pytest.skip("the same as with one")
    a, b = fresh(CORRELATED, CORRELATED)
    given = b.to(DEVICE, DTYPE)

    def distance(module: nn.Module, a: Tensor, *b: Tensor) -> Tensor:
        y = module(a, *(b or [given.to(a.device, a.dtype).contiguous(memory_format=layout_of(a))]))
        return y.view(-1, 1, 1, 1)

    def layout_of(t: Tensor) -> torch.memory_format:
        return torch.channels_last if t.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format

    maps = [a, b][:gradients]
    rivals = {"ours": rival(GramL1(), maps, distance, training=training)}
    for layout in LAYOUTS:
        rivals[f"eager {layout}"] = rival(CorrelationL1(), maps, distance, layout, training=training)
    truth = rival(CorrelationL1(), maps, distance, "nchw", torch.float64, training)
    kind = f"{gradients} training" if training else "forward"
    # A difference that rounding takes across 0 changes its sign, which is what the gradient is made of.
    measure(Row(f"gram_l1 positions {kind}", rivals, {"partial": truth.outputs}, LIMIT, 0.02, inference=not training))


@pytest.mark.skipif(SMOKE, reason="measures memory")
@pytest.mark.parametrize("op, rival", [("attention", "published"), ("gram_l1", "eager")])
def test_pairwise_memory(op: str, rival: str, benchmark: Any, keep) -> None:
    figures: dict[str, float] = {}
    for form in (f"{op} ours", f"{op} {rival}"):
        figures |= memory_probe.figures(form, SIDE, 1)
    benchmark.pedantic(lambda: None, rounds=1)
    keep(Record(f"{op} memory", extra=figures))
