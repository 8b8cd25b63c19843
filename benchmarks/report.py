# SPDX-License-Identifier: Apache-2.0
"""What a benchmark run prints and saves: the machine, every rival's times, and each promised figure beside its bar."""

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from harness import DEVICE, ON_GPU, SMOKE, THREADS, Record, geometric_mean, percentiles

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Records = dict[str, Record]
Figure = tuple[float, float, float]


@dataclass(frozen=True)
class Bar:
    """A promised figure: p20, median and p80 of it from the records, and the bound on the median."""

    figure: str
    sense: str
    bound: float
    value: Callable[[Records], Figure]

    def holds(self, median: float) -> bool:
        return median <= self.bound if self.sense == "<=" else median >= self.bound


def mean_ratio(rows: list[str], kind: str, numerator: str, denominator: str) -> Callable[[Records], Figure]:
    """Geometric mean over rows of a ratio (and of the two ends of its spread)."""

    def value(records: Records) -> Figure:
        ratios = [records[f"{row} {kind}"].ratio(numerator, denominator) for row in rows]
        return tuple(geometric_mean([ratio[i] for ratio in ratios]) for i in range(3))

    return value


def quotient(row: str, numerator: str, denominator: str) -> Callable[[Records], Figure]:
    """Ratio of two plain figures of one row (bytes), which have no spread."""

    def value(records: Records) -> Figure:
        extra = records[row].extra
        ratio = extra[numerator] / extra[denominator]
        return ratio, ratio, ratio

    return value


def over_floor(row: str, rival: str, floor_ms: float) -> Callable[[Records], Figure]:
    """A rival's time in units of the least the device could take."""

    def value(records: Records) -> Figure:
        record = records[row]
        return tuple(1e3 * seconds / floor_ms for seconds in percentiles(record.seconds[record.best(rival)]))

    return value


ENCODER = [f"enc{i}" for i in range(1, 9)]
DECODER = [f"dec{i}" for i in range(1, 9)]
ENCODER_2_5 = ["enc2", "enc3", "enc4", "enc5"]
DECODER_64_256 = ["dec4", "dec3", "dec2"]  # output sides 64, 128, 256

# fmt: off
CPU_BARS = [
    # Inference as `fused_inpaint.prepack` runs it, and without that call.
    *(bar for how, ours in (("prepacked", "prepacked ours"), ("as is", "ours")) for bar in (
        Bar(f"encoder layers 2-5 forward, {how} / plain conv", "<=", 1.10,
            mean_ratio(ENCODER_2_5, "forward", ours, "plain")),
        Bar(f"decoder layers 64, 128, 256 forward, {how} / (interpolate + cat + plain conv)", "<=", 0.58,
            mean_ratio(DECODER_64_256, "forward", ours, "plain")),
        Bar(f"all 16 layers forward: full-channel / ours {how}", ">=", 2.8,
            mean_ratio(ENCODER + DECODER, "forward", "full-channel", ours)),
        Bar(f"encoder layers forward: NVIDIA one-channel / ours {how}", ">=", 1.3,
            mean_ratio(ENCODER, "forward", "nvidia", ours)),
        Bar(f"decoder layers forward: NVIDIA multi-channel / ours {how}", ">=", 2.5,
            mean_ratio(DECODER, "forward", "nvidia", ours)),
        Bar(f"U-Net 512 inference: full-channel / ours {how}", ">=", 4.3,
            mean_ratio(["unet512"], "inference", "full-channel", ours)),
        Bar(f"U-Net 512 inference: ours {how} / plain NCHW", "<=", 0.45,
            mean_ratio(["unet512"], "inference", ours, "plain nchw")),
        Bar(f"U-Net 512 inference: ours {how} / plain channels_last", "<=", 0.58,
            mean_ratio(["unet512"], "inference", ours, "plain channels_last")),
        Bar(f"U-Net 256 inference: ours {how} / plain channels_last", "<=", 0.72,
            mean_ratio(["unet256"], "inference", ours, "plain channels_last")),
    )),
    Bar("U-Net 512 inference, prepacked: ours in bf16 / ours in float32", "<=", 0.65,
        mean_ratio(["unet512"], "bf16", "bf16 prepacked ours", "prepacked ours")),
    Bar("encoder layers 2-5 forward+backward / plain conv", "<=", 1.12,
        mean_ratio(ENCODER_2_5, "training", "ours", "plain")),
    Bar("decoder layers 64, 128, 256 forward+backward / plain equivalent", "<=", 0.75,
        mean_ratio(DECODER_64_256, "training", "ours", "plain")),
    Bar("U-Net 256 batch 2 training step: full-channel / ours", ">=", 1.8,
        mean_ratio(["unet256"], "training", "full-channel", "ours")),
    # Both readings of peak memory: with parameters and optimiser state, and without.
    Bar("U-Net 256 batch 2 training step, peak memory: ours / full-channel", "<=", 0.6,
        quotient("unet256 memory", "ours peak", "full-channel peak")),
    Bar("... of it, above what stays between steps: ours / full-channel", "<=", 0.6,
        quotient("unet256 memory", "ours step", "full-channel step")),
]

REGION_BARS = [
    Bar("region norm forward+backward: published RN-B / ours", ">=", 6.0,
        mean_ratio(["region_norm"], "training", "published", "ours")),
    Bar("region norm forward+backward: ours / batch norm", "<=", 1.3,
        mean_ratio(["region_norm"], "training", "ours", "batch norm")),
    Bar("learned region norm forward+backward: published RN-L / ours", ">=", 4.0,
        mean_ratio(["learned_region_norm"], "training", "published", "ours")),
    *(Bar(f"region conv, input form with upsampling, {hole} hole: ours / dense", "<=", 0.32,
          mean_ratio([f"region_conv input up2 {hole}"], "forward", "ours", "dense")) for hole in ("square", "brush")),
    *(Bar(f"region conv, input form, {hole} hole: ours / dense", "<=", bound,
          mean_ratio([f"region_conv input up1 {hole}"], "forward", "ours", "dense"))
      for hole, bound in (("square", 0.75), ("brush", 0.88))),
    *(Bar(f"region conv, output form, {hole} hole: ours / both filters", "<=", bound,
          mean_ratio([f"region_conv output {hole}"], "forward", "ours", "both filters"))
      for hole, bound in (("square", 0.65), ("brush", 0.80))),
    *(Bar(f"region conv forward+backward, upsample {up}, peak memory: ours / dense", "<=", 0.5,
          quotient("region_conv memory", f"up{up} region ours peak", f"up{up} region dense peak")) for up in (1, 2)),
]

PAIRWISE_BARS = [
    Bar("self-attention 64x64, 64 channels, forward+backward: ours / bmm-softmax-bmm", "<=", 0.5,
        mean_ratio(["attention"], "training", "ours", "published")),
    Bar("self-attention 64x64, 64 channels, forward+backward, peak memory: ours / bmm-softmax-bmm", "<=", 0.2,
        quotient("attention memory", "attention ours step", "attention published step")),
    *(Bar(f"correlation L1 of 4096 positions, 128 channels, forward+backward, {what}: ours / eager", "<=", 0.5,
          mean_ratio([f"gram_l1 positions {count}"], "training", "ours", "eager"))
      for count, what in ((1, "one gradient"), (2, "both gradients"))),
    Bar("correlation L1 of 4096 positions, forward+backward, peak extra memory: ours / eager", "<=", 0.05,
        quotient("gram_l1 memory", "gram_l1 ours step", "gram_l1 eager step")),
]

BLOCK_BARS = [
    Bar("pyramid forward: ours / pads, convolutions, ReLU, cat", "<=", 0.80,
        mean_ratio(["pyramid"], "forward", "ours", "eager")),
    Bar("AOT block forward: ours / eager", "<=", 0.85, mean_ratio(["aot_block"], "forward", "ours", "eager")),
    Bar("AOT block forward+backward: ours / eager", "<=", 0.88, mean_ratio(["aot_block"], "training", "ours", "eager")),
]

NETWORK_BARS = [
    Bar("region-wise network 256 inference: ours / dense port channels_last", "<=", 0.50,
        mean_ratio(["region_wise256"], "inference", "ours", "eager channels_last")),
    Bar("AOT-GAN 256 inference: ours / eager channels_last", "<=", 0.90,
        mean_ratio(["aot_gan256"], "inference", "ours", "eager channels_last")),
    Bar("DeepGIN 256 inference: ours / eager channels_last", "<=", 0.85,
        mean_ratio(["deepgin256"], "inference", "ours", "eager channels_last")),
    Bar("cGAN of partial convolutions and region norm, 256 training step: eager / ours", ">=", 2.0,
        mean_ratio(["cgan_pc_rn256"], "training", "eager", "ours")),
    *(bar for key, name in (("aot_gan", "AOT-GAN"), ("deepgin", "DeepGIN")) for bar in (
        Bar(f"{name} 256 training step, peak memory: ours / eager", "<=", 0.8,
            quotient(f"{key}256 memory", f"{key} ours peak", f"{key} eager peak")),
        Bar("... of it, above what stays between steps: ours / eager", "<=", 0.8,
            quotient(f"{key}256 memory", f"{key} ours step", f"{key} eager step")),
    )),
]

# A share of 95 % in the network is 1 / 0.95 of a bare step.
TRAINING_BARS = [
    Bar("training loop on ready batches: ours / bare step", "<=", 1.03,
        mean_ratio(["unet256 loop, data"], "ready", "ours", "bare step")),
    Bar("training loop that reads photos and makes masks: ours / bare step", "<=", 1 / 0.95,
        mean_ratio(["unet256 loop, data"], "read", "ours", "bare step")),
]

ENC16, DEC16 = ([f"{name}{i} b16" for i in (2, 3, 4, 5)] for name in ("enc", "dec"))
ALL_ENC, ALL_DEC = [f"{name} b16" for name in ENCODER], [f"{name} b16" for name in DECODER]
DEEP = [f"{name}{i} b1" for name in ("enc", "dec") for i in (6, 7, 8)]

# bfloat16, 512x512. The floors are those of an H200: the larger of operations / 790 TFLOP/s and bytes / 4.3 TB/s, layer
# by layer, with the upsampling folded.
GPU_BARS = [
    Bar("encoder layers 2-5 forward, b16: ours / plain conv", "<=", 1.12,
        mean_ratio(ENC16, "forward", "ours", "plain")),
    Bar("encoder layers 2-5 with batch norm and ReLU, b16: ours / plain", "<=", 0.95,
        mean_ratio(ENC16, "block", "ours", "plain")),
    Bar("decoder layers 2-5 forward, b16: ours / (interpolate + cat + plain conv)", "<=", 0.65,
        mean_ratio(DEC16, "forward", "ours", "plain")),
    Bar("encoder layers 2-5 forward+backward, b16: ours / plain", "<=", 1.08,
        mean_ratio(ENC16, "training", "ours", "plain")),
    Bar("decoder layers 2-5 forward+backward, b16: ours / plain equivalent", "<=", 0.70,
        mean_ratio(DEC16, "training", "ours", "plain")),
    Bar("encoder layers forward, b16: NVIDIA one-channel / ours", ">=", 1.3,
        mean_ratio(ALL_ENC, "forward", "nvidia", "ours")),
    Bar("decoder layers forward, b16: NVIDIA multi-channel / ours", ">=", 2.8,
        mean_ratio(ALL_DEC, "forward", "nvidia", "ours")),
    Bar("all 16 layers forward, b16: full-channel / ours", ">=", 3.0,
        mean_ratio(ALL_ENC + ALL_DEC, "forward", "full-channel", "ours")),
    Bar("layers enc3, dec3 forward, b16: compiled full-channel / ours", ">=", 1.8,
        mean_ratio(["enc3 b16", "dec3 b16"], "full-channel compiled", "compiled full-channel", "ours")),
    Bar("layer enc3 forward, b16: compiled NVIDIA / ours", ">=", 1.05,
        mean_ratio(["enc3 b16"], "nvidia compiled", "compiled nvidia", "ours")),
    Bar("layer dec3 forward, b16: compiled NVIDIA / ours", ">=", 1.8,
        mean_ratio(["dec3 b16"], "nvidia compiled", "compiled nvidia", "ours")),
    Bar("thin layers enc1, dec1 forward, b16: ours / plain", "<=", 0.80,
        mean_ratio(["enc1 b16", "dec1 b16"], "forward", "ours", "plain")),
    Bar("deep layers enc6-8, dec6-8 forward, b1, graphed: ours / plain", "<=", 0.80,
        mean_ratio(DEEP, "forward", "graphed ours", "graphed plain")),
    *(bar for how, ours in (("eager", "ours"), ("graphed", "graphed ours")) for bar in (
        Bar(f"U-Net 512 inference, b1: full-channel eager / ours {how}", ">=", 6.0,
            mean_ratio(["unet512 b1"], "inference", "full-channel", ours)),
        Bar(f"U-Net 512 inference, b1: ours {how} / plain graphed", "<=", 1.0,
            mean_ratio(["unet512 b1"], "inference", ours, "graphed plain")),
        Bar(f"U-Net 512 inference, b1: ours {how} / floor of 0.080 ms", "<=", 4.0,
            over_floor("unet512 b1 inference", ours, 0.080)),
    )),
    Bar("U-Net 512 inference, b16: full-channel / ours", ">=", 4.0,
        mean_ratio(["unet512 b16"], "inference", "full-channel", "ours")),
    Bar("U-Net 512 inference, b16: NVIDIA / ours", ">=", 3.2,
        mean_ratio(["unet512 b16"], "inference", "nvidia", "ours")),
    Bar("U-Net 512 inference, b16: ours / plain", "<=", 0.65,
        mean_ratio(["unet512 b16"], "inference", "ours", "plain")),
    Bar("U-Net 512 inference, b16: ours / floor of 1.18 ms", "<=", 2.2,
        over_floor("unet512 b16 inference", "ours", 1.18)),
    Bar("U-Net 512 training step, b16: full-channel / ours", ">=", 3.0,
        mean_ratio(["unet512 b16"], "training", "full-channel", "ours")),
    Bar("U-Net 512 training step, b16: ours / plain", "<=", 0.80,
        mean_ratio(["unet512 b16"], "training", "ours", "plain")),
    Bar("U-Net 512 training step, b16, peak memory: ours / full-channel", "<=", 0.5,
        quotient("unet512 b16 memory", "ours peak", "full-channel peak")),
    Bar("AOT-GAN 512 inference, b1, graphed: eager / ours", ">=", 1.4,
        mean_ratio(["aot_gan512 b1"], "inference", "graphed eager", "graphed ours")),
    Bar("AOT-GAN 512 inference, b16: eager / ours", ">=", 1.25,
        mean_ratio(["aot_gan512 b16"], "inference", "eager", "ours")),
    Bar("DeepGIN 256 inference, b1: eager / ours graphed", ">=", 4.0,
        mean_ratio(["deepgin256 b1"], "inference", "eager", "graphed ours")),
    Bar("DeepGIN 256 inference, b16: eager / ours", ">=", 1.3,
        mean_ratio(["deepgin256 b16"], "inference", "eager", "ours")),
    Bar("region-wise network 256 inference, b16: ours / dense port", "<=", 0.75,
        mean_ratio(["region_wise256 b16"], "inference", "ours", "eager")),
    Bar("cGAN of partial convolutions and region norm, 512 b16 forward+backward: NVIDIA + RN-B / ours", ">=", 4.0,
        mean_ratio(["cgan_pc_rn512 b16"], "training", "eager nvidia", "ours")),
    *(Bar(f"region norm {what}: ours / batch norm", "<=", 1.2, mean_ratio(["region_norm"], kind, "ours", "batch norm"))
      for kind, what in (("forward", "forward"), ("training", "forward+backward"))),
    *(Bar(f"region norm {what}: published RN-B / ours", ">=", bound,
          mean_ratio(["region_norm"], kind, "published", "ours"))
      for kind, what, bound in (("forward", "forward", 6.0), ("training", "forward+backward", 5.0))),
    *(Bar(f"region conv, input form, upsample {up}, {hole} hole: ours / dense", "<=", bound,
          mean_ratio([f"region_conv input up{up} {hole}"], "forward", "ours", "dense"))
      for up, bound in ((1, 0.80), (2, 0.50)) for hole in ("square", "brush")),
    Bar("AOT block forward, b16: ours / eager", "<=", 0.75, mean_ratio(["aot_block"], "forward", "ours", "eager")),
    Bar("pyramid forward, b16: ours / pads, convolutions, ReLU, cat", "<=", 0.80,
        mean_ratio(["pyramid"], "forward", "ours", "eager")),
    Bar("self-attention 64x64, 64 channels, forward+backward: ours / bmm-softmax-bmm", "<=", 0.5,
        mean_ratio(["attention"], "training", "ours", "published")),
    Bar("correlation L1 of 4096 positions, forward+backward: ours / eager", "<=", 0.35,
        mean_ratio(["gram_l1 positions 1"], "training", "ours", "eager")),
]
# fmt: on

# A smoke run takes the rows of both.
BARS = [
    *([] if ON_GPU else CPU_BARS + REGION_BARS + BLOCK_BARS + PAIRWISE_BARS + NETWORK_BARS + TRAINING_BARS),
    *(GPU_BARS if ON_GPU or SMOKE else []),
]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _backends() -> dict[str, str]:
    """Backend -> "" or why it is not usable here."""
    try:
        from fused_inpaint import _backends

        return _backends.status()
    except ImportError as error:
        return {"native": str(error)}


def _gpu() -> dict[str, Any]:
    """The GPU and what drives it; nothing on a CPU."""
    if not ON_GPU:
        return {}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "not installed"
    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_mib": properties.total_memory // 2**20,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton,
    }


def machine() -> dict[str, Any]:
    """Where, when and on which code this ran."""
    allocator = [Path(name).name for name in os.environ.get("LD_PRELOAD", "").split(":") if name]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        # A copy of the sources on a borrowed machine has no history.
        "commit": os.environ.get("FUSED_INPAINT_COMMIT") or _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain")),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backends": _backends(),
        "preloaded": allocator,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else [],
        "smoke": SMOKE,
        **_gpu(),
    }


def header(facts: dict[str, Any]) -> list[str]:
    dirty = " (with uncommitted changes)" if facts["dirty"] else ""
    load = " ".join(f"{value:.1f}" for value in facts["load_average"])
    usable = [name for name, reason in facts["backends"].items() if not reason]
    missing = [f"{name}: {reason}" for name, reason in facts["backends"].items() if reason]
    lines = [
        f"{facts['date']}  commit {facts['commit']}{dirty}  torch {facts['torch']}, python {facts['python']}",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['instructions']}, load {load}",
        f"backends: {', '.join(usable) or 'none'}" + "".join(f"; {line.splitlines()[0]}" for line in missing),
    ]
    if "gpu" in facts:
        versions = ", ".join(f"{name} {facts[name]}" for name in ("driver", "cuda", "cudnn", "triton"))
        lines.append(f"{facts['gpu']}, {facts['gpu_memory_mib']} MiB, {versions}")
    if not {DEVICE.type, "triton" if ON_GPU else DEVICE.type} & set(usable):
        lines.append("NO COMPILED KERNELS: ours ran on the reference path, and no figure below is about them")
    if SMOKE:
        lines.append("SMOKE RUN: tiny shapes, two rounds; the times mean nothing")
    return lines


def row_lines(record: Record) -> list[str]:
    """One line per rival: times in ms, and how many times ours it takes (above 1: ours is quicker)."""
    lines = [record.name]
    for name, samples in record.seconds.items():
        low, median, high = (1e3 * value for value in percentiles(samples))
        against = ""
        if name != "ours" and "ours" in record.seconds:
            pairs = zip(samples, record.seconds["ours"], strict=True)
            a, b, c = percentiles([theirs / ours for theirs, ours in pairs])
            against = f"{b:7.2f} x ours ({a:.2f}-{c:.2f})" + (
                "  ours loses" if b < 1 and not name.endswith("ours") else ""
            )
        lines.append(f"  {name:<34}{low:10.3f} {median:10.3f} {high:10.3f}  {against}")
    lines += [f"  {name:<34}{value:10.1f} MiB" for name, value in record.extra.items()]
    return lines


def bar_lines(records: Records) -> list[str]:
    lines = [f"{'figure':<82} {'bar':>8} {'measured':>9}  {'p20-p80':<13}", "-" * 124]
    for bar in BARS:
        limit = f"{bar.sense} {bar.bound:.2f}"
        try:
            low, median, high = bar.value(records)
        except KeyError:
            lines.append(f"{bar.figure:<82} {limit:>8} {'-':>9}  {'':<13} not run")
            continue
        verdict = "smoke" if SMOKE else "holds" if bar.holds(median) else "MISSES"
        lines.append(f"{bar.figure:<82} {limit:>8} {median:>9.3f}  {f'{low:.3f}-{high:.3f}':<13} {verdict}")
    return lines


def as_json(facts: dict[str, Any], records: Records) -> dict[str, Any]:
    rows = {}
    for name, record in records.items():
        rivals = {}
        for rival, samples in record.seconds.items():
            low, median, high = (1e3 * value for value in percentiles(samples))
            rivals[rival] = {"p20_ms": low, "median_ms": median, "p80_ms": high, "rounds": len(samples)}
            rivals[rival]["largest_relative_difference"] = record.errors.get(rival)
        rows[name] = {"rivals": rivals, **({"figures": record.extra} if record.extra else {})}
    figures = []
    for bar in BARS:
        entry: dict[str, Any] = {"figure": bar.figure, "bar": f"{bar.sense} {bar.bound}"}
        try:
            low, median, high = bar.value(records)
            entry |= {"p20": low, "measured": median, "p80": high, "holds": bar.holds(median)}
        except KeyError:
            entry["measured"] = None
        figures.append(entry)
    return {"machine": facts, "figures": figures, "rows": rows}


def file_stem(facts: dict[str, Any]) -> str:
    """Of the files with results of one machine, day and, on a CPU, commit."""
    if "gpu" in facts:
        return f"{re.sub('[^a-z0-9]+', '-', facts['gpu'].lower()).strip('-')}-{facts['date'][:10]}"
    return f"partial_conv-{facts['date'][:10]}-{facts['commit']}{'-dirty' if facts['dirty'] else ''}"


def save(facts: dict[str, Any], records: Records) -> Path:
    """Write benchmarks/results/partial_conv-<date>-<commit>.json, or <gpu>-<date>.json; a later run of that name
    replaces it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{file_stem(facts)}.json"
    path.write_text(json.dumps(as_json(facts, records), indent=1) + "\n")
    return path
