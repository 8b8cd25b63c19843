# SPDX-License-Identifier: Apache-2.0
"""The running statistics of a batch norm inside a partial convolution."""

import pytest
import torch
from cases import OPERATORS, assert_close, named, sample
from torch import Tensor

from fused_inpaint import _backends

TRAIN = named("train")


def moved(device: torch.device, momentum: float | Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """running_mean and running_var after one call, from the same start."""
    s = sample(TRAIN, device=device)
    assert s.norm is not None
    running = [torch.linspace(0, 1, t.numel(), device=device).to(dtype) for t in s.norm[2:4]]
    s.norm = s.norm._replace(running_mean=running[0], running_var=running[1], momentum=momentum)
    s()
    return running


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.75, 1.0])
def test_momentum(backend: str, device: torch.device, momentum: float) -> None:
    """All the way to the batch's statistics with momentum 1, and that share of it with another."""
    start, end = moved(device, 0.0), moved(device, 1.0)
    for before, after, value in zip(start, end, moved(device, momentum), strict=True):
        assert_close(value, torch.lerp(before.double(), after.double(), momentum), 1e-6)
        assert not torch.equal(before, after)


def test_momentum_of_a_tensor(backend: str, device: torch.device) -> None:
    """A cumulative average's momentum is a tensor."""
    for a, b in zip(moved(device, torch.tensor(0.25, device=device)), moved(device, 0.25), strict=True):
        assert_close(a, b, 1e-6)


def test_statistics_of_another_dtype(backend: str, device: torch.device) -> None:
    for narrow, wide in zip(moved(device, 0.1, torch.float64), moved(device, 0.1), strict=True):
        assert narrow.dtype == torch.float64
        assert_close(wide, narrow, 1e-6)


def test_a_graph_that_needs_the_former_statistics_is_refused(backend: str, device: torch.device) -> None:
    """Statistics that move under a graph that was built on them."""
    s = sample(TRAIN, device=device)
    assert s.norm is not None and s.norm.running_var is not None
    gain = torch.ones_like(s.norm.running_var, requires_grad=True)
    loss = (gain * s.norm.running_var).sum()
    s()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@OPERATORS
def test_operator(backend: str, device: torch.device) -> None:
    if not _backends.native(device.type):
        pytest.skip("Triton alone has no kernel for it")
    track = torch.ops.fused_inpaint.norm_track
    statistics = [torch.rand(5, device=device) for _ in range(4)]
    torch.library.opcheck(track, (*statistics, 0.1, 1.25))
    empty = [t[:0] for t in statistics]
    track(*empty, 0.1, 1.25)
    for i in range(4):
        for wrong in (statistics[i][:4], statistics[i].double(), torch.rand(10, device=device)[::2]):
            with pytest.raises(RuntimeError, match="norm_track: running and batch statistics must be contiguous"):
                track(*statistics[:i], wrong, *statistics[i + 1 :], 0.1, 1.25)
