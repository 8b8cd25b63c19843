# SPDX-License-Identifier: Apache-2.0
"""Parallel dilated convolutions: the public function. A call goes on to torch.ops (csrc/pyramid_conv)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _backends
from ..checks import LIMIT, autocasts, check_feature_map, convolution_dtype, error
from . import reference
from .schema import ops


def pyramid_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilations: Sequence[int],
    *,
    padding_mode: str = "reflect",
    activation: str = "relu",
) -> Tensor:
    """Parallel dilated 3 x 3 convolutions of one input, their outputs concatenated: the branches of AOT-GAN's block
    (Zeng et al., "Aggregated Contextual Transformations for High-Resolution Image Inpainting", 2021) and of DeepGIN's
    spatial pyramid dilation (Li et al., "DeepGIN: Deep Generative Inpainting Network for Extreme Image Inpainting",
    2020).

        y = concat over b of act(W_b * x + bias_b)        branch b: dilation d_b, padding d_b

    The padding is index arithmetic, no padded map is kept for the backward pass, and each branch writes, activated, to
    its place in y.

    Args:
        x: features (N, C, H, W), any memory format; channels_last is fastest.
        weight: (O, C, 3, 3); with D dilations, rows [i O / D, (i + 1) O / D) are branch i's.
        bias: (O,) or None.
        dilations: D integers of at least 1, in pixels.
        padding_mode: "reflect", for which all dilations are smaller than the map, "replicate" or "zeros".
        activation: "relu" or "none".

    Returns:
        y (N, O, H, W) in x's dtype, channels_last.

    Dtypes: float32, float64 (CPU), float16, bfloat16; half types accumulate in float32. On a CPU, in float32 and
    float64, a NaN or an infinity may also reach outputs up to two dilations from the windows that read it.

    Raises:
        ValueError: an argument of wrong rank, size, dtype or device; a dilation too large to reflect.
        NoBackendError: a backend asked for by name cannot run this call.

    >>> import torch
    >>> from fused_inpaint import ops
    >>> x, weight = torch.arange(4.0).view(1, 1, 1, 4), torch.zeros(2, 1, 3, 3)
    >>> weight[:, :, 1, 2] = 1  # the neighbour to the right
    >>> ops.pyramid_conv2d(x, weight, None, (1, 2), padding_mode="replicate")[0, :, 0].tolist()
    [[1.0, 2.0, 3.0, 3.0], [2.0, 3.0, 3.0, 3.0]]
    """
    op = "pyramid_conv2d"
    if padding_mode not in ("zeros", "reflect", "replicate"):
        raise error(op, "padding_mode", "zeros, reflect or replicate", padding_mode)
    if activation not in ("relu", "none"):
        raise error(op, "activation", "relu or none", activation)
    dilations = check_dilations(op, dilations)
    _check(op, x, weight, bias, dilations, padding_mode)
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
    backend = _backends.choose(op, x.device.type, refusal=lambda name: _refusal(name, dtype, len(dilations)))
    inner = convolution_dtype(dtype, backend == "cpu")
    x, weight = x.to(inner), weight.to(inner)
    if bias is not None:
        bias = bias.to(torch.float64 if inner == torch.float64 else torch.float32).contiguous()
    arguments = (x, weight, bias, dilations, padding_mode, activation)
    if backend == "reference" or x.size(0) == 0:
        with torch.autocast(x.device.type, enabled=False):
            return reference.pyramid_conv2d(*arguments).to(dtype)
    call = ops.pyramid_conv2d_triton if backend == "triton" else ops.pyramid_conv2d
    return call(*arguments).to(dtype)


def check_dilations(op: str, dilations: Sequence[int]) -> list[int]:
    found = list(dilations) if isinstance(dilations, Sequence) else []
    if not found or not all(isinstance(d, int) for d in found) or min(found) < 1:
        raise error(op, "dilations", "one int or more of at least 1, in a sequence", dilations)
    return found


def _refusal(name: str, dtype: torch.dtype, branches: int) -> str:
    if name == "triton" and dtype == torch.float64:
        return "it computes in float32, not float64"
    # One launch of its own passes has a pointer for each branch.
    return f"it takes at most 16 dilations, not {branches}" if name == "cuda" and branches > 16 else ""


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, dilations: list[int], padding_mode: str) -> None:
    check_feature_map(op, "x", x, x)
    n, channels, height, width = x.shape
    if 0 in (channels, height, width):
        raise error(op, "x", "(N, C, H, W) of at least one channel and pixel", tuple(x.shape))
    branches = len(dilations)
    if weight.dim() != 4 or weight.shape[1:] != (channels, 3, 3) or weight.size(0) < 1 or weight.size(0) % branches:
        shape = f"(O, {channels}, 3, 3) with O divisible by {branches} dilations"
        raise error(op, "weight", shape, tuple(weight.shape))
    if bias is not None and bias.shape != weight.shape[:1]:
        raise error(op, "bias", tuple(weight.shape[:1]), tuple(bias.shape))
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise error(op, name, f"on {x.device} as x", t.device)
        if t is not None and t.dtype != x.dtype and not autocasts(x):
            raise error(op, name, f"{x.dtype} as x", t.dtype)
    most = max(dilations)
    if padding_mode == "reflect" and most >= min(height, width):
        raise error(op, "dilations", f"smaller than the map ({height}, {width}) to reflect", most)
    if n * max(weight.size(0), channels) * (height + 2 * most) * (width + 2 * most) >= LIMIT:
        raise error(op, "x and output", "smaller than 2^31 elements with their padding", tuple(x.shape))
