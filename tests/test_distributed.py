# SPDX-License-Identifier: Apache-2.0
"""Data-parallel training of a network of partial convolutions equals one process on the joined batch."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import assert_close
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_inpaint import _backends
from fused_inpaint.models import build_model

STEPS, EACH = 2, 2
NCCL = torch.cuda.is_available() and dist.is_nccl_available() and not _backends.status()["cuda"]


def network(device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    # Batch norm by fixed statistics, which are no function of the batch; its gain and shift are trained.
    return build_model("pconv", levels=2, width=8).net.to(device, dtype).eval()


def batch(step: int, size: int) -> tuple[Tensor, Tensor]:
    """(size, 3, 24, 20) and (size, 1, 24, 20); every picture has another hole, the last one no valid pixel at all."""
    g = torch.Generator().manual_seed(step)
    x, mask = torch.randn(size, 3, 24, 20, generator=g), torch.ones(size, 1, 24, 20)
    for i in range(size):
        mask[i, :, 2 : 8 + 4 * i, 3 : 9 + 2 * i] = 0
    mask[-1] = 0
    return x, mask


def train(net: nn.Module, share: slice, size: int) -> None:
    p = next(net.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        x, mask = (t[share].to(p.device, p.dtype) for t in batch(step, size))
        optimizer.zero_grad()
        y, _ = net(x, mask)
        (y - 0.5).square().mean().backward()
        optimizer.step()


def worker(rank: int, world: int, backend: str, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(minutes=2))
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
            torch.backends.cudnn.allow_tf32 = False
            net = network(torch.device("cuda", rank), torch.float32)
            parallel = DistributedDataParallel(net, device_ids=[rank], gradient_as_bucket_view=True)
        else:
            net = network(torch.device("cpu"), torch.float64)
            parallel = DistributedDataParallel(net, gradient_as_bucket_view=True)
        train(parallel, slice(rank * EACH, (rank + 1) * EACH), world * EACH)
        torch.save({name: t.cpu() for name, t in net.state_dict().items()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.parametrize(
    "backend",
    ["gloo", pytest.param("nccl", marks=pytest.mark.skipif(not NCCL, reason="no GPU, kernels for it, or NCCL"))],
)
def test_equals_one_process(backend: str, tmp_path: Path) -> None:
    world = 2 if backend == "gloo" else min(2, torch.cuda.device_count())
    torch.multiprocessing.spawn(worker, (world, backend, str(tmp_path)), nprocs=world)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]

    device, dtype = (torch.device("cpu"), torch.float64) if backend == "gloo" else (torch.device("cuda"), torch.float32)
    net = network(device, dtype)
    start = {name: t.detach().clone() for name, t in net.named_parameters()}
    former = torch.backends.cudnn.conv.fp32_precision == "tf32"
    torch.backends.cudnn.allow_tf32 = False
    train(net, slice(None), world * EACH)
    torch.backends.cudnn.allow_tf32 = former
    for name, expected in net.state_dict().items():
        for state in states:
            assert torch.equal(state[name], states[0][name]), f"{name} differs between the processes"
        assert_close(states[0][name], expected, 1e-10 if dtype == torch.float64 else 1e-4, what=name)
    assert all(not torch.equal(p, start[name]) for name, p in net.named_parameters())
