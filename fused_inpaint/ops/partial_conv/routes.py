# SPDX-License-Identifier: Apache-2.0
"""Which form of the decoder's convolution is fastest on the CPU, by size: a table made by benchmarks/tune_routes.py."""

import json
from pathlib import Path

_TABLE: dict[str, int] = json.loads(Path(__file__).with_name("routes.json").read_text())["fold_from_pixels"]


def fold(pixels: int, mode: str) -> bool:
    """Whether to fold the upsample into the kernel for a map of this many low-resolution pixels (batch included).

    The folded form does 4/9 of the work on the upsampled channels but streams 16/9 of their weights and folds them
    first, which small maps do not repay. `mode` is "plain" or "packed" (weights folded and laid out beforehand).
    """
    return pixels >= _TABLE[mode]
