# SPDX-License-Identifier: Apache-2.0
"""Internal learning: a small partial-convolution U-Net, fitted to the known pixels of one photo, must earn its place.

The network predicts what a smooth fill lacks. It learns by filling extra holes, shaped like the real one, cut into
known pixels. Two more sets of known pixels are hidden from it: one decides when to stop, the other compares it with the
smooth fill and with scikit-image's biharmonic inpainting, and the best of the three fills the real hole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fills
from .fitting import CAP, CONTEXT, Canvas, Crops, Fit, fit_network, hole_error, moved, start_from_smooth, thickness

Progress = Callable[[float, str], None]

LEVELS, WIDTH = 5, 32
LEARNING_REACH = 3 * CAP  # a little damage in a large photo is learned from its surroundings, not from all of it
HELD_OUT_WINDOWS = 3  # each CAP wide; more would make every check on a large photo slow
STOP_SHARE, JUDGE_SHARE = 0.08, 0.15  # of the known pixels, at most
STOP_COPIES, JUDGE_COPIES = 2, 6
FEWEST_HELD_OUT, MOST_HELD_OUT = 300, 40_000  # pixels: small holes are copied more often, of large ones a part


@dataclass(frozen=True)
class Report:
    kept: str
    psnr: dict[str, float]  # candidate -> dB on held-out known pixels
    steps: int = 0
    seconds: float = 0.0
    converged: bool = False  # training ended because held-out pixels gained no more, before steps or time ran out
    scale: float = 1.0  # working pixels per photo pixel
    notes: tuple[str, ...] = ()

    def sentence(self) -> str:
        if not self.psnr:
            return f"too few known pixels to hold any out -> kept {self.kept}"
        values = ", ".join(f"{name} {value:.1f} dB" for name, value in self.psnr.items())
        return f"held-out known pixels: {values} -> kept {self.kept}"


def restore(
    image: Tensor,  # (1, 3, H, W) in [0, 1]
    known: Tensor,  # (1, 1, H, W): 1 = known, 0 = hole
    *,
    seconds: float = 60.0,
    steps: int | None = None,
    seed: int = 0,
    levels: int = LEVELS,
    width: int = WIDTH,
    progress: Progress | None = None,
) -> tuple[Tensor, Report]:
    """Fill the hole of `image` with the candidate that does best on held-out known pixels; the known stay as they are.

    With `steps` the clock is ignored, and the same seed gives the same picture.
    """
    started = time.monotonic()
    known = (known > 0).to(image.dtype)
    if known.all() or not known.any():
        raise ValueError("restore: known must have both ones and zeros, got only one of them")
    rows, columns = _surroundings(known)
    area = (..., rows, columns)
    filled, report = _restore_area(
        image[area].contiguous(), known[area].contiguous(), started, seconds, steps, seed, (levels, width), progress
    )
    result = image.clone()
    result[area] = filled
    return torch.where(known > 0, image, result), report


def _restore_area(
    image: Tensor,
    known: Tensor,
    started: float,
    seconds: float,
    steps: int | None,
    seed: int,
    shape: tuple[int, int],
    progress: Progress | None,
) -> tuple[Tensor, Report]:
    generator = torch.Generator().manual_seed(seed)
    hole = 1 - known
    stop_set = held_out(hole, known, STOP_SHARE, STOP_COPIES, generator)
    judge_set = held_out(hole, known * (1 - stop_set), JUDGE_SHARE, JUDGE_COPIES, generator)
    if not stop_set.any() or not judge_set.any():
        return Canvas(known).predict(None, image, known, hole), Report(
            "smooth fill", {}, seconds=time.monotonic() - started
        )

    canvas = Canvas(known, levels=shape[0])
    net = new_network(*shape, seed)
    shown = known * (1 - stop_set) * (1 - judge_set)
    fit = fit_network(
        net,
        Crops(canvas, image, shown, known, seed),
        _clock(steps, started, seconds, progress),
        validate=lambda now: hole_error(canvas.predict(now, image, known * (1 - stop_set), stop_set), image, stop_set),
    )
    candidates: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "network": lambda visible, where: canvas.predict(net, image, visible, where),
        "smooth fill": lambda visible, where: canvas.predict(None, image, visible, where),
        "biharmonic": lambda visible, where: fills.biharmonic(image, visible, where),
    }
    return _keep_best(candidates, image, known, judge_set, fit, canvas.scale, started)


def _keep_best(
    candidates: dict[str, Callable[[Tensor, Tensor], Tensor]],
    image: Tensor,
    known: Tensor,
    judge_set: Tensor,
    fit: Fit,
    scale: float,
    started: float,
) -> tuple[Tensor, Report]:
    psnr: dict[str, float] = {}
    notes: list[str] = []
    for name, fill in candidates.items():
        try:
            error = hole_error(fill(known * (1 - judge_set), judge_set), image, judge_set)
        except fills.CannotFillError as reason:
            notes.append(str(reason))
            continue
        psnr[name] = -10 * math.log10(max(error, 1e-10))
    # A tie goes to the later, simpler candidate: an untrained network is the smooth fill.
    for kept in sorted(reversed(psnr), key=psnr.__getitem__, reverse=True):
        try:
            result = candidates[kept](known, 1 - known)
            break
        except fills.CannotFillError as reason:
            notes.append(str(reason))
            del psnr[kept]
    return result, Report(kept, psnr, fit.steps, time.monotonic() - started, fit.converged, scale, tuple(notes))


def _clock(steps: int | None, started: float, seconds: float, progress: Progress | None) -> Callable[[int], bool]:
    def more(done: int) -> bool:
        share = done / steps if steps is not None else (time.monotonic() - started) / seconds
        if progress is not None:
            progress(min(share, 1.0), f"step {done}")
        return share < 1

    return more


def new_network(levels: int, width: int, seed: int) -> nn.Module:
    from .. import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = models.build_model("pconv", levels=levels, width=width).net
    return start_from_smooth(net)


def held_out(hole: Tensor, known: Tensor, share: float, copies: int, generator: torch.Generator) -> Tensor:
    """Known pixels to hide: mirrored and shifted copies of the hole, clear of each other, at most `share` of them.

    One copy of one box would be a lottery; several tell the candidates apart.
    """
    budget = min(share * float(known.sum()), MOST_HELD_OUT)
    free, chosen = known, torch.zeros_like(known)
    side, windows = CAP, HELD_OUT_WINDOWS
    if max(known.shape[-2:]) <= side:
        side, windows = max(known.shape[-2:]), 1
    wanted = min(float(hole.sum()) * min(1.0, windows * side**2 / known.numel()), budget)  # of one copy
    copies = min(max(copies, round(FEWEST_HELD_OUT / max(wanted, 1.0))), 8 * copies)
    places = hole[0, 0].flatten().nonzero()[:, 0]
    for _ in range(4 * copies):
        copy = _copy(hole, places, side, windows, generator) * free
        amount, total = float(copy.sum()), float(chosen.sum())
        if total + amount > 1.1 * budget:
            if total > 0:
                break
            side, windows = max(int(0.8 * min(side, *known.shape[-2:])), 8), 1
        elif amount >= 0.6 * wanted or (total == 0 and amount > 0 and windows == 1):
            chosen = chosen + copy
            free = free * (1 - F.max_pool2d(copy, 9, 1, 4))
            copies -= 1
        if copies == 0:
            break
    return chosen


def _copy(hole: Tensor, places: Tensor, side: int, windows: int, generator: torch.Generator) -> Tensor:
    """The whole hole moved at random; or pieces of it, `side` wide, elsewhere, if the picture is larger than that."""
    sizes = hole.shape[-2:]
    if max(sizes) <= side:
        return moved(hole, generator)

    def below(bound: int) -> int:
        return int(torch.randint(0, bound, (1,), generator=generator))

    high, wide = min(side, sizes[0]), min(side, sizes[1])
    result = torch.zeros_like(hole)
    for _ in range(windows):
        row, column = divmod(int(places[below(len(places))]), sizes[1])
        top = min(max(row - high // 2, 0), sizes[0] - high)
        left = min(max(column - wide // 2, 0), sizes[1] - wide)
        piece = moved(hole[..., top : top + high, left : left + wide], generator)
        top, left = below(sizes[0] - high + 1), below(sizes[1] - wide + 1)
        area = result[..., top : top + high, left : left + wide]
        area.copy_(torch.maximum(area, piece))
    return result


def _surroundings(known: Tensor) -> tuple[slice, slice]:
    """The box of the hole with as much around it as there is to learn from."""
    context = 2 * thickness(known) + CONTEXT
    slices = []
    for others, size in (((1, 3), known.shape[2]), ((1, 2), known.shape[3])):
        occupied = (known <= 0).any(dim=others[1]).any(dim=1)[0].nonzero()
        low, high = int(occupied[0]), int(occupied[-1]) + 1
        around = max(context, (min(LEARNING_REACH, size) - (high - low) + 1) // 2)
        slices.append(slice(max(low - around, 0), min(high + around, size)))
    return slices[0], slices[1]
