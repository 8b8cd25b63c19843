# SPDX-License-Identifier: Apache-2.0
"""Parallel dilated convolutions on every backend: against their reference in float64, the published code's numbers,
themselves."""

import copy
import dataclasses

import pytest
import torch
from cases import OPERATORS, PRECISIONS, assert_close
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from vectors import assert_close as assert_published
from vectors import cases, meta, state, tensors

from fused_inpaint import PyramidConv2d, SPDBlock, _backends, ops, use_backend


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    dilations: tuple[int, ...] = (1, 2, 4)
    padding_mode: str = "reflect"
    channels: int = 5
    outputs: int = 2  # of a branch
    size: tuple[int, int] = (9, 11)
    batch: int = 2
    bias: bool = True
    activation: str = "relu"


SPD8 = (2, 3, 4, 5, 6, 8, 10, 1)
# Large enough for Winograd's form on the CPU, with ragged tiles, and channels beside the vectors.
TILED = Case("tiled", (1, 3), channels=80, outputs=80, size=(33, 31))
CASES = [
    *(Case(mode, padding_mode=mode) for mode in ("reflect", "replicate", "zeros")),
    Case("no_bias", bias=False),
    Case("no_activation", activation="none"),
    Case("one_branch", (3,), outputs=6),
    Case("equal_branches", (2, 2)),
    Case("eight", SPD8, "replicate", outputs=1),
    Case("nine_outputs", (1, 2, 3), outputs=3),
    Case("one_channel", (1, 2), channels=1, outputs=1),
    Case("one_pixel", SPD8, "replicate", size=(1, 1)),
    Case("one_pixel_zeros", (1, 2), "zeros", size=(1, 1)),
    Case("one_row", (1, 7), "replicate", size=(1, 13)),
    Case("beyond_the_map", SPD8, "replicate", size=(4, 6)),
    Case("beyond_the_map_zeros", (1, 6, 20), "zeros", size=(4, 6)),
    Case("as_far_as_reflects", (1, 6, 5), size=(7, 8)),
    Case("packs", (1, 2), channels=16, outputs=16),
    # A weight's gradient by products of matrices.
    Case("few_pixels", (2, 3), "replicate", channels=128, outputs=128, size=(5, 6)),
    Case("empty_batch", batch=0),
    *(
        dataclasses.replace(TILED, name=f"tiled_{mode}", padding_mode=mode)
        for mode in ("reflect", "replicate", "zeros")
    ),
    dataclasses.replace(TILED, name="tiled_and_not", dilations=(2, 25), padding_mode="replicate"),
    dataclasses.replace(TILED, name="tiled_ragged", channels=83, outputs=85, bias=False, size=(26, 24)),
    dataclasses.replace(TILED, name="tiled_no_activation", activation="none"),
    Case("tiled_steps", (1,), channels=512, outputs=48, size=(34, 34), batch=1),
]
ALL = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.fixture(autouse=True)
def _tiny(one_thread: None) -> None:
    """Sizes are small."""


@dataclasses.dataclass
class Sample:
    case: Case
    x: Tensor
    weight: Tensor
    bias: Tensor | None

    def __call__(self) -> Tensor:
        c = self.case
        return ops.pyramid_conv2d(
            self.x, self.weight, self.bias, c.dilations, padding_mode=c.padding_mode, activation=c.activation
        )

    def leaves(self) -> dict[str, Tensor]:
        leaves = {"x": self.x, "weight": self.weight}
        return leaves if self.bias is None else leaves | {"bias": self.bias}

    def wide(self, sign: int = 1) -> "Sample":
        leaves = [sign * t.detach().cpu().double() for t in self.leaves().values()]
        leaves[0] *= sign
        leaves = [leaf.requires_grad_() for leaf in leaves]
        return Sample(self.case, *leaves) if self.bias is not None else Sample(self.case, *leaves, None)


def sample(case: Case, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Sample:
    g = torch.Generator().manual_seed(sum(map(ord, case.name)))
    outputs = case.outputs * len(case.dilations)
    x = torch.randn(case.batch, case.channels, *case.size, generator=g)
    weight = torch.randn(outputs, case.channels, 3, 3, generator=g) / (3 * case.channels**0.5)
    bias = torch.randn(outputs, generator=g) if case.bias else None
    leaves = [None if t is None else t.to(dtype).to(device).requires_grad_() for t in (x, weight, bias)]
    return Sample(case, *leaves)


def cotangent(s: Sample) -> Tensor:
    """A gradient for y, in float64; 0 where the ReLU's input is within rounding of its kink."""
    with use_backend("reference"), torch.no_grad():
        before = s.wide()() - s.wide(-1)()
    grad = torch.randn(before.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if before.numel() and s.case.activation == "relu":
        grad[before.abs() < 2**-5 * before.abs().max()] = 0
    return grad.bfloat16().double()


def results(s: Sample, grad: Tensor) -> dict[str, Tensor]:
    y = s()
    y.backward(grad.to(y.device, y.dtype))
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in s.leaves().items()}


def truth(s: Sample, grad: Tensor) -> dict[str, Tensor]:
    with use_backend("reference"):
        return results(s.wide(), grad)


@pytest.mark.parametrize("dtype, rtol, folded_rtol, atol", PRECISIONS)
@ALL
def test_reference(
    case: Case, dtype: torch.dtype, rtol: float, folded_rtol: float, atol: float, backend: str, device: torch.device
) -> None:
    if dtype == torch.float64 and (device.type != "cpu" or backend == "triton"):
        pytest.skip("float64 runs on the CPU only")
    s = sample(case, dtype, device)
    grad = cotangent(s)
    actual, expected = results(s, grad), truth(s, grad)
    assert actual["y"].dtype == dtype
    for name, value in actual.items():
        assert_close(value, expected[name], rtol, atol, name)


@pytest.mark.skipif(bool(_backends.status()["cpu"]), reason=_backends.status()["cpu"] or "usable")
def test_forms_on_the_cpu() -> None:
    """Which branches have a product of 16 groups, and which a direct one."""
    found = {}
    for case in CASES:
        if "tiled" not in case.name and case.name != "packs":
            continue
        s = sample(case)
        with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile, use_backend("cpu"):
            s()
        shapes = [event.input_shapes for event in profile.events() if event.name == "aten::convolution"]
        found[case.name] = [shape[0][1] // case.channels for shape in shapes]
    assert found == {
        "packs": [1, 1],
        "tiled_reflect": [16, 16],
        "tiled_replicate": [16, 16],
        "tiled_zeros": [16, 16],
        "tiled_and_not": [16, 1],
        "tiled_ragged": [16, 16],
        "tiled_no_activation": [16, 16],
        "tiled_steps": [16, 16],
    }


@pytest.mark.parametrize("name", ["reflect", "replicate", "zeros", "beyond_the_map", "tiled_and_not"])
def test_gradcheck(name: str, backend: str, device: torch.device) -> None:
    if backend == "triton" or device.type != "cpu":
        pytest.skip("float64 runs on the CPU only")
    case = named(name)
    if not name.startswith("tiled"):
        case = dataclasses.replace(case, channels=2, outputs=1, batch=1)
    s = sample(case, torch.float64)

    def call(*leaves: Tensor) -> Tensor:
        return Sample(case, *leaves)()

    leaves = tuple(s.leaves().values())
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    if not name.startswith("tiled"):
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@OPERATORS
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", ["reflect", "no_bias", "no_activation", "one_pixel", "packs", "tiled_and_not"])
def test_opcheck(backend: str, device: torch.device, name: str, grad: bool) -> None:
    s = sample(named(name), torch.float32, device)
    for leaf in s.leaves().values():
        leaf.requires_grad_(grad)
    rest = (list(s.case.dilations), s.case.padding_mode, s.case.activation)
    suffix = "_triton" if backend == "triton" else ""
    op = torch.ops.fused_inpaint
    forward = getattr(op, f"pyramid_conv2d{suffix}")
    torch.library.opcheck(forward, (s.x, s.weight, s.bias, *rest))
    if not grad and not suffix:
        y = forward(s.x, s.weight, s.bias, *rest)
        for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
            torch.library.opcheck(op.pyramid_conv2d_backward, (torch.randn_like(y), y, s.x, s.weight, *rest, *needs))


PUBLISHED = [case for case in cases("gin_blocks") if case.id == "absent" or "Dilation" in case.values[0]["cls"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", PUBLISHED)
def test_published(case: dict, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    if dtype == torch.float64 and (device.type != "cpu" or backend == "triton"):
        pytest.skip("float64 runs on the CPU only")
    dilations = SPD8 if case["cls"] == "MultiDilationResnetBlock" else (2, 3, 4, 5)
    filled = state(meta("gin_blocks")["blocks"][case["network"]], case["set_seed"])
    fusion = f"fusion{len(dilations) + 1}.conv"
    branches = [f"branch{i + 1}.conv" for i in range(len(dilations))]
    block = SPDBlock(case["nc"], dilations)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(block.pyramid, name).copy_(torch.cat([filled[f"{branch}.{name}"] for branch in branches]))
            getattr(block.fuse, name).copy_(filled[f"{fusion}.{name}"])
    block.to(device, dtype)
    a = {name: value.to(device) for name, value in tensors("gin_blocks", case, dtype).items()}
    y = block(a["x"].requires_grad_())
    y.backward(a["g"])
    found = {"out": y.detach(), "gx": a["x"].grad}
    for name in ("weight", "bias"):
        found[f"g_{fusion}.{name}"] = getattr(block.fuse, name).grad
        parts = getattr(block.pyramid, name).grad.chunk(len(branches))
        found |= {f"g_{branch}.{name}": part for branch, part in zip(branches, parts, strict=True)}
    assert found.keys() == a.keys() - {"x", "g"}
    for name, value in found.items():
        assert_published(value.cpu(), a[name].cpu(), case, name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", ["reflect", "tiled_replicate"])
def test_layouts(backend: str, device: torch.device, name: str, layout: str) -> None:
    if backend == "triton" and name != "reflect":
        pytest.skip("large for the interpreter")
    s = sample(named(name), torch.float32, device)
    expected = results(s, torch.ones(s().shape))
    form = {
        "contiguous": lambda t: t.contiguous(),
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "sliced": lambda t: torch.stack([t, t], -1).flatten(3)[..., ::2],
    }[layout]
    s = Sample(s.case, *(form(t.detach()).requires_grad_() for t in (s.x, s.weight)), s.bias.detach().requires_grad_())
    found = results(s, torch.ones(s().shape))
    for key, value in found.items():
        assert_close(value, expected[key], 5e-6, what=key)
    if backend != "reference":
        assert found["y"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["reflect", "tiled_and_not"])
def test_the_same_bits_from_run_to_run(backend: str, device: torch.device, name: str) -> None:
    """Whatever the number of threads, but for the vendor's gradient of the weight."""
    grad = torch.randn(sample(named(name), device=device)().shape)
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(results(sample(named(name), torch.float32, device), grad))
    if backend != "reference":
        for key in ("y", "x", "bias"):
            assert torch.equal(found[0][key], found[1][key]), key
    assert all(torch.equal(found[1][key], found[2][key]) for key in found[1])


@pytest.mark.parametrize("name", ["reflect", "tiled_reflect"])
def test_nan_stays(backend: str, device: torch.device, name: str) -> None:
    """Where the window reads one; Winograd's tiles share it with their neighbours, and with them alone."""
    s = sample(named(name), torch.float32, device)
    far = s.case.batch - 1
    with torch.no_grad():
        s.x[0, 0, 4, 5] = torch.nan
        y = s()
        with use_backend("reference"):
            expected = s.wide()().isnan()
    assert expected.any() and y.isnan().cpu()[expected].all() and not y[far].isnan().any()
    if "tiled" not in name:
        assert torch.equal(y.isnan().cpu(), expected)
    # A loss that is NaN must show in every gradient that it reaches, through the ReLU too.
    if s.bias is not None:
        s().square().sum().backward()
        assert s.bias.grad.isnan().cpu()[expected.any(0).flatten(1).any(1)].all()


@given(
    dilations=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    mode=st.sampled_from(["reflect", "replicate", "zeros"]),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    channels=st.sampled_from([1, 3, 24, 31]),
    outputs=st.sampled_from([1, 2, 24]),
    batch=st.integers(1, 2),
)
@hypothesis_settings(max_examples=40)
def test_any_shape(
    dilations: list[int], mode: str, size: tuple[int, int], channels: int, outputs: int, batch: int
) -> None:
    if mode == "reflect":
        dilations = [min(d, min(size) - 1) for d in dilations]
        if min(dilations) < 1:
            mode, dilations = "zeros", [d + 1 for d in dilations]
    s = sample(Case("any", tuple(dilations), mode, channels, outputs, size, batch), torch.float64)
    grad = cotangent(s)
    expected = truth(s, grad)
    for name, value in results(s, grad).items():
        assert_close(value, expected[name], 1e-12, what=name)


def test_fp16_and_bf16_under_autocast(backend: str, device: torch.device) -> None:
    layer = PyramidConv2d(8, (1, 2)).to(device)
    x = torch.randn(1, 8, 8, 8, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device.type, dtype=dtype):
            y = layer(x)
        assert y.dtype == dtype
        assert_close(y, layer(x).detach(), 2**-6)


@OPERATORS
@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compile(backend: str, device: torch.device, engine: str) -> None:
    torch.compiler.reset()
    net = nn.Sequential(PyramidConv2d(6, (1, 3, 2)), SPDBlock(6, (2, 9))).to(device)
    x = torch.randn(2, 6, 12, 10, device=device)
    found = []
    for f in (net, torch.compile(net, fullgraph=True, backend=engine)):
        net.zero_grad()
        y = f(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in net.parameters())])
    for one, other in zip(*found, strict=True):
        assert_close(other, one, 1e-4)


def test_a_network_keeps_its_numbers(backend: str, device: torch.device) -> None:
    """Copied, and moved to channels_last."""
    net = nn.Sequential(PyramidConv2d(8, (1, 3)), SPDBlock(8)).to(device)
    other = copy.deepcopy(net).to(memory_format=torch.channels_last)
    x = torch.randn(1, 8, 12, 10, device=device)
    y, again = net(x), other(x.contiguous(memory_format=torch.channels_last))
    assert_close(again.detach(), y.detach(), 1e-5)
    y.sum().backward()
    again.sum().backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert_close(q.grad, p.grad, 1e-5)


X, W = torch.ones(2, 3, 4, 5), torch.ones(6, 3, 3, 3)


@pytest.mark.parametrize(
    "arguments, options, sentence",
    [
        ((X[0], W, None, (1, 2)), {}, r"x must be \(N, C, H, W\), got \(3, 4, 5\)"),
        ((X[:, :, :0], W, None, (1,)), {}, r"x must be .* of at least one channel and pixel, got \(2, 3, 0, 5\)"),
        ((X.int(), W, None, (1,)), {}, "x must be float32, float64, float16 or bfloat16, got torch.int32"),
        ((X, W[:, :2], None, (1, 2)), {}, r"weight must be \(O, 3, 3, 3\) .* 2 dilations, got \(6, 2, 3, 3\)"),
        ((X, W[..., :2], None, (1, 2)), {}, r"weight must be \(O, 3, 3, 3\) .* 2 dilations, got \(6, 3, 3, 2\)"),
        ((X, W, None, (1, 2, 1, 2)), {}, r"weight must be .* divisible by 4 dilations, got \(6, 3, 3, 3\)"),
        ((X, W, torch.ones(5), (1, 2)), {}, r"bias must be \(6,\), got \(5,\)"),
        ((X, W.double(), None, (1,)), {}, "weight must be torch.float32 as x, got torch.float64"),
        ((X, W, None, ()), {}, r"dilations must be one int or more of at least 1, in a sequence, got \(\)"),
        ((X, W, None, (1, 0)), {}, r"dilations must be one int or more of at least 1, in a sequence, got \(1, 0\)"),
        ((X, W, None, 2), {}, "dilations must be one int or more of at least 1, in a sequence, got 2"),
        ((X, W, None, (1, 4)), {}, r"dilations must be smaller than the map \(4, 5\) to reflect, got 4"),
        ((X, W, None, (1,)), {"activation": "elu"}, "activation must be relu or none, got elu"),
        ((X, W, None, (1,)), {"padding_mode": "circular"}, "padding_mode must be zeros, reflect or replicate, got .*"),
    ],
)
def test_refusals(arguments: tuple, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^pyramid_conv2d: {sentence}$"):
        ops.pyramid_conv2d(*arguments, **options)


def test_layer_refusals() -> None:
    with pytest.raises(ValueError, match=r"^PyramidConv2d: channels must be a multiple of 3 dilations, got 8$"):
        PyramidConv2d(8, (1, 2, 3))
    with pytest.raises(ValueError, match=r"^PyramidConv2d: dilations must be one int or more .*, got \(\)$"):
        PyramidConv2d(8, ())
    with pytest.raises(ValueError, match=r"^PyramidConv2d: padding_mode must be .*, got circular$"):
        PyramidConv2d(8, (1, 2), "circular")
    with pytest.raises(ValueError, match=r"^PyramidConv2d: activation must be relu or none, got elu$"):
        PyramidConv2d(8, (1, 2), activation="elu")


@pytest.mark.skipif(bool(_backends.status()["cpu"]), reason=_backends.status()["cpu"] or "usable")
def test_operators_stay_inside_their_memory() -> None:
    op = torch.ops.fused_inpaint
    y = op.pyramid_conv2d(X, W, None, [1, 2], "reflect", "relu")
    assert y.shape == (2, 6, 4, 5)
    for wrong in (
        (X[:, :2], W, None, [1]),
        (X, W, None, [1, 1, 1, 1]),
        (X, W, None, []),
        (X, W, None, [0]),
        (X, W, None, [4]),
        (X, W[:, :, :2], None, [1]),
        (X, W.double(), None, [1]),
        (X, W, torch.ones(5), [1]),
        (X, W, torch.ones(6).double(), [1]),
    ):
        with pytest.raises(RuntimeError, match=r"pyramid_conv2d: .* must "):
            op.pyramid_conv2d(*wrong, "reflect", "relu")
    for wrong in ((y[:1], y), (y, y[:, :2]), (y.double(), y)):
        with pytest.raises(RuntimeError, match=r"pyramid_conv2d: .* must "):
            op.pyramid_conv2d_backward(*wrong, X, W, [1, 2], "reflect", "relu", True, True, True)
