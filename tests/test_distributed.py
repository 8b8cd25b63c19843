# SPDX-License-Identifier: Apache-2.0
"""Several processes equal one on the joined batch: data-parallel training, also with sharded parameters, and region
normalization that joins its statistics."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import assert_close
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_inpaint import _backends, ops, use_backend
from fused_inpaint.models import build_model

STEPS, EACH = 2, 2
NCCL = torch.cuda.device_count() > 1 and dist.is_nccl_available() and not _backends.status()["cuda"]


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


def distributed(net: nn.Module, device: torch.device, sharded: bool) -> nn.Module:
    if not sharded:
        ids = None if device.type == "cpu" else [device.index]
        return DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    net.to(memory_format=torch.contiguous_format)  # it takes no parameter in channels_last
    for block in (*net.encoder, *net.decoder):
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def worker(rank: int, world: int, backend: str, sharded: bool, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(minutes=2))
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
            torch.backends.cudnn.allow_tf32 = False
            device, dtype = torch.device("cuda", rank), torch.float32
        else:
            device, dtype = torch.device("cpu"), torch.float64
        net = network(device, dtype)
        train(distributed(net, device, sharded), slice(rank * EACH, (rank + 1) * EACH), world * EACH)
        whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in net.state_dict().items()}
        torch.save({name: t.cpu() for name, t in whole.items()}, f"{folder}/{rank}.pt")
        dist.barrier()  # Gloo aborts a process whose peer leaves while it is still taking that peer's connection.
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.parametrize(
    "backend",
    [
        "gloo",
        pytest.param(
            "nccl", marks=pytest.mark.skipif(not NCCL, reason="fewer than two GPUs, or no kernels for them, or no NCCL")
        ),
    ],
)
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_equals_one_process(backend: str, sharded: bool, tmp_path: Path) -> None:
    world = 2
    torch.multiprocessing.spawn(worker, (world, backend, sharded, str(tmp_path)), nprocs=world)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]

    device, dtype = (torch.device("cpu"), torch.float64) if backend == "gloo" else (torch.device("cuda"), torch.float32)
    net = network(device, dtype)
    start = {name: t.detach().clone() for name, t in net.named_parameters()}
    train(net, slice(None), world * EACH)
    for name, expected in net.state_dict().items():
        for state in states:
            assert torch.equal(state[name], states[0][name]), f"{name} differs between the processes"
        assert_close(states[0][name], expected, 1e-10 if dtype == torch.float64 else 1e-4, what=name)
    assert all(not torch.equal(p, start[name]) for name, p in net.named_parameters())


def region_sample() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x, mask, weight, bias, gradient of y) of four pictures; the first one is all hole."""
    g = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(4, 6, 9, 7, generator=g, dtype=torch.float64) for _ in range(2))
    mask = (torch.rand(4, 1, 9, 7, generator=g) > 0.4).to(torch.uint8)
    mask[0] = 0
    weight, bias = (torch.randn(2, 6, generator=g, dtype=torch.float64) for _ in range(2))
    return 3 + 2 * x, mask, weight, bias, grad


def normalise(share: slice, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    x, mask, weight, bias, grad = region_sample()
    x, weight, bias = (t.requires_grad_() for t in (x[share].clone(), weight, bias))
    y = ops.region_norm(x, mask[share], weight, bias, activation="leaky_relu", process_group=group)
    y.backward(grad[share])
    return {"y": y.detach(), "x": x.grad, "weight": weight.grad, "bias": bias.grad}


SHARES = (slice(0, 1), slice(1, 1), slice(1, 4))


def norm_worker(rank: int, world: int, backend: str, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(minutes=2))
    try:
        with use_backend(backend):
            torch.save(normalise(SHARES[rank], dist.group.WORLD), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_region_norm_joins_its_statistics(backend: str, tmp_path: Path) -> None:
    """Over shares of different sizes, one without a pixel of one region, and one without a picture."""
    if reason := _backends.status()[backend]:
        pytest.skip(reason)
    torch.multiprocessing.spawn(norm_worker, (len(SHARES), backend, str(tmp_path)), nprocs=len(SHARES))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(SHARES))]
    with use_backend("reference"):
        expected, apart = normalise(slice(None), None), normalise(SHARES[-1], None)
    for name in ("y", "x"):
        assert_close(torch.cat([f[name] for f in found]), expected[name], 1e-10, what=name)
    for name in ("weight", "bias"):
        assert_close(sum(f[name] for f in found), expected[name], 1e-10, what=name)
    assert (apart["y"] - expected["y"][SHARES[-1]]).abs().max() > 0.1, "the shares' own statistics must be others"
