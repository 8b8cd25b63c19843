# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one rival's training step, in a process of its own: `python memory_probe.py FORM SIDE BATCH`.

For "region ours" and "region dense", forward and backward of one region-wise layer, BATCH is the upsampling; for
"attention ours", "attention published", "gram_l1 ours", "gram_l1 eager" and a paper's network ("aot_gan ours") it is 1.

CPU tensors pass through no allocator that counts them, and counting tensors would miss what oneDNN takes for
itself. So this reads the kernel's high-water mark of resident memory. To make that mark follow the live tensors,
glibc is told to map every block above 64 KiB by itself and to give it back when it is freed. "peak" is the mark
above what the process held before the network existed (parameters, gradients, optimiser and activations, as
torch.cuda.max_memory_allocated would count them); "step" is the mark above what stays between steps. One step has
been taken before, so that optimiser state and library buffers are there. On a GPU torch's allocator is asked instead,
and the network is in bfloat16.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (high water) in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"memory_probe: /proc/self/status must have {field}")


def reset_high_water() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def figures(form: str, side: int, batch: int) -> dict[str, float]:
    """`main` in a process of its own; the form's name stands before each figure's."""
    command = [sys.executable, __file__, form, str(side), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    return {f"{form} {key}": value for key, value in json.loads(done.stdout).items()}


def main(form: str, side: int, batch: int, layout: str = "channels_last") -> dict[str, float]:
    import torch
    from harness import ON_GPU, THREADS
    from network_rivals import PAPERS, SMALL, SMALL_SIDE, NetworkStep
    from pairwise_rivals import PairwiseStep
    from region_rivals import RegionStep
    from rivals import TrainingStep, fresh_network, on_device

    def step_of(side: int, **size: int) -> TrainingStep | RegionStep | PairwiseStep | NetworkStep:
        key, _, kind = form.partition(" ")
        if key in PAPERS:
            return NetworkStep(key, kind, SMALL_SIDE, **SMALL[key]) if size else NetworkStep(key, kind, side)
        if form.startswith("region"):
            return RegionStep(form, side, upsample=batch)
        if form.startswith(("attention", "gram_l1")):
            return PairwiseStep(form, side)
        dtype = torch.bfloat16 if ON_GPU else torch.float32
        return TrainingStep(on_device(fresh_network(form, layout, **size), dtype), side, batch, layout, dtype)

    def held() -> float:
        return torch.cuda.memory_allocated() / 2**20 if ON_GPU else resident("VmRSS")

    torch.set_num_threads(THREADS)
    # Library code and thread stacks become resident on first use: a miniature step uses them before the count begins.
    step_of(64, levels=2, width=16)()
    gc.collect()
    before = held()
    step = step_of(side)
    step()
    step.forget()
    gc.collect()
    between = held()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_high_water()
    step()
    peak = torch.cuda.max_memory_allocated() / 2**20 if ON_GPU else resident("VmHWM")
    return {"peak": peak - before, "step": peak - between, "kept": between - before}


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])))
