# SPDX-License-Identifier: Apache-2.0
"""Region normalization network (Yu et al., "Region Normalization for Image Inpainting", AAAI 2020), as its authors
published it; the norms of cgan_pc_rn.py come from there.

    layer      kernel  stride  padding                 channels           norm, activation
    encoder 0  7       1       3, reflected            64                 RN-B, ReLU
    encoder 1  4       2       1                       128                RN-B, ReLU
    encoder 2  4       2       1                       256                RN-B, ReLU
    8 blocks   3       1       2, reflected            256                RN-L, ReLU          dilation 2
               3       1       1, reflected            256                RN-L, + the block's input
    decoder 0  3       1       1                       512, to 128 of x2  RN-L, ReLU          pixel shuffle, norm
    decoder 1  3       1       1                       256, to 64 of x2   RN-L, ReLU
    exit       7       1       3, reflected            3                  (tanh + 1) / 2

The discriminator has spectral norm and no bias: 4 x 4 convolutions of 64, 128, 256 (stride 2), 512, 1, LeakyReLU(0.2).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_inpaint.nn import LearnedRegionNorm2d, RegionNorm2d

from .base import Discriminator, InpaintingModel, Prediction, pad_as_hole, shared_hole
from .spectral import SpectralConv2d


class _Layer(nn.Module):
    """Convolution, pixel shuffle where the norm is of fewer channels, region normalization with its activation."""

    def __init__(self, conv: nn.Conv2d, norm: RegionNorm2d | LearnedRegionNorm2d) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm
        self.up = 2 if norm.num_features < conv.out_channels else 1

    def forward(self, x: Tensor, *mask: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(F.pixel_shuffle(x, self.up) if self.up > 1 else x, *mask)


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, threshold: float, stats: str) -> None:
        super().__init__()
        self.first = _Layer(
            nn.Conv2d(channels, channels, 3, padding=2, dilation=2, padding_mode="reflect"),
            LearnedRegionNorm2d(channels, threshold, stats=stats, activation="relu"),
        )
        self.second = _Layer(
            nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect"),
            LearnedRegionNorm2d(channels, threshold, stats=stats),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class RNNet(nn.Module):
    """The bare network as published: `net(x, mask)` -> out, of x's shape, in [0, 1].

    x (N, channels, H, W) in [0, 1], sides multiples of 4 and at least 12; mask (N or 1, 1, H, W), 1 = hole. What x
    holds in holes is not read: the network sees 1 there.

    Args:
        channels: of image and output. width: channels of the first layer.
        blocks: residual ones. threshold: of RN-L's maps. stats: of all norms, "batch" or "instance".
    """

    def __init__(
        self, channels: int = 3, width: int = 64, blocks: int = 8, threshold: float = 0.8, stats: str = "batch"
    ) -> None:
        super().__init__()
        if stats not in ("batch", "instance"):
            raise ValueError(f"cgan_pc_rn: stats must be batch or instance, got {stats}")
        entrance = nn.Conv2d(channels, width, 7, padding=3, padding_mode="reflect")
        down = [nn.Conv2d(size, 2 * size, 4, stride=2, padding=1) for size in (width, 2 * width)]
        self.encoder = nn.ModuleList(
            _Layer(conv, RegionNorm2d(conv.out_channels, stats=stats, shared_bias=True, activation="relu"))
            for conv in (entrance, *down)
        )
        self.blocks = nn.Sequential(*(_ResidualBlock(4 * width, threshold, stats) for _ in range(blocks)))
        self.decoder = nn.Sequential(
            *(
                _Layer(
                    nn.Conv2d(2 * size, 4 * size, 3, padding=1),
                    LearnedRegionNorm2d(size, threshold, stats=stats, activation="relu"),
                )
                for size in (2 * width, width)
            )
        )
        self.exit = nn.Conv2d(width, channels, 7, padding=3, padding_mode="reflect")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hole = mask != 0
        x = x.masked_fill(hole, 1.0).contiguous(memory_format=torch.channels_last)
        for layer in self.encoder:
            x = layer(x, ~hole)
        return (torch.tanh(self.exit(self.decoder(self.blocks(x)))) + 1) / 2


class RN(InpaintingModel):
    """`RNNet` under the library's convention: `build_model("cgan_pc_rn", variant="rn")`; arguments as there.

    `model(image, mask)` takes an image (N, channels, H, W) of any size, float in [0, 1], and a mask (N or 1, 1 or
    channels, H, W), 1 = valid; a pixel that is a hole in one channel is one in all. Both are padded with hole to
    multiples of 4. Returns (image, mask), the mask all ones. Statistics are those of the batch in eval mode, too.

    >>> import torch, fused_inpaint
    >>> model = fused_inpaint.models.build_model("cgan_pc_rn", variant="rn", width=8, blocks=1).eval()
    >>> tuple(model(torch.rand(1, 3, 97, 31), torch.ones(1, 1, 97, 31)).image.shape)
    (1, 3, 97, 31)
    """

    key, variant = "cgan_pc_rn", "rn"
    multiple = 4

    def __init__(
        self, channels: int = 3, width: int = 64, blocks: int = 8, threshold: float = 0.8, stats: str = "batch"
    ) -> None:
        sizes = {"channels": channels, "width": width, "blocks": blocks}
        super().__init__(variant="rn", **sizes, threshold=threshold, stats=stats)
        self.net: RNNet = RNNet(channels, width, blocks, threshold, stats)
        self.channels = channels

    def _predict(self, image: Tensor, mask: Tensor) -> Prediction:
        # The dilated convolutions reflect 2 pixels of a map of a quarter of the size, which must have 3.
        x, mask, window = pad_as_hole(image, mask, self.multiple, least=12)
        hole = shared_hole(mask)
        out = self.net(x, hole)
        return Prediction(self._ranged(out[window]), torch.ones_like(hole, dtype=torch.uint8)[window])


class RNPatchGAN(nn.Module):
    """The bare discriminator as published: `net(x)` -> (scores, [the five layers' outputs]).

    x (N, in_channels, H, W) in [0, 1], sides of at least 24; outputs are after their activation; scores (N, 1, H', W')
    are the last one, after a sigmoid with `use_sigmoid`.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, use_sigmoid: bool = True) -> None:
        super().__init__()
        self.use_sigmoid = use_sigmoid
        sizes = (in_channels, width, 2 * width, 4 * width, 8 * width, 1)
        self.convs = nn.ModuleList(
            SpectralConv2d(*size, 4, stride, padding=1, bias=False)
            for size, stride in zip(pairwise(sizes), (2, 2, 2, 1, 1), strict=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = x.contiguous(memory_format=torch.channels_last)
        *inner, last = self.convs
        maps = []
        for conv in inner:
            x = F.leaky_relu(conv(x), 0.2)
            maps.append(x)
        x = last(x)
        return torch.sigmoid(x) if self.use_sigmoid else x, [*maps, x]


class RNDiscriminator(Discriminator):
    """`RNPatchGAN` under the library's convention: `build_discriminator("cgan_pc_rn", variant="rn")`.

    `discriminator(image, mask)`: image (N, channels, H, W), sides of at least 24, real or filled; neither the mask nor
    `given` is read. Returns scores (N, 1, H', W') without a sigmoid.

    >>> import torch, fused_inpaint
    >>> net = fused_inpaint.models.build_discriminator("cgan_pc_rn", variant="rn", width=8)
    >>> tuple(net(torch.rand(1, 3, 64, 64), torch.ones(1, 1, 64, 64)).shape)
    (1, 1, 6, 6)
    """

    key, variant = "cgan_pc_rn", "rn"

    def __init__(self, channels: int = 3, width: int = 64) -> None:
        super().__init__(variant="rn", channels=channels, width=width)
        self.net: RNPatchGAN = RNPatchGAN(channels, width)
        self.channels = channels

    def _score(self, image: Tensor, mask: Tensor, given: Tensor) -> Tensor:
        if min(image.shape[2:]) < 24:
            raise ValueError(f"cgan_pc_rn: image must have sides of at least 24, got {tuple(image.shape)}")
        _, maps = self.net(image)
        return maps[-1]
