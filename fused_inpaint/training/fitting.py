# SPDX-License-Identifier: Apache-2.0
"""Fitting one network to one picture: the working-resolution canvas, the training crops, and the loop."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fills

CAP = 384  # longest side, in working pixels, of what one forward pass sees
CROP = 128  # training crop: small crops give several times more steps per second and vary the data more
BATCH = 2
THICKEST = 96  # a hole thicker than this is worked on at lower resolution, or no crop holds it with its surroundings
CONTEXT = 48
LEARNING_RATE = 5e-4  # 2e-3 first loses several dB and takes hundreds of steps to come back
EMA = 0.98
CHECK_EVERY = 20
PATIENCE = 15  # checks without a better held-out value
CENTRE, SPREAD = 0.5, 0.25  # of the network's input and output


def thickness(known: Tensor) -> int:
    """Width in pixels of the widest place of the hole, to within twice the grid it is measured on."""
    factor = max(1, math.ceil(max(known.shape[-2:]) / 512))
    hole = F.pad(F.max_pool2d(1 - known, factor, ceil_mode=True), (1, 1, 1, 1))
    rounds = 0
    while hole.any():
        hole = 1 - F.max_pool2d(1 - hole, 3, 1, 1)
        rounds += 1
    return 2 * rounds * factor


def hole_error(result: Tensor, truth: Tensor, where: Tensor) -> float:
    """Mean squared error over the pixels where `where` is 1."""
    selected = (where > 0).expand_as(truth)
    return (result.clamp(0, 1)[selected] - truth[selected]).double().square().mean().item()


def moved(shape: Tensor, generator: torch.Generator) -> Tensor:
    """The mask mirrored at random and shifted at random, wrapping around."""
    flips = torch.randint(0, 2, (2,), generator=generator)
    shifts = [int(torch.randint(0, size, (1,), generator=generator)) for size in shape.shape[-2:]]
    return torch.roll(shape.flip([axis for axis in (2, 3) if flips[axis - 2]]), shifts, (2, 3))


class Canvas:
    """The picture at the resolution the network works at, and the way back."""

    def __init__(self, known: Tensor, cap: int = CAP, levels: int = 5) -> None:
        self.multiple = 2**levels
        self.cap = max(cap // self.multiple, 1) * self.multiple
        self.full = tuple(known.shape[-2:])
        self.scale = min(1.0, min(THICKEST, self.cap / 3) / max(thickness(known), 1))
        self.size = self.full if self.scale == 1.0 else tuple(max(round(side * self.scale), 1) for side in self.full)

    def shrink(self, image: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """A working pixel is the mean of its known pixels, and counts as known only where all of them are."""
        image = torch.where(known > 0, image, 0)
        if self.scale == 1.0:
            return image, known
        share = F.interpolate(known, self.size, mode="area")
        image = F.interpolate(image, self.size, mode="area") / share.clamp(min=1e-6)
        known = (share > 0.999).to(known.dtype)
        return image * known, known

    @torch.no_grad()
    def predict(self, net: nn.Module | None, image: Tensor, known: Tensor, where: Tensor) -> Tensor:
        """Smooth fill plus what the network adds (None: nothing) where `where` is 1; other holes may be left."""
        small, small_known = self.shrink(image, known)
        needed = F.adaptive_max_pool2d(where, self.size) > 0
        total, weight = torch.zeros_like(small), torch.zeros_like(small_known)
        for top, left in self._windows():
            area = (..., slice(top, top + self.cap), slice(left, left + self.cap))
            if not needed[area].any():
                continue
            tile, tile_known = small[area], small_known[area]
            height, width = tile.shape[-2:]
            filled = fills.smooth(tile, tile_known)
            if net is not None:
                pad = (0, -width % self.multiple, 0, -height % self.multiple)
                filled += residual_of(net, F.pad(tile, pad), F.pad(tile_known, pad))[..., :height, :width]
            tent = _tent(height, width).to(small)
            total[area] += filled * tent
            weight[area] += tent
        filled = total / weight.clamp(min=1e-6)
        if self.scale != 1.0:
            filled = F.interpolate(filled, self.full, mode="bilinear", align_corners=False)
            # The coarse fill meets the known pixels only on average; its error there, continued inwards, is taken off.
            filled = filled + fills.push_pull(image - filled, known)
        return torch.where(known > 0, image, filled.clamp(0, 1))

    def _windows(self) -> Iterator[tuple[int, int]]:
        step = self.cap - 2 * CONTEXT if self.cap > 3 * CONTEXT else self.cap
        height, width = self.size
        for top in [*range(0, max(height - self.cap, 0), step), max(height - self.cap, 0)]:
            for left in [*range(0, max(width - self.cap, 0), step), max(width - self.cap, 0)]:
                yield top, left


def residual_of(net: nn.Module, image: Tensor, known: Tensor) -> Tensor:
    """What the network adds to the smooth fill."""
    out, _ = net(torch.where(known > 0, (image - CENTRE) / SPREAD, 0), known)
    return out * SPREAD


def _tent(height: int, width: int) -> Tensor:
    rows = torch.minimum(torch.arange(1, height + 1), torch.arange(height, 0, -1))
    columns = torch.minimum(torch.arange(1, width + 1), torch.arange(width, 0, -1))
    return torch.minimum(rows[:, None], columns[None, :]).float()


class Batch(NamedTuple):
    image: Tensor  # (N, 3, S, S)
    visible: Tensor  # (N, 1, S, S): 1 = the network may look
    target: Tensor  # (N, 1, S, S): 1 = the loss counts
    smooth: Tensor  # (N, 3, S, S): the fill of what is not visible


class Crops:
    """Training data from one picture: crops, and an extra hole cut into the known pixels of each."""

    def __init__(
        self,
        canvas: Canvas,
        image: Tensor,
        shown: Tensor,  # known pixels the network may learn from
        known: Tensor,  # 0 = the real hole, whose shape the extra holes take
        seed: int,
        side: int = CROP,
        count: int = BATCH,
    ) -> None:
        self.image, self.shown = canvas.shrink(image, shown)
        self.hole = 1 - canvas.shrink(image, known)[1]
        self.generator = torch.Generator().manual_seed(seed)
        self.count = count
        self.side = max(side // canvas.multiple, 1) * canvas.multiple

    def batch(self) -> Batch:
        images, visible, targets = zip(*(self._one() for _ in range(self.count)), strict=True)
        image, seen = torch.cat(images), torch.cat(visible)
        return Batch(image, seen, torch.cat(targets), fills.smooth(image, seen))

    def _one(self) -> tuple[Tensor, Tensor, Tensor]:
        for _ in range(8):
            image, shown, hole = self._crop()
            extra = moved(hole, self.generator) if hole.any() and self._random() < 0.6 else self._box(shown)
            target = extra * shown
            if target.any() and float(target.mean()) < 0.6:
                break
        return image, shown * (1 - extra), target

    def _crop(self) -> tuple[Tensor, Tensor, Tensor]:
        height, width = self.image.shape[-2:]
        top = self._below(max(height - self.side, 0) + 1)
        left = self._below(max(width - self.side, 0) + 1)
        area = (..., slice(top, top + self.side), slice(left, left + self.side))
        pad = (0, self.side - min(width, self.side), 0, self.side - min(height, self.side))
        axes = [axis for axis in (2, 3) if self._random() < 0.5]
        image, shown, hole = (F.pad(whole[area], pad).flip(axes) for whole in (self.image, self.shown, self.hole))
        return image, shown, hole

    def _box(self, shown: Tensor) -> Tensor:
        extra = torch.zeros_like(shown)
        for _ in range(1 + self._below(3)):
            high, wide = 3 + self._below(self.side // 3), 3 + self._below(self.side // 3)
            top, left = self._below(self.side - high), self._below(self.side - wide)
            extra[..., top : top + high, left : left + wide] = 1
        return extra

    def _random(self) -> float:
        return float(torch.rand(1, generator=self.generator))

    def _below(self, bound: int) -> int:
        return int(torch.randint(0, bound, (1,), generator=self.generator))


@dataclass
class Fit:
    steps: int = 0
    converged: bool = False  # stopped because held-out pixels gained no more
    step_seconds: list[float] = field(default_factory=list)  # forward, backward and optimiser
    held_out: list[float] = field(default_factory=list)  # dB at every check


@torch.no_grad()
def start_from_smooth(net: nn.Module, gain: float = 0.0) -> nn.Module:
    """Scale what the network adds at first: with gain 0, training starts at the smooth fill itself."""
    for value in list(net.parameters())[-2:]:  # weight and bias of the last layer
        value.mul_(gain)
    return net


def forward_loss(net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(the filled batch, its loss over the extra holes)."""
    out = batch.smooth + residual_of(net, batch.image, batch.visible)
    error = F.smooth_l1_loss(out, batch.image, reduction="none", beta=0.1) * batch.target
    return out, error.sum() / (3 * batch.target.sum()).clamp(min=1)


def fit_network(
    net: nn.Module,
    crops: Crops,
    more: Callable[[int], bool],  # given the steps done: go on?
    validate: Callable[[nn.Module], float] | None = None,  # mean squared error on held-out pixels
) -> Fit:
    """Train while `more` says so and held-out pixels gain; leaves the best averaged weights in `net`, in eval mode."""
    optimiser = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    averaged = copy.deepcopy(net).eval().requires_grad_(False)
    fit, best, best_state, waiting = Fit(), math.inf, averaged.state_dict(), 0
    if validate is not None:
        best, best_state = validate(averaged), copy.deepcopy(averaged.state_dict())
        fit.held_out.append(_decibels(best))
    net.train()
    while more(fit.steps):
        batch = crops.batch()
        started = time.monotonic()
        optimiser.zero_grad(set_to_none=True)
        forward_loss(net, batch)[1].backward()
        optimiser.step()
        fit.step_seconds.append(time.monotonic() - started)
        fit.steps += 1
        _average(averaged, net, min(EMA, fit.steps / (fit.steps + 10)))
        if validate is None or fit.steps % CHECK_EVERY:
            continue
        error = validate(averaged)
        fit.held_out.append(_decibels(error))
        waiting = 0 if error < best else waiting + 1
        if error < best:
            best, best_state = error, copy.deepcopy(averaged.state_dict())
        if waiting >= PATIENCE:
            fit.converged = True
            break
    net.load_state_dict(best_state)
    net.eval()
    return fit


def _decibels(error: float) -> float:
    return -10 * math.log10(max(error, 1e-10))


@torch.no_grad()
def _average(averaged: nn.Module, net: nn.Module, keep: float) -> None:
    for mean, value in zip(averaged.state_dict().values(), net.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - keep)
        else:
            mean.copy_(value)
