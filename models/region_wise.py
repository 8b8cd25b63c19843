# SPDX-License-Identifier: Apache-2.0
"""Region-wise inpainting (Ma et al., "Region-Wise Generative Adversarial Image Inpainting for Large Missing Areas",
IEEE Transactions on Cybernetics 2022), with the layers of the authors' code.

Two encoder-decoders in a row; every convolution is reflect-padded and followed by ELU, the last one too, then clipped
to [-1, 1]. 256 x 256:

    layer     kernel  stride  dilation     input            channels
    conv1     5       1       1            image, mask      32
    conv2-3   3       2, 1    1                             64
    conv4-6   3       2, 1    1                             128
    conv7-10  3       1       2, 4, 8, 16                   128
    conv11    3       1       1            conv10, conv6    128
    conv12    3       1       1            conv11, conv5    128

              semantic inferring (first)                    global perceiving (second)
    layer     region-wise, of input      channels           of input               channels
    conv13    conv12, conv4, then up x2  128                up x2 (conv12, conv4)  64
    conv14    conv13, conv3              128                conv13, conv3          64
    conv15    conv14, conv2, then up x2  128                up x2 (conv14, conv2)  32
    conv16    (plain) conv15             32                 conv15, conv1          16
    conv17    (plain)                    16                                        3
    conv18    (plain)                    3
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_inpaint.nn import RegionConv2d, TapConv2d
from fused_inpaint.ops import pyramid_conv2d
from fused_inpaint.ops.padding import pad

from .base import Discriminator, InpaintingModel, pad_as_hole, shared_hole
from .spectral import SpectralConv2d

_LEAST = 68  # a quarter of a side must exceed the padding of conv10, 16


class _Conv(nn.Conv2d):
    """Reflect-padded convolution and ELU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, dilation=dilation)
        # The layout of the features, which the weight would otherwise be brought to by every call.
        self.weight = nn.Parameter(self.weight.detach().contiguous(memory_format=torch.channels_last))
        self.around = dilation * (kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (3, 3) and self.stride == (1, 1) and x.device.type == "cpu":
            # A pyramid of one branch, which there takes fewer products and keeps no padded copy.
            dilation = self.dilation[:1]
            y = pyramid_conv2d(x, self.weight, self.bias, dilation, padding_mode="reflect", activation="none")
        else:
            y = super().forward(pad(x, [self.around] * 4, "reflect"))
        return F.elu(y, inplace=True)


class _UpConv(TapConv2d):
    """Nearest x2, then 3 x 3 as `_Conv`; in training at the low resolution with 4/9 of the products."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, upsampling="nearest", padding_mode="reflect", activation="elu")

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        maps = [x] if isinstance(x, Tensor) else x
        if self.runs_at_input(maps):
            return super().forward(maps)
        x = torch.cat(maps, 1)
        # Of the 3 taps of a row two fall on one low-resolution pixel: sums of neighbouring taps are the 4 taps of a
        # transposed convolution of stride 2. What reflects by one after the upsampling replicates before it.
        taps = self.weight.flip(2, 3).transpose(0, 1)  # (C, O, 3, 3)
        # Not divisor_override=1, which torch's ONNX exporter drops without a word.
        folded = 4 * F.avg_pool2d(taps, 2, stride=1, padding=1)  # (C, O, 4, 4)
        y = F.conv_transpose2d(pad(x, [1] * 4, "replicate"), folded, self.bias, stride=2, padding=3)
        return F.elu(y, inplace=True)


def _thin(inputs: int, outputs: int) -> TapConv2d:
    """As `_Conv`, of few channels at the full resolution; takes a concatenation in its parts."""
    return TapConv2d(inputs, outputs, 3, padding_mode="reflect", activation="elu")


def _resize(mask: Tensor, like: Tensor) -> Tensor:
    """The mask at the size of `like`, by the nearest neighbour of TensorFlow 1 with aligned corners."""
    rows, columns = (
        # In float32, as published: in exact arithmetic other pixels are nearest at some odd sizes.
        (torch.arange(to, device=mask.device, dtype=torch.float32) * ((size - 1) / (to - 1)) + 0.5).long()
        for size, to in zip(mask.shape[2:], like.shape[2:], strict=True)
    )
    return mask[:, :, rows[:, None], columns]


class _Network(nn.Module):
    """Layers 1 to 12, which are alike in both networks; their weights are not shared."""

    def __init__(self, width: int) -> None:
        super().__init__()
        one, two, four = width, 2 * width, 4 * width
        self.conv1 = _Conv(4, one, 5)
        self.conv2 = _Conv(one, two, stride=2)
        self.conv3 = _Conv(two, two)
        self.conv4 = _Conv(two, four, stride=2)
        self.conv5 = _Conv(four, four)
        self.conv6 = _Conv(four, four)
        self.conv7 = _Conv(four, four, dilation=2)
        self.conv8 = _Conv(four, four, dilation=4)
        self.conv9 = _Conv(four, four, dilation=8)
        self.conv10 = _Conv(four, four, dilation=16)
        self.conv11 = _Conv(2 * four, four)
        self.conv12 = _Conv(2 * four, four)

    def encode(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """(x1, x2, x3, x4, x12)"""
        if x.size(2) % 4 or x.size(3) % 4 or min(x.shape[2:]) < _LEAST:
            raise ValueError(
                f"region_wise: x must have sides that are multiples of 4 and at least {_LEAST}, got {tuple(x.shape)}"
            )
        x1 = self.conv1(_with_mask(x, mask))
        x2 = self.conv2(x1)
        x3 = self.conv3(x2)
        x4 = self.conv4(x3)
        x5 = self.conv5(x4)
        x6 = self.conv6(x5)
        x10 = self.conv10(self.conv9(self.conv8(self.conv7(x6))))
        x11 = self.conv11(torch.cat([x10, x6], 1))
        return x1, x2, x3, x4, self.conv12(torch.cat([x11, x5], 1))


def _with_mask(x: Tensor, mask: Tensor) -> Tensor:
    """(N, 4, H, W), channels last."""
    plane = mask.to(x.dtype).expand(x.size(0), -1, -1, -1)
    return torch.cat([x, plane], 1).contiguous(memory_format=torch.channels_last)


class SemanticInferring(_Network):
    """The first network: `net(x, mask)`, x = image * mask (N, 3, H, W) in [-1, 1], mask (N or 1, 1, H, W) with
    1 = valid, to (N, 3, H, W) in [-1, 1]. Sides are multiples of 4, at least 68."""

    def __init__(self, width: int = 32, region: str = "input") -> None:
        super().__init__(width)
        if region not in ("input", "output", "none"):
            raise ValueError(f"region_wise: region must be input, output or none, got {region}")
        self.region = region
        two, four = 2 * width, 4 * width
        self.conv13 = self._layer(four, four, upsample=2)
        self.conv14 = self._layer(four, two, upsample=1)
        self.conv15 = self._layer(four, two, upsample=2)
        self.conv16 = _thin(four, width)
        self.conv17 = _Conv(width, width // 2)
        self.conv18 = _thin(width // 2, 3)

    def _layer(self, channels: int, skip: int, upsample: int) -> nn.Module:
        both = channels + skip
        if self.region == "none":
            return _UpConv(both, channels) if upsample == 2 else _Conv(both, channels)
        if self.region == "output":
            return RegionConv2d(both, channels, 3, padding=1, padding_mode="reflect", activation="elu")
        return RegionConv2d(
            both,
            channels,
            3,
            padding=1,
            select="input",
            missing_channels=channels,
            upsample=upsample,
            padding_mode="reflect",
            activation="elu",
        )

    def _decode(self, layer: Any, x: Tensor, skip: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Layer 13, 14 or 15 of x and its skip; the mask at the size of the layer's input, and of its output."""
        both = torch.cat([x, skip], 1)
        arguments: tuple[Tensor, ...] = (both,)
        if self.region == "input":
            arguments = (both, before, x)
        elif self.region == "output":
            arguments = (F.interpolate(both, after.shape[2:]), after)
        y: Tensor = layer(*arguments)
        return y

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        _, x2, x3, x4, h = self.encode(x, mask)
        quarter, half = (_resize(mask, like) for like in (x4, x2))
        h = self._decode(self.conv13, h, x4, quarter, half)
        h = self._decode(self.conv14, h, x3, half, half)
        h = self._decode(self.conv15, h, x2, half, mask)
        return self.conv18(self.conv17(self.conv16(h))).clamp(-1, 1)


class GlobalPerceiving(_Network):
    """The second network: `net(x, mask)` as the first one's, x the image whose holes the first one filled."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(width)
        one, two, four = width, 2 * width, 4 * width
        self.conv13 = _UpConv(2 * four, two)
        self.conv14 = _Conv(2 * two, two)
        self.conv15 = _UpConv(2 * two, one)
        self.conv16 = _thin(2 * one, one // 2)
        self.conv17 = _thin(one // 2, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x1, x2, x3, x4, h = self.encode(x, mask)
        h = self.conv13([h, x4])
        h = self.conv14(torch.cat([h, x3], 1))
        h = self.conv15([h, x2])
        return self.conv17(self.conv16([h, x1])).clamp(-1, 1)


class RegionWiseNet(nn.Module):
    """The bare network: `net(x, mask)` -> (first, second), in its own range.

    x = image * mask (N, 3, H, W) in [-1, 1], mask (N or 1, 1, H, W) with 1 = valid, sides multiples of 4 and at least
    68; both networks' outputs (N, 3, H, W) in [-1, 1]. The second network sees the first's output in the holes only.
    """

    def __init__(self, width: int = 32, region: str = "input") -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"region_wise: width must be even and at least 2, got {width}")
        self.inferring = SemanticInferring(width, region)
        self.perceiving = GlobalPerceiving(width)
        for name, parameter in self.named_parameters():
            # Glorot's, TensorFlow's default.
            (nn.init.xavier_uniform_ if name.endswith("weight") else nn.init.zeros_)(parameter)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        first = self.inferring(x, mask)
        return first, self.perceiving(torch.where(mask != 0, x, first), mask)


class RegionWisePrediction(NamedTuple):
    """What `RegionWise` returns; each (N, 3, H, W) in the [0, 1] range."""

    first: Tensor  # of the semantic inferring network
    image: Tensor  # of the global perceiving network


class RegionWise(InpaintingModel):
    """Region-wise inpainting.

    Args:
        width: channels of the first layer, even; 32 in the paper.
        region: how layers 13 to 15 of the first network treat the regions. "input": each has its filter by the input
            pixel's region (the authors' code). "output": by the output pixel's (eq. 1 of the paper). "none": they are
            standard convolutions ("standard conv" of Table III).

    `model(image, mask)` with image (N, 3, H, W) in [0, 1] and mask (N or 1, 1 or 3, H, W), 1 = valid, of any size:
    sides that the network does not take are padded with hole. A pixel with a hole in any channel is a hole. As the
    network clips its outputs, predictions are in [0, 1] in training mode too.

    Raises:
        ValueError: arguments of wrong value, or images and masks of wrong rank or size.

    >>> import torch, fused_inpaint
    >>> model = fused_inpaint.models.build_model("region_wise", width=4).eval()
    >>> out = model(torch.rand(1, 3, 97, 131), torch.ones(1, 1, 97, 131))
    >>> tuple(out.first.shape), tuple(out.image.shape)
    ((1, 3, 97, 131), (1, 3, 97, 131))
    """

    key = "region_wise"
    channels = 3
    multiple = 4

    def __init__(self, width: int = 32, region: str = "input") -> None:
        super().__init__(width=width, region=region)
        self.net: RegionWiseNet = RegionWiseNet(width, region)

    def _predict(self, image: Tensor, mask: Tensor) -> RegionWisePrediction:
        hole = shared_hole(mask)
        x, valid, window = pad_as_hole((2 * image - 1).masked_fill(hole, 0), ~hole, self.multiple, _LEAST)
        first, second = ((y[window] + 1) / 2 for y in self.net(x, valid))
        return RegionWisePrediction(self._ranged(first), self._ranged(second))


class _HalvingConv(SpectralConv2d):
    """5 x 5, stride 2, TensorFlow's SAME padding."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 5, stride=2, always=True)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return super().forward(F.pad(x, (1 + width % 2, 2, 1 + height % 2, 2)))


class RegionDiscriminator(nn.Module):
    """The bare discriminator: `net(x, mask, activation="leaky_relu")`, six 5 x 5 convolutions of stride 2 under
    spectral norm, each followed by LeakyReLU(0.2); `activation=None` leaves out the last one.

    x = image * (1 - mask) (N, 3, H, W) in [-1, 1], mask (N or 1, 1, H, W) with 1 = valid, to (N, 4 width, H / 64,
    W / 64), sides rounded up.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = (4, width, 2 * width, *[4 * width] * 4)
        self.convs = nn.ModuleList(_HalvingConv(*pair) for pair in pairwise(sizes))

    def forward(self, x: Tensor, mask: Tensor, activation: str | None = "leaky_relu") -> Tensor:
        if activation not in ("leaky_relu", None):
            raise ValueError(f"region_wise: activation must be leaky_relu or None, got {activation}")
        x = _with_mask(x, mask)
        for i, conv in enumerate(self.convs, 1):
            x = conv(x)
            if activation or i < len(self.convs):
                x = F.leaky_relu(x, 0.2, inplace=True)
        return x


class RegionWiseDiscriminator(Discriminator):
    """The region-wise discriminator: sees the filled holes and the mask, nothing of the known pixels.

    Args:
        width: channels of the first layer; 64 in the authors' code.

    `discriminator(image, mask)` with image (N, 3, H, W) in [0, 1] and mask (N or 1, 1 or 3, H, W), 1 = valid, to scores
    (N, 4 width, H', W'), H' = ceil(H / 64): high for what looks real. `given` is not read. As in the published graph
    each call takes a step of the spectral norm's power method, in eval mode too.

    >>> import torch, fused_inpaint
    >>> net = fused_inpaint.models.build_discriminator("region_wise", width=4)
    >>> tuple(net(torch.rand(2, 3, 96, 64), torch.zeros(2, 1, 96, 64)).shape)
    (2, 16, 2, 1)
    """

    key = "region_wise"
    channels = 3

    def __init__(self, width: int = 64) -> None:
        super().__init__(width=width)
        self.net: RegionDiscriminator = RegionDiscriminator(width)

    def _score(self, image: Tensor, mask: Tensor, given: Tensor) -> Tensor:
        hole = shared_hole(mask)
        return self.net((2 * image - 1).masked_fill(~hole, 0), ~hole)
