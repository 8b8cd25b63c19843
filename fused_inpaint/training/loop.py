# SPDX-License-Identifier: Apache-2.0
"""The training loop: one process or several, killed at any moment, it goes on from its last complete checkpoint."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from .. import images, losses, models
from ..nn import LearnedRegionNorm2d, RegionNorm2d
from .photos import Photos, Stream
from .recipes import Batch, Recipe, Stage, Terms

KEPT = 2  # complete checkpoints: one may be damaged by a full disk


class TrainingError(Exception):
    """Training cannot start or go on; the text is one sentence for the user."""


@dataclass(frozen=True)
class Options:
    """What is not the paper's but the machine's and the user's."""

    steps: int
    batch: int  # of one process, at once
    accumulate: int = 1  # batches for each step of the optimisers
    amp: str = "off"  # "bf16" or "fp16"
    ema: float = 0.0  # decay of the averaged weights that are written at the end; 0: none
    workers: int = 0
    device: str = "cpu"
    seed: int = 0
    vgg: str | None = None  # weights of the perceptual losses; without, these terms are left out
    log_every: int = 50
    save_every: int = 1000
    sample_every: int = 1000
    tensorboard: bool = False


Progress = Callable[[float, str], None]


class Trainer:
    """One run of a recipe.

    `out` gets checkpoint-<step>.pt (each whole or not there), log.jsonl, samples/ and, at the end, model.safetensors
    (and discriminator.safetensors).
    """

    def __init__(self, recipe: Recipe, photos: Photos, out: Path, options: Options) -> None:
        self.recipe, self.photos, self.out, self.options = recipe, photos, out, options
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        self.model = models.build_model(recipe.key, **recipe.model).to(self.device).train()
        self.critic: models.Discriminator | None = None
        if recipe.discriminator is not None:
            self.critic = models.build_discriminator(recipe.key, **recipe.critic).to(self.device).train()
            if dist.is_initialized() and self.device.type == "cuda":  # torch has no other
                self.critic = nn.SyncBatchNorm.convert_sync_batchnorm(self.critic)
        self.optimiser = _adam(self.model, recipe.rate, recipe.betas)
        self.critic_optimiser = None
        if self.critic is not None:
            self.critic_optimiser = _adam(self.critic, recipe.discriminator_rate, recipe.betas)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if options.ema else None
        self.features: nn.Module | None = None
        if options.vgg is not None:
            self.features = losses.VGG(*recipe.vgg, options.vgg).to(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        self.step = 0
        self.changed: dict[str, tuple[Any, Any]] = {}  # settings that were others when the run was stopped
        self.resumed_from = self._resume()
        if self.step > options.steps:
            raise TrainingError(f"steps must be {self.step} or more, where the run in {out} is, got {options.steps}")
        self._stopped = False
        self._frozen = False
        if dist.is_initialized():
            _set_group(self.model, dist.group.WORLD)
        # Wrapped last: the wrapper copies the first process's weights to the others.
        self.wrapped, self.wrapped_critic = (_distributed(m, self.device) for m in (self.model, self.critic))

    def run(self, progress: Progress = lambda fraction, text: None) -> None:
        options, recipe = self.options, self.recipe
        self.out.mkdir(parents=True, exist_ok=True)
        log = Log(self.out, self.step, options.tensorboard) if self.rank == 0 else None
        batches = self._batches()
        history: list[Terms] = []
        loss = ""
        begun = time.perf_counter()
        try:
            stopped = False
            while self.step < options.steps and not stopped:
                stage, rate = recipe.at(self.step, options.steps)
                history.append(self._one_step(batches, stage, rate))
                self.step += 1
                last = self.step == options.steps
                stopped = self._stopped  # asked for once: a step that ends the run is one that is saved
                saves = last or stopped or self.step % options.save_every == 0
                if saves or self.step % options.log_every == 0:
                    seconds, begun = (time.perf_counter() - begun) / len(history), time.perf_counter()
                    means = self._checked(history)
                    history = []
                    loss = f"  loss {means['total']:.4g}"
                    if log is not None:
                        log.write(self.step, means, rate, seconds)
                progress(self.step / options.steps, f"step {self.step}{loss}")
                if self.rank == 0 and (last or self.step % options.sample_every == 0):
                    self._sample()
                if self.rank == 0 and saves:
                    self._save()
            if self.rank == 0 and self.step == options.steps:
                self._finish()
        finally:
            self._stopped = False
            if log is not None:
                log.close()

    def stop(self) -> None:
        """End `run` after the step that it is in, with a checkpoint; to be called from a signal handler."""
        self._stopped = True

    @property
    def weights(self) -> dict[str, float]:
        return self.recipe.weights | (self.recipe.without_vgg if self.features is None else {})

    def _one_step(self, batches: Iterator[tuple[Tensor, Tensor]], stage: Stage, rate: float) -> Terms:
        self._enter(stage, rate)
        adversarial = stage.adversarial and self.critic is not None
        taken = [self._moved(next(batches)) for _ in range(self.options.accumulate)]
        terms: Terms = {}
        predictions = []
        self.optimiser.zero_grad(set_to_none=True)
        if self.critic is not None:
            # The generator's loss goes through the discriminator, whose own gradients it must leave alone.
            self.critic.requires_grad_(False)
        for at, (image, mask) in enumerate(taken):
            with self._unsynchronised(self.wrapped, at), self._autocast():
                prediction = self.wrapped(image, mask)
                found = self.recipe.generator(
                    self._batch(image, mask, prediction, self.critic if adversarial else None)
                )
                total = sum(self.weights.get(name, 1.0) * term for name, term in found.items())
                assert isinstance(total, Tensor)
                self.scaler.scale(total / len(taken)).backward()
            _add(terms, {**found, "total": total}, len(taken))
            predictions.append(type(prediction)(*(p if p is None else p.detach() for p in prediction)))
        self.scaler.step(self.optimiser)
        if adversarial:
            self._critic_step(taken, predictions, terms)
        self.scaler.update()
        if self.average is not None:
            self._update_average()
        return terms

    def _critic_step(self, taken: list[tuple[Tensor, Tensor]], predictions: list[Any], terms: Terms) -> None:
        assert self.critic is not None and self.critic_optimiser is not None and self.recipe.discriminator is not None
        self.critic.requires_grad_(True)
        self.critic_optimiser.zero_grad(set_to_none=True)
        for at, ((image, mask), prediction) in enumerate(zip(taken, predictions, strict=True)):
            with self._unsynchronised(self.wrapped_critic, at), self._autocast():
                found = self.recipe.discriminator(self._batch(image, mask, prediction, self.wrapped_critic))
                total = sum(found.values())
                assert isinstance(total, Tensor)
                self.scaler.scale(total / len(taken)).backward()
            _add(terms, found, len(taken))
        self.scaler.step(self.critic_optimiser)

    def _batch(self, image: Tensor, mask: Tensor, prediction: Any, critic: nn.Module | None) -> Batch:
        score = None if critic is None else (lambda picture: critic(picture, mask, image))
        return Batch(image, mask, prediction, self.features, score)

    def _enter(self, stage: Stage, rate: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        freeze = getattr(self.model, "freeze_encoder_bn", None)
        if freeze is not None and stage.frozen_encoder_norm != self._frozen:
            freeze(stage.frozen_encoder_norm)
            self._frozen = stage.frozen_encoder_norm
            # Which parameters have gradients is fixed when a network is wrapped.
            self.wrapped = _distributed(self.model, self.device)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        options = self.options
        each = options.batch * options.accumulate * self.world
        stream = Stream(len(self.photos), options.seed, self.step * each, self.rank, self.world)
        loader = DataLoader(
            self.photos,
            options.batch,
            sampler=stream,
            num_workers=options.workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=options.workers > 0,
            worker_init_fn=_leave_interrupts,
        )
        return iter(loader)

    def _moved(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        image, mask = (t.to(self.device, non_blocking=True) for t in batch)
        return image.contiguous(memory_format=torch.channels_last), mask

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if self.options.amp == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, kinds[self.options.amp])

    def _unsynchronised(self, module: nn.Module | None, at: int) -> contextlib.AbstractContextManager[Any]:
        """Gradients are joined over the processes once for a step."""
        if isinstance(module, DistributedDataParallel) and at < self.options.accumulate - 1:
            return module.no_sync()
        return contextlib.nullcontext()

    @torch.no_grad()
    def _update_average(self) -> None:
        assert self.average is not None
        for mean, value in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - self.options.ema)
            else:
                mean.copy_(value)

    def _checked(self, history: list[Terms]) -> dict[str, float]:
        """Means of the steps since the last look; one wait for the device in all."""
        flat = torch.stack([term.double() for terms in history for term in terms.values()]).cpu().tolist()
        values = iter(flat)
        rows = [{name: next(values) for name in terms} for terms in history]
        for at, row in enumerate(rows):
            if not all(map(math.isfinite, row.values())):
                step = self.step - len(rows) + at + 1
                told = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
                before = "the checkpoints are of before" if _checkpoints(self.out) else "there is no checkpoint yet"
                raise TrainingError(f"losses must be finite, got {told} at step {step}; {before}")
        means: dict[str, float] = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            found = [row[name] for row in rows if name in row]  # some terms begin later
            means[name] = sum(found) / len(found)
        return means

    def _sample(self) -> None:
        """Truth, what the network was given, and what it made of it."""
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        given = [self.photos[position, position % len(self.photos)] for position in range(4)]
        image, mask = (torch.stack(parts).to(self.device) for parts in zip(*given, strict=True))
        # Alone: the other processes do not take part.
        _set_group(self.model, None)
        try:
            filled = self._best().inpaint(image, mask)
        finally:
            _set_group(self.model, dist.group.WORLD if dist.is_initialized() else None)
        rows = torch.cat([image, torch.where(mask.bool(), image, 0.5), filled], 3)
        sheet = rows.permute(0, 2, 3, 1).flatten(0, 1).mul(255).round().byte().cpu().numpy()
        images.write_photo(images.Photo(sheet), folder / f"{self.step:07d}.png")

    def _state(self) -> dict[str, Any]:
        parts = {
            "model": self.model,
            "critic": self.critic,
            "optimiser": self.optimiser,
            "critic_optimiser": self.critic_optimiser,
            "average": self.average,
            "scaler": self.scaler,
        }
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def _save(self) -> None:
        held = {"step": self.step, "key": self.recipe.key, "settings": self._settings()}
        held |= {"random": torch.get_rng_state(), **self._state()}
        target = self.out / f"checkpoint-{self.step:07d}.pt"
        partial = target.with_suffix(".partial")
        try:
            torch.save(held, partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        for old in _checkpoints(self.out)[:-KEPT]:
            old.unlink()

    def _resume(self) -> int:
        """The step of the newest checkpoint that can be read, loaded; 0 without one."""
        for path in reversed(_checkpoints(self.out)):
            try:
                held = torch.load(path, map_location=self.device, weights_only=True)
            except Exception:  # a damaged file: the one before it is whole
                continue
            if held["key"] != self.recipe.key:
                raise TrainingError(f"out must be a run of {self.recipe.key}, got one of {held['key']} in {self.out}")
            own = self._state()
            if own.keys() != held.keys() - {"step", "key", "settings", "random"}:
                raise TrainingError(f"out must be a run with the same options, got other parts in {path}")
            try:
                for name in own:
                    getattr(self, name).load_state_dict(held[name])
            except (RuntimeError, ValueError) as error:
                raise TrainingError(f"out must be a run of the same network, got another in {path}") from error
            torch.set_rng_state(held["random"].cpu())
            self.step = held["step"]
            now = self._settings()
            self.changed = {k: (was, now[k]) for k, was in held.get("settings", now).items() if was != now[k]}
            return self.step
        return 0

    def _settings(self) -> dict[str, Any]:
        """What may change when a run goes on, and is then mentioned."""
        recipe, options, photos = self.recipe, self.options, self.photos
        return {
            "data": str(photos.folder),
            "masks": str(photos.make_mask),
            "size": recipe.size,
            "batch": recipe.batch,
            "accumulate": options.accumulate,
            "rate": recipe.rate,
            "amp": options.amp,
            "seed": options.seed,
        }

    def _best(self) -> models.InpaintingModel:
        return self.model if self.average is None else self.average

    def _finish(self) -> None:
        self._best().save_pretrained(self.out / "model.safetensors")
        if self.critic is not None:
            self.critic.save_pretrained(self.out / "discriminator.safetensors")


class Log:
    """log.jsonl, a line each time; and TensorBoard's files."""

    def __init__(self, out: Path, step: int, tensorboard: bool) -> None:
        path = out / "log.jsonl"
        # What a killed run wrote after its last checkpoint will be written again.
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step] if path.exists() else []
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a")
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise TrainingError("tensorboard must be installed, got none (pip install tensorboard)") from None
            self._board = SummaryWriter(out, purge_step=step)

    def write(self, step: int, means: dict[str, float], rate: float, seconds: float) -> None:
        facts = {"step": step, **means, "rate": rate, "seconds_per_step": seconds}
        self._file.write(json.dumps(facts) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in facts.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # cut off in the middle
        return math.inf


def _adam(module: nn.Module, rate: float, betas: tuple[float, float]) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), rate, betas)


def _distributed(module: nn.Module | None, device: torch.device) -> Any:
    if module is None or not dist.is_initialized():
        return module
    return DistributedDataParallel(module, [device] if device.type == "cuda" else None, broadcast_buffers=False)


def _set_group(module: nn.Module, group: Any) -> None:
    """The processes whose region norms join their statistics."""
    for layer in module.modules():
        if isinstance(layer, RegionNorm2d | LearnedRegionNorm2d):
            layer.process_group = group


def _checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoint-*.pt"))


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C goes to all processes; what a data process does then is the training process's to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _add(to: Terms, terms: Terms, parts: int) -> None:
    for name, term in terms.items():
        to[name] = to.get(name, 0) + term.detach() / parts
