# SPDX-License-Identifier: Apache-2.0
"""Which form of the decoder's convolution is fastest on the CPU, by size: a table made by benchmarks/tune_routes.py."""

import json
from pathlib import Path

_NEVER = 2**62
_TABLE: dict[str, int] = json.loads(Path(__file__).with_name("routes.json").read_text())["fold_from_pixels"]


def fold_from(mode: str, forced: bool | None = None) -> int:
    """From how many low-resolution pixels on (batch included) the upsample is folded into the kernel.

    The folded form does 4/9 of the work on the upsampled channels but streams 16/9 of their weights and folds them
    first, which small maps do not repay. `mode` is "plain" or "packed" (weights folded and laid out beforehand);
    `forced` overrules the table.
    """
    if forced is None:
        return _TABLE[mode]
    return 0 if forced else _NEVER
