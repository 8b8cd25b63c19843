# SPDX-License-Identifier: Apache-2.0
"""`fused-inpaint evaluate`: a network beside simple fills on a folder of photos, as a table and files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._common import MODELS, ProgressBar, UserError, about_large_holes, note, positive_int, seed

if TYPE_CHECKING:
    from torch import Tensor

    from ..training.evaluate import Fill, GivenMasks, MadeMasks, Results
    from ..training.photos import Photos

# training.evaluate.BASELINES has them, too; a parser should not wait for torch.
BASELINES = ("mean", "biharmonic", "telea")
LEAST_SIZE = 32  # pixels: room for every class of masks, and for SSIM's window
BORDER_AT = 512  # pixels, the side that --border is given for


def add(verbs: Any) -> None:
    verb = verbs.add_parser(
        "evaluate",
        help="measure a network beside simple fills on a folder of photos",
        description="Fill holes in photos by a network and by simple fills, and compare with the photos: l1, PSNR and "
        "SSIM of the whole picture, l1 and PSNR in the hole, by hole size and distance from the border (Liu et al. "
        "2018, table 1), with 95 % bootstrap intervals.",
    )
    verb.add_argument("model", choices=MODELS)
    verb.add_argument("--weights", required=True, metavar="FILE", help="a checkpoint, ours or a published one")
    verb.add_argument("--data", required=True, metavar="DIR", help="photos, subfolders included")
    verb.add_argument(
        "--masks",
        metavar="DIR",
        help="hole masks, one for each photo: of its name if all have one, else in turn (without: random masks, twelve "
        "for each photo, one of each class)",
    )
    verb.add_argument("--hole", choices=("white", "black"), default="white", help="colour of holes (%(default)s)")
    verb.add_argument("--size", type=_size, default=256, help="side of the middle squares in pixels (%(default)s)")
    verb.add_argument("--count", type=positive_int, metavar="N", help="at most so many photos, drawn by --seed (all)")
    border = f"pixels at {BORDER_AT}x{BORDER_AT} between hole and edge that part the classes N and B (%(default)s)"
    verb.add_argument("--border", type=positive_int, default=50, metavar="N", help=border)
    verb.add_argument(
        "--baselines",
        type=_baselines,
        default=BASELINES,
        metavar="NAMES",
        help=f"of {','.join(BASELINES)}, or none (all that are installed)",
    )
    verb.add_argument("--out", metavar="RUN", help="folder for results.json, .csv, .md and contact_sheet.png")
    verb.add_argument("--fid-weights", metavar="FILE", help="torch-fidelity's Inception weights: FID, too")
    verb.add_argument("--lpips-weights", metavar="FILE", help="torchvision's AlexNet weights: LPIPS, too")
    verb.add_argument("--device", help="cuda if there is one, else cpu")
    verb.add_argument("--seed", type=seed, default=0)
    verb.set_defaults(run=run)


def _size(text: str) -> int:
    value = positive_int(text)
    if value < LEAST_SIZE:
        raise argparse.ArgumentTypeError(f"must be at least {LEAST_SIZE} pixels, got {text}")
    return value


def _baselines(text: str) -> tuple[str, ...]:
    names = () if text == "none" else tuple(dict.fromkeys(text.split(",")))
    if not set(names) <= set(BASELINES):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(BASELINES)}, or none, got {text}")
    return names


def run(arguments: argparse.Namespace) -> None:
    import torch

    from .. import images
    from ..training import evaluate, report

    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    border = max(1, round(arguments.border * arguments.size / BORDER_AT))
    bar = ProgressBar("evaluating")
    try:
        methods, data, source = _prepared(arguments, border)
        total = min(len(data), arguments.count or len(data)) * source.per_photo
        found = evaluate.cases(data, source, border, arguments.count)
        results = evaluate.evaluate(found, total, methods, arguments.fid_weights, arguments.lpips_weights, bar)
        bar.close()
        notes = [*_about_masks(source, results, arguments.hole), *_skipped(data, source)]
        if not results.scores:
            raise UserError(f"data must hold readable photos with usable masks, got none ({'; '.join(notes)})")
        cells = report.summary(results, arguments.seed)
        for line in [*notes, *report.notes(results)]:
            note("evaluate", line)
        print(report.narrow(cells, border))
        if arguments.out:
            report.save(results, cells, _facts(arguments, border, notes), arguments.out)
            print(f"wrote {arguments.out}")
    except images.ImageError as error:
        raise UserError(str(error)) from None
    except RuntimeError as error:
        if "allocate memory" in str(error) or "out of memory" in str(error):
            raise UserError(f"size must fit into memory, got {arguments.size}, which does not") from None
        raise
    finally:
        bar.close()


def _prepared(arguments: argparse.Namespace, border: int) -> tuple[dict[str, Fill], Photos, GivenMasks | MadeMasks]:
    """Everything that can be refused, before anything is measured."""
    from ..training import evaluate, photos, report

    if arguments.out:
        report.check_folder(arguments.out)
    for name, path in (("fid-weights", arguments.fid_weights), ("lpips-weights", arguments.lpips_weights)):
        if path and not Path(path).is_file():
            raise UserError(f"{name} must be an existing file, got {path}")
    side = arguments.size
    data = photos.Photos(arguments.data, side, photos.MadeMasks(evaluate.KIND), arguments.seed, augment=False)
    source: GivenMasks | MadeMasks
    try:
        if arguments.masks:
            source = evaluate.GivenMasks(arguments.masks, arguments.hole, side, data.files, arguments.seed)
        else:
            source = evaluate.MadeMasks(side, border, arguments.seed)
        network = _network(arguments)
    except ValueError as error:
        raise UserError(str(error)) from None
    return {arguments.model: network, **{name: evaluate.BASELINES[name] for name in arguments.baselines}}, data, source


def _network(arguments: argparse.Namespace) -> Fill:
    import torch

    from .. import models

    device = arguments.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device must be one that torch can use here, got {device}") from None
    model = models.load_published(arguments.model, arguments.weights).to(device)

    def fill(image: Tensor, known: Tensor) -> Tensor:
        filled: Tensor = model.inpaint(image.to(device), known.to(device))
        return filled.cpu()

    return fill


def _about_masks(source: GivenMasks | MadeMasks, results: Results, hole: str) -> list[str]:
    from ..training import evaluate

    if isinstance(source, evaluate.MadeMasks):
        return []
    lines = ["each photo has the mask of its name"]
    if not source.paired:
        lines = [f"masks are drawn in turn, {source.matching} photos have one of their name"]
    return [*lines, *about_large_holes([score.ratio for score in results.scores], hole)]


def _skipped(data: Photos, source: GivenMasks | MadeMasks) -> list[str]:
    unusable = getattr(source, "unusable", 0)
    counts = {"photos that cannot be read": data.skipped, "masks that cannot be used": unusable}
    return [f"{what}, skipped: {count}" for what, count in counts.items() if count]


def _facts(arguments: argparse.Namespace, border: int, notes: list[str]) -> dict[str, Any]:
    from . import info

    given = {name: value for name, value in vars(arguments).items() if name not in ("run", "verb")}
    facts = info.collect()
    facts["versions"] |= {name: info.version(name) for name in ("torchmetrics", "torchvision", "opencv-python")}
    return {"arguments": given, "border": border, "data": notes, **facts}
