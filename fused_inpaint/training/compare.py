# SPDX-License-Identifier: Apache-2.0
"""The demo's two fits, each in a process of its own so that its peak memory is its own, taking turns step by step.

`python -m fused_inpaint.training.compare DIR KIND` writes a line before each step, and goes on at each "step" read.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .fitting import Batch, Canvas, Crops, fit_network, forward_loss

LEVELS, WIDTH = 5, 32


class FitError(RuntimeError):
    """A fit's process ended early; the text is its last line."""


def compare(
    job: dict[str, Any],
    more: Callable[[int], bool],  # given the steps both have done: go on?
    kinds: tuple[str, ...] = ("naive", "fused"),
) -> dict[str, dict[str, Any]]:
    """Fit every kind on the same job, interleaved, so that a busy machine slows them alike."""
    with tempfile.TemporaryDirectory(prefix="fused-inpaint-") as name:
        folder = Path(name)
        torch.save(job, folder / "job.pt")
        workers = [_Worker(folder, kind) for kind in kinds]
        try:
            for worker in workers:
                worker.ready()
            done = 0
            while more(done):
                for worker in workers:
                    worker.tell("step")
                    worker.ready()
                done += 1
            return {worker.kind: worker.result() for worker in workers}
        finally:
            for worker in workers:
                worker.end()


class _Worker:
    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        command = [sys.executable, "-m", __name__, str(folder), kind]
        with open(folder / f"{kind}.err", "w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def ready(self) -> None:
        """Wait until it stands before its next step."""
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            self.fail()

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.fail()

    def result(self) -> dict[str, Any]:
        self.tell("stop")
        if self.process.wait() != 0:
            self.fail()
        loaded: dict[str, Any] = torch.load(self.folder / f"{self.kind}.pt", weights_only=True)
        return loaded

    def fail(self) -> NoReturn:
        lines = (self.folder / f"{self.kind}.err").read_text().strip().splitlines()
        raise FitError(f"the {self.kind} fit must run to its end, got {lines[-1] if lines else 'no message'}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _asked(done: int) -> bool:
    print(done, flush=True)
    return sys.stdin.readline().strip() == "step"


def fit_one(kind: str, job: dict[str, Any], more: Callable[[int], bool]) -> dict[str, Any]:
    """job: image (1, 3, H, W), known (1, 1, H, W), state, seed, side."""
    net = _network(kind)
    net.load_state_dict(job["state"])
    image, known = job["image"], job["known"]
    canvas = Canvas(known, levels=LEVELS)

    def data() -> Crops:
        return Crops(canvas, image, known, known, job["seed"], side=job["side"], count=1)

    net.train()
    batch = data().batch()
    _reset_peak()
    base = _peak()
    out, gradients = _first_step(net, batch)
    net.load_state_dict(job["state"])
    fit = fit_network(net, data(), more)
    peak = _peak() - base
    return {
        "out": out,
        "gradients": gradients,
        "result": canvas.predict(net, image, known, 1 - known),
        "steps": fit.steps,
        "step_seconds": statistics.median(fit.step_seconds),
        "peak_mib": peak / 2**20,
    }


def initial_state(seed: int) -> dict[str, Tensor]:
    from .. import models
    from .fitting import start_from_smooth

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = models.build_model("pconv", levels=LEVELS, width=WIDTH).net
    # Not 0: every gradient but the last layer's would be 0 at step one, and there would be nothing to compare.
    return start_from_smooth(net, gain=0.02).state_dict()


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _network(kind: str) -> nn.Module:
    if kind == "naive":
        from ..baselines import PConvUNet

        return PConvUNet("full_channel", levels=LEVELS, width=WIDTH, window_factor=True)
    from .. import models

    return models.build_model("pconv", levels=LEVELS, width=WIDTH).net


def _first_step(net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    out, loss = forward_loss(net, batch)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    net.zero_grad(set_to_none=True)
    return out.detach(), gradients


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux, or not allowed: the peak then counts from the start of the process


def _peak() -> int:
    """Peak resident bytes. VmHWM where there is one: ru_maxrss also remembers the process that started this one."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    place, which = Path(sys.argv[1]), sys.argv[2]
    torch.save(fit_one(which, torch.load(place / "job.pt", weights_only=True), _asked), place / f"{which}.pt")
