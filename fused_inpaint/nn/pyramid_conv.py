# SPDX-License-Identifier: Apache-2.0
"""A layer over ops.pyramid_conv2d: parameters and a call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import error
from ..ops.pyramid_conv.api import check_dilations, pyramid_conv2d


class PyramidConv2d(nn.Module):
    """Parallel dilated 3 x 3 convolutions of one input with ReLU, concatenated, as in AOT-GAN's and DeepGIN's blocks.

    `layer(x)`: x (N, C, H, W) to y (N, C, H, W), channels_last. `weight` is (C, C, 3, 3) and `bias` (C,): with D
    dilations, rows [i C / D, (i + 1) C / D) are branch i's, whose padding is its dilation.

    Args:
        channels: C, a multiple of the number of dilations.
        dilations: in pixels, at least 1; with "reflect" smaller than the map.
        padding_mode: "reflect" (AOT-GAN), "replicate" (DeepGIN) or "zeros".

    Equation, dtypes and errors: `fused_inpaint.ops.pyramid_conv2d`.

    >>> import torch
    >>> from fused_inpaint import PyramidConv2d
    >>> tuple(PyramidConv2d(8, (1, 2, 4, 8))(torch.rand(2, 8, 16, 16)).shape)
    (2, 8, 16, 16)
    """

    def __init__(
        self,
        channels: int,
        dilations: Sequence[int],
        padding_mode: str = "reflect",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layer = "PyramidConv2d"
        self.channels, self.dilations, self.padding_mode = channels, tuple(dilations), padding_mode
        check_dilations(layer, self.dilations)
        if padding_mode not in ("zeros", "reflect", "replicate"):
            raise error(layer, "padding_mode", "zeros, reflect or replicate", padding_mode)
        if channels < 1 or channels % len(self.dilations):
            raise error(layer, "channels", f"a positive multiple of {len(self.dilations)} dilations", channels)
        weight = torch.empty((channels, channels, 3, 3), device=device, dtype=dtype)
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of `nn.Conv2d`."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        bound = (9 * self.channels) ** -0.5
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return pyramid_conv2d(x, self.weight, self.bias, self.dilations, padding_mode=self.padding_mode)

    def extra_repr(self) -> str:
        return f"{self.channels}, dilations={self.dilations}, padding_mode={self.padding_mode!r}"
