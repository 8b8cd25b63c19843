# SPDX-License-Identifier: Apache-2.0
"""Layer over ops.region_conv2d: parameters and a call."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import region_conv2d
from ..ops.checks import pair


class RegionConv2d(nn.Module):
    """Region-wise convolution: one filter for the valid region, another for the hole (Ma et al., "Region-Wise
    Generative Adversarial Image Inpainting for Large Missing Areas", 2022).

    `select="output"` (eq. 1): `layer(x, mask)`, the filter is that of the output location's region; `weight` is
    (2 O, C, kh, kw) and `bias` (2, O), the hole's first.
    `select="input"` (the published code): `layer(existing, mask, missing)`, values of `existing` where the mask is 1
    and of `missing` where it is 0, each with its filter; `weight` is (O, in_channels + missing_channels, kh, kw), bias
    (O,). The mask (N or 1, 1, h, w), 1 = valid, 0 = hole, is brought to the size of the output or of the input by
    nearest neighbour.

    Args:
        in_channels: of x, or of `existing`. out_channels, kernel_size, stride, dilation, bias: as `nn.Conv2d`.
        padding: an int or two, of the upsampled map. padding_mode: "zeros", "reflect" or "replicate".
        missing_channels: of `missing`; None is as many as in_channels.
        upsample: 1, or 2 for nearest x2 in front (select="input").
        activation: "none" or "elu", in the same pass.

    Equation, dtypes and errors: `fused_inpaint.ops.region_conv2d`.

    >>> import torch
    >>> from fused_inpaint import RegionConv2d
    >>> mask = torch.ones(1, 1, 32, 32)
    >>> tuple(RegionConv2d(8, 4, 3, padding=1)(torch.rand(1, 8, 16, 16), mask).shape)
    (1, 4, 16, 16)
    >>> layer = RegionConv2d(8, 4, 3, padding=1, select="input", missing_channels=6, upsample=2, padding_mode="reflect")
    >>> tuple(layer(torch.rand(1, 8, 16, 16), mask, torch.rand(1, 6, 16, 16)).shape)
    (1, 4, 32, 32)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        select: str = "output",
        missing_channels: int | None = None,
        upsample: int = 1,
        padding_mode: str = "zeros",
        activation: str = "none",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if select not in ("output", "input"):
            raise ValueError(f"RegionConv2d: select must be output or input, got {select}")
        if select == "output" and missing_channels is not None:
            raise ValueError(
                f'RegionConv2d: missing_channels must be None with select="output", got {missing_channels}'
            )
        for name, value, least in (("kernel_size", kernel_size, 1), ("stride", stride, 1), ("dilation", dilation, 1)):
            pair("RegionConv2d", name, value, least)
        pair("RegionConv2d", "padding", padding, 0)
        if min(in_channels, out_channels) < 1:
            raise ValueError(f"RegionConv2d: channels must be at least 1, got {in_channels} and {out_channels}")
        self.in_channels, self.out_channels, self.select = in_channels, out_channels, select
        self.missing_channels = in_channels if missing_channels is None else missing_channels
        self.kernel_size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.upsample, self.padding_mode, self.activation = upsample, padding_mode, activation
        outputs: tuple[int, ...]
        if select == "output":
            # Of four dimensions, since Module.to(memory_format=channels_last) takes no others.
            size, outputs = (2 * out_channels, in_channels), (2, out_channels)
        else:
            size, outputs = (out_channels, in_channels + self.missing_channels), (out_channels,)
        self.weight = nn.Parameter(torch.empty((*size, *self.kernel_size), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of `nn.Conv2d`, for each filter."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            bound = self.weight.shape[1:].numel() ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, mask: Tensor, missing: Tensor | None = None) -> Tensor:
        if (missing is None) == (self.select == "input"):
            expected, got = ("given", "None") if missing is None else ("None", "a tensor")
            raise ValueError(f'RegionConv2d: missing must be {expected} with select="{self.select}", got {got}')
        return region_conv2d(
            x if missing is None else (x, missing),
            mask,
            self.weight.unflatten(0, (2, -1)) if missing is None else self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            select=self.select,
            upsample=self.upsample,
            padding_mode=self.padding_mode,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        channels = f"{self.in_channels}" + (f" + {self.missing_channels}" if self.select == "input" else "")
        return (
            f"{channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, select={self.select!r}, upsample={self.upsample}, "
            f"padding_mode={self.padding_mode!r}, activation={self.activation!r}"
        )
