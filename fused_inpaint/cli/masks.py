# SPDX-License-Identifier: Apache-2.0
"""`fused-inpaint masks`: make random hole masks, and sort a folder of masks into the papers' classes."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._common import MODELS, MOST_SIDE, ProgressBar, UserError, positive_int, seed

if TYPE_CHECKING:
    from ..masks import MaskFolder, Sorted

# masks.KINDS has them, too; a parser should not wait for torch.
KINDS = ("irregular", "irregular_turned", "rectangle", "free_form", "cellular", "discontiguous", "contiguous")


def add(verbs: Any) -> None:
    verb = verbs.add_parser("masks", help="make random hole masks, or sort a folder of them")
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_make(actions)
    _add_sort(actions)


def _add_make(actions: Any) -> None:
    make = actions.add_parser(
        "make",
        help="draw random masks",
        description="Draw random hole masks as PNG files. The same seed gives the same masks; a larger --count adds to "
        "them.",
    )
    make.add_argument(
        "--kind",
        nargs="+",
        choices=(*KINDS, *MODELS),
        default=["irregular"],
        metavar="KIND",
        help=f"one or more of {', '.join(KINDS)}, or a network's name for what its paper uses: {', '.join(MODELS)} "
        "(irregular)",
    )
    make.add_argument("--count", type=positive_int, required=True, metavar="N")
    make.add_argument("--size", type=_size, required=True, metavar="HxW", help="pixels, height x width, or one side")
    make.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    make.add_argument("--seed", type=seed, default=0)
    make.add_argument("--ratio", type=_ratio, metavar="LO-HI", help="share of hole pixels, such as 0.1-0.2 (any)")
    make.add_argument("--border", type=_pixels, metavar="N", help="pixels at least from hole to edge (any)")
    make.add_argument("--hole", choices=("white", "black"), default="white", help="colour of holes (%(default)s)")
    make.set_defaults(run=_make)


def _add_sort(actions: Any) -> None:
    sort = actions.add_parser(
        "sort",
        help="sort masks by hole size and distance from the border",
        description="Copy each mask of a folder into OUT/RATIO/free or OUT/RATIO/border, such as 0.1-0.2/free: RATIO "
        "is the share of hole pixels; in free are the masks whose hole keeps --border pixels from all edges, in border "
        "the others. Says what is left out, and why.",
    )
    sort.add_argument("input", metavar="DIR", help="a folder of masks; folders in it are not looked at")
    sort.add_argument("--out", required=True, metavar="OUT", help="a new or empty folder")
    sort.add_argument("--hole", choices=("white", "black"), default="white", help="colour of holes (%(default)s)")
    sort.add_argument("--border", type=_pixels, default=50, metavar="N", help="pixels (%(default)s)")
    sort.set_defaults(run=_sort)


def _make(arguments: argparse.Namespace) -> None:
    from PIL import Image

    from ..masks import Masks

    try:
        masks = Masks(arguments.kind, arguments.size, arguments.seed, arguments.ratio, arguments.border)
    except ValueError as error:
        raise UserError(str(error).removeprefix("random_mask: ")) from None
    with _whole_folder(arguments.out) as folder, closing(ProgressBar("masks")) as bar:
        for index in range(arguments.count):
            white = masks[index][0] == (arguments.hole == "black")
            Image.fromarray(255 * white.byte().numpy()).save(folder / f"{index:06d}.png")
            bar((index + 1) / arguments.count, f"{index + 1} of {arguments.count}")
    print(f"{arguments.out}: {arguments.count} masks, holes are {arguments.hole}")


def _sort(arguments: argparse.Namespace) -> None:
    from ..masks import MaskFolder, bucket_name

    try:
        masks = MaskFolder(arguments.input, hole=arguments.hole)
    except ValueError as error:
        raise UserError(str(error)) from None
    with _whole_folder(arguments.out) as folder:
        with closing(ProgressBar("masks")) as bar:
            found = masks.sort(arguments.border, bar)
        left_out = _left_out(masks, found)
        if not any(found.classes.values()):
            raise UserError(f"masks must have 1 to 60 % hole, got none that has in {arguments.input} ({left_out})")
        for (bucket, place), indices in found.classes.items():
            target = folder / bucket_name(bucket) / place
            target.mkdir(parents=True)
            for index in indices:
                shutil.copyfile(masks.paths[index], target / masks.paths[index].name)
    print(f"{'ratio':<10}{'free':>8}{'border':>8}")
    for bucket in dict.fromkeys(bucket for bucket, _ in found.classes):
        free, border = (len(found.classes[bucket, place]) for place in ("free", "border"))
        print(f"{bucket_name(bucket):<10}{free:>8}{border:>8}")
    print(f"border: a hole less than {arguments.border} pixels from the edge (--border)")
    if left_out:
        print(f"left out: {left_out}")


def _left_out(masks: MaskFolder, found: Sorted) -> str:
    """How many by reason, with the first names, and what may be the cause."""
    parts = []
    for reason, indices in found.skipped.items():
        if indices:
            names = ", ".join(masks.paths[index].name for index in indices[:3])
            parts.append(f"{len(indices)} {reason}: {names}{', ...' if len(indices) > 3 else ''}")
    other = "black" if masks.hole == "white" else "white"
    if any(2 * len(indices) > len(masks) for reason, indices in found.skipped.items() if reason.startswith("over")):
        parts.append(f"if holes are {other}, say --hole {other}")
    return "; ".join(parts)


@contextmanager
def _whole_folder(out: str) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when all is done, and is gone after an error or Ctrl-C."""
    target = Path(out).resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"out must be a folder, got the file {out}")
    if not target.parent.is_dir():
        raise UserError(f"out must be in an existing folder, got {out}")
    new = not target.exists()
    try:
        if not new and any(target.iterdir()):
            raise UserError(f"out must be a new or empty folder, got {out}, which has files in it")
        base = target.parent if new else target
        with tempfile.TemporaryDirectory(dir=base, prefix=f".{target.name}-", suffix=".part") as part:
            folder = Path(part) / target.name
            folder.mkdir()
            yield folder
            if new:
                folder.rename(target)
            else:
                for entry in folder.iterdir():
                    entry.rename(target / entry.name)
    except OSError as error:
        raise UserError(f"out must be writable, got {out} ({error.strerror or error})") from None


def _size(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH or one side in pixels, got {text}")
    high, wide = int(sides[0]), int(sides[-1])
    if high * wide > MOST_SIDE**2:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_SIDE}x{MOST_SIDE} pixels, got {text}")
    return high, wide


def _ratio(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split("-"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise argparse.ArgumentTypeError(f"must be LO-HI within 0 to 1, such as 0.1-0.2, got {text}")
    return low, high


def _pixels(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of pixels, got {text}")
    return int(text)
