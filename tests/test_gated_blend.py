# SPDX-License-Identifier: Apache-2.0
"""The gated blend on every backend: against its reference in float64, the published formula, and itself."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from cases import OPERATORS, PRECISIONS, assert_close
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fused_inpaint import _backends, ops, use_backend
from fused_inpaint.baselines import published_gated_blend


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    size: tuple[int, int, int, int] = (2, 5, 9, 11)
    gate: str = "random"  # random; equal; large_mean, rows (each far from the others), outlier (as the first value)


CASES = [
    Case("plain"),
    Case("one_channel", size=(3, 1, 8, 5)),
    Case("wide", size=(1, 70, 7, 5)),
    Case("vectors", size=(2, 16, 6, 7)),
    Case("many_chunks", size=(2, 8, 70, 60)),
    Case("three_pixels", size=(2, 3, 1, 3)),
    Case("two_pixels", size=(2, 3, 2, 1)),
    Case("one_pixel", size=(2, 3, 1, 1)),
    Case("equal", gate="equal"),
    Case("large_mean", size=(1, 6, 40, 50), gate="large_mean"),
    Case("rows", size=(1, 4, 96, 64), gate="rows"),
    Case("outlier", size=(1, 8, 48, 40), gate="outlier"),
    Case("empty_batch", size=(0, 3, 4, 4)),
    Case("empty_map", size=(2, 3, 0, 4)),
]
ALL = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SMALL = Case("small", size=(2, 3, 3, 4))
NAMES = ("x", "f", "gate")


@pytest.fixture(autouse=True)
def _tiny(one_thread: None) -> None:
    """Sizes are small."""


def sample(case: Case, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> list[Tensor]:
    """x, f and gate, requiring gradients."""
    g = torch.Generator().manual_seed(sum(map(ord, case.name)))
    x, f, gate = (torch.randn(case.size, generator=g) for _ in range(3))
    if case.gate == "random":
        gate = gate * 2 + 3
    elif case.gate == "equal":
        gate = torch.tensor([0.1, -1234.567, 0.5, 1e4, 0.0]).view(1, -1, 1, 1).expand(case.size)
    elif case.gate == "large_mean":
        gate = gate * 0.1 + 100
    elif case.gate == "rows":
        gate = gate * 1e-2 + 1e2 + torch.arange(case.size[2]).view(-1, 1)
    elif case.gate == "outlier":
        gate[..., 0, 0] = 1e4
    return [t.to(dtype).to(device).requires_grad_() for t in (x, f, gate)]


def results(maps: list[Tensor], grad: Tensor, call: Callable[..., Tensor] = ops.gated_blend) -> dict[str, Tensor]:
    y = call(*maps)
    found = torch.autograd.grad(y, maps, grad.to(y.device, y.dtype))
    return {"y": y.detach()} | dict(zip(NAMES, found, strict=True))


def truth(maps: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
    with use_backend("reference"):
        return results([t.detach().cpu().double().requires_grad_() for t in maps], grad.double())


@pytest.mark.parametrize("dtype, rtol, _folded, atol", PRECISIONS)
@ALL
def test_reference(
    case: Case, dtype: torch.dtype, rtol: float, _folded: float, atol: float, backend: str, device: torch.device
) -> None:
    if dtype == torch.float64 and (device.type != "cpu" or backend == "triton"):
        pytest.skip("float64 runs on the CPU only")
    maps = sample(case, dtype, device)
    grad = torch.randn(case.size).to(dtype)
    actual, expected = results(maps, grad), truth(maps, grad)
    if case.gate == "equal" and dtype == torch.float16:
        assert expected.pop("gate").abs().max() > 65504  # more than float16 holds
    for name, value in expected.items():
        assert actual[name].dtype == dtype
        # Of two pixels the normalised gate is (1, -1) / sqrt(2) whatever they are: its gradient is 0, but for eps.
        absolute = 4 * rtol if (case.name, name) == ("two_pixels", "gate") else atol
        assert_close(actual[name], value, rtol, absolute, name)


@pytest.mark.parametrize("gate", ["random", "equal"])
def test_published_formula(gate: str) -> None:
    """The reference, where the published code has numbers: its std of equal values passes no gradient either."""
    maps = sample(Case("published", gate=gate), torch.float64)
    with torch.no_grad():
        if gate == "equal":
            maps[2].fill_(0.5)  # whose mean torch computes without rounding
    grad = torch.randn(maps[0].shape, dtype=torch.float64)
    expected = results(maps, grad, published_gated_blend)
    for name, value in truth(maps, grad).items():
        assert_close(value, expected[name], 1e-13, what=name)


def test_equal_values_and_single_pixels(backend: str, device: torch.device) -> None:
    """g is sigmoid(-5), and a single pixel's gate has no gradient."""
    closed = torch.sigmoid(torch.tensor(-5.0, dtype=torch.float64))
    for case in (Case("equal", gate="equal"), Case("pixel", size=(2, 5, 1, 1))):
        maps = sample(case, torch.float32, device)
        x, f, _ = maps
        found = results(maps, torch.ones(case.size))
        assert_close(found["y"], (x * (1 - closed.to(device)) + f * closed.to(device)).detach(), 3e-7)
        assert found["gate"].isfinite().all()
    assert not found["gate"].any()


def test_gate_is_accurate_over_its_range(backend: str, device: torch.device) -> None:
    """Each value of g for itself, from exp(-80) to 1."""
    gate = torch.linspace(-1, 1, 3001).pow(17).view(1, 1, 1, -1)
    z = 10 * (gate.double() - gate.double().mean()) / gate.double().std() - 5
    assert z.min() < -40 and z.max() > 30
    y = ops.gated_blend(torch.zeros_like(gate).to(device), torch.ones_like(gate).to(device), gate.to(device))
    assert (y.cpu().double() / torch.sigmoid(z) - 1).abs().max() < 2e-5


def test_gradcheck(backend: str, device: torch.device) -> None:
    if backend == "triton" or device.type != "cpu":
        pytest.skip("float64 runs on the CPU only")
    maps = sample(SMALL, torch.float64)
    assert torch.autograd.gradcheck(ops.gated_blend, maps)
    assert torch.autograd.gradgradcheck(ops.gated_blend, maps, atol=1e-4)


def test_second_derivative(backend: str, device: torch.device) -> None:
    """A gradient penalty, also where std is 0."""
    for case in (SMALL, Case("pixel", size=(2, 3, 1, 1)), Case("equal", gate="equal")):
        found = []
        for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
            maps = sample(case, dtype, device if name == backend else "cpu")
            with use_backend(name):
                first = torch.autograd.grad(ops.gated_blend(*maps).sum(), maps, create_graph=True)
                found.append(torch.autograd.grad(sum(t.square().sum() for t in first), maps))
        for one, other in zip(*found, strict=True):
            assert other.isfinite().all()
            assert_close(one, other, 2e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_layouts(backend: str, device: torch.device, layout: str) -> None:
    whole = torch.randn(3, 2, 6, 8, 10, device=device)
    x, f, gate = {
        "contiguous": list(whole),
        "channels_last": [t.contiguous(memory_format=torch.channels_last) for t in whole],
        "sliced": list(torch.randn(3, 2, 12, 8, 20, device=device)[:, :, ::2, :, 1::2]),
        "expanded": list(whole[:, :, :1].expand(-1, -1, 6, -1, -1)),
    }[layout]
    y = ops.gated_blend(x, f, gate)
    assert torch.equal(y, ops.gated_blend(*(t.clone(memory_format=torch.contiguous_format) for t in (x, f, gate))))
    if backend != "reference":
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_threads_and_runs_give_the_same_bits(backend: str, device: torch.device) -> None:
    maps = sample(Case("bits", size=(2, 40, 30, 50)), torch.float32, device)
    grad = torch.randn(maps[0].shape)
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(results(maps, grad))
    if backend == "reference":
        found = found[1:]  # torch's own sums
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@pytest.mark.parametrize("wanted", [("x",), ("f",), ("gate",), ("x", "gate"), ("f", "gate")])
def test_some_gradients_are_those_of_all(backend: str, device: torch.device, wanted: tuple[str, ...]) -> None:
    found = []
    for names in (NAMES, wanted):
        maps = sample(SMALL, torch.float32, device)
        for name, t in zip(NAMES, maps, strict=True):
            t.requires_grad_(name in names)
        ops.gated_blend(*maps).square().sum().backward()
        found.append({name: t.grad for name, t in zip(NAMES, maps, strict=True)})
    for name, grad in found[1].items():
        assert (grad is None) == (name not in wanted)
        assert grad is None or torch.equal(grad, found[0][name])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NumPy in Triton's interpreter
def test_channels_do_not_mix(backend: str, device: torch.device) -> None:
    """A NaN in one map of the gate reaches that sample's channel, all of it, and no other."""
    maps = sample(SMALL, torch.float32, device)
    grad = torch.randn(SMALL.size)
    clean = results(maps, grad)
    with torch.no_grad():
        maps[2][1, 2, 0, 0] = torch.nan
    dirty = results(maps, grad)
    for name in dirty:
        assert dirty[name][1, 2].isnan().all()
        dirty[name][1, 2] = clean[name][1, 2]
        assert torch.equal(dirty[name], clean[name])


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 1.0, 1e3]),
)
def test_is_a_blend(size: tuple[int, int, int, int], seed: int, mean: float) -> None:
    """y lies between x and f; with x and f exchanged, so are their shares; a factor of the gate has no influence."""
    g = torch.Generator().manual_seed(seed)
    x, f, gate = (torch.randn(size, generator=g) for _ in range(3))
    gate += mean
    y = ops.gated_blend(x, f, gate)
    slack = 1e-6 * max(x.abs().max().item(), f.abs().max().item())
    assert (y >= torch.minimum(x, f) - slack).all() and (y <= torch.maximum(x, f) + slack).all()
    assert_close(y + ops.gated_blend(f, x, gate), x + f, 1e-6, 4 * slack)
    assert_close(ops.gated_blend(x, f, 4 * gate), y, 1e-6, 4 * slack)


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compile(backend: str, device: torch.device, engine: str) -> None:
    def net(x: Tensor, f: Tensor, gate: Tensor) -> Tensor:
        return ops.gated_blend(2 * x, f, gate.abs()).square()

    if (backend, engine) == ("reference", "inductor"):
        pytest.skip("torch compiles its own operators")
    torch.compiler.reset()
    maps = sample(Case("compiled", size=(2, 4, 12, 10)), torch.float32, device)
    grad = torch.randn(maps[0].shape)
    expected = results(maps, grad, net)
    for name, value in results(maps, grad, torch.compile(net, fullgraph=True, backend=engine)).items():
        assert_close(value, expected[name], 1e-6, what=name)


def test_autocast(backend: str, device: torch.device) -> None:
    """Dtypes may differ, as convolutions under autocast make them; the widest is the result's."""
    x, f, gate = (t.detach() for t in sample(SMALL, torch.float32, device))
    half = [f.bfloat16(), gate.bfloat16()]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = ops.gated_blend(x, *half)
    assert y.dtype == torch.float32 and torch.equal(y, ops.gated_blend(x, *(t.float() for t in half)))


@OPERATORS
@pytest.mark.parametrize("case", [SMALL, Case("one_pixel", size=(2, 3, 1, 1))], ids=lambda case: case.name)
def test_opcheck(backend: str, device: torch.device, case: Case) -> None:
    op, suffix = torch.ops.fused_inpaint, "_triton" if backend == "triton" else ""
    nhwc = torch.channels_last
    maps = [t.detach().contiguous(memory_format=nhwc).requires_grad_() for t in sample(case, torch.float32, device)]
    forward = getattr(op, f"gated_blend{suffix}")
    torch.library.opcheck(forward, maps)
    constants = [t.detach() for t in maps]
    y, statistics = forward(*constants)
    backward = getattr(op, f"gated_blend_backward{suffix}")
    for needs in ((True, True, True), (True, False, False), (False, False, True)):
        torch.library.opcheck(backward, (y, *constants, statistics, *needs))


X = torch.ones(2, 3, 4, 5)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((X[0], X, X), r"x must be \(N, C, H, W\), got \(3, 4, 5\)"),
        ((X.int(), X, X), "x must be float32, float64, float16 or bfloat16, got torch.int32"),
        ((X, X[:1], X), r"f must be \(2, 3, 4, 5\), got \(1, 3, 4, 5\)"),
        ((X, X, X[..., 1:]), r"gate must be \(2, 3, 4, 5\), got \(2, 3, 4, 4\)"),
        ((X, X.double(), X), "f must be torch.float32 on cpu, got torch.float64 on cpu"),
        ((X, X, X.to("meta")), "gate must be torch.float32 on cpu, got torch.float32 on meta"),
    ],
)
def test_refusals(arguments: tuple, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^gated_blend: {sentence}$"):
        ops.gated_blend(*arguments)


@pytest.mark.skipif(bool(_backends.status()["cpu"]), reason=_backends.status()["cpu"] or "usable")
def test_operators_stay_inside_their_memory() -> None:
    op = torch.ops.fused_inpaint
    y, statistics = op.gated_blend(X, X, X)
    for wrong in ((X, X, X[1:]), (X, X.double(), X), (X[0], X, X)):
        with pytest.raises(RuntimeError, match=r"gated_blend: each map must be \(N, C, H, W\)"):
            op.gated_blend(*wrong)
    for wrong in (statistics[:, 1:], statistics[..., 1:], statistics[:1], statistics.double(), X):
        with pytest.raises(RuntimeError, match=r"gated_blend: statistics must be \(N, 3, C\)"):
            op.gated_blend_backward(y, X, X, X, wrong, True, True, True)
    with pytest.raises(RuntimeError, match=r"gated_blend: each map must be"):
        op.gated_blend_backward(y[1:], X, X, X, statistics, True, True, True)
