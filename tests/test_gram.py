# SPDX-License-Identifier: Apache-2.0
"""The L1 distance of Gram matrices on every backend: against its reference in float64, the published losses, itself."""

import dataclasses
import math
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import OPERATORS, PRECISIONS, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_partial_conv_triton import (
    INTERPRETED,
    NO_PTXAS,
    ROOT,
    SHARED_MEMORY,
    Compiled,
    Driver,
    inspect,
    no_interpreter,
    no_line_numbers,
)
from torch import Tensor, nn
from vectors import assert_close as assert_published
from vectors import cases, tensors

from fused_inpaint import NoBackendError, _backends, ops, use_backend
from fused_inpaint.ops.gram import api, tiles

Size = tuple[int, int, int, int]
OVER = ("channels", "positions")


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    size: Size = (2, 5, 9, 11)
    over: str = "positions"
    cut: tiles._Cut | None = None  # or the device's own


CASES = [
    *(
        dataclasses.replace(case, name=f"{over}_{case.name}", over=over)
        for over in OVER
        for case in (
            Case("whole"),
            Case("tiles", (3, 7, 9, 6), cut=tiles._Cut(2, 512, 64)),
            Case("one_pixel", (3, 4, 1, 1)),
            Case("one_channel", (2, 1, 4, 6)),
            Case("deep", (1, 70, 2, 9)),
        )
    ),
    Case("positions_row", (1, 3, 1, 150), cut=tiles._Cut(1, 2**12, 2**20)),
]
ALL = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _tiny(one_thread: None) -> None:
    """Sizes are small."""


def requires(backend: str, over: str = "positions", dtype: torch.dtype = torch.float32) -> None:
    if backend == "triton" and over == "channels":
        pytest.skip("Triton has a kernel over positions only")
    if dtype == torch.float64 and (backend == "triton" or _backends.DEVICE[backend] != "cpu"):
        pytest.skip("float64 runs on the CPU only")


def sample(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(sum(map(ord, case.name)))
    a, b = (torch.randn(case.size, generator=g).to(device, dtype).requires_grad_() for _ in range(2))
    return a, b


def results(a: Tensor, b: Tensor, over: str, normalise: float = 1.0) -> dict[str, Tensor]:
    """Sums and gradients, with another one for each sample."""
    y = ops.gram_l1(a, b, over=over, normalise=normalise)
    y.backward((torch.arange(y.numel(), device=y.device) - 1.5).to(y.dtype))
    return {"y": y.detach(), "a": a.grad, "b": b.grad}


def truth(a: Tensor, b: Tensor, over: str, normalise: float = 1.0) -> dict[str, Tensor]:
    wide = [t.detach().cpu().double().requires_grad_(t.requires_grad) for t in (a, b)]
    with use_backend("reference"):
        return results(*wide, over, normalise)


@pytest.mark.parametrize("dtype, rtol, _folded, atol", PRECISIONS)
@ALL
def test_reference(
    case: Case,
    dtype: torch.dtype,
    rtol: float,
    _folded: float,
    atol: float,
    backend: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requires(backend, case.over, dtype)
    if case.cut is not None:
        monkeypatch.setattr(tiles, "_cut", lambda x: case.cut._replace(samples=min(case.cut.samples, x.size(0))))
    a, b = sample(case, dtype, device)
    expected = truth(a, b, case.over, 0.25)
    for name, value in results(a, b, case.over, 0.25).items():
        assert value.dtype == (dtype if name != "y" or dtype == torch.float64 else torch.float32)
        # Of half types the products are exact.
        assert_close(value, expected[name], min(rtol, 1e-5) if name == "y" else rtol, atol, name)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("target", ["a", "b"])
def test_one_gradient(target: str, over: str, backend: str, device: torch.device) -> None:
    """The other map is a target: its gradient is not formed, and nothing else changes."""
    requires(backend, over)
    a, b = sample(Case("one_gradient", over=over), torch.float32, device)
    both = results(a, b, over)
    a.grad = b.grad = None
    (a if target == "a" else b).requires_grad_(False)
    alone = results(a, b, over)
    assert alone.pop(target) is None
    assert all(torch.equal(value, both[name]) for name, value in alone.items())


@pytest.mark.parametrize("over", OVER)
def test_where_maps_agree(over: str, backend: str, device: torch.device) -> None:
    """Between rows that agree the difference is 0, and so is its sign; rounding would make it 1."""
    requires(backend, over)
    a, b = sample(Case("agree", (1, 20, 12, 12), over), torch.float32, device)
    with torch.no_grad():
        b.copy_(a)
        (b[:, :2] if over == "channels" else b[..., :1, :3]).add_(1.0)
    expected = truth(a, b, over)
    for name, value in results(a, b, over).items():
        assert_close(value, expected[name], 1e-5, what=name)
    a.grad = b.grad = None
    assert all(
        not value.any() for value in results(a, a.detach().clone().requires_grad_(), over).values() if value is not None
    )


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize(
    "backend", [name for name in _backends.NAMES[2:] if not _backends.status()[name]], indirect=True
)
def test_nearly_equal_maps(over: str, backend: str, device: torch.device) -> None:
    """Their Gram matrices have four digits in common, of which the difference loses none."""
    requires(backend, over)
    a, b = sample(Case("near", (1, 24, 14, 15), over), torch.float32, device)
    with torch.no_grad():
        b.mul_(1e-4).add_(a)
    expected = truth(a, b, over)
    for name, value in results(a, b, over).items():
        assert_close(value, expected[name], 1e-5, what=name)


@pytest.mark.parametrize("over", OVER)
def test_gradcheck(over: str, backend: str, device: torch.device) -> None:
    requires(backend, over, torch.float64)
    a, b = sample(Case("gradcheck", (2, 3, 2, 3), over), torch.float64, device)
    assert torch.autograd.gradcheck(lambda a, b: ops.gram_l1(a, b, over=over, normalise=0.5), (a, b))
    assert torch.autograd.gradgradcheck(lambda a, b: ops.gram_l1(a, b, over=over, normalise=0.5), (a, b))


@pytest.mark.parametrize("over", OVER)
def test_second_derivative(over: str, backend: str, device: torch.device) -> None:
    requires(backend, over)

    def penalty(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        y = ops.gram_l1(a, b, over=over)
        grads = torch.autograd.grad(y.square().sum(), [a, b], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), [a, b])

    a, b = sample(Case("penalty", over=over), torch.float32, device)
    wide = [t.detach().cpu().double().requires_grad_() for t in (a, b)]
    with use_backend("reference"):
        expected = penalty(*wide)
    for actual, value in zip(penalty(a, b), expected, strict=True):
        assert_close(actual, value, 1e-5)


@OPERATORS
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, False)], ids=["both", "one", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(backend: str, device: torch.device, layout: str, needs: tuple[bool, bool]) -> None:
    a, b = (lying(t.detach(), layout) for t in sample(Case("opcheck"), torch.float32, device))
    a, b = (t.requires_grad_(need) for t, need in zip((a, b), needs, strict=True))
    op = torch.ops.fused_inpaint
    torch.library.opcheck(op.gram_l1_positions_triton if backend == "triton" else op.gram_l1_positions, (a, b, *needs))
    if backend != "triton":
        torch.library.opcheck(op.gram_l1_channels, (a, b))


def test_operator_without_its_products(backend: str, device: torch.device) -> None:
    """A gradient that was not announced is the reference's."""
    requires(backend)
    a, b = sample(Case("unannounced"), torch.float32, device)
    torch.ops.fused_inpaint.gram_l1_positions(a, b, False, False)[0].sum().backward()
    expected = torch.autograd.grad(ops.gram_l1(a, b, over="positions").sum(), [a, b])
    for t, value in zip((a, b), expected, strict=True):
        assert_close(t.grad, value, 1e-5)


def lying(t: Tensor, layout: str) -> Tensor:
    if layout == "sliced":
        return torch.stack([t, t], -1).flatten(3)[..., ::2]
    return t.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_layouts(layout: str, over: str, backend: str, device: torch.device) -> None:
    requires(backend, over)
    a, b = sample(Case("layouts", over=over), torch.float32, device)
    expected = results(a, b, over)
    a, b = (lying(t.detach(), layout).requires_grad_() for t in (a, b))
    for name, value in results(a, b, over).items():
        assert_close(value, expected[name], 1e-6, what=name)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)])
def test_empty(size: Size, over: str, backend: str, device: torch.device) -> None:
    requires(backend, over)
    a = torch.ones(size, device=device, requires_grad=True)
    y = ops.gram_l1(a, torch.ones(size, device=device), over=over)
    y.sum().backward()
    assert y.shape == size[:1] and not y.any() and a.grad is not None and a.grad.shape == size


@pytest.mark.parametrize("over", OVER)
def test_autocast_changes_nothing(over: str, backend: str, device: torch.device) -> None:
    """Sums overflow the half types: under autocast they are float32 all the same."""
    requires(backend, over)
    a, b = sample(Case("autocast", over=over), torch.float32, device)
    expected = results(a, b, over)
    a.grad = b.grad = None
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = ops.gram_l1(a, b, over=over)
        mixed = ops.gram_l1(a.bfloat16(), b, over=over)
        if backend != "reference":  # whose backward is autograd's
            actual = results(a, b, over)
            assert all(torch.equal(value, expected[name]) for name, value in actual.items())
    assert torch.equal(y, expected["y"])
    assert_close(mixed, truth(a.detach().bfloat16().requires_grad_(), b, over)["y"], 1e-5)


@pytest.mark.parametrize("over", OVER)
def test_half_sums_do_not_overflow(over: str, backend: str, device: torch.device) -> None:
    requires(backend, over)
    a = torch.full((1, 8, 8, 8), 200.0, dtype=torch.float16, device=device, requires_grad=True)
    y = ops.gram_l1(a, torch.zeros_like(a), over=over, normalise=1 / 512**2)
    y.sum().backward()
    side = 8 if over == "channels" else 64
    assert_close(y, torch.tensor([side * 512 * 200.0**2 / 512**2]), 1e-6)
    assert_close(a.grad, torch.full(a.shape, 2 * side * 200.0 / 512**2), 2**-10)


@pytest.mark.parametrize("over", OVER)
def test_the_same_bits_from_run_to_run(over: str, backend: str, device: torch.device) -> None:
    requires(backend, over)
    # Of several tiles; the interpreter takes its time.
    case = Case("bits", (1, 3, 9, 8) if backend == "triton" else (2, 12, 24, 25), over)
    found = []
    for threads in (1, 2, 2) if backend != "reference" else (2, 2):
        torch.set_num_threads(threads)
        found.append(results(*sample(case, torch.float32, device), over))
    assert all(torch.equal(value, other[name]) for other in found[1:] for name, value in found[0].items())


def test_no_tile_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the positions' matrix, 99 x 99, there is only a tile at a time, and only of one triangle."""
    made = []
    make = tiles._twice_difference

    def recording(*arguments: Any) -> Tensor:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(tiles, "_twice_difference", recording)
    monkeypatch.setattr(tiles, "_cut", lambda x: tiles._Cut(1, 32 * 32, 2**17))
    a, b = sample(Case("tiles", (1, 5, 9, 11)), torch.float32)
    tiles.gram_l1_positions(a.detach(), b.detach(), True, True)
    assert [tuple(t.shape[1:]) for t in made] == [(32, 32)] * 3 + [(32, 3)] + [(32, 32)] * 2 + [
        (32, 3),
        (32, 32),
        (32, 3),
        (3, 3),
    ]


@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 7), st.integers(1, 7)),
    over=st.sampled_from(OVER),
    tile=st.integers(256, 2048),
    factor=st.integers(1, 100),
    samples=st.integers(1, 3),
)
def test_any_size_and_any_tiles(size: Size, over: str, tile: int, factor: int, samples: int) -> None:
    """Against the reference; and of swapped maps, and of positions in another order, the same."""
    a, b = sample(Case("property", size, over), torch.float64)
    expected = truth(a, b, over)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(tiles, "_cut", lambda x: tiles._Cut(min(samples, x.size(0)), tile, factor))
        shuffled = [t.flip(2).mT for t in (b, a)]
        y = ops.gram_l1(*shuffled, over=over)
    assert_close(y, expected["y"], 1e-12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_cut", lambda x: tiles._Cut(min(samples, x.size(0)), tile, factor))
        for name, value in results(a, b, over).items():
            assert_close(value, expected[name], 1e-12, what=name)


def style(a: Tensor, b: Tensor) -> Tensor:
    """The mean over the entries of C x C matrices divided by C H W."""
    return ops.gram_l1(a, b, normalise=1 / a[0].numel()).mean() / a.size(1) ** 2


def only(name: str, case: str) -> Any:
    return pytest.mark.parametrize("case", [given for given in cases(name) if given.id in (case, "absent")])


@only("aot_losses", "style0")
def test_published_aot_style(case: dict, backend: str, device: torch.device) -> None:
    requires(backend, "channels")
    v = {name: t.to(device) for name, t in tensors("aot_losses", case).items()}
    maps = {layer: v[f"xf_{layer}"].requires_grad_() for layer in case["layers"]}
    loss = sum(style(x, v[f"yf_{layer}"]) for layer, x in maps.items())
    assert_published(loss.detach().cpu(), v["loss"].cpu(), case, "loss")
    loss.backward()
    for layer, x in maps.items():
        assert_published(x.grad.cpu(), v[f"g_xf_{layer}"].cpu(), case, f"g_xf_{layer}")


@pytest.mark.parametrize(
    "name, case, x, matrix, over",
    [
        ("aot_losses", "style0", "xf_relu2_2", "gram_relu2_2", "channels"),
        ("gin_losses", "gram", "x", "matrix", "channels"),
        ("regionwise_ops", "featloss", "o0", "gram_o0", "channels"),
        ("regionwise_ops", "featloss", "o0", "new_gram_o0", "positions"),
    ],
)
def test_published_matrices(
    name: str, case: str, x: str, matrix: str, over: str, backend: str, device: torch.device
) -> None:
    """The distance to the matrix of zeros is the sum of the recorded magnitudes."""
    requires(backend, over)
    v = tensors(name, {"id": case})
    t = v[x].to(device)
    factor = 1 / t[0].numel() if over == "channels" else 1 / t.size(1) ** 2
    found = ops.gram_l1(t, torch.zeros_like(t), over=over, normalise=factor)
    assert_close(found, v[matrix].double().abs().sum((1, 2)), 1e-5)


@only("regionwise_ops", "featloss")
def test_published_regionwise(case: dict, backend: str, device: torch.device) -> None:
    v = {name: t.to(device) for name, t in tensors("regionwise_ops", case).items()}
    if backend != "triton":
        maps = [v[f"o{i}"].clone().requires_grad_() for i in range(3)]
        loss = sum(ops.gram_l1(o, v[f"t{i}"], normalise=1 / o[0].numel()).sum() for i, o in enumerate(maps))
        loss.backward()
        assert_published(loss.detach().cpu(), v["style"].cpu(), case, "style")
        for i, o in enumerate(maps):
            assert_published(o.grad.cpu(), v[f"g_o{i}_style"].cpu(), case, f"g_o{i}_style")
    o = v["o1"].requires_grad_()
    loss = ops.gram_l1(o, v["t1"], over="positions", normalise=1 / o.size(1) ** 2).sum()
    loss.backward()
    assert_published(loss.detach().cpu(), v["cor"].cpu(), case, "cor")
    assert_published(o.grad.cpu(), v["g_o1_cor"].cpu(), case, "g_o1_cor")


@only("naoto_losses", "l0")
def test_published_pconv_style(case: dict, backend: str, device: torch.device) -> None:
    requires(backend, "channels")

    def features(picture: Tensor) -> list[Tensor]:
        a = F.avg_pool2d(picture, 4)
        return [torch.cat([t, t * t, 1 - t], 1) for t in (a, F.avg_pool2d(a, 2), F.avg_pool2d(a, 4))]

    v = {name: t.to(device) for name, t in tensors("naoto_losses", case).items()}
    composed = v["mask"] * v["input"] + (1 - v["mask"]) * v["output"]
    pairs = [*zip(features(v["output"]), features(v["gt"]), strict=True)]
    pairs += zip(features(composed), features(v["gt"]), strict=True)
    assert_published(sum(style(*pair) for pair in pairs).cpu(), v["style"].cpu(), case, "style")


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, x: Tensor, target: Tensor, over: str) -> Tensor:
        a, b = self.conv(x), self.conv(target)
        return ops.gram_l1(a, b, over=over).mean() + ops.gram_l1(a, b.detach(), over="positions").sum()


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compile(engine: str, backend: str, device: torch.device) -> None:
    if (backend, engine) == ("reference", "inductor"):
        pytest.skip("plain PyTorch")
    torch.compiler.reset()
    net = Loss().to(device)
    over = "positions" if backend == "triton" else "channels"
    x, target = torch.randn(2, 2, 3, 10, 12, device=device).unbind()
    found = []
    for f in (net, torch.compile(net, fullgraph=True, backend=engine)):
        net.zero_grad()
        y = f(x, target, over)
        y.backward()
        found.append([y.detach(), *(p.grad.clone() for p in net.parameters())])
    for one, other in zip(*found, strict=True):
        assert_close(other, one, 1e-4)


X = torch.ones(2, 3, 4, 5)


@pytest.mark.parametrize(
    "a, b, options, sentence",
    [
        (X[0], X, {}, r"a must be \(N, C, H, W\), got \(3, 4, 5\)"),
        (X, X[0], {}, r"b must be \(N, C, H, W\), got \(3, 4, 5\)"),
        (X.int(), X, {}, "a must be float32, float64, float16 or bfloat16, got torch.int32"),
        (X, X.double(), {}, "b must be torch.float32 on cpu, got torch.float64 on cpu"),
        (X, X[:1], {}, r"b must be \(2, 3, 4, 5\) as a, got \(1, 3, 4, 5\)"),
        (X, X, {"over": "pixels"}, "over must be channels or positions, got pixels"),
        (X, X, {"normalise": 0.0}, "normalise must be more than 0 and finite, got 0.0"),
        (X, X, {"normalise": math.inf}, "normalise must be more than 0 and finite, got inf"),
        (X, X, {"normalise": math.nan}, "normalise must be more than 0 and finite, got nan"),
    ],
)
def test_refusals(a: Tensor, b: Tensor, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^gram_l1: {sentence}$"):
        ops.gram_l1(a, b, **options)


def test_what_triton_cannot_do() -> None:
    assert api._refusal("triton", False, torch.float32) == "it has a kernel over positions, not over channels"
    assert api._refusal("triton", True, torch.float64) == "it computes in float32, not float64"
    assert not api._refusal("triton", True, torch.bfloat16) and not api._refusal("cpu", False, torch.float64)
    if not _backends.status()["triton"]:
        with use_backend("triton"), pytest.raises(NoBackendError, match="got triton: it has a kernel over positions"):
            device = _backends.DEVICE["triton"]
            ops.gram_l1(X.to(device), X.to(device))


@pytest.mark.skipif(
    bool(no_interpreter()) or INTERPRETED, reason=no_interpreter() or "this process is the one that it would start"
)
def test_interpreter() -> None:
    """The tests above with Triton's kernel, interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("FUSED_INPAINT_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k"]
    command.append("what_triton or (triton and not inductor and not (opcheck and not (contiguous and both)))")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 35, done.stdout[-2000:]


def compile_kernels(dtype: torch.dtype, capability: int) -> list[Compiled]:
    """Without, with one and with both products, for 128 channels at 64 x 64."""
    from triton.runtime.driver import driver

    from fused_inpaint.ops import triton_common
    from fused_inpaint.ops.gram import triton_impl

    driver.set_active(Driver(capability))
    found: list[Compiled] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        built = kernel.warmup(*arguments, grid=grid, **options, enable_fp_fusion=True)
        found.append(inspect("", kernel, options, built))

    triton_common.launch = launch
    x = torch.empty(2, 128, 64, 64, dtype=dtype, device="meta", memory_format=torch.channels_last)
    for needs in ((False, False), (True, False), (True, True)):
        triton_impl.gram_l1_positions(x, x, *needs)
    return found


TARGETS = [
    pytest.param(torch.bfloat16, 90, id="bfloat16-sm_90"),
    pytest.param(torch.float16, 80, id="float16-sm_80"),
    pytest.param(torch.float32, 90, id="float32-sm_90"),
]


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[str, Future[list[Compiled]]]]:
    """By dtype and architecture; two processes compile, and this one never loads Triton."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=no_line_numbers) as pool:
        yield {str(target.id): pool.submit(compile_kernels, *target.values) for target in TARGETS}


@pytest.mark.skipif(bool(NO_PTXAS) or INTERPRETED, reason=NO_PTXAS or "Triton's interpreter is on in this process")
@pytest.mark.parametrize(("dtype", "capability"), TARGETS)
def test_compiles(
    compiled: dict[str, Future[list[Compiled]]], request: pytest.FixtureRequest, dtype: torch.dtype, capability: int
) -> None:
    """Machine code that fits, spills nothing, and multiplies half types on tensor cores."""
    found = compiled[request.node.callspec.id].result()
    assert [result.kernel for result in found] == ["positions_kernel"] * 3
    for result in found:
        assert result.cubin > 0 and result.shared <= SHARED_MEMORY[capability] and result.spilled == 0, result
        half, wgmma = dtype != torch.float32, capability == 90
        assert (result.wgmma, result.mma) == (half and wgmma, half and not wgmma), result
        assert result.conversions == 0 and (result.wide_copies or not half), result
