# SPDX-License-Identifier: Apache-2.0
"""Convolution under spectral normalization, as the published discriminators train with it (Miyato et al., "Spectral
Normalization for Generative Adversarial Networks", ICLR 2018)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _power_step(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The next (u, v) of a matrix (O, K)."""
    v = F.normalize(matrix.T @ u, dim=0)
    return F.normalize(matrix @ v, dim=0), v


# torch 2.13 may compute v of a compiled forward again in its backward, from a u that is overwritten by then; what comes
# of an operator that it cannot look into, it keeps. Can go with a torch that passes tests/test_inductor.py without.
# Not by `_library.define`: it has no kernels, and runs on any device.
_opaque_step = torch.library.custom_op("fused_inpaint::power_step", _power_step, mutates_args=())
_opaque_step.register_fake(lambda matrix, u: (torch.empty_like(u), matrix.new_empty(matrix.size(1))))


class SpectralConv2d(nn.Conv2d):
    """`nn.Conv2d` whose weight is divided by an estimate of its largest singular value, u^T W v.

    Each forward in training mode, or each forward at all with `always`, takes one step of the power method first: v
    from u, then u from v. torch's own parametrization takes u first, and so leads elsewhere from the u and v of a
    published checkpoint; nor can modules with it be pickled. Buffers `weight_u` (O,) and `weight_v` (C kh kw,).

    >>> import torch
    >>> from fused_inpaint.models.spectral import SpectralConv2d
    >>> layer = SpectralConv2d(1, 8, 2).train()
    >>> for _ in range(100):
    ...     weight = layer.normalised_weight()
    >>> round(torch.linalg.matrix_norm(weight.flatten(1), 2).item(), 3)
    1.0
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, *arguments: Any, always: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.always = always
        matrix = self.weight.detach().flatten(1)  # (O, C kh kw)
        self.register_buffer("weight_u", F.normalize(torch.randn_like(matrix[:, 0]), dim=0))
        self.register_buffer("weight_v", torch.zeros_like(matrix[0]))
        self.estimate()

    def estimate(self) -> None:
        """Steps enough for eval mode to come first; again after the weight was set anew."""
        for _ in range(16):
            self._step(self.weight.detach().flatten(1))

    @torch.no_grad()
    def _step(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        # Not torch.compiler.is_exporting(), which torch 2.10 takes for true whatever it compiles.
        exports = getattr(torch.compiler, "_is_exporting_flag", False)
        compiles = torch.compiler.is_compiling() and not exports
        u, v = (_opaque_step if compiles else _power_step)(matrix, self.weight_u)
        self.weight_u.copy_(u)
        self.weight_v.copy_(v)
        return u, v

    def normalised_weight(self) -> Tensor:
        """(O, C, kh, kw)"""
        matrix = self.weight.flatten(1)
        # A singular value of half precision would scale every weight by its rounding.
        with torch.autocast(matrix.device.type, enabled=False):
            # Not the buffers: the next forward overwrites them, and may come before this one's backward.
            steps = self.training or self.always
            u, v = self._step(matrix) if steps else (self.weight_u.clone(), self.weight_v.clone())
            return self.weight / (u @ (matrix @ v))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.normalised_weight(), self.bias)
