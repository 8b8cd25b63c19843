# SPDX-License-Identifier: Apache-2.0
"""Times the Triton kernel's tiles for each layer of the partial-convolution U-Net on this GPU, for the op's table.

    python benchmarks/tune_triton.py [--write] [--layers enc1,dec1] [--batches 1,16] [--precisions half,tf32]

First, processes side by side compile each candidate and compare its output with the reference; then this process times
those that were right, one at a time, as CUDA graphs (the fold of the weights and the sum of the splits included). The
measured rules go before the predicted ones, which stay for sizes that nobody measured. Masks are a quarter holes.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from report import machine
from torch import Tensor
from workload import Layer, layers

from fused_inpaint.ops.partial_conv import reference

TABLE = Path(reference.__file__).with_name("triton_configs.json")
DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
# Of the largest output: two roundings of bfloat16, of tf32's factors, and of float32 after the fold.
LIMITS = {"half": 2**-7, "tf32": 2**-9, "ieee": 5e-5}
PROGRAMS = 132  # one for each multiprocessor of an H200, if the GPU does not say otherwise

Config = tuple[int, int, int, int, int, int]  # block_m, block_n, block_k, warps, stages, split
Rule = dict[str, Any]


class Problem(NamedTuple):
    """One layer at one batch size, in one precision and form."""

    layer: Layer
    batch: int
    precision: str
    fold: bool

    def __str__(self) -> str:
        return f"{self.layer.name} x {self.batch} {self.precision}{' folded' if self.fold else ''}"

    @property
    def sizes(self) -> dict[str, int]:
        """As the op looks them up: of one phase's GEMM."""
        layer, phases = self.layer, 4 if self.fold else 1
        taps = ((layer.kernel + 1) // 2) ** 2 if self.fold else layer.kernel**2
        depth = layer.up * taps + layer.skip * layer.kernel**2
        return {"rows": self.batch * layer.size**2 // phases, "depth": depth, "outputs": layer.out}


# (block_m, block_n, steps of 128 bytes in a block_k, warps, stages): few rows, few outputs, and the rest.
TILES = [
    *((16, 64, 2, 4, 4), (16, 128, 1, 4, 5), (32, 64, 1, 4, 5), (32, 128, 1, 4, 4)),
    *((64, 16, 1, 4, 4), (128, 16, 1, 4, 4), (128, 16, 1, 8, 4), (256, 16, 1, 8, 3)),
    *((64, 64, 1, 4, 3), (64, 64, 1, 4, 5), (64, 128, 1, 4, 3), (64, 128, 1, 4, 4), (64, 256, 1, 8, 3)),
    *((128, 64, 1, 4, 4), (128, 64, 1, 8, 3), (128, 128, 1, 8, 3), (128, 128, 1, 8, 4), (256, 64, 1, 8, 3)),
    *((128, 256, 1, 8, 3), (256, 128, 1, 8, 3)),
]
# On ordinary cores, from registers.
IEEE_TILES = [(16, 64, 1, 4, 3), (32, 64, 1, 4, 3), (64, 16, 1, 4, 3), (64, 32, 1, 8, 3), (64, 64, 0.5, 8, 3)]


def candidates(problem: Problem, programs: int = PROGRAMS) -> list[Config]:
    """Tiles that are not mostly empty, with as many splits of the depth as give the GPU enough of them."""
    rows, depth, outputs = problem.sizes.values()
    found = []
    for block_m, block_n, steps, warps, stages in IEEE_TILES if problem.precision == "ieee" else TILES:
        if block_m >= max(17, 2 * rows) or block_n >= max(17, 2 * outputs) or (block_n == 16) != (outputs <= 16):
            continue
        tiles = math.ceil(rows / block_m) * (4 if problem.fold else 1) * math.ceil(outputs / block_n)
        if tiles > 16 * programs and block_m <= 32:
            continue
        block_k = int(steps * (64 if problem.precision == "half" else 32))
        splits = {1} if tiles >= programs else {max(1, round(waves * programs / tiles)) for waves in (1, 2)}
        for split in sorted(splits):
            if split <= max(1, depth // block_k):
                found.append((block_m, block_n, block_k, warps, stages, split))
    return found


class Arguments(NamedTuple):
    """Of one call, for the reference and the kernel."""

    x: list[Tensor]
    masks: list[Tensor]
    weight: Tensor
    bias: Tensor
    scale: Tensor
    geometry: tuple[Any, ...]


def arguments(problem: Problem, device: str) -> Arguments:
    layer, dtype = problem.layer, DTYPES[problem.precision]
    generator = torch.Generator(device).manual_seed(0)
    decoder = layer.decoder
    stride, sides = (1, [layer.size // 2, layer.size]) if decoder else (2, [2 * layer.size])
    channels = [layer.up, layer.skip] if decoder else [layer.up]

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    x = [
        random(problem.batch, c, s, s).to(dtype).contiguous(memory_format=torch.channels_last)
        for c, s in zip(channels, sides, strict=True)
    ]
    masks = [(torch.rand(1, 1, s, s, generator=generator, device=device) > 0.25).to(torch.uint8) for s in sides]
    weight = random(layer.out, sum(channels), layer.kernel, layer.kernel) / (sum(channels) * layer.kernel**2) ** 0.5
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    pairs = [(value, value) for value in (stride, layer.kernel // 2, 1)]
    geometry = ([2, 1] if decoder else [1], *pairs, 1)
    return Arguments(x, masks, weight, random(layer.out), random(layer.out), geometry)


def run(problem: Problem, given: Arguments, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    from fused_inpaint.ops import triton_common
    from fused_inpaint.ops.partial_conv import triton_impl

    chosen = triton_common.Config(*config)
    triton_impl.configuration = lambda *size: chosen
    torch.backends.cudnn.allow_tf32 = problem.precision == "tf32"
    x, masks, weight, bias, scale, geometry = given
    return triton_impl.partial_conv2d(x, masks, None, weight, bias, scale, *geometry, "leaky_relu", 0.2, problem.fold)


def expected(given: Arguments) -> tuple[Tensor, Tensor]:
    """(y, count) in float32, on the same device."""
    x, masks, weight, bias, scale, geometry = given
    torch.backends.cudnn.allow_tf32 = False
    upsample, stride, padding, dilation, _ = geometry
    channels = [s.size(1) for s in x]
    count, _ = reference.partial_window(masks, channels, upsample, weight.shape[2:], stride, padding, dilation)
    x, weight = [s.float() for s in x], weight.float()
    arguments = (x, masks, count, weight, bias, scale, *geometry, [0] * len(x), "leaky_relu", 0.2)
    return reference.partial_conv2d(*arguments), count


def wrong(problem: Problem, given: Arguments, truth: tuple[Tensor, Tensor], config: Config) -> str:
    """What is wrong with a candidate's result; empty if nothing is."""
    try:
        y, count, _ = run(problem, given, config)
        error = ((y.float() - truth[0]).abs().max() / truth[0].abs().max()).item()
    except Exception as failure:  # a candidate that Triton cannot build is one that is left out, and named
        return f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
    if not torch.equal(count, truth[1]):
        return "its counts differ"
    limit = LIMITS[problem.precision]
    return "" if error <= limit else f"its output differs by {error:.2g} of the largest value, allowed {limit:.2g}"


def verify(problem: Problem, configs: Sequence[Config], device: str = "cuda") -> list[str]:
    """For each candidate what is wrong with it; leaves the compiled kernels in Triton's cache."""
    with torch.inference_mode():
        given = arguments(problem, device)
        truth = expected(given)
        return [wrong(problem, given, truth, config) for config in configs]


def microseconds(problem: Problem, configs: Sequence[Config]) -> list[float]:
    """Median time of each candidate, and last of the vendor's convolution alone (no mask, nothing upsampled)."""
    from triton.testing import do_bench_cudagraph

    with torch.inference_mode():
        given = arguments(problem, "cuda")
        times = [do_bench_cudagraph(lambda c=c: run(problem, given, c), return_mode="median") for c in configs]
        upsample, *pairs, _ = given.geometry
        full = [F.interpolate(s, scale_factor=f) for s, f in zip(given.x, upsample, strict=True)]
        whole = torch.cat(full, 1)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = problem.precision == "tf32"
        plain = (whole.contiguous(memory_format=torch.channels_last), given.weight, None, *pairs)
        times.append(do_bench_cudagraph(lambda: F.conv2d(*plain), return_mode="median"))
    return [1e3 * time for time in times]


def rule(problem: Problem, config: Config, time: float) -> Rule:
    """Good for sizes up to a factor of two away, bounds excluded: neighbouring levels of the network are further."""
    ranges = {name: [size // 2 + 1, 2 * size - 1] for name, size in problem.sizes.items()}
    what = {"layer": f"{problem.layer.name} x {problem.batch}", "us": round(time, 2)}
    return {"precision": [problem.precision], "fold": problem.fold, **ranges, "config": list(config), **what}


def merged(measured: list[Rule], former: list[Rule]) -> list[Rule]:
    """The first rule that fits wins: what was measured now, what was measured before of other layers, predictions."""

    def key(r: Rule) -> tuple[Any, ...]:
        return r["layer"], tuple(r["precision"]), r["fold"]

    now = {key(r) for r in measured}
    before = [r for r in former if "us" in r and key(r) not in now]
    return [*measured, *before, *(r for r in former if "us" not in r)]


def write(rules: list[Rule], facts: dict[str, Any]) -> None:
    """One rule a line."""
    lines = ",\n".join(f"  {json.dumps(r)}" for r in rules)
    TABLE.write_text(f'{{\n "rules": [\n{lines}\n ],\n "measured_on": {json.dumps(facts)}\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the table that the op reads")
    parser.add_argument("--layers", type=lambda text: text.split(","), help="such as enc1,dec1; default: all")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16])
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["half", "tf32"])
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune_triton: a CUDA GPU must be there to time kernels on, torch finds none", file=sys.stderr)
        sys.exit(2)

    programs = torch.cuda.get_device_properties(0).multi_processor_count
    problems = [
        Problem(layer, batch, precision, fold)
        for precision in options.precisions
        for batch in options.batches
        for name, layer in layers(512).items()
        if not options.layers or name in options.layers
        for fold in ([True, False] if layer.decoder else [False])
    ]
    tried = [candidates(problem, programs) for problem in problems]
    measured = []
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        faults = list(pool.map(verify, problems, tried))
    for problem, configs, faulty in zip(problems, tried, faults, strict=True):
        right = [config for config, fault in zip(configs, faulty, strict=True) if not fault]
        for config, fault in zip(configs, faulty, strict=True):
            if fault:
                print(f"{problem}: {config} is left out: {fault}")
        if not right:
            continue
        *times, plain = microseconds(problem, right)
        best = min(range(len(right)), key=times.__getitem__)
        measured.append(rule(problem, right[best], times[best]))
        print(f"{problem!s:28} {times[best]:9.2f} us, plain conv {plain:9.2f} us, best of {len(right)}: {right[best]}")
    if options.write:
        import triton

        facts = {key: value for key, value in machine().items() if key in ("torch", "date", "commit", "dirty")}
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
        write(merged(measured, json.loads(TABLE.read_text())["rules"]), facts)
        print(f"wrote {TABLE.name}; {reference.__package__}.triton_impl reads it at import")


if __name__ == "__main__":
    main()
