# SPDX-License-Identifier: Apache-2.0
"""The 16 layers of the U-Net at 512x512, one by one, in the state the network would call them in; what a call costs."""

import pytest
import torch
import workload
from harness import LAYOUTS, ON_GPU, SMOKE, Rival, Row
from rivals import exact, frozen, layer_rival, prepacked

pytestmark = pytest.mark.skipif(ON_GPU, reason="a row of the CPU")

LAYERS = list(workload.layers())
LARGE = [name for name in ("enc2", "enc3", "enc4", "enc5", "dec4", "dec3", "dec2") if name in workload.layers()]
COMPILED = [name for name in ("enc3", "dec3") if name in workload.layers()]
NAIVE = ("plain", "full-channel", "nvidia")


@pytest.mark.parametrize("name", LAYERS)
def test_forward(name: str, measure) -> None:
    """Ours on zeroed holes, as its producer leaves them, and on an input with something under the holes."""
    layer = workload.layers()[name]
    data = workload.inputs(layer)
    rivals = {"ours": layer_rival("ours", layer, data)}
    rivals["prepacked ours"] = layer_rival("ours", layer, data, wrap=prepacked)
    rivals["standalone ours"] = layer_rival("ours", layer, workload.inputs(layer, zeroed=False))
    for form in NAIVE:
        rivals |= {f"{form} {layout}": layer_rival(form, layer, data, layout) for layout in LAYOUTS}
    measure(Row(f"{name} forward", rivals, exact(layer, data, training=False)))


@pytest.mark.parametrize("name", LARGE)
def test_training(name: str, measure) -> None:
    """Forward and backward: gradients of features, skip features and weights."""
    layer = workload.layers()[name]
    data = workload.inputs(layer)
    rivals = {"ours": layer_rival("ours", layer, data, training=True)}
    for form in NAIVE:
        rivals |= {f"{form} {layout}": layer_rival(form, layer, data, layout, training=True) for layout in LAYOUTS}
    measure(Row(f"{name} training", rivals, exact(layer, data, training=True), inference=False))


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
def test_call(decoder: bool, training: bool, measure) -> None:
    """What one call of a layer costs, its arithmetic aside."""
    layer, data = workload.toy(decoder)
    rivals = {"ours": layer_rival("ours", layer, data, training=training)}
    for form in NAIVE:
        rivals |= {f"{form} {layout}": layer_rival(form, layer, data, layout, training) for layout in LAYOUTS}
    name = f"call of a toy {'decoder' if decoder else 'encoder'} layer, {'training' if training else 'forward'}"
    measure(Row(name, rivals, exact(layer, data, training), inference=not training))


@pytest.mark.slow
@pytest.mark.skipif(SMOKE, reason="compiles for minutes")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str, measure) -> None:
    """torch.compile of the naive layers, beside the same layers run eagerly."""
    layer = workload.layers()[name]
    data = workload.inputs(layer)
    rivals: dict[str, Rival] = {}
    rivals["ours"] = layer_rival("ours", layer, data)
    rivals["prepacked ours"] = layer_rival("ours", layer, data, wrap=prepacked)
    for form in ("full-channel", "nvidia"):
        for layout in LAYOUTS:
            rivals[f"{form} {layout}"] = layer_rival(form, layer, data, layout)
            rivals[f"compiled {form} {layout}"] = layer_rival(form, layer, data, layout, wrap=torch.compile)
        rivals[f"frozen {form}"] = layer_rival(form, layer, data, wrap=frozen)
    measure(Row(f"{name} compiled", rivals, exact(layer, data, training=False)))
