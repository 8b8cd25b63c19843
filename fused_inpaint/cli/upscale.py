# SPDX-License-Identifier: Apache-2.0
"""`fused-inpaint upscale`: a larger photo, what is between its pixels filled in by a network."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Any

from ._common import MODELS, ProgressBar, UserError, positive_int


def add(verbs: Any) -> None:
    verb = verbs.add_parser(
        "upscale",
        help="enlarge a photo by filling in between its pixels",
        description="Enlarge a photo by inpainting (Liu et al. 2018, section 5.2): its pixels are put K apart, where "
        "they stay exact, and what is between them is a hole that the network of --weights fills. Good weights are "
        "those of a network trained on such masks. Transparency is enlarged pixel by pixel.",
    )
    verb.add_argument("photo", metavar="PHOTO", help="RGB, RGBA, grey, palette or 16-bit grey")
    verb.add_argument("-o", "--output", required=True, metavar="OUT", help="PNG or TIFF")
    verb.add_argument("--factor", type=_factor, required=True, metavar="K", help="times as wide and high, from 2 on")
    verb.add_argument("--model", choices=MODELS, help="the network of --weights (what the file says, else pconv)")
    # Of photos shrunk by averaging, a smooth fill makes no more than bicubic enlargement does; and where no known pixel
    # has a known neighbour, internal learning has nothing to learn from.
    verb.add_argument("--weights", required=True, metavar="FILE", help="a checkpoint, ours or a published one")
    verb.add_argument(
        "--strategy", choices=("whole", "tile"), default="whole", help="tile: for results that are large (%(default)s)"
    )
    verb.add_argument("--size", type=positive_int, default=512, help="of tiles, pixels (%(default)s)")
    verb.add_argument("--overlap", type=positive_int, default=64, help="of tiles, pixels (%(default)s)")
    verb.set_defaults(run=run)


def _factor(text: str) -> int:
    value = positive_int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be 2 or more, got {text}")
    return value


def run(arguments: argparse.Namespace) -> None:
    from .. import completion, images

    try:
        images.check_output(arguments.output, (arguments.photo,))
        photo = images.read_photo(arguments.photo)
        high, wide = (arguments.factor * side for side in photo.size)
        if high * wide > images.MAX_MEGAPIXELS * 1e6:
            raise UserError(f"factor must give at most {images.MAX_MEGAPIXELS} megapixels, got {wide}x{high}")
        image, known = images.spread(photo.tensor(), arguments.factor)
        method = completion.Network(
            arguments.weights, arguments.model, arguments.strategy, arguments.size, arguments.overlap
        )
        with closing(ProgressBar("filling")) as bar:
            result, how, _ = method(image, known, bar)
        images.write_photo(photo.enlarged(arguments.factor).filled(result, known), arguments.output)
    except ValueError as error:
        raise UserError(str(error)) from None
    print(f"{arguments.output}: {wide}x{high}, {how}")
