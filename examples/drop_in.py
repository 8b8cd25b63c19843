# SPDX-License-Identifier: Apache-2.0
"""Put partial convolutions into a U-Net that somebody else wrote, and keep its checkpoint.

    python examples/drop_in.py

`PlainUNet` stands for the foreign network. `MaskedUNet` differs from it in its layers and in the mask that it hands on;
names and shapes of the parameters stay, so that weights of the plain network can be loaded.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_inpaint import PartialConv2d, PartialUpConv2d, losses, masks


class PlainUNet(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enc1 = nn.Conv2d(3, width, 5, stride=2, padding=2)
        self.enc2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.enc3 = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.dec3 = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
        self.dec2 = nn.Conv2d(3 * width, width, 3, padding=1)
        self.dec1 = nn.Conv2d(width + 3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W), sides multiples of 8
        x1 = F.relu(self.enc1(x))
        x2 = F.relu(self.enc2(x1))
        x3 = F.relu(self.enc3(x2))
        y = F.relu(self.dec3(torch.cat([F.interpolate(x3, scale_factor=2), x2], 1)))
        y = F.relu(self.dec2(torch.cat([F.interpolate(y, scale_factor=2), x1], 1)))
        return self.dec1(torch.cat([F.interpolate(y, scale_factor=2), x], 1))


class MaskedUNet(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enc1 = PartialConv2d(3, width, 5, stride=2, padding=2, return_mask=True)
        self.enc2 = PartialConv2d(width, 2 * width, 3, stride=2, padding=1, return_mask=True)
        self.enc3 = PartialConv2d(2 * width, 2 * width, 3, stride=2, padding=1, return_mask=True)
        # Upsampling, concatenation and convolution in one layer; the weight's input channels are in the same order.
        self.dec3 = PartialUpConv2d(2 * width, 2 * width, 2 * width)
        self.dec2 = PartialUpConv2d(2 * width, width, width)
        self.dec1 = PartialUpConv2d(width, 3, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (N, 3, H, W), (N, 1, H, W): 1 = valid
        x1, m1 = self.enc1(x, mask)
        x1 = F.relu(x1)
        x2, m2 = self.enc2(x1, m1)
        x2 = F.relu(x2)
        x3, m3 = self.enc3(x2, m2)
        y, m = self.dec3(F.relu(x3), m3, x2, m2)
        y, m = self.dec2(F.relu(y), m, x1, m1)
        y, m = self.dec1(F.relu(y), m, x, mask)
        return y


def pictures(count: int, side: int) -> Tensor:
    """(N, 3, side, side) in [0, 1]: smooth random colours."""
    return F.interpolate(torch.rand(count, 3, 5, 5), (side, side), mode="bicubic", align_corners=False).clamp(0, 1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--side", type=int, default=64, help="pixels, a multiple of 8")
    arguments = parser.parse_args(argv)
    if arguments.side < 8 or arguments.side % 8:
        parser.error(f"--side must be a multiple of 8, got {arguments.side}")
    torch.manual_seed(0)

    plain, masked = PlainUNet(), MaskedUNet()
    masked.load_state_dict(plain.state_dict())
    x = pictures(2, arguments.side)
    with torch.no_grad():
        apart = (plain(x) - masked(x, torch.ones(2, 1, arguments.side, arguments.side))).abs()
    middle = arguments.side // 2
    print(
        f"the plain network's weights fit; without holes the outputs differ by {apart[..., middle, middle].max():.0e}"
    )
    print(f"in the middle and by {apart.max():.0e} at the border, where zero padding counts as hole")

    optimiser = torch.optim.Adam(masked.parameters(), 1e-3)
    supply = masks.Masks("irregular", arguments.side, seed=1)
    history = []
    for step in range(arguments.steps):
        x = pictures(4, arguments.side)
        mask = torch.stack([supply[4 * step + i] for i in range(4)])
        valid, hole = losses.valid_and_hole_l1(masked(x, mask), x, mask)
        optimiser.zero_grad()
        (valid + 6 * hole).backward()
        optimiser.step()
        history.append((valid + 6 * hole).item())
    tenth = max(len(history) // 10, 1)
    print(f"loss {sum(history[:tenth]) / tenth:.3f} at first, {sum(history[-tenth:]) / tenth:.3f} at last")

    # Holes are selected away, not multiplied: what lies under them, NaN too, is never read.
    with torch.no_grad():
        same = torch.equal(masked(x, mask), masked(x.masked_fill(mask == 0, torch.nan), mask))
    print(f"NaN under the holes changes the output: {'no' if same else 'yes'}")


if __name__ == "__main__":
    main()
