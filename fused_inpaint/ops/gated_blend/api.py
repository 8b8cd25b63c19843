# SPDX-License-Identifier: Apache-2.0
"""The gated blend: the public function. A call goes on to torch.ops (csrc/gated_blend)."""

import functools

import torch
from torch import Tensor

from ... import _backends
from ..checks import check_feature_map, error
from . import reference
from .schema import ops


def gated_blend(x: Tensor, f: Tensor, gate: Tensor) -> Tensor:
    """Blend two maps by a gate that is normalised over each map (Zeng et al., "Aggregated Contextual Transformations
    for High-Resolution Image Inpainting", 2021; the gate is that of the published code).

        y = x * (1 - g) + f * g,  g = sigmoid(10 * (gate - mean) / (std + 1e-9) - 5)

    mean and the unbiased std run over H and W of one sample's channel. Where the gate is the same everywhere, std is 0
    and g is sigmoid(-5); no gradient passes std then, and the gate's is 10 * (p - mean of p) / 1e-9 with
    p = dy * (f - x) * g * (1 - g), as the formula says: large, and possibly infinite in float16. The std of a single
    pixel, NaN in the published code, is 0: g is sigmoid(-5) there, and the gate's gradient 0.

    Args:
        x, f, gate: (N, C, H, W) of one size, dtype and device, any memory format; channels_last is fastest. Under
            autocast dtypes may differ, and y has the widest.

    Returns:
        y (N, C, H, W) in x's dtype, channels_last.

    Dtypes: float32, float64 (CPU), float16, bfloat16. Statistics are shifted sums in float32, merged in float64, bit
    for bit the same whatever the number of threads.

    Raises:
        ValueError: an argument of wrong rank, size, dtype or device.
        NoBackendError: a backend asked for by name cannot run this call.

    >>> import torch
    >>> from fused_inpaint import ops
    >>> x, f, gate = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
    >>> [round(v, 3) for v in ops.gated_blend(x, f, gate).flatten().tolist()]
    [0.0, 0.888]
    """
    op = "gated_blend"
    for name, t in (("x", x), ("f", f), ("gate", gate)):
        check_feature_map(op, name, t, x)
        if t.shape != x.shape:
            raise error(op, name, tuple(x.shape), tuple(t.shape))
    dtype = functools.reduce(torch.promote_types, (x.dtype, f.dtype, gate.dtype))
    backend = _backends.choose(op, x.device.type, refusal=lambda name: _refusal(name, dtype))
    if backend == "reference" or x.numel() == 0:
        return reference.gated_blend(*(t.to(dtype) for t in (x, f, gate)))
    # A CPU computes float16 faster, and with one rounding less, in float32.
    inner = torch.float32 if backend == "cpu" and dtype == torch.float16 else dtype
    y, _ = getattr(ops, f"gated_blend{'_triton' if backend == 'triton' else ''}")(*(t.to(inner) for t in (x, f, gate)))
    return y.to(dtype)


def _refusal(name: str, dtype: torch.dtype) -> str:
    return "it computes in float32, not float64" if name == "triton" and dtype == torch.float64 else ""
