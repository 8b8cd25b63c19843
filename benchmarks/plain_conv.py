# SPDX-License-Identifier: Apache-2.0
"""The partial-convolution U-Net with plain convolutions, to train beside it: the network itself, nothing masked."""

import torch
from torch import Tensor

from fused_inpaint.models.base import Prediction
from fused_inpaint.models.pconv import PConv, PConvUNet, UNetModel
from fused_inpaint.training.evaluate import mean_colour


class PlainConv(PConv):
    """The same network with nothing masked: holes have the mean colour of the known pixels."""

    key = "plain_conv"

    def _predict(self, image: Tensor, mask: Tensor) -> Prediction:
        return super()._predict(mean_filled(image, mask), torch.ones_like(mask))


class PlainConvTold(UNetModel):
    """PlainConv with the mask as a fourth channel. The fourth of the output is not used."""

    key = "plain_conv_told"

    def __init__(self, levels: int, width: int) -> None:
        super().__init__(PConvUNet(levels, 4, width), levels=levels, width=width)
        self.channels, self.freeze_encoder_bn = 3, self.net.freeze_encoder_bn

    def _predict(self, image: Tensor, mask: Tensor) -> Prediction:
        told = torch.cat([mean_filled(image, mask), mask.expand_as(image[:, :1])], 1)
        out = super()._predict(told, torch.ones_like(mask))
        return Prediction(out.image[:, :3], out.mask)


def mean_filled(image: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), image, mean_colour(torch.where(mask.bool(), image, 0), mask))
