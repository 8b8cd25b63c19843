# SPDX-License-Identifier: Apache-2.0
"""What all operators check alike. A sentence is only put together once a check has failed: shapes may be symbolic."""

import platform
from collections.abc import Sequence

import torch
from torch import Tensor

Pair = int | Sequence[int]
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MASKS = (torch.uint8, torch.bool, *FLOATS)
LIMIT = 2**31


def _emulated() -> set[torch.dtype]:
    """The half types in which convolutions on this CPU are computed in float32: float16, and bfloat16 on an x86
    processor that has no instructions for it, where oneDNN takes three times as long as in float32. Where torch cannot
    say, bfloat16 stays."""
    asked = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    fast = platform.machine() not in ("x86_64", "AMD64") or any(ask is None or ask() for ask in asked)
    return {torch.float16} if fast else {torch.float16, torch.bfloat16}


EMULATED = _emulated()


def convolution_dtype(dtype: torch.dtype, cpu: bool = True) -> torch.dtype:
    """What a convolution is computed in: float32 for what a CPU emulates, which is quicker and rounds once."""
    return torch.float32 if cpu and dtype in EMULATED else dtype


def error(op: str, argument: str, expected: object, got: object) -> ValueError:
    return ValueError(f"{op}: {argument} must be {expected}, got {got}")


def pair(op: str, name: str, value: Pair, least: int) -> tuple[int, int]:
    # What it nearly always is, in a fraction of the time.
    if type(value) is tuple and len(value) == 2:
        first, second = value
        if type(first) is int and type(second) is int and first >= least and second >= least:
            return value
    elif type(value) is int and value >= least:
        return value, value
    both = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(both) != 2 or not all(isinstance(v, int) for v in both) or min(both) < least:
        raise error(op, name, f"an int or two of at least {least}", value)
    return both[0], both[1]


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def autocast_dtype(device: str) -> torch.dtype | None:
    """The type that autocast casts to on a device type; None without autocast."""
    # The meta device has none to ask for.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocasts(x: Tensor) -> bool:
    """Whether autocast decides the dtype: it does for all but float64."""
    return autocast_dtype(x.device.type) is not None and x.dtype != torch.float64


def check_feature_map(op: str, name: str, x: Tensor, like: Tensor) -> None:
    if x.dim() != 4:
        raise error(op, name, "(N, C, H, W)", tuple(x.shape))
    if x.dtype not in FLOATS:
        raise error(op, name, "float32, float64, float16 or bfloat16", x.dtype)
    if (x.dtype != like.dtype and not (autocasts(x) and autocasts(like))) or x.device != like.device:
        raise error(op, name, f"{like.dtype} on {like.device}", f"{x.dtype} on {x.device}")
    if x.numel() >= LIMIT:
        raise error(op, name, "smaller than 2^31 elements", tuple(x.shape))


def check_mask(op: str, mask: Tensor, x: Tensor, name: str = "mask") -> None:
    n, c, h, w = x.shape
    if mask.dim() != 4 or mask.shape[2:] != x.shape[2:] or mask.size(0) not in (n, 1) or mask.size(1) not in (c, 1):
        raise error(op, name, f"({n}, 1, {h}, {w}) or ({n}, {c}, {h}, {w})", tuple(mask.shape))
    check_mask_type(op, mask, name)
    if mask.device != x.device:
        raise error(op, name, f"on {x.device} as x", mask.device)


def check_mask_type(op: str, mask: Tensor, name: str = "mask") -> None:
    if mask.dtype not in MASKS:
        raise error(op, name, "uint8, bool or float", mask.dtype)
