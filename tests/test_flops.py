# SPDX-License-Identifier: Apache-2.0
"""torch's FlopCounterMode counts the ops as it counts plain convolutions and products of the same sizes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import OPERATORS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fused_inpaint import _backends, ops, use_backend

MASK = torch.tensor([1.0, 0.0, 1.0]).repeat(2, 1, 4, 2)  # (2, 1, 4, 6)


def pair(w: Tensor) -> Tensor:
    return torch.cat([w, w], 1)


def norm(w: Tensor) -> ops.BatchNorm:
    return ops.BatchNorm(w[:, 0, 0, 0], w[:, 0, 0, 1], None, None, True, 0.1, 1e-5)


def up(t: Tensor) -> Tensor:
    return F.interpolate(t, scale_factor=2)


# name: (ours, plain), by x (2, 4, 4, 6), w (6, 4, 3, 3) and the mask.
PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "partial": (
        lambda x, w, m: ops.partial_conv2d(x, m, w, padding=1, stride=2)[0],
        lambda x, w: F.conv2d(x, w, padding=1, stride=2),
    ),
    "decoder": (
        lambda x, w, m: ops.partial_conv2d((x, up(x)), (m, up(m)), pair(w), padding=1, upsample=(2, 1))[0],
        lambda x, w: F.conv2d(torch.cat([up(x), up(x)], 1), pair(w), padding=1),
    ),
    "batch_norm": (
        lambda x, w, m: ops.partial_conv2d(x, m, w, padding=1, batch_norm=norm(w))[0],
        lambda x, w: F.conv2d(x, w, padding=1),
    ),
    "region_output": (
        lambda x, w, m: ops.region_conv2d(x, m, torch.stack([w, w]), padding=1, activation="elu"),
        lambda x, w: F.conv2d(x, w, padding=1),
    ),
    "region_input": (
        lambda x, w, m: ops.region_conv2d((x, x), m, pair(w), padding=1, select="input"),
        lambda x, w: F.conv2d(pair(x), pair(w), padding=1),
    ),
    "pyramid": (
        lambda x, w, m: ops.pyramid_conv2d(x, w, None, (1, 2)),
        lambda x, w: F.conv2d(x, w, padding=1),
    ),
}


def counted(f: Callable[..., Tensor], *arguments: Tensor) -> tuple[int, int]:
    """(of the forward, of the backward)"""
    with FlopCounterMode(display=False) as counter:
        y = f(*arguments)
        forward = counter.get_total_flops()
        y.sum().backward()
    return forward, counter.get_total_flops() - forward


@OPERATORS
@pytest.mark.parametrize("trained", ["x", "w", "xw"])
@pytest.mark.parametrize("name", PAIRS)
def test_as_a_plain_convolution(backend: str, device: torch.device, name: str, trained: str) -> None:
    ours, plain = PAIRS[name]
    x = torch.randn(2, 4, 4, 6, device=device, requires_grad="x" in trained)
    w = torch.randn(6, 4, 3, 3, device=device, requires_grad="w" in trained)
    expected = counted(plain, x, w)
    assert min(expected) > 0 and counted(ours, x, w, MASK.to(device)) == expected


@OPERATORS
def test_groups(backend: str, device: torch.device) -> None:
    """torch counts the weight's gradient as if every group met every other."""
    x, w = torch.randn(2, 4, 4, 6, device=device), torch.randn(6, 2, 3, 3, device=device, requires_grad=True)
    found = counted(lambda x, w: ops.partial_conv2d(x, MASK.to(device), w, padding=1, groups=2)[0], x, w)
    assert found == (2 * (2 * 6 * 4 * 6) * (2 * 3 * 3),) * 2


@OPERATORS
@pytest.mark.parametrize(("over", "size"), [("channels", (4, 24)), ("positions", (24, 4))])
def test_gram_matrices(backend: str, device: torch.device, over: str, size: tuple[int, int]) -> None:
    """Each of the two maps by itself, and by the signs."""
    x, y = (torch.randn(2, 4, 4, 6, device=device, requires_grad=True) for _ in range(2))
    rows, columns = size
    assert sum(counted(lambda x, y: ops.gram_l1(x, y, over=over), x, y)) == 4 * (2 * 2 * rows * rows * columns)


@pytest.mark.cpu_only
@pytest.mark.parametrize("upsampling", ["none", "nearest", "bilinear"])
def test_as_the_steps_that_it_replaces(upsampling: str) -> None:
    x, w = torch.randn(2, 4, 5, 6), torch.randn(8, 4, 3, 3)
    if reason := _backends.status()["cpu"]:
        pytest.skip(reason)
    found = []
    for backend in ("cpu", "reference"):
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            ops.tap_conv2d(x, w, upsampling=upsampling)
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


@OPERATORS
def test_formulas_of_the_caller_stay(backend: str, device: torch.device) -> None:
    packets = (getattr(torch.ops.fused_inpaint, f"pyramid_conv2d{suffix}") for suffix in ("", "_triton"))
    own = dict.fromkeys(packets, lambda *_, **__: 7)
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        for _ in range(2):
            ops.pyramid_conv2d(
                torch.randn(1, 4, 4, 4, device=device), torch.randn(4, 4, 3, 3, device=device), None, (1, 2)
            )
    assert counter.get_total_flops() == 14
