# SPDX-License-Identifier: Apache-2.0
"""A call is judged by itself, whatever was called before it: nothing that is kept between calls shows."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import KERNELS
from torch import Tensor

from fused_inpaint import NoBackendError, ops, use_backend


def conv(device: torch.device, **changes: Any) -> tuple[Tensor, Tensor]:
    x, weight = torch.ones(2, 4, 6, 6, device=device), torch.ones(4, 4, 3, 3, device=device)
    arguments: dict[str, Any] = {"x": x, "mask": None, "weight": weight, "stride": 1, "padding": (1, 1), "groups": 1}
    return ops.partial_conv2d(**{**arguments, **changes})


def chain(device: torch.device, **changes: Any) -> list[ops.Window]:
    step = dict(inputs=[0], channels=[3], upsample=[1], kernel=[3, 3], stride=[2, 2], padding=[1, 1], dilation=[1, 1])
    return ops.partial_window_chain(torch.ones(1, 1, 8, 8, device=device), [ops.WindowStep(**{**step, **changes})])


BAD: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "stride": (conv, dict(stride=1.0), "stride must be an int or two of at least 1, got 1.0"),
    "padding": (conv, dict(padding=(1.0, 1)), "padding must be an int or two of at least 0, got (1.0, 1)"),
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
