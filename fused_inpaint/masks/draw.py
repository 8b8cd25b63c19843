# SPDX-License-Identifier: Apache-2.0
"""The kinds of holes that the papers train with, drawn with Pillow and NumPy.

Each function draws one: (H, W) bool, True in the hole. Lengths are those of a 256x256 image, and grow with the square
root of the area. What a paper leaves open is chosen here, and said so.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Size = tuple[int, int]  # height, width

FULL_TURN = 2 * math.pi


def irregular(size: Size, rng: np.random.Generator) -> np.ndarray:
    """Streaks and blobs on a larger sheet, of which a turned window is cut and dilated (Liu et al. 2018, section 4.1).

    The paper takes its streaks from occlusions between frames of videos; these are drawn.
    """
    high, wide = size
    unit = _unit(size)
    reach = math.hypot(high, wide) / 2
    # Twice the reach holds the window at any angle; the rest lets it move.
    side = math.ceil(2.2 * reach)
    sheet, pen = _sheet((side, side))
    plenty = rng.uniform(0.1, 1)
    for _ in range(round(plenty * rng.integers(3, 36))):
        _streak(pen, side, unit, rng)
    for _ in range(round(plenty * rng.integers(0, 14))):
        _blob(pen, side, unit, rng)
    down, across = rng.uniform(reach, side - reach, 2)
    hole = _turned(sheet, rng.uniform(0, FULL_TURN), (down, across), size)
    return dilated(hole, round(rng.integers(0, 7) * unit))


def irregular_turned(size: Size, rng: np.random.Generator) -> np.ndarray:
    """`irregular`, flipped at random and turned by 0 to 45 degrees about its middle (Zeng et al. 2021)."""
    hole = irregular(size, rng)[:: _sign(rng), :: _sign(rng)]
    sheet = Image.fromarray(np.ascontiguousarray(hole).view(np.uint8))
    return _turned(sheet, rng.uniform(0, FULL_TURN / 8), (size[0] / 2, size[1] / 2), size)


def rectangle(size: Size, rng: np.random.Generator) -> np.ndarray:
    """One rectangle, each side 30 to 70 % of the image's (Li et al. 2020, section 4)."""
    hole = np.zeros(size, bool)
    sides = [max(1, round(length * rng.uniform(0.3, 0.7))) for length in size]
    top, left = (int(rng.integers(0, length - side + 1)) for length, side in zip(size, sides, strict=True))
    hole[top : top + sides[0], left : left + sides[1]] = True
    return hole


def free_form(size: Size, rng: np.random.Generator) -> np.ndarray:
    """15 to 23 brush strokes of up to 5 segments, 10 to 69 long and 10 to 24 thick (Li et al. 2020, section 4)."""
    unit = _unit(size)
    sheet, pen = _sheet(size)
    for _ in range(rng.integers(15, 24)):
        at = _somewhere(size, rng)
        for _ in range(rng.integers(1, 6)):
            to = _ahead(at, rng.uniform(0, FULL_TURN), rng.integers(10, 70) * unit)
            _brush(pen, [at, to], rng.integers(10, 25) * unit)
            at = to
    return np.asarray(sheet) > 0


def cellular(size: Size, rng: np.random.Generator) -> np.ndarray:
    """A cellular automaton: random cells, 1 to 8 pixels wide, under 2 to 6 3x3 median filters (Li et al. 2020, section
    4, after the AIM 2020 challenge).

    The dilation's size is left open; it is one pixel.
    """
    scale = max(1, round(2 ** rng.integers(0, 4) * _unit(size)))
    high, wide = (-(-length // scale) for length in size)
    cells = rng.random((high, wide)) < 0.5
    for _ in range(rng.integers(2, 7)):
        cells = _neighbours(cells) > 4
    hole = cells.repeat(scale, 0).repeat(scale, 1)[: size[0], : size[1]]
    return dilated(hole, 1)


def discontiguous(size: Size, rng: np.random.Generator) -> np.ndarray:
    """Scattered lines, circles, rectangles and ellipses (Ma et al. 2022).

    Left open is how many and how large: 1 to 10 of each, at most a quarter of the image wide, lines 3 to 15 thick.
    """
    high, wide = size
    unit = _unit(size)
    sheet, pen = _sheet(size)
    for _ in range(rng.integers(1, 11)):
        pen.line(_flat([_somewhere(size, rng), _somewhere(size, rng)]), 1, _pixels(rng.integers(3, 16) * unit))
        down, across = _somewhere(size, rng)
        radius = rng.integers(3, 16) * unit
        pen.ellipse((across - radius, down - radius, across + radius, down + radius), 1)
        for shape in (pen.rectangle, pen.ellipse):
            down, across = _somewhere(size, rng)
            half_high, half_wide = rng.uniform(0.01, 0.125, 2) * (high, wide)
            shape((across - half_wide, down - half_high, across + half_wide, down + half_high), 1)
    return np.asarray(sheet) > 0


def contiguous(size: Size, rng: np.random.Generator) -> np.ndarray:
    """One random walk of a brush, in steps up to 32 long, up to 50 thick, in any direction (Ma et al. 2022).

    Left open is how many steps: up to 96.
    """
    unit = _unit(size)
    sheet, pen = _sheet(size)
    at = _somewhere(size, rng)
    for _ in range(rng.integers(1, 97)):
        down, across = _ahead(at, rng.uniform(0, FULL_TURN), rng.integers(1, 33) * unit)
        to = (min(max(down, 0.0), size[0] - 1.0), min(max(across, 0.0), size[1] - 1.0))
        _brush(pen, [at, to], rng.integers(10, 51) * unit)
        at = to
    return np.asarray(sheet) > 0


KINDS: dict[str, Callable[[Size, np.random.Generator], np.ndarray]] = {
    draw.__name__: draw
    for draw in (irregular, irregular_turned, rectangle, free_form, cellular, discontiguous, contiguous)
}


def dilated(region: np.ndarray, rounds: int) -> np.ndarray:
    """(H, W) bool, grown by `rounds` pixels: a 3x3 square and a cross by turns, which together make an octagon."""
    for done in range(rounds):
        region = grown(region, corners=done % 2 == 0)
    return region


def grown(region: np.ndarray, corners: bool) -> np.ndarray:
    """(H, W) bool, grown by one pixel: upwards, downwards and sideways, and to the corners if asked for."""
    larger = region.copy()
    larger[1:] |= region[:-1]
    larger[:-1] |= region[1:]
    base = larger.copy() if corners else region
    larger[:, 1:] |= base[:, :-1]
    larger[:, :-1] |= base[:, 1:]
    return larger


def _neighbours(cells: np.ndarray) -> np.ndarray:
    """(H, W) uint8: how many of the 3x3 cells around are set; outside the edge it is as at the edge."""
    padded = np.pad(cells, 1, mode="edge").view(np.uint8)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


def _streak(pen: ImageDraw.ImageDraw, side: int, unit: float, rng: np.random.Generator) -> None:
    """A walk that turns a little at each step, of one thickness."""
    points = [_somewhere((side, side), rng)]
    steps = rng.integers(2, 12)
    directions = rng.uniform(0, FULL_TURN) + rng.uniform(-1, 1, steps).cumsum()
    lengths = rng.integers(8, 48, steps) * unit
    for direction, length in zip(directions.tolist(), lengths.tolist(), strict=True):
        points.append(_ahead(points[-1], direction, length))
    _brush(pen, points, rng.integers(2, 22) * unit)


def _blob(pen: ImageDraw.ImageDraw, side: int, unit: float, rng: np.random.Generator) -> None:
    """A polygon with corners in all directions, at distances of their own."""
    middle = _somewhere((side, side), rng)
    size = rng.uniform(6, 50) * unit
    reach = (rng.uniform(0.4, 1.4, rng.integers(6, 18)) * size).tolist()
    pen.polygon(_flat([_ahead(middle, FULL_TURN * i / len(reach), r) for i, r in enumerate(reach)]), 1)


def _brush(pen: ImageDraw.ImageDraw, points: list[tuple[float, float]], thickness: float) -> None:
    """A line through (down, across) points, round at each."""
    pen.line(_flat(points), 1, _pixels(thickness))
    radius = thickness / 2
    for down, across in points:
        pen.ellipse((across - radius, down - radius, across + radius, down + radius), 1)


def _turned(sheet: Image.Image, angle: float, middle: tuple[float, float], size: Size) -> np.ndarray:
    """(H, W) bool: a window of `size`, turned by `angle` radians around `middle` (down, across); no hole outside the
    sheet."""
    high, wide = size
    cos, sin = math.cos(angle), math.sin(angle)
    down, across = middle
    matrix = (
        cos, -sin, across - cos * wide / 2 + sin * high / 2,
        sin, cos, down - sin * wide / 2 - cos * high / 2,
    )  # fmt: skip
    window = sheet.transform((wide, high), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
    return np.asarray(window) > 0


def _unit(size: Size) -> float:
    """Pixels per pixel of a 256x256 image."""
    return math.sqrt(size[0] * size[1]) / 256


def _sheet(size: Size) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("L", (size[1], size[0]))
    return sheet, ImageDraw.Draw(sheet)


def _somewhere(size: Size, rng: np.random.Generator) -> tuple[float, float]:
    down, across = rng.random(2)
    return float(down * size[0]), float(across * size[1])


def _ahead(at: tuple[float, float], direction: float, length: float) -> tuple[float, float]:
    return at[0] + length * math.sin(direction), at[1] + length * math.cos(direction)


def _flat(points: list[tuple[float, float]]) -> list[float]:
    """(down, across) points as Pillow takes them: across, down, across, down."""
    return [value for down, across in points for value in (across, down)]


def _pixels(length: float) -> int:
    return max(1, round(length))


def _sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1
