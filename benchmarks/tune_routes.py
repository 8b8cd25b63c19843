# SPDX-License-Identifier: Apache-2.0
"""Measures from which map size on folding the upsample into the kernel pays, and rewrites the table the op reads.

    python benchmarks/tune_routes.py [--write]

Both forms of the decoder layer run interleaved at each size; the threshold is the smallest size from which the folded
form stays ahead. Channels hardly matter (both the work that folding saves and the weights it streams grow with their
product), so one width stands for all.
"""

import argparse
import json
from pathlib import Path

import torch
from harness import THREADS, Record, Rival, Row, measure
from report import machine

from fused_inpaint import ops
from fused_inpaint.ops.partial_conv import packing, routes

TABLE = Path(packing.__file__).with_name("routes.json")
CHANNELS = 256
SIDES = (1, 2, 4, 8, 16, 32, 64)


def forms(side: int, mode: str) -> dict[str, Rival]:
    """The decoder layer at `side` x `side` low-resolution pixels, dense and folded."""
    like = torch.channels_last
    x = torch.randn(1, CHANNELS, side, side).contiguous(memory_format=like)
    skip = torch.randn(1, CHANNELS, 2 * side, 2 * side).contiguous(memory_format=like)
    weight = torch.randn(CHANNELS, 2 * CHANNELS, 3, 3).contiguous(memory_format=like)
    masks = [torch.ones(1, 1, side, side), torch.ones(1, 1, 2 * side, 2 * side)]
    window = ops.partial_window(masks, [CHANNELS, CHANNELS], 3, padding=1, upsample=(2, 1))
    rivals = {}
    for name, fold in (("dense", False), ("folded", True)):
        packed = None
        if mode == "packed":
            sizes = [x.shape, skip.shape]
            packed = packing.pack(weight, sizes, [2, 1], (1, 1), (1, 1), (1, 1), 1, fold=fold)

        def call(fold: bool = fold, packed: packing.PackedWeight | None = packed) -> torch.Tensor:
            options = {"padding": 1, "upsample": (2, 1), "window": window, "fold": fold, "packed": packed}
            return ops.partial_conv2d([x, skip], None, weight, **options)[0]

        rivals[name] = Rival(call, lambda call=call: {"y": call()})
    return rivals


def threshold(ratios: dict[int, float]) -> int:
    """The smallest number of pixels from which every measured ratio folded / dense is below one."""
    best = max(ratios) * 4
    for pixels in sorted(ratios, reverse=True):
        if ratios[pixels] >= 1:
            break
        best = pixels
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the table that the op reads")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    table = {}
    for mode in ("plain", "packed"):
        ratios = {}
        for side in SIDES:
            record: Record = measure(Row(f"{mode} {side}x{side}", forms(side, mode), rounds=21))
            low, ratios[side * side], high = record.ratio("folded", "dense")
            print(f"{mode:7} {side:3} x {side:<3} folded / dense {ratios[side * side]:.2f} ({low:.2f} .. {high:.2f})")
        table[mode] = threshold(ratios)
    print(f"fold from {table} pixels; the table says {json.loads(TABLE.read_text())['fold_from_pixels']}")
    if arguments.write:
        facts = {key: value for key, value in machine().items() if key in ("cpu", "threads", "torch", "date", "commit")}
        TABLE.write_text(json.dumps({"fold_from_pixels": table, "measured_on": facts}, indent=1) + "\n")
        print(f"wrote {TABLE.name}; {routes.__name__} reads it at import")


if __name__ == "__main__":
    main()
