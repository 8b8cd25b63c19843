# SPDX-License-Identifier: Apache-2.0
"""Partial convolution along one and three axes, NVIDIA's arguments; composed from what the two-dimensional one and
torch are fast at, with the same numerics."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import partial_conv2d
from ..ops.checks import autocasts, check_mask_type, error
from ..ops.masks import plane_of
from .partial_conv import PaddingMode, check_options, padded


class PartialConv1d(nn.Conv1d):
    """Partial convolution of sequences: `PartialConv2d` on maps of one row, with its kernels and numerics.

    `layer(x, mask=None)` returns y, or (y, new_mask) with `return_mask=True`. x (N, C, L), mask (N or 1, 1 or C, L),
    1 = valid and 0 = hole, y (N, O, L'), new_mask (N or 1, 1 or O, L').

    >>> import torch
    >>> from fused_inpaint import PartialConv1d
    >>> x = torch.tensor([1.0, torch.nan, 3.0, 4.0]).view(1, 1, 4)
    >>> layer = PartialConv1d(1, 1, 3, padding=1, bias=False)
    >>> _ = torch.nn.init.ones_(layer.weight)
    >>> layer(x, x.isfinite()).flatten().tolist()  # sums of what is valid, times 3 over their number
    [3.0, 6.0, 10.5, 10.5]
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: int | tuple[int] = 0,
        dilation: int | tuple[int] = 1,
        groups: int = 1,
        bias: bool = True,
        multi_channel: bool = False,
        return_mask: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        padding_mode: PaddingMode = "zeros",
    ) -> None:
        check_options("PartialConv1d", padding, multi_channel, return_mask, padding_mode)
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        super().__init__(*geometry, padding_mode, device=device, dtype=dtype)
        self.multi_channel, self.return_mask = multi_channel, return_mask

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        for name, t in (("x", x), ("mask", mask)):
            if t is not None and t.dim() != 3:
                raise error("partial_conv1d", name, "(N, C, L)", tuple(t.shape))
        assert not isinstance(self.padding, str)
        padding = self.padding[0]
        if self.padding_mode != "zeros":
            padding = 0
            x, mask = (t if t is None else padded(self, t) for t in (x, mask))  # type: ignore[assignment]
        y, new_mask = partial_conv2d(
            x.unsqueeze(2),
            None if mask is None else mask.unsqueeze(2),
            self.weight.unsqueeze(2),
            self.bias,
            (1, self.stride[0]),
            (0, padding),
            (1, self.dilation[0]),
            self.groups,
            multi_channel=self.multi_channel,
        )
        y, new_mask = y.squeeze(2), new_mask.squeeze(2)
        return (y, new_mask) if self.return_mask else y


class PartialConv3d(nn.Conv3d):
    """Partial convolution of volumes.

        y = (W . X~) * window / count + b   where count > 0, else exactly 0;   new mask = count > 0

    `layer(x, mask=None)` returns y, or (y, new_mask) with `return_mask=True`. x (N, C, D, H, W), mask (N or 1, 1 or C,
    D, H, W), 1 = valid and 0 = hole (None: all valid), y (N, O, D', H', W'), new_mask (N or 1, 1 or O, D', H', W').
    Holes are selected away, never multiplied; the mask is summed as one channel; the convolution is torch's.

    >>> import torch
    >>> from fused_inpaint import PartialConv3d
    >>> layer = PartialConv3d(2, 4, 3, padding=1, return_mask=True)
    >>> y, new_mask = layer(torch.rand(1, 2, 4, 6, 6), torch.ones(1, 1, 4, 6, 6))
    >>> tuple(y.shape), tuple(new_mask.shape)
    ((1, 4, 4, 6, 6), (1, 1, 4, 6, 6))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] = 0,
        dilation: int | tuple[int, int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        multi_channel: bool = False,
        return_mask: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        padding_mode: PaddingMode = "zeros",
    ) -> None:
        check_options("PartialConv3d", padding, multi_channel, return_mask, padding_mode)
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        super().__init__(*geometry, padding_mode, device=device, dtype=dtype)
        self.multi_channel, self.return_mask = multi_channel, return_mask

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        op = "partial_conv3d"
        if x.dim() != 5 or x.size(1) != self.in_channels:
            raise error(op, "x", f"(N, {self.in_channels}, D, H, W)", tuple(x.shape))
        if mask is None:
            plane = torch.ones((1, 1, *x.shape[2:]), dtype=torch.uint8, device=x.device)
        else:
            _check_mask(op, mask, x)
            plane = plane_of(op, mask)
            x = torch.where(plane.bool(), x, 0)
        if self.padding_mode != "zeros":
            x, plane = padded(self, x), padded(self, plane)
        count = self._count(plane)
        valid, window = count > 0, self.in_channels * self.weight[0, 0].numel()
        ratio = torch.where(valid, window / count.clamp(min=1), 0)
        y = self._raw(x)
        y = torch.where(valid, y * ratio.to(torch.promote_types(y.dtype, torch.float32)), 0)
        if self.bias is not None:
            y = torch.where(valid, y + self.bias.view(1, -1, 1, 1, 1).to(y.dtype), 0)
        y = y.to(torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype)
        if not self.return_mask:
            return y
        new_mask = valid.to(x.dtype if mask is None else mask.dtype)
        return y, new_mask.expand(-1, self.out_channels if self.multi_channel else 1, -1, -1, -1)

    def _raw(self, x: Tensor) -> Tensor:
        return F.conv3d(x, self.weight, None, self.stride, self._inner_padding(), self.dilation, self.groups)

    def _inner_padding(self) -> tuple[int, ...]:
        assert not isinstance(self.padding, str)
        return self.padding if self.padding_mode == "zeros" else (0, 0, 0)

    @torch.no_grad()
    def _count(self, plane: Tensor) -> Tensor:
        """(N or 1, 1, D', H', W') float32: valid values under each window. Whole numbers, exact up to 2^24."""
        share = self.in_channels // plane.size(1)
        ones = torch.ones(1, 1, *self.kernel_size, device=plane.device)
        with torch.autocast(plane.device.type, enabled=False):
            summed = plane.sum(1, keepdim=True, dtype=torch.float32) * share
            return F.conv3d(summed, ones, None, self.stride, self._inner_padding(), self.dilation).round()


def _check_mask(op: str, mask: Tensor, x: Tensor) -> None:
    n, c = x.shape[:2]
    if mask.dim() != 5 or mask.shape[2:] != x.shape[2:] or mask.size(0) not in (1, n) or mask.size(1) not in (1, c):
        expected = " or ".join(str((n, channels, *x.shape[2:])) for channels in (1, c))
        raise error(op, "mask", expected, tuple(mask.shape))
    check_mask_type(op, mask)
    if mask.device != x.device:
        raise error(op, "mask", f"on {x.device} as x", mask.device)
