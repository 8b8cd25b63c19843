# SPDX-License-Identifier: Apache-2.0
"""AOT-GAN (Zeng et al., "Aggregated Contextual Transformations for High-Resolution Image Inpainting", TVCG 2022).

    generator        kernel  stride  channels  activation     discriminator  kernel  stride  channels  activation
    conv1            7       1       64        ReLU           conv1          4       2       64        LeakyReLU
    conv2            4       2       128       ReLU           conv2          4       2       128       LeakyReLU
    conv3            4       2       256       ReLU           conv3          4       2       256       LeakyReLU
    8 AOT blocks     3       1       256       within         conv4          4       1       512       LeakyReLU
    up x2, conv4     3       1       128       ReLU           conv5          4       1       1
    up x2, conv5     3       1       64        ReLU
    conv6            3       1       3         tanh           conv1-4: spectral norm, no bias; slope 0.2

The generator's conv1 and the AOT blocks are padded by reflection, all else with zeros; up x2 is bilinear with aligned
corners. Images are in [-1, 1]; in masks 1 = hole.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_inpaint.nn import AOTBlock, TapConv2d

from .base import Discriminator, InpaintingModel, Prediction, pad_as_hole, shared_hole
from .spectral import SpectralConv2d

_SMALLEST_SCORED = 24  # side of an image whose score map has one pixel


class AOTGANNet(nn.Module):
    """The bare generator: `net(x, mask)` -> picture (N, 3, H, W) in [-1, 1].

    x (N, 3, H, W) in [-1, 1] with 1 in the holes, mask (N or 1, 1, H, W) with 1 = hole; or `net(x)` of both
    concatenated, (N, 4, H, W). Sides are multiples of 4 and at least 4 * (max(rates) + 1), for the reflections.

    Args:
        blocks: AOT blocks. rates: dilations of a block's branches. width: channels of the first layer.

    Raises:
        ValueError: blocks below 1; rates that are not positive, or whose number does not divide 4 * width; x of other
            channels or sides.
    """

    def __init__(self, blocks: int = 8, rates: Sequence[int] = (1, 2, 4, 8), width: int = 64) -> None:
        super().__init__()
        if blocks < 1:
            raise ValueError(f"aot_gan: blocks must be 1 or more, got {blocks}")
        if not rates or min(rates) < 1 or 4 * width % len(rates):
            raise ValueError(f"aot_gan: rates must be positive, of a number that divides {4 * width}, got {rates}")
        self.rates, self.least = tuple(rates), 4 * (max(rates) + 1)
        self.encoder = nn.Sequential(
            nn.Conv2d(4, width, 7),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
        )
        self.blocks = nn.Sequential(*(AOTBlock(4 * width, self.rates) for _ in range(blocks)))
        self.decoder = nn.Sequential(
            # The published one's layers by number: upsampling, convolution, ReLU.
            nn.Identity(),
            TapConv2d(4 * width, 2 * width, 3, upsampling="bilinear", activation="relu"),
            nn.Identity(),
            nn.Identity(),
            TapConv2d(2 * width, width, 3, upsampling="bilinear", activation="relu"),
            nn.Identity(),
            TapConv2d(width, 3, 3),
            nn.Tanh(),
        )
        _initialise(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        channels, beside = (4, "without a mask") if mask is None else (3, "beside a mask")
        if x.dim() != 4 or x.size(1) != channels:
            raise ValueError(f"aot_gan: x must be (N, {channels}, H, W) {beside}, got {tuple(x.shape)}")
        h, w = x.shape[2:]
        if h % 4 or w % 4 or h < self.least or w < self.least:
            raise ValueError(f"aot_gan: x must have sides that are multiples of 4 from {self.least} on, got {h} x {w}")
        if mask is not None:
            x = torch.cat([x, mask.to(x.dtype).expand(x.size(0), -1, -1, -1)], 1)
        # Padded apart from the convolution, while the map is thin: a reflection may undo channels_last.
        x = F.pad(x, (3, 3, 3, 3), mode="reflect").contiguous(memory_format=torch.channels_last)
        return self.decoder(self.blocks(self.encoder(x)))


class AOTGAN(InpaintingModel):
    """`AOTGANNet` under the library's convention; the arguments are the net's.

    An image of any size is padded with hole to what the net takes, and the result cropped back. A mask of several
    planes counts as hole where any of them does. Predictions are in [0, 1] in both modes, by the tanh.

    >>> import torch, fused_inpaint
    >>> model = fused_inpaint.models.build_model("aot_gan", blocks=2, width=8).eval()
    >>> tuple(model(torch.rand(1, 3, 97, 131), torch.ones(1, 1, 97, 131)).image.shape)
    (1, 3, 97, 131)
    """

    key, channels, multiple = "aot_gan", 3, 4

    def __init__(self, blocks: int = 8, rates: Sequence[int] = (1, 2, 4, 8), width: int = 64) -> None:
        super().__init__(blocks=blocks, rates=tuple(rates), width=width)
        self.net: AOTGANNet = AOTGANNet(blocks, rates, width)

    def _predict(self, image: Tensor, mask: Tensor) -> Prediction:
        x, mask, window = pad_as_hole(image, mask, self.multiple, self.net.least)
        hole = shared_hole(mask)
        out = self.net((2 * x - 1).masked_fill(hole, 1), hole)[window]
        return Prediction((out + 1) / 2, torch.ones_like(hole[window], dtype=torch.uint8))


class SMPatchGAN(nn.Module):
    """The bare discriminator: `net(x)` -> raw scores (N, 1, H/8 - 2, W/8 - 2), each of a patch of 70 x 70 pixels.

    x (N, 3, H, W) in [-1, 1], sides of at least 24. It learns the soft mask: 1 for patches that were filled, 0 for real
    ones. width: channels of the first layer.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            SpectralConv2d(3, width, 4, stride=2, padding=1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            SpectralConv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            SpectralConv2d(2 * width, 4 * width, 4, stride=2, padding=1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            SpectralConv2d(4 * width, 8 * width, 4, padding=1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(8 * width, 1, 4, padding=1),
        )
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.size(1) != 3 or min(x.shape[2:]) < _SMALLEST_SCORED:
            expected = f"(N, 3, H, W) with sides of at least {_SMALLEST_SCORED}"
            raise ValueError(f"aot_gan: x must be {expected}, got {tuple(x.shape)}")
        return self.conv(x.contiguous(memory_format=torch.channels_last))


class AOTGANDiscriminator(Discriminator):
    """`SMPatchGAN` under the library's convention: it scores the image alone; mask and `given` are not read.

    >>> import torch, fused_inpaint
    >>> discriminator = fused_inpaint.models.build_discriminator("aot_gan", width=8)
    >>> tuple(discriminator(torch.rand(1, 3, 64, 64), torch.ones(1, 1, 64, 64)).shape)
    (1, 1, 6, 6)
    """

    key, channels = "aot_gan", 3

    def __init__(self, width: int = 64) -> None:
        super().__init__(width=width)
        self.net: SMPatchGAN = SMPatchGAN(width)

    def _score(self, image: Tensor, mask: Tensor, given: Tensor) -> Tensor:
        return self.net(2 * image - 1)


def _initialise(net: nn.Module) -> None:
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.zeros_(parameter)
    for module in net.modules():
        if isinstance(module, SpectralConv2d):
            module.estimate()
