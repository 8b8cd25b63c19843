# SPDX-License-Identifier: Apache-2.0
"""Self-attention: against the equation in float64, the published block's numbers, and what it keeps in memory."""

import copy
from typing import Any

import pytest
import torch
from cases import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from vectors import assert_close as assert_published
from vectors import cases, meta, state, tensors

from fused_inpaint import SelfAttention2d

HALF = [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)]


@pytest.fixture(autouse=True)
def _tiny(one_thread: None, poisoned: None) -> None:
    """Sizes are small, and no result may come from unwritten memory."""


def layer(channels: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> SelfAttention2d:
    """Queries and keys `scale` times as large as an input's."""
    made = SelfAttention2d(channels)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape) / max(1, p[0].numel()) ** 0.5)
        made.qkv.weight[: 2 * (channels // 2)] *= scale
    return made.to(dtype)


def attended(qkv: Tensor) -> Tensor:
    """The equation between the two convolutions: (N, 3 d, H, W) to (N, d, H, W)."""
    theta, phi, g = qkv.flatten(2).chunk(3, 1)
    return (g @ torch.softmax(theta.mT @ phi, -1).mT).unflatten(2, qkv.shape[2:])


def equation(net: SelfAttention2d, x: Tensor) -> Tensor:
    return net.out(attended(net.qkv(x))) + x


def results(f: Any, net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    net.zero_grad()
    y = f(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype))
    return {"y": y.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", [(2, 6, 5, 7), (1, 2, 1, 1), (1, 5, 1, 9), (2, 66, 4, 3), (1, 8, 30, 31)], ids=str)
def test_equation(size: tuple[int, ...], dtype: torch.dtype, rtol: float) -> None:
    net, x = layer(size[1], dtype), torch.randn(size).to(dtype)
    wide = copy.deepcopy(net).double()
    expected = results(lambda x: equation(wide, x), wide, x.double())
    for name, value in results(net, net, x).items():
        # The keys' bias moves all scores of a row alike: its gradient is 0 but for rounding.
        assert_close(value, expected[name], rtol, rtol * expected["qkv.weight"].abs().max().item(), name)


@pytest.mark.parametrize("dtype, rtol", [*HALF, (torch.float32, 5e-5)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_large_scores(scale: float, autocast: bool, dtype: torch.dtype, rtol: float) -> None:
    """Unscaled scores of hundreds: a half type would round them by whole units. Under autocast, too, the half type goes
    into the attention and comes out of it, and between are float32 scores."""
    if autocast and dtype == torch.float32:
        pytest.skip("autocast to float32 is none")
    if dtype == torch.float16 and torch.__version__.startswith("2.10."):
        pytest.skip("the derivative of torch 2.10's own attention is less accurate")
    net = layer(64, torch.float32 if autocast else dtype, scale)
    seen: dict[str, Tensor] = {}
    net.qkv.register_forward_hook(lambda module, given, out: seen.update(qkv=out))
    net.out.register_forward_pre_hook(lambda module, given: seen.update(y=given[0]))
    x = torch.randn(1, 64, 12, 13, dtype=net.qkv.weight.dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        net(x)
    qkv, y = seen["qkv"], seen["y"]
    assert qkv.dtype == y.dtype == dtype
    exact = qkv.detach().double().requires_grad_()
    expected = attended(exact)
    if scale > 1:
        theta, phi, _ = exact.flatten(2).chunk(3, 1)
        assert (theta.mT @ phi).abs().max() > 300
    grad = torch.randn(y.shape).to(dtype)
    assert_close(y.detach(), expected.detach(), rtol)
    (actual,) = torch.autograd.grad(y, [qkv], grad)
    (wanted,) = torch.autograd.grad(expected, [exact], grad.double())
    # Probabilities, and what they are multiplied with, are rounded once more than the result.
    for part, value, true in zip(("theta", "phi", "g"), actual.chunk(3, 1), wanted.chunk(3, 1), strict=True):
        assert_close(value, true, 2 * rtol, what=part)


@pytest.mark.parametrize("case", [given for given in cases("gin_blocks") if str(given.id).startswith(("nl", "absent"))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_published(case: dict, dtype: torch.dtype) -> None:
    """theta is the query, phi the key: the published block's values, and all its gradients."""
    published = state(meta("gin_blocks")["blocks"][case["network"]], case["set_seed"])
    a = tensors("gin_blocks", case, dtype)
    net = SelfAttention2d(case["nc"], dtype=dtype)
    parts = {name: [published[f"{part}.{name}"] for part in ("theta", "phi", "g")] for name in ("weight", "bias")}
    own = {f"qkv.{name}": torch.cat(values) for name, values in parts.items()}
    net.load_state_dict(own | {f"out.{name}": published[f"W.{name}"] for name in parts})
    x = a["x"].requires_grad_()
    y = net(x)
    y.backward(a["g"])
    found = {"out": y.detach(), "gx": x.grad}
    for name in parts:
        gradients = zip(("theta", "phi", "g"), getattr(net.qkv, name).grad.chunk(3), strict=True)
        found |= {f"g_{part}.{name}": value for part, value in gradients}
        found[f"g_W.{name}"] = getattr(net.out, name).grad
    assert found.keys() == case["check"].keys()
    for name, value in found.items():
        assert_published(value, a[name], case, name)


class Recorder(TorchDispatchMode):
    """What runs, and the largest tensor that comes out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.largest = max(self.largest, t.numel() if isinstance(t, Tensor) else 0)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_keeps_no_matrix_of_scores(layout: str, dtype: torch.dtype) -> None:
    """Forward and backward, from any layout; maps are not copied on the way from one convolution to the other."""
    net, x = layer(8, dtype), torch.randn(2, 8, 20, 21).to(dtype)
    if layout == "sliced":
        x = torch.stack([x, x], -1).flatten(3)[..., ::2]
    elif layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    with Recorder() as seen:
        y = net(x)
        forward = list(seen.names)
        y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert "_scaled_dot_product_flash_attention_for_cpu" in forward
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in seen.names
    assert seen.largest <= 2 * 3 * 8 * 420 and forward.count("clone") == (layout != "channels_last")


def test_second_derivatives() -> None:
    """Refused in words, or right where torch computes the scores."""

    def penalty(f: Any, x: Tensor, net: SelfAttention2d) -> tuple[Tensor, ...]:
        (grad,) = torch.autograd.grad(f(x).square().sum(), [x], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, net.qkv.weight, net.out.weight])

    net, x = layer(6), torch.randn(1, 6, 4, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"derivative for .*attention.*_backward is not implemented"):
        penalty(net, x, net)
    wide = copy.deepcopy(net).double()
    expected = penalty(lambda x: equation(wide, x), x.detach().double().requires_grad_(), wide)
    with sdpa_kernel(SDPBackend.MATH):
        actual = penalty(net, x, net)
    for value, true in zip(actual, expected, strict=True):
        assert_close(value, true, 5e-5)


def test_gradcheck() -> None:
    net, x = layer(4, torch.float64), torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, (x,))


@settings(max_examples=15)
@given(st.integers(0, 3), st.integers(2, 9), st.integers(1, 7), st.integers(1, 7))
def test_any_size(n: int, channels: int, height: int, width: int) -> None:
    """The equation; and positions in another order give the same in that order."""
    net, x = layer(channels, torch.float64), torch.randn(n, channels, height, width, dtype=torch.float64)
    with torch.no_grad():
        y = net(x)
        assert_close(y, equation(net, x), 1e-12)
        assert_close(net(x.flip(3).mT), y.flip(3).mT, 1e-12)


def test_starts_as_identity() -> None:
    net, x = SelfAttention2d(7), torch.randn(2, 7, 4, 5)
    assert torch.equal(net(x), x)
    assert {name: tuple(p.shape) for name, p in net.named_parameters()} == {
        "qkv.weight": (9, 7, 1, 1),
        "qkv.bias": (9,),
        "out.weight": (7, 3, 1, 1),
        "out.bias": (7,),
    }
    assert str(net).startswith("SelfAttention2d(\n  7\n") and SelfAttention2d(2, device="meta").out.weight.is_meta


def test_empty_batch() -> None:
    net, x = layer(4), torch.ones(0, 4, 3, 5, requires_grad=True)
    y = net(x)
    y.sum().backward()
    assert y.shape == (0, 4, 3, 5) and net.qkv.weight.grad is not None and not net.qkv.weight.grad.any()


def test_the_same_bits_from_run_to_run() -> None:
    torch.set_num_threads(2)
    net, x = layer(16), torch.randn(2, 16, 20, 21)
    one, other = (results(net, net, x) for _ in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_compile() -> None:
    torch.compiler.reset()
    net, x = layer(6), torch.randn(2, 6, 8, 9)
    expected = results(net, net, x)
    for name, value in results(torch.compile(net, fullgraph=True, backend="aot_eager"), net, x).items():
        assert_close(value, expected[name], 1e-5, 1e-5, name)


@pytest.mark.parametrize(
    "x, sentence",
    [
        (torch.ones(4, 3, 5), r"x must be \(N, C, H, W\), got \(4, 3, 5\)"),
        (torch.ones(2, 3, 5, 5), r"x must be \(N, 4, H, W\), got \(2, 3, 5, 5\)"),
        (
            torch.ones(2, 4, 5, 5, dtype=torch.int32),
            r"x must be float32, float64, float16 or bfloat16, got torch.int32",
        ),
    ],
)
def test_refusals(x: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^SelfAttention2d: {sentence}$"):
        SelfAttention2d(4)(x)
    with pytest.raises(ValueError, match=r"^SelfAttention2d: channels must be at least 2, got 1$"):
        SelfAttention2d(1)
