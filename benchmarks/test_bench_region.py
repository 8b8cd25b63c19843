# SPDX-License-Identifier: Apache-2.0
"""Region normalization and region-wise convolution beside the published forms and the plain operators."""

from typing import Any

import memory_probe
import pytest
import torch
import workload
from harness import DEVICE, LAYOUTS, SMOKE, Record
from region_rivals import (
    BATCH,
    DTYPE,
    EXISTING,
    HOLES,
    MISSING,
    NORMED,
    OUTPUTS,
    SIDE,
    filled,
    fresh,
    region_layers,
    rival,
    row,
)
from torch import Tensor, nn

from fused_inpaint import LearnedRegionNorm2d, RegionConv2d, RegionNorm2d
from fused_inpaint.baselines import TwoFilterConv2d, TwoPassLearnedRegionNorm2d, TwoPassRegionNorm2d


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_region_norm(training: bool, measure) -> None:
    """RN-B; torch's batch norm as the floor of what a norm costs."""
    maps = fresh(NORMED)
    mask = workload.brush_mask(SIDE).repeat(NORMED[0], 1, 1, 1).to(DEVICE, DTYPE)

    def with_mask(module: nn.Module, x: Tensor) -> Tensor:
        return module(x, mask.to(x.device, x.dtype))

    ours, published = filled(RegionNorm2d(NORMED[1], shared_bias=True)), filled(TwoPassRegionNorm2d(NORMED[1]))
    native = filled(nn.BatchNorm2d(NORMED[1]))
    rivals = {"ours": rival(ours, maps, with_mask, training=training)}
    for layout in LAYOUTS:
        rivals[f"published {layout}"] = rival(published, maps, with_mask, layout, training=training)
        batch_norm = rival(native, maps, lambda module, x: module(x), layout, training=training, family="plain")
        rivals[f"batch norm {layout}"] = batch_norm
    truth = rival(published, maps, with_mask, "nchw", torch.float64, training)
    kind = "training" if training else "forward"
    measure(row(f"region_norm {kind}", rivals, truth, not training))


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_learned_region_norm(training: bool, measure) -> None:
    maps = fresh(NORMED)

    def alone(module: nn.Module, x: Tensor) -> Tensor:
        return module(x)

    # A threshold that no pixel is near: which side rounding puts it on is not what is compared.
    ours = filled(LearnedRegionNorm2d(NORMED[1], threshold=0.999))
    published = filled(TwoPassLearnedRegionNorm2d(NORMED[1], threshold=0.999))
    published.load_state_dict(ours.state_dict())
    rivals = {"ours": rival(ours, maps, alone, training=training)}
    for layout in LAYOUTS:
        rivals[f"published {layout}"] = rival(published, maps, alone, layout, training=training)
    truth = rival(published, maps, alone, "nchw", torch.float64, training)
    kind = "training" if training else "forward"
    measure(row(f"learned_region_norm {kind}", rivals, truth, not training))


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("upsample", [1, 2])
def test_region_conv_input(upsample: int, hole: str, training: bool, measure) -> None:
    """The published decoder layer, 192 + 128 to 128 channels at 128 x 128, or from there to 256 x 256."""
    maps = fresh((BATCH, EXISTING, SIDE, SIDE), (BATCH, MISSING, SIDE, SIDE))
    mask = HOLES[hole](SIDE).to(DEVICE, DTYPE)

    def pair(module: nn.Module, existing: Tensor, missing: Tensor) -> Tensor:
        return module(existing, mask.to(existing.device, existing.dtype), missing)

    ours, dense = region_layers(upsample)
    rivals = {"ours": rival(ours, maps, pair, training=training)}
    rivals |= {f"dense {layout}": rival(dense, maps, pair, layout, training=training) for layout in LAYOUTS}
    truth = rival(dense, maps, pair, "nchw", torch.float64, training)
    kind = "training" if training else "forward"
    measure(row(f"region_conv input up{upsample} {hole} {kind}", rivals, truth, not training))


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("hole", HOLES)
def test_region_conv_output(hole: str, training: bool, measure) -> None:
    """Equation 1, 128 to 128 channels at 128 x 128; one plain convolution as the floor."""
    maps = fresh((BATCH, MISSING, SIDE, SIDE))
    mask = HOLES[hole](SIDE).to(DEVICE, DTYPE)

    def with_mask(module: nn.Module, x: Tensor) -> Tensor:
        return module(x, mask.to(x.device, x.dtype))

    ours, both = filled(RegionConv2d(MISSING, OUTPUTS, 3, padding=1)), filled(TwoFilterConv2d(MISSING, OUTPUTS))
    plain = filled(nn.Conv2d(MISSING, OUTPUTS, 3, padding=1))
    rivals = {"ours": rival(ours, maps, with_mask, training=training)}
    for layout in LAYOUTS:
        rivals[f"both filters {layout}"] = rival(both, maps, with_mask, layout, training=training)
        convolution = rival(plain, maps, lambda module, x: module(x), layout, training=training, family="plain")
        rivals[f"plain {layout}"] = convolution
    truth = rival(both, maps, with_mask, "nchw", torch.float64, training)
    kind = "training" if training else "forward"
    measure(row(f"region_conv output {hole} {kind}", rivals, truth, not training))


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("upsample", [1, 2])
def test_purity(upsample: int, hole: str, keep) -> None:
    """Which share of the tiles lies in one region: what region-wise convolution lives on."""
    mask = HOLES[hole](SIDE)
    valid = nn.functional.max_pool2d(mask, 18, 16, 1 if SIDE % 16 == 0 else 0)
    hole_too = nn.functional.max_pool2d(1 - mask, 18, 16, 1 if SIDE % 16 == 0 else 0)
    pure = 100 * ((valid * hole_too) == 0).float().mean().item()
    keep(Record(f"region_conv purity {hole}", extra={"tiles of 16 x 16 in one region, %": pure}))


@pytest.mark.skipif(SMOKE, reason="measures memory")
def test_memory(benchmark: Any, keep) -> None:
    figures: dict[str, float] = {}
    for upsample in (1, 2):
        for form in ("region ours", "region dense"):
            found = memory_probe.figures(form, SIDE, upsample)
            figures |= {f"up{upsample} {name}": value for name, value in found.items()}
    benchmark.pedantic(lambda: None, rounds=1)
    keep(Record("region_conv memory", extra=figures))
