# SPDX-License-Identifier: Apache-2.0
"""The way into operators with a derivative in eager mode, beside the one that torch registers."""

from collections.abc import Callable

import pytest
import torch
from cases import ALL, OPERATORS, Case, assert_same, cotangent, named, results, sample
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fused_inpaint
from fused_inpaint import _library, ops, use_backend
from fused_inpaint.ops.partial_conv import plan


@OPERATORS
@ALL
def test_same_bits_as_the_registered_derivative(
    backend: str, device: torch.device, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    grad = cotangent(sample(case))
    eager = results(sample(case, device=device), grad)
    for module in (_library, plan):  # the latter goes by several operators then
        monkeypatch.setattr(module, "is_eager", lambda: False)
    assert_same(eager, results(sample(case, device=device), grad))


MASK = torch.tensor([1.0, 0.0, 1.0]).repeat(2, 1, 4, 2)  # (2, 1, 4, 6)
OTHERS: dict[str, Callable[..., Tensor]] = {
    "region_conv2d": lambda x, w, m: ops.region_conv2d(x, m, torch.stack([w, w * 2]), padding=1),
    "region_norm": lambda x, w, m: ops.region_norm(x, m, w[:2, :, 0, 0].abs() + 1, w[:2, :, 1, 1]),
    "channel_pool": lambda x, w, m: ops.channel_pool(x),
    "pyramid_conv2d": lambda x, w, m: ops.pyramid_conv2d(x, w.repeat(2, 1, 1, 1), None, (1, 2)),
    "gated_blend": lambda x, w, m: ops.gated_blend(x, x * 2, x.square()),
    "gram_l1": lambda x, w, m: ops.gram_l1(x, x.square()),
    "gram_l1_positions": lambda x, w, m: ops.gram_l1(x, x.square(), over="positions"),
}


def gradients(f: Callable[..., Tensor], device: torch.device) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(2)
    sizes = ((2, 4, 4, 6), (4, 4, 3, 3))
    x, w = (torch.randn(size, generator=g).to(device).requires_grad_() for size in sizes)
    y = f(x, w, MASK.to(device))
    found = torch.autograd.grad(y.square().sum(), (x, w), allow_unused=True)
    return y.detach(), *(t for t in found if t is not None)


@OPERATORS
@pytest.mark.parametrize("name", OTHERS)
def test_same_bits_of_other_operators(
    backend: str, device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = gradients(OTHERS[name], device)
    monkeypatch.setattr(_library, "is_eager", lambda: False)
    registered = gradients(OTHERS[name], device)
    assert len(eager) == len(registered) > 1
    for mine, theirs in zip(eager, registered, strict=True):
        assert torch.equal(mine, theirs)


def pooled(x: Tensor) -> Tensor:
    y: Tensor = _library.ops.channel_pool(x)
    return y


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@OPERATORS
def test_which_way_is_taken(backend: str, device: torch.device) -> None:
    x = torch.rand(1, 2, 3, 4, device=device, requires_grad=True)
    assert pooled(x).grad_fn.name() == "Backward_fused_inpaint_channel_poolBackward"
    with torch.no_grad():
        assert pooled(x).grad_fn is None
    assert pooled(x.detach()).grad_fn is None
    graph = make_fx(pooled)(x.detach()).graph
    assert torch.ops.fused_inpaint.channel_pool.default in [node.target for node in graph.nodes]
    with FakeTensorMode():
        assert tuple(pooled(torch.rand(1, 2, 3, 4)).shape) == (1, 2, 3, 4)
    traced = torch.jit.trace(pooled, x.detach(), check_trace=False)
    assert "fused_inpaint::channel_pool" in str(traced.graph)


def operators(call: Callable[[], object]) -> list[str]:
    """The names of all that the dispatcher is entered for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [event.name for event in profile.events()]


@OPERATORS
def test_poison_reaches_the_kernels_memory(backend: str, device: torch.device) -> None:
    """What the op tests rely on to see an output that was not written; calls in which nobody else asks for memory."""
    x, mask = torch.rand(1, 2, 6, 6, device=device), torch.ones(1, 1, 6, 6, dtype=torch.uint8, device=device)
    for call in (lambda: ops.partial_window(mask, 2, 3), lambda: ops.gated_blend(x, x, x)):
        entered = operators(call)
        empty = [name for name in entered if name in ("aten::empty", "aten::empty_strided")]
        assert len(empty) >= 2 and entered.count("aten::fill_") >= len(empty)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@OPERATORS
def test_a_layer_is_one_operator(backend: str, device: torch.device, dtype: torch.dtype, grad: bool) -> None:
    """Each one entered costs the host tens of microseconds."""
    x, layer = torch.rand(1, 2, 6, 6, device=device), fused_inpaint.PartialConv2d(2, 3, 3, device=device)
    mask = torch.ones(1, 1, 6, 6, dtype=dtype, device=device)
    with torch.set_grad_enabled(grad):
        layer(x, mask)
        (entered,) = (name for name in operators(lambda: layer(x, mask)) if name.startswith("fused_inpaint::"))
    vendor = backend in ("cpu", "cuda_vendor")
    assert entered.startswith("fused_inpaint::partial_conv2d_" + ("masked" if vendor else ""))


@OPERATORS
def test_a_mask_has_no_gradient(backend: str, device: torch.device) -> None:
    x, weight = torch.rand(1, 2, 6, 6, device=device), torch.rand(3, 2, 3, 3, device=device)
    mask = torch.ones(1, 1, 6, 6, device=device, requires_grad=True)
    assert not ops.partial_conv2d(x, mask, weight)[0].requires_grad
    y, new_mask = ops.partial_conv2d(x, mask, weight.requires_grad_())
    y.sum().backward()
    assert not new_mask.requires_grad and mask.grad is None and weight.grad is not None
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(mask.detach(), torch.ones_like(mask))
        for found in ops.partial_conv2d(x, dual, weight.detach()):
            assert forward_ad.unpack_dual(found).tangent is None


@OPERATORS
def test_saved_tensors_meet_their_hooks(backend: str, device: torch.device) -> None:
    """What is kept for the derivative can be packed away, as by torch.utils.checkpoint or offloading."""
    s, grad = sample(named("relu"), device=device), cotangent(sample(named("relu")))
    expected = results(s, grad)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        assert_same(results(sample(named("relu"), device=device), grad), expected)
    assert packed


def normed(x: Tensor, w: Tensor, m: Tensor, which: int = 0, tangent: Tensor | None = None) -> Tensor:
    """A layer with fixed statistics, one parameter of which may have a tangent."""
    parameters = [torch.full((4,), 0.5, device=x.device) for _ in range(4)]
    if tangent is not None:
        parameters[which] = forward_ad.make_dual(parameters[which], tangent)
    norm = ops.BatchNorm(*parameters, False, 0.1, 1e-5)
    return ops.partial_conv2d(x, m, w, padding=1, batch_norm=norm)[0]


ALL_OPS = {**OTHERS, "partial_conv2d": lambda x, w, m: ops.partial_conv2d(x, m, w, padding=1)[0], "normed": normed}
REFUSED = pytest.raises(NotImplementedError, match=r"^\w+: tensors must be without tangents, got one with; ")
TRANSFORMED = pytest.raises(NotImplementedError, match=r"^\w+: tensors must be outside of torch.func's transforms")


@OPERATORS
@pytest.mark.parametrize("name", ALL_OPS)
def test_recomputed_by_checkpoint(backend: str, device: torch.device, name: str) -> None:
    """Which gives what was kept to a derivative once."""

    def again(*arguments: Tensor) -> Tensor:
        return checkpoint(ALL_OPS[name], *arguments, use_reentrant=False)

    for actual, expected in zip(gradients(again, device), gradients(ALL_OPS[name], device), strict=True):
        assert torch.equal(actual, expected)
    x = torch.randn(2, 4, 4, 6, device=device, requires_grad=True)
    w = torch.randn(4, 4, 3, 3, device=device).abs()
    found = []
    for f in (again, ALL_OPS[name]):
        (g,) = torch.autograd.grad(f(x, w, MASK.to(device)).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), x)[0])
    assert torch.equal(*found)


@OPERATORS
@pytest.mark.parametrize("name", ALL_OPS)
def test_forward_mode_is_refused_and_not_dropped(backend: str, device: torch.device, name: str) -> None:
    """Under torch.func and in the backward, too; the reference has the derivative."""
    x, w, tangent = (torch.rand(size, device=device) for size in ((2, 4, 4, 6), (4, 4, 3, 3), (2, 4, 4, 6)))
    mask = MASK.to(device)

    def f(x: Tensor) -> Tensor:
        return ALL_OPS[name](x, w, mask)

    def nested(x: Tensor) -> Tensor:
        return torch.func.grad(lambda a: a * f(x).sum())(torch.tensor(2.0, device=device))

    leaf = x.clone().requires_grad_()
    with forward_ad.dual_level():
        y = f(leaf)
        with REFUSED:
            f(forward_ad.make_dual(x, tangent))
        grad = forward_ad.make_dual(torch.ones_like(y), torch.rand_like(y))
        if name.startswith("gram_l1"):  # whose backward is a product of torch's
            (found,) = torch.autograd.grad(y, leaf, grad)
            assert forward_ad.unpack_dual(found).tangent.abs().max() > 0
        else:
            with REFUSED:
                torch.autograd.grad(y, leaf, grad)
    for function in (f, nested):
        with TRANSFORMED:
            torch.func.jvp(function, (x,), (tangent,))
        with use_backend("reference"):
            moved = torch.func.jvp(function, (x,), (tangent,))[1]
        assert moved.abs().max() > 0
    with TRANSFORMED:
        torch.func.grad(lambda x: f(x).sum())(x)
    if name == "partial_conv2d":  # others ask for a memory format first, which torch refuses
        with TRANSFORMED:
            torch.func.vmap(f)(x[None])


@OPERATORS
@pytest.mark.parametrize("which", range(4))
def test_tangents_of_a_norm_are_refused(backend: str, device: torch.device, which: int) -> None:
    x, w, tangent = (torch.rand(size, device=device) for size in ((2, 4, 4, 6), (4, 4, 3, 3), (4,)))
    with forward_ad.dual_level():
        with REFUSED:
            normed(x, w, MASK.to(device), which, tangent)
        with use_backend("reference"):
            y = normed(x, w, MASK.to(device), which, tangent)
        assert forward_ad.unpack_dual(y).tangent.abs().max() > 0
