# SPDX-License-Identifier: Apache-2.0
"""Layers over ops.partial_conv2d: parameters and a call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import BatchNorm, Window, partial_conv2d, partial_upconv2d, partial_window


class PartialConv2d(nn.Conv2d):
    """Partial convolution layer, NVIDIA's argument for argument; drop-in for it and for `nn.Conv2d`.

    `layer(x, mask=None)` returns y, or (y, new_mask) with `return_mask=True`. Masks are 1 = valid, 0 = hole; x
    (N, C, H, W), mask (N or 1, 1 or C, H, W), y (N, O, H', W'), new_mask (N or 1, 1 or O, H', W'): O channels with
    `multi_channel=True`. Without a mask everything is valid and only the zero padding counts as hole ("partial
    convolution as padding"). The equation, dtypes and errors are those of `fused_inpaint.ops.partial_conv2d`.

    >>> import torch
    >>> from fused_inpaint import PartialConv2d
    >>> layer = PartialConv2d(3, 8, 3, padding=1, return_mask=True)
    >>> y, new_mask = layer(torch.rand(2, 3, 16, 16), torch.ones(2, 1, 16, 16))
    >>> tuple(y.shape), tuple(new_mask.shape)
    ((2, 8, 16, 16), (2, 1, 16, 16))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        multi_channel: bool = False,
        return_mask: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in [("padding", padding)]:
            low = value if isinstance(value, int) else min(value) if not isinstance(value, str) else -1
            if low < 0:
                raise ValueError(f"PartialConv2d: {name} must be an int or two of at least 0, got {value}")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.multi_channel = multi_channel
        self.return_mask = return_mask

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        assert not isinstance(self.padding, str)
        y, new_mask = partial_conv2d(
            x,
            mask,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            multi_channel=self.multi_channel,
        )
        return (y, new_mask) if self.return_mask else y

    def window(self, mask: Tensor) -> Window:
        """This layer's window counts and new mask for an input mask (see `fused_inpaint.ops.partial_window`)."""
        assert not isinstance(self.padding, str)
        return partial_window(mask, self.in_channels, self.kernel_size, self.stride, self.padding, self.dilation)

    def block(self, x: Tensor, window: Window, activation: str, slope: float, norm: BatchNorm | None) -> Tensor:
        """Convolution, norm and activation in one call, for masks whose window is known."""
        assert not isinstance(self.padding, str)
        return partial_conv2d(
            x,
            None,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            activation=activation,
            slope=slope,
            batch_norm=norm,
            window=window,
        )[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, multi_channel={self.multi_channel}, return_mask={self.return_mask}"


class PartialUpConv2d(nn.Module):
    """Decoder step of the partial-convolution U-Net: nearest x2 of (x, mask), concatenation with (skip, skip_mask), partial
    convolution with padding k // 2; nothing upsampled or concatenated is stored.

    `layer(x, mask, skip, skip_mask)` returns (y, new_mask). x (N, up_channels, H, W), skip (N, skip_channels, 2H, 2W),
    masks (N or 1, 1 or C, ...) with 1 = valid, 0 = hole; y (N, O, 2H, 2W), new_mask (N or 1, 1, 2H, 2W).
    The weight is (O, up_channels + skip_channels, k, k). See `fused_inpaint.ops.partial_upconv2d`.

    >>> import torch
    >>> from fused_inpaint import PartialUpConv2d
    >>> layer = PartialUpConv2d(4, 2, 5)
    >>> y, new_mask = layer(torch.rand(1, 4, 4, 4), torch.ones(1, 1, 4, 4), torch.rand(1, 2, 8, 8), torch.ones(1, 1, 8, 8))
    >>> tuple(y.shape)
    (1, 5, 8, 8)
    """

    def __init__(
        self,
        up_channels: int,
        skip_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"PartialUpConv2d: kernel_size must be odd, got {kernel_size}")
        self.up_channels, self.skip_channels = up_channels, skip_channels
        self.out_channels, self.kernel_size = out_channels, kernel_size
        size = (out_channels, up_channels + skip_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of `nn.Conv2d`."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            bound = self.weight[0].numel() ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, mask: Tensor, skip: Tensor, skip_mask: Tensor) -> tuple[Tensor, Tensor]:
        return partial_upconv2d(x, mask, skip, skip_mask, self.weight, self.bias)

    def window(self, mask: Tensor, skip_mask: Tensor) -> Window:
        """This layer's window counts and new mask for its input masks (see `fused_inpaint.ops.partial_window`)."""
        return partial_window(
            [mask, skip_mask],
            [self.up_channels, self.skip_channels],
            self.kernel_size,
            padding=self.kernel_size // 2,
            upsample=(2, 1),
        )

    def block(
        self, x: Sequence[Tensor], window: Window, activation: str, slope: float, norm: BatchNorm | None
    ) -> Tensor:
        """Convolution, norm and activation of (x, skip) in one call, for masks whose window is known."""
        return partial_conv2d(
            x,
            None,
            self.weight,
            self.bias,
            padding=self.kernel_size // 2,
            upsample=(2, 1),
            activation=activation,
            slope=slope,
            batch_norm=norm,
            window=window,
        )[0]

    def extra_repr(self) -> str:
        return (
            f"{self.up_channels}, {self.skip_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"bias={self.bias is not None}"
        )
