# SPDX-License-Identifier: Apache-2.0
"""The operators under torch's own machinery: opcheck, torch.compile, torch.export, autocast."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ALL, CASES, OPERATORS, Case, Sample, assert_close, cotangent, named, results, sample
from torch import Tensor, nn

from fused_inpaint import PartialConv2d, PartialUpConv2d, _backends, ops

op = torch.ops.fused_inpaint


def geometry(case: Case) -> tuple:
    spatial = list(case.stride), list(case.padding), list(case.dilation)
    return list(case.upsample), *spatial, case.groups, [0] * len(case.upsample)


def window_of(s: Sample) -> ops.Window:
    masks = s.masks or [torch.ones(1, 1, *x.shape[2:], dtype=torch.uint8, device=x.device) for x in s.x]
    c = s.case
    return ops.partial_window(masks, c.channels, c.kernel, c.stride, c.padding, c.dilation, upsample=c.upsample)


def forward_arguments(s: Sample) -> tuple[Any, tuple]:
    """The operator that the sample's call reaches, and its arguments."""
    c, window, fold = s.case, window_of(s), bool(s.case.fold)
    masks = list(window.planes)
    epilogue = (c.activation, 0.2, fold)
    if c.norm == "train":
        assert s.norm is not None
        norm = (s.norm.weight, s.norm.bias, 1e-5)
        return op.partial_conv2d_bn, (s.x, masks, window.counts, s.weight, *norm, *geometry(c), *epilogue)
    scale = None
    if s.norm is not None:
        scale = s.norm.weight.detach()
    return op.partial_conv2d, (s.x, masks, window.counts, s.weight, s.bias, scale, *geometry(c), *epilogue, None)


@pytest.fixture(autouse=True)
def _tiny(one_thread: None) -> None:
    torch.compiler.reset()


@OPERATORS
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@ALL
def test_opcheck(backend: str, device: torch.device, case: Case, grad: bool) -> None:
    """Schema, registration of the derivative, fake kernel, and tracing with symbolic sizes."""
    s = sample(case, device=device, nan=False)
    for leaf in s.leaves().values():
        leaf.requires_grad_(grad)
    torch.library.opcheck(*forward_arguments(s))


@OPERATORS
@ALL
def test_opcheck_backward(backend: str, device: torch.device, case: Case) -> None:
    s = sample(case, device=device, nan=False)
    for leaf in s.leaves().values():
        leaf.requires_grad_(False)
    forward, arguments = forward_arguments(s)
    out = forward(*arguments)
    sources, masks, count, weight, *rest = arguments
    # One sample in two asks for half of the gradients only.
    wanted = [True, len(case.name) % 2 == 0]
    if case.norm == "train":
        y, *saved = out
        torch.library.opcheck(
            op.partial_conv2d_bn_backward,
            (torch.randn_like(y), *saved, sources, masks, count, weight, *rest, *wanted),
        )
    else:
        _, scale, *options, _ = rest
        torch.library.opcheck(
            op.partial_conv2d_backward,
            (torch.randn_like(out), out, sources, masks, count, weight, scale, *options, *wanted, s.bias is not None),
        )


@OPERATORS
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "shared_channel_masks", "up_folded", "empty_batch", "anisotropic"])
def test_opcheck_masks(backend: str, device: torch.device, name: str, dtype: torch.dtype) -> None:
    s = sample(named(name), device=device)
    assert s.masks is not None
    planes = [op.mask_plane(m.to(dtype), "partial_window") for m in s.masks]
    for mask in s.masks:
        torch.library.opcheck(op.mask_plane, (mask.to(dtype), "partial_window"))
    c = s.case
    up, stride, padding, dilation = geometry(c)[:4]
    steps = [len(planes)]
    for i, (channels, factor) in enumerate(zip(c.channels, up, strict=True)):
        steps += [i, channels, factor]
    steps += [*c.kernel, *stride, *padding, *dilation, 1, len(planes), 3, 1, 1, 1, 1, 1, 0, 0, 1, 1]
    torch.library.opcheck(op.partial_window_chain, (planes, steps))
    torch.library.opcheck(op.partial_window, (planes, list(c.channels), up, list(c.kernel), stride, padding, dilation))


class Network(nn.Module):
    """Encoder and decoder step, with the functional call's norm and activation in between."""

    def __init__(self) -> None:
        super().__init__()
        self.down = PartialConv2d(3, 8, 3, 2, 1, return_mask=True)
        self.middle = PartialConv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = PartialUpConv2d(8, 3, 4)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        y, new = self.down(x, mask)
        n = self.norm
        norm = ops.BatchNorm(n.weight, n.bias, n.running_mean, n.running_var, n.training, 0.1, n.eps)
        z = self.middle.block(y, self.middle.window(new), activation="relu", batch_norm=norm, holes_zero=True)
        return self.up(z, new, x, mask)


def inputs(n: int, h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + h + w)
    mask = (torch.rand(n, 1, h, w, generator=g) > 0.4).float()
    return torch.randn(n, 3, h, w, generator=g).to(device), mask.to(device)


def step(f: Callable[..., tuple[Tensor, Tensor]], net: nn.Module, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    x = x.clone().requires_grad_()
    y, new_mask = f(x, mask)
    (y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "mask": new_mask, "x": x.grad, **gradients}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # Inductor's own
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile(backend: str, device: torch.device, training: bool, compiler: str) -> None:
    """No graph break, and the values and gradients of eager mode."""
    net = Network().to(device).train(training)
    fresh = {k: v.clone() for k, v in net.state_dict().items()}
    x, mask = inputs(2, 12, 16, device)
    expected = step(net, net, x, mask)
    statistics = net.norm.running_var
    net.load_state_dict(fresh)
    actual = step(torch.compile(net, fullgraph=True, backend=compiler), net, x, mask)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, expected[name], 5e-5, what=name)
    assert statistics is not None and net.norm.running_var is not None
    assert_close(net.norm.running_var, statistics, 1e-5)


def test_compile_dynamic(backend: str, device: torch.device) -> None:
    """One graph serves all sizes and batches, forwards and backwards."""
    net = Network().to(device)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    step(compiled, net, *inputs(2, 12, 16, device))
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in [(2, 20, 8), (3, 14, 18), (5, 34, 30)]:
            net.norm.reset_running_stats()
            actual = step(compiled, net, *inputs(*size, device))
            net.norm.reset_running_stats()
            expected = step(net, net, *inputs(*size, device))
            for name, value in actual.items():
                assert_close(value, expected[name], 5e-5, what=name)


@pytest.mark.parametrize("name", ["plain", "channel_masks", "three_sources", "up_folded", "up_direct", "up_eval_folded",
                                  "no_mask", "multi_channel", "groups"])  # fmt: skip
def test_compile_op(backend: str, device: torch.device, name: str) -> None:
    s, t = sample(named(name), device=device), sample(named(name), device=device)
    grad = cotangent(s).to(device, torch.float32)
    expected = results(s, grad)
    y, mask = torch.compile(lambda: t(), fullgraph=True, backend="aot_eager")()
    y.backward(grad)
    assert torch.equal(mask, expected["mask"])
    assert_close(y, expected["y"], 5e-5)
    for leaf, value in t.leaves().items():
        assert value.grad is not None
        assert_close(value.grad, expected[f"grad_{leaf}"], 5e-5, what=leaf)


def test_compiled_checks(backend: str, device: torch.device) -> None:
    """A wrong shape is refused while tracing, in the same words."""
    layer = torch.compile(PartialConv2d(3, 4, 3).to(device), fullgraph=True, backend="aot_eager")
    with pytest.raises(
        Exception, match=r"partial_conv2d: mask must be \(1, 1, 8, 8\) or \(1, 3, 8, 8\), got \(1, 2, 8, 8\)"
    ):
        layer(torch.ones(1, 3, 8, 8, device=device), torch.ones(1, 2, 8, 8, device=device))


@pytest.mark.cpu_only
@OPERATORS
def test_compiled_mask_values(backend: str, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("mask values are looked at on the CPU only")
    layer = torch.compile(PartialConv2d(3, 4, 3), fullgraph=True, backend="aot_eager")
    with pytest.raises((ValueError, RuntimeError), match=r"partial_conv2d: mask must be 0 or 1 everywhere, got 0\.5"):
        layer(torch.ones(1, 3, 8, 8), torch.full((1, 1, 8, 8), 0.5))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(backend: str, device: torch.device, strict: bool) -> None:
    net = Network().to(device).eval()
    n, h, w = (torch.export.Dim(name, min=1, max=64) for name in ("n", "h", "w"))
    shapes = {0: n, 2: 2 * h, 3: 2 * w}
    program = torch.export.export(net, inputs(2, 12, 16, device), dynamic_shapes=(shapes, shapes), strict=strict)
    for size in [(2, 12, 16), (3, 20, 8)]:
        x, mask = inputs(*size, device)
        y, new_mask = program.module()(x, mask)
        expected, expected_mask = net(x, mask)
        assert_close(y, expected, 5e-5)
        assert torch.equal(new_mask, expected_mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "relu", "channel_masks", "up_folded", "train", "eval"])
def test_autocast(backend: str, device: torch.device, name: str, dtype: torch.dtype) -> None:
    """Under autocast a float32 call is the call on what it casts to; gradients come back in float32.

    float16 on the CPU computes in float32 and need not round its inputs first: one rounding more on either side.
    """
    case = dataclasses.replace(named(name), bias=False)
    s, cast = sample(case, device=device), sample(case, dtype, device)
    grad = cotangent(s)
    with torch.autocast(device.type, dtype):
        y, mask = s()
        assert y.dtype == dtype and mask.dtype == torch.uint8
    y.backward(grad.to(y))
    expected = results(cast, grad)
    rtol = 2**-7 if dtype == torch.bfloat16 else 2**-9
    assert_close(y, expected["y"], 0.0 if dtype == torch.bfloat16 else rtol)
    for key, leaf in s.leaves().items():
        assert leaf.grad is not None and leaf.grad.dtype == torch.float32
        assert_close(leaf.grad, expected[f"grad_{key}"], rtol, what=key)


def test_autocast_leaves_float64_alone(backend: str, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("float64 runs on the CPU only")
    s = sample(named("plain"), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert s()[0].dtype == torch.float64


def test_autocast_of_a_network(backend: str, device: torch.device) -> None:
    net = Network().to(device)
    x, mask = inputs(2, 12, 16, device)
    with torch.autocast(device.type, torch.bfloat16):
        y, new_mask = net(x, mask)
        compiled, _ = torch.compile(net, fullgraph=True, backend="aot_eager")(x, mask)
    assert y.dtype == compiled.dtype == torch.bfloat16 and new_mask.dtype == torch.float32
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())
    assert_close(compiled, y, 2**-7)


def test_every_form_is_sampled() -> None:
    assert {case.norm for case in CASES} == {None, "train", "eval", "frozen"}
    assert {case.fold for case in CASES} == {None, True, False}
    assert {case.activation for case in CASES} == {"none", "relu", "leaky_relu"}


@OPERATORS
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", ["plain", "relu", "up_folded", "shared_mask", "channel_masks", "empty_batch"])
def test_opcheck_masked(backend: str, device: torch.device, name: str, grad: bool) -> None:
    s = sample(named(name), device=device, nan=False)
    for leaf in s.leaves().values():
        leaf.requires_grad_(grad)
    assert s.masks is not None
    masks = [m.to(torch.float32) for m in s.masks]
    rest = (*geometry(s.case), s.case.activation, 0.2, 0, None)
    torch.library.opcheck(op.partial_conv2d_masked, (s.x, masks, s.weight, s.bias, None, *rest))


@pytest.mark.skipif(bool(_backends.status()["cuda"]), reason=_backends.status()["cuda"] or "usable")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", ["plain", "relu", "up_folded", "shared_mask", "channel_masks", "empty_batch"])
def test_opcheck_direct(name: str, grad: bool) -> None:
    device = torch.device(_backends.DEVICE["cuda"])
    s = sample(named(name), device=device, nan=False)
    for leaf in s.leaves().values():
        leaf.requires_grad_(grad)
    assert s.masks is not None
    epilogue = (*geometry(s.case)[:5], s.case.activation, 0.2)
    torch.library.opcheck(op.partial_conv2d_direct, (s.x, s.masks, s.weight, s.bias, None, *epilogue))


@pytest.mark.skipif(bool(_backends.status()["triton"]), reason=_backends.status()["triton"] or "usable")
@pytest.mark.parametrize("given", [False, True], ids=["summed", "given"])
@pytest.mark.parametrize("name", ["relu", "up_folded", "channel_masks"])
def test_opcheck_triton(name: str, given: bool) -> None:
    s = sample(named(name), device=torch.device(_backends.DEVICE["triton"]), nan=False)
    assert s.masks is not None
    count = window_of(s).counts if given else None
    epilogue = (*geometry(s.case)[:5], s.case.activation, 0.2, 0)
    torch.library.opcheck(op.partial_conv2d_triton, (s.x, s.masks, count, s.weight, s.bias, None, *epilogue))
