# SPDX-License-Identifier: Apache-2.0
"""Statistics joined over the processes of a group, in the order of their ranks."""

from collections.abc import Callable

import torch
from torch import Tensor

# Operators take strings, not process groups.
_groups: dict[str, "torch.distributed.ProcessGroup"] = {}


def named(group: "torch.distributed.ProcessGroup | None") -> str:
    """The name under which operators know a group; empty for none."""
    if group is None:
        return ""
    _groups[group.group_name] = group
    return group.group_name


def gathered(t: Tensor, group: str) -> Tensor:
    """(processes, *t.shape)"""
    world = torch.distributed.get_world_size(_groups[group])
    parts = [torch.empty_like(t) for _ in range(world)]
    torch.distributed.all_gather(parts, t.contiguous(), group=_groups[group])
    return torch.stack(parts)


def summed(t: Tensor, group: str) -> Tensor:
    """First to last, so that the sum is the same on every process and in every run."""
    return gathered(t, group).sum(0) if group else t


def joined(count: Tensor, mean: Tensor, m2: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of the joined values, by Chan's rule."""
    if not group:
        return count, mean, m2
    counts, means, m2s = (gathered(t, group) for t in (count, mean, m2))
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp(min=1)
    return count, mean, (m2s + counts * (means - mean).square()).sum(0)


def differentiable_sum(group: str) -> Callable[[Tensor], Tensor]:
    if not group:
        return lambda t: t
    from torch.distributed.nn.functional import all_reduce

    return lambda t: all_reduce(t, group=_groups[group])
