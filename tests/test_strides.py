# SPDX-License-Identifier: Apache-2.0
"""Every argument of every op may lie in memory as it likes: strided, expanded, or at an address of no alignment."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_close
from torch import Tensor

from fused_inpaint import ops

Form = Callable[[Tensor], Tensor]

SIZES: dict[str, tuple[int, ...]] = {
    "x": (2, 4, 6, 8),
    "y": (2, 4, 6, 8),
    "gate": (2, 4, 6, 8),
    "existing": (2, 1, 6, 8),
    "missing": (2, 3, 6, 8),
    "skip": (2, 3, 12, 16),
    "mask": (2, 1, 6, 8),
    "masks": (2, 4, 6, 8),
    "skip_mask": (2, 1, 12, 16),
    "weight": (6, 4, 3, 3),
    "up_weight": (6, 7, 3, 3),
    "filters": (2, 6, 4, 3, 3),
    "biases": (2, 6),
    "bias": (6,),
    "gain": (6,),
    "mean": (6,),
    "var": (6,),
    "region_gains": (2, 4),
    "region_shifts": (2, 4),
    "scale": (2, 1, 6, 8),
    "shift": (2, 1, 6, 8),
}
TRAINED = set(SIZES) - {"mask", "masks", "skip_mask", "mean", "var"}


def normed(training: bool) -> Callable[..., Any]:
    def call(**t: Tensor) -> Any:
        mean, var = t["mean"], t["var"]
        if training:  # what is written cannot be expanded
            mean, var = (s if s.stride(0) else s.clone() for s in (mean, var))
        norm = ops.BatchNorm(t["gain"], t["bias"], mean, var, training, 0.1, 1e-5)
        return *ops.partial_conv2d(t["x"], t["mask"], t["weight"], padding=1, batch_norm=norm), mean, var

    return call


def in_a_window(x: Tensor, mask: Tensor, weight: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Any:
    window = ops.partial_window(mask, 4, 3, padding=1)
    norm = ops.BatchNorm(gain, bias, mean, var, False, 0.1, 1e-5)
    return ops.partial_conv2d(x, None, weight, padding=1, window=window, batch_norm=norm)


def chain(mask: Tensor) -> Any:
    step = ops.WindowStep([0], [3], [1], [3, 3], [2, 2], [1, 1], [1, 1])
    (window,) = ops.partial_window_chain(mask, [step])
    return window.counts, window.mask


def partial(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return ops.partial_conv2d(x, mask, weight, bias, padding=1)


def region_input(existing: Tensor, missing: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return ops.region_conv2d((existing, missing), mask, weight, bias, padding=1, select="input")


def region_norm(x: Tensor, mask: Tensor, region_gains: Tensor, region_shifts: Tensor) -> Any:
    return ops.region_norm(x, mask, region_gains, region_shifts)


# By the names of their arguments, whose sizes are above.
OPS: dict[str, tuple[Callable[..., Any], str]] = {
    "partial_conv2d": (partial, "x mask weight bias"),
    "channel_masks": (lambda masks, **t: partial(mask=masks, **t), "x masks weight bias"),
    "batch_statistics": (normed(True), "x mask weight gain bias mean var"),
    "fixed_statistics": (normed(False), "x mask weight gain bias mean var"),
    "window": (in_a_window, "x mask weight gain bias mean var"),
    "chain": (chain, "mask"),
    "partial_upconv2d": (
        lambda up_weight, **t: ops.partial_upconv2d(weight=up_weight, **t),
        "x mask skip skip_mask up_weight bias",
    ),
    "region_output": (
        lambda x, mask, filters, biases: ops.region_conv2d(x, mask, filters, biases, padding=1, activation="elu"),
        "x mask filters biases",
    ),
    "region_input": (region_input, "existing missing mask weight bias"),
    "region_norm": (region_norm, "x mask region_gains region_shifts"),
    "learned_region_norm": (lambda **t: ops.region_norm(**t), "x mask scale shift"),
    "channel_pool": (lambda x: ops.channel_pool(x), "x"),
    "pyramid_conv2d": (lambda x, weight, bias: ops.pyramid_conv2d(x, weight, bias, (1, 2)), "x weight bias"),
    "gated_blend": (lambda x, y, gate: ops.gated_blend(x, y, gate), "x y gate"),
    "gram_channels": (lambda x, y: ops.gram_l1(x, y), "x y"),
    "gram_positions": (lambda x, y: ops.gram_l1(x, y, over="positions"), "x y"),
    "tap_conv2d": (lambda x, weight, bias: ops.tap_conv2d(x, weight, bias, upsampling="bilinear"), "x weight bias"),
}


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, 3)], -1)[..., 0]


def offset(t: Tensor) -> Tensor:
    return torch.cat([t.new_full((1,), 3), t.flatten()])[1:].view(t.shape)


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t


def drawn(name: str, device: torch.device) -> Tensor:
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    t = torch.randn(SIZES[name], generator=g).to(device)
    if name in ("gain", "var"):
        return t.abs() + 0.5
    return (t > 0).float() if "mask" in name else t


def results(f: Callable[..., Any], given: dict[str, Tensor], forms: dict[str, Form]) -> list[Tensor]:
    """Outputs, and the gradients of what is given, which is handed on in these forms."""
    leaves = {name: t.clone().requires_grad_(name in TRAINED) for name, t in given.items()}
    outputs = f(**{name: forms[name](t) if name in forms else t for name, t in leaves.items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = [y.detach() for y in outputs]
    trained = [t for t in leaves.values() if t.requires_grad]
    if trained and torch.is_grad_enabled():
        weights = torch.linspace(-1, 1, found[0].numel(), device=found[0].device).view_as(found[0])
        found += torch.autograd.grad((outputs[0] * weights).sum(), trained)
    return found


CPU_ONLY = pytest.param("tap_conv2d", marks=pytest.mark.cpu_only)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("form", [strided, offset, expanded, transposed])
@pytest.mark.parametrize("name", [*(name for name in OPS if name != "tap_conv2d"), CPU_ONLY])
def test_each_argument(backend: str, device: torch.device, name: str, form: Form, grad: bool) -> None:
    """As the same values, which lie as torch would allocate them."""

    def whole(t: Tensor) -> Tensor:
        return form(t).clone(memory_format=torch.contiguous_format)

    f, names = OPS[name]
    given = {key: drawn(key, device) for key in names.split()}
    for moved in (*([key] for key in given), list(given)):
        with torch.set_grad_enabled(grad):
            actual, expected = (results(f, given, dict.fromkeys(moved, place)) for place in (form, whole))
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, 1e-5, what=f"{name}, {moved} {form.__name__}")
