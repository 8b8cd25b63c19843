# SPDX-License-Identifier: Apache-2.0
"""What the rows of region normalization and region-wise convolution share: sizes, masks, layers and their calls."""

import copy
from collections.abc import Callable

import torch
import workload
from harness import DEVICE, LAYOUTS, ON_GPU, SMOKE, Outputs, Rival, Row
from torch import Tensor, nn

from fused_inpaint import RegionConv2d
from fused_inpaint.baselines import DenseRegionConv2d

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
LIMIT, GRADIENT_LIMIT = (0.03, 0.1) if ON_GPU else (5e-5, 5e-4)
SIDE = 16 if SMOKE else 128
BATCH = 16 if ON_GPU and not SMOKE else 1
"""Of a layer's maps: one picture does not fill a GPU."""
NORMED = (2, 8, SIDE, SIDE) if SMOKE else (16 if ON_GPU else 4, 128, SIDE, SIDE)
EXISTING, MISSING, OUTPUTS = (6, 4, 4) if SMOKE else (192, 128, 128)


def filled(module: nn.Module) -> nn.Module:
    """The same parameters for every rival, by name and shape."""
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            g = torch.Generator().manual_seed(sum(map(ord, name.split(".")[-1])) + p.numel())
            p.copy_(torch.randn(p.shape, generator=g) / max(1.0, p.numel() / p.shape[0]) ** 0.5)
    return module


def fresh(*sizes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """On the device."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(size, generator=g, device=DEVICE) for size in sizes]


def square_mask(side: int) -> Tensor:
    """(1, 1, side, side): a centred square hole of a quarter of the area."""
    mask = torch.ones(1, 1, side, side)
    mask[..., side // 4 : side - side // 4, side // 4 : side - side // 4] = 0
    return mask


HOLES = {"square": square_mask, "brush": workload.brush_mask}


def rival(
    module: nn.Module,
    maps: list[Tensor],
    call: Callable[..., Tensor],
    layout: str = "channels_last",
    dtype: torch.dtype = DTYPE,
    training: bool = False,
    family: str = "partial",
) -> Rival:
    """`call(module, *maps)`, with a backward if `training`; outputs are the map and the gradients of the maps and the
    parameters."""
    module = copy.deepcopy(module).to(DEVICE, dtype).to(memory_format=LAYOUTS[layout])
    # Copies, since each rival has leaves of its own.
    leaves = [m.to(DEVICE, dtype, memory_format=LAYOUTS[layout], copy=True) for m in maps]
    leaves = [leaf.requires_grad_(training) for leaf in leaves]
    parameters = list(module.parameters())
    grad = None

    def forward() -> Tensor:
        return call(module, *leaves)

    def step() -> list[Tensor]:
        nonlocal grad
        y = forward()
        if grad is None:
            grad = fresh(tuple(y.shape), seed=1)[0].to(y.device, y.dtype).contiguous(memory_format=LAYOUTS[layout])
        return [y, *torch.autograd.grad(y, [*leaves, *parameters], grad)]

    def outputs() -> Outputs:
        if not training:
            return {"output": forward().double()}
        y, *gradients = step()
        names = [*(f"x{i}" for i in range(len(leaves))), *(n.split(".")[-1] for n, _ in module.named_parameters())]
        named = zip(names, gradients, strict=True)
        return {"output": y.detach().double()} | {f"gradient of {n}": g.double() for n, g in named}

    return Rival(step if training else forward, outputs, family)


def row(name: str, rivals: dict[str, Rival], truth: Rival, inference: bool) -> Row:
    return Row(name, rivals, {"partial": truth.outputs}, LIMIT, GRADIENT_LIMIT, inference=inference)


def region_layers(upsample: int) -> tuple[nn.Module, nn.Module]:
    """(ours, dense) of one decoder layer with the same parameters."""
    ours = RegionConv2d(
        EXISTING,
        OUTPUTS,
        3,
        padding=1,
        select="input",
        missing_channels=MISSING,
        upsample=upsample,
        padding_mode="reflect",
        activation="elu",
    )
    return filled(ours), filled(DenseRegionConv2d(EXISTING, MISSING, OUTPUTS, upsample))


class RegionStep:
    """Forward and backward of one region-wise decoder layer at `side` x `side`, for the memory it takes."""

    def __init__(self, form: str, side: int, upsample: int) -> None:
        ours, dense = region_layers(upsample)
        self.layer = (ours if form == "region ours" else dense).to(DEVICE, DTYPE).to(memory_format=torch.channels_last)
        maps = fresh((1, EXISTING, side, side), (1, MISSING, side, side))
        like = torch.channels_last
        self.maps = [m.to(DEVICE, DTYPE).contiguous(memory_format=like).requires_grad_() for m in maps]
        self.mask = workload.brush_mask(side).to(DEVICE, DTYPE)
        self.grad: Tensor | None = None

    def __call__(self) -> None:
        existing, missing = self.maps
        y = self.layer(existing, self.mask, missing)
        if self.grad is None:
            self.grad = torch.ones_like(y)
        y.backward(self.grad)

    def forget(self) -> None:
        for leaf in (*self.maps, *self.layer.parameters()):
            leaf.grad = None
