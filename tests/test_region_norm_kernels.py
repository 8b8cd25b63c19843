# SPDX-License-Identifier: Apache-2.0
"""What region normalization's kernels promise beyond agreeing with the reference on ordinary numbers."""

import pytest
import torch
from cases import OPERATORS
from torch import Tensor

from fused_inpaint import ops, use_backend

INF, NAN = float("inf"), float("nan")


def halves(n: int, h: int, w: int) -> Tensor:
    """Region 1 on the left."""
    mask = torch.zeros(n, 1, h, w)
    mask[..., : w // 2] = 1
    return mask


@OPERATORS
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_region_of_equal_values_gives_its_bias(backend: str, device: torch.device, per_channel: bool) -> None:
    mask = halves(2, 12, 10).expand(-1, 16 if per_channel else 1, -1, -1)
    x = torch.where(mask > 0, 1234.567, -0.1).expand(-1, 16, -1, -1).to(device)
    bias = torch.randn(2, 16, device=device)
    y = ops.region_norm(x, mask.to(device), None, bias)
    expected = torch.where(mask.to(device) > 0, bias[1].view(1, -1, 1, 1), bias[0].view(1, -1, 1, 1))
    assert torch.equal(y, expected)


@OPERATORS
def test_a_constant_gradient_is_cancelled(backend: str, device: torch.device) -> None:
    """Adding a number to a region changes nothing, so the gradient of the sum is 0, but for the sums' own rounding."""
    x = (torch.randn(3, 12, 20, 16) * 3 + 100).to(device).requires_grad_()
    (grad,) = torch.autograd.grad(ops.region_norm(x, halves(3, 20, 16).to(device)).sum(), x)
    assert grad.abs().max() < 1e-6


@OPERATORS
@pytest.mark.parametrize("stats", ["batch", "instance"])
@pytest.mark.parametrize("outlier", [1e3, 1e6])
def test_an_outlier_does_not_spoil_the_statistics(
    backend: str, device: torch.device, stats: str, outlier: float
) -> None:
    """A chunk's first value is the point from which its deviations are taken."""
    x = torch.randn(2, 8, 48, 40)
    x[..., ::8, ::8] = outlier
    mask = halves(2, 48, 40)
    with use_backend("reference"):
        expected = ops.region_norm(x.double(), mask, stats=stats)
    y = ops.region_norm(x.to(device), mask.to(device), stats=stats).cpu()
    assert ((y - expected).abs() / expected.abs().max()).max() < 2e-6


@OPERATORS
def test_far_apart_parts_are_merged(backend: str, device: torch.device) -> None:
    """Each row has its own mean, far from the others' and from 0."""
    x = torch.randn(1, 4, 96, 64) * 1e-2 + 1e3 + torch.arange(96).view(1, 1, -1, 1)
    mask = (torch.rand(1, 1, 96, 64) > 0.5).float()
    with use_backend("reference"):
        expected = ops.region_norm(x.double(), mask)
    y = ops.region_norm(x.to(device), mask.to(device)).cpu()
    assert (y - expected).abs().max() < 2e-5


@OPERATORS
@pytest.mark.parametrize("channels", [3, 16, 37])
def test_pool_takes_nan_infinity_and_the_first_of_equals(backend: str, device: torch.device, channels: int) -> None:
    rows = torch.randn(6, channels)
    rows[0, 1] = NAN
    rows[1] = -INF
    rows[2, channels - 1] = INF
    rows[3, 1:] = 5.0
    rows[4, 0], rows[4, 2] = NAN, NAN
    rows[5] = 0.0
    x = rows.t().reshape(1, channels, 2, 3).to(device).requires_grad_()
    with use_backend("reference"):
        wide = rows.double().t().reshape(1, channels, 2, 3).requires_grad_()
        expected = ops.channel_pool(wide)
    y = ops.channel_pool(x)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    grad = torch.randn(y.shape)
    (actual,) = torch.autograd.grad(y, x, grad.to(device))
    first = torch.stack([row.isnan().double().argmax() if row.isnan().any() else row.argmax() for row in rows])
    assert first[3] == 1 and first[5] == 0
    expected_grad = (grad[0, 0].reshape(6, 1) / channels).expand(6, channels).clone()
    expected_grad[torch.arange(6), first] += grad[0, 1].reshape(6)
    torch.testing.assert_close(actual.cpu().reshape(channels, 6).t(), expected_grad, rtol=1e-6, atol=1e-6)


@OPERATORS
@pytest.mark.parametrize("stats", ["batch", "instance"])
@pytest.mark.parametrize("planes", ["shared", "each_channel"])
def test_runs_and_masks_of_every_shape(backend: str, device: torch.device, stats: str, planes: str) -> None:
    """A mask for all samples, and one for each channel, are those masks repeated."""
    x = torch.randn(3, 6, 11, 13).to(device).requires_grad_()
    mask = (torch.rand(1 if planes == "shared" else 3, 1, 11, 13) > 0.5).float().to(device)
    wide = mask.expand(3, -1, -1, -1) if planes == "shared" else mask.expand(-1, 6, -1, -1)
    grad = torch.randn(x.shape).to(device)
    for activation in ("none", "relu"):
        found = []
        for m in (mask, wide.contiguous()):
            y = ops.region_norm(x, m, stats=stats, activation=activation)
            found.append((y.detach(), *torch.autograd.grad(y, x, grad)))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
