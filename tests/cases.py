# SPDX-License-Identifier: Apache-2.0
"""Samples of the partial convolution that all test files share, and the comparison of results."""

import dataclasses
import zlib
from typing import Any

import pytest
import torch
from hypothesis import currently_in_test_context, reject
from torch import Tensor

from fused_inpaint import _backends, ops, use_backend
from fused_inpaint.ops.partial_conv import routes

Pair = tuple[int, int]

# A relative error is meant in units of the largest magnitude of the array that is compared.
# One rounding of a half type is half its eps, so two are eps.
PRECISIONS = [
    # (dtype, rtol, rtol after the fold of the upsample, atol)
    pytest.param(torch.float64, 1e-12, 1e-12, 0.0, id="float64"),
    pytest.param(torch.float32, 1e-5, 5e-5, 0.0, id="float32"),
    pytest.param(torch.bfloat16, 2**-7, 2**-7, 0.0, id="bfloat16"),
    pytest.param(torch.float16, 2**-10, 2**-10, 0.0, id="float16"),
]


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    channels: tuple[int, ...] = (3,)  # of each source
    size: Pair = (9, 11)  # after upsampling
    upsample: tuple[int, ...] = (1,)
    outputs: int = 4
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    batch: int = 2
    masks: tuple[str, ...] = ("random",)  # none (no mask), or ones, zeros, pixel, box, random for each source
    planes: str = "n1"  # batch (n or 1) and channels (1 or c) of the masks
    bias: bool = True
    activation: str = "none"
    norm: str | None = None  # train, eval, or frozen: eval with constant parameters
    fold: bool | None = None
    multi_channel: bool = False


UP = Case("up", (4, 3), (8, 10), (2, 1), masks=("random", "box"))
CASES = [
    Case("plain"),
    Case("no_bias", bias=False),
    Case("relu", activation="relu"),
    Case("leaky_relu", activation="leaky_relu", masks=("box",)),
    Case("one_pixel_map", size=(1, 1), masks=("ones",)),
    Case("one_pixel_hole", size=(1, 1), masks=("zeros",)),
    Case("empty_batch", batch=0),
    Case("empty_batch_shared_mask", batch=0, planes="11"),
    Case("one_wide", size=(1, 13), kernel=(1, 3), padding=(0, 1)),
    Case("all_hole", masks=("zeros",)),
    Case("all_valid", masks=("ones",)),
    Case("no_mask", masks=("none",)),
    Case("one_valid_pixel", masks=("pixel",)),
    Case("shared_mask", planes="11", batch=3),
    Case("channel_masks", planes="nc"),
    Case("shared_channel_masks", planes="1c", activation="relu"),
    Case("multi_channel", planes="nc", multi_channel=True),
    Case("kernel1", kernel=(1, 1), padding=(0, 0)),
    Case("kernel2", kernel=(2, 2), padding=(1, 0), masks=("box",)),
    Case("unpadded", padding=(0, 0), masks=("box",)),
    Case("overpadded", kernel=(2, 3), padding=(3, 4)),
    Case("kernel7_stride2", size=(16, 15), kernel=(7, 7), stride=(2, 2), padding=(3, 3), masks=("box",)),
    Case("two_channels_stride2", (2,), (9, 12), kernel=(4, 3), stride=(2, 2), padding=(1, 2), outputs=5, planes="nc"),
    Case("stride_beyond_kernel", kernel=(2, 2), stride=(3, 4), padding=(0, 1)),
    Case("anisotropic", size=(13, 16), kernel=(3, 5), stride=(2, 1), padding=(0, 3), dilation=(3, 2)),
    Case("dilated", dilation=(2, 2), padding=(2, 2), masks=("box",)),
    Case("groups", (4,), groups=2, outputs=6),
    Case("groups_channel_masks", (4,), groups=2, outputs=6, planes="nc", multi_channel=True),
    Case("depthwise", (4,), groups=4, outputs=4, activation="relu"),
    Case("wide", (40,), size=(6, 7), outputs=33, masks=("box",), activation="leaky_relu"),
    Case("train", norm="train", bias=False),
    Case("train_relu", norm="train", bias=False, activation="relu", masks=("box",)),
    Case("train_all_hole", norm="train", bias=False, masks=("zeros",)),
    Case("train_wide", (24,), size=(18, 22), outputs=24, norm="train", bias=False, activation="leaky_relu"),
    Case("train_empty_batch", batch=0, norm="train", bias=False),
    Case("eval", norm="eval", bias=False),
    Case("eval_relu", norm="eval", bias=False, activation="relu", masks=("box",)),
    Case("frozen", norm="frozen", bias=False, activation="leaky_relu"),
    Case("two_sources", (3, 2), upsample=(1, 1), masks=("random", "box"), activation="relu"),
    Case("three_sources", (3, 2, 4), upsample=(1, 1, 1), masks=("box", "ones", "random"), stride=(2, 1)),
    Case("two_sources_channel_masks", (3, 2), upsample=(1, 1), masks=("random", "random"), planes="nc"),
    Case("two_sources_train", (3, 2), upsample=(1, 1), masks=("random", "box"), norm="train", bias=False),
    *(
        dataclasses.replace(case, name=f"{case.name}_{'folded' if fold else 'direct'}", fold=fold)
        for fold in (True, False)
        for case in (
            UP,
            dataclasses.replace(UP, name="up_leaky_relu", activation="leaky_relu", planes="11"),
            dataclasses.replace(UP, name="up_channel_masks", planes="nc", multi_channel=True, bias=False),
            dataclasses.replace(UP, name="up_kernel1", kernel=(1, 1), padding=(0, 0)),
            dataclasses.replace(UP, name="up_kernel5", kernel=(5, 5), padding=(2, 2)),
            dataclasses.replace(UP, name="up_kernel7", kernel=(7, 7), padding=(3, 3), masks=("pixel", "zeros")),
            dataclasses.replace(UP, name="up_one_pixel", size=(2, 2)),
            dataclasses.replace(UP, name="up_image", channels=(9, 3), outputs=3, masks=("box", "random")),
            dataclasses.replace(UP, name="up_empty_batch", batch=0),
            dataclasses.replace(UP, name="up_train", norm="train", bias=False, activation="leaky_relu"),
            dataclasses.replace(UP, name="up_kernel5_train", kernel=(5, 5), padding=(2, 2), norm="train", bias=False),
            dataclasses.replace(UP, name="up_eval", norm="eval", bias=False, activation="leaky_relu"),
            dataclasses.replace(UP, name="up_alone", channels=(5,), upsample=(2,), masks=("random",)),
            dataclasses.replace(UP, name="up_both", upsample=(2, 2), activation="relu"),
            dataclasses.replace(
                UP, name="up_alone_train", channels=(5,), upsample=(2,), masks=("box",), norm="train", bias=False
            ),
            dataclasses.replace(
                UP, name="up_of_three", channels=(2, 4, 3), upsample=(1, 2, 2), masks=("box", "random", "ones")
            ),
        )
    ),
]
ALL = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

# The reference is plain PyTorch; the other backends are operators of torch.ops.
KERNELS = [name for name, reason in _backends.status().items() if not reason and name != "reference"]
if "cuda" in KERNELS:  # by its table of routes, and with the vendor's convolution alone
    KERNELS.append("cuda_vendor")
OPERATORS = pytest.mark.parametrize("backend", KERNELS, indirect=True)


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@dataclasses.dataclass
class Sample:
    """The arguments of one call of partial_conv2d."""

    case: Case
    x: list[Tensor]  # (N, C_i, H_i, W_i)
    masks: list[Tensor] | None  # (N or 1, 1 or C_i, H_i, W_i), uint8
    weight: Tensor  # (O, sum C_i / groups, kh, kw)
    bias: Tensor | None  # (O,)
    norm: ops.BatchNorm | None

    def __call__(self, **changes: Any) -> tuple[Tensor, Tensor]:
        c = self.case
        single = len(self.x) == 1
        options: dict[str, Any] = {
            "stride": c.stride,
            "padding": c.padding,
            "dilation": c.dilation,
            "groups": c.groups,
            "multi_channel": c.multi_channel,
            "upsample": c.upsample[0] if single else c.upsample,
            "activation": c.activation,
            "batch_norm": self.norm,
            "fold": c.fold,
        }
        x = self.x[0] if single else self.x
        masks = self.masks[0] if single and self.masks is not None else self.masks
        return ops.partial_conv2d(x, masks, self.weight, self.bias, **{**options, **changes})

    def to(self, dtype: torch.dtype, device: torch.device | str) -> "Sample":
        """A copy on new leaves."""

        def leaf(t: Tensor | None) -> Any:
            return None if t is None else t.detach().to(device, dtype, copy=True).requires_grad_()

        norm = self.norm
        if norm is not None:
            # As under autocast and in a half-precision network, the norm's own numbers stay float32.
            wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
            copies = [t.detach().to(device, wide, copy=True) for t in norm[:4]]
            if self.case.norm != "frozen":
                copies[0].requires_grad_(), copies[1].requires_grad_()
            norm = ops.BatchNorm(*copies, *norm[4:])
        masks = None if self.masks is None else [m.to(device) for m in self.masks]
        return Sample(self.case, [leaf(s) for s in self.x], masks, leaf(self.weight), leaf(self.bias), norm)

    def leaves(self) -> dict[str, Tensor]:
        """Everything that takes a gradient, by name."""
        named = {f"x{i}": s for i, s in enumerate(self.x)} | {"weight": self.weight}
        if self.bias is not None:
            named["bias"] = self.bias
        if self.norm is not None and self.case.norm != "frozen":
            named |= {"norm_weight": self.norm.weight, "norm_bias": self.norm.bias}
        return named


def mask_of(kind: str, size: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    mask = torch.ones(size, dtype=torch.uint8)
    h, w = size[2:]
    if kind == "random":
        mask = (torch.rand(size, generator=generator) > 0.6).to(torch.uint8)
    elif kind == "box":
        mask[:, :, h // 4 : h - 1, w // 5 : w - 2] = 0
    elif kind in ("zeros", "pixel"):
        mask.zero_()
        mask[:, :, h // 2, w // 3] = kind == "pixel"
    return mask


def leave_out_refused(sources: int) -> None:
    """Skips the test, or hypothesis's example, if the selected backend does not take so many sources."""
    call = routes.Call("cuda", torch.float32, sources, 1, 1, [1, 1], [1, 1], [1, 1], 1, 1, False, False, False)
    if reason := routes.refusal(_backends._selected, call):
        reject() if currently_in_test_context() else pytest.skip(reason)


def sample(
    case: Case, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", nan: bool = True
) -> Sample:
    """The arguments of a case, the same on every call. Holes hold NaN and infinities, or numbers with nan=False."""
    leave_out_refused(len(case.channels))
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    x, masks = [], []
    for c, up, kind in zip(case.channels, case.upsample, case.masks, strict=True):
        h, w = case.size[0] // up, case.size[1] // up
        s = torch.randn(case.batch, c, h, w, generator=g)
        planes = (case.batch if case.planes[0] == "n" else 1, c if case.planes[1] == "c" else 1)
        m = mask_of(kind, (*planes, h, w), g)
        bad = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(3, s.shape, generator=g)]
        x.append(torch.where(m == 1, s, bad) if nan else s)
        masks.append(m)
    o, c_in = case.outputs, sum(case.channels)
    weight = torch.randn(o, c_in // case.groups, *case.kernel, generator=g) / c_in**0.5
    bias = torch.randn(o, generator=g) if case.bias else None
    norm = None
    if case.norm is not None:
        gain, shift, mean = (torch.randn(o, generator=g) for _ in range(3))
        norm = ops.BatchNorm(gain, shift, mean, torch.rand(o, generator=g) + 0.5, case.norm == "train", 0.1, 1e-5)
    return Sample(case, x, None if case.masks == ("none",) else masks, weight, bias, norm).to(dtype, device)


def cotangent(s: Sample) -> Tensor:
    """A gradient for the sample's output, in float64 on the CPU: NaN where the window is empty, for nothing may come of
    it, and 0 where the activation's input is within rounding of its kink."""
    g = torch.Generator().manual_seed(1)
    with use_backend("reference"), torch.no_grad():
        y, mask = s.to(torch.float64, "cpu")(activation="none", multi_channel=False)
    grad = torch.randn(y.shape, generator=g, dtype=torch.float64)
    if s.case.activation != "none" and y.numel():
        grad[y.abs() < 2**-5 * y.abs().max()] = 0
    # Rounded to bfloat16, so that every dtype gets the same values.
    return torch.where(mask.bool(), grad.bfloat16().double(), torch.nan)


def results(s: Sample, grad: Tensor, **changes: Any) -> dict[str, Tensor]:
    """Output, mask, running statistics and all gradients of one call."""
    y, mask = s(**changes)
    y.backward(grad.to(y.device, y.dtype))
    out = {"y": y.detach(), "mask": mask} | {f"grad_{name}": leaf.grad for name, leaf in s.leaves().items()}
    if s.norm is not None:
        out |= {"running_mean": s.norm.running_mean, "running_var": s.norm.running_var}
    return out


def truth(s: Sample, grad: Tensor) -> dict[str, Tensor]:
    """The float64 reference on the sample's own (rounded) values."""
    with use_backend("reference"):
        return results(s.to(torch.float64, "cpu"), grad)


def assert_close(actual: Tensor, expected: Tensor, rtol: float, atol: float = 0.0, what: str = "value") -> None:
    """|actual - expected| <= rtol * max |expected| + atol, everywhere; nothing but 0 is close to all zeros."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return
    expected = expected.double().cpu()
    error = (actual.double().cpu() - expected).abs().nan_to_num(nan=torch.inf)
    limit = rtol * expected.abs().max().item() + atol
    worst = int(error.argmax())
    assert error.flatten()[worst] <= limit, (
        f"{what}: {actual.flatten()[worst].item()!r} where {expected.flatten()[worst].item()!r} is expected, "
        f"differs by {error.max().item():.3g}, allowed {limit:.3g} (flat index {worst} of shape {tuple(actual.shape)})"
    )


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), (
            f"{name}: differs by {(value - expected[name]).abs().max().item():.3g}"
        )
