# SPDX-License-Identifier: Apache-2.0
"""Training: recipes, data, the loop, and what happens when it is killed."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fused_inpaint import images, models
from fused_inpaint.cli import main
from fused_inpaint.training import loop, recipes
from fused_inpaint.training.photos import MadeMasks, MasksOfFolder, Photos, Stream

CONFIG = {
    "pconv": {"levels": 3, "width": 4},
    "cgan_pc_rn": {"levels": 3, "width": 4},
    "region_wise": {"width": 2},
    "deepgin": {"width": 8},
    "aot_gan": {"width": 4, "blocks": 1, "rates": [1, 2]},
}
CRITIC = {"cgan_pc_rn": {"width": 2}, "region_wise": {"width": 2}, "deepgin": {"width": 2}, "aot_gan": {"width": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photos, one of them turned by EXIF and one in a subfolder, and a broken one."""
    path = tmp_path_factory.mktemp("photos")
    (path / "more").mkdir()
    rng = np.random.default_rng(0)
    for i, name in enumerate(("a.png", "b.png", "c.jpg", "more/d.png", "e.png")):
        down, across = np.mgrid[:60, :80]
        noise = rng.integers(0, 60, (60, 80))
        pixels = np.stack([2 * down + 10 * i, across + noise, 255 - down - across], -1).clip(0, 255).astype(np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).save(path / name, **({"exif": exif} if name == "c.jpg" else {}))
    (path / "broken.png").write_bytes(b"nothing")
    (path / "notes.txt").write_text("not a picture")
    return path


def small(key: str, **changes: Any) -> recipes.Recipe:
    size = 72 if key == "region_wise" else 32
    return recipes.recipe_of(
        key, **{"size": size, "batch": 2, "model": CONFIG[key], "critic": CRITIC.get(key, {}), **changes}
    )


def trainer(folder: Path, out: Path, key: str = "pconv", recipe: Any = None, **options: Any) -> loop.Trainer:
    recipe = recipe or small(key)
    options = {"steps": 4, "batch": recipe.batch, "log_every": 1, "save_every": 2, "sample_every": 100, **options}
    photos = Photos(folder, recipe.size, MadeMasks(recipe.key), seed=3)
    return loop.Trainer(recipe, photos, out, loop.Options(**options))


def log(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in lines]


def weights(out: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("key", CONFIG)
def test_every_recipe_runs(key: str, folder: Path, tmp_path: Path) -> None:
    """All stages, with the perceptual terms; the result is a model that loads."""
    recipe = small(key)
    run = trainer(folder, tmp_path, key, steps=6, sample_every=6)
    run.features = models_features(recipe)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.run()
    lines = log(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert set(recipe.weights) <= {name for line in lines for name in line}
    assert ("discriminator" in lines[-1]) == (recipe.discriminator is not None)
    total = sum(recipe.weights.get(k, 1.0) * v for k, v in lines[-1].items() if k not in NOT_TERMS)
    assert abs(total / lines[-1]["total"] - 1) < 1e-5
    model = models.load_published(key, tmp_path / "model.safetensors")
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())
    with Image.open(tmp_path / "samples" / "0000006.png") as sheet:
        assert sheet.size == (3 * recipe.size, 4 * recipe.size)


def test_adversarial_term_without_the_perceptual_ones(folder: Path, tmp_path: Path) -> None:
    """Its weight is for a sum that the VGG terms are the most of."""
    trainer(folder, tmp_path, "cgan_pc_rn", steps=1).run()
    (line,) = log(tmp_path)
    assert "style" not in line
    terms = {k: v for k, v in line.items() if k not in NOT_TERMS}
    factors = {"valid": 1, "hole": 6, "tv": 0.1, "adversarial": 0.003}
    assert line["total"] == pytest.approx(sum(factors[k] * v for k, v in terms.items()), rel=1e-5)


NOT_TERMS = ("step", "total", "discriminator", "rate")


def models_features(recipe: recipes.Recipe) -> Any:
    """In place of VGG: as many maps as the recipe takes, quickly."""

    def features(image: Tensor) -> list[Tensor]:
        return [torch.nn.functional.avg_pool2d(image, 4) * (i + 1) for i in range(len(recipe.vgg[1]))]

    return features


def test_schedules() -> None:
    pconv = recipes.recipe_of("pconv")
    assert [pconv.at(s, 100)[0].frozen_encoder_norm for s in (0, 79, 80, 99)] == [False, False, True, True]
    assert pconv.at(0, 100)[1] == 2e-4 and pconv.at(99, 100)[1] == 5e-5
    deepgin = recipes.recipe_of("deepgin")
    assert [deepgin.at(s, 110)[0].adversarial for s in (9, 10, 109)] == [False, True, True]
    rates = [deepgin.at(s, 110)[1] for s in (10, 19, 20, 65, 109)]
    assert rates[:3] == [1e-4, 1e-4, 1e-4] and abs(rates[3] - 5e-5) < 1e-9 and 0 < rates[4] < 2e-6
    assert not recipes.recipe_of("region_wise").at(19, 29)[0].adversarial
    with pytest.raises(ValueError, match=r"^train: key must be one of pconv, .*, got unet$"):
        recipes.recipe_of("unet")


def test_encoder_norm_is_frozen_in_its_stage(folder: Path, tmp_path: Path) -> None:
    run = trainer(folder, tmp_path, steps=5, recipe=small("pconv"))
    at_freeze = {}

    def watch(fraction: float, text: str) -> None:
        if fraction == 0.8:
            at_freeze.update({k: v.clone() for k, v in run.model.net.encoder.state_dict().items()})

    run.run(watch)
    after = run.model.net.encoder.state_dict()
    norms = [k for k in after if "norm" in k]
    assert norms and all(torch.equal(at_freeze[k], after[k]) for k in norms)
    assert any(not torch.equal(at_freeze[k], after[k]) for k in after if "conv" in k)


@pytest.mark.parametrize("key", ["pconv", "cgan_pc_rn"])
def test_resumed_run_is_the_same_bit_for_bit(key: str, folder: Path, tmp_path: Path) -> None:
    """Stopped between checkpoints, what came after the last one is done again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(folder, whole, key, steps=5, ema=0.5).run()

    class Stopped(Exception):
        pass

    def stop(fraction: float, text: str) -> None:
        if text.startswith("step 3"):
            raise Stopped

    with pytest.raises(Stopped):
        trainer(folder, parts, key, steps=5, ema=0.5).run(stop)
    (parts / "checkpoint-0000009.pt").write_bytes(b"half written")  # what a full disk may leave
    again = trainer(folder, parts, key, steps=5, ema=0.5)
    assert again.resumed_from == 2
    (parts / "checkpoint-0000009.pt").unlink()
    again.run()
    assert log(whole) == log(parts)
    one, other = weights(whole), weights(parts)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert len(list(parts.glob("checkpoint-*.pt"))) == loop.KEPT and not list(parts.glob("*.partial"))


def test_killed_run_goes_on(folder: Path, tmp_path: Path) -> None:
    """From the command line: SIGKILL at any moment, and the same command again."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fused_inpaint", "train", "pconv", "--data", str(folder), "--out", str(out)]
    command += ["--steps", "100000", "--size", "32", "--batch", "2", "--config", '{"levels": 2, "width": 4}']
    command += ["--workers", "0", "--log-every", "1", "--save-every", "1", "--sample-every", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while len(list(out.glob("checkpoint-*.pt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [int(p.stem[-7:]) for p in sorted(out.glob("checkpoint-*.pt"))]
    assert steps
    last = steps[-1] + 2
    command[command.index("100000")] = str(last)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {steps[-1]}\n" in done.stdout
    assert [line["step"] for line in log(out)] == list(range(1, last + 1))


def test_interrupted_run_keeps_its_last_step(folder: Path, tmp_path: Path) -> None:
    """From the command line, with a data process, which is interrupted, too."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fused_inpaint", "train", "pconv", "--data", str(folder), "--out", str(out)]
    command += ["--size", "32", "--batch", "2", "--config", '{"levels": 2, "width": 4}', "--workers", "1"]
    command += ["--log-every", "1", "--steps"]
    process = subprocess.Popen(
        [*command, "100000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 90
    written = out / "log.jsonl"
    while not (written.exists() and written.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    try:
        error = process.communicate(timeout=60)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # or it trains on beside all other tests
        raise
    assert process.returncode == 130 and "Traceback" not in error, error
    (step,) = (int(path.stem[-7:]) for path in out.glob("checkpoint-*.pt"))
    said = f"fused-inpaint train: interrupted, step {step} is saved, the same command goes on from there\n"
    assert error.endswith(said) and not (out / "model.safetensors").exists()

    done = subprocess.run([*command, str(step + 1)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"going on from step {step}\n" in done.stdout, done.stderr
    assert [line["step"] for line in log(out)] == list(range(1, step + 2))
    done = subprocess.run([*command, str(step)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"train: steps must be {step + 1} or more, where the run in {out} is, got {step}" in done.stderr


def test_a_stop_between_a_step_and_its_end_saves_the_next(folder: Path, tmp_path: Path) -> None:
    run = trainer(folder, tmp_path, save_every=100)
    run.run(lambda fraction, text: run.stop())
    assert run.step == 2 and [path.stem for path in tmp_path.glob("checkpoint-*.pt")] == ["checkpoint-0000002"]


def test_a_stopped_run_goes_on(folder: Path, tmp_path: Path) -> None:
    run = trainer(folder, tmp_path, save_every=100)
    run.stop()
    run.run()
    assert run.step == 1
    run.run()
    assert run.step == 4


def test_what_changed_is_said(folder: Path, tmp_path: Path, capsys) -> None:
    command = ["train", "pconv", "--data", str(folder), "--out", str(tmp_path / "run"), "--workers", "0"]
    command += ["--config", '{"levels": 2, "width": 4}', "--size", "32", "--batch"]
    assert main([*command, "2", "--steps", "1"]) == 0
    assert main([*command, "2", "--steps", "2"]) == 0
    assert capsys.readouterr().err.count("note: ") == 0
    assert main([*command, "1", "--rate", "0.5", "--steps", "3"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "note: " in line]
    assert said == [
        "fused-inpaint train: note: batch is 1, and was 2 until step 2",
        "fused-inpaint train: note: rate is 0.5, and was 0.0002 until step 2",
    ]


def test_interrupted_at_once(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """As a second Ctrl-C does: what there is goes on, and Ctrl-C that is somebody else's is left to them."""
    command = ["train", "pconv", "--data", str(folder), "--out", str(tmp_path / "run"), "--size", "32", "--batch", "2"]
    command += ["--workers", "0", "--config", '{"levels": 2, "width": 4}', "--steps"]
    taken = []
    former = signal.signal(signal.SIGINT, lambda *_: taken.append(1))
    try:
        monkeypatch.setattr(loop.Trainer, "_sample", lambda self: signal.raise_signal(signal.SIGINT))
        assert main([*command, "1"]) == 0 and taken == [1]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        monkeypatch.setattr(loop.Trainer, "run", lambda *_: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
        assert main([*command, "2"]) == 130
    finally:
        signal.signal(signal.SIGINT, former)
    assert capsys.readouterr().err.endswith("interrupted, the same command goes on from the last checkpoint\n")


def test_loss_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path) -> None:
    recipe = small("pconv")
    calls = 0

    def generator(batch: recipes.Batch) -> recipes.Terms:
        nonlocal calls
        calls += 1
        terms = recipes.RECIPES["pconv"].generator(batch)
        return {**terms, "tv": terms["tv"] * (float("nan") if calls == 4 else 1)}

    run = trainer(folder, tmp_path, recipe=dataclasses.replace(recipe, generator=generator), steps=6, log_every=3)
    with pytest.raises(
        loop.TrainingError, match=r"^losses must be finite, got valid .*, tv nan, total nan at step 4; "
    ):
        run.run()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-0000002.pt"]


def test_accumulated_batches_are_one_batch(folder: Path, tmp_path: Path) -> None:
    """Of a network without statistics of the batch."""
    found = []
    for name, batch, accumulate in (("one", 4, 1), ("two", 2, 2)):
        run = trainer(folder, tmp_path / name, "aot_gan", small("aot_gan", batch=batch), accumulate=accumulate, steps=2)
        run.run()
        found.append((log(tmp_path / name), weights(tmp_path / name)))
    # Of the first step; from the second on Adam has made whole steps of rounding's signs.
    one, other = (lines[0] for lines, _ in found)
    assert all(abs(one[k] - other[k]) <= 1e-5 * max(abs(one[k]), 1e-3) for k in one)
    for key, value in found[0][1].items():
        assert (value - found[1][1][key]).abs().mean() < 2e-6, key  # a step is 1e-4


def test_half_precision_step(folder: Path, tmp_path: Path) -> None:
    trainer(folder, tmp_path, "cgan_pc_rn", steps=2, amp="bf16").run()
    assert all(np.isfinite(line["total"]) for line in log(tmp_path))


def test_run_of_another_network_is_refused(folder: Path, tmp_path: Path) -> None:
    trainer(folder, tmp_path, "pconv", steps=2).run()
    with pytest.raises(loop.TrainingError, match=r"^out must be a run of aot_gan, got one of pconv in "):
        trainer(folder, tmp_path, "aot_gan")
    with pytest.raises(loop.TrainingError, match=r"^out must be a run of the same network, got another in "):
        trainer(folder, tmp_path, recipe=small("pconv", model={"levels": 3, "width": 6}))
    with pytest.raises(loop.TrainingError, match=r"^out must be a run with the same options, got other parts in "):
        trainer(folder, tmp_path, ema=0.9)


PROCESS = """
import sys, torch, torch.distributed as dist
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_training as t
torch.set_num_threads(1)
key, folder, out, batch = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])
if "RANK" in __import__("os").environ:
    dist.init_process_group("gloo")
recipe = t.small(key, batch=batch)
if key == "cgan_pc_rn":
    stage = t.recipes.Stage(1.0, 1.0, adversarial=False)
    recipe = t.dataclasses.replace(recipe, stages=(stage,))
run = t.trainer(folder, out, key, recipe, steps=3)
run.run()
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("key", ["aot_gan", "cgan_pc_rn"])
def test_two_processes_are_one_of_the_joined_batch(key: str, folder: Path, tmp_path: Path) -> None:
    """Without norms, with the discriminator; and with region norm joined over the processes, without, since torch joins
    its batch norm's statistics on GPUs only. Both networks after three steps."""
    script = tmp_path / "run.py"
    script.write_text(PROCESS)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    starts = {"one": ([], "4"), "two": ([*torchrun, "--rdzv-endpoint", "localhost:0"], "2")}
    for name, (start, batch) in starts.items():
        command = [sys.executable, *start, str(script), str(Path(__file__).parent), key, str(folder)]
        done = subprocess.run([*command, str(tmp_path / name), batch], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(log(tmp_path / "one")) == len(log(tmp_path / "two")) == 3
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    far = {k: (value - second[k]).abs().max() / value.abs().max().clamp(min=1e-2) for k, value in first.items()}
    # Adam's first steps are of one size wherever the gradient is more than rounding.
    assert max(far.values()) < 2e-3, max(far, key=far.get)


def test_stream() -> None:
    """Every photo once a pass; processes share the positions out; a later start gives what would have come."""
    from itertools import islice

    whole = list(islice(Stream(5, seed=1), 20))
    assert [p for p, _ in whole] == list(range(20))
    for turn in range(4):
        assert sorted(item for _, item in whole[5 * turn : 5 * turn + 5]) == [0, 1, 2, 3, 4]
    assert whole[:5] != whole[5:10]
    assert list(islice(Stream(5, seed=1, start=7), 5)) == whole[7:12]
    parts = [list(islice(Stream(5, seed=1, rank=rank, world=2), 10)) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == whole and [p for p, _ in parts[1]] == list(range(1, 20, 2))


@pytest.mark.filterwarnings("ignore:.*cannot be read and is skipped")
def test_photos(folder: Path) -> None:
    photos = Photos(folder, 24, MadeMasks("pconv"), seed=1)
    assert len(photos) == 5 and photos.skipped == 1
    image, mask = photos[7, 3]
    assert image.shape == (3, 24, 24) and mask.shape == (1, 24, 24)
    assert image.dtype == mask.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    same, other = photos[7, 3], photos[8, 3]
    assert torch.equal(same[0], image) and torch.equal(same[1], mask)
    assert not torch.equal(other[0], image) and not torch.equal(other[1], mask)
    plain = Photos(folder, 24, MadeMasks("pconv"), augment=False)
    turned = next(i for i, path in enumerate(plain.files) if path.name == "c.jpg")
    red = plain[0, turned][0][0]
    assert red[:, 0].mean() > red[:, -1].mean()  # turned by a quarter: what grew downwards falls to the right


def test_photo_broken_in_the_middle(tmp_path: Path) -> None:
    """Its header is whole, so it counts as a photo until it is read; it is warned of once."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / name)
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    photos = Photos(tmp_path, 16, MadeMasks("pconv"), augment=False)
    assert len(photos) == 2 and photos.skipped == 0
    with pytest.warns(UserWarning, match=r"b\.png cannot be read and is skipped$"):
        assert torch.equal(photos[0, 1][0], photos[0, 0][0]) and photos.skipped == 1
    assert torch.equal(photos[0, 1][0], photos[0, 0][0]) and photos.skipped == 2


def test_mask_folder(tmp_path: Path) -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[:5, :5] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    made = MasksOfFolder(tmp_path)(40, np.random.default_rng(0))
    assert made.shape == (40, 40) and (made == 0).sum() == 100
    with pytest.raises(images.ImageError, match=r"^masks must be an existing folder, got "):
        MasksOfFolder(tmp_path / "none")


def test_masks_that_cannot_be_used_are_passed_over(folder: Path, tmp_path: Path, capsys) -> None:
    known = np.full((20, 20), 255, np.uint8)
    known[:5, :5] = 0
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, pixels in (("a", known), ("b", np.zeros_like(known)), ("c", known), ("d", np.full_like(known, 99))):
        Image.fromarray(pixels).save(masks / f"{name}.png")
    given = MasksOfFolder(masks, "black")
    made = [given(20, np.random.default_rng(seed)) for seed in range(8)]
    assert all((mask == 0).sum() == 25 for mask in made)
    command = ["train", "pconv", "--data", str(folder), "--masks", str(masks), "--out", str(tmp_path / "run")]
    command += ["--size", "32", "--batch", "2", "--workers", "0", "--steps", "1"]
    assert main([*command, "--config", '{"levels": 2, "width": 4}']) == 0
    assert capsys.readouterr().err.splitlines()[:2] == [
        "fused-inpaint train: note: most masks have over 60% hole; if holes are black, say --hole black",
        "fused-inpaint train: note: 2 of 4 masks looked at cannot be used and are passed over: b.png: "
        "mask must mark some hole in white, got none (holes in black: --hole black)",
    ]
    for name in ("a", "c"):
        (masks / f"{name}.png").unlink()
    with pytest.raises(images.ImageError, match=r"^masks must all be usable, got \w.png, which is not: mask must "):
        given(20, np.random.default_rng(0))


def test_workers_give_the_same(folder: Path, tmp_path: Path) -> None:
    for name, workers in (("none", 0), ("two", 2)):
        trainer(folder, tmp_path / name, steps=2, workers=workers).run()
    assert log(tmp_path / "none") == log(tmp_path / "two")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"--data": "none"}, "data must be an existing folder, got none"),
        ({"--masks": "none"}, "masks must be an existing folder, got none"),
        ({"--vgg": "none.pth"}, "VGG: weights must be an existing file, got none.pth"),
        ({"--config": '{"levels": 0}'}, "pconv: levels must be 1 or more, got 0"),
        ({"--config": '{"depth": 2}'}, "pconv: configuration must be of levels, channels, width"),
        ({"--out": "file"}, "out must be a folder, got the file file"),
    ],
)
def test_mistakes(change: dict[str, str], sentence: str, folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    options = {"--data": str(folder), "--out": "run", "--steps": "1", "--size": "32", "--batch": "1", **change}
    assert main(["train", "pconv", *(part for pair in options.items() for part in pair)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("fused-inpaint train: ") and error.count("\n") == 1
    assert sorted(os.listdir()) == ["file"]


NO_MEMORY = "fused-inpaint train: batch and size must fit into memory, got none left; --batch, --size, --amp\n"
NOTHING = "\nfused-inpaint train: interrupted, nothing written\n"


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (MemoryError(), 2, NO_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), 2, NO_MEMORY),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), 2, NO_MEMORY),
        (KeyboardInterrupt(), 130, NOTHING),
        (RuntimeError("of another kind"), None, ""),
    ],
    ids=["memory", "allocator", "worker", "interrupt", "another"],
)
def test_what_ends_a_run_is_one_sentence(
    error: BaseException, code: int | None, sentence: str, folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """An error of another kind is ours, and keeps its traceback."""

    def run(trainer: loop.Trainer, progress: Any) -> None:
        raise error

    monkeypatch.setattr(loop.Trainer, "run", run)
    command = ["train", "pconv", "--data", str(folder), "--out", str(tmp_path / "run"), "--size", "32", "--batch", "2"]
    command += ["--workers", "0", "--config", '{"levels": 2, "width": 4}']
    with contextlib.nullcontext() if code else pytest.raises(RuntimeError, match="another kind"):
        assert main(command) == code
        assert capsys.readouterr().err == sentence


@pytest.mark.parametrize(
    "change", [["--config", "[]"], ["--ema", "1"], ["--workers", "-1"], ["--rate", "0"], ["--size", "9000"]]
)
def test_bad_arguments(change: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "pconv", "--data", ".", "--out", "run", *change])
    assert stop.value.code == 2
