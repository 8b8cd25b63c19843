# SPDX-License-Identifier: Apache-2.0
"""The published networks' blocks and their operators beside the forms that people run."""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, LAYOUTS, SMOKE, Outputs, Rival, Row
from region_rivals import BATCH, DTYPE, GRADIENT_LIMIT, LIMIT, filled, fresh
from torch import Tensor, nn

from fused_inpaint import AOTBlock, PyramidConv2d, ops
from fused_inpaint.baselines import SeparateBranchAOTBlock, SeparateBranches, published_gated_blend

CHANNELS, SIDE = (16, 24) if SMOKE else (256, 64)
RATES = (1, 2, 4, 8)
KINDS = pytest.mark.parametrize("kind", ["forward", "training"])

Named = dict[str, Tensor]


def contender(
    module: nn.Module,
    maps: Iterable[Tensor],
    kind: str,
    layout: str = "channels_last",
    dtype: torch.dtype = DTYPE,
    family: str = "block",
    compared: Callable[[Named], Named] = lambda gradients: gradients,
) -> Rival:
    """`module(*maps)`, which gives a map or several; in training the gradients of all maps and parameters too.
    `compared`: what of the parameters' gradients is compared, and under which names."""
    place = {"device": DEVICE, "dtype": dtype, "memory_format": LAYOUTS[layout]}
    module = copy.deepcopy(module).to(**place)
    leaves = [m.to(**place, copy=True).requires_grad_(kind == "training") for m in maps]
    cotangents: list[Tensor] = []

    def forward() -> list[Tensor]:
        y = module(*leaves)
        return [y] if isinstance(y, Tensor) else list(y)

    def step() -> tuple[list[Tensor], list[Tensor]]:
        y = forward()
        if not cotangents:
            cotangents.extend(fresh(tuple(t.shape), seed=1 + i)[0].to(**place) for i, t in enumerate(y))
        return y, list(torch.autograd.grad(y, [*leaves, *module.parameters()], cotangents))

    def outputs() -> Outputs:
        y, gradients = step() if kind == "training" else (forward(), [])
        found = {f"output {i}": t for i, t in enumerate(y)}
        found |= {f"gradient of map {i}": t for i, t in enumerate(gradients[: len(leaves)])}
        names = [name for name, _ in module.named_parameters()]
        of_parameters = dict(zip(names, gradients[len(leaves) :], strict=bool(gradients)))
        found |= {f"gradient of {name}": t for name, t in compared(of_parameters).items()}
        return {name: t.detach().double() for name, t in found.items()}

    return Rival(step if kind == "training" else forward, outputs, family)


def row(name: str, kind: str, rivals: dict[str, Rival], truth: Rival) -> Row:
    limits = (LIMIT, GRADIENT_LIMIT)
    return Row(f"{name} {kind}", rivals, {truth.family: truth.outputs}, *limits, inference=kind == "forward")


class Function(nn.Module):
    """A function of maps as a module without parameters."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *maps: Tensor) -> Tensor:
        return self.call(*maps)


class Convolutions(nn.Module):
    """Those of the branches, and others, alone, on maps that are padded already."""

    def __init__(self, rates: tuple[int, ...], others: int = 0) -> None:
        super().__init__()
        branches = [nn.Conv2d(CHANNELS, CHANNELS // len(rates), 3, dilation=rate) for rate in rates]
        self.convs = nn.ModuleList([*branches, *(nn.Conv2d(CHANNELS, CHANNELS, 3) for _ in range(others))])

    def forward(self, *padded: Tensor) -> list[Tensor]:
        return [conv(x) for conv, x in zip(self.convs, padded, strict=True)]


def under_our_names(published: Named) -> Named:
    """Parameters of the published AOT block, or their gradients, as AOTBlock has them."""
    named = {name.replace(".1.", "."): t for name, t in published.items() if name.startswith(("fuse", "gate"))}
    return named | {f"pyramid.{kind}": t for kind, t in stacked(published).items()}


def stacked(published: Named) -> Named:
    """The branches' parameters, or their gradients, as PyramidConv2d has them."""
    kinds = ("weight", "bias") if published else ()
    return {kind: torch.cat([published[f"block{i:02d}.1.{kind}"] for i in range(len(RATES))]) for kind in kinds}


def without_gate_bias(gradients: Named) -> Named:
    """What is added to the gate is taken away again: the gradient of its bias is rounding."""
    return {name: t for name, t in gradients.items() if name != "gate.bias"}


@KINDS
def test_aot_block(kind: str, measure) -> None:
    """The block of AOT-GAN, 256 channels at 64 x 64; its six convolutions as the floor."""
    (x,) = fresh((BATCH, CHANNELS, SIDE, SIDE))
    eager, ours = filled(SeparateBranchAOTBlock(CHANNELS, RATES)), AOTBlock(CHANNELS, RATES)
    ours.load_state_dict(under_our_names(eager.state_dict()))
    padded = [F.pad(x, (rate,) * 4, "reflect") for rate in (*RATES, 1, 1)]

    def published(layout: str, dtype: torch.dtype = DTYPE) -> Rival:
        return contender(
            eager, [x], kind, layout, dtype, compared=lambda found: without_gate_bias(under_our_names(found))
        )

    rivals = {"ours": contender(ours, [x], kind, compared=without_gate_bias)}
    rivals |= {f"eager {layout}": published(layout) for layout in LAYOUTS}
    rivals["convolutions alone"] = contender(filled(Convolutions(RATES, 2)), padded, kind, family="floor")
    measure(row("aot_block", kind, rivals, published("nchw", torch.float64)))


@KINDS
def test_pyramid(kind: str, measure) -> None:
    """Its four dilated branches, 256 channels at 64 x 64; their convolutions of padded maps as the floor."""
    (x,) = fresh((BATCH, CHANNELS, SIDE, SIDE))
    eager, ours = filled(SeparateBranches(CHANNELS, RATES)), PyramidConv2d(CHANNELS, RATES)
    ours.load_state_dict(stacked(eager.state_dict()))
    padded = [F.pad(x, (rate,) * 4, "reflect") for rate in RATES]

    def published(layout: str, dtype: torch.dtype = DTYPE) -> Rival:
        return contender(eager, [x], kind, layout, dtype, compared=stacked)

    rivals = {"ours": contender(ours, [x], kind)}
    rivals |= {f"eager {layout}": published(layout) for layout in LAYOUTS}
    rivals["convolutions alone"] = contender(filled(Convolutions(RATES)), padded, kind, family="floor")
    measure(row("pyramid", kind, rivals, published("nchw", torch.float64)))


@KINDS
def test_gated_blend(kind: str, measure) -> None:
    """The gate's normalization and the blend alone, at the same size."""
    maps = fresh(*[(BATCH, CHANNELS, SIDE, SIDE)] * 3)
    ours, eager = Function(ops.gated_blend), Function(published_gated_blend)
    rivals = {"ours": contender(ours, maps, kind)}
    rivals |= {f"eager {layout}": contender(eager, maps, kind, layout) for layout in LAYOUTS}
    measure(row("gated_blend", kind, rivals, contender(eager, maps, kind, "nchw", torch.float64)))
