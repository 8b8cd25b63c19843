# SPDX-License-Identifier: Apache-2.0
"""The published networks' blocks: the recorded numbers, their references in float64, and what a layer has to bear."""

import copy

import pytest
import torch
from cases import assert_close
from torch import Tensor, nn
from vectors import assert_close as assert_published
from vectors import cases, meta, state, tensors

from fused_inpaint import AOTBlock, use_backend
from fused_inpaint.baselines import SeparateBranchAOTBlock


@pytest.fixture(autouse=True)
def _tiny(one_thread: None) -> None:
    """Sizes are small."""


def from_published(filled: dict[str, Tensor], branches: int) -> dict[str, Tensor]:
    """The published block's parameters under our names."""
    named = {f"{part}.{kind}": filled[f"{part}.1.{kind}"] for part in ("fuse", "gate") for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        named[f"pyramid.{kind}"] = torch.cat([filled[f"block{i:02d}.1.{kind}"] for i in range(branches)])
    return named


def to_published(named: dict[str, Tensor], branches: int) -> dict[str, Tensor]:
    filled = {f"{part}.1.{kind}": named[f"{part}.{kind}"] for part in ("fuse", "gate") for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        for i, part in enumerate(named[f"pyramid.{kind}"].chunk(branches)):
            filled[f"block{i:02d}.1.{kind}"] = part
    return filled


def block(channels: int = 8, rates: tuple[int, ...] = (1, 2), dtype: torch.dtype = torch.float32) -> AOTBlock:
    return AOTBlock(channels, rates, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", cases("aot_block"), ids=lambda case: case["id"])
def test_published_aot_block(backend: str, device: torch.device, case: dict, dtype: torch.dtype) -> None:
    """Output and every gradient of sum(out * g)."""
    if dtype == torch.float64 and (device.type != "cpu" or backend == "triton"):
        pytest.skip("float64 runs on the CPU only")
    filled = state(meta("aot_block")["blocks"][case["network"]], case["set_seed"])
    layer = AOTBlock(case["dim"], case["rates"])
    layer.load_state_dict(from_published(filled, len(case["rates"])))
    layer.to(device, dtype)
    data = tensors("aot_block", case, dtype)
    x = data["x"].to(device).requires_grad_()
    out = layer(x)
    (out * data["g"].to(device)).sum().backward()
    gradients = to_published({name: p.grad for name, p in layer.named_parameters()}, len(case["rates"]))
    found = {"out": out.detach(), "gx": x.grad} | {f"g_{name}": grad for name, grad in gradients.items()}
    assert set(found) == set(case["check"])
    for field, value in found.items():
        assert_published(value.cpu(), data[field], case, field)


@pytest.mark.parametrize("case", cases("aot_block"), ids=lambda case: case["id"])
def test_baseline_aot_block(case: dict) -> None:
    layer = SeparateBranchAOTBlock(case["dim"], case["rates"])
    layer.load_state_dict(state(meta("aot_block")["blocks"][case["network"]], case["set_seed"]))
    data = tensors("aot_block", case)
    assert_published(layer(data["x"]).detach(), data["out"], case, "out")


def gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    y = layer(x)
    found = torch.autograd.grad(y, [x, *layer.parameters()], grad.to(y.device, y.dtype))
    return {"y": y.detach()} | dict(zip(["x", *names], found, strict=True))


# Under the normalization lies a convolution of rounded values, which 10 / std multiplies.
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 2**-6), (torch.float16, 2**-8)])
@pytest.mark.parametrize("size", [(2, 8, 9, 7), (1, 8, 3, 3), (0, 8, 6, 6)], ids=str)
def test_aot_block(backend: str, device: torch.device, size: tuple[int, ...], dtype: torch.dtype, rtol: float) -> None:
    """Against the reference in float64, on the rounded parameters."""
    layer = block().to(dtype)
    x, grad = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    with use_backend("reference"):
        expected = gradients(copy.deepcopy(layer).double(), x.double(), grad.double())
    actual = gradients(copy.deepcopy(layer).to(device), x.to(device), grad)
    assert actual["y"].dtype == dtype
    if x.numel() and backend != "reference":
        assert actual["y"].is_contiguous(memory_format=torch.channels_last)
    scale = expected["gate.weight"].abs().max().item() if x.numel() else 0.0
    for name, value in expected.items():
        # What is added to the gate is taken away again: the gradient of its bias is rounding.
        assert_close(actual[name], value, rtol, rtol * scale if name == "gate.bias" else 0.0, name)


def test_layouts_and_copies(backend: str, device: torch.device) -> None:
    layer, x = block().to(device), torch.randn(2, 8, 9, 7, device=device)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)), y)
    assert torch.equal(layer(torch.cat([x, x], 1)[:, ::1][:, :8]), y)


def test_gradcheck(backend: str, device: torch.device) -> None:
    if backend == "triton" or device.type != "cpu":
        pytest.skip("float64 runs on the CPU only")
    layer = block(2, (1, 2), torch.float64)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x, atol=1e-4)


def test_compile(backend: str, device: torch.device) -> None:
    torch.compiler.reset()
    layer, x, grad = block().to(device), torch.randn(2, 8, 9, 7, device=device), torch.randn(2, 8, 9, 7)
    expected = gradients(layer, x, grad)
    found = gradients(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, grad)
    for (name, value), other in zip(expected.items(), found.values(), strict=True):
        assert_close(other, value, 1e-5, 1e-4 if name == "gate.bias" else 0.0, name)


def test_autocast(backend: str, device: torch.device) -> None:
    layer, x = block().to(device), torch.randn(2, 8, 9, 7, device=device)
    expected = layer(x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    assert_close(y, expected, 2**-5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"^AOTBlock: x must be \(N, C, H, W\), got \(8, 9, 9\)$"):
        AOTBlock(8)(torch.ones(8, 9, 9))
    with pytest.raises(ValueError, match=r"^AOTBlock: channels must be a positive multiple of len\(rates\) 3, got 16$"):
        AOTBlock(16, (1, 2, 4))
    with pytest.raises(ValueError, match=r"^AOTBlock: channels must be a positive multiple of len\(rates\) 0, got 16$"):
        AOTBlock(16, ())
