# SPDX-License-Identifier: Apache-2.0
"""Layers over ops.partial_conv2d: parameters and a call."""

import weakref
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import Window, WindowStep, partial_conv2d, partial_window
from ..ops.padding import pad
from ..ops.partial_conv.packing import PackedWeight, folds, pack

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
_MODES = get_args(PaddingMode)


class _Prepacked:
    """A layer's packed weights, for as long as its weight stays as it was."""

    def __init__(self) -> None:
        self.entries: dict[bool, PackedWeight | None] = {}
        self._stamp: tuple[Any, ...] = ()

    def get(
        self,
        weight: Tensor,
        sizes: list[torch.Size],
        upsample: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> PackedWeight | None:
        # The tensor itself, not its address, which another one may come to have.
        source, *state = self._stamp or (lambda: None,)
        if source() is not weight or state != [weight._version, weight.data_ptr(), weight.dtype]:
            self.entries = {}
            self._stamp = (weakref.ref(weight), weight._version, weight.data_ptr(), weight.dtype)
        # One layout serves all sizes; only whether to fold depends on them.
        fold = folds(sizes[0], upsample)
        if fold not in self.entries:
            self.entries[fold] = pack(weight, sizes, upsample, stride, padding, dilation, groups, fold)
        return self.entries[fold]

    def __getstate__(self) -> dict[str, Any]:
        return {"entries": {}, "_stamp": ()}


def prepack(module: nn.Module, enabled: bool = True) -> nn.Module:
    """Prepare a module's partial convolutions for inference on the CPU, and return it.

    From then on a layer in eval mode and without gradients folds its weight and lays it out for oneDNN at its first
    call, and keeps the result beside the weight (up to 16/9 of its memory for a folded one, and again for the unfolded
    form if maps are small; twice that for a half type that the processor computes in float32).
    Training is not affected, and weights that change (optimizer, `load_state_dict`, `.to`) are packed anew; only writes
    that torch does not count go unnoticed (through `weight.data`, or by FSDP), and need a new `prepack`.
    `enabled=False` takes it back. Compiled and exported graphs do not use packed weights.

    >>> import torch, fused_inpaint
    >>> layer = fused_inpaint.prepack(fused_inpaint.PartialConv2d(3, 8, 3).eval())
    >>> with torch.no_grad():
    ...     tuple(layer(torch.rand(1, 3, 8, 8)).shape)
    (1, 8, 6, 6)
    """
    for layer in module.modules():
        if isinstance(layer, PartialConv2d | PartialUpConv2d):
            layer._prepacked = _Prepacked() if enabled else None
    return module


def _to_channels_last(layer: "PartialConv2d | PartialUpConv2d") -> None:
    """The layout the kernels work in: values, shapes and checkpoints are not affected."""
    layer.weight = nn.Parameter(layer.weight.detach().contiguous(memory_format=torch.channels_last))


def _packed(layer: "PartialConv2d | PartialUpConv2d", sources: Sequence[Tensor], *geometry: Any) -> PackedWeight | None:
    if layer._prepacked is None or layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if layer.weight.is_inference():  # made under inference_mode: nothing would tell when it changes
        return None
    return layer._prepacked.get(layer.weight, [s.shape for s in sources], *geometry)


def check_options(layer: str, padding: Any, multi_channel: Any, return_mask: Any, padding_mode: str) -> None:
    least = padding if isinstance(padding, int) else -1 if isinstance(padding, str) else min(padding)
    if least < 0:
        axes = {"1": "one", "2": "two", "3": "three"}[layer[-2]]
        raise ValueError(f"{layer}: padding must be an int or {axes} of at least 0, got {padding}")
    for name, flag in (("multi_channel", multi_channel), ("return_mask", return_mask)):
        if not isinstance(flag, bool):
            raise ValueError(f"{layer}: {name} must be a bool, got {flag}")
    if padding_mode not in _MODES:
        raise ValueError(f"{layer}: padding_mode must be one of {', '.join(_MODES)}, got {padding_mode}")


def padded(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, t: Tensor) -> Tensor:
    """A map or a mask with the layer's padding around it, in its mode and the tensor's dtype."""
    inner = t if t.is_floating_point() else t.to(torch.float32)  # torch pads no integers so
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    add = pad if t.dim() == 4 else F.pad
    return add(inner, layer._reversed_padding_repeated_twice, mode).to(t.dtype)


class PartialConv2d(nn.Conv2d):
    """Partial convolution layer, NVIDIA's argument for argument; drop-in for it and for `nn.Conv2d`.

    `layer(x, mask=None)` returns y, or (y, new_mask) with `return_mask=True`. Masks are 1 = valid, 0 = hole; x
    (N, C, H, W), mask (N or 1, 1 or C, H, W), y (N, O, H', W'), new_mask (N or 1, 1 or O, H', W'): O channels with
    `multi_channel=True`. Without a mask everything is valid and only the zero padding counts as hole ("partial
    convolution as padding"). With `padding_mode` "circular", "reflect" or "replicate" the mask is padded as x is, so
    that the border repeats valid values as valid and holes as holes. The equation, dtypes and errors are those of
    `fused_inpaint.ops.partial_conv2d`.

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
        *,
        padding_mode: PaddingMode = "zeros",
    ) -> None:
        check_options("PartialConv2d", padding, multi_channel, return_mask, padding_mode)
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        super().__init__(*geometry, padding_mode, device=device, dtype=dtype)
        _to_channels_last(self)
        self.multi_channel = multi_channel
        self.return_mask = return_mask

    _prepacked: _Prepacked | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        y, new_mask = self._convolve(x, mask, multi_channel=self.multi_channel)
        return (y, new_mask) if self.return_mask else y

    def _convolve(self, x: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        assert not isinstance(self.padding, str)
        padding = self.padding
        if self.padding_mode != "zeros":
            padding = (0, 0)
            x, mask = (t if t is None else padded(self, t) for t in (x, mask))  # type: ignore[assignment]
        geometry = (self.stride, padding, self.dilation, self.groups)
        packed = None if self._prepacked is None else _packed(self, [x], [1], *geometry)
        return partial_conv2d(x, mask, self.weight, self.bias, *geometry, packed=packed, **options)

    def window(self, mask: Tensor) -> Window:
        """This layer's window counts and new mask for an input mask (see `fused_inpaint.ops.partial_window`)."""
        assert not isinstance(self.padding, str)
        padding = self.padding
        if self.padding_mode != "zeros":
            mask, padding = padded(self, mask), (0, 0)
        return partial_window(mask, self.in_channels, self.kernel_size, self.stride, padding, self.dilation)

    def window_step(self, *inputs: int) -> WindowStep:
        """The same as a step of `fused_inpaint.ops.partial_window_chain`, for the mask of this number."""
        assert not isinstance(self.padding, str)
        if self.padding_mode != "zeros":
            raise ValueError(f"PartialConv2d: padding_mode must be zeros in a chain of masks, got {self.padding_mode}")
        geometry = (list(self.kernel_size), list(self.stride), list(self.padding), list(self.dilation))
        return WindowStep(list(inputs), [self.in_channels], [1], *geometry)

    def block(self, x: Tensor, window: Window, **options: Any) -> Tensor:
        """The layer with options of `fused_inpaint.ops.partial_conv2d` (norm, activation, ...), for a mask whose window
        is known."""
        return self._convolve(x, None, window=window, **options)[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, multi_channel={self.multi_channel}, return_mask={self.return_mask}"


class PartialUpConv2d(nn.Module):
    """Decoder step of the partial-convolution U-Net: nearest x2 of (x, mask), concatenation with (skip, skip_mask),
    partial convolution with padding k // 2; nothing upsampled or concatenated is stored.

    `layer(x, mask, skip, skip_mask)` returns (y, new_mask). x (N, up_channels, H, W), skip (N, skip_channels, 2H, 2W),
    masks (N or 1, 1 or C, ...) with 1 = valid, 0 = hole; y (N, O, 2H, 2W), new_mask (N or 1, 1, 2H, 2W).
    The weight is (O, up_channels + skip_channels, k, k). See `fused_inpaint.ops.partial_upconv2d`.

    >>> import torch
    >>> from fused_inpaint import PartialUpConv2d
    >>> layer = PartialUpConv2d(4, 2, 5)
    >>> x, skip = torch.rand(1, 4, 4, 4), torch.rand(1, 2, 8, 8)
    >>> y, new_mask = layer(x, torch.ones(1, 1, 4, 4), skip, torch.ones(1, 1, 8, 8))
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
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"PartialUpConv2d: kernel_size must be an odd int, got {kernel_size}")
        self.up_channels, self.skip_channels = up_channels, skip_channels
        self.out_channels, self.kernel_size = out_channels, kernel_size
        size = (out_channels, up_channels + skip_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()
        _to_channels_last(self)

    def reset_parameters(self) -> None:
        """The initialisation of `nn.Conv2d`."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            bound = self.weight[0].numel() ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    _prepacked: _Prepacked | None = None

    def forward(self, x: Tensor, mask: Tensor, skip: Tensor, skip_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self._convolve([x, skip], [mask, skip_mask])

    def _convolve(self, x: Sequence[Tensor], mask: Sequence[Tensor] | None, **options: Any) -> tuple[Tensor, Tensor]:
        around = (self.kernel_size // 2, self.kernel_size // 2)
        packed = None if self._prepacked is None else _packed(self, x, [2, 1], (1, 1), around, (1, 1), 1)
        return partial_conv2d(
            x, mask, self.weight, self.bias, padding=around, upsample=(2, 1), packed=packed, **options
        )

    def window(self, mask: Tensor, skip_mask: Tensor) -> Window:
        """This layer's window counts and new mask for its input masks (see `fused_inpaint.ops.partial_window`)."""
        return partial_window(
            [mask, skip_mask],
            [self.up_channels, self.skip_channels],
            self.kernel_size,
            padding=self.kernel_size // 2,
            upsample=(2, 1),
        )

    def window_step(self, *inputs: int) -> WindowStep:
        """The same as a step of `fused_inpaint.ops.partial_window_chain`, for the masks of these numbers."""
        k = self.kernel_size
        geometry = ([k, k], [1, 1], [k // 2, k // 2], [1, 1])
        return WindowStep(list(inputs), [self.up_channels, self.skip_channels], [2, 1], *geometry)

    def block(self, x: Sequence[Tensor], window: Window, **options: Any) -> Tensor:
        """The layer for (x, skip) with options of `fused_inpaint.ops.partial_conv2d` (norm, activation, ...), for masks
        whose window is known."""
        return self._convolve(x, None, window=window, **options)[0]

    def extra_repr(self) -> str:
        return (
            f"{self.up_channels}, {self.skip_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"bias={self.bias is not None}"
        )
