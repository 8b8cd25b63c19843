# SPDX-License-Identifier: Apache-2.0
"""Times every kernel that can run a layer of the partial-convolution U-Net on this GPU, for gpu_routes.json.

    python benchmarks/tune_gpu_routes.py [--save] [--layers enc1,dec1] [--batches 1,16] [--seconds 60]

One line a layer, in microseconds, bfloat16, as CUDA graphs, with the masks summed beforehand: the plain convolution of
what is upsampled and concatenated already ("plain"), the decoder's with both steps ("equivalent"), the masks' sum
("window"), and ours by each kernel, folded and not. The table is edited by hand: a rule is worth it where a kernel
wins over a range of sizes. Masks are a quarter holes.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from report import RESULTS, file_stem, machine
from tune_triton import Problem, arguments
from workload import Layer, layers

from fused_inpaint import ops
from fused_inpaint.ops.partial_conv import plan, routes

TRITON_ROWS = 4096  # of one GEMM, above which the vendor's convolution is out of reach for Triton's


def microseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench_cudagraph

    return round(1e3 * do_bench_cudagraph(call, rep=15, return_mode="median"), 2)


def forms(layer: Layer, rows: int) -> list[tuple[str, bool | None]]:
    """(kernel, fold) of those that can run it and may be quick."""
    folds = (True, False) if layer.decoder else (None,)
    found: list[tuple[str, bool | None]] = [("vendor", fold) for fold in folds]
    thin = min(layer.up + layer.skip, layer.out) <= 4
    if thin:
        found.append(("direct", None))
    if thin or rows <= TRITON_ROWS:
        found += [("triton", fold) for fold in folds]
    return found


def measure(layer: Layer, batch: int) -> dict[str, float]:
    problem = Problem(layer, batch, "half", False)
    x, masks, weight, bias, _, (up, stride, padding, _, _) = arguments(problem, "cuda")
    size = weight.shape[2:]
    maps = [F.interpolate(s, scale_factor=f) if f == 2 else s for s, f in zip(x, up, strict=True)]
    whole = torch.cat(maps, 1).contiguous(memory_format=torch.channels_last)

    def window() -> ops.Window:
        return ops.partial_window(masks, [s.size(1) for s in x], size, stride, padding, upsample=up)

    def equivalent() -> torch.Tensor:
        both = torch.cat([F.interpolate(x[0], scale_factor=2), x[1]], 1)
        return F.conv2d(both, weight, None, stride, padding)

    times = {"plain": microseconds(lambda: F.conv2d(whole, weight, None, stride, padding)), "window": 0.0}
    if layer.decoder:
        times["equivalent"] = microseconds(equivalent)
    times["window"] = microseconds(window)
    summed, chosen = window(), routes.choose
    for kernel, fold in forms(layer, problem.sizes["rows"]):
        routes.choose = lambda op, call, selected, kernel=kernel: kernel
        plan.forget()
        try:
            times[kernel + {True: " folded", False: " unfolded", None: ""}[fold]] = microseconds(
                lambda fold=fold: ops.partial_conv2d(
                    *(x, masks, weight, bias.to(weight.dtype), stride, padding),
                    **{"upsample": up, "activation": "leaky_relu", "window": summed, "fold": fold, "holes_zero": True},
                )
            )
        finally:
            routes.choose = chosen
            plan.forget()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<gpu>-<date>-routes.json")
    parser.add_argument("--layers", type=lambda text: text.split(","), help="such as enc1,dec1; default: all")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16])
    parser.add_argument("--seconds", type=float, default=300.0, help="no layer is begun after these")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune_gpu_routes: a CUDA GPU must be there to time kernels on, torch finds none", file=sys.stderr)
        sys.exit(2)
    torch.backends.cudnn.benchmark = True
    until = time.monotonic() + options.seconds
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for batch in options.batches:
            for name, layer in layers(512).items():
                if (options.layers and name not in options.layers) or time.monotonic() > until:
                    continue
                found[f"{name} b{batch}"] = measure(layer, batch)
                times = "  ".join(f"{form} {time:.1f}" for form, time in found[f"{name} b{batch}"].items())
                print(f"{name} b{batch:<3} {times}", flush=True)
    if options.save:
        facts = machine()
        path = RESULTS / f"{file_stem(facts)}-routes.json"
        path.write_text(json.dumps({"machine": facts, "microseconds": found}, indent=1) + "\n")
        print(f"saved {path.name}")


if __name__ == "__main__":
    main()
