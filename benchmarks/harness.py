# SPDX-License-Identifier: Apache-2.0
"""Times rivals side by side in one process, after checking that they compute the same thing.

One round calls every rival once (or `repeats` times, so that no sample is shorter than a few milliseconds); the
next round starts with the next rival. Whatever the machine does meanwhile, all of them get it. A ratio is the
median, over the rounds, of the two times of one round; its spread is the 20th and 80th percentile of those same
quotients. On a GPU a sample ends when the device has done all its calls.
"""

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

THREADS = 2
SMOKE = os.environ.get("FUSED_INPAINT_BENCH_SMOKE", "") not in ("", "0")
"""Tiny shapes and two rounds: shows that everything runs, measures nothing."""

DEVICE = torch.device(os.environ.get("FUSED_INPAINT_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
"""Where every rival runs. On a GPU only its own rows are measured (test_bench_gpu.py), on a CPU only the others."""

ON_GPU = DEVICE.type == "cuda"

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

Outputs = dict[str, Tensor]


class UnequalError(AssertionError):
    """Rivals that do not compute the same thing are not timed."""


@dataclass
class Rival:
    """One contender. `call` is what is timed; `outputs` runs it and returns what it computed, by name.

    family: rivals of a family must agree ("partial": ours and the naive partial convolutions; "plain": without masks).
    limit: where this rival needs another one than its row's (half precision).
    """

    call: Callable[[], object]
    outputs: Callable[[], Outputs]
    family: str = "partial"
    limit: float | None = None


@dataclass
class Row:
    """One line of the benchmark: rivals, and what each family is compared with before anything is timed.

    truth: for each family, outputs of trusted code; a family without one is compared with its first member.
    limit: largest difference, as a fraction of the largest absolute value of the true tensor. Masks must be equal.
    gradient_limit: the same for gradients, where rounding alone moves them further.
    """

    name: str
    rivals: dict[str, Rival]
    truth: dict[str, Callable[[], Outputs]] = field(default_factory=dict)
    limit: float = 5e-5
    gradient_limit: float | None = None
    rounds: int = 11
    inference: bool = True


@dataclass
class Record:
    """What one row gave: seconds per call, one per round, and the largest relative difference found in the check."""

    name: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)

    def best(self, form: str) -> str:
        """The quicker of a form's layouts ("plain" -> "plain channels_last"), by median."""
        names = [name for name in self.seconds if name == form or name.startswith(form + " ")]
        if not names:
            raise KeyError(f"{self.name}: no rival {form!r} among {list(self.seconds)}")
        return min(names, key=lambda name: statistics.median(self.seconds[name]))

    def ratio(self, numerator: str, denominator: str) -> tuple[float, float, float]:
        """p20, median and p80 of numerator/denominator, round by round; each form in its better layout."""
        pairs = zip(self.seconds[self.best(numerator)], self.seconds[self.best(denominator)], strict=True)
        return percentiles([a / b for a, b in pairs])


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile, linear between the samples."""
    points = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double())
    return tuple(points.tolist())


def geometric_mean(values: list[float]) -> float:
    return statistics.geometric_mean(values)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest absolute value; infinite when something is not finite."""
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    if difference == 0:
        return 0.0
    return difference / scale if scale > 0 and difference == difference else float("inf")


def compare(
    row: str, name: str, actual: Outputs, expected: Outputs, limit: float, gradient_limit: float | None = None
) -> float:
    """The largest relative difference; raises UnequalError with every output that is off."""
    worst, wrong = 0.0, []
    if missing := expected.keys() - actual.keys():
        raise UnequalError(f"{row}: {name}: no {', '.join(sorted(missing))} to compare")
    for key, value in expected.items():
        if actual[key].shape != value.shape:
            wrong.append(f"{key} is {tuple(actual[key].shape)}, must be {tuple(value.shape)}")
            continue
        error = relative_error(actual[key], value)
        bound = 0.0 if "mask" in key else limit
        if gradient_limit is not None and key.startswith("gradient"):
            bound = gradient_limit
        if not error <= bound:
            wrong.append(f"{key} differs by {error:.2g} of its largest value, allowed {bound:.2g}")
        worst = max(worst, error)
    if wrong:
        raise UnequalError(f"{row}: {name} computes something else: " + "; ".join(wrong))
    return worst


def check(row: Row) -> dict[str, float]:
    """Compare all outputs (and gradients, where the row has them) within each family."""
    # Trials in float64 would take longer than all that is measured.
    with cudnn(benchmark=False):
        truth = {family: maker() for family, maker in row.truth.items()}
    errors = {}
    for name, rival in row.rivals.items():
        outputs = rival.outputs()
        expected = truth.setdefault(rival.family, outputs)
        errors[name] = compare(row.name, name, outputs, expected, rival.limit or row.limit, row.gradient_limit)
    return errors


@contextlib.contextmanager
def cudnn(benchmark: bool) -> Iterator[None]:
    """Whether cuDNN tries its algorithms at a shape's first call; TF32 would blur what float32 is compared for."""
    # allow_tf32 cannot be read once the newer switch has been set; the newer one always can.
    former = torch.backends.cudnn.benchmark, torch.backends.cudnn.conv.fp32_precision == "tf32"
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = former


def synchronize() -> None:
    """Wait until the device has done what it was told."""
    if ON_GPU:
        torch.cuda.synchronize()


def waited(call: Callable[[], object]) -> Callable[[], object]:
    """`call` that returns when its work is done, as it does on the CPU by itself."""
    return (lambda: (call(), synchronize())) if ON_GPU else call


def _seconds(call: Callable[[], object], count: int) -> float:
    """Of one call, when `count` of them follow each other."""
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return (time.perf_counter() - start) / count


def _repeats(call: Callable[[], object], shortest: float) -> int:
    """How many calls make a sample of at least `shortest` seconds."""
    # A call may take the GPU a few microseconds; a wait must not be part of the figure.
    most = 2000 if ON_GPU else 50
    return max(1, min(most, round(shortest / max(_seconds(call, 1), 1e-6))))


def interleave(calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds per call of every rival, one sample per round, the order rotating from round to round."""
    names = list(calls)
    for _ in range(warmup):
        for name in names:
            calls[name]()
    repeats = {name: _repeats(calls[name], 0.0 if SMOKE else 0.01) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                call, count = calls[name], repeats[name]
                call()  # untimed: the caches and the heap as this rival leaves them, not the one before it
                seconds[name].append(_seconds(call, count))
    finally:
        gc.enable()
    return seconds


def measure(row: Row) -> Record:
    """Check, then time. Inference rows run under torch.inference_mode()."""
    with torch.inference_mode() if row.inference else contextlib.nullcontext():
        errors = check(row)
        rounds = 2 if SMOKE else int(os.environ.get("FUSED_INPAINT_BENCH_ROUNDS", row.rounds))
        seconds = interleave({name: rival.call for name, rival in row.rivals.items()}, rounds, warmup=1 if SMOKE else 2)
    return Record(row.name, seconds, errors)
