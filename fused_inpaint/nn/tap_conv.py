# SPDX-License-Identifier: Apache-2.0
"""Layer over ops.tap_conv2d: parameters and a call."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.tap_conv import reference, tap_conv2d
from ..ops.tap_conv.api import ACTIVATIONS, PADDINGS, UPSAMPLINGS, runs_at_input


class TapConv2d(nn.Conv2d):
    """Upsampling by 2, padding that keeps the size, convolution and activation: an `nn.Conv2d` of stride 1 with what is
    usually around it.

    `layer(x)`: x (N, C, H, W), or several maps that stand for their concatenation, to (N, out_channels, H', W'). For
    inference on a CPU it is computed at the resolution of x, see `fused_inpaint.ops.tap_conv2d`; training takes the
    steps one after the other.

    Args:
        in_channels, out_channels, bias: as `nn.Conv2d`. kernel_size: odd.
        upsampling: "none", "nearest" or "bilinear" (aligned corners).
        padding_mode: "zeros", "reflect" or "replicate".
        activation: "none", "relu", "leaky_relu" (of `slope`) or "elu".

    >>> import torch
    >>> from fused_inpaint import TapConv2d
    >>> tuple(TapConv2d(8, 4, 3, upsampling="bilinear")(torch.rand(1, 8, 16, 16)).shape)
    (1, 4, 32, 32)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        upsampling: str = "none",
        padding_mode: str = "zeros",
        activation: str = "none",
        slope: float = 0.2,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value, known in (
            ("upsampling", upsampling, UPSAMPLINGS),
            ("padding_mode", padding_mode, PADDINGS),
            ("activation", activation, ACTIVATIONS),
        ):
            if value not in known:
                raise ValueError(f"TapConv2d: {name} must be {', '.join(known[:-1])} or {known[-1]}, got {value}")
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"TapConv2d: kernel_size must be an odd int, got {kernel_size}")
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias, device=device, dtype=dtype
        )
        # The layout of the features, which the weight would otherwise be brought to by every call.
        self.weight = nn.Parameter(self.weight.detach().contiguous(memory_format=torch.channels_last))
        self.padding_mode = cast(Any, padding_mode)
        self.upsampling = upsampling
        self.activation, self.slope = activation, slope

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        maps = [x] if isinstance(x, Tensor) else x
        if not self.runs_at_input(maps):
            steps = (self.upsampling, self.padding_mode, self.activation, self.slope)
            return reference.tap_conv2d(maps, self.weight, self.bias, *steps)
        return tap_conv2d(
            maps,
            self.weight,
            self.bias,
            upsampling=self.upsampling,
            padding_mode=self.padding_mode,
            activation=self.activation,
            slope=self.slope,
        )

    def runs_at_input(self, maps: list[Tensor]) -> bool:
        """Whether a call with these maps is computed at their resolution."""
        return runs_at_input(maps, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size[0]}, "
            f"upsampling={self.upsampling!r}, padding_mode={self.padding_mode!r}, activation={self.activation!r}"
        )
