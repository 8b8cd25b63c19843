# SPDX-License-Identifier: Apache-2.0
"""Convolution at its input's resolution: against the steps that it stands for, in float64."""

import dataclasses

import pytest
import torch
from cases import assert_close
from torch import Tensor

from fused_inpaint import NoBackendError, TapConv2d, _backends, ops, use_backend
from fused_inpaint.ops.tap_conv import reference

pytestmark = [
    pytest.mark.usefixtures("poisoned", "one_thread"),
    pytest.mark.skipif(bool(_backends.status()["cpu"]), reason=_backends.status()["cpu"] or "usable"),
]


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    channels: tuple[int, ...] = (5,)
    outputs: int = 4
    kernel: int = 3
    size: tuple[int, int] = (6, 7)
    batch: int = 2
    upsampling: str = "none"
    padding_mode: str = "zeros"
    activation: str = "none"
    bias: bool = True


CASES = [
    *(
        Case(f"{up}_{mode}", upsampling=up, padding_mode=mode)
        for up in ("none", "nearest", "bilinear")
        for mode in ("zeros", "reflect", "replicate")
    ),
    *(Case(name, activation=name, upsampling="bilinear") for name in ("relu", "leaky_relu", "elu")),
    Case("thin", (8,), 3, 7, (9, 20), padding_mode="replicate", activation="elu"),
    Case("one_output", (3,), 1, 1, bias=False),
    Case("concatenation", (5, 3, 9), upsampling="nearest", padding_mode="reflect"),
    Case("blocks", (6, 2), 75, upsampling="bilinear", padding_mode="replicate", activation="leaky_relu"),
    Case("bands", (4,), 40, size=(70, 65), batch=1, upsampling="bilinear", activation="relu"),
    Case("ring", (2,), 33, 5, size=(40, 512), batch=1, padding_mode="reflect"),
    Case("one_pixel", upsampling="bilinear", padding_mode="replicate", size=(1, 1)),
    Case("one_row", upsampling="bilinear", size=(1, 9)),
    Case("kernel_beyond_the_map", kernel=7, size=(2, 3), padding_mode="replicate"),
    Case("kernel_beyond_the_map_zeros", kernel=7, size=(2, 3)),
    Case("reflects_as_far_as_it_can", kernel=7, size=(4, 5), padding_mode="reflect"),
    Case("empty_batch", batch=0),
]


@dataclasses.dataclass
class Sample:
    case: Case
    maps: list[Tensor]
    weight: Tensor
    bias: Tensor | None

    def __call__(self) -> Tensor:
        c = self.case
        return ops.tap_conv2d(
            self.maps,
            self.weight,
            self.bias,
            upsampling=c.upsampling,
            padding_mode=c.padding_mode,
            activation=c.activation,
        )

    def reference(self) -> Tensor:
        c = self.case
        maps, weight = [m.double() for m in self.maps], self.weight.double()
        bias = None if self.bias is None else self.bias.double()
        return reference.tap_conv2d(maps, weight, bias, c.upsampling, c.padding_mode, c.activation, 0.2)

    def leaves(self) -> list[Tensor]:
        return [*self.maps, self.weight, *([] if self.bias is None else [self.bias])]


def sample(case: Case, dtype: torch.dtype = torch.float32) -> Sample:
    g = torch.Generator().manual_seed(sum(map(ord, case.name)))
    maps = [torch.randn(case.batch, c, *case.size, generator=g).to(dtype) for c in case.channels]
    fan_in = sum(case.channels) * case.kernel**2
    weight = torch.randn(case.outputs, sum(case.channels), case.kernel, case.kernel, generator=g) / fan_in**0.5
    bias = torch.randn(case.outputs, generator=g).to(dtype) if case.bias else None
    return Sample(case, maps, weight.to(dtype), bias)


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference(case: Case, dtype: torch.dtype, rtol: float) -> None:
    s = sample(case, dtype)
    with use_backend("cpu"):
        y = s()
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, s.reference(), rtol)
    s.maps = [m.contiguous(memory_format=torch.channels_last) for m in s.maps]
    s.weight = s.weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(s(), y)


@pytest.mark.parametrize("name", ["bilinear_reflect", "concatenation", "thin"])
def test_gradients_are_those_of_the_steps(name: str) -> None:
    s = sample(named(name), torch.float64)
    leaves = [leaf.requires_grad_() for leaf in s.leaves()]
    grad = torch.randn_like(s.reference())
    for actual, expected in zip(
        torch.autograd.grad(s(), leaves, grad), torch.autograd.grad(s.reference(), leaves, grad), strict=True
    ):
        assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("name", ["blocks", "bands", "ring", "thin"])
def test_the_same_bits_whatever_the_number_of_threads(name: str) -> None:
    s, found = sample(named(name)), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(s())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_nan_stays_in_its_windows() -> None:
    s = sample(named("nearest_zeros"))
    s.maps[0][0, 0, 2, 3] = torch.nan
    assert torch.equal(s().isnan(), s.reference().isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_take_the_steps(dtype: torch.dtype) -> None:
    s = sample(named("bilinear_zeros"), dtype)
    assert_close(s(), s.reference(), 2**-6)
    with use_backend("cpu"), pytest.raises(NoBackendError, match="it computes in float32 and float64"):
        s()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", ["concatenation", "one_output"])
def test_opcheck(name: str, grad: bool) -> None:
    s = sample(named(name))
    for leaf in s.leaves():
        leaf.requires_grad_(grad)
    c = s.case
    arguments = (s.maps, s.weight, s.bias, c.upsampling, c.padding_mode, c.activation, 0.2)
    torch.library.opcheck(torch.ops.fused_inpaint.tap_conv2d, arguments)


@pytest.mark.parametrize("case", [*CASES[:12], named("concatenation")], ids=lambda case: case.name)
def test_layer_in_training_and_inference(case: Case) -> None:
    layer = TapConv2d(
        sum(case.channels),
        case.outputs,
        case.kernel,
        upsampling=case.upsampling,
        padding_mode=case.padding_mode,
        activation=case.activation,
    )
    s = sample(case)
    trained = layer(s.maps)
    with torch.no_grad(), torch.profiler.profile() as profile:
        inferred = layer(s.maps)
    assert "fused_inpaint::tap_conv2d" in {event.name for event in profile.events()}
    assert trained.requires_grad
    assert_close(inferred, trained.detach(), 1e-5)


def test_layer_is_a_convolution() -> None:
    layer = TapConv2d(4, 2, 3, activation="relu")
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"weight": (2, 4, 3, 3), "bias": (2,)}
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert "activation='relu'" in repr(layer)


def refused(text: str, **changes: object) -> None:
    s = sample(named("none_zeros"))
    arguments = {"x": s.maps, "weight": s.weight, "bias": s.bias} | changes
    with pytest.raises(ValueError, match=text):
        ops.tap_conv2d(**arguments)


def test_errors() -> None:
    x = torch.rand(1, 5, 6, 7)
    refused(r"tap_conv2d: x must be \(N, C, H, W\), or several, got none", x=[])
    refused(r"tap_conv2d: x must be \(N, C, H, W\), got \(5, 6, 7\)", x=x[0])
    refused(r"tap_conv2d: x must be \(1, C, 6, 7\) of at least one", x=[x, x[..., :3]])
    refused(r"tap_conv2d: weight must be \(O, 5, k, k\) with k odd, got \(4, 5, 2, 2\)", weight=torch.rand(4, 5, 2, 2))
    refused(r"tap_conv2d: weight must be \(O, 5, k, k\) with k odd, got \(4, 6, 3, 3\)", weight=torch.rand(4, 6, 3, 3))
    refused(r"tap_conv2d: bias must be \(4,\), got \(3,\)", bias=torch.rand(3))
    refused(r"tap_conv2d: weight must be torch.float32 as x, got torch.float64", weight=torch.rand(4, 5, 3, 3).double())
    refused("tap_conv2d: upsampling must be none, nearest or bilinear, got cubic", upsampling="cubic")
    refused("tap_conv2d: padding_mode must be zeros, reflect or replicate, got circular", padding_mode="circular")
    refused("tap_conv2d: activation must be none, relu, leaky_relu or elu, got tanh", activation="tanh")
    refused(
        r"smaller than the map \(3, 9\) to reflect, got 7",
        x=torch.rand(1, 5, 3, 9),
        weight=torch.rand(4, 5, 7, 7),
        padding_mode="reflect",
    )
    with pytest.raises(ValueError, match="TapConv2d: kernel_size must be an odd int, got 4"):
        TapConv2d(3, 3, 4)
    with pytest.raises(ValueError, match="TapConv2d: upsampling must be none, nearest or bilinear, got cubic"):
        TapConv2d(3, 3, 3, upsampling="cubic")
