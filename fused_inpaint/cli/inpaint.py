# SPDX-License-Identifier: Apache-2.0
"""`fused-inpaint inpaint`: fill the holes of one photo, from weights or by internal learning."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from ._common import ProgressBar, UserError, positive_float, positive_int, seed

if TYPE_CHECKING:
    from torch import Tensor


def add(verbs: Any) -> None:
    verb = verbs.add_parser(
        "inpaint",
        help="fill the holes of a photo",
        description="Fill the holes of a photo: with --weights by one forward pass, else by internal learning, which "
        "fits a small network to the photo's own known pixels, compares it with biharmonic inpainting on pixels held "
        "out, and keeps the better.",
    )
    verb.add_argument("photo", metavar="PHOTO", help="RGB, RGBA, grey, palette or 16-bit grey")
    verb.add_argument("--mask", required=True, help="black and white image of the photo's size")
    verb.add_argument("-o", "--output", required=True, metavar="OUT", help="PNG or TIFF: known pixels stay exact")
    verb.add_argument("--hole", choices=("white", "black"), default="white", help="colour of holes (%(default)s)")
    verb.add_argument("--model", choices=("pconv",), default="pconv")
    verb.add_argument("--weights", metavar="FILE", help="a checkpoint: no fitting, one forward pass")
    verb.add_argument("--seconds", type=positive_float, default=60.0, help="time for fitting (%(default)s)")
    verb.add_argument("--steps", type=positive_int, help="training steps, instead of --seconds")
    verb.add_argument("--seed", type=seed, default=0)
    verb.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from .. import images

    try:
        images.check_output(arguments.output, (arguments.photo, arguments.mask))
        photo = images.read_photo(arguments.photo)
        known, note = images.read_mask(arguments.mask, photo.size, arguments.hole)
        if note:
            print(f"fused-inpaint inpaint: {note}", file=sys.stderr)
        image = photo.tensor()
        result, line = _forward(arguments, image, known) if arguments.weights else _learn(arguments, image, known)
        images.write_photo(photo.filled(result, known), arguments.output)
    except images.ImageError as error:
        raise UserError(str(error)) from None
    print(f"{arguments.output}: {line}")


def _learn(arguments: argparse.Namespace, image: Tensor, known: Tensor) -> tuple[Tensor, str]:
    from ..training import internal

    bar = ProgressBar("fitting")
    try:
        result, report = internal.restore(
            image, known, seconds=arguments.seconds, steps=arguments.steps, seed=arguments.seed, progress=bar
        )
    finally:
        bar.close()
    for note in report.notes:
        print(f"fused-inpaint inpaint: {note}", file=sys.stderr)
    return result, f"{report.sentence()} ({report.steps} steps, {report.seconds:.0f} s)"


def _forward(arguments: argparse.Namespace, image: Tensor, known: Tensor) -> tuple[Tensor, str]:
    import torch

    from .. import models
    from ..training import fills

    try:
        model = models.load_published(arguments.model, arguments.weights).eval()
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        with torch.no_grad():
            prediction = model(image, known)
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        height, width = known.shape[-2:]
        raise UserError(f"photo must be small enough for one forward pass in memory, got {width}x{height}") from None
    out_of_reach = (prediction.mask[:, :1] == 0) & (known == 0)
    line = f"filled by {arguments.model} with {arguments.weights}"
    if out_of_reach.any():
        line += f"; {int(out_of_reach.sum())} hole pixels were out of the network's reach and are a smooth fill"
        return torch.where(out_of_reach, fills.smooth(image, known), prediction.image), line
    return prediction.image, line
