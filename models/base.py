# SPDX-License-Identifier: Apache-2.0
"""What all networks share: one convention outside (mask 1 = valid, image [0, 1], any size), the paper's own inside."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InpaintingModel(nn.Module):
    """A network under the library's convention.

    `model(image, mask)` takes an image (N, C, H, W), float in [0, 1], and a mask (N or 1, 1 or C, H, W), 1 = valid and
    0 = hole, of any size, and returns a named tuple of predictions with `.image` the final one. `model.inpaint(image,
    mask)` keeps the known pixels, bit for bit, and fills the holes. `model.net` is the bare network, called as the
    published one is. Subclasses set `key`, `channels`, `multiple` (of what the sides must be)
    and `_predict`.
    """

    key: str
    channels: int
    multiple: int
    net: nn.Module

    def _predict(self, image: Tensor, mask: Tensor) -> Any:
        raise NotImplementedError

    def inpaint(self, image: Tensor, mask: Tensor) -> Tensor:
        """The image with its holes filled, (N, C, H, W) in [0, 1]; known pixels are the input's own bits.

        Whatever the image holds under the mask's zeros is never read. Gradients do not flow; batch norm uses its
        running statistics.

        >>> import torch, fused_inpaint
        >>> model = fused_inpaint.models.build_model("pconv", levels=3, width=8)
        >>> image, mask = torch.rand(1, 3, 19, 21), (torch.rand(1, 1, 19, 21) > 0.3).float()
        >>> bool((model.inpaint(image, mask) == image)[mask.expand_as(image) == 1].all())
        True
        """
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                filled = self(image, mask).image.clamp(0, 1).to(image.dtype)
        finally:
            for module, mode in modes:
                module.training = mode
        return torch.where(mask.bool(), image, filled)

    def forward(self, image: Tensor, mask: Tensor) -> Any:
        self._check(image, mask)
        return self._predict(image, mask)

    def _check(self, image: Tensor, mask: Tensor) -> None:
        if image.dim() != 4 or not image.is_floating_point():
            raise ValueError(f"{self.key}: image must be (N, C, H, W) float, got {tuple(image.shape)} {image.dtype}")
        n, c, h, w = image.shape
        if c != self.channels:
            raise ValueError(f"{self.key}: image must have {self.channels} channels, got {tuple(image.shape)}")
        if h == 0 or w == 0:
            raise ValueError(f"{self.key}: image must have at least one pixel, got {tuple(image.shape)}")
        if (
            mask.dim() != 4
            or mask.shape[2:] != image.shape[2:]
            or mask.size(0) not in (1, n)
            or mask.size(1) not in (1, c)
        ):
            raise ValueError(
                f"{self.key}: mask must be ({n}, 1, {h}, {w}) or ({n}, {c}, {h}, {w}), got {tuple(mask.shape)}"
            )


class Prediction(NamedTuple):
    """What a one-output network returns."""

    image: Tensor  # (N, C, H, W), in the [0, 1] range
    mask: Tensor  # (N or 1, 1, H, W) uint8, where the prediction is defined: all ones unless a hole was never reached


def padding_to_multiple(size: int, multiple: int) -> tuple[int, int]:
    """(before, after) that bring a side to the next multiple."""
    missing = -size % multiple
    return missing // 2, missing - missing // 2
