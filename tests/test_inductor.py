# SPDX-License-Identifier: Apache-2.0
"""A training step of each network under `torch.compile` as users call it, and padding, which it needs a way around
torch for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close
from test_training import CONFIG, CRITIC
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fused_inpaint import models
from fused_inpaint.models import spectral
from fused_inpaint.ops import padding
from fused_inpaint.ops.padding import pad

CHANNELS_LAST = torch.channels_last


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def same_step(net: nn.Module, calls: int) -> None:
    """One backward of several forwards, as a discriminator has of real and fake pictures."""
    other = copy.deepcopy(net)
    given = [pictures() for _ in range(calls)]
    outputs = [tree_leaves([f(*one) for one in given]) for f in (net, torch.compile(other, fullgraph=True))]
    for expected, found in zip(*outputs, strict=True):
        assert_close(found, expected, 1e-9)
    for leaves in outputs:
        sum(y.square().mean() for y in leaves if y.requires_grad).backward()
    largest = max(p.grad.abs().max().item() for p in net.parameters() if p.grad is not None)
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert_close(q.grad, p.grad, 1e-8, 1e-12 * largest, what=name)
    for (name, t), u in zip(net.named_buffers(), other.buffers(), strict=True):
        assert_close(u, t, 1e-9, what=name)


def pictures(width: int = 64) -> tuple[Tensor, Tensor]:
    image, mask = torch.rand(2, 3, 64, width, dtype=torch.float64), torch.ones(2, 1, 64, width)
    mask[:, :, 10:40, 12:44] = 0
    return image, mask


@pytest.mark.parametrize("key", CONFIG)
def test_training_step(key: str) -> None:
    same_step(models.build_model(key, **CONFIG[key]).double().train(), calls=1)


@pytest.mark.parametrize("key", CRITIC)
def test_training_step_of_the_discriminator(key: str) -> None:
    same_step(models.build_discriminator(key, **CRITIC[key]).double().train(), calls=2)


@torch.no_grad()
def test_pictures_of_another_size() -> None:
    """For which the second graph is one of any size. DeepGIN's has the most kinds of padding."""
    model = models.build_model("deepgin", **CONFIG["deepgin"]).double().eval()
    compiled = torch.compile(model, fullgraph=True)
    for width in (64, 80):
        given = pictures(width)
        assert_close(compiled(*given).image, model(*given).image, 1e-9)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_padding(mode: str, dynamic: bool) -> None:
    """Before a convolution, where the derivative of torch's own replication fails when compiled. Not in float64, of
    which torch 2.10 cannot compile all."""
    x = torch.randn(2, 4, 7, 9).contiguous(memory_format=CHANNELS_LAST)
    weight = torch.randn(3, 4, 3, 3).contiguous(memory_format=CHANNELS_LAST)

    def call(t: Tensor) -> Tensor:
        return F.conv2d(pad(t * 2, (1, 2, 3, 0), mode), weight)

    expected, given = (x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    y = F.conv2d(F.pad(expected * 2, (1, 2, 3, 0), mode), weight)
    found = torch.compile(call, fullgraph=True, dynamic=dynamic)(given)
    for t in (y, found):
        t.square().sum().backward()
    assert_close(found, y, 1e-6)
    assert_close(given.grad, expected.grad, 1e-6)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_as_a_volume(mode: str, channels: int) -> None:
    """The form that maps take on a GPU."""
    x = torch.randn(2, channels, 7, 9, dtype=torch.float64).contiguous(memory_format=CHANNELS_LAST)
    found = []
    for form in (padding._as_volume, F.pad):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = form(leaf, (1, 2, 3, 0), mode)
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
        found.append((y, leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1], 1e-12)


def test_padding_of_the_device(backend: str, device: torch.device) -> None:
    x = torch.randn(2, 4, 7, 9, device=device)
    for mode in ("constant", "reflect", "replicate", "circular"):
        for layout in (CHANNELS_LAST, torch.contiguous_format):
            y = pad(x.contiguous(memory_format=layout), (1, 2, 3, 0), mode)
            assert torch.equal(y, F.pad(x, (1, 2, 3, 0), mode))


def test_the_step_of_the_power_method() -> None:
    matrix, u = torch.randn(4, 9), torch.randn(4)
    torch.library.opcheck(spectral._opaque_step, (matrix, u))
