# SPDX-License-Identifier: Apache-2.0
"""A call is judged by itself, whatever was called before it: nothing that is kept between calls shows."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import KERNELS
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fused_inpaint import NoBackendError, ops, use_backend
from fused_inpaint.ops.partial_conv import plan, routes


def conv(device: torch.device, **changes: Any) -> tuple[Tensor, Tensor]:
    x, weight = torch.ones(2, 4, 6, 6, device=device), torch.ones(4, 4, 3, 3, device=device)
    arguments: dict[str, Any] = {"x": x, "mask": None, "weight": weight, "stride": 1, "padding": (1, 1), "groups": 1}
    return ops.partial_conv2d(**{**arguments, **changes})


def chain(device: torch.device, **changes: Any) -> list[ops.Window]:
    step = dict(inputs=[0], channels=[3], upsample=[1], kernel=[3, 3], stride=[2, 2], padding=[1, 1], dilation=[1, 1])
    return ops.partial_window_chain(torch.ones(1, 1, 8, 8, device=device), [ops.WindowStep(**{**step, **changes})])


BAD: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "stride": (conv, dict(stride=1.0), "stride must be an int or two of at least 1, got 1.0"),
    "stride_list": (conv, dict(stride=[1, 1.0]), "stride must be an int or two of at least 1, got [1, 1.0]"),
    "dilation": (conv, dict(dilation=(1,)), "dilation must be an int or two of at least 1, got (1,)"),
    "dilation_text": (conv, dict(dilation="1"), "dilation must be an int or two of at least 1, got 1"),
    "across": (conv, dict(stride=(1, 1, 1), padding=(1,)), "stride must be an int or two of at least 1, got (1, 1, 1)"),
    "holes_zero": (
        conv,
        dict(holes_zero=[False] * 2),
        "holes_zero must be a bool, or one for each of 1 sources, got [0, 0]",
    ),
    "padding": (conv, dict(padding=(1.0, 1)), "padding must be an int or two of at least 0, got (1.0, 1)"),
    "lengths": (
        conv,
        dict(upsample=[], holes_zero=[True, False]),
        "upsample must be 1 or 2 for each of 1 sources, got []",
    ),
    "groups": (conv, dict(groups=1.0), "groups must be a positive int, 1 with several sources, got 1.0"),
    "groups_list": (conv, dict(groups=[1]), "groups must be a positive int, 1 with several sources, got [1]"),
    "activation": (conv, dict(activation=["relu"]), "activation must be none, relu or leaky_relu, got ['relu']"),
    "upsample": (conv, dict(upsample=[[1]]), "upsample must be 1 or 2 for each of 1 sources, got [[1]]"),
    "bias": (conv, dict(bias=torch.ones(3)), "bias must be (4,), got (3,)"),
    "kernel": (chain, dict(kernel=[3.0, 3]), "kernel of step 0 must be an int or two of at least 1, got [3.0, 3]"),
    "one_number": (chain, dict(kernel=[3]), "kernel of step 0 must be an int or two of at least 1, got [3]"),
}


@pytest.mark.parametrize("name", BAD)
def test_equal_numbers_are_not_equal_arguments(backend: str, device: torch.device, name: str) -> None:
    """1.0 equals 1, yet is refused after 1 was taken, and 1 is taken after it was refused."""
    call, changes, sentence = BAD[name]
    changes = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in changes.items()}
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            call(device, **changes)
        call(device)


def test_other_shapes(backend: str, device: torch.device) -> None:
    masks = torch.ones(1, 1, 6, 6, device=device)
    window = ops.partial_window(masks, 4, 3, padding=1)
    for _ in range(2):
        assert conv(device, window=window)[0].shape == (2, 4, 6, 6)
        with pytest.raises(ValueError, match="mask must be"):
            conv(device, window=window, x=torch.ones(2, 4, 6, 7, device=device))
        with pytest.raises(ValueError, match="x must be of 5 channels"):
            conv(device, window=window, weight=torch.ones(4, 5, 3, 3, device=device))
        with pytest.raises(ValueError, match="x must be float32"):
            conv(device, window=window, x=torch.ones(2, 4, 6, 6, device=device, dtype=torch.int32))


def test_other_masks(backend: str, device: torch.device) -> None:
    good = torch.ones(2, 1, 6, 6, device=device)
    window = ops.partial_window(good, 4, 3, padding=1)
    for given in (None, window):
        for _ in range(2):
            assert conv(device, mask=good, window=given)[1].dtype == torch.float32
            assert conv(device, mask=good.bool(), window=given)[1].dtype == torch.bool
            for bad in (good[..., 1:], good.int(), good.expand(2, 3, 6, 6), good[0]):
                with pytest.raises(ValueError, match="mask must be"):
                    conv(device, mask=bad, window=given)
            with pytest.raises(ValueError, match="mask must be a sequence of 1, one for each x, got 2"):
                conv(device, mask=[good, good], window=given)
    if device.type == "cpu" and not backend.startswith("cuda"):  # whose kernels, emulated on the CPU, do not look
        with pytest.raises(ValueError, match=r"mask must be 0 or 1 everywhere, got 0\.5"):
            conv(device, mask=good / 2)


def test_other_modes(backend: str, device: torch.device) -> None:
    """Autocast, and whether a norm's statistics are the batch's and its gain is trained."""
    x = torch.randn(1, 4, 1, 1, device=device)
    gain, shift, mean, var = (torch.rand(4, device=device) + 0.5 for _ in range(4))
    weight = torch.randn(4, 4, 1, 1, device=device)

    def normed(training: bool) -> Tensor:
        norm = ops.BatchNorm(gain, shift, mean, var, training, 0.1, 1e-5)
        return conv(device, x=x, weight=weight, padding=0, batch_norm=norm)[0]

    expected = torch.nn.functional.conv2d(x, weight)
    expected = (expected - mean.view(-1, 1, 1)) * (gain / (var + 1e-5).sqrt()).view(-1, 1, 1) + shift.view(-1, 1, 1)
    slope = ((expected - shift.view(-1, 1, 1)) / gain.view(-1, 1, 1)).flatten()
    for _ in range(2):
        torch.testing.assert_close(normed(False), expected)
        with torch.autocast(device.type, torch.bfloat16):
            assert normed(False).dtype == torch.bfloat16
        with torch.autocast(device.type, torch.float16):
            assert normed(False).dtype == torch.float16
        with pytest.raises(ValueError, match="x must be more than one value per channel for batch statistics"):
            normed(True)
        gain.requires_grad_()
        (found,) = torch.autograd.grad(normed(False).sum(), gain)
        torch.testing.assert_close(found, slope)
        with torch.no_grad():
            torch.testing.assert_close(normed(False), expected)
        gain.requires_grad_(False)


def test_other_folds() -> None:
    x, skip, weight = torch.rand(1, 4, 4, 4), torch.rand(1, 2, 8, 8), torch.rand(5, 6, 3, 3)
    masks = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 8, 8)
    plan.forget()
    for fold in (None, True, False, None, True, False):
        ops.partial_upconv2d(x, masks[0], skip, masks[1], weight, fold=fold)
    assert len(plan._plans) == 3
    assert [kept.fold_from for kept in plan._plans.values()][1:] == [0, routes.fold_from("plain", False)]


def test_no_more_is_kept_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_MOST", 3)
    monkeypatch.setattr(plan, "_plans", {})
    monkeypatch.setattr(plan, "_chains", set())
    for side in range(3, 10):
        conv(torch.device("cpu"), x=torch.rand(1, 4, side, side))
        ops.partial_window_chain(
            torch.ones(1, 1, side, side), [ops.WindowStep([0], [3], [1], *[[1, 1]] * 2, [0, 0], [1, 1])]
        )
        assert len(plan._plans) <= 3 and len(plan._chains) <= 3


@pytest.mark.skipif("cpu" not in KERNELS, reason="there is no kernel to choose")
def test_another_thread_selects_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for a backend is that backend's."""
    monkeypatch.setattr(plan, "_plans", {})
    chosen = routes.choose

    def choose(*arguments: Any) -> str:
        use_backend("reference")
        return chosen(*arguments)

    with use_backend("cpu"):
        monkeypatch.setattr(routes, "choose", choose)
        conv(torch.device("cpu"))
    assert [kept.kernel for kept in plan._plans.values()] == ["vendor"]


def test_sizes_without_a_hash() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = {"x": (2, 4, 6, 6), "mask": (2, 1, 6, 6), "weight": (4, 4, 3, 3)}
    y, _ = conv(torch.device("cpu"), **{name: mode.from_tensor(torch.rand(size)) for name, size in sizes.items()})
    assert tuple(y.shape) == (2, 4, 6, 6)


@pytest.mark.skipif("cpu" not in KERNELS, reason="there is no kernel to choose")
def test_the_backend_is_chosen_anew() -> None:
    """A call that ran is refused by another backend, and both numbers come from the one that is selected."""
    x, device = torch.rand(2, 4, 6, 6), torch.device("cpu")
    with use_backend("cpu"):
        y, _ = conv(device, x=x.requires_grad_())
    assert "fused_inpaint" in y.grad_fn.name()
    with use_backend("reference"):
        y, _ = conv(device, x=x)
    assert "fused_inpaint" not in y.grad_fn.name()
    for name in ("triton", "cuda"):
        if name not in KERNELS:
            with use_backend(name), pytest.raises(NoBackendError, match=r"^partial_conv2d: backend must be able"):
                conv(device, x=x)
