# SPDX-License-Identifier: Apache-2.0
"""Convolutions over few pixels, which the CPU computes itself (csrc/common/convolution_cpu.h): forward as an implicit
GEMM, backward by products of matrices. And the types that it computes them in."""

import copy
import platform
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import assert_close
from torch import Tensor

from fused_inpaint import PartialConv2d, PyramidConv2d, RegionConv2d, _backends, ops, prepack, use_backend
from fused_inpaint.ops import checks
from fused_inpaint.ops.partial_conv import packing, plan

pytestmark = [
    pytest.mark.usefixtures("poisoned", "one_thread"),
    pytest.mark.skipif(bool(_backends.status()["cpu"]), reason=_backends.status()["cpu"] or "usable"),
]
avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this processor has no implicit GEMM, without AVX-512"
)

packs = pytest.mark.skipif(not packing._available(), reason="this torch cannot pack weights")

# kernel, stride, padding, dilation, map
GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (1, 1), (8, 7)),
    ((3, 3), (2, 2), (1, 1), (1, 1), (4, 5)),
    ((2, 3), (1, 2), (1, 0), (2, 1), (6, 9)),
    ((5, 5), (2, 2), (2, 2), (1, 1), (2, 2)),
    ((1, 1), (1, 1), (0, 0), (1, 1), (16, 16)),
]
# Channels that are more than a block of them, and a filter that begins anywhere in memory.
CHANNELS, OUTPUTS = 1040, 100


def inputs(geometry: tuple, dtype: torch.dtype, batch: int, channels: int, outputs: int) -> tuple[Tensor, ...]:
    kernel, _, _, _, size = geometry
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, *size, generator=g).to(dtype)
    weight = torch.randn(outputs, channels, *kernel, generator=g).to(dtype)
    mask = (torch.rand(batch, 1, *size, generator=g) > 0.3).to(dtype)
    return x, weight.contiguous(memory_format=torch.channels_last), mask


def convolve(geometry: tuple, x: Tensor, weight: Tensor, mask: Tensor, backend: str) -> Tensor:
    _, stride, padding, dilation, _ = geometry
    with use_backend(backend):
        return ops.partial_conv2d(x, mask, weight, stride=stride, padding=padding, dilation=dilation)[0]


def gradients(
    geometry: tuple,
    dtype: torch.dtype,
    backend: str,
    batch: int = 2,
    layout: torch.memory_format = torch.channels_last,
) -> list[Tensor]:
    x, weight, mask = inputs(geometry, dtype, batch, 120, 140)
    weight = weight.contiguous(memory_format=layout)
    y = convolve(geometry, x.requires_grad_(), weight.requires_grad_(), mask, backend)
    return list(torch.autograd.grad(y, (x, weight), torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)))


def called(function, *arguments) -> list[str]:  # type: ignore[no-untyped-def]
    with torch.profiler.profile() as profile:
        function(*arguments)
    return [event.name for event in profile.events()]


@avx512
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES[:4], ids=lambda geometry: f"{geometry[0]}-{geometry[1]}")
def test_few_pixels(geometry: tuple, batch: int) -> None:
    x, weight, mask = inputs(geometry, torch.float32, batch, CHANNELS, OUTPUTS)
    x[:, :, 0] = torch.where(mask[:, :, 0] == 0, torch.nan, x[:, :, 0])
    expected = convolve(geometry, x.double(), weight.double(), mask.double(), "reference")
    assert_close(convolve(geometry, x, weight, mask, "cpu"), expected, 1e-5)
    vendors = "aten::convolution" in called(convolve, geometry, x, weight, mask, "cpu")
    assert vendors == (expected.numel() // OUTPUTS > 64)
    other = weight.contiguous()
    assert "aten::convolution" in called(convolve, geometry, x, other, mask, "cpu")
    assert_close(convolve(geometry, x, other, mask, "cpu"), expected, 1e-5)


@avx512
def test_few_pixels_are_no_other_bits_for_another_number_of_threads() -> None:
    given = inputs(GEOMETRIES[1], torch.float32, 3, CHANNELS, OUTPUTS)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(convolve(GEOMETRIES[1], *given, "cpu"))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@avx512
@packs
@pytest.mark.parametrize("side, plain", [(4, True), (5, False)], ids=["16-pixels", "25-pixels"])
def test_packed_weights_are_for_more_pixels(side: int, plain: bool) -> None:
    layer = prepack(PartialConv2d(CHANNELS, OUTPUTS, 3, padding=1).eval())
    x, mask = torch.randn(1, CHANNELS, side, side), torch.ones(1, 1, side, side)
    with torch.no_grad():
        names = called(layer, x, mask)
        assert ("mkldnn::_convolution_pointwise" in names) != plain and "aten::convolution" not in names
        with use_backend("reference"):
            expected = copy.deepcopy(layer).double()(x.double(), mask.double())
        assert_close(layer(x, mask), expected, 1e-5)


WEIGHT = torch.zeros(128, 512, 3, 3).contiguous(memory_format=torch.channels_last)


def raw(weight: Tensor, stride: int = 1, padding: int = 1, side: int = 4, out: int = 4) -> object:
    """The operator itself."""
    x, mask = torch.zeros(1, 512, side, side), torch.ones(1, 1, side, side, dtype=torch.uint8)
    counts, geometry = torch.ones(1, 1, out, out, dtype=torch.int32), ([1], [stride] * 2, [padding] * 2, [1, 1], 1, [0])
    return torch.ops.fused_inpaint.partial_conv2d(
        [x], [mask], counts, weight, None, None, *geometry, "none", 0.0, 0, None
    )


def raw_backward(stride: int) -> object:
    x, mask = torch.zeros(1, 512, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    y, counts = torch.zeros(1, 128, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.int32)
    geometry = ([1], [stride] * 2, [1, 1], [1, 1], 1, [0], "none", 0.0, 0)
    return torch.ops.fused_inpaint.partial_conv2d_backward(
        y, y, [x], [mask], counts, WEIGHT, None, *geometry, True, True, False
    )


HOSTILE: dict[str, Callable[[], object]] = {
    "a weight of another dtype": lambda: raw(WEIGHT.bfloat16()),
    "a wider weight": lambda: raw(WEIGHT.double()),
    "a window that does not fit": lambda: raw(WEIGHT, stride=2, padding=0, side=2, out=1),
    "a gradient of another size": lambda: raw_backward(7),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_few_pixels_are_refused_as_others_are(name: str) -> None:
    """Operators may be called with anything; what does not fit is the vendor's to refuse."""
    raw(WEIGHT), raw_backward(1)  # which fit
    with pytest.raises(RuntimeError):
        HOSTILE[name]()


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: f"{geometry[0]}-{geometry[1]}")
def test_gradients(geometry: tuple, layout: torch.memory_format, batch: int, dtype: torch.dtype, rtol: float) -> None:
    actual = gradients(geometry, dtype, "cpu", batch, layout)
    for found, expected in zip(actual, gradients(geometry, torch.float64, "reference", batch), strict=True):
        assert_close(found, expected, rtol)


# For each tap, of the map's gradient up to 128 pixels and of the weight's up to 512.
@pytest.mark.parametrize("batch, products", [(2, 18), (3, 9), (10, 0)])
def test_which_gradients_are_products(batch: int, products: int) -> None:
    names = called(gradients, GEOMETRIES[0], torch.float32, "cpu", batch)
    assert names.count("aten::mm") == products
    assert ("aten::convolution_backward" in names) == (products < 18)


def test_the_same_bits_whatever_the_number_of_threads() -> None:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(GEOMETRIES[0], torch.float32, "cpu"))
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_what_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(machine: str, bf16: bool | None, amx: bool | None) -> bool:
        """Whether bfloat16 is; None: torch cannot say."""
        monkeypatch.setattr(platform, "machine", lambda: machine)
        for name, has in (("_is_avx512_bf16_supported", bf16), ("_is_amx_tile_supported", amx)):
            monkeypatch.setattr(torch.cpu, name, None if has is None else lambda has=has: has, raising=False)
        emulated = checks._emulated()
        assert torch.float16 in emulated and not {torch.float32, torch.float64} & emulated
        return torch.bfloat16 in emulated

    assert found("x86_64", False, False) and found("AMD64", False, False)
    assert not found("x86_64", True, False) and not found("x86_64", False, True)
    assert not found("x86_64", None, False) and not found("aarch64", False, False)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor that has no instructions for the half types."""
    monkeypatch.setattr(checks, "EMULATED", {torch.float16, torch.bfloat16})
    plan.forget()
    yield
    plan.forget()


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@HALVES
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=packs)], ids=["plain", "packed"])
def test_an_emulated_type_is_float32_rounded_once(dtype: torch.dtype, packed: bool, emulated: None) -> None:
    layer = PartialConv2d(24, 16, 3, padding=1).to(dtype).eval()
    x, mask = torch.randn(2, 24, 9, 9, dtype=dtype), (torch.rand(2, 1, 9, 9) > 0.3).to(dtype)
    wide = PartialConv2d(24, 16, 3, padding=1).eval()
    wide.load_state_dict(layer.state_dict())
    if packed:
        prepack(torch.nn.ModuleList([layer, wide]))
    with torch.no_grad():
        names = called(layer, x, mask)
        assert ("mkldnn::_convolution_pointwise" in names) == packed
        assert torch.equal(layer(x, mask), wide(x.float(), mask).to(dtype))


@HALVES
def test_autocast_to_an_emulated_type_rounds_no_input(dtype: torch.dtype, emulated: None) -> None:
    layer = PartialConv2d(24, 16, 3, padding=1)
    x, mask = torch.randn(2, 24, 9, 9), (torch.rand(2, 1, 9, 9) > 0.3).float()
    with torch.autocast("cpu", dtype):
        y = layer(x, mask)
    assert y.dtype == dtype and torch.equal(y, layer(x, mask).to(dtype))
    (found,) = torch.autograd.grad(y.sum(), layer.weight)
    (expected,) = torch.autograd.grad(layer(x, mask).sum(), layer.weight)
    assert_close(found, expected, 1e-6)


@HALVES
@pytest.mark.parametrize("name", ["region_input", "region_output", "pyramid"])
def test_so_are_the_other_convolutions(name: str, dtype: torch.dtype, emulated: None) -> None:
    x, mask = torch.randn(1, 8, 12, 12), (torch.rand(1, 1, 12, 12) > 0.5).float()
    given: tuple[Tensor, ...] = (x, mask)
    layer: torch.nn.Module
    if name == "pyramid":
        layer, given = PyramidConv2d(8, (1, 2)), (x,)
    elif name == "region_input":
        layer, given = RegionConv2d(8, 8, 3, padding=1, select="input"), (x, mask, x)
    else:
        layer = RegionConv2d(8, 8, 3, padding=1, select="output")
    layer, given = layer.to(dtype), tuple(t.to(dtype) for t in given)
    y, wide = layer(*given), copy.deepcopy(layer).float()
    expected = wide(*(t.float() for t in given))
    assert y.dtype == dtype and torch.equal(y, expected.to(dtype))
    for found, grad in zip(
        torch.autograd.grad(y.sum(), list(layer.parameters())),
        torch.autograd.grad(expected.sum(), list(wide.parameters())),
        strict=True,
    ):
        assert_close(found, grad, torch.finfo(dtype).eps)


def test_float64_and_float32_stay() -> None:
    assert [checks.convolution_dtype(t) for t in (torch.float32, torch.float64)] == [torch.float32, torch.float64]
    assert checks.convolution_dtype(torch.float16) == torch.float32
    assert checks.convolution_dtype(torch.float16, cpu=False) == torch.float16


@packs
def test_a_packed_weight_in_a_call_with_gradients(emulated: None) -> None:
    weight = torch.randn(16, 24, 3, 3, dtype=torch.bfloat16).requires_grad_()
    x = torch.randn(1, 24, 9, 9, dtype=torch.bfloat16).requires_grad_()
    packed = packing.pack(weight, [x.shape], [1], [1, 1], [1, 1], [1, 1], 1)
    assert packed is not None
    found, expected = (
        torch.autograd.grad(ops.partial_conv2d(x, None, weight, padding=1, packed=given)[0].sum(), (x, weight))
        for given in (packed, None)
    )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@packs
def test_a_packed_weight_beside_a_trained_gain() -> None:
    """Over fixed statistics the gain is a factor of the weight, which the packed one does not have in it."""
    weight, x = torch.randn(16, 24, 3, 3), torch.randn(1, 24, 9, 9)
    gain, shift, mean, var = (torch.rand(16) + 0.5 for _ in range(4))
    gain.requires_grad_()
    packed = packing.pack(weight, [x.shape], [1], [1, 1], [1, 1], [1, 1], 1)
    assert packed is not None
    norm = ops.BatchNorm(gain, shift, mean, var, False, 0.1, 1e-5)
    y, plain = (
        ops.partial_conv2d(x, None, weight, padding=1, batch_norm=norm, packed=given)[0] for given in (packed, None)
    )
    assert_close(y.detach(), plain.detach(), 1e-5)
    assert_close(*(torch.autograd.grad(t.square().sum(), gain)[0] for t in (y, plain)), 1e-5)
