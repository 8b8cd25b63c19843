# SPDX-License-Identifier: Apache-2.0
"""Partial-convolution U-Net (Liu et al., "Image Inpainting for Irregular Holes Using Partial Convolutions", ECCV 2018).

Table 2 of the paper, 8 levels, 512 x 512:

    layer      kernel  stride  channels  norm, activation        layer       kernel  input               channels
    PConv1     7       2       64        ReLU                    PConv9-12   3       up x2 + skip        512
    PConv2     5       2       128       BN, ReLU                PConv13     3       up x2 + PConv3      256
    PConv3     5       2       256       BN, ReLU                PConv14     3       up x2 + PConv2      128
    PConv4-8   3       2       512       BN, ReLU                PConv15     3       up x2 + PConv1      64
                                                                 PConv16     3       up x2 + image       3
    PConv9-15: BN, LeakyReLU(0.2); PConv16: neither.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_inpaint.nn import PartialConv2d, PartialUpConv2d
from fused_inpaint.ops import BatchNorm, Window, partial_conv2d, partial_window_chain

from .base import InpaintingModel, Normalization, Prediction, pad_as_hole

SLOPE = 0.2  # of the decoder's activation


class _Block(nn.Module):
    """Partial convolution, norm where there is one, activation; 0 in holes. With batch norm or none it is one op."""

    conv: Any  # PartialConv2d in the encoder, PartialUpConv2d in the decoder
    norm: nn.Module | None

    def __init__(self, conv: PartialConv2d | PartialUpConv2d, norm: nn.Module | None, activation: str) -> None:
        super().__init__()
        self.conv, self.norm, self.activation = conv, norm, activation

    def forward(self, x: Tensor | list[Tensor], window: Window, holes_zero: bool | list[bool]) -> Tensor:
        norm = self.norm
        if norm is not None and not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
            return norm(self.conv.block(x, window, holes_zero=holes_zero), window.mask)
        if isinstance(norm, nn.SyncBatchNorm) and norm.training:  # whose statistics are those of several processes
            y = norm(self.conv.block(x, window, holes_zero=holes_zero))
            y = F.relu(y) if self.activation == "relu" else F.leaky_relu(y, SLOPE)
            return torch.where(window.mask != 0, y, 0.0)
        batch_norm = None if norm is None else self._batch_norm(norm)
        epilogue = {"activation": self.activation, "slope": SLOPE, "batch_norm": batch_norm}
        return self.conv.block(x, window, holes_zero=holes_zero, **epilogue)

    def _batch_norm(self, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> BatchNorm:
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        momentum: float | Tensor = 0.0
        if norm.momentum is not None:
            momentum = norm.momentum
        elif norm.num_batches_tracked is not None:  # a cumulative average
            momentum = 1.0 / norm.num_batches_tracked.clamp(min=1).float()
        return BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.training, momentum, norm.eps)


def _blocks(modules: nn.ModuleList) -> list[_Block]:
    return cast("list[_Block]", list(modules))


class _BilinearUpConv2d(PartialUpConv2d):
    """With bilinear upsampling of the features; that of the masks stays nearest."""

    def block(self, x: Sequence[Tensor], window: Window, holes_zero: Any = (False, False), **options: Any) -> Tensor:
        low, skip = x
        low_mask, skip_mask = window.planes
        high = F.interpolate(low, scale_factor=2.0, mode="bilinear")  # which smears values into holes
        high_mask = low_mask.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return partial_conv2d(
            [high, skip],
            None,
            self.weight,
            self.bias,
            padding=self.kernel_size // 2,
            window=window._replace(planes=(high_mask, skip_mask)),
            holes_zero=[False, holes_zero[1]],
            **options,
        )[0]


class Masks(NamedTuple):
    """The windows of all layers: a function of the input mask alone, computed once."""

    encoder: tuple[Window, ...]
    decoder: tuple[Window, ...]
    out: Tensor  # (N or 1, 1, H, W) uint8, where the output is defined: the last layer's mask


class PConvUNet(nn.Module):
    """The bare network: `net(x, mask)` -> (out, out_mask), in its own range, sides a multiple of 2**levels.

    Args:
        levels: encoder (and decoder) layers; Table 2 has 8, the common PyTorch port 5 to 7.
        channels: of image and output. width: channels of the first layer, doubled up to 8 times.
        upsampling: "nearest" (the paper) or "bilinear" (of the features; masks stay nearest).
        encoder_norm, decoder_norm: number of channels -> the norm that follows a layer. One that is not batch norm is
            called as norm(features, mask) -> features, all 0 in holes, and has the layer's activation in it.

    x (N, C, H, W), mask (N or 1, 1 or C, H, W) with 1 = valid; out (N, C, H, W), out_mask (N, C, H, W) in mask's dtype.
    """

    def __init__(
        self,
        levels: int = 8,
        channels: int = 3,
        width: int = 64,
        upsampling: str = "nearest",
        encoder_norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        decoder_norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"pconv: levels must be 1 or more, got {levels}")
        if upsampling not in ("nearest", "bilinear"):
            raise ValueError(f"pconv: upsampling must be nearest or bilinear, got {upsampling}")
        self.levels, self.channels = levels, channels
        sizes = [channels, *(width * min(2**i, 8) for i in range(levels))]
        kernels = [(7, 5, 5)[i] if i < 3 else 3 for i in range(levels)]
        self.encoder = nn.ModuleList(
            _Block(
                PartialConv2d(sizes[i], sizes[i + 1], kernels[i], stride=2, padding=kernels[i] // 2, bias=False),
                norm=encoder_norm(sizes[i + 1]) if i else None,
                activation="relu",
            )
            for i in range(levels)
        )
        up_conv = PartialUpConv2d if upsampling == "nearest" else _BilinearUpConv2d
        self.decoder = nn.ModuleList(
            _Block(
                up_conv(sizes[i + 1], sizes[i], sizes[i], bias=i == 0),
                norm=decoder_norm(sizes[i]) if i else None,
                activation="leaky_relu" if i else "none",
            )
            for i in reversed(range(levels))
        )
        # Mask 0 is the input's, mask i that of encoder layer i, then the decoder's follow.
        self._steps = [block.conv.window_step(i) for i, block in enumerate(_blocks(self.encoder))]
        for i, block in enumerate(_blocks(self.decoder)):
            self._steps.append(block.conv.window_step(levels + i, levels - 1 - i))
        for module in self.modules():
            if isinstance(module, PartialConv2d | PartialUpConv2d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def masks(self, mask: Tensor) -> Masks:
        """The whole mask chain for an input mask; hand it to several calls of `forward` that share the mask."""
        windows = partial_window_chain(mask, self._steps)
        return Masks(tuple(windows[: self.levels]), tuple(windows[self.levels :]), windows[-1].mask)

    def forward(self, x: Tensor, mask: Tensor, masks: Masks | None = None) -> tuple[Tensor, Tensor]:
        side = 2**self.levels
        if x.size(2) % side or x.size(3) % side:
            raise ValueError(f"pconv: x must have sides that are multiples of {side}, got {tuple(x.shape)}")
        masks = self.masks(mask) if masks is None else masks
        features = [x]
        for block, window in zip(_blocks(self.encoder), masks.encoder, strict=True):
            features.append(block(features[-1], window, features[-1] is not x))
        h = features.pop()
        for block, window in zip(_blocks(self.decoder), masks.decoder, strict=True):
            skip = features.pop()
            h = block([h, skip], window, [True, skip is not x])
        out_mask = masks.out.to(mask.dtype).expand(h.size(0), self.channels, -1, -1)
        return h, out_mask

    def freeze_encoder_bn(self, frozen: bool = True) -> None:
        """Fine-tuning as in the paper: the encoder's batch norm uses its running statistics, and neither they nor its
        weights change any more; stays in force over later calls of `train()`. `frozen=False` takes it back."""
        self._encoder_bn_frozen = frozen
        for block in _blocks(self.encoder):
            if block.norm is not None:
                block.norm.requires_grad_(not frozen)
        self.train(self.training)

    _encoder_bn_frozen = False

    def train(self, mode: bool = True) -> "PConvUNet":
        super().train(mode)
        if self._encoder_bn_frozen:
            for block in _blocks(self.encoder):
                if block.norm is not None:
                    block.norm.eval()
        return self


class UNetModel(InpaintingModel):
    """A `PConvUNet` under the library's convention; the network sees images normalised by ImageNet's mean and
    deviation. An image of any size is padded with hole to a multiple of 2**levels and the result cropped back."""

    net: PConvUNet

    def __init__(self, net: PConvUNet, **config: Any) -> None:
        super().__init__(**config)
        self.net = net
        self.channels, self.multiple = net.channels, 2**net.levels
        self.normalization = Normalization(net.channels)

    def _predict(self, image: Tensor, mask: Tensor) -> Prediction:
        x, mask, window = pad_as_hole(self.normalization(image), mask, self.multiple)
        masks = self.net.masks(mask)
        out, _ = self.net(x, mask, masks)
        return Prediction(self._ranged(self.normalization.inverse(out[window])), masks.out[window])


class PConv(UNetModel):
    """`PConvUNet` under the library's convention; the network sees images normalised by ImageNet's mean and deviation.

    An image of any size is padded with hole to a multiple of 2**levels and the result cropped back: exact, since a
    partial convolution does not read holes. Predictions leave training unclamped, for the losses, and are clamped to
    [0, 1] in eval mode.

    >>> import torch, fused_inpaint
    >>> model = fused_inpaint.models.build_model("pconv", levels=4, width=8).eval()
    >>> out = model(torch.rand(1, 3, 97, 131), torch.ones(1, 1, 97, 131))
    >>> tuple(out.image.shape), tuple(out.mask.shape)
    ((1, 3, 97, 131), (1, 1, 97, 131))
    """

    key = "pconv"

    def __init__(self, levels: int = 8, channels: int = 3, width: int = 64, upsampling: str = "nearest") -> None:
        net = PConvUNet(levels, channels, width, upsampling)
        super().__init__(net, levels=levels, channels=channels, width=width, upsampling=upsampling)

    def freeze_encoder_bn(self, frozen: bool = True) -> None:
        """See `PConvUNet.freeze_encoder_bn`."""
        self.net.freeze_encoder_bn(frozen)
