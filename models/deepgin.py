# SPDX-License-Identifier: Apache-2.0
"""Coarse-to-fine network with spatial pyramid dilation, self-attention at three scales and back projection (Li et al.,
"DeepGIN: Deep Generative Inpainting Network for Extreme Image Inpainting", ECCV Workshops 2020).

256 x 256, width 64; m = 1 in holes, where the image is white. All padding replicates, "up" is bilinear x2 with aligned
corners, LeakyReLU(0.2) follows every convolution but those marked *, there is no norm:

    coarse(image, m)                        refinement(coarse in holes, image elsewhere; m)
    7x7          32                         7x7          32          up, 3x3     256    at 32 x 32
    4x4 stride 2 64                         4x4 stride 2 64          3x3         256    of (this, skip32)
    4x4 stride 2 128                        4x4 stride 2 128         up, 3x3     128    at 64 x 64
    4x4 stride 2 256                        4x4 stride 2 256         3x3         128    of (this, skip64)
    6 SPD, 8 dilations                      4x4 stride 2 512         up, 3x3     64
    up, 3x3      128                        3 SPD, 4 dilations       up, 3x3     32
    up, 3x3      64                         attention at 16 x 16     7x7*        3      refined
    up, 3x3      32                         3 SPD, 4 dilations
    7x7*         3
    skip32, skip64: 3x3 of the encoder's 256 -> 128 and 128 -> 64, attention
    low resolution: 3x3 32, 3x3* 3 at 64 x 64; alpha: sigmoid(3x3* 1) of the last 32 channels
    refined += alpha * up4(low resolution - down4(refined)), the known pixels of refined being the image's

Table 1's models, as arguments:
    StdResBlk (Coarse only)  8.168 M  block="standard", coarse_only=True
    StdResBlk               40.850 M  block="standard", attention="none", back_projection=False
    StdResBlk-SA            41.376 M  block="standard", attention="single", back_projection=False
    StdResBlk-MSSA          42.892 M  block="standard", back_projection=False
    DilatedResBlk-MSSA      42.892 M  block="dilated", back_projection=False
    SPDResBlk-MSSA          42.892 M  back_projection=False
    SPDResBlk-MSSA-BP       42.930 M
The counts say what the text leaves open: without multi-scale attention there are no skips at all.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_inpaint.nn import PyramidConv2d, SelfAttention2d, SPDBlock, TapConv2d
from fused_inpaint.ops import pyramid_conv2d
from fused_inpaint.ops.padding import pad

from .base import Discriminator, InpaintingModel, pad_as_hole, shared_hole
from .spectral import SpectralConv2d

_SLOPE = 0.2
# Of the blocks of the coarse stage and of the refinement: a residual block (3x3, ReLU, 3x3) is a pyramid of one.
_DILATIONS = {
    "standard": ((1,), (1,)),
    "dilated": ((2,), (2,)),
    "spd": ((2, 3, 4, 5, 6, 8, 10, 1), (2, 3, 4, 5)),
}
_ATTENTION = ("none", "single", "multi")


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class _Conv(nn.Conv2d):
    """Convolution that keeps the size (or halves it, 4x4), LeakyReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, (kernel - 1) // 2, padding_mode="replicate")
        # The layout of the features, which the weight would otherwise be brought to by every call.
        self.weight = nn.Parameter(self.weight.detach().contiguous(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (3, 3) and x.device.type == "cpu":
            # A pyramid of one branch, which there takes fewer products and keeps no padded copy.
            y = pyramid_conv2d(x, self.weight, self.bias, (1,), padding_mode="replicate", activation="none")
        else:
            around = self._reversed_padding_repeated_twice
            y = F.conv2d(pad(x, around, "replicate"), self.weight, self.bias, self.stride)
        return F.leaky_relu(y, _SLOPE, inplace=True)


def _up(inputs: int, outputs: int) -> TapConv2d:
    """Bilinear x2, then 3x3 as `_Conv`."""
    return TapConv2d(
        inputs,
        outputs,
        3,
        upsampling="bilinear",
        padding_mode="replicate",
        activation="leaky_relu",
        slope=_SLOPE,
    )


def _thin(inputs: int, outputs: int, kernel: int) -> TapConv2d:
    """Without activation."""
    return TapConv2d(inputs, outputs, kernel, padding_mode="replicate")


def _encoder(width: int, levels: int) -> list[_Conv]:
    halvings = (_Conv(width * 2**i // 2, width * 2**i, 4, stride=2) for i in range(levels))
    return [_Conv(4, width // 2, 7), *halvings]


class _Coarse(nn.Sequential):
    """(image, m) (N, 4, H, W) -> (N, 3, H, W)."""

    def __init__(self, dilations: tuple[int, ...], width: int) -> None:
        super().__init__(
            *_encoder(width, 3),
            *(SPDBlock(4 * width, dilations) for _ in range(6)),
            _up(4 * width, 2 * width),
            _up(2 * width, width),
            _up(width, width // 2),
            _thin(width // 2, 3, 7),
        )


class _Refinement(nn.Module):
    """(image with the coarse prediction in its holes, m) (N, 4, H, W) -> (refined (N, 3, H, W), low resolution
    (N, 3, H / 4, W / 4), alpha before its sigmoid (N, 1, H, W)); the last two None without back projection.

    Names count sides at 256 x 256.
    """

    def __init__(self, dilations: tuple[int, ...], attention: str, back_projection: bool, width: int) -> None:
        super().__init__()
        w, multi = width, attention == "multi"
        self.encoder = nn.ModuleList(_encoder(w, 4))
        self.middle = nn.Sequential(
            *(SPDBlock(8 * w, dilations) for _ in range(3)),
            nn.Identity() if attention == "none" else SelfAttention2d(8 * w),
            *(SPDBlock(8 * w, dilations) for _ in range(3)),
        )
        self.skip32 = nn.Sequential(_Conv(4 * w, 2 * w, 3), SelfAttention2d(2 * w)) if multi else None
        self.skip64 = nn.Sequential(_Conv(2 * w, w, 3), SelfAttention2d(w)) if multi else None
        self.up32 = _up(8 * w, 4 * w)
        self.mix32 = _Conv(6 * w, 4 * w, 3) if multi else None
        self.up64 = _up(4 * w, 2 * w)
        self.mix64 = _Conv(3 * w, 2 * w, 3) if multi else None
        self.up128 = _up(2 * w, w)
        self.up256 = _up(w, w // 2)
        self.out = _thin(w // 2, 3, 7)
        self.low: nn.Sequential | None = None
        self.alpha: TapConv2d | None = None
        if back_projection:
            self.low = nn.Sequential(_Conv(2 * w, w // 2, 3), _thin(w // 2, 3, 3))
            self.alpha = _thin(w // 2, 1, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        features = [x]
        for conv in self.encoder:
            features.append(conv(features[-1]))
        h = self.up32(self.middle(features[5]))
        if self.skip32 is not None and self.mix32 is not None:
            h = self.mix32(torch.cat([h, self.skip32(features[4])], 1))
        h = self.up64(h)
        if self.skip64 is not None and self.mix64 is not None:
            h = self.mix64(torch.cat([h, self.skip64(features[3])], 1))
        low = None if self.low is None else self.low(h)
        h = self.up256(self.up128(h))
        return self.out(h), low, None if self.alpha is None else self.alpha(h)


class DeepGINGenerator(nn.Module):
    """The bare network: `net(msked_img, msk)` -> (compltd_img, reconst_img, lr_x, lr_img), sides a multiple of 16.

    msked_img (N, 3, H, W) in [0, 1], white (1) in the holes; msk (N or 1, 1, H, W), 1 = hole, 0 = valid. compltd_img is
    reconst_img (refined) in the holes and msked_img elsewhere, lr_x the coarse prediction, all (N, 3, H, W); lr_img is
    the low resolution one, (N, 3, H / 4, W / 4), or None without back projection. With coarse_only, reconst_img is
    lr_x. Nothing is clamped. `real_img` stands in the published signature and is not read.

    Args:
        block: residual blocks, "standard", "dilated" (first convolution, by 2) or "spd".
        attention: "none", "single" (16 x 16) or "multi" (skips at 32 x 32 and 64 x 64 too), of the refinement.
        back_projection: of the refinement, with its low resolution output.
        coarse_only: the first stage alone; the two arguments above then speak of nothing.
        width: channels after the first halving; the first convolution has half as many.

    Raises:
        ValueError: an argument that is none of these, an odd width, sides that are no multiple of 16.
    """

    def __init__(
        self,
        block: str = "spd",
        attention: str = "multi",
        back_projection: bool = True,
        coarse_only: bool = False,
        width: int = 64,
    ) -> None:
        super().__init__()
        for name, value, known in (("block", block, tuple(_DILATIONS)), ("attention", attention, _ATTENTION)):
            if value not in known:
                raise ValueError(f"deepgin: {name} must be {', '.join(known[:-1])} or {known[-1]}, got {value}")
        if width < 2 or width % 2:
            raise ValueError(f"deepgin: width must be even and at least 2, got {width}")
        first, second = _DILATIONS[block]
        self.coarse = _Coarse(first, width)
        self.refinement = None if coarse_only else _Refinement(second, attention, back_projection, width)
        self.apply(_initialise)

    def forward(
        self, msked_img: Tensor, msk: Tensor, real_img: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if msked_img.size(2) % 16 or msked_img.size(3) % 16:
            raise ValueError(
                f"deepgin: msked_img must have sides that are multiples of 16, got {tuple(msked_img.shape)}"
            )
        hole = msk.bool()
        plane = msk.to(msked_img.dtype).expand(msked_img.size(0), -1, -1, -1)

        def stage(network: nn.Module, image: Tensor) -> Any:
            return network(torch.cat([image, plane], 1).contiguous(memory_format=torch.channels_last))

        coarse = refined = stage(self.coarse, msked_img)
        low = alpha = None
        if self.refinement is not None:
            refined, low, alpha = stage(self.refinement, torch.where(hole, coarse, msked_img))
        if low is not None and alpha is not None:
            refined = torch.where(hole, refined, msked_img)
            residual = _resize(low - _resize(refined, low.shape[2:]), refined.shape[2:])
            refined = refined + residual * torch.sigmoid(alpha)
        return torch.where(hole, refined, msked_img), refined, coarse, low


def _initialise(module: nn.Module) -> None:
    """He's, times 0.1; `Module.apply` comes to an attention after its parts, whose last one starts at 0."""
    if isinstance(module, nn.Conv2d | PyramidConv2d):
        nn.init.kaiming_normal_(module.weight)
        with torch.no_grad():
            module.weight.mul_(0.1)
        assert module.bias is not None
        nn.init.zeros_(module.bias)
    elif isinstance(module, SelfAttention2d):
        nn.init.zeros_(module.out.weight)


class DeepGINPrediction(NamedTuple):
    """What `DeepGIN` returns for an image (N, 3, H, W), in the [0, 1] range."""

    coarse: Tensor  # (N, 3, H, W)
    low_resolution: Tensor | None  # (N, 3, ceil(H / 4), ceil(W / 4)); None without back projection
    image: Tensor  # (N, 3, H, W), refined; the coarse one with coarse_only


class DeepGIN(InpaintingModel):
    """`DeepGINGenerator` under the library's convention (mask 1 = valid, images in [0, 1], any size); same arguments.

    `model(image, mask)`: image (N, 3, H, W), mask (N or 1, 1 or 3, H, W); returns a `DeepGINPrediction`. An image is
    padded with hole to multiples of 16 and the predictions cropped back, the low resolution one to its nearest pixels.

    >>> import torch, fused_inpaint
    >>> model = fused_inpaint.models.build_model("deepgin", width=8).eval()
    >>> out = model(torch.rand(1, 3, 33, 50), torch.ones(1, 1, 33, 50))
    >>> tuple(out.coarse.shape), tuple(out.low_resolution.shape), tuple(out.image.shape)
    ((1, 3, 33, 50), (1, 3, 9, 13), (1, 3, 33, 50))
    """

    key, channels, multiple = "deepgin", 3, 16

    def __init__(
        self,
        block: str = "spd",
        attention: str = "multi",
        back_projection: bool = True,
        coarse_only: bool = False,
        width: int = 64,
    ) -> None:
        config = {
            "block": block,
            "attention": attention,
            "back_projection": back_projection,
            "coarse_only": coarse_only,
            "width": width,
        }
        super().__init__(**config)
        self.net: DeepGINGenerator = DeepGINGenerator(block, attention, back_projection, coarse_only, width)

    def _predict(self, image: Tensor, mask: Tensor) -> DeepGINPrediction:
        image, mask, window = pad_as_hole(image, mask, self.multiple)
        hole = shared_hole(mask)
        _, refined, coarse, low = self.net(image.masked_fill(hole, 1.0), hole)
        if low is not None:
            rows, columns = (_quarter(side) for side in window[2:])
            low = self._ranged(low[..., rows, columns])
        return DeepGINPrediction(self._ranged(coarse[window]), low, self._ranged(refined[window]))


def _quarter(side: slice) -> slice:
    """The low resolution pixels for a range of pixels: a quarter as many, rounded up, from the one it begins in."""
    first = side.start // 4
    return slice(first, first + -(-(side.stop - side.start) // 4))


class MultiScaleDiscriminator(nn.Module):
    """The bare discriminator: `net(x)` -> [[map of the full scale], [map of the next], ...], published form.

    x (N, 6, H, W) is (masked image, image), the masked one white in holes; both in [0, 1]. Each scale, halved by a 3x3
    average of the pixels there are, has 4x4 convolutions, zero-padded by 2, with spectral norm: 64 stride 2, 128 stride
    2, 256, 256, LeakyReLU(0.2) after all but the last; a map is (N, 256, H / 4 + 3, W / 4 + 3).

    As in the published code each forward takes a step of the spectral norm's power method, in eval mode too.

    Args:
        scales: how many. width: channels of the first convolution.
    """

    def __init__(self, scales: int = 2, width: int = 64) -> None:
        super().__init__()
        for name, value in (("scales", scales), ("width", width)):
            if value < 1:
                raise ValueError(f"deepgin: {name} must be at least 1, got {value}")
        self.scales = nn.ModuleList(_patch_critic(width) for _ in range(scales))

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        maps = []
        x = x.contiguous(memory_format=torch.channels_last)
        for scale, network in enumerate(self.scales):
            if scale:
                x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
            maps.append([network(x)])
        return maps


def _patch_critic(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    sizes = (6, width, 2 * width, 4 * width, 4 * width)
    for i, stride in enumerate((2, 2, 1, 1)):
        conv = SpectralConv2d(sizes[i], sizes[i + 1], 4, stride, padding=2, always=True)
        layers += [conv, nn.LeakyReLU(_SLOPE, inplace=True)]
    return nn.Sequential(*layers[:-1])


class DeepGINDiscriminator(Discriminator):
    """`MultiScaleDiscriminator` under the library's convention; same arguments. Trained with the hinge loss.

    `discriminator(image, mask, given=None)` returns one map of raw scores for each scale, (N, 4 width, H / 4 + 3,
    W / 4 + 3) first, any H x W.

    >>> import torch, fused_inpaint
    >>> discriminator = fused_inpaint.models.build_discriminator("deepgin", width=8)
    >>> [tuple(s.shape) for s in discriminator(torch.rand(1, 3, 32, 64), torch.ones(1, 1, 32, 64))]
    [(1, 32, 11, 19), (1, 32, 7, 11)]
    """

    key, channels = "deepgin", 3

    def __init__(self, scales: int = 2, width: int = 64) -> None:
        super().__init__(scales=scales, width=width)
        self.net: MultiScaleDiscriminator = MultiScaleDiscriminator(scales, width)

    def _score(self, image: Tensor, mask: Tensor, given: Tensor) -> list[Tensor]:
        masked = given.masked_fill(shared_hole(mask), 1.0)
        return [maps[-1] for maps in self.net(torch.cat([masked, image], 1))]
