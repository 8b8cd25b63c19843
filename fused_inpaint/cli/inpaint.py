# SPDX-License-Identifier: Apache-2.0
"""`fused-inpaint inpaint`: fill the holes of a photo, or of a folder of them, from weights or by internal learning."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._common import LARGE_HOLE, MODELS, ProgressBar, UserError, note, positive_float, positive_int, seed

if TYPE_CHECKING:
    from ..completion import Method


def add(verbs: Any) -> None:
    verb = verbs.add_parser(
        "inpaint",
        help="fill the holes of a photo",
        description="Fill the holes of a photo: with --weights by a network, else by internal learning, which fits a "
        "small network to the photo's own known pixels, compares it with biharmonic inpainting on pixels held out, and "
        "keeps the better. For a folder of photos give folders, or one mask for all.",
    )
    verb.add_argument("photo", metavar="PHOTO", help="RGB, RGBA, grey, palette or 16-bit grey; or a folder")
    verb.add_argument("--mask", required=True, help="black and white image of the photo's size; or a folder")
    verb.add_argument("-o", "--output", required=True, metavar="OUT", help="PNG or TIFF (known pixels stay exact)")
    verb.add_argument("--hole", choices=("white", "black"), default="white", help="colour of holes (%(default)s)")
    verb.add_argument("--model", choices=MODELS, help="the network of --weights (what the file says, else pconv)")
    verb.add_argument("--weights", metavar="FILE", help="a checkpoint, ours or a published one: no fitting")
    verb.add_argument(
        "--strategy",
        choices=("whole", "resize", "tile", "crop", "subsample"),
        help="how --weights treats photos larger than --size (whole)",
    )
    verb.add_argument("--size", type=positive_int, help="pixels, of --strategy (512)")
    verb.add_argument("--overlap", type=positive_int, help="pixels, of --strategy (64)")
    limit = "time for fitting, the classical fill beside it not counted (60)"
    verb.add_argument("--seconds", type=positive_float, help=limit)
    verb.add_argument("--steps", type=positive_int, help="training steps, instead of --seconds")
    verb.add_argument("--seed", type=seed, help="of fitting (0)")
    verb.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from .. import images

    jobs = _jobs(arguments)
    method = _method(arguments)
    failed: list[str] = []
    large: list[float] = []
    bar = ProgressBar("photos")
    try:
        for done, (photo, mask, output) in enumerate(jobs):
            try:
                line = _fill(photo, mask, output, arguments.hole, method, large)
            except images.ImageError as error:
                if len(jobs) == 1:
                    raise UserError(str(error)) from None
                failed.append(f"{photo.name} ({error})")
                continue
            print(f"{output}: {line}")
            if len(jobs) > 1:
                bar((done + 1) / len(jobs), f"{done + 1} of {len(jobs)}")
    finally:
        bar.close()
    if failed:
        raise UserError(
            f"all photos must be usable, got {len(failed)} of {len(jobs)} that are not: {'; '.join(failed)}"
        )


def _fill(photo_path: Path, mask_path: Path, output: Path, hole: str, method: Method, large: list[float]) -> str:
    """What filled it. `large`: the shares of the large holes so far, of which the first is mentioned."""
    from .. import images, masks

    images.check_output(output, (photo_path, mask_path))
    photo = images.read_photo(photo_path)
    known, grey = images.read_mask(mask_path, photo.size, hole)
    if grey:
        note("inpaint", grey)
    share = masks.hole_ratio(known)
    if share > LARGE_HOLE:
        large.append(share)
        if len(large) == 1:
            other = "black" if hole == "white" else "white"
            much = f"{mask_path} marks {share:.0%} of its photo as hole"
            note("inpaint", f"{much}; if holes are {other}, say --hole {other}")
    try:
        with closing(ProgressBar("filling")) as bar:
            result, how, notes = method(photo.tensor(), known, bar)
    except images.ImageError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    for sentence in notes:
        note("inpaint", sentence)
    images.write_photo(photo.filled(result, known), output)
    return how


def _method(arguments: argparse.Namespace) -> Method:
    from .. import completion

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    network, fitting = (
        {name: given[name] for name in names if name in given}
        for names in (("model", "strategy", "size", "overlap"), ("seconds", "steps", "seed"))
    )
    if strange := fitting if arguments.weights else network:
        names = " and ".join(f"--{name}" for name in strange)
        how, got = ("without", "both") if arguments.weights else ("with", "none")
        raise UserError(f"{names} must come {how} --weights, got {got}")
    idle = [f"--{name}" for name in ("size", "overlap") if name in network]
    if arguments.weights and idle and network.get("strategy", "whole") == "whole":
        raise UserError(f"{' and '.join(idle)} must come with a --strategy that takes them, got whole")
    if not arguments.weights:
        return completion.InternalLearning(**fitting)
    try:
        return completion.Network(arguments.weights, network.pop("model", None), **network)
    except ValueError as error:
        raise UserError(str(error)) from None


def _jobs(arguments: argparse.Namespace) -> list[tuple[Path, Path, Path]]:
    """(photo, mask, output) of each photo; files of a folder go together by their names before the dot."""
    from .. import images

    photo, mask, output = Path(arguments.photo), Path(arguments.mask), Path(arguments.output)
    if not photo.is_dir():
        return [(photo, mask, output)]
    if output.exists() and not output.is_dir():
        raise UserError(f"output must be a folder for a folder of photos, got {output}")
    photos = images.pictures(photo)
    masks = (
        {path.stem: path for path in images.pictures(mask)} if mask.is_dir() else {path.stem: mask for path in photos}
    )
    without = [path.name for path in photos if path.stem not in masks]
    if not photos or without:
        got = f"none for {', '.join(without)}" if without else "no picture"
        raise UserError(f"photos must be pictures with a mask of the same name each, got {got} in {photo}")
    output.mkdir(parents=True, exist_ok=True)
    jobs = [(path, masks[path.stem], output / f"{path.stem}.png") for path in photos]
    if len({target for _, _, target in jobs}) < len(jobs):
        raise UserError(f"photos must have names that differ before the dot, got two that do not in {photo}")
    return jobs
