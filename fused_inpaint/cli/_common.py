# SPDX-License-Identifier: Apache-2.0
"""What the verbs share: the error a user sees, argument types, and a progress bar without a dependency."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from typing import TextIO

# models.registry has them, too; a parser should not wait for torch.
MODELS = ("pconv", "cgan_pc_rn", "region_wise", "deepgin", "aot_gan")

LARGE_HOLE = 0.6  # of a photo; no paper's masks have more
MOST_SIDE = 8944  # of a square, in pixels: images.MAX_MEGAPIXELS


class UserError(Exception):
    """Something the user can put right; the text is one sentence."""


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text}")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^63 - 1, got {text}")
    return int(text)


def side(text: str) -> int:
    value = positive_int(text)
    if value > MOST_SIDE:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_SIDE} pixels, got {text}")
    return value


def note(verb: str, sentence: str) -> None:
    """Something worth knowing, with which the work goes on."""
    print(f"fused-inpaint {verb}: note: {sentence}", file=sys.stderr)


def about_large_holes(shares: Sequence[float], hole: str) -> list[str]:
    """What may be wrong with masks of these shares of hole, in a sentence if it may."""
    if 2 * sum(share > LARGE_HOLE for share in shares) <= len(shares):
        return []
    other = "black" if hole == "white" else "white"
    return [f"most masks have over {LARGE_HOLE:.0%} hole; if holes are {other}, say --hole {other}"]


class ProgressBar:
    """`bar(fraction, text)`: a bar that redraws itself on a terminal, a line every ten seconds elsewhere."""

    WIDTH = 30

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self.label = label
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty()
        self.interval = 0.1 if self.terminal else 10.0
        self.started = time.monotonic()
        self.last = self.started - (self.interval if self.terminal else 0)  # a terminal shows at once that work is done
        self.drawn = False

    def __call__(self, fraction: float, text: str) -> None:
        now = time.monotonic()
        if now - self.last < self.interval:
            return
        self.last = now
        line = f"{self.label} {100 * fraction:3.0f} %  {text}  {now - self.started:.0f} s"
        if self.terminal:
            full = round(self.WIDTH * fraction)
            line = f"\r[{'#' * full}{'.' * (self.WIDTH - full)}] {line}\x1b[K"
        self.stream.write(line if self.terminal else line + "\n")
        self.stream.flush()
        self.drawn = self.terminal

    def close(self) -> None:
        if self.drawn:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
            self.drawn = False
