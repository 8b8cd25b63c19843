# SPDX-License-Identifier: Apache-2.0
"""What all networks share: one convention outside (mask 1 = valid, image [0, 1], any size), the paper's own inside."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import read_safetensors, write_safetensors
from .large import STRATEGIES, Bounds, Progress


class Prediction(NamedTuple):
    """What a network of one output returns."""

    image: Tensor  # (N, C, H, W), in the [0, 1] range
    mask: Tensor  # (N or 1, 1, H, W) uint8, where the prediction is defined: all ones unless a hole was never reached


class Saved(nn.Module):
    """What can be written to a file with the arguments that built it, and read back."""

    key: str
    part: str
    variant: str | None = None  # where networks of several forms share a key
    net: nn.Module

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the weights and the configuration: to a .safetensors file, or to model.safetensors in a folder, which
        is made."""
        file = _file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {"key": self.key, "part": self.part, "config": self.config}
        write_safetensors(file, self.net.state_dict(), about)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Any:
        """The network of this class that `save_pretrained` wrote, in eval mode.

        Raises:
            ValueError: a file that is none, or another network's.
        """
        try:
            state, about = read_safetensors(_file(path))
        except Exception as error:  # whatever safetensors raises, the cause stays attached
            raise ValueError(f"from_pretrained: path must hold a readable .safetensors file, got {path}") from error
        config = dict(about.get("config", {}))
        found = (about.get("key"), about.get("part"), config.pop("variant", None))
        if found != (cls.key, cls.part, cls.variant):
            got = " ".join(filter(None, found)) or "a file that this library did not write"
            expected = " ".join(filter(None, (cls.key, cls.part, cls.variant)))
            raise ValueError(f"from_pretrained: path must hold a {expected}, got {got}: {path}")
        model = cls(**config)
        model.net.load_state_dict(state)
        dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
        return model.to(dtype).eval()


def _file(path: str | os.PathLike[str]) -> Path:
    return Path(path) if Path(path).suffix == ".safetensors" else Path(path) / "model.safetensors"


class Normalization(nn.Module):
    """Images to mean 0 and deviation 1 by channel: ImageNet's, or 1/2 and 1/4 where there are not 3 channels.

    The constants are no part of a checkpoint, and so there whatever is done to a network: never on the meta device,
    from which nothing would bring them, and filled again after `to_empty`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        known = channels == 3
        self._mean = (0.485, 0.456, 0.406) if known else (0.5,) * channels
        self._std = (0.229, 0.224, 0.225) if known else (0.25,) * channels
        self._fill(torch.tensor(0.0))

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.mean.to(image)) / self.std.to(image)

    def inverse(self, x: Tensor) -> Tensor:
        return x * self.std.to(x) + self.mean.to(x)

    def _fill(self, like: Tensor) -> None:
        device = torch.device("cpu") if like.is_meta else like.device
        for name, values in (("mean", self._mean), ("std", self._std)):
            value = torch.tensor(values, dtype=like.dtype, device=device).view(1, -1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Normalization":
        super()._apply(fn, recurse)
        self._fill(self.mean)
        return self


class InpaintingModel(Saved):
    """A network under the library's convention.

    `model(image, mask)` takes an image (N, C, H, W), float in [0, 1], and a mask (N or 1, 1 or C, H, W), 1 = valid and
    0 = hole, of any size, and returns a named tuple of predictions with `.image` the final one. What the image holds
    under the mask's zeros is never read. Predictions leave training unclamped, for the losses, and are clamped to
    [0, 1] in eval mode. `model.inpaint(image, mask)` keeps the known pixels, bit for bit, and fills the holes.
    `model.net` is the bare network, called as the published one is, in its own range and mask polarity. `model.config`
    are the arguments that built it.

    Subclasses set `key`, `channels`, `multiple` (of what the sides must be) and `_predict`.
    """

    part = "generator"
    channels: int
    multiple: int

    def _predict(self, image: Tensor, mask: Tensor) -> Any:
        raise NotImplementedError

    def inpaint(
        self,
        image: Tensor,
        mask: Tensor,
        strategy: str = "whole",
        *,
        size: int = 512,
        overlap: int = 64,
        progress: Progress = lambda fraction, text: None,
    ) -> Tensor:
        """The image with its holes filled, (N, C, H, W) in [0, 1]; known pixels are the input's own bits.

        Whatever the image holds under the mask's zeros is never read. Gradients do not flow; batch norm uses its
        running statistics.

        Args:
            strategy: for images larger than the network was trained for, or than memory takes at once: "whole";
                "resize" (shrunk to `size`, the fill enlarged again); "tile" (tiles of `size` that fade into each other
                over `overlap` pixels); "crop" (each group of holes with `overlap` pixels around it, shrunk to `size` if
                larger); "subsample" (every k-th pixel an image of its own of at most `size`, DeepGIN's way).
            size, overlap: pixels.
            progress: called with the share that is done and a word for it.

        Raises:
            ValueError: an image or mask of wrong size, or an unknown strategy.

        >>> import torch, fused_inpaint
        >>> model = fused_inpaint.models.build_model("pconv", levels=3, width=8)
        >>> image, mask = torch.rand(1, 3, 19, 21), (torch.rand(1, 1, 19, 21) > 0.3).float()
        >>> bool((model.inpaint(image, mask) == image)[mask.expand_as(image) == 1].all())
        True
        """
        if strategy not in STRATEGIES:
            raise ValueError(f"{self.key}: strategy must be one of {', '.join(STRATEGIES)}, got {strategy}")
        if size < 8 or overlap < 0:
            raise ValueError(f"{self.key}: size must be 8 or more and overlap 0 or more, got {size} and {overlap}")
        check_image(self.key, image, mask, self.channels)
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                if strategy == "whole":
                    filled = self._fill(image, mask)
                else:
                    known = torch.where(mask.bool(), image, 0)
                    valid = (~shared_hole(mask)).to(image.dtype).expand(image.size(0), -1, -1, -1)
                    filled = STRATEGIES[strategy](self._fill, known, valid, Bounds(size, overlap, progress))
        finally:
            for module, mode in modes:
                module.training = mode
        return torch.where(mask.bool(), image, filled.clamp(0, 1))

    def _fill(self, image: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self(image, mask).image
        return found.clamp(0, 1).to(image.dtype)

    def forward(self, image: Tensor, mask: Tensor) -> Any:
        check_image(self.key, image, mask, self.channels)
        return self._predict(image, mask)

    def _ranged(self, image: Tensor) -> Tensor:
        """A prediction as `forward` returns it."""
        return image if self.training else image.clamp(0, 1)


class Discriminator(Saved):
    """A network that tells photos from filled ones, under the library's convention.

    `discriminator(image, mask, given=None)`: image (N, C, H, W) in [0, 1] real or filled, mask as for `InpaintingModel`
    (1 = valid), `given` the photo that was to be filled, of which only valid pixels are read (`image` itself when
    None). Returns raw scores, no sigmoid: a map, or a list of maps from the finest scale on. `.net` is the bare
    network, called as the published one is.

    Subclasses set `key`, `channels` and `_score`.
    """

    part = "discriminator"
    channels: int

    def _score(self, image: Tensor, mask: Tensor, given: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, image: Tensor, mask: Tensor, given: Tensor | None = None) -> Any:
        given = image if given is None else given
        for picture in (image, given):
            check_image(self.key, picture, mask, self.channels)
        return self._score(image, mask, given)


def check_image(key: str, image: Tensor, mask: Tensor, channels: int) -> None:
    if image.dim() != 4 or not image.is_floating_point():
        raise ValueError(f"{key}: image must be (N, C, H, W) float, got {tuple(image.shape)} {image.dtype}")
    n, c, h, w = image.shape
    if c != channels:
        raise ValueError(f"{key}: image must have {channels} channels, got {tuple(image.shape)}")
    if h == 0 or w == 0:
        raise ValueError(f"{key}: image must have at least one pixel, got {tuple(image.shape)}")
    if mask.dim() != 4 or mask.shape[2:] != image.shape[2:] or mask.size(0) not in (1, n) or mask.size(1) not in (1, c):
        raise ValueError(f"{key}: mask must be ({n}, 1, {h}, {w}) or ({n}, {c}, {h}, {w}), got {tuple(mask.shape)}")


class Padded(NamedTuple):
    """An image of sides that a network takes, its mask, and where in it the given one lies."""

    image: Tensor  # (N, C, H', W'), 0 where added
    mask: Tensor  # (N or 1, 1 or C, H', W') as given, 0 (hole) where added
    window: tuple[slice, slice, slice, slice]


def pad_as_hole(image: Tensor, mask: Tensor, multiple: int, least: int = 1) -> Padded:
    """Pad both, alike on either side, with hole, to sides that are a multiple of `multiple` and at least `least`."""
    height, width = image.shape[2:]
    (top, bottom), (left, right) = (_around(size, multiple, least) for size in (height, width))
    around = (left, right, top, bottom)
    if any(around):
        image, mask = F.pad(image, around), F.pad(mask, around)
    everything = slice(None)
    return Padded(image, mask, (everything, everything, slice(top, top + height), slice(left, left + width)))


def _around(size: int, multiple: int, least: int) -> tuple[int, int]:
    """(before, after) that bring a side to what a network takes."""
    missing = -(-max(size, least) // multiple) * multiple - size
    return missing // 2, missing - missing // 2


def shared_hole(mask: Tensor) -> Tensor:
    """(N or 1, 1, H, W) bool, true in holes, for networks with one mask plane: a hole where any channel has one."""
    return (mask == 0).any(1, keepdim=True)
