# SPDX-License-Identifier: Apache-2.0
"""Do the networks learn? Small ones, on the photographs that come with scikit-image and scikit-learn, on a CPU.

    pip install 'fused-inpaint[learning]'
    python benchmarks/learning.py --plot docs/learning.png --sheet sheet.png

Each network is trained by its recipe without VGG weights, at a larger learning rate for the few steps, and on the way
measured on photographs that it is not trained on, beside simple fills: mean over squares of the hole's PSNR. The two
plain convolutions are the partial-convolution U-Net itself with nothing masked, holes of the mean colour: they differ
from it in nothing but what is compared. Everything is drawn by a seed; results go to benchmarks/results/.
"""

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from plain_conv import PlainConv, PlainConvTold
from safetensors.torch import load_file
from sample_photos import write_photos
from torch import Tensor

from fused_inpaint import images, masks, models
from fused_inpaint.models import registry
from fused_inpaint.training import evaluate, loop, recipes
from fused_inpaint.training.photos import Photos

RESULTS = Path(__file__).parent / "results"
HOLES = {"box": "rectangle", "strokes": "free_form"}  # name -> kind of fused_inpaint.masks
RATIO = (0.1, 0.3)  # of the hole
SHOWN = 6

Cases = list[tuple[str, evaluate.Case]]

registry.MODELS |= {"plain_conv": PlainConv, "plain_conv_told": PlainConvTold}
UNET: dict[str, Any] = {"levels": 4, "width": 16}


class Network(NamedTuple):
    label: str
    rate: float
    config: dict[str, Any]


# The slowest first, so that the processes end together.
NETWORKS = {
    "aot_gan": Network("AOT-GAN", 5e-4, {"width": 16, "blocks": 2}),
    "cgan_pc_rn": Network("GAN, partial convolution, region norm", 1e-3, UNET),
    "pconv": Network("partial convolution", 1e-3, UNET),
    "plain_conv": Network("plain convolution", 1e-3, UNET),
    "plain_conv_told": Network("plain convolution, mask as a channel", 1e-3, UNET),
}


def recipe_of(name: str, size: int) -> recipes.Recipe:
    """The paper's, or for plain convolutions that of partial convolutions."""
    base = recipes.recipe_of(name if name in recipes.RECIPES else "pconv", size=size, batch=8)
    network = NETWORKS[name]
    config = {**base.model, **network.config}
    return dataclasses.replace(base, key=name, rate=network.rate, model=config, critic={"width": 16})


def hole(side: int, rng: np.random.Generator) -> Tensor:
    return masks.random_mask(tuple(HOLES.values()), side, rng, RATIO)


def held_out_cases(folder: Path, size: int, squares: int) -> Cases:
    """As many random squares of each photograph for each kind of hole."""
    found = []
    for kind, drawn in HOLES.items():
        data = Photos(folder, size, lambda side, rng, drawn=drawn: masks.random_mask(drawn, side, rng, RATIO), seed=1)
        for position in range(squares * len(data)):
            truth, known = data[position, position % len(data)]
            case = evaluate.Case(data.files[position % len(data)].stem, drawn, truth[None], known[None], "", "")
            found.append((kind, case))
    return found


def score(fill: evaluate.Fill, cases: Cases) -> dict[str, float]:
    """Mean PSNR of the hole in dB, by kind of hole."""
    values: dict[str, list[float]] = {kind: [] for kind in HOLES}
    for kind, case in cases:
        filled = evaluate.composed(case, fill)
        values[kind].append(evaluate.metrics.psnr(case.truth, filled, case.known == 0))
    return {kind: float(np.mean(found)) for kind, found in values.items()}


def train(name: str, photos: Path, out: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """The network's curve; its weights are in `out`."""
    torch.set_num_threads(1)
    recipe = recipe_of(name, chosen.size)
    data = Photos(photos / "training", chosen.size, hole, chosen.seed)
    cases = held_out_cases(photos / "held_out", chosen.size, chosen.squares)
    never = chosen.steps + 1
    options = loop.Options(
        chosen.steps, recipe.batch, seed=chosen.seed, log_every=chosen.every, save_every=never, sample_every=never
    )
    trainer = loop.Trainer(recipe, data, out, options)
    curve: list[dict[str, float]] = []

    def measure(fraction: float = 0.0, text: str = "at the start") -> None:
        found = score(trainer.model.inpaint, cases)
        curve.append({"step": trainer.step, "seconds": round(time.perf_counter() - begun), **found})
        print(f"{name}: {text}  " + "  ".join(f"{kind} {found[kind]:.2f} dB" for kind in HOLES), flush=True)

    begun = time.perf_counter()
    measure()
    trainer.run(measure)
    losses = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {"rate": recipe.rate, "batch": recipe.batch, "config": recipe.model, "curve": curve, "losses": losses}


def trained(name: str, out: Path) -> evaluate.Fill:
    model = models.build_model(name, **recipe_of(name, 0).model)
    model.net.load_state_dict(load_file(out / "model.safetensors"))
    return model.inpaint


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(HOLES), figsize=(11, 4.2), sharey=True, layout="constrained")
    for axes, kind in zip(panels, HOLES, strict=True):
        for name, run in results["networks"].items():
            axes.plot([p["step"] for p in run["curve"]], [p[kind] for p in run["curve"]], label=NETWORKS[name].label)
        for name, dashes in (("mean", ":"), ("biharmonic", "--")):
            axes.axhline(results["baselines"][name][kind], color="black", linestyle=dashes, label=f"{name} fill")
        axes.set(title=f"holes: {kind}", xlabel="step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out hole PSNR, dB")
    panels[0].set_ylim(bottom=min(results["baselines"]["mean"].values()) - 3)  # fresh weights are far below
    panels[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def write_sheet(cases: Cases, fills: dict[str, evaluate.Fill], path: Path) -> None:
    """A row for each shown case: photograph, what is known, and each fill in turn."""
    rows = []
    for _, case in (cases[int(i)] for i in np.linspace(0, len(cases) - 1, SHOWN)):
        known = torch.where(case.known > 0, case.truth, 0.5)
        rows.append(torch.cat([case.truth, known, *(evaluate.composed(case, fill) for fill in fills.values())], 3))
    sheet = torch.cat(rows, 2)[0].permute(1, 2, 0).mul(255).round().byte()
    images.write_photo(images.Photo(sheet.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()), path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Do the networks learn?")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100, help="steps between measurements")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--squares", type=int, default=12, help="of each held-out photograph, for each kind of hole")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / f"learning-{datetime.date.today()}-cpu.json")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--sheet", type=Path)
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    fills: dict[str, evaluate.Fill] = {name: evaluate.BASELINES[name] for name in ("mean", "biharmonic")}
    results: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
        "settings": {
            "steps": chosen.steps,
            "size": chosen.size,
            "seed": chosen.seed,
            "squares": chosen.squares,
            "hole": RATIO,
        },
    }
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch, "photos")
        write_photos(photos)
        results["photos"] = {f.name: sorted(p.stem for p in f.iterdir()) for f in sorted(photos.iterdir())}
        cases = held_out_cases(photos / "held_out", chosen.size, chosen.squares)
        results["baselines"] = {name: score(fill, cases) for name, fill in fills.items()}
        print(results["baselines"], flush=True)
        # A process for each core: what a small network does is too short to be shared out over threads.
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            runs = {n: pool.submit(train, n, photos, Path(scratch, n), chosen) for n in chosen.networks}
            results["networks"] = {name: run.result() for name, run in runs.items()}
        fills |= {name: trained(name, Path(scratch, name)) for name in chosen.networks}
        if chosen.sheet:
            write_sheet(cases, fills, chosen.sheet)
    chosen.out.write_text(json.dumps(results, indent=1) + "\n")
    if chosen.plot:
        plot(results, chosen.plot)


if __name__ == "__main__":
    main()
