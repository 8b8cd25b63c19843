# SPDX-License-Identifier: Apache-2.0
"""Operations of the ops as torch's `FlopCounterMode` counts them: two for each product, of a convolution as many as a
plain one of its size has, whatever a kernel saves of them; sums of masks, norms and activations none."""

import math
from typing import Any

from torch import Tensor

_PARAMETERS = ("need_weight", "need_bias")


def operations(*sizes: int) -> int:
    return 2 * math.prod(sizes)


def convolution(given: dict[str, Any], output: Any) -> int:
    y = output if isinstance(output, Tensor) else output[0]
    return operations(*y.shape, *given["weight"].shape[-3:])


def convolution_backward(given: dict[str, Any], output: Any) -> int:
    maps = any(needed for name, needed in given.items() if name.startswith("need_") and name not in _PARAMETERS)
    return (maps + given["need_weight"]) * operations(*given["grad"].shape, *given["weight"].shape[-3:])
