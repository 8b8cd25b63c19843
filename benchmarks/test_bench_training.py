# SPDX-License-Identifier: Apache-2.0
"""What `fused-inpaint train` adds to the network's own work: the loop, the photos, the masks; and masks in a second."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ON_GPU, SMOKE, Record, compare
from PIL import Image
from sample_photos import write_photos
from torch import Tensor

from fused_inpaint import masks
from fused_inpaint.masks.draw import KINDS
from fused_inpaint.training import loop, recipes
from fused_inpaint.training.photos import MadeMasks, Photos

pytestmark = pytest.mark.skipif(ON_GPU, reason="a row of the CPU")

Step = tuple[Tensor, Tensor]

# The paper's network at the smallest of the papers' sizes; and one so small that everything else is much of its step.
TINY = {"levels": 3, "width": 8}
RECIPES = {
    "unet256": recipes.recipe_of("pconv", size=80 if SMOKE else 256, batch=2, model=TINY if SMOKE else {}),
    "small unet64": recipes.recipe_of("pconv", size=64, batch=8, model=TINY if SMOKE else {"levels": 4, "width": 16}),
}
STEPS = {"unet256": 1, "small unet64": 1} if SMOKE else {"unet256": 2, "small unet64": 20}  # of a turn
ROUNDS = 2 if SMOKE else 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs as a camera's JPEGs of a megapixel and more."""
    path = tmp_path_factory.mktemp("photos")
    write_photos(path)
    for file in path.rglob("*.bmp"):
        with Image.open(file) as photo:
            factor = 1024 / min(photo.size)
            large = photo.convert("RGB").resize((round(factor * photo.width), round(factor * photo.height)))
        large.save(file.with_suffix(".jpg"), quality=90)
        file.unlink()
    return path


def bare_step(recipe: recipes.Recipe, batch: Step) -> tuple[Callable[[], None], torch.nn.Module]:
    """A step as one writes it by hand, on a batch that is there; and its network."""
    torch.manual_seed(0)
    model = loop.models.build_model(recipe.key, **recipe.model).train()
    optimiser = torch.optim.Adam(model.parameters(), recipe.rate, recipe.betas)
    image, mask = batch

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        terms = recipe.generator(recipes.Batch(image, mask, model(image, mask), None, None))
        sum(recipe.weights.get(name, 1.0) * term for name, term in terms.items()).backward()
        optimiser.step()

    return step, model


def trainer(recipe: recipes.Recipe, folder: Path, out: Path, workers: int, steps: int, turns: int) -> loop.Trainer:
    never = steps * turns + 1
    options = loop.Options(
        steps * turns, recipe.batch, workers=workers, log_every=steps, save_every=never, sample_every=never
    )
    return loop.Trainer(recipe, Photos(folder, recipe.size, MadeMasks(recipe.key)), out, options)


def beside(run: loop.Trainer, bare: Callable[[], None], steps: int) -> dict[str, list[float]]:
    """Seconds a step, the loop's and the bare step's by turns; the first turn warms up."""
    seconds: dict[str, list[float]] = {"ours": [], "bare step": []}
    begun, done = time.perf_counter(), 0

    def turn(fraction: float, text: str) -> None:
        nonlocal begun, done
        done += 1
        if done % steps:
            return
        seconds["ours"].append((time.perf_counter() - begun) / steps)
        begun = time.perf_counter()
        for _ in range(steps):
            bare()
        seconds["bare step"].append((time.perf_counter() - begun) / steps)
        begun = time.perf_counter()

    run.run(turn)
    return {name: values[1:] for name, values in seconds.items()}


@pytest.mark.parametrize("data", ["ready", "read", "read by a worker"])
@pytest.mark.parametrize("name", RECIPES)
def test_loop(name: str, data: str, folder: Path, tmp_path: Path, monkeypatch, benchmark, keep) -> None:
    """The loop beside a step by hand, both on the same network: on one ready batch, or on photos that it reads."""
    recipe = RECIPES[name]
    photos = Photos(folder, recipe.size, MadeMasks(recipe.key))
    image, mask = (torch.stack(parts) for parts in zip(*(photos[i, i] for i in range(recipe.batch)), strict=True))
    batch = image.contiguous(memory_format=torch.channels_last), mask

    def ready(self: loop.Trainer) -> Iterator[Step]:
        while True:
            yield batch

    if data == "ready":
        monkeypatch.setattr(loop.Trainer, "_batches", ready)
        bare, model = bare_step(recipe, batch)
        once = trainer(recipe, folder, tmp_path / "once", 0, 1, 1)
        once.run()
        bare()
        # Adam's first step is of one size, whatever the gradient's.
        states = ({n: p.grad for n, p in net.named_parameters()} for net in (once.model, model))
        compare(f"{name} loop", "ours", *states, 1e-5)
    bare, _ = bare_step(recipe, batch)
    run = trainer(recipe, folder, tmp_path / "run", int(data == "read by a worker"), STEPS[name], ROUNDS + 1)
    record = Record(f"{name} loop, data {data}")
    benchmark.pedantic(lambda: record.seconds.update(beside(run, bare, STEPS[name])), rounds=1, iterations=1)
    keep(record)


@pytest.mark.parametrize("side", [64] if SMOKE else [256, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind: str, side: int, benchmark, keep) -> None:
    """A mask with any hole of the kind, on one core."""
    rng = np.random.default_rng(0)
    benchmark.group = "masks"
    benchmark.pedantic(lambda: masks.random_mask(kind, side, rng), rounds=2 if SMOKE else 200, warmup_rounds=1)
    keep(Record(f"mask {kind} {side}", {"ours": list(benchmark.stats.stats.data)}))
