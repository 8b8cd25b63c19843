# SPDX-License-Identifier: Apache-2.0
"""What is special to GPUs: graphs, streams, compiled networks, mixed precision, determinism, launches.

The op suite runs on a GPU through the backends of conftest.py. The last part of this file needs no GPU: it shows that
nothing on a GPU's path waits for it.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_close, assert_same, cotangent, named, results, sample, truth
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_inpaint import _backends, baselines, use_backend
from fused_inpaint.models import build_model

CSRC = Path(__file__).resolve().parents[1] / "csrc"
DEVICE = "cuda"
HALVES = [torch.float16, torch.bfloat16]


def missing() -> str:
    """Why nothing here can run on a GPU; empty if it can."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    reason = _backends.status()["cuda"]
    return f"the extension has no CUDA kernels: {reason}" if reason else ""


gpu = pytest.mark.skipif(bool(missing()), reason=missing() or "available")
# On a GPU, which is seldom at hand, what other libraries warn of is printed and ends no test.
pytestmark = [] if missing() else [pytest.mark.filterwarnings("default")]
SELECTED = ["auto", *(name for name in ("cuda", "triton") if not _backends.status()[name])]


@pytest.fixture(params=SELECTED)
def selected(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def network(dtype: torch.dtype = torch.float32, device: str = "") -> nn.Module:
    torch.manual_seed(0)
    return build_model("pconv", levels=4, width=16).net.to(device or DEVICE, dtype)


def inputs(seed: int, dtype: torch.dtype = torch.float32, device: str = "") -> tuple[Tensor, Tensor]:
    """(2, 3, 64, 64) with NaN in the holes, and (2, 1, 64, 64): a hole wider than any window; the second picture has
    but one valid corner."""
    g = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(2, 3, 64, 64, generator=g), torch.ones(2, 1, 64, 64)
    mask[0, :, 8:50, 5 + seed : 40 + seed] = 0
    mask[1] = 0
    mask[1, :, :16, : 16 + seed] = 1
    x = torch.where(mask.bool(), x, torch.nan)
    return x.to(device or DEVICE, dtype), mask.to(device or DEVICE, dtype)


def as_named(out: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"y": out[0].clone(), "mask": out[1].clone()}


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, mask: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    y, _ = net(x, mask)
    loss = (y.float() - 0.5).abs().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `run`, warmed up on a stream of its own, and its results' memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def refill(static: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    for buffer, value in zip(static, values, strict=True):
        buffer.copy_(value)


SMALL = [
    "plain", "channel_masks", "kernel7_stride2", "overpadded", "groups", "depthwise", "wide", "all_hole", "no_mask",
    "frozen", "train_wide", "two_sources_train", "up_folded", "up_direct", "up_channel_masks_folded", "up_alone_direct",
    "up_train_folded", "up_kernel5_train_folded", "up_eval_direct", "one_pixel_map", "up_both_folded",
]  # fmt: skip


@gpu
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 5e-5), (torch.bfloat16, 2**-7)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SMALL)
def test_small_shapes(selected: str, name: str, dtype: torch.dtype, rtol: float) -> None:
    """What `scripts/gpu.sh sanitize` runs: the op suite poisons its memory, which would hide an unwritten value."""
    s = sample(named(name), dtype, DEVICE)
    grad = cotangent(s)
    expected, actual = truth(s, grad), results(s, grad)
    for key, value in actual.items():
        assert_close(value, expected[key], rtol, what=key)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_graph_of_a_forward(selected: str, poisoned: None, dtype: torch.dtype) -> None:
    """Replayed on other values, masks included, it gives eager mode's bits."""
    net = network(dtype).eval()
    static = inputs(0, dtype)
    with torch.no_grad():
        graph, out = capture(lambda: net(*static))
        for seed in (1, 2):
            values = inputs(seed, dtype)
            refill(static, values)
            graph.replay()
            assert_same(as_named(out), as_named(net(*values)))


@gpu
def test_graph_of_a_training_step(selected: str, poisoned: None) -> None:
    """Forward, backward, statistics and optimizer."""
    net = network().train()
    eager = copy.deepcopy(net)
    start = copy.deepcopy(net.state_dict())
    static = inputs(0)
    optimizer, other = (torch.optim.SGD(n.parameters(), lr=0.1) for n in (net, eager))
    graph, loss = capture(lambda: step(net, optimizer, *static))
    net.load_state_dict(start)
    for seed in (1, 2):
        values = inputs(seed)
        refill(static, values)
        graph.replay()
        assert torch.equal(loss, step(eager, other, *values))
    assert_same(net.state_dict(), eager.state_dict())


@gpu
def test_streams(selected: str, poisoned: None) -> None:
    """Each stream's inputs arrive late: a launch on any other stream would read the NaN that is there before."""
    net = network().eval()
    values = [inputs(seed) for seed in (1, 2)]
    with torch.no_grad():
        expected = [as_named(net(*value)) for value in values]
        static = [tuple(torch.full_like(t, torch.nan) for t in value) for value in values]
        torch.cuda.synchronize()
        found = []
        for buffers, value in zip(static, values, strict=True):
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(50_000_000)
                refill(buffers, value)
                found.append(as_named(net(*buffers)))
        torch.cuda.synchronize()
    for actual, wanted in zip(found, expected, strict=True):
        assert_same(actual, wanted)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_another_device_than_the_current(selected: str, poisoned: None) -> None:
    here, there = (network(device=f"cuda:{i}").train() for i in (0, 1))
    losses = []
    for i, net in enumerate((here, there)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        losses.append(step(net, optimizer, *inputs(1, device=f"cuda:{i}")))
    assert torch.cuda.current_device() == 0 and losses[1].device.index == 1
    assert_same({k: v.cpu() for k, v in there.state_dict().items()}, {k: v.cpu() for k, v in here.state_dict().items()})


@gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_network(selected: str, mode: str) -> None:
    """One graph without a break; "reduce-overhead" captures it and skips nothing."""
    torch.compiler.reset()
    counters.clear()
    net = network().eval()
    compiled = torch.compile(net, fullgraph=True, mode=mode)
    with torch.no_grad():
        for seed in (1, 2, 3, 4):
            torch.compiler.cudagraph_mark_step_begin()
            actual, expected = as_named(compiled(*inputs(seed))), as_named(net(*inputs(seed)))
            assert_close(actual["y"], expected["y"], 5e-5)
            assert torch.equal(actual["mask"], expected["mask"])
    assert counters["inductor"]["cudagraph_skips"] == 0


@gpu
def test_compiled_training_step(selected: str) -> None:
    torch.compiler.reset()
    net = network().train()
    eager = copy.deepcopy(net)
    optimizer, other = (torch.optim.SGD(n.parameters(), lr=0.1) for n in (net, eager))
    compiled = torch.compile(net, fullgraph=True)
    for seed in (1, 2):
        loss = step(compiled, optimizer, *inputs(seed))
        assert_close(loss, step(eager, other, *inputs(seed)), 1e-4)
    for (name, actual), expected in zip(net.named_parameters(), eager.parameters(), strict=True):
        assert_close(actual, expected, 1e-3, what=name)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_mixed_precision_training_stays_finite(device: str, dtype: torch.dtype) -> None:
    """Windows of holes only, NaN under them: no gradient overflows, so the scaler skips no step."""
    net = network(device=device).train()
    x, mask = inputs(1, device=device)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            y, _ = net(x, mask)
            loss = (y - 0.5).abs().mean()
        assert y.dtype == dtype
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        for name, p in net.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() == 2.0**10
    assert losses[0] > losses[1] > losses[2]
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@gpu
def test_same_bits_in_every_forward(selected: str) -> None:
    """Without torch.use_deterministic_algorithms."""
    net = network().eval()
    with torch.no_grad():
        first = as_named(net(*inputs(1)))
        for _ in range(5):
            torch.empty(1 << 20, device=DEVICE).fill_(torch.nan)  # what the next call's memory holds
            assert_same(as_named(net(*inputs(1))), first)


@gpu
def test_same_bits_in_every_training_step(selected: str, poisoned: None) -> None:
    """With it: the vendor's weight gradients are not deterministic otherwise."""
    states = []
    for _ in range(3):
        net = network().train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for seed in (1, 2):
            step(net, optimizer, *inputs(seed))
        states.append(net.state_dict())
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])


def kernels(run: Callable[[], object]) -> list[str]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        run()
        torch.cuda.synchronize()
    on_device = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_device if not name.startswith(("Memcpy", "Memset"))]


@gpu
def test_launches(record_property: Callable[[str, object], None]) -> None:
    """Of a forward of the full depth."""
    size = {"levels": 8, "width": 8}
    x, mask = torch.randn(1, 3, 256, 256, device=DEVICE), torch.ones(1, 1, 256, 256, device=DEVICE)
    mask[..., 64:128, 64:160] = 0
    counts = {}
    for name, net in (("ours", build_model("pconv", **size).net), ("naive", baselines.PConvUNet(**size))):
        net.to(DEVICE).eval()
        with torch.no_grad():
            net(x, mask)
            counts[name] = len(kernels(lambda net=net: net(x, mask)))
        record_property(name, counts[name])
    if not counts["naive"]:
        pytest.skip("the profiler sees no kernel here")
    assert counts["ours"] <= 0.75 * counts["naive"], counts


# From here on without a GPU: tensors that claim to be on one, and have no values to read.


class Watch(TorchDispatchMode):
    """Counts the operators that are called; each result must be where the inputs are."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.calls = device, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func._schema.name] += 1
        for t in tree_leaves(out):
            assert not isinstance(t, Tensor) or t.device.type == self.device, f"{func} leaves the {self.device}"
        return out


def fake(mode: FakeTensorMode, t: Tensor, device: str) -> FakeTensor:
    return FakeTensor(mode, t.detach(), torch.device(device))


def fake_network(
    mode: FakeTensorMode, device: str, trained: bool, dtype: torch.dtype = torch.float32, **size: int
) -> nn.Module:
    # Neither torch.empty(device="cuda") nor .to("cuda") works in a torch without CUDA, but a wrapped meta tensor does.
    with torch.device("meta"):
        net = build_model("pconv", **size).net.to(dtype)
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(fake(mode, p, device), requires_grad=trained)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = fake(mode, b, device)
    return net


def fake_inputs(
    mode: FakeTensorMode, device: str, side: int, dtype: torch.dtype = torch.float32
) -> tuple[FakeTensor, FakeTensor]:
    x, mask = (torch.empty(2, c, side, side, dtype=dtype, device="meta") for c in (3, 1))
    return fake(mode, x, device), fake(mode, mask, device)


@pytest.fixture
def cuda_everywhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Take the operators' path for tensors of a device as if the library had CUDA kernels for it."""

    def pretend(device: str) -> None:
        monkeypatch.setattr(_backends, "_selected", "auto")
        monkeypatch.setitem(_backends._MISSING, "cuda", "")
        monkeypatch.setitem(_backends.DEVICE, "cuda", device)

    return pretend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_forward_reads_nothing(cuda_everywhere: Callable[[str], None], training: bool, dtype: torch.dtype) -> None:
    """A forward on a GPU never waits for a value and takes nothing to the host or from it."""
    cuda_everywhere("cuda")
    mode = FakeTensorMode()
    net = fake_network(mode, "cuda", False, dtype, levels=4, width=16).train(training)
    x, mask = fake_inputs(mode, "cuda", 64, dtype)
    with mode, Watch("cuda") as watch, torch.no_grad():
        y, new_mask = net(x, mask)
    assert y.shape == (2, 3, 64, 64) and y.dtype == dtype and y.device.type == new_mask.device.type == "cuda"
    assert any(name.startswith("fused_inpaint::partial_conv2d") for name in watch.calls)


def test_operators_of_a_forward_are_few(cuda_everywhere: Callable[[str], None]) -> None:
    """Each is a launch or more; a view is none."""
    cuda_everywhere("cuda")
    mode = FakeTensorMode()
    net = fake_network(mode, "cuda", False, levels=8, width=16).eval()
    x, mask = fake_inputs(mode, "cuda", 256)
    with mode, Watch("cuda") as watch, torch.no_grad():
        net(x, mask)
    views = ("prim::", "aten::expand", "aten::view", "aten::alias", "aten::detach", "aten::slice", "aten::select")
    launches = {name: count for name, count in watch.calls.items() if not name.startswith(views)}
    assert sum(launches.values()) <= 8 * 16, launches


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_training_step_reads_nothing(cuda_everywhere: Callable[[str], None], autocast: bool) -> None:
    """The same with gradients. They are laid out as the parameters, so that nothing lays them out again."""
    # Autograd knows no fake GPU in a torch without CUDA, so the tensors are on the CPU, and the choices are a GPU's.
    cuda_everywhere("cpu")
    mode = FakeTensorMode()
    net = fake_network(mode, "cpu", True, levels=4, width=16).train()
    x, mask = fake_inputs(mode, "cpu", 64)
    with mode, Watch("cpu") as watch:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, _ = net(x, mask)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        y.sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.shape == p.shape and p.grad.stride() == p.stride(), name
    assert watch.calls["fused_inpaint::partial_conv2d_bn_backward"] > 0


READS = {
    "item": lambda t: t.sum().item(),
    "branch": lambda t: 1 if (t > 0).any() else 0,
}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("read", READS)
def test_a_read_is_seen(device: str, read: str) -> None:
    mode = FakeTensorMode()
    _, mask = fake_inputs(mode, device, 8)
    with mode, Watch(device), torch.no_grad(), pytest.raises(DataDependentOutputException):
        READS[read](mask)


def test_a_copy_to_the_host_is_seen() -> None:
    mode = FakeTensorMode()
    _, mask = fake_inputs(mode, "cuda", 8)
    with mode, Watch("cuda"), torch.no_grad(), pytest.raises(AssertionError, match="leaves the cuda"):
        mask.cpu()


WAITS = re.compile(r"cudaMemcpy|\w*Synchronize\b|\.item\s*[<(]|_local_scalar_dense|cudaMalloc|cudaFree|DeviceType::CPU")


def waits(source: str) -> list[str]:
    """What in C++ or CUDA source copies to or from the host, waits for the device, or allocates past torch."""
    return WAITS.findall(re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL))


def test_host_code_never_waits() -> None:
    """In all that the CUDA sources are made of."""
    sources = [p for p in CSRC.rglob("*") if p.suffix in (".cu", ".cuh", ".h")]
    assert len([p for p in sources if p.name.endswith("_cuda.cu")]) > 3
    found = {p.relative_to(CSRC).as_posix(): waits(p.read_text()) for p in sources}
    assert {name: words for name, words in found.items() if words} == {}


@pytest.mark.parametrize(
    "line",
    [
        "cudaMemcpyAsync(&total, sum, 8, cudaMemcpyDeviceToHost, stream);",
        "if (cudaStreamSynchronize(stream) != cudaSuccess) return;",
        "cudaDeviceSynchronize();",
        "const auto n = count.item<int64_t>();",
        "cudaMalloc(&scratch, bytes);",
    ],
)
def test_a_wait_in_host_code_is_seen(line: str) -> None:
    assert waits(f"void f() {{\n  {line}\n}}")
    assert not waits(f"void f() {{\n  // {line}\n  __syncthreads();\n}}")
