# SPDX-License-Identifier: Apache-2.0
"""Region normalization on every backend: against its reference in float64, the published code's numbers, and itself."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import OPERATORS, PRECISIONS, assert_close, mask_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from vectors import assert_close as assert_published
from vectors import cases, tensors

from fused_inpaint import LearnedRegionNorm2d, RegionNorm2d, _backends, ops, use_backend


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    size: tuple[int, int, int, int] = (2, 5, 9, 11)
    mask: str = "random"  # ones, zeros, pixel, box, random
    planes: str = "n1"  # batch (n or 1) and channels (1 or c) of the mask
    affine: bool = True
    maps: bool = False  # scale and shift for each pixel
    stats: str = "batch"
    shared_bias: bool = False
    activation: str = "none"
    eps: float = 1e-5


CASES = [
    Case("plain"),
    Case("bare", affine=False),
    Case("relu", activation="relu", mask="box"),
    Case("leaky_relu", activation="leaky_relu"),
    Case("instance", stats="instance"),
    Case("instance_relu", stats="instance", mask="box", activation="relu"),
    Case("shared_bias", shared_bias=True),
    Case("shared_mask", planes="11", size=(3, 4, 6, 7)),
    Case("channel_masks", planes="nc"),
    Case("shared_channel_masks_instance", planes="1c", stats="instance"),
    Case("all_hole", mask="zeros"),
    Case("all_valid", mask="ones", shared_bias=True, activation="relu"),
    Case("one_valid_pixel", mask="pixel"),
    Case("one_pixel_map", size=(3, 4, 1, 1), mask="ones"),
    Case("one_value", size=(1, 2, 1, 1), mask="zeros"),
    Case("one_channel", size=(2, 1, 8, 5)),
    Case("wide", size=(2, 70, 7, 5), mask="box", activation="leaky_relu"),
    Case("many_chunks", size=(2, 9, 70, 60), mask="box"),
    Case("maps", affine=False, maps=True),
    Case("maps_relu", affine=False, maps=True, activation="relu", size=(2, 17, 6, 9), mask="box"),
    Case("maps_instance", affine=False, maps=True, stats="instance", activation="leaky_relu"),
    Case("large_eps", eps=0.5, mask="box"),
    Case("empty_batch", size=(0, 3, 4, 4)),
]
ALL = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# What an empty batch needs no operator for.
FULL = pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _tiny(one_thread: None) -> None:
    """Sizes are small."""


def sample(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(x, mask, the rest of the call); leaves require gradients."""
    n, c, h, w = case.size
    g = torch.Generator().manual_seed(sum(map(ord, case.name)))
    batch, planes = (n if case.planes[0] == "n" else 1), (c if case.planes[1] == "c" else 1)
    mask = mask_of(case.mask, (batch, planes, h, w), g).to(device)
    x = (torch.randn(n, c, h, w, generator=g) * 2 + 3).to(dtype)
    rest: dict[str, Any] = {name: getattr(case, name) for name in ("stats", "shared_bias", "activation", "eps")}
    leaves = {}
    if case.affine:
        leaves = {"weight": torch.randn(2, c, generator=g) + 1, "bias": torch.randn(2, c, generator=g)}
    if case.maps:
        leaves = {name: torch.randn(n, 1, h, w, generator=g) for name in ("scale", "shift")}
    rest |= {name: leaf.to(dtype).to(device).requires_grad_() for name, leaf in leaves.items()}
    return x.to(device).requires_grad_(), mask, rest


def results(x: Tensor, mask: Tensor, rest: dict[str, Any], grad: Tensor) -> dict[str, Tensor]:
    y = ops.region_norm(x, mask, **rest)
    y.backward(grad.to(y.device, y.dtype))
    found = {"y": y.detach(), "x": x.grad}
    return found | {name: t.grad for name, t in rest.items() if isinstance(t, Tensor)}


def truth(x: Tensor, mask: Tensor, rest: dict[str, Any], grad: Tensor) -> dict[str, Tensor]:
    def wide(t: Any) -> Any:
        return t.detach().cpu().double().requires_grad_() if isinstance(t, Tensor) else t

    with use_backend("reference"):
        return results(wide(x), mask.cpu(), {name: wide(t) for name, t in rest.items()}, grad.double())


@pytest.mark.parametrize("dtype, rtol, _folded, atol", PRECISIONS)
@ALL
def test_reference(
    case: Case, dtype: torch.dtype, rtol: float, _folded: float, atol: float, backend: str, device: torch.device
) -> None:
    if dtype == torch.float64 and (device.type != "cpu" or backend == "triton"):
        pytest.skip("float64 runs on the CPU only")
    x, mask, rest = sample(case, dtype, device)
    grad = torch.randn(case.size).to(dtype)
    actual, expected = results(x, mask, rest, grad), truth(x, mask, rest, grad)
    assert actual["y"].dtype == dtype and actual["x"].dtype == dtype
    for name, value in actual.items():
        assert_close(value, expected[name], rtol, atol, name)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NumPy in Triton's interpreter
@pytest.mark.parametrize("stats", ["batch", "instance"])
@pytest.mark.parametrize("poisoned_region", [0, 1])
def test_regions_do_not_leak(backend: str, device: torch.device, poisoned_region: int, stats: str) -> None:
    """NaN and infinity in one region, and in its gradient, leave the other's output and gradients as they are."""
    case = Case("leak", mask="box", stats=stats, activation="relu")
    x, mask, rest = sample(case, torch.float32, device)
    grad = torch.randn(case.size)
    clean = results(x, mask, rest, grad)
    x2, _, rest2 = sample(case, torch.float32, device)
    poisoned = (mask == poisoned_region).expand_as(x2)
    with torch.no_grad():
        x2[poisoned] = torch.nan
        x2[0, 0][poisoned[0, 0]] = torch.inf
    grad2 = grad.to(device).masked_fill(poisoned, torch.nan)
    dirty = results(x2, mask, rest2, grad2)
    for name in ("y", "x"):
        assert torch.equal(dirty[name][~poisoned], clean[name][~poisoned])
    for name in ("weight", "bias"):
        assert torch.equal(dirty[name][1 - poisoned_region], clean[name][1 - poisoned_region])


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("size", [(2, 6, 40, 50), (1, 33, 9, 9)])
def test_large_means(
    backend: str, device: torch.device, size: tuple[int, ...], dtype: torch.dtype, atol: float
) -> None:
    """Mean 1e4, deviation 1e-2 in float32, and the same in the steps that bfloat16 has there."""
    spread = 1e-2 if dtype == torch.float32 else 128.0
    x = (1e4 + spread * torch.randn(size)).to(dtype).to(device)
    mask = (torch.rand(size[0], 1, *size[2:]) > 0.5).float().to(device)
    with use_backend("reference"):
        expected = ops.region_norm(x.double().cpu(), mask.cpu())
    actual = ops.region_norm(x, mask).double().cpu()
    assert (actual - expected).abs().max() <= atol * expected.abs().max()


def test_gradcheck(backend: str, device: torch.device) -> None:
    if backend == "triton" or device.type != "cpu":
        pytest.skip("float64 runs on the CPU only")
    for case in (
        Case("check", size=(2, 3, 3, 4), activation="leaky_relu"),
        Case("check_shared", size=(2, 2, 4, 3), shared_bias=True, stats="instance"),
        Case("check_maps", size=(2, 3, 3, 4), affine=False, maps=True),
    ):
        x, mask, rest = sample(case, torch.float64)
        names = [name for name, t in rest.items() if isinstance(t, Tensor)]

        def call(x: Tensor, *leaves: Tensor, m: Tensor = mask, r: dict = rest, k: list = names) -> Tensor:
            return ops.region_norm(x, m, **(r | dict(zip(k, leaves, strict=True))))

        leaves = [rest[name] for name in names]
        assert torch.autograd.gradcheck(call, (x, *leaves))
        assert torch.autograd.gradgradcheck(call, (x, *leaves), atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_layouts(backend: str, device: torch.device, layout: str) -> None:
    whole = torch.randn(2, 6, 8, 10, device=device)
    mask = (torch.rand(2, 1, 8, 10, device=device) > 0.5).float()
    x = {
        "contiguous": whole,
        "channels_last": whole.contiguous(memory_format=torch.channels_last),
        "sliced": torch.randn(2, 12, 8, 20, device=device)[:, ::2, :, 1::2],
        "expanded": whole[:, :1].expand(-1, 6, -1, -1),
    }[layout]
    y = ops.region_norm(x, mask)
    assert torch.equal(y, ops.region_norm(x.clone(memory_format=torch.contiguous_format), mask))
    if backend != "reference":
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32, torch.float16, torch.bfloat16])
def test_mask_dtypes(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    x, mask, rest = sample(Case("dtypes"), torch.float32, device)
    assert torch.equal(ops.region_norm(x, mask.to(dtype), **rest), ops.region_norm(x, mask, **rest))


def test_threads_and_runs_give_the_same_bits(backend: str, device: torch.device) -> None:
    x, mask, rest = sample(Case("bits", size=(2, 40, 60, 50), mask="box"), torch.float32, device)
    grad = torch.randn(x.shape)
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        for t in (x, rest["weight"], rest["bias"]):
            t.grad = None
        found.append({name: value.clone() for name, value in results(x, mask, rest, grad).items()})
    if backend == "reference":
        found = found[1:]  # torch's own sums
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 2**31),
    st.sampled_from(["batch", "instance"]),
)
def test_each_region_has_mean_0_and_variance_below_1(size: tuple[int, ...], seed: int, stats: str) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=g) * 5 - 7
    mask = (torch.rand(size[0], 1, *size[2:], generator=g) > 0.5).float()
    y = ops.region_norm(x, mask, stats=stats).double()
    over = (0, 2, 3) if stats == "batch" else (2, 3)
    for region in (0, 1):
        inside = (mask == region).double().expand_as(y)
        values = inside.sum(over).clamp(min=1)
        assert ((y * inside).sum(over) / values).abs().max() < 1e-4
        assert ((y * y * inside).sum(over) / values).max() < 1 + 1e-4


@pytest.mark.parametrize("case", cases("rn_b"), ids=lambda case: case["id"])
def test_published_rn_b(backend: str, device: torch.device, case: dict) -> None:
    """The mask is the foreground; gamma is weight - 1; both betas everywhere."""
    a = tensors("rn_b", case)
    layer = RegionNorm2d(case["c"], shared_bias=True).to(device)
    with torch.no_grad():
        layer.weight.copy_(1 + torch.stack([a["background_gamma"], a["foreground_gamma"]]))
        layer.bias.copy_(torch.stack([a["background_beta"], a["foreground_beta"]]))
    x = a["x"].to(device).requires_grad_()
    y = layer(x, a["mask"].to(device))
    y.backward(a["g"].to(device))
    for name, value in {
        "out": y,
        "gx": x.grad,
        "g_foreground_gamma": layer.weight.grad[1],
        "g_background_gamma": layer.weight.grad[0],
        "g_foreground_beta": layer.bias.grad[1],
        "g_background_beta": layer.bias.grad[0],
    }.items():
        assert_published(value.detach().cpu(), a[name], case, name)


@pytest.mark.parametrize("case", cases("rn_l"), ids=lambda case: case["id"])
def test_published_rn_l(backend: str, device: torch.device, case: dict) -> None:
    a = tensors("rn_l", case)
    layer = LearnedRegionNorm2d(case["c"], case["threshold"]).to(device)
    published = {"map_conv.weight": "sa.conv1.weight"}
    published |= {f"{k}_conv.{p}": f"sa.{k}_conv.{p}" for k in ("gamma", "beta") for p in ("weight", "bias")}
    layer.load_state_dict({ours: a[theirs] for ours, theirs in published.items()})
    x = a["x"].to(device).requires_grad_()
    belongs = layer.map(x)
    assert torch.equal((belongs >= case["threshold"]).cpu(), a["region"] != 0)
    y = layer(x)
    y.backward(a["g"].to(device))
    named = dict(layer.named_parameters())
    found = {"out": y, "sa_map": belongs, "gx": x.grad}
    found |= {f"g_{theirs}": named[ours].grad for ours, theirs in published.items()}
    for name, value in found.items():
        assert_published(value.detach().cpu(), a[name], case, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 3, 5, 4), (1, 1, 1, 1), (2, 67, 6, 5)])
def test_channel_pool(backend: str, device: torch.device, size: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(size).to(dtype).to(device).requires_grad_()
    y = ops.channel_pool(x)
    wide = x.detach().double().cpu().requires_grad_()
    expected = torch.cat([wide.mean(1, keepdim=True), wide.amax(1, keepdim=True)], 1)
    grad = torch.randn(expected.shape).to(dtype)
    y.backward(grad.to(device))
    # Where bfloat16 values tie, the first takes the gradient.
    first = torch.zeros_like(wide).scatter_(1, wide.argmax(1, keepdim=True), 1.0)
    expected_grad = grad[:, :1].double() / size[1] + grad[:, 1:].double() * first
    rtol = 1e-5 if dtype == torch.float32 else 2**-7
    assert_close(y, expected.detach(), rtol)
    assert_close(x.grad, expected_grad, rtol)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = RegionNorm2d(8, activation="relu")
        # A threshold that no pixel is near: rounding must not move one to the other side.
        self.learned = LearnedRegionNorm2d(8, threshold=0.999, stats="instance")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.learned(self.norm(self.conv(x), mask))


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compile(backend: str, device: torch.device, engine: str) -> None:
    torch.compiler.reset()
    net = Block().to(device)
    compiled = torch.compile(net, fullgraph=True, backend=engine)
    x, mask = torch.randn(2, 3, 12, 10, device=device), (torch.rand(2, 1, 12, 10, device=device) > 0.5).float()
    found = []
    for f in (net, compiled):
        net.zero_grad()
        y = f(x, mask)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in net.parameters())])
    for one, other in zip(*found, strict=True):
        # The norm takes the convolution's bias away again: its gradient is rounding.
        assert_close(other, one, 1e-4, 1e-4)


def test_autocast(backend: str, device: torch.device) -> None:
    """A norm keeps the dtype that it is given; its parameters stay in float32."""
    layer = RegionNorm2d(4).to(device)
    mask = torch.ones(1, 1, 6, 6, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, 4, 6, 6, device=device, dtype=dtype)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = layer(x, mask)
        assert y.dtype == dtype and torch.equal(y, layer(x, mask))


@OPERATORS
@FULL
def test_opcheck(backend: str, device: torch.device, case: Case) -> None:
    op, suffix = torch.ops.fused_inpaint, "_triton" if backend == "triton" else ""
    x, mask, rest = sample(case, torch.float32, device)
    v = x.detach().contiguous(memory_format=torch.channels_last)
    plane = mask.contiguous(memory_format=torch.channels_last)
    instance = case.stats == "instance"
    moments = getattr(op, f"region_moments{suffix}")
    torch.library.opcheck(moments, (v, plane, instance))
    count, mean, m2 = moments(v, plane, instance)
    invstd = (m2 / count.clamp(min=1) + case.eps).rsqrt()
    leaves = [rest.get(name) for name in ("weight", "bias", "scale", "shift")]
    point = (case.shared_bias, case.activation, 0.2)
    forward = getattr(op, f"region_norm{suffix}")
    torch.library.opcheck(forward, (v, plane, mean, invstd, count, *leaves, *point, case.eps, instance, ""))
    constants = [None if t is None else t.detach() for t in leaves]
    grad = torch.randn_like(v)
    sums = getattr(op, f"region_norm_sums{suffix}")
    torch.library.opcheck(sums, (grad, v, plane, mean, invstd, *constants, *point))
    means = torch.randn(*mean.shape[:1], 2, *mean.shape[1:], dtype=torch.float64, device=device)
    gradient = getattr(op, f"region_norm_gradient{suffix}")
    torch.library.opcheck(gradient, (grad, v, plane, mean, invstd, means, *constants, *point))
    pool = getattr(op, f"channel_pool{suffix}")
    torch.library.opcheck(pool, (v.requires_grad_(),))
    torch.library.opcheck(
        getattr(op, f"channel_pool_backward{suffix}"), (pool(v).detach(), v.detach(), pool(v).detach())
    )


X, M = torch.ones(2, 3, 4, 5), torch.ones(2, 1, 4, 5)
PER_PIXEL = torch.ones(2, 1, 4, 5)


@pytest.mark.parametrize(
    "arguments, options, sentence",
    [
        ((X[0], M), {}, r"x must be \(N, C, H, W\), got \(3, 4, 5\)"),
        ((X.int(), M), {}, "x must be float32, float64, float16 or bfloat16, got torch.int32"),
        ((X, M[..., 1:]), {}, r"mask must be \(2, 1, 4, 5\) or \(2, 3, 4, 5\), got \(2, 1, 4, 4\)"),
        ((X, M.int()), {}, "mask must be uint8, bool or float, got torch.int32"),
        ((X, M / 2), {}, "mask must be 0 or 1 everywhere, got 0.5"),
        ((X, M, X[0, 0]), {}, r"weight must be \(2, 3\), got \(4, 5\)"),
        ((X, M, None, torch.ones(3)), {}, r"bias must be \(2, 3\), got \(3,\)"),
        ((X, M), {"eps": 0}, "eps must be more than 0, got 0"),
        ((X, M), {"stats": "layer"}, "stats must be batch or instance, got layer"),
        ((X, M), {"activation": "elu"}, "activation must be none, relu or leaky_relu, got elu"),
        ((X, M), {"slope": -1.0}, "slope must be 0 or more, got -1.0"),
        ((X, M), {"scale": PER_PIXEL}, "scale and shift must be given together, got one of them"),
        ((X, M), {"scale": X, "shift": PER_PIXEL}, r"scale must be \(2 or 1, 1, 4, 5\), got \(2, 3, 4, 5\)"),
        (
            (X, M, torch.ones(2, 3)),
            {"scale": PER_PIXEL, "shift": PER_PIXEL},
            "weight must be None with scale and shift, got a tensor",
        ),
    ],
)
def test_refusals(arguments: tuple, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^region_norm: {sentence}$"):
        ops.region_norm(*arguments, **options)


def test_layer_refusals() -> None:
    with pytest.raises(ValueError, match=r"^LearnedRegionNorm2d: threshold must be between 0 and 1, got 1$"):
        LearnedRegionNorm2d(4, threshold=1)
    with pytest.raises(ValueError, match=r"^region_norm: mask must be 0 or 1 everywhere, got 0.5$"):
        RegionNorm2d(3)(X, M[..., ::2] / 2)
    with pytest.raises(ValueError, match=r"^channel_pool: x must be of at least one channel, got \(1, 0, 2, 2\)$"):
        ops.channel_pool(torch.ones(1, 0, 2, 2))


@pytest.mark.skipif(bool(_backends.status()["cpu"]), reason=_backends.status()["cpu"] or "usable")
def test_operators_stay_inside_their_memory() -> None:
    op = torch.ops.fused_inpaint
    x, mask = torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), M.to(torch.uint8)
    count, mean, m2 = op.region_moments(x, mask, False)
    rest = (None, None, None, None, False, "none", 0.2)
    assert op.region_norm(x, mask, mean, m2, count, *rest, 1e-5, False, "").shape == x.shape
    for wrong in (
        (x, mask[:, :, 1:], mean, m2, count),
        (x, mask.float(), mean, m2, count),
        (x, mask, mean[:, :1], m2, count),
        (x, mask, mean.float(), m2, count),
        (x, mask, mean, m2[..., :2], count),
    ):
        with pytest.raises(RuntimeError, match=r"region_norm: .* must "):
            op.region_norm(*wrong, *rest, 1e-5, False, "")
    with pytest.raises(RuntimeError, match=r"region_norm: .* must "):
        op.region_norm(x, mask, mean, m2, count, torch.ones(2, 2), *rest[1:], 1e-5, False, "")


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias"), ("weight", "bias")])
def test_some_gradients_are_those_of_all(backend: str, device: torch.device, wanted: tuple[str, ...]) -> None:
    found = []
    for names in (("x", "weight", "bias"), wanted):
        x, mask, rest = sample(Case("some", activation="relu"), torch.float32, device)
        leaves = {"x": x, "weight": rest["weight"], "bias": rest["bias"]}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in names)
        ops.region_norm(x, mask, **rest).square().sum().backward()
        found.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, grad in found[1].items():
        assert (grad is None) == (name not in wanted)
        assert grad is None or torch.equal(grad, found[0][name])


def test_what_hangs_on_a_convolution_is_called() -> None:
    layer = nn.utils.parametrizations.spectral_norm(LearnedRegionNorm2d(3).gamma_conv)
    learned = LearnedRegionNorm2d(3)
    learned.gamma_conv = layer
    learned(torch.randn(1, 3, 8, 8)).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None
    seen = []
    learned.beta_conv.register_forward_hook(lambda *a: seen.append(1))
    learned(torch.randn(1, 3, 8, 8))
    assert seen == [1]


def test_tiny_eps_stays_finite(backend: str, device: torch.device) -> None:
    x, mask = torch.ones(1, 2, 4, 4, device=device), torch.ones(1, 1, 4, 4, device=device)
    assert torch.equal(ops.region_norm(x, mask, eps=1e-80), torch.zeros_like(x))


def test_mask_of_another_size_is_resized() -> None:
    layer = RegionNorm2d(3)
    x, mask = torch.randn(2, 3, 8, 6), (torch.rand(2, 1, 17, 23) > 0.5).float()
    assert torch.equal(layer(x, mask), layer(x, F.interpolate(mask, (8, 6))))
