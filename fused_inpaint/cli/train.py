# SPDX-License-Identifier: Apache-2.0
"""`fused-inpaint train`: a paper's recipe on a folder of photos."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ._common import MODELS, ProgressBar, UserError, about_large_holes, note, positive_float, positive_int, seed, side

if TYPE_CHECKING:
    from ..training.loop import Trainer
    from ..training.photos import MasksOfFolder

VGG_TERMS = ("correlation", "perceptual", "style")
# What torch says when there is no memory left, and when the system killed a data process for it.
NO_MEMORY = ("allocate memory", "out of memory", "DataLoader worker")


def add(verbs: Any) -> None:
    verb = verbs.add_parser(
        "train",
        help="train a network on a folder of photos",
        description="Train a network by its paper's recipe (loss terms, optimisers, schedule, masks). A run that was "
        "stopped goes on from its last checkpoint when the same command is given again. Over several processes: "
        "torchrun --nproc-per-node N -m fused_inpaint train ...",
    )
    verb.add_argument("model", choices=MODELS)
    verb.add_argument("--data", required=True, metavar="DIR", help="photos, subfolders included")
    verb.add_argument("--masks", metavar="DIR", help="hole masks, drawn at random (else those of the paper are made)")
    verb.add_argument("--hole", choices=("white", "black"), default="white", help="colour of holes in --masks")
    verb.add_argument("--out", required=True, metavar="RUN", help="folder of checkpoints, log, samples and the result")
    verb.add_argument("--steps", type=positive_int, default=100_000, help="(%(default)s)")
    verb.add_argument("--size", type=side, help="side of the training squares in pixels (the paper's)")
    verb.add_argument("--batch", type=positive_int, help="of one process (the paper's)")
    verb.add_argument("--accumulate", type=positive_int, default=1, help="batches for one step (%(default)s)")
    verb.add_argument("--rate", type=positive_float, help="learning rate of the network (the paper's)")
    verb.add_argument("--vgg", metavar="FILE", help="torchvision's VGG weights; without, no perceptual and style loss")
    verb.add_argument("--config", type=_config, default={}, metavar="JSON", help='of the network: {"width": 16}')
    verb.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off")
    verb.add_argument("--ema", type=_share, default=0.0, help="decay of averaged weights, 0 for none (%(default)s)")
    verb.add_argument("--workers", type=_count, default=min(4, os.cpu_count() or 1), help="data processes")
    verb.add_argument("--device", help="cuda if there is one, else cpu")
    verb.add_argument("--seed", type=seed, default=0)
    for name, default in (("log", 50), ("save", 1000), ("sample", 1000)):
        verb.add_argument(f"--{name}-every", type=positive_int, default=default, metavar="STEPS", help="(%(default)s)")
    verb.add_argument("--tensorboard", action="store_true", help="log for TensorBoard, too")
    verb.set_defaults(run=run)


def _config(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object such as {{"width": 16}}, got {text}')
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to below 1, got {text}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text}")
    return int(text)


def run(arguments: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if world > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        _train(arguments, device, first=world == 1 or dist.get_rank() == 0)
        if world > 1:
            dist.barrier()  # Gloo aborts a process whose peer leaves while it is still taking that peer's connection.
    finally:
        if world > 1:
            dist.destroy_process_group()


def _train(arguments: argparse.Namespace, device: str, first: bool) -> None:
    from .. import images
    from ..training import loop, photos, recipes

    chosen = {name: getattr(arguments, name) for name in ("size", "batch", "rate")}
    recipe = recipes.recipe_of(arguments.model, **{k: v for k, v in chosen.items() if v is not None})
    recipe = dataclasses.replace(recipe, model={**recipe.model, **arguments.config})
    given = vars(arguments)
    names = {field.name for field in dataclasses.fields(loop.Options)} & given.keys() - {"batch", "device"}
    options = loop.Options(batch=recipe.batch, device=device, **{name: given[name] for name in names})
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out must be a folder, got the file {out}")
    bar = ProgressBar("training")
    try:
        folder = arguments.masks
        make_mask = photos.MasksOfFolder(folder, arguments.hole) if folder else photos.MadeMasks(recipe.key)
        data = photos.Photos(arguments.data, recipe.size, make_mask, arguments.seed)
        trainer = loop.Trainer(recipe, data, out, options)
        if first:
            _say(arguments, recipe, data, trainer)
            if isinstance(make_mask, photos.MasksOfFolder):
                _say_of_masks(make_mask, arguments.hole)
        with _interruptible(trainer):
            trainer.run(bar if first else lambda fraction, text: None)
    except (images.ImageError, loop.TrainingError, ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
            raise UserError("batch and size must fit into memory, got none left; --batch, --size, --amp") from None
        raise
    except KeyboardInterrupt:
        if any(out.glob("checkpoint-*.pt")):
            raise KeyboardInterrupt("the same command goes on from the last checkpoint") from None
        raise
    finally:
        bar.close()
    if trainer.step < options.steps:
        raise KeyboardInterrupt(f"step {trainer.step} is saved, the same command goes on from there")
    if first:
        print(f"{out / 'model.safetensors'}: {recipe.key} after {options.steps} steps")


@contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C ends the run after its step, with a checkpoint; another one at once. Not in one of several
    processes, which would wait for each other, nor where Ctrl-C is somebody else's or another thread's."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if trainer.world > 1 or not ours or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        trainer.stop()
        signal.signal(signal.SIGINT, former)

    former = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def _say_of_masks(given: MasksOfFolder, hole: str) -> None:
    shares, wrong = given.look()
    lines = about_large_holes(shares, hole)
    if wrong:
        looked_at = len(shares) + len(wrong)
        lines.append(f"{len(wrong)} of {looked_at} masks looked at cannot be used and are passed over: {wrong[0]}")
    for line in lines:
        note("train", line)


def _say(arguments: argparse.Namespace, recipe: Any, data: Any, trainer: Any) -> None:
    skipped = f" ({data.skipped} skipped)" if data.skipped else ""
    print(f"{len(data)} photos{skipped}; {recipe.key}, {recipe.size}x{recipe.size}, batch {recipe.batch}")
    if arguments.vgg is None:
        instead = "".join(f", {name} at {factor:g}" for name, factor in recipe.without_vgg.items())
        left_out = " and ".join(name for name in recipe.weights if name in VGG_TERMS)
        print(f"no --vgg: trained without the paper's terms {left_out}{instead}")
    if trainer.resumed_from:
        print(f"going on from step {trainer.resumed_from}")
        for name, (was, now) in trainer.changed.items():
            note("train", f"{name} is {now}, and was {was} until step {trainer.resumed_from}")
