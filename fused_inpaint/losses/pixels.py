# SPDX-License-Identifier: Apache-2.0
"""Losses on pixels. Means are in float32 at least, also under autocast."""

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def composite(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The target's valid pixels and the output's holes.

    >>> import torch
    >>> from fused_inpaint import losses
    >>> losses.composite(torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.tensor([[[[1.0, 0.0]]]])).tolist()
    [[[[1.0, 0.0]]]]
    """
    return torch.where(mask.bool(), target, output)


def valid_and_hole_l1(output: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Absolute difference over valid and over hole pixels, each divided by the number of all values (Liu et al. 2018,
    eq. 3; the batch's mean).

    >>> import torch
    >>> from fused_inpaint import losses
    >>> mask = torch.tensor([[[[1.0, 0.0]]]])
    >>> valid, hole = losses.valid_and_hole_l1(torch.ones(1, 3, 1, 2), torch.zeros(1, 3, 1, 2), mask)
    >>> valid.item(), hole.item()
    (0.5, 0.5)
    """
    difference = (wide(output) - wide(target)).abs()
    inside = mask.bool()
    return torch.where(inside, difference, 0).mean(), torch.where(inside, 0, difference).mean()


def total_variation(image: Tensor, power: int = 1) -> Tensor:
    """Mean absolute (power 1) or squared (power 2) difference of neighbours, across and down, added.

    Power 1 on the composite is what the common port of Liu et al. does; twice power 2 is DeepGIN's. An axis of one
    pixel adds nothing.

    >>> import torch
    >>> from fused_inpaint import losses
    >>> losses.total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])).item()
    1.0
    """
    v = wide(image)
    steps = [v[:, :, 1:] - v[:, :, :-1], v[..., 1:] - v[..., :-1]]
    found = [step.abs().pow(power).mean() for step in steps if step.numel()]
    return torch.stack(found).sum() if found else v.sum() * 0


def total_variation_of_hole(image: Tensor, mask: Tensor) -> Tensor:
    """Absolute difference of neighbours that both lie in the hole grown by one pixel, divided by the number of values
    (Liu et al. 2018, eq. 6, on the composite).

    >>> import torch
    >>> from fused_inpaint import losses
    >>> image = torch.tensor([0.0, 0.0, 1.0, 5.0]).view(1, 1, 1, 4)
    >>> losses.total_variation_of_hole(image, torch.tensor([0.0, 1.0, 1.0, 1.0]).view(1, 1, 1, 4)).item()
    0.0
    """
    v = wide(image)
    hole = F.max_pool2d((mask == 0).to(v.dtype), 3, 1, 1) > 0
    total = v.new_zeros(())
    for axis in (2, 3):
        size = v.size(axis) - 1
        both = hole.narrow(axis, 0, size) & hole.narrow(axis, 1, size)
        step = v.narrow(axis, 1, size) - v.narrow(axis, 0, size)
        total = total + torch.where(both, step, 0).abs().sum()
    return total / v.numel()
