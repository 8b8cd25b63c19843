# SPDX-License-Identifier: Apache-2.0
"""Draws docs/conventions.png: one image, its mask as tensor and as file, and the mask after a convolution.

python scripts/draw_conventions.py [FILE]
"""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from torch import Tensor

from fused_inpaint import ops

SIDE = 10
INK, HOLE = "#1a1a1a", "#c0392b"


def scene() -> tuple[Tensor, Tensor]:
    """Image (1, 1, H, W) in [0, 1] and its mask, a square hole and a scratch."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, SIDE), torch.linspace(0, 1, SIDE), indexing="ij")
    image = (0.25 + 0.5 * columns + 0.25 * torch.sin(6 * rows))[None, None].clamp(0, 1)
    mask = torch.ones(1, 1, SIDE, SIDE)
    mask[..., 2:7, 3:8] = 0
    mask[..., 8, 1:6] = 0
    return image, mask


def show(ax: Axes, values: Tensor, title: str, numbers: str = "") -> None:
    """One plane (1, 1, H, W), 0 black and 1 white, with its numbers in a format if one is given."""
    plane = values[0, 0]
    ax.imshow(plane, cmap="gray", vmin=0, vmax=1)
    ax.set_title(title, fontsize=10, color=INK)
    ax.set_xticks([])
    ax.set_yticks([])
    for row, column in torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).tolist() if numbers else []:
        value = plane[row, column].item()
        color = INK if value > 0.5 else "white"
        ax.text(column, row, format(value, numbers), ha="center", va="center", fontsize=7, color=color)


def main(path: Path) -> None:
    from matplotlib import pyplot

    image, mask = scene()
    window = ops.partial_window(mask, channels=1, kernel_size=3, padding=1)
    figure, axes = pyplot.subplots(1, 5, figsize=(12, 2.9), layout="constrained")
    show(axes[0], image, "image\nfloat, 0 to 1", numbers=".1f")
    show(axes[1], mask, "mask tensor\n1 = valid, 0 = hole", numbers=".0f")
    show(axes[2], 1 - mask, "mask file\nwhite = hole")
    show(axes[3], image, "what a layer reads\nred: never, it may be NaN")
    axes[3].imshow(mask[0, 0] == 0, cmap=matplotlib.colors.ListedColormap(["#ffffff00", HOLE]))
    show(axes[4], window.mask.float(), "its new mask, kernel 3 x 3\n1 = a valid pixel in the window", numbers=".0f")
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    matplotlib.use("agg")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "conventions.png")
