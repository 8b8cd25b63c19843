# SPDX-License-Identifier: Apache-2.0
"""Region-wise convolution on every backend: against its reference in float64, the published code's numbers, itself."""

import dataclasses
from typing import Any

import pytest
import torch
from cases import OPERATORS, PRECISIONS, assert_close, mask_of
from torch import Tensor, nn
from vectors import assert_close as assert_published
from vectors import cases, tensors

from fused_inpaint import RegionConv2d, _backends, ops, use_backend


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    select: str = "output"
    channels: tuple[int, ...] = (5,)
    size: tuple[int, int] = (9, 11)
    batch: int = 2
    outputs: int = 4
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    upsample: int = 1
    padding_mode: str = "zeros"
    activation: str = "none"
    bias: bool = True
    mask: str = "box"
    shared: bool = False  # one mask for the batch


PAIR = Case("pair", "input", (5, 3))
UP = dataclasses.replace(PAIR, name="up", upsample=2, size=(6, 7))
CASES = [
    Case("output"),
    Case("output_elu", activation="elu", mask="random"),
    Case("output_no_bias", bias=False),
    Case("output_all_valid", mask="ones", activation="elu"),
    Case("output_all_hole", mask="zeros"),
    Case("output_one_pixel", size=(1, 1), mask="ones"),
    Case("output_stride", stride=(2, 2), kernel=(5, 5), padding=(2, 2), size=(16, 13)),
    Case("output_anisotropic", kernel=(3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 3), size=(13, 15)),
    Case("output_reflect", padding_mode="reflect", padding=(2, 1), kernel=(5, 3)),
    Case("output_replicate", padding_mode="replicate", padding=(4, 4), size=(3, 5)),
    Case("output_wide", channels=(33,), outputs=18, activation="elu"),
    Case("output_tiles", channels=(3,), size=(70, 45), batch=1, shared=True),
    Case("output_kernel1", kernel=(1, 1), padding=(0, 0), mask="pixel"),
    PAIR,
    dataclasses.replace(PAIR, name="pair_elu", activation="elu", mask="random", padding_mode="reflect"),
    dataclasses.replace(PAIR, name="pair_no_bias", bias=False, padding_mode="replicate"),
    dataclasses.replace(PAIR, name="pair_all_valid", mask="ones"),
    dataclasses.replace(PAIR, name="pair_all_hole", mask="zeros", activation="elu"),
    dataclasses.replace(PAIR, name="pair_stride", stride=(2, 2), kernel=(5, 5), padding=(2, 2), size=(12, 13)),
    dataclasses.replace(PAIR, name="pair_dilated", dilation=(2, 2), padding=(2, 2), padding_mode="reflect"),
    dataclasses.replace(PAIR, name="pair_one_channel", channels=(1, 1), outputs=1),
    dataclasses.replace(PAIR, name="pair_tiles", channels=(3, 4), size=(50, 66), batch=1, shared=True),
    dataclasses.replace(PAIR, name="pair_wide", channels=(33, 17), outputs=20, activation="elu"),
    *(
        dataclasses.replace(UP, name=f"up_{mode}", padding_mode=mode, mask=mask, activation="elu")
        for mode, mask in (("zeros", "box"), ("reflect", "random"), ("replicate", "box"))
    ),
    dataclasses.replace(UP, name="up_one_pixel", size=(1, 1), mask="ones", padding_mode="reflect"),
    dataclasses.replace(UP, name="up_kernel5", kernel=(5, 5), padding=(2, 2), padding_mode="reflect"),
    dataclasses.replace(UP, name="up_kernel1", kernel=(1, 1), padding=(0, 0)),
    dataclasses.replace(UP, name="up_unpadded", padding=(0, 0)),
    dataclasses.replace(UP, name="up_tiles", size=(40, 35), batch=1, padding_mode="reflect", channels=(3, 2)),
    dataclasses.replace(UP, name="up_all_hole", mask="zeros", shared=True),
    dataclasses.replace(PAIR, name="empty_batch", batch=0),
]
ALL = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# What an empty batch needs no operator for.
FULL = pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case.name)
PUBLISHED = [case for case in cases("regionwise_ops") if case.id == "absent" or "conv" in case.id]


@pytest.fixture(autouse=True)
def _tiny(one_thread: None) -> None:
    """Sizes are small."""


@dataclasses.dataclass
class Sample:
    case: Case
    x: list[Tensor]
    mask: Tensor
    weight: Tensor
    bias: Tensor | None

    def __call__(self) -> Tensor:
        c = self.case
        options: dict[str, Any] = {
            name: getattr(c, name) for name in ("select", "padding_mode", "activation", "upsample")
        }
        x = self.x[0] if c.select == "output" else self.x
        return ops.region_conv2d(x, self.mask, self.weight, self.bias, c.stride, c.padding, c.dilation, **options)

    def leaves(self) -> dict[str, Tensor]:
        named = {f"x{i}": x for i, x in enumerate(self.x)} | {"weight": self.weight}
        return named if self.bias is None else named | {"bias": self.bias}

    def wide(self) -> "Sample":
        def leaf(t: Tensor) -> Tensor:
            return t.detach().cpu().double().requires_grad_()

        bias = None if self.bias is None else leaf(self.bias)
        return Sample(self.case, [leaf(x) for x in self.x], self.mask.cpu(), leaf(self.weight), bias)


def sample(
    case: Case, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", nan: bool = False
) -> Sample:
    """With `nan`, NaN and infinities lie in each map where the other one's region is."""
    g = torch.Generator().manual_seed(sum(map(ord, case.name)))
    n, (h, w) = case.batch, case.size
    mask = mask_of(case.mask, (1 if case.shared else n, 1, h, w), g)
    if case.mask == "box":
        mask = 1 - mask if mask.float().mean() < 0.5 else mask
    x = [torch.randn(n, c, h, w, generator=g).to(dtype) for c in case.channels]
    if nan and case.select == "input":
        x = [t.masked_fill(mask == wrong, (torch.nan, torch.inf)[wrong]) for wrong, t in enumerate(x)]
    size = (case.outputs, sum(case.channels), *case.kernel)
    if case.select == "output":
        size = (2, *size)
    weight = (torch.randn(size, generator=g) / size[-3] ** 0.5).to(dtype)
    bias = torch.randn(size[:-3], generator=g).to(dtype) if case.bias else None
    leaves = [t.to(device).requires_grad_() for t in (*x, weight)]
    return Sample(
        case, leaves[:-1], mask.to(device), leaves[-1], None if bias is None else bias.to(device).requires_grad_()
    )


def results(s: Sample, grad: Tensor) -> dict[str, Tensor]:
    y = s()
    y.backward(grad.to(y.device, y.dtype))
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in s.leaves().items()}


@pytest.mark.parametrize("dtype, rtol, folded_rtol, atol", PRECISIONS)
@ALL
def test_reference(
    case: Case, dtype: torch.dtype, rtol: float, folded_rtol: float, atol: float, backend: str, device: torch.device
) -> None:
    if dtype == torch.float64 and (device.type != "cpu" or backend == "triton"):
        pytest.skip("float64 runs on the CPU only")
    s = sample(case, dtype, device, nan=True)
    wide = s.wide()
    with use_backend("reference"):
        grad = torch.randn(wide().shape).to(dtype)
        expected = results(wide, grad.double())
    actual = results(s, grad)
    assert actual["y"].dtype == dtype
    if case.select == "input":
        for wrong in (0, 1):
            outside = (s.mask == wrong).expand_as(s.x[wrong])
            assert torch.equal(actual[f"x{wrong}"][outside], torch.zeros_like(actual[f"x{wrong}"][outside]))
    for name, value in actual.items():
        assert_close(value, expected[name], folded_rtol if case.upsample == 2 else rtol, atol, name)


@pytest.mark.parametrize("name", ["output_elu", "output_reflect", "pair_elu", "pair_stride", "up_reflect", "up_zeros"])
def test_gradcheck(name: str, backend: str, device: torch.device) -> None:
    if backend == "triton" or device.type != "cpu":
        pytest.skip("float64 runs on the CPU only")
    case = next(case for case in CASES if case.name == name)
    small = dataclasses.replace(case, size=(5, 6), channels=tuple(2 for _ in case.channels), outputs=2, batch=1)
    s = sample(small, torch.float64)

    def call(*leaves: Tensor) -> Tensor:
        maps = len(s.x)
        return Sample(s.case, list(leaves[:maps]), s.mask, *leaves[maps:])()

    assert torch.autograd.gradcheck(call, tuple(s.leaves().values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tuple(s.leaves().values()), fast_mode=True)


@OPERATORS
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@FULL
def test_opcheck(backend: str, device: torch.device, case: Case, grad: bool) -> None:
    s = sample(case, torch.float32, device)
    for leaf in s.leaves().values():
        leaf.requires_grad_(grad)
    maps = [x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(grad) for x in s.x]
    size = s().shape[2:] if case.select == "output" else s.mask.shape[2:]
    mask = nn.functional.interpolate(s.mask, size)
    geometry = [list(g) for g in (case.stride, case.padding, case.dilation)]
    rest = [*([case.upsample] if case.select == "input" else []), *geometry, case.padding_mode, case.activation]
    name = f"region_conv2d_{case.select}"
    suffix = "_triton" if backend == "triton" else ""
    op = torch.ops.fused_inpaint
    forward = getattr(op, name + suffix)
    torch.library.opcheck(forward, (*maps, mask, s.weight, s.bias, *rest))
    if not grad and not suffix:
        y = forward(*maps, mask, s.weight, s.bias, *rest)
        needs = [True] * (len(maps) + 1) + [s.bias is not None]
        torch.library.opcheck(
            getattr(op, f"{name}_backward"), (torch.randn_like(y), y, *maps, mask, s.weight, *rest, *needs)
        )


@pytest.mark.parametrize("case", PUBLISHED)
def test_published(case: dict, backend: str, device: torch.device) -> None:
    a = tensors("regionwise_ops", case)
    layer = RegionConv2d(
        case["cc"],
        case["cm"],
        3,
        padding=1,
        select="input",
        missing_channels=case["cm"],
        upsample=2 if case["kind"] == "deconv" else 1,
        padding_mode="reflect",
        activation="elu",
    ).to(device)
    with torch.no_grad():
        layer.weight.copy_(a["kernel"].permute(3, 2, 0, 1))
        layer.bias.copy_(a["bias"])
    existing, missing = (a[name].to(device).requires_grad_() for name in ("x_complete", "x_missing"))
    # TensorFlow's nearest neighbour with aligned corners, which rounds halves up.
    rows, columns = (
        torch.floor(torch.arange(n) * (m - 1) / (n - 1) + 0.5).long()
        for n, m in zip(existing.shape[2:], a["mask"].shape[2:], strict=True)
    )
    y = layer(existing, a["mask"][:, :, rows][..., columns].to(device), missing)
    y.backward(a["g"].to(device))
    found = {
        "out": y,
        "g_x_complete": existing.grad,
        "g_x_missing": missing.grad,
        "g_kernel": layer.weight.grad.permute(2, 3, 1, 0),
        "g_bias": layer.bias.grad,
    }
    for name, value in found.items():
        assert_published(value.detach().cpu(), a[name], case, name)


def test_published_resize() -> None:
    """The mask's own resizing is torch's nearest neighbour, which differs from TensorFlow's."""
    layer = RegionConv2d(2, 3, 3, padding=1)
    x, mask = torch.randn(1, 2, 8, 6), (torch.rand(1, 1, 17, 23) > 0.5).float()
    assert torch.equal(layer(x, mask), layer(x, nn.functional.interpolate(mask, (8, 6))))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", ["output", "pair", "up_reflect"])
def test_layouts(backend: str, device: torch.device, name: str, layout: str) -> None:
    case = next(case for case in CASES if case.name == name)
    s = sample(case, torch.float32, device)
    expected = s().detach()
    form = {
        "contiguous": lambda t: t.contiguous(),
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "sliced": lambda t: torch.stack([t, t], -1).flatten(3)[..., ::2],
    }[layout]
    s.x = [form(x.detach()) for x in s.x]
    y = s()
    assert_close(y, expected, 1e-6)
    if backend != "reference":
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["output_tiles", "pair_tiles", "up_tiles"])
def test_the_same_bits_from_run_to_run(backend: str, device: torch.device, name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    torch.set_num_threads(2)
    grad = torch.randn(sample(case, device=device)().shape)
    one, other = (results(sample(case, torch.float32, device), grad) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype, rtol", [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("select", ["output", "input"])
def test_autocast(backend: str, device: torch.device, select: str, dtype: torch.dtype, rtol: float) -> None:
    """Values and gradients, in units of float32's; operands, results and gradients are each rounded once."""
    layer = RegionConv2d(4, 3, 3, padding=1, select=select, missing_channels=4 if select == "input" else None)
    layer.to(device)
    mask = (torch.rand(1, 1, 8, 8, device=device) > 0.5).float()
    maps = [torch.randn(1, 4, 8, 8, device=device, requires_grad=True) for _ in range(1 if select == "output" else 2)]
    grad = torch.randn(1, 3, 8, 8, device=device)
    found = []
    for enabled in (False, True):
        leaves = [*maps, *layer.parameters()]
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast(device.type, dtype=dtype, enabled=enabled):
            y = layer(maps[0], mask, *maps[1:])
        assert y.dtype == (dtype if enabled else torch.float32)
        y.backward(grad.to(y.dtype))
        assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for exact, rounded in zip(*found, strict=True):
        assert_close(rounded, exact, rtol)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = RegionConv2d(3, 6, 3, padding=1, activation="elu")
        self.up = RegionConv2d(
            9, 4, 3, padding=1, select="input", missing_channels=6, upsample=2, padding_mode="reflect"
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.plain(x, mask)
        return self.up(torch.cat([y, x], 1), mask, y)


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compile(backend: str, device: torch.device, engine: str) -> None:
    torch.compiler.reset()
    net = Block().to(device)
    x, mask = torch.randn(2, 3, 12, 10, device=device), (torch.rand(2, 1, 12, 10, device=device) > 0.5).float()
    found = []
    for f in (net, torch.compile(net, fullgraph=True, backend=engine)):
        net.zero_grad()
        y = f(x, mask)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in net.parameters())])
    for one, other in zip(*found, strict=True):
        assert_close(other, one, 1e-4)


X, M, W = torch.ones(2, 3, 4, 5), torch.ones(2, 1, 4, 5), torch.ones(2, 6, 3, 3, 3)
V = torch.ones(6, 6, 3, 3)
INPUT = {"select": "input"}


@pytest.mark.parametrize(
    "arguments, options, sentence",
    [
        ((X[0], M, W), {}, r"x must be \(N, C, H, W\), got \(3, 4, 5\)"),
        ((X, M, W), {"select": "tap"}, "select must be output or input, got tap"),
        ((X, M, V), INPUT, r'x must be two tensors, for the valid region and the hole, with select="input", got 1'),
        (([X, X], M, W), {}, r'x must be a tensor with select="output", got 2'),
        (([X, X[1:]], M, V), INPUT, r"x must be \(2, C, 4, 5\) with C at least 1, got \(1, 3, 4, 5\)"),
        ((X, M[0], W), {}, r"mask must be \(2 or 1, 1, h, w\), got \(1, 4, 5\)"),
        ((X, X, W), {}, r"mask must be \(2 or 1, 1, h, w\), got \(2, 3, 4, 5\)"),
        ((X, M / 2, W), {}, "mask must be 0 or 1 everywhere, got 0.5"),
        ((X, M.int(), W), {}, "mask must be uint8, bool or float, got torch.int32"),
        ((X, M, V), {}, r"weight must be \(2, O, 3, kh, kw\), got \(6, 6, 3, 3\)"),
        (([X, X], M, W[0]), INPUT, r"weight must be \(O, 6, kh, kw\), got \(6, 3, 3, 3\)"),
        ((X, M, W, torch.ones(6)), {}, r"bias must be \(2, 6\), got \(6,\)"),
        ((X, M, W.double()), {}, "weight must be torch.float32 as x, got torch.float64"),
        ((X, M, W, None, 0), {}, "stride must be an int or two of at least 1, got 0"),
        ((X, M, W, None, 1, 4), {"padding_mode": "reflect"}, r"padding must be smaller than the map \(4, 5\).*"),
        ((X, M, W), {"padding_mode": "circular"}, "padding_mode must be zeros, reflect or replicate, got circular"),
        ((X, M, W), {"activation": "relu"}, "activation must be none or elu, got relu"),
        ((X, M, W), {"upsample": 2}, 'upsample must be 1, or 2 with select="input" and stride 1, got 2'),
        ((X[:, :, :2], M, W), {}, r"x must be at least as large as the kernel \(3, 3\), got \(2, 5\)"),
    ],
)
def test_refusals(arguments: tuple, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^region_conv2d: {sentence}$"):
        ops.region_conv2d(*arguments, **options)


def test_layers_follow_their_network_to_channels_last(backend: str, device: torch.device) -> None:
    net = Block().to(device)
    x, mask = torch.randn(1, 3, 12, 10, device=device), (torch.rand(1, 1, 12, 10, device=device) > 0.5).float()
    y = net(x, mask)
    y.sum().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net.to(memory_format=torch.channels_last)
    y2 = net(x.contiguous(memory_format=torch.channels_last), mask)
    y2.sum().backward()
    assert_close(y2.detach(), y.detach(), 1e-5)
    for p, grad in zip(net.parameters(), gradients, strict=True):
        assert_close(p.grad, grad, 1e-5)


def test_layer_refusals() -> None:
    with pytest.raises(ValueError, match=r"^RegionConv2d: select must be output or input, got tap$"):
        RegionConv2d(3, 4, 3, select="tap")
    with pytest.raises(ValueError, match=r'^RegionConv2d: missing_channels must be None with select="output", got 3$'):
        RegionConv2d(3, 4, 3, missing_channels=3)
    with pytest.raises(ValueError, match=r'^RegionConv2d: missing must be given with select="input", got None$'):
        RegionConv2d(3, 4, 3, select="input")(X, M)
    with pytest.raises(ValueError, match=r'^RegionConv2d: missing must be None with select="output", got a tensor$'):
        RegionConv2d(3, 4, 3)(X, M, X)


@pytest.mark.skipif(bool(_backends.status()["cpu"]), reason=_backends.status()["cpu"] or "usable")
def test_operators_stay_inside_their_memory() -> None:
    op = torch.ops.fused_inpaint
    mask = M.to(torch.uint8)
    rest = ([1, 1], [1, 1], [1, 1], "zeros", "none")
    assert op.region_conv2d_output(X, mask, W, None, *rest).shape == (2, 6, 4, 5)
    assert op.region_conv2d_input(X, X, mask, V, None, 1, *rest).shape == (2, 6, 4, 5)
    for wrong in (
        (X, mask[:, :, 1:], W, None),
        (X, M, W, None),
        (X, mask, W[:1], None),
        (X, mask, W, torch.ones(2, 5)),
        (X[:, :2], mask, W, None),
    ):
        with pytest.raises(RuntimeError, match=r"region_conv2d.*: .* must "):
            op.region_conv2d_output(*wrong, *rest)
    for wrong in ((X, X[:1], mask, V, None), (X, X[:, :2], mask, V, None), (X, X, mask[..., 1:], V, None)):
        with pytest.raises(RuntimeError, match=r"region_conv2d.*: .* must "):
            op.region_conv2d_input(*wrong, 1, *rest)
