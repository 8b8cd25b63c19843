# SPDX-License-Identifier: Apache-2.0
"""Conditional GAN of partial convolutions and region normalization (Shi, Li and Jia, "Image Inpainting Using GAN,
Partial Convolution and Region Normalization").

The generator is the U-Net of pconv.py (Liu et al., Table 2) with other norms, the discriminator that of pix2pix:

    layer      norm, activation           discriminator   kernel  stride  channels  norm, activation
    PConv1     ReLU                       conv 0          4       2       64        LeakyReLU(0.2)
    PConv2-8   RN-B, ReLU                 conv 1          4       2       128       BN, LeakyReLU(0.2)
    PConv9-15  RN-L, LeakyReLU(0.2)       conv 2          4       2       256       BN, LeakyReLU(0.2)
    PConv16    neither                    conv 3          4       1       512       BN, LeakyReLU(0.2)
                                          conv 4          4       1       1         neither

RN-B normalises by the layer's own (new) mask, RN-L by regions that it finds in the whole map. The discriminator sees
(corrupted image, image), each of its scores a patch of 70 x 70 pixels.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_inpaint.nn import LearnedRegionNorm2d, RegionNorm2d

from .base import Discriminator, Normalization
from .pconv import SLOPE, PConvUNet, UNetModel


class _EncoderNorm(RegionNorm2d):
    """RN-B of a partial convolution's output by its new mask, 0 in holes.

    There the convolution gave 0 and the next one reads nothing, so the hole's weight and bias have no effect and no
    gradient. With zeros in their place the output is 0 where it would be the hole's bias, and need not be zeroed.
    """

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        assert self.weight is not None and self.bias is not None
        weight, bias = (F.pad(valid[1:], (0, 0, 1, 0)) for valid in (self.weight, self.bias))  # (2, C)
        return self._normalise(x, mask, weight=weight, bias=bias)


class _DecoderNorm(LearnedRegionNorm2d):
    """RN-L of a partial convolution's output, 0 in holes: by its factor and summand there, which are of one channel."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        belongs = self.map(x)
        scale, shift = (t.masked_fill(mask == 0, 0.0) for t in self._affine(belongs))
        return self._normalise(x, self._region(belongs), scale=scale, shift=shift)


class CGANPCRN(UNetModel):
    """The generator; `.net` is a `PConvUNet`, `net(x, mask)` with images normalised by ImageNet's mean and deviation.

    Args:
        levels: encoder (and decoder) layers. channels: of the image. width: channels of the first layer.
        norm: "region", or "batch" for the paper's baseline, partial convolution alone.
        stats: of region normalization, "batch" (as published, in eval mode, too: what one picture gives depends on the
            others of its batch) or "instance" (of each picture alone).

    `model(image, mask)` takes an image (N, channels, H, W) of any size, float in [0, 1], and a mask (N or 1, 1 or
    channels, H, W), 1 = valid, and returns (image, mask), as `PConv` does. RN-L's statistics are of the whole map, so
    that the padding to a multiple of 2**levels is not exact as it is there.

    Raises:
        ValueError: an argument that is none of these; an image or mask of another shape.

    >>> import torch, fused_inpaint
    >>> model = fused_inpaint.models.build_model("cgan_pc_rn", levels=4, width=8).eval()
    >>> out = model(torch.rand(1, 3, 97, 131), torch.ones(1, 1, 97, 131))
    >>> tuple(out.image.shape), tuple(out.mask.shape)
    ((1, 3, 97, 131), (1, 1, 97, 131))
    """

    key = "cgan_pc_rn"

    def __init__(
        self, levels: int = 8, channels: int = 3, width: int = 64, norm: str = "region", stats: str = "batch"
    ) -> None:
        if norm not in ("region", "batch"):
            raise ValueError(f"cgan_pc_rn: norm must be region or batch, got {norm}")
        allowed = ("batch", "instance") if norm == "region" else ("batch",)
        if stats not in allowed:
            raise ValueError(f"cgan_pc_rn: stats must be {' or '.join(allowed)} with norm={norm}, got {stats}")
        norms: dict[str, Any] = {}
        if norm == "region":
            norms["encoder_norm"] = partial(_EncoderNorm, stats=stats, activation="relu")
            norms["decoder_norm"] = partial(_DecoderNorm, stats=stats, activation="leaky_relu", slope=SLOPE)
        net = PConvUNet(levels, channels, width, **norms)
        super().__init__(net, levels=levels, channels=channels, width=width, norm=norm, stats=stats)


class PatchGAN(nn.Module):
    """The bare discriminator: `net(x)`, x (N, in_channels, H, W), sides of at least 24, to scores (N, 1, H', W')."""

    def __init__(self, in_channels: int = 6, width: int = 64) -> None:
        super().__init__()
        sizes = (in_channels, width, 2 * width, 4 * width, 8 * width, 1)
        strides, last = (2, 2, 2, 1, 1), 4
        # Batch norm takes a bias away again.
        self.convs = nn.ModuleList(
            nn.Conv2d(*size, 4, stride, padding=1, bias=i in (0, last))
            for i, (size, stride) in enumerate(zip(pairwise(sizes), strides, strict=True))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes[2:-1])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        first, *inner, last = self.convs
        x = F.leaky_relu(first(x), 0.2)
        for conv, norm in zip(inner, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return last(x)


class CGANPCRNDiscriminator(Discriminator):
    """The discriminator; `.net` is a `PatchGAN` on (corrupted image, image), both normalised as for the generator, the
    corrupted one 0 in holes.

    `discriminator(image, mask, given=None)`: image (N, channels, H, W), sides of at least 24, real or filled; `given`
    is corrupted by the mask. Returns scores (N, 1, H', W'), for binary cross-entropy with logits.

    >>> import torch, fused_inpaint
    >>> net = fused_inpaint.models.build_discriminator("cgan_pc_rn", width=8)
    >>> tuple(net(torch.rand(1, 3, 256, 256), torch.ones(1, 1, 256, 256)).shape)
    (1, 1, 30, 30)
    """

    key = "cgan_pc_rn"

    def __init__(self, channels: int = 3, width: int = 64) -> None:
        super().__init__(channels=channels, width=width)
        self.net: PatchGAN = PatchGAN(2 * channels, width)
        self.channels = channels
        self.normalization = Normalization(channels)

    def _score(self, image: Tensor, mask: Tensor, given: Tensor) -> Tensor:
        if min(image.shape[2:]) < 24:
            raise ValueError(f"cgan_pc_rn: image must have sides of at least 24, got {tuple(image.shape)}")
        corrupted = self.normalization(given).masked_fill(mask == 0, 0.0)
        return self.net(torch.cat([corrupted, self.normalization(image)], 1))
