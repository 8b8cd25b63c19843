# SPDX-License-Identifier: Apache-2.0
"""The layers of the partial-convolution U-Net, and their inputs as the network feeds them."""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import DEVICE, SMOKE
from torch import Tensor

from fused_inpaint.baselines import ENCODER_KERNELS, ENCODER_WIDTHS, PConvUNet

LEVELS = 3 if SMOKE else 8
WIDTH = 4 if SMOKE else 64
CHANNELS = 3
HOLES = 0.25


@dataclass(frozen=True)
class Layer:
    """One layer of the network; `size` is the side of its output. In the encoder `up` is all its input, `skip` 0."""

    name: str
    up: int
    skip: int
    out: int
    kernel: int
    size: int
    bias: bool

    @property
    def level(self) -> int:
        return int(self.name[3:])

    @property
    def decoder(self) -> bool:
        return self.skip > 0


@functools.cache
def layers(picture: int = 512) -> dict[str, Layer]:
    """enc1 .. enc8, dec8 .. dec1 in order of execution."""
    widths = [CHANNELS, *(WIDTH * factor for factor in ENCODER_WIDTHS[:LEVELS])]
    side = 32 if SMOKE else picture
    table = {}
    for i in range(LEVELS):
        name = f"enc{i + 1}"
        table[name] = Layer(name, widths[i], 0, widths[i + 1], ENCODER_KERNELS[i], side >> (i + 1), bias=False)
    for i in reversed(range(LEVELS)):
        name = f"dec{i + 1}"
        table[name] = Layer(name, widths[i + 1], widths[i], widths[i], 3, side >> i, bias=i == 0)
    return table


@functools.cache
@torch.inference_mode(False)
def brush_mask(side: int, seed: int = 0) -> Tensor:
    """(1, 1, side, side) float mask, 1 = valid: random strokes until a quarter of the picture is hole."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    rows = torch.arange(side, dtype=torch.float32).view(-1, 1)
    columns = torch.arange(side, dtype=torch.float32).view(1, -1)
    hole = torch.zeros(side, side, dtype=torch.bool)
    while hole.float().mean().item() < HOLES:
        y, x, angle, width = draw(0, side), draw(0, side), draw(0, 2 * math.pi), draw(side / 50, side / 14)
        for _ in range(4):
            angle += draw(-0.8, 0.8)
            length = draw(side / 16, side / 6)
            dy, dx = math.sin(angle), math.cos(angle)
            along = ((rows - y) * dy + (columns - x) * dx).clamp(0, length)
            distance = (rows - y - along * dy) ** 2 + (columns - x - along * dx) ** 2
            hole |= distance <= (width / 2) ** 2
            y, x = y + dy * length, x + dx * length
    return (~hole).float().view(1, 1, side, side)


def brush_masks(side: int, batch: int) -> Tensor:
    """(batch, 1, side, side)"""
    return torch.cat([brush_mask(side, seed) for seed in range(batch)])


@functools.cache
@torch.inference_mode(False)
def mask_chain(side: int, batch: int = 1) -> dict[str, Tensor]:
    """The one-channel mask behind every layer, and "input": a pixel is valid when its window holds a valid one."""
    chain = {"input": brush_masks(side, batch)}
    behind = ["input"]
    mask = chain["input"]
    for name, layer in layers(side).items():
        if layer.decoder:
            mask = F.interpolate(mask, scale_factor=2, mode="nearest")
            mask = F.max_pool2d(torch.maximum(mask, chain[behind[layer.level - 1]]), 3, 1, 1)
        else:
            mask = F.max_pool2d(mask, layer.kernel, 2, layer.kernel // 2)
            behind.append(name)
        chain[name] = mask
    return chain


@dataclass
class Inputs:
    """Channels-last features and one-channel float masks; skip and skip_mask are None in the encoder."""

    x: Tensor
    mask: Tensor
    skip: Tensor | None
    skip_mask: Tensor | None
    weight: Tensor
    bias: Tensor | None


def inputs(layer: Layer, picture: int = 512, zeroed: bool = True, batch: int = 1) -> Inputs:
    """Features behind an activation, with the mask of that depth, on the device; zero in the holes unless `zeroed` is
    False."""
    side = 32 if SMOKE else picture
    chain = {name: mask.to(DEVICE) for name, mask in mask_chain(side, batch).items()}
    generator = torch.Generator(DEVICE).manual_seed(layer.level)
    level = layer.level

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE)

    def features(channels: int, mask: Tensor, slope: float) -> Tensor:
        x = F.leaky_relu(random(batch, channels, *mask.shape[2:]), slope)
        return (x * mask if zeroed else x).contiguous(memory_format=torch.channels_last)

    outer = "input" if level == 1 else f"enc{level - 1}"
    if layer.decoder:
        deepest = level == LEVELS
        mask = chain[f"enc{level}" if deepest else f"dec{level + 1}"]
        x = features(layer.up, mask, 0.0 if deepest else 0.2)
        skip_mask = chain[outer]
        skip = features(layer.skip, skip_mask, 0.0)
    else:
        mask, skip, skip_mask = chain[outer], None, None
        x = features(layer.up, mask, 0.0)
    fan_in = (layer.up + layer.skip) * layer.kernel**2
    weight = random(layer.out, layer.up + layer.skip, layer.kernel, layer.kernel)
    bias = random(layer.out) if layer.bias else None
    return Inputs(x, mask, skip, skip_mask, weight * math.sqrt(2.0 / fan_in), bias)


def toy(decoder: bool) -> tuple[Layer, Inputs]:
    """A layer with next to no arithmetic, 8 channels and an output of 4x4: what it takes is what a call costs."""
    layer = Layer("dec0" if decoder else "enc0", 8, 8 if decoder else 0, 8, 3, 4, bias=True)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def features(side: int) -> tuple[Tensor, Tensor]:
        mask = torch.ones(1, 1, side, side, device=DEVICE)
        mask[..., : side // 2, : side // 2] = 0
        x = torch.randn(1, 8, side, side, generator=generator, device=DEVICE) * mask
        return x.contiguous(memory_format=torch.channels_last), mask

    x, mask = features(2 if decoder else 8)
    skip, skip_mask = features(4) if decoder else (None, None)
    weight = torch.randn(8, layer.up + layer.skip, 3, 3, generator=generator, device=DEVICE) / 12
    return layer, Inputs(x, mask, skip, skip_mask, weight, torch.zeros(8, device=DEVICE))


@functools.cache
@torch.inference_mode(False)
def network_state() -> dict[str, Tensor]:
    """Parameters with batch statistics that fit them, so that activations in eval mode have a sensible size."""
    torch.manual_seed(0)
    net = PConvUNet("full_channel", LEVELS, CHANNELS, WIDTH).train()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
        for _ in range(2):
            x, mask = network_input(32 if SMOKE else 256, batch=2)
            net(x, mask)
    return net.state_dict()


def network_input(side: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """(picture, mask): noise with structure at several scales, zero in the holes; the mask has one channel."""
    generator = torch.Generator().manual_seed(side + batch)
    x = torch.zeros(batch, CHANNELS, side, side)
    for scale in (1, 4, 16):
        noise = torch.randn(batch, CHANNELS, side // scale, side // scale, generator=generator)
        x += F.interpolate(noise, size=(side, side), mode="bilinear", align_corners=False)
    mask = brush_masks(side, batch)
    return (x * mask).contiguous(memory_format=torch.channels_last), mask
