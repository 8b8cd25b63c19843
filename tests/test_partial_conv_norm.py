# SPDX-License-Identifier: Apache-2.0
"""The running statistics of a batch norm inside a partial convolution."""

import pytest
import torch
from cases import OPERATORS, assert_close, named, sample
from torch import Tensor

from fused_inpaint import _backends, ops

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


@pytest.mark.parametrize(
    "dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-9)], ids=str
)
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("name", ["eval", "eval_relu", "frozen", "up_eval_folded", "up_eval_direct"])
def test_fixed_statistics_in_inference(
    backend: str, device: torch.device, name: str, strided: bool, dtype: torch.dtype, rtol: float
) -> None:
    """Without gradients they go into the layer's operator; the call with gradients works them out before."""
    s = sample(named(name), dtype, device)
    assert s.norm is not None and s.masks is not None
    if strided:
        s.norm = s.norm._replace(running_mean=torch.stack([s.norm.running_mean] * 2, 1)[:, 0])
    geometry = (s.case.kernel, s.case.stride, s.case.padding, s.case.dilation)
    window = ops.partial_window(s.masks, s.case.channels, *geometry, upsample=s.case.upsample)
    expected, _ = s(window=window)
    assert expected.requires_grad
    with torch.no_grad(), torch.profiler.profile() as profile:
        y, _ = s(window=window)
    assert_close(y, expected, rtol)
    entered = [event.name for event in profile.events() if event.name.startswith("fused_inpaint::")]
    if backend in ("cpu", "cuda_vendor"):
        assert entered == ["fused_inpaint::partial_conv2d_normed"]


@OPERATORS
@pytest.mark.parametrize("name", ["plain", "up_folded", "shared_mask", "empty_batch"])
def test_normed_operator(backend: str, device: torch.device, name: str) -> None:
    if not _backends.native(device.type):
        pytest.skip("Triton alone has no kernel for it")
    s = sample(named(name), device=device, nan=False)
    assert s.masks is not None
    geometry = (s.case.kernel, s.case.stride, s.case.padding, s.case.dilation)
    window = ops.partial_window(s.masks, s.case.channels, *geometry, upsample=s.case.upsample)
    norm = [torch.rand(s.case.outputs, device=device) + 0.5 for _ in range(4)]
    rest = (list(s.case.upsample), *map(list, geometry[1:]), s.case.groups, [0] * len(s.x), "relu", 0.0, 4096, None)
    given = ([x.detach() for x in s.x], list(window.planes), window.counts, s.weight.detach(), *norm, 1e-5, *rest)
    torch.library.opcheck(torch.ops.fused_inpaint.partial_conv2d_normed, given)
    given[3].requires_grad_()
    with pytest.raises(RuntimeError, match="partial_conv2d_normed: grad mode must be off, got a backward"):
        torch.ops.fused_inpaint.partial_conv2d_normed(*given).sum().backward()
    with pytest.raises(RuntimeError, match="norm_constants: weight, bias, mean and var must be contiguous, of one"):
        torch.ops.fused_inpaint.partial_conv2d_normed(*given[:6], norm[2].double(), *given[7:])


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
