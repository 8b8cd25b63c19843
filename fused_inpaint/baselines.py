# SPDX-License-Identifier: Apache-2.0
"""What people really run, in plain PyTorch, for benchmarks, the demo and tests.

These layers cost what the widespread PyTorch versions cost: whole-tensor element-wise passes and a mask convolution
as wide as the feature convolution. They are not the library's reference (`use_backend("reference")`); ours is
measured against them.
Masks: 1 = valid, 0 = hole, in the dtype of the features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENCODER_WIDTHS = (1, 2, 4, 8, 8, 8, 8, 8)
"""Channels of the encoder levels, as multiples of `width` (Table 2 of Liu et al. 2018)."""

ENCODER_KERNELS = (7, 5, 5, 3, 3, 3, 3, 3)


class FullChannelPartialConv2d(nn.Conv2d):
    """Partial convolution as the common PyTorch port writes it: a frozen all-ones convolution counts valid elements.

    out = conv(x * mask) / count + bias where count > 0, else 0; count runs over the window and all input channels.
    The mask needs one plane per input channel; one plane per output channel comes back.

    window_factor: multiply by Cin*kh*kw / count (the paper's equation) instead of 1 / count (the port). It costs
    nothing: the frozen weights become 1 / (Cin*kh*kw), so that the mask convolution gives the mean.
    """

    mask_weight: Tensor
    padding: tuple[int, int]  # never one of nn.Conv2d's strings

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        window_factor: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        frozen = torch.ones_like(self.weight, requires_grad=False)  # (Cout, Cin/groups, kh, kw)
        if window_factor:
            frozen /= frozen[0].numel()
        self.register_buffer("mask_weight", frozen, persistent=False)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = super().forward(x * mask)  # (N, Cout, H', W')
        # Without a bias the port subtracts and adds a tensor of zeros; so does this one.
        bias = torch.zeros_like(out) if self.bias is None else self.bias.view(1, -1, 1, 1).expand_as(out)
        with torch.no_grad():
            count = F.conv2d(mask, self.mask_weight, None, self.stride, self.padding, self.dilation, self.groups)
            hole = count == 0
            count = count.masked_fill_(hole, 1.0)
        out = ((out - bias) / count + bias).masked_fill_(hole, 0.0)
        return out, torch.ones_like(out, requires_grad=False).masked_fill_(hole, 0.0)


class NvidiaPartialConv2d(nn.Conv2d):
    """Partial convolution in the form of NVIDIA's layer: ratio = window / (count + eps), clamped mask, eps 1e-8.

    multi_channel=False: mask (N or 1, 1, H, W), counted by a one-channel ones convolution, window kh*kw.
    multi_channel=True: mask (N or 1, Cin, H, W), counted by a ones convolution of the full (Cout, Cin, kh, kw)
    shape over all input channels, whatever `groups` is; the new mask has one plane per output channel.
    mask=None: everything is valid and zero padding counts as hole; the mask is then made afresh in each call.
    """

    mask_weight: Tensor
    padding: tuple[int, int]  # never one of nn.Conv2d's strings

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        multi_channel: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.multi_channel = multi_channel
        shape = (out_channels, in_channels) if multi_channel else (1, 1)
        ones = torch.ones(*shape, *self.kernel_size)
        self.register_buffer("mask_weight", ones, persistent=False)
        self.window = ones[0].numel()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        with torch.no_grad():
            planes = mask
            if planes is None:
                planes = x.new_ones(1, x.shape[1] if self.multi_channel else 1, *x.shape[2:])
            count = F.conv2d(planes, self.mask_weight, None, self.stride, self.padding, self.dilation)
            ratio = self.window / (count + 1e-8)
            new_mask = torch.clamp(count, 0, 1)
            ratio = ratio * new_mask
        raw = super().forward(x if mask is None else x * mask)
        if self.bias is None:
            return raw * ratio, new_mask
        bias = self.bias.view(1, -1, 1, 1)
        return ((raw - bias) * ratio + bias) * new_mask, new_mask


class _Block(nn.Module):
    """One convolution with its norm and activation; `conv` takes and returns a mask unless it is a plain nn.Conv2d."""

    def __init__(self, conv: nn.Conv2d, norm: bool, activation: nn.Module | None) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels) if norm else None
        self.activation = activation

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if type(self.conv) is nn.Conv2d:
            x = self.conv(x)
        else:
            x, mask = self.conv(x, mask)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x, mask


class PConvUNet(nn.Module):
    """The partial-convolution U-Net on one of the layers above; state-dict names as in `build_model("pconv").net`.

    kind "full_channel": the common port: masks as wide as the features everywhere.
    kind "nvidia": one-channel masks in the encoder; multi-channel in the decoder, where two masks meet in a
    concatenation.
    kind "plain": nn.Conv2d and no masks: the same network without partial convolution, and the mask is handed back
    as it came.
    window_factor concerns "full_channel" only: True is the paper's equation, False the published port.

    forward(x, mask) -> (out, out_mask); sizes are multiples of 2**levels.
    """

    def __init__(
        self,
        kind: str = "full_channel",
        levels: int = 8,
        channels: int = 3,
        width: int = 64,
        *,
        window_factor: bool = True,
    ) -> None:
        super().__init__()
        if kind not in ("full_channel", "nvidia", "plain"):
            raise ValueError(f"PConvUNet: kind must be 'full_channel', 'nvidia' or 'plain', got {kind!r}")
        if not 1 <= levels <= len(ENCODER_WIDTHS):
            raise ValueError(f"PConvUNet: levels must be 1 to {len(ENCODER_WIDTHS)}, got {levels}")
        self.kind = kind

        def conv(cin: int, cout: int, kernel: int, stride: int, bias: bool, decoder: bool) -> nn.Conv2d:
            args = (cin, cout, kernel, stride, kernel // 2, 1, 1, bias)
            if kind == "full_channel":
                return FullChannelPartialConv2d(*args, window_factor=window_factor)
            if kind == "nvidia":
                return NvidiaPartialConv2d(*args, multi_channel=decoder)
            return nn.Conv2d(*args)

        widths = [channels, *(width * factor for factor in ENCODER_WIDTHS[:levels])]
        self.encoder = nn.ModuleList(
            _Block(
                conv(widths[i], widths[i + 1], ENCODER_KERNELS[i], 2, bias=False, decoder=False),
                norm=i > 0,
                activation=nn.ReLU(inplace=True),
            )
            for i in range(levels)
        )
        self.decoder = nn.ModuleList(
            _Block(
                conv(widths[i + 1] + widths[i], widths[i], 3, 1, bias=i == 0, decoder=True),
                norm=i > 0,
                activation=nn.LeakyReLU(0.2, inplace=True) if i > 0 else None,
            )
            for i in reversed(range(levels))
        )

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "full_channel":
            mask = mask.expand_as(x)
        elif self.kind == "nvidia" and mask.shape[1] != 1:
            raise ValueError(f"PConvUNet: mask must have 1 channel for kind 'nvidia', got {mask.shape[1]}")
        skips: list[tuple[Tensor, Tensor]] = []
        for block in self.encoder:
            skips.append((x, mask))
            x, mask = block(x, mask)
        for block in self.decoder:
            skip, skip_mask = skips.pop()
            if self.kind != "plain":
                mask = self._join_masks(mask, x, skip_mask, skip)
            x = torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skip], dim=1)
            x, mask = block(x, mask)
        return x, mask

    def _join_masks(self, mask: Tensor, x: Tensor, skip_mask: Tensor, skip: Tensor) -> Tensor:
        """The two masks, upsampled and concatenated like the features; a one-channel mask stands for all channels."""
        if self.kind == "nvidia":
            mask = mask.expand(-1, x.shape[1], -1, -1)
            skip_mask = skip_mask.expand(-1, skip.shape[1], -1, -1)
        return torch.cat([F.interpolate(mask, scale_factor=2, mode="nearest"), skip_mask], dim=1)


class _TwoPassNorm(nn.Module):
    """One region's normalization as the published code does it: holes filled with the region's mean, then batch norm
    over everything, then the factor that takes the filled values out of the deviation again."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False, track_running_stats=False)

    def forward(self, region: Tensor, mask: Tensor) -> Tensor:  # (N, C, H, W) with 0 outside, (N, 1, H, W)
        total = region.sum((0, 2, 3))
        count = mask.sum((0, 2, 3))
        count = torch.where(count == 0, 1.0, count)
        mean = (total / count).view(1, -1, 1, 1)
        return self.norm(region + (1 - mask) * mean) * torch.sqrt(count / mask.numel()).view(1, -1, 1, 1)


class TwoPassRegionNorm2d(nn.Module):
    """Region normalization with a given mask (RN-B) as published; `weight` and `bias` as in `RegionNorm2d` with
    shared_bias=True."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _TwoPassNorm(channels)
        self.weight = nn.Parameter(torch.ones(2, channels))
        self.bias = nn.Parameter(torch.zeros(2, channels))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mask = F.interpolate(mask, x.shape[2:], mode="nearest")
        normed = self.norm(x * mask, mask) + self.norm(x * (1 - mask), 1 - mask)
        hole, valid = (w.view(1, -1, 1, 1) for w in self.weight)
        first = (normed * mask) * valid + self.bias[1].view(1, -1, 1, 1)
        return first + (normed * (1 - mask)) * hole + self.bias[0].view(1, -1, 1, 1)


class TwoPassLearnedRegionNorm2d(nn.Module):
    """Region normalization over a region that it finds itself (RN-L) as published; state-dict names as in
    `LearnedRegionNorm2d`."""

    def __init__(self, channels: int, threshold: float = 0.8) -> None:
        super().__init__()
        self.threshold = threshold
        self.norm = _TwoPassNorm(channels)
        self.map_conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.gamma_conv = nn.Conv2d(1, 1, 7, padding=3)
        self.beta_conv = nn.Conv2d(1, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        belongs = torch.sigmoid(self.map_conv(pooled))
        gamma, beta = self.gamma_conv(belongs), self.beta_conv(belongs)
        mask = (belongs.detach() >= self.threshold).to(x.dtype)
        normed = self.norm(x * mask, mask) + self.norm(x * (1 - mask), 1 - mask)
        return normed * (1 + gamma) + beta


class DenseRegionConv2d(nn.Module):
    """Region-wise convolution as published (selection at the input): mask both maps, concatenate, upsample, pad,
    convolve, ELU. `weight` and `bias` as in `RegionConv2d` with select="input"."""

    def __init__(self, existing: int, missing: int, outputs: int, upsample: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(existing + missing, outputs, 3)
        self.upsample = upsample

    def forward(self, existing: Tensor, mask: Tensor, missing: Tensor) -> Tensor:
        x = torch.cat([existing * mask, missing * (1 - mask)], 1)
        if self.upsample > 1:
            x = F.interpolate(x, scale_factor=self.upsample, mode="nearest")
        return F.elu(self.conv(F.pad(x, (1, 1, 1, 1), "reflect")))


class TwoFilterConv2d(nn.Module):
    """Region-wise convolution by the paper's equation (selection at the output): both filters everywhere, then one is
    selected. `weight` and `bias` as in `RegionConv2d`."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * outputs, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(2, outputs))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        filters = zip(self.weight.chunk(2), self.bias, strict=True)
        hole, valid = (F.conv2d(x, w, b, padding=1) for w, b in filters)
        return torch.where(mask != 0, valid, hole)


class SeparateBranches(nn.Module):
    """AOT-GAN's dilated branches as published: a padding, a convolution and a ReLU for each rate, concatenated."""

    def __init__(self, channels: int, rates: Sequence[int] = (1, 2, 4, 8)) -> None:
        super().__init__()
        self.branches = len(rates)
        for i, rate in enumerate(rates):
            conv = nn.Conv2d(channels, channels // len(rates), 3, dilation=rate)
            self.add_module(f"block{i:02d}", nn.Sequential(nn.ReflectionPad2d(rate), conv, nn.ReLU(inplace=True)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(f"block{i:02d}")(x) for i in range(self.branches)], 1)


class SeparateBranchAOTBlock(SeparateBranches):
    """AOT-GAN's block as published; the gate's normalization and the blend in eager operators. State-dict names are the
    published ones."""

    def __init__(self, channels: int, rates: Sequence[int] = (1, 2, 4, 8)) -> None:
        super().__init__(channels, rates)
        self.fuse = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3))
        self.gate = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        return published_gated_blend(x, self.fuse(super().forward(x)), self.gate(x))


def published_gated_blend(x: Tensor, f: Tensor, gate: Tensor) -> Tensor:
    """ops.gated_blend as AOT-GAN's code writes it; all (N, C, H, W)."""
    mean = gate.mean((2, 3), keepdim=True)
    std = gate.std((2, 3), keepdim=True) + 1e-9
    g = torch.sigmoid(5 * (2 * (gate - mean) / std - 1))
    return x * (1 - g) + f * g


class NonLocalBlock(nn.Module):
    """The non-local block (embedded Gaussian) as DeepGIN's code writes it: the H W x H W scores are a tensor, and so is
    their softmax. Parameters under the published names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 2
        self.g, self.theta, self.phi = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.W = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        g, theta, phi = (conv(x).flatten(2) for conv in (self.g, self.theta, self.phi))  # (N, inner, H W)
        scores = torch.bmm(theta.mT, phi)
        y = torch.bmm(F.softmax(scores, dim=-1), g.mT)
        return self.W(y.mT.unflatten(2, x.shape[2:])) + x


class CorrelationL1(nn.Module):
    """Sum of absolute differences of two maps' H W x H W Gram matrices, as the correlation loss (Ma et al. 2022, eq. 4)
    is written without thinking of memory."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x, y = a.flatten(2), b.flatten(2)
        return (torch.bmm(x.mT, x) - torch.bmm(y.mT, y)).abs().sum((1, 2))
