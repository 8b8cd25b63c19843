# SPDX-License-Identifier: Apache-2.0
"""Layer over torch's scaled_dot_product_attention: parameters, layouts and a call."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import check_feature_map, error


class SelfAttention2d(nn.Module):
    """Self-attention over the positions of a map: the non-local block (Wang et al., "Non-local Neural Networks", 2018,
    embedded Gaussian), as in DeepGIN (Li et al. 2020).

        z = out(softmax(theta phi^T) g) + x          theta, phi, g (H W, C // 2): queries, keys and values

    `layer(x)`: x (N, C, H, W), any memory format, to z of the same size, channels_last. The scores are not divided by
    sqrt(C // 2), and their H W x H W matrix is never in memory where torch has a fused kernel: always on a CPU, on a
    GPU for C // 2 of at most 256 and a multiple of 8. `qkv` is one 1 x 1 convolution with the weight
    (3 * (C // 2), C, 1, 1) of theta, phi and g in this order; `out`, the 1 x 1 convolution back to C, starts at 0, the
    layer as the identity.

    Dtypes are those of `nn.Conv2d`. In half types, and under autocast, theta, phi and g are rounded to the half type;
    scores, softmax and sums are float32 in fused kernels, so that unscaled scores overflow nowhere.

    Second derivatives need the scores: torch refuses them ("derivative ... is not implemented") but for layers called
    under `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.

    Raises:
        ValueError: fewer than 2 channels; x of wrong rank, channels or dtype.

    >>> import torch
    >>> from fused_inpaint import SelfAttention2d
    >>> x = torch.rand(2, 8, 16, 16)
    >>> torch.equal(SelfAttention2d(8)(x), x)
    True
    """

    def __init__(self, channels: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if channels < 2:
            raise error("SelfAttention2d", "channels", "at least 2", channels)
        self.channels = channels
        inner = channels // 2
        self.qkv = nn.Conv2d(channels, 3 * inner, 1, device=device, dtype=dtype)
        self.out = nn.Conv2d(inner, channels, 1, device=device, dtype=dtype)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map("SelfAttention2d", "x", x, self.qkv.weight)
        if x.size(1) != self.channels:
            raise error("SelfAttention2d", "x", f"(N, {self.channels}, H, W)", tuple(x.shape))
        x = x.contiguous(memory_format=torch.channels_last)
        # (N, 1, H W, 3 * inner), a view
        rows = self.qkv(x).permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1)
        theta, phi, g = rows.chunk(3, -1)
        y = F.scaled_dot_product_attention(theta, phi, g, scale=1.0)  # (N, 1, H W, inner)
        y = y.squeeze(1).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return self.out(y) + x

    def extra_repr(self) -> str:
        return f"{self.channels}"
