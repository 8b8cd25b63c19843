# SPDX-License-Identifier: Apache-2.0
"""L1 distance of Gram matrices: the public function. A call goes on to torch.ops (tiles.py, triton_impl.py)."""

import math

import torch
from torch import Tensor

from ... import _backends
from ..checks import check_feature_map, error
from . import reference
from .schema import ops


def gram_l1(a: Tensor, b: Tensor, *, over: str = "channels", normalise: float = 1.0) -> Tensor:
    """Sum of absolute differences of the Gram matrices of two feature maps: the core of style and correlation losses.

        y = sum |normalise * (A A^T - B B^T)|          for each sample

    over="channels": A is (C, H W) and the matrices are C x C, as in the style losses (Liu et al. 2018, eq. 4; Ma et al.
    2022, eq. 5; Li et al. 2020, eq. 5; Zeng et al. 2021).
    over="positions": A is (H W, C) and the matrices are H W x H W, as in the correlation loss (Ma et al. 2022, eq. 4).
    They are never in memory: each tile is summed, and its part of the gradient formed, as soon as it is there.

    How the sums of the samples become a loss is the caller's: y.mean() / C**2 is the mean over the matrices' entries of
    the published style losses (Liu, Li, Zeng), y.sum() that of Ma et al.

    Args:
        a, b: features (N, C, H, W) of equal size, in any memory format.
        over: "channels" or "positions".
        normalise: factor of the matrices' entries, more than 0: 1 / (C H W) in the style losses, 1 / C**2 in the
            correlation loss.

    Returns:
        y (N,) float32, or float64 of float64.

    Dtypes: float32, float64 (CPU), float16, bfloat16. Products, sums and the gradient's products are in float32,
    under autocast, too; tiles are joined in float64. The gradient of `|0|` is 0.

    Raises:
        ValueError: an argument of wrong rank, size, dtype or device.
        NoBackendError: a backend asked for by name cannot run this call.

    >>> import torch
    >>> from fused_inpaint import ops
    >>> a, b = torch.tensor([3.0, 1.0]).view(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    >>> ops.gram_l1(a, b).item(), ops.gram_l1(a, b, over="positions").item()  # 9 + 3 + 3 + 1, and 3 * 3 + 1 * 1
    (16.0, 10.0)
    """
    op = "gram_l1"
    check_feature_map(op, "a", a, a)
    check_feature_map(op, "b", b, a)
    if a.shape != b.shape:
        raise error(op, "b", f"{tuple(a.shape)} as a", tuple(b.shape))
    if over not in ("channels", "positions"):
        raise error(op, "over", "channels or positions", over)
    if not 0 < normalise < math.inf:
        raise error(op, "normalise", "more than 0 and finite", normalise)
    positions = over == "positions"
    dtype = torch.promote_types(a.dtype, b.dtype)  # they may differ under autocast
    a, b = a.to(dtype), b.to(dtype)
    # Half types on a GPU: only Triton multiplies them as they are.
    prefer = ("triton",) if positions and dtype in (torch.float16, torch.bfloat16) and a.device.type == "cuda" else ()
    backend = _backends.choose(op, a.device.type, prefer, lambda name: _refusal(name, positions, dtype))
    if backend == "reference" or a.numel() == 0:
        with torch.autocast(a.device.type, enabled=False):
            return reference.gram_l1(a, b, positions) * normalise
    if positions:
        needs = [torch.is_grad_enabled() and t.requires_grad for t in (a, b)]
        suffix = "_triton" if backend == "triton" else ""
        return getattr(ops, f"gram_l1_positions{suffix}")(a, b, *needs)[0] * normalise
    return ops.gram_l1_channels(a, b)[0] * normalise


def _refusal(name: str, positions: bool, dtype: torch.dtype) -> str:
    if name != "triton":
        return ""
    if not positions:
        return "it has a kernel over positions, not over channels"
    return "it computes in float32, not float64" if dtype == torch.float64 else ""
