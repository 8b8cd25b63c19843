# SPDX-License-Identifier: Apache-2.0
"""`fused-inpaint inpaint`: fill the holes of a photo, or of a folder of them, from weights or by internal learning."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._common import MODELS, ProgressBar, UserError, positive_float, positive_int, seed

if TYPE_CHECKING:
    from torch import Tensor

# (image (1, 3, H, W), known (1, 1, H, W)) -> (filled, a line that says how)
Complete = Callable[["Tensor", "Tensor"], tuple["Tensor", str]]


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
        default="whole",
        help="how --weights treats photos larger than --size (%(default)s)",
    )
    verb.add_argument("--size", type=positive_int, default=512, help="pixels, of --strategy (%(default)s)")
    verb.add_argument("--overlap", type=positive_int, default=64, help="pixels, of --strategy (%(default)s)")
    verb.add_argument("--seconds", type=positive_float, default=60.0, help="time for fitting (%(default)s)")
    verb.add_argument("--steps", type=positive_int, help="training steps, instead of --seconds")
    verb.add_argument("--seed", type=seed, default=0)
    verb.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from .. import images

    jobs = _jobs(arguments)
    complete = network(arguments) if arguments.weights else _internal(arguments)
    failed: list[str] = []
    bar = ProgressBar("photos")
    try:
        for done, (photo, mask, output) in enumerate(jobs):
            try:
                line = _fill(photo, mask, output, arguments.hole, complete)
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


def _fill(photo_path: Path, mask_path: Path, output: Path, hole: str, complete: Complete) -> str:
    from .. import images

    images.check_output(output, (photo_path, mask_path))
    photo = images.read_photo(photo_path)
    known, note = images.read_mask(mask_path, photo.size, hole)
    if note:
        print(f"fused-inpaint inpaint: {note}", file=sys.stderr)
    result, line = complete(photo.tensor(), known)
    images.write_photo(photo.filled(result, known), output)
    return line


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


def _internal(arguments: argparse.Namespace) -> Complete:
    from ..training import internal

    def complete(image: Tensor, known: Tensor) -> tuple[Tensor, str]:
        bar = ProgressBar("fitting")
        options = {"seconds": arguments.seconds, "steps": arguments.steps, "seed": arguments.seed}
        try:
            result, report = internal.restore(image, known, progress=bar, **options)
        finally:
            bar.close()
        for note in report.notes:
            print(f"fused-inpaint inpaint: {note}", file=sys.stderr)
        return result, f"{report.sentence()} ({report.steps} steps, {report.seconds:.0f} s)"

    return complete


def network(arguments: argparse.Namespace) -> Complete:
    """By the checkpoint of `weights` with `model`, `strategy`, `size` and `overlap`."""
    from .. import models

    try:
        key = arguments.model or models.key_of(arguments.weights) or "pconv"
        model = models.load_published(key, arguments.weights)
    except ValueError as error:
        raise UserError(str(error)) from None
    name = f"filled by {key} with {arguments.weights}"

    def complete(image: Tensor, known: Tensor) -> tuple[Tensor, str]:
        bar = ProgressBar(arguments.strategy)
        try:
            if arguments.strategy == "whole":
                return _whole(model, image, known, name)
            sizes = {"size": arguments.size, "overlap": arguments.overlap}
            return model.inpaint(image, known, arguments.strategy, progress=bar, **sizes), name
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            high, wide = known.shape[-2:]
            raise UserError(
                f"photo must be small enough for memory, got {wide}x{high}; --strategy tile takes any size"
            ) from None
        except ValueError as error:
            raise UserError(str(error)) from None
        finally:
            bar.close()

    return complete


def _whole(model: Any, image: Tensor, known: Tensor, name: str) -> tuple[Tensor, str]:
    """In one pass; partial convolutions may leave the middle of a large hole without a prediction."""
    import torch

    from ..training import fills

    with torch.no_grad():
        prediction = model(image, known)
    out_of_reach = (getattr(prediction, "mask", known.new_ones(())) == 0) & (known == 0)
    if not out_of_reach.any():
        return prediction.image, name
    line = f"{name}; {int(out_of_reach.sum())} hole pixels were out of the network's reach and are a smooth fill"
    return torch.where(out_of_reach, fills.smooth(image, known), prediction.image), line
