# SPDX-License-Identifier: Apache-2.0
"""Layers over ops.region_norm: parameters and a call."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import channel_pool, region_norm
from ..ops.checks import check_mask_type
from ..ops.masks import plane_of, resized


class _RegionNorm(nn.Module):
    """What both layers hand on to the op."""

    def __init__(
        self, num_features: int, eps: float, stats: str, activation: str, slope: float, process_group: Any
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.stats = num_features, eps, stats
        self.activation, self.slope, self.process_group = activation, slope, process_group

    def _normalise(self, x: Tensor, mask: Tensor, **affine: Any) -> Tensor:
        names = ("eps", "stats", "activation", "slope", "process_group")
        return region_norm(x, mask, **{name: getattr(self, name) for name in names}, **affine)


class RegionNorm2d(_RegionNorm):
    """Region normalization with a given mask (RN-B of Yu et al., "Region Normalization for Image Inpainting", 2020).

    `layer(x, mask)`: each region of the mask (1 and 0) is normalised by its own statistics, with its own weight and
    bias. x (N, C, H, W); mask (N or 1, 1 or C, h, w) uint8, bool or float, brought to x's size by nearest neighbour
    where it differs; y (N, C, H, W). `weight` and `bias` are (2, C), indexed by the mask's value: 0 hole, 1 valid.

    Args:
        num_features: C.
        eps: added to the variance, times total / count of the region, as in the published code.
        stats: "batch" (published code) or "instance" (the paper's text); running averages are never used.
        shared_bias: both biases are added everywhere, as in the published code; its gamma is weight - 1.
        affine: learn weight and bias.
        activation: "none", "relu" or "leaky_relu" with `slope`, in the same pass.
        process_group: processes that join their statistics, for training over several devices.

    Equation, dtypes and errors: `fused_inpaint.ops.region_norm`.

    >>> import torch
    >>> from fused_inpaint import RegionNorm2d
    >>> tuple(RegionNorm2d(8)(torch.rand(2, 8, 16, 16), torch.ones(2, 1, 32, 32)).shape)
    (2, 8, 16, 16)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        stats: str = "batch",
        shared_bias: bool = False,
        affine: bool = True,
        activation: str = "none",
        slope: float = 0.2,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, stats, activation, slope, process_group)
        self.shared_bias = shared_bias
        size = (2, num_features)
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=dtype)) if affine else None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if mask.dim() == x.dim() == 4 and mask.shape[2:] != x.shape[2:] and mask.numel() and x.numel():
            check_mask_type("region_norm", mask)
            mask = resized(plane_of("region_norm", mask), x.shape[2:])
        return self._normalise(x, mask, weight=self.weight, bias=self.bias, shared_bias=self.shared_bias)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, stats={self.stats!r}, shared_bias={self.shared_bias}"


class LearnedRegionNorm2d(_RegionNorm):
    """Region normalization over a region that the layer finds itself (RN-L of Yu et al., 2020).

    `layer(x)`: the channels' mean and maximum, a 7 x 7 convolution and a sigmoid make a map; where it is at least
    `threshold` lies one region, elsewhere the other (no gradient passes the threshold). Two more 7 x 7 convolutions of
    the map give a factor (1 + gamma) and a summand (beta) for each pixel, the same for all channels.

    Args:
        num_features: C, for the record: no parameter depends on it.
        threshold: of the map, in (0, 1).
        eps, stats, activation, slope, process_group: as in `RegionNorm2d`.

    >>> import torch
    >>> from fused_inpaint import LearnedRegionNorm2d
    >>> tuple(LearnedRegionNorm2d(8)(torch.rand(2, 8, 16, 16)).shape)
    (2, 8, 16, 16)
    """

    def __init__(
        self,
        num_features: int,
        threshold: float = 0.8,
        eps: float = 1e-5,
        stats: str = "batch",
        activation: str = "none",
        slope: float = 0.2,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, stats, activation, slope, process_group)
        if not 0 < threshold < 1:
            raise ValueError(f"LearnedRegionNorm2d: threshold must be between 0 and 1, got {threshold}")
        self.threshold = threshold
        self.map_conv = nn.Conv2d(2, 1, 7, padding=3, bias=False, device=device, dtype=dtype)
        self.gamma_conv = nn.Conv2d(1, 1, 7, padding=3, device=device, dtype=dtype)
        self.beta_conv = nn.Conv2d(1, 1, 7, padding=3, device=device, dtype=dtype)

    def map(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) in (0, 1): how much a pixel belongs to the first region."""
        # oneDNN is several times as fast in this layout.
        pooled = channel_pool(x).contiguous(memory_format=torch.channels_last)
        return torch.sigmoid(self.map_conv(pooled))

    def forward(self, x: Tensor) -> Tensor:
        belongs = self.map(x)
        scale, shift = self._affine(belongs)
        return self._normalise(x, self._region(belongs), scale=scale, shift=shift)

    def _region(self, belongs: Tensor) -> Tensor:
        return belongs.detach() >= self.threshold

    def _affine(self, belongs: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, shift), both (N, 1, H, W)."""
        convs = (self.gamma_conv, self.beta_conv)
        gamma, beta = self._joint(belongs) if all(map(_is_plain, convs)) else (conv(belongs) for conv in convs)
        return 1 + gamma, beta

    def _joint(self, belongs: Tensor) -> tuple[Tensor, ...]:
        # The two convolutions as one, with a second channel of zero weights: oneDNN takes three times as long on one
        # channel as on two.
        convs = (self.gamma_conv, self.beta_conv)
        weight, bias = (torch.cat([getattr(conv, name) for conv in convs]) for name in ("weight", "bias"))
        twice = belongs.expand(-1, 2, -1, -1).contiguous(memory_format=torch.channels_last)
        return F.conv2d(twice, F.pad(weight, (0, 0, 0, 0, 0, 1)), bias, padding=3).split(1, 1)

    def extra_repr(self) -> str:
        return f"{self.num_features}, threshold={self.threshold}, eps={self.eps}, stats={self.stats!r}"


def _is_plain(conv: nn.Module) -> bool:
    """Whether nothing was hung on the module or put in its place that calling it would run."""
    return type(conv) is nn.Conv2d and not (conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks)
