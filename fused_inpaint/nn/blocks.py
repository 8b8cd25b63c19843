# SPDX-License-Identifier: Apache-2.0
"""Blocks of the published networks, made of the layers and the operators."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import check_feature_map
from ..ops.gated_blend import gated_blend
from .pyramid_conv import PyramidConv2d


class AOTBlock(nn.Module):
    """Aggregated contextual transformations (Zeng et al., "Aggregated Contextual Transformations for High-Resolution
    Image Inpainting", 2021): parallel dilated convolutions, fused and blended with the input by a gate.

        y = x * (1 - g) + fuse(pyramid(x)) * g,  g = sigmoid(10 * (gate(x) - mean) / (std + 1e-9) - 5)

    `layer(x)`: x (N, C, H, W), H and W larger than the largest rate, to y (N, C, H, W), channels_last. `pyramid` has
    C / len(rates) channels for each rate; `fuse` and `gate` are pyramids of one branch
    without activation; all padding is by reflection.

    Args:
        channels: C, a multiple of the number of rates.
        rates: the dilations.

    Equation, dtypes and errors: `fused_inpaint.ops.gated_blend`, `fused_inpaint.PyramidConv2d`.

    >>> import torch
    >>> from fused_inpaint import AOTBlock
    >>> tuple(AOTBlock(8)(torch.rand(2, 8, 16, 16)).shape)
    (2, 8, 16, 16)
    """

    def __init__(
        self,
        channels: int,
        rates: Sequence[int] = (1, 2, 4, 8),
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rates = tuple(rates)
        if not rates or channels < 1 or channels % len(rates):
            raise ValueError(
                f"AOTBlock: channels must be a positive multiple of len(rates) {len(rates)}, got {channels}"
            )
        factory: Any = {"device": device, "dtype": dtype}
        self.channels, self.rates = channels, rates
        self.pyramid = PyramidConv2d(channels, rates, "reflect", **factory)
        self.fuse = PyramidConv2d(channels, (1,), "reflect", "none", **factory)
        self.gate = PyramidConv2d(channels, (1,), "reflect", "none", **factory)

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map("AOTBlock", "x", x, x)
        # The layout of all that follows.
        x = x.contiguous(memory_format=torch.channels_last)
        return gated_blend(x, self.fuse(self.pyramid(x)), self.gate(x))


class SPDBlock(nn.Module):
    """DeepGIN's spatial pyramid dilation residual block (Li et al., "DeepGIN: Deep Generative Inpainting Network for
    Extreme Image Inpainting", 2020): `block(x)`, (N, C, H, W) to the same size.

        y = x + fuse(pyramid(x))

    `pyramid` is a `PyramidConv2d`, `fuse` one of a single branch without activation, both with replicate padding.

    Args:
        channels: C, a multiple of the number of dilations.
        dilations: the paper's are (2, 3, 4, 5) and (2, 3, 4, 5, 6, 8, 10, 1).

    >>> import torch
    >>> from fused_inpaint import SPDBlock
    >>> tuple(SPDBlock(8)(torch.rand(1, 8, 6, 6)).shape)
    (1, 8, 6, 6)
    """

    def __init__(
        self,
        channels: int,
        dilations: Sequence[int] = (2, 3, 4, 5),
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.pyramid = PyramidConv2d(channels, dilations, "replicate", device=device, dtype=dtype)
        self.fuse = PyramidConv2d(channels, (1,), "replicate", "none", device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fuse(self.pyramid(x))
        return y
