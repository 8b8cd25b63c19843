# SPDX-License-Identifier: Apache-2.0
"""Losses on features, and the VGG networks that make them.

A loss takes two sequences of feature maps, of the output and of the target, layer by layer.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import gram_l1
from .pixels import wide

Features = Sequence[Tensor]

# Convolutions of each block (Simonyan and Zisserman, "Very Deep Convolutional Networks", 2015, table 1: D and E).
_BLOCKS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """VGG-16's or VGG-19's feature maps: `vgg(image)` -> a list, in the order of `layers`.

    Args:
        depth: 16 or 19.
        layers: "relu<block>_<convolution>" or "pool<block>", counted from 1.
        weights: a torchvision checkpoint (.pth or .safetensors: features.0.weight and so on; what belongs to no layer
            in use is left aside). Without, the weights are random: enough to try a recipe, not to train by.

    image (N, 3, H, W) in [0, 1], normalised by ImageNet's mean and deviation inside. Parameters take no gradients; the
    features are computed in float32, or as autocast says.

    Raises:
        ValueError: an unknown depth or layer, or weights that do not fit.

    >>> import torch
    >>> from fused_inpaint.losses import VGG
    >>> [tuple(f.shape) for f in VGG(16, ("relu1_1", "pool2"))(torch.rand(1, 3, 16, 16))]
    [(1, 64, 16, 16), (1, 128, 4, 4)]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, depth: int, layers: Sequence[str], weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        if depth not in _BLOCKS:
            raise ValueError(f"VGG: depth must be 16 or 19, got {depth}")
        built, places = _layers(_BLOCKS[depth])
        unknown = [name for name in layers if name not in places]
        if unknown or not layers:
            raise ValueError(f"VGG: layers must be of {', '.join(places)}, got {', '.join(unknown) or 'none'}")
        self.taken = [places[name] for name in layers]
        self.features = nn.Sequential(*built[: max(self.taken) + 1])
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1), persistent=False)
        if weights is not None:
            self._load(weights)
        self.requires_grad_(False).eval()

    def _load(self, path: str | os.PathLike[str]) -> None:
        own = self.state_dict()
        try:
            if Path(path).suffix == ".safetensors":
                from safetensors.torch import load_file

                state = load_file(os.fspath(path))
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
            missing = [name for name in own if name not in state or state[name].shape != own[name].shape]
        except FileNotFoundError:
            raise ValueError(f"VGG: weights must be an existing file, got {path}") from None
        except Exception as error:  # whatever the readers raise, the cause stays attached
            raise ValueError(f"VGG: weights must be a checkpoint of nothing but tensors, got {path}") from error
        if missing:
            raise ValueError(f"VGG: weights must be torchvision's, got none of this shape for {missing[0]} in {path}")
        self.load_state_dict({name: state[name] for name in own})

    def forward(self, image: Tensor) -> list[Tensor]:
        x = ((image - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        found: dict[int, Tensor] = {}
        for at, layer in enumerate(self.features):
            x = layer(x)
            if at in self.taken:
                found[at] = x
        return [found[at] for at in self.taken]


def _layers(blocks: Sequence[int]) -> tuple[list[nn.Module], dict[str, int]]:
    """Modules at torchvision's places, and the place of each named map."""
    built: list[nn.Module] = []
    places: dict[str, int] = {}
    channels = 3
    for block, convolutions in enumerate(blocks):
        for number in range(convolutions):
            width = 64 * 2 ** min(block, 3)
            # Not in place: a map that a loss takes must stay.
            built += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
            places[f"relu{block + 1}_{number + 1}"] = len(built) - 1
        built.append(nn.MaxPool2d(2))
        places[f"pool{block + 1}"] = len(built) - 1
    return built, places


def perceptual(output: Features, target: Features) -> Tensor:
    """Mean absolute difference of each layer, summed over the layers (Liu et al. 2018, eq. 3; Zeng et al. 2021).

    >>> import torch
    >>> from fused_inpaint import losses
    >>> losses.perceptual([torch.ones(1, 2, 3, 3)] * 2, [torch.zeros(1, 2, 3, 3)] * 2).item()
    2.0
    """
    return _over_layers(output, target, lambda a, b: F.l1_loss(wide(a), wide(b)))


def style(output: Features, target: Features, reduction: str = "mean") -> Tensor:
    """Absolute difference of the Gram matrices over C H W, summed over the layers.

    reduction: "mean" over a matrix's entries and the batch (Liu et al. 2018, eq. 4 and 5; DeepGIN; AOT-GAN), "sum"
    (Ma et al. 2022, eq. 5). Products and sums are in float32, also under autocast, where half types would overflow.

    >>> import torch
    >>> from fused_inpaint import losses
    >>> losses.style([torch.ones(1, 2, 3, 3)], [torch.zeros(1, 2, 3, 3)]).item()
    0.5
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"style: reduction must be mean or sum, got {reduction}")

    def layer(a: Tensor, b: Tensor) -> Tensor:
        sums = gram_l1(a, b, normalise=1 / a[0].numel())
        return sums.sum() if reduction == "sum" else sums.mean() / a.size(1) ** 2

    return _over_layers(output, target, layer)


def correlation(output: Tensor, target: Tensor) -> Tensor:
    """Sum of the absolute differences of the n x n Gram matrices over positions, over C squared (Ma et al. 2022, eq. 4
    as published in code); no n x n matrix is ever in memory.

    >>> import torch
    >>> from fused_inpaint import losses
    >>> losses.correlation(torch.ones(1, 2, 1, 3), torch.zeros(1, 2, 1, 3)).item()
    4.5
    """
    return gram_l1(output, target, over="positions", normalise=1 / output.size(1) ** 2).sum()


def _over_layers(output: Features, target: Features, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    if len(output) != len(target) or not output:
        raise ValueError(
            f"losses: features must be of the same layers, at least one, got {len(output)} and {len(target)}"
        )
    return torch.stack([loss(a, b) for a, b in zip(output, target, strict=True)]).sum()
