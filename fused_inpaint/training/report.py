# SPDX-License-Identifier: Apache-2.0
"""The results of an evaluation as a table, files and a picture."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from .. import images, masks
from ..masks.folder import PLACES
from .evaluate import OTHER, Results
from .metrics import METRICS, Interval, interval

COLUMNS = dict(zip(PLACES, "NB", strict=True))  # as the paper has them: no border, border
PANEL = 192  # pixels, of a picture in the sheet at most
MARGIN, STRIP = 6, 18
FEW = 10  # images of a class: the bootstrap's interval over fewer is too narrow


class Cell(NamedTuple):
    """One method's metric over the images of one class."""

    method: str
    metric: str
    bucket: str
    place: str
    images: int
    interval: Interval


def summary(results: Results, seed: int = 0) -> list[Cell]:
    """Every method and metric in every class that has images, with 95 % bootstrap intervals."""
    groups: dict[tuple[str, str, str, str], list[float]] = {}
    for score in results.scores:
        for metric, value in score.metrics.items():
            groups.setdefault((score.method, metric, score.bucket, score.place), []).append(value)
    return [Cell(*key, len(values), interval(values, seed=seed)) for key, values in groups.items()]


def table(cells: list[Cell], intervals: bool = False) -> str:
    """Markdown, laid out as the paper's table 1: a row for each metric and method, a column for each bucket and place
    (N: the hole keeps clear of the border, B: it does not)."""
    columns = {(bucket, place): f"{bucket} {COLUMNS[place]}" for bucket in _buckets(cells) for place in PLACES}
    return _table(cells, columns, intervals)


def narrow(cells: list[Cell], border: int | str) -> str:
    """The same for a terminal: a table for each place, of the buckets that have images."""
    tables = []
    for place, said in zip(PLACES, _places(border), strict=True):
        found = {cell.bucket for cell in cells if cell.place == place}
        columns = {(bucket, place): bucket for bucket in _buckets(cells) if bucket in found}
        if columns:
            tables.append(f"{said}\n\n{_table(cells, columns)}\n")
    return "\n".join(tables)


def _buckets(cells: list[Cell]) -> list[str]:
    named = [masks.bucket_name(bucket) for bucket in masks.BUCKETS]
    return [*named, OTHER] if any(cell.bucket == OTHER for cell in cells) else named


def _places(border: int | str) -> tuple[str, str]:
    free, near = (COLUMNS[place] for place in PLACES)
    far = f"{border} pixels from the image's border"
    return f"{free}: the hole keeps at least {far}", f"{near}: the hole comes nearer than {far}"


def _table(cells: list[Cell], columns: dict[tuple[str, str], str], intervals: bool = False) -> str:
    at = {(cell.metric, cell.method, cell.bucket, cell.place): cell for cell in cells}
    methods = list(dict.fromkeys(cell.method for cell in cells))
    rows = [["", *columns.values()]]
    most: dict[tuple[str, str], int] = {}
    for cell in cells:
        most[cell.bucket, cell.place] = max(cell.images, most.get((cell.bucket, cell.place), 0))
    rows.append(["images", *(str(most.get(column, 0)) for column in columns)])
    for metric in METRICS:
        for method in methods:
            line = [at.get((metric, method, *column)) for column in columns]
            if any(line):
                rows.append([f"{METRICS[metric].label} ({method})", *(_shown(cell, intervals) for cell in line)])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    rule = "|".join([":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def _line(row: list[str], widths: list[int]) -> str:
    cells = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
    return f"| {' | '.join(cells)} |"


def _shown(cell: Cell | None, intervals: bool) -> str:
    if cell is None:
        return "–"
    digits = METRICS[cell.metric].digits
    mean, low, high = (f"{value:.{digits}f}" for value in cell.interval)
    return f"{mean} [{low}, {high}]" if intervals else mean


def notes(results: Results) -> list[str]:
    """Sentences: what FID is, and what is left out."""
    lines = []
    if results.fid:
        values = ", ".join(f"{name} {value:.2f}" for name, value in results.fid.items())
        pictures = len({score.photo for score in results.scores})
        lines.append(f"FID against {pictures} photos: {values}; under some thousand photos it is too high")
    cases = len({(score.photo, score.mask) for score in results.scores})
    for sentences in results.unfilled.values():
        lines.append(f"{sentences[0]} ({len(sentences)} of {cases} images)")
    return [*lines, *results.left_out]


def _few(cells: list[Cell]) -> str:
    """A paragraph on classes whose intervals say little; empty if there are none."""
    least: dict[tuple[str, str], int] = {}
    for cell in cells:
        at = (cell.bucket, cell.place)
        least[at] = min(cell.images, least.get(at, cell.images))
    few = sum(images < FEW for images in least.values())
    return f"Fewer than {FEW} images, too few for an interval: {few} of {len(least)} classes.\n\n" if few else ""


def markdown(results: Results, cells: list[Cell], about: dict[str, Any]) -> str:
    arguments = about.get("arguments", {})
    said = "".join(f"- {key}: {_plain(key, value)}\n" for key, value in arguments.items() if value is not None)
    listed = "".join(f"- {line}\n" for line in [*about.get("data", []), *notes(results)])
    return (
        f"# Evaluation\n\n{said}\n## Means over images\n\n{table(cells)}\n\n"
        f"{'; '.join(_places(about.get('border', '–')))}.\n\n"
        f"{listed}\n## With 95 % bootstrap intervals\n\n{_few(cells)}{table(cells, intervals=True)}\n"
    )


def _plain(name: str, value: Any) -> str:
    if name == "border":
        return f"{value} pixels of 512"
    return ",".join(value) or "none" if isinstance(value, tuple) else str(value)


def as_json(results: Results, cells: list[Cell], about: dict[str, Any]) -> str:
    """Strict JSON: numbers that it does not have are the strings "inf", "-inf" and "nan", which `float` reads."""
    held = {
        **about,
        "notes": notes(results),
        "fid": results.fid,
        "summary": [{**cell._asdict(), "interval": cell.interval._asdict()} for cell in cells],
        "images": [score._asdict() for score in results.scores],
    }
    return json.dumps(_finite(held), indent=1, allow_nan=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(results: Results) -> str:
    """Long form: a line for each image, method and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["photo", "mask", "ratio", "bucket", "place", "method", "metric", "value"])
    for *case, values in results.scores:
        writer.writerows([*case, metric, value] for metric, value in values.items())
    return text.getvalue()


def contact_sheet(results: Results) -> images.Photo:
    """A row for each case kept: the photo, the photo with its hole in white, and each method's composite."""
    methods = list(dict.fromkeys(name for _, composites in results.sheet for name in composites))
    side = min(PANEL, results.sheet[0][0].truth.shape[-1])
    wide, high = ((side + MARGIN) * count + MARGIN for count in (2 + len(methods), len(results.sheet)))
    sheet = Image.new("RGB", (wide, high + STRIP), "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(["photo", "with hole", *methods]):
        pen.text((MARGIN + column * (side + MARGIN), MARGIN), label, fill="black")
    for row, (case, composites) in enumerate(results.sheet):
        panels = [case.truth, case.truth.where(case.known > 0, 1.0), *(composites.get(name) for name in methods)]
        for column, panel in enumerate(panels):
            if panel is not None:
                place = (MARGIN + column * (side + MARGIN), STRIP + MARGIN + row * (side + MARGIN))
                sheet.paste(_picture(panel).resize((side, side), Image.Resampling.BOX), place)
    return images.Photo(np.asarray(sheet))


def _picture(planes: Tensor) -> Image.Image:  # (1, 3, S, S)
    return Image.fromarray((planes[0].nan_to_num() * 255).round().byte().permute(1, 2, 0).numpy())


def check_folder(out: str | os.PathLike[str]) -> None:
    """images.ImageError if results cannot be saved there; makes nothing."""
    target = Path(out).resolve()
    if target.exists() and not target.is_dir():
        raise images.ImageError(f"out must be a folder, got the file {out}")
    base = target if target.exists() else target.parent
    if not base.is_dir():
        raise images.ImageError(f"out must be in an existing folder, got {out}")
    if not os.access(base, os.W_OK):
        raise images.ImageError(f"out must be writable, got {out}")


def save(results: Results, cells: list[Cell], about: dict[str, Any], out: str | os.PathLike[str]) -> None:
    """results.json, results.csv, results.md and contact_sheet.png, each the old file or the whole new one.

    Raises:
        images.ImageError: a folder that cannot be made or written.
    """
    folder = Path(out)
    try:
        folder.mkdir(exist_ok=True)
        images.write_photo(contact_sheet(results), folder / "contact_sheet.png")
        _write(folder / "results.csv", as_csv(results))
        _write(folder / "results.md", markdown(results, cells, about))
        _write(folder / "results.json", as_json(results, cells, about))
    except OSError as error:
        raise images.ImageError(f"out must be writable, got {out} ({error.strerror or error})") from None


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
