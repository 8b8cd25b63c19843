# SPDX-License-Identifier: Apache-2.0
"""The weight's gradient over few pixels, which the CPU computes by products of matrices (csrc/common/convolution.h)."""

import pytest
import torch
from cases import assert_close
from torch import Tensor

from fused_inpaint import _backends, ops, use_backend

pytestmark = [
    pytest.mark.usefixtures("poisoned", "one_thread"),
    pytest.mark.skipif(bool(_backends.status()["cpu"]), reason=_backends.status()["cpu"] or "usable"),
]

# kernel, stride, padding, dilation, map
GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (1, 1), (8, 7)),
    ((3, 3), (2, 2), (1, 1), (1, 1), (4, 5)),
    ((2, 3), (1, 2), (1, 0), (2, 1), (6, 9)),
    ((5, 5), (2, 2), (2, 2), (1, 1), (2, 2)),
    ((1, 1), (1, 1), (0, 0), (1, 1), (16, 16)),
]


def gradients(geometry: tuple, dtype: torch.dtype, backend: str) -> list[Tensor]:
    kernel, stride, padding, dilation, size = geometry
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 120, *size, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(140, 120, *kernel, generator=g).to(dtype).requires_grad_()
    mask = (torch.rand(2, 1, *size, generator=g) > 0.3).to(dtype)
    with use_backend(backend):
        y, _ = ops.partial_conv2d(x, mask, weight, stride=stride, padding=padding, dilation=dilation)
        grad = torch.randn(y.shape, generator=g).to(dtype)
        return list(torch.autograd.grad(y, (x, weight), grad))


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: f"{geometry[0]}-{geometry[1]}")
def test_reference(geometry: tuple, dtype: torch.dtype, rtol: float) -> None:
    for actual, expected in zip(
        gradients(geometry, dtype, "cpu"), gradients(geometry, torch.float64, "reference"), strict=True
    ):
        assert_close(actual, expected, rtol)


def test_which_are_products() -> None:
    with torch.profiler.profile() as profile:
        gradients(GEOMETRIES[0], torch.float32, "cpu")
    assert [event.name for event in profile.events()].count("aten::mm") == 9  # one for each tap


def test_the_same_bits_whatever_the_number_of_threads() -> None:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(GEOMETRIES[0], torch.float32, "cpu")[1])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
