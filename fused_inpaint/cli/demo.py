# SPDX-License-Identifier: Apache-2.0
"""`fused-inpaint demo`: the same network fitted to a damaged photo on naive PyTorch and on the fused ops."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._common import ProgressBar, UserError, positive_float, positive_int, seed

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SIDE = 256
MOST_SECONDS = 150.0  # of both fits together; with start and end the demo then stays under three minutes
LEAST_STEPS = 2  # the first is no measure of a step's time


def add(verbs: Any) -> None:
    verb = verbs.add_parser(
        "demo",
        help="fit one network twice, naive and fused: picture, time, memory, differences",
        description="Damage a photograph with scratches and a box, fit the same PConv U-Net to what is left on naive "
        "PyTorch and on the fused ops (same seed, steps and data), write both results side by side, and print what "
        "each fit cost.",
    )
    verb.add_argument("-o", "--output", default="demo.png", metavar="OUT", help="side-by-side picture (%(default)s)")
    limit = f"for the steps of both fits together, {LEAST_STEPS} at least (%(default)s, at most {MOST_SECONDS:.0f})"
    verb.add_argument("--seconds", type=_seconds, default=90.0, help=limit)
    verb.add_argument("--steps", type=positive_int, help="at most so many training steps")
    verb.add_argument("--seed", type=seed, default=0)
    verb.set_defaults(run=run)


def _seconds(text: str) -> float:
    value = positive_float(text)
    if value > MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_SECONDS:.0f}, got {text}")
    return value


def run(arguments: argparse.Namespace) -> None:
    from .. import images

    try:
        images.check_output(arguments.output)
        photo, known = _photograph(), _damage(SIDE, arguments.seed)
        results = _fits(photo.tensor(), known, arguments)
        _report(photo.tensor(), known, results)
        images.write_photo(_side_by_side(photo, known, results), arguments.output)
    except images.ImageError as error:
        raise UserError(str(error)) from None
    print(f"wrote {arguments.output}")


def _photograph() -> Any:
    from ..images import Photo

    try:
        from skimage import data
    except ImportError:
        raise UserError("scikit-image must be installed, it has the photo: pip install 'fused-inpaint[demo]'") from None
    from PIL import Image

    picture = Image.fromarray(data.astronaut()).resize((SIDE, SIDE), Image.Resampling.BOX)
    import numpy as np

    return Photo(np.asarray(picture))


def _damage(side: int, seed: int) -> Tensor:
    """Known pixels (1, 1, side, side): ten scratches and one box are holes."""
    import numpy as np
    import torch
    from PIL import Image, ImageDraw

    numbers = np.random.default_rng(seed)
    drawing = Image.new("L", (side, side), 255)
    pen = ImageDraw.Draw(drawing)
    for _ in range(10):
        points = numbers.integers(0, side, (3, 2))
        pen.line([(int(x), int(y)) for x, y in points], fill=0, width=int(numbers.integers(2, 5)), joint="curve")
    left = numbers.integers(side // 8, side * 3 // 4)
    top = numbers.integers(side * 9 // 16, side * 3 // 4)  # below the face, where nobody expects a good fill
    pen.rectangle((int(left), int(top), int(left) + side // 8, int(top) + side // 8), fill=0)
    return torch.from_numpy((np.asarray(drawing) > 127).astype(np.float32))[None, None]


def _fits(truth: Tensor, known: Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from .. import _backends
    from ..training import compare, fills

    reason = _backends.status()["cpu"]
    if reason:
        print(f"The fused fit runs on the reference path, its compiled kernels are missing: {reason}")
    image = torch.where(known > 0, truth, 0)
    job = {"image": image, "known": known, "side": SIDE}
    job |= {"seed": arguments.seed, "state": compare.initial_state(arguments.seed)}
    bar = ProgressBar("fitting both")
    bar(0.0, "starting")
    try:
        results: dict[str, Any] = compare.compare(job, _clock(arguments, bar))
    except compare.FitError as error:
        raise UserError(str(error)) from None
    finally:
        bar.close()
    results["smooth start"] = {"result": fills.smooth(image, known)}
    try:
        results["biharmonic"] = {"result": fills.biharmonic(image, known)}
    except fills.CannotFillError as error:
        print(error, file=sys.stderr)
    return results


def _clock(arguments: argparse.Namespace, bar: ProgressBar) -> Callable[[int], bool]:
    started: list[float] = []  # once both stand before their first step

    def more(done: int) -> bool:
        started[:] = started or [time.monotonic()]
        spent = (time.monotonic() - started[0]) / arguments.seconds
        share = spent if arguments.steps is None else max(done / arguments.steps, spent)
        bar(min(share, 1.0 if done >= LEAST_STEPS else done / LEAST_STEPS), f"step {done}")
        return share < 1 or done < LEAST_STEPS

    return more


def _report(truth: Tensor, known: Tensor, results: dict[str, Any]) -> None:
    from ..training.compare import difference

    naive, fused = results["naive"], results["fused"]
    print(f"The same PConv U-Net, seed, data and {fused['steps']} steps on naive PyTorch and on the fused ops:")
    print(f"{'':<30}{'naive':>10}{'fused':>10}{'ratio':>8}")
    rows = (("seconds per step (median)", "step_seconds", 3), ("peak memory of the fit, MiB", "peak_mib", 0))
    for label, key, digits in rows:
        ratio = naive[key] / max(fused[key], 1e-9)
        print(f"{label:<30}{naive[key]:>10.{digits}f}{fused[key]:>10.{digits}f}{ratio:>8.2f}")
    gradients = [(naive["gradients"][name], gradient) for name, gradient in fused["gradients"].items()]
    largest = max(gradient.abs().max().item() for _, gradient in gradients)
    apart = max(difference(a, b) for a, b in gradients)
    print(f"largest difference at step one: outputs {difference(naive['out'], fused['out']):.1e} (of 1),", end=" ")
    print(f"gradients {apart:.1e} (of {largest:.1e})")
    psnr = ", ".join(f"{name} {_psnr(part['result'], truth, known):.1f} dB" for name, part in results.items())
    print(f"PSNR in the hole: {psnr}")


def _psnr(result: Tensor, truth: Tensor, known: Tensor) -> float:
    import math

    from ..training.fitting import hole_error

    return -10 * math.log10(max(hole_error(result, truth, 1 - known), 1e-10))


def _side_by_side(photo: Any, known: Tensor, results: dict[str, Any]) -> Any:
    import numpy as np
    from PIL import Image, ImageDraw

    from ..images import Photo

    truth = photo.tensor()
    panels: list[tuple[str, np.ndarray]] = [("original", photo.pixels)]
    panels.append(("with holes", np.where(known[0, 0, ..., None].numpy() > 0, photo.pixels, 255)))
    for name, part in results.items():
        if name == "smooth start":
            continue
        label = f"{name} {_psnr(part['result'], truth, known):.1f} dB"
        if "step_seconds" in part:
            label += f", {1000 * part['step_seconds']:.0f} ms/step"
        panels.append((label, photo.filled(part["result"], known).pixels))
    margin, strip = 6, 18
    sheet = Image.new("RGB", (margin + len(panels) * (SIDE + margin), SIDE + strip + 2 * margin), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (label, pixels) in enumerate(panels):
        left = margin + index * (SIDE + margin)
        pen.text((left, margin), label, fill="black")
        sheet.paste(Image.fromarray(pixels.astype(np.uint8)), (left, margin + strip))
    return Photo(np.asarray(sheet))
