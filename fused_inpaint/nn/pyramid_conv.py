# SPDX-License-Identifier: Apache-2.0
"""Layer over ops.pyramid_conv2d: parameters and a call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import error
from ..ops.pyramid_conv import pyramid_conv2d
from ..ops.pyramid_conv.api import check_dilations


class PyramidConv2d(nn.Module):
    """Parallel dilated 3 x 3 convolutions of one input, activated and concatenated: `layer(x)`, (N, C, H, W) to the
    same size. AOT-GAN's branches (Zeng et al. 2021; dilations 1, 2, 4, 8, reflect padding) and DeepGIN's (Li et al.
    2020; 2, 3, 4, 5 or 2, 3, 4, 5, 6, 8, 10, 1, replicate padding).

    Args:
        channels: C, of the input and of the output; a multiple of the number of dilations D.
        dilations: one for each branch, which has all C channels in and C / D out. `weight` is (C, C, 3, 3), the
            branches' rows one after the other, and `bias` (C,).
        padding_mode: "reflect", for maps larger than each dilation, "replicate" or "zeros".
        activation: "relu", or "none", for a single convolution with the same padding, say.

    Equation, dtypes and errors: `fused_inpaint.ops.pyramid_conv2d`.

    >>> import torch
    >>> from fused_inpaint import PyramidConv2d
    >>> tuple(PyramidConv2d(8, (1, 2, 4, 8))(torch.rand(1, 8, 16, 16)).shape)
    (1, 8, 16, 16)
    """

    def __init__(
        self,
        channels: int,
        dilations: Sequence[int],
        padding_mode: str = "reflect",
        activation: str = "relu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.dilations = tuple(check_dilations(name, dilations))
        if channels < 1 or channels % len(self.dilations):
            raise error(name, "channels", f"a multiple of {len(self.dilations)} dilations", channels)
        if padding_mode not in ("zeros", "reflect", "replicate"):
            raise error(name, "padding_mode", "zeros, reflect or replicate", padding_mode)
        if activation not in ("relu", "none"):
            raise error(name, "activation", "relu or none", activation)
        self.channels, self.padding_mode, self.activation = channels, padding_mode, activation
        weight = torch.empty((channels, channels, 3, 3), device=device, dtype=dtype)
        # The layout that the kernels read, which each call would otherwise bring it to.
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of `nn.Conv2d`, for each branch."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        bound = self.weight.shape[1:].numel() ** -0.5
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return pyramid_conv2d(
            x, self.weight, self.bias, self.dilations, padding_mode=self.padding_mode, activation=self.activation
        )

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, dilations={self.dilations}, padding_mode={self.padding_mode!r}, "
            f"activation={self.activation!r}"
        )
