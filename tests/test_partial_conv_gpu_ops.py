# SPDX-License-Identifier: Apache-2.0
"""The operators that need no other around them: partial_conv2d_direct, a whole thin layer in one launch,
partial_conv2d_masked, any layer from its masks on, and partial_window_chain, the masks of a whole network. Called as
operators, against the reference."""

from typing import Any

import pytest
import torch
from cases import CASES, PRECISIONS, Case, assert_close, named, sample
from torch import Tensor

from fused_inpaint import _backends
from fused_inpaint.ops.partial_conv import reference
from fused_inpaint.ops.partial_conv.types import WindowStep

ops = torch.ops.fused_inpaint
MISSING = _backends.status()
MASK_TYPES = [torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def devices(*backends: str) -> pytest.MarkDecorator:
    """Where the kernels of these backends run, if they are in the loaded library."""
    values = [
        pytest.param(
            _backends.DEVICE[name],
            id=name,
            marks=pytest.mark.skipif(bool(MISSING[name]), reason=MISSING[name] or "there"),
        )
        for name in backends
    ]
    return pytest.mark.parametrize("device", values)


direct = devices("cuda")
everywhere = devices("cpu", "cuda")


@pytest.fixture(autouse=True)
def _poisoned(poisoned: None, one_thread: None) -> None:
    """An output that is not written shows."""


def window_of(masks: list[Tensor], case: Case) -> tuple[Tensor, Tensor]:
    geometry = (case.kernel, case.stride, case.padding, case.dilation)
    return reference.partial_window(masks, case.channels, case.upsample, *geometry)


def run_direct(
    case: Case,
    x: list[Tensor],
    masks: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    **changes: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = {
        "upsample": case.upsample,
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": 1,
        "activation": case.activation,
        "slope": 0.2,
    }
    with torch.no_grad():
        found: tuple[Tensor, Tensor, Tensor] = ops.partial_conv2d_direct(
            x, masks, weight, bias, scale, **{**arguments, **changes}
        )
    return found


def check_direct(
    case: Case, device: str, dtype: torch.dtype, rtol: float, mask_types: list[torch.dtype], scaled: bool = True
) -> None:
    s = sample(case, dtype, device)
    assert s.masks is not None
    bias = None if s.bias is None else s.bias.detach().float()
    scale = torch.linspace(-1, 2, case.outputs, device=device) if scaled else None
    masks = [m.to(kind) for m, kind in zip(s.masks, mask_types, strict=False)]
    found = run_direct(case, s.x, masks, s.weight, bias, scale)
    y, count, mask = found

    expected_count, valid = window_of([m.cpu() for m in s.masks], case)
    assert torch.equal(count.cpu(), expected_count)
    assert mask.dtype == mask_types[0]
    assert torch.equal(mask.cpu(), valid.to(mask_types[0]))

    def exact(t: Tensor | None) -> Any:
        return None if t is None else t.detach().cpu().double()

    expected = reference.partial_conv2d(
        [exact(t) for t in s.x],
        [m.cpu() for m in s.masks],
        expected_count,
        exact(s.weight),
        exact(bias),
        exact(scale),
        case.upsample,
        case.stride,
        case.padding,
        case.dilation,
        1,
        [0] * len(s.x),
        case.activation,
        0.2,
    )
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, expected, rtol, what="y")
    empty = (expected_count == 0).expand_as(y).to(y.device)
    assert torch.equal(y[empty], torch.zeros_like(y[empty]))
    for value, again in zip(found, run_direct(case, s.x, masks, s.weight, bias, scale), strict=True):
        assert torch.equal(value, again)


def takes(case: Case) -> bool:
    fits = case.groups == 1 and case.norm is None and len(case.channels) <= 2 and max(case.stride) <= 2
    return fits and "none" not in case.masks and case.fold is not True


DIRECT = [
    *(case for case in CASES if takes(case)),
    *(Case(f"outputs{n}", outputs=n, size=(19, 35), activation="relu") for n in (1, 3, 4, 5, 33, 64)),
    *(Case(f"channels{n}", (n,), size=(9, 20), outputs=3) for n in (1, 2, 8, 20)),
    Case("first_layer", size=(37, 50), kernel=(7, 7), stride=(2, 2), padding=(3, 3), outputs=64, masks=("box",)),
    Case("last_layer", (16, 3), (24, 36), (2, 1), outputs=3, masks=("random", "box")),
    Case("stride1_2", (2,), size=(12, 33), stride=(1, 2), outputs=8),
    Case("stride2_1", (2,), size=(12, 33), stride=(2, 1), outputs=8),
    Case("stride2_dilation2", size=(21, 23), stride=(2, 2), dilation=(2, 2), padding=(2, 2), outputs=8, planes="nc"),
    Case("widest_span", (18,), (31, 40), kernel=(7, 6), stride=(2, 2), dilation=(2, 3), padding=(6, 8), outputs=33),
    Case("far_taps", (5,), (20, 21), kernel=(2, 2), dilation=(15, 15), padding=(7, 8), outputs=1, masks=("pixel",)),
    Case("padding_beyond_a_tile", size=(4, 4), kernel=(1, 1), padding=(20, 40)),
]


@direct
@pytest.mark.parametrize("dtype, rtol, _, __", PRECISIONS[1:])
@pytest.mark.parametrize("case", DIRECT, ids=lambda case: case.name)
def test_direct(case: Case, dtype: torch.dtype, rtol: float, _: float, __: float, device: str) -> None:
    """Output, counts and mask, with NaN and infinities under all holes; the same bits twice."""
    check_direct(case, device, dtype, rtol, [torch.uint8] * 2)


@direct
@pytest.mark.parametrize("kind", MASK_TYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "shared_channel_masks", "two_sources"])
def test_direct_mask_types(name: str, kind: torch.dtype, device: str) -> None:
    check_direct(named(name), device, torch.float32, 1e-5, [kind, torch.bool], scaled=False)


@direct
@pytest.mark.parametrize("kind", MASK_TYPES[2:], ids=str)
def test_direct_negative_zero_is_a_hole(kind: torch.dtype, device: str) -> None:
    x, weight = torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1, 1)
    mask = torch.tensor([-0.0, 1.0, 0.0], dtype=kind).view(1, 1, 1, 3)
    case = Case("", kernel=(1, 1), padding=(0, 0))
    y, count, new = run_direct(case, [x.to(device)], [mask.to(device)], weight.to(device), None, None)
    assert y.flatten().tolist() == count.flatten().tolist() == new.flatten().tolist() == [0, 1, 0]


@direct
@pytest.mark.parametrize("channels", [1, 20], ids=["weights_staged_once", "weights_staged_again"])
def test_direct_more_tiles_than_blocks(channels: int, device: str) -> None:
    check_direct(
        Case("tall", (channels,), (16800, 16), outputs=25, batch=1), device, torch.float32, 1e-5, [torch.uint8]
    )


@direct
@pytest.mark.parametrize("layout", ["contiguous", "unaligned", "strided"])
def test_direct_layouts(layout: str, device: str) -> None:
    """Layouts and addresses change nothing, not even a bit."""
    case = Case("layouts", (8,), outputs=8)
    s = sample(case, device=device)
    assert s.masks is not None

    def dense(t: Tensor) -> Tensor:
        return t.detach().contiguous(memory_format=torch.channels_last)

    def changed(t: Tensor) -> Tensor:
        t = dense(t)
        if layout == "contiguous":
            return t.contiguous()
        if layout == "strided":
            return torch.stack([t, t], -1)[..., 0]
        flat = torch.empty(t.numel() + 1, device=device)[1:]
        return flat.as_strided(t.shape, t.stride(), flat.storage_offset()).copy_(t)

    expected = run_direct(case, [dense(s.x[0])], s.masks, dense(s.weight), None, None)
    actual = run_direct(case, [changed(s.x[0])], s.masks, changed(s.weight), None, None)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


BAD_DIRECT = {
    "groups must be 1, got 2": {"groups": 2},
    "stride must be 1 or 2, got 3": {"stride": [1, 3]},
    "kernel must be at most 7 a side and span 16, got 3 dilated by 8": {"dilation": [8, 1]},
    "the kernel must fit into its input": {"padding": [-1, 1]},
    "sources, masks and upsample must be of one length, 1 or 2": {"upsample": [1, 1]},
    "sources must be (N, C, H, W) of one dtype, upsampled by 1 or 2": {"upsample": [3]},
    "stride, padding and dilation must be two numbers each": {"dilation": [1]},
    "activation must be none, relu or leaky_relu, got tanh": {"activation": "tanh"},
    "dtype must be float32, float16 or bfloat16, got Double": {"dtype": torch.float64},
    "masks must be uint8, bool or float, got Int": {"mask": torch.int32},
    "bias must be contiguous float32 with 4 values": {"bias": 3},
    "weight must have the sources' dtype and 3 channels": {"channels": 2},
}


@direct
@pytest.mark.parametrize("sentence", BAD_DIRECT)
def test_direct_refuses(sentence: str, device: str) -> None:
    changes: dict[str, Any] = dict(BAD_DIRECT[sentence])
    dtype = changes.pop("dtype", torch.float32)
    mask = torch.ones(1, 1, 5, 5, device=device, dtype=changes.pop("mask", torch.uint8))
    bias = torch.zeros(changes.pop("bias", 4), device=device)
    weight = torch.ones(4, changes.pop("channels", 3), 3, 3, device=device, dtype=dtype)
    with pytest.raises(RuntimeError) as refusal:
        run_direct(
            Case(""), [torch.ones(1, 3, 5, 5, device=device, dtype=dtype)], [mask], weight, bias, None, **changes
        )
    first = str(refusal.value).splitlines()[0]
    assert sentence in first and "partial_conv2d" in first


def run_masked(x: list[Tensor], masks: list[Tensor], weight: Tensor, upsample: list[int], stride: int) -> Any:
    """(y, planes, counts, new mask) of a layer padded by 1."""
    geometry = (upsample, [stride] * 2, [1, 1], [1, 1], 1, [0] * len(x))
    return ops.partial_conv2d_masked(x, masks, weight, None, None, *geometry, "none", 0.0, 4096, None)


@everywhere
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3, 5, 7])
@pytest.mark.parametrize("kind", MASK_TYPES, ids=str)
def test_masked_mask_types(kind: torch.dtype, kernel: int, stride: int, batch: int, device: str) -> None:
    """The new mask in the type of the first, whatever that of the second, and -0.0 a hole."""
    x = [torch.rand(batch, c, 12, 40, device=device) for c in (3, 5)]
    weight = torch.rand(4, 8, kernel, kernel, device=device)
    valid = [(torch.rand(b, c, 12, 40) < 0.1).double() for b, c in ((batch, 1), (1, 5))]
    masks = [torch.where(v > 0, v, -0.0).to(k).to(device) for v, k in zip(valid, (kind, torch.bfloat16), strict=True)]
    y, planes, counts, mask = run_masked(x, masks, weight, [1, 1], stride)
    expected = [v.to(torch.uint8) for v in valid]
    window = reference.partial_window(expected, [3, 5], [1, 1], [kernel] * 2, [stride] * 2, [1, 1], [1, 1])
    assert all(p.dtype == torch.uint8 and torch.equal(p.cpu(), e) for p, e in zip(planes, expected, strict=True))
    assert torch.equal(counts.cpu(), window[0]) and torch.equal(mask.cpu(), window[1].to(kind)) and mask.dtype == kind
    wide = [t.cpu().double() for t in (*x, weight)]
    geometry = ([1, 1], [stride] * 2, [1, 1], [1, 1], 1, [0, 0], "none", 0.0)
    right = reference.partial_conv2d(wide[:2], expected, window[0], wide[2], None, None, *geometry)
    assert_close(y, right, 1e-5)


@everywhere
def test_masked_layouts_and_upsampling(device: str) -> None:
    """Masks that are slices of larger ones, one of them at half the size."""
    valid = [(torch.rand(2, 1, h, 2 * w) < 0.3)[..., ::2] for h, w in ((4, 5), (8, 10))]
    x = [torch.rand(2, c, *v.shape[2:], device=device) for c, v in zip((2, 1), valid, strict=True)]
    _, planes, counts, mask = run_masked(x, [v.to(device) for v in valid], torch.rand(4, 3, 3, 3).to(device), [2, 1], 1)
    expected = [v.to(torch.uint8) for v in valid]
    window = reference.partial_window(expected, [2, 1], [2, 1], [3, 3], [1, 1], [1, 1], [1, 1])
    assert all(torch.equal(p.cpu(), e) for p, e in zip(planes, expected, strict=True))
    assert torch.equal(counts.cpu(), window[0]) and mask.dtype == torch.bool
    assert torch.equal(mask.cpu(), window[1].bool())


@everywhere
def test_masked_refuses(device: str) -> None:
    with pytest.raises(RuntimeError, match="partial_conv2d: sources and masks must be of one length, at least 1"):
        run_masked([], [], torch.ones(1, 1, 3, 3, device=device), [], 1)
    x, mask = torch.ones(1, 1, 4, 4, device=device), torch.ones(1, 1, 4, 4, dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="partial_conv2d: mask"):
        run_masked([x], [mask], torch.ones(1, 1, 3, 3, device=device), [1], 1)


@devices("cuda")
def test_masked_counts_whatever_is_not_zero(device: str) -> None:
    """A GPU's masks are not looked at for other values than 0 and 1."""
    mask = torch.tensor([0, 1, 2, 255], dtype=torch.uint8, device=device).view(1, 1, 1, 4)
    _, planes, counts, new = run_masked([torch.ones(1, 1, 1, 4).to(device)], [mask], torch.ones(1, 1, 3, 3), [1], 1)
    assert planes[0].flatten().tolist() == [0, 1, 1, 1] and counts.flatten().tolist() == [1, 2, 3, 2]
    assert new.flatten().tolist() == [1, 1, 1, 1]


def step(inputs: list[int], kernel: int, stride: int = 1, channels: int = 4, up: tuple[int, ...] = ()) -> WindowStep:
    return WindowStep(
        inputs,
        [channels] * len(inputs),
        list(up or [1] * len(inputs)),
        [kernel, kernel],
        [stride, stride],
        [kernel // 2, kernel // 2],
        [1, 1],
    )


def unet(levels: int, masks: int) -> list[WindowStep]:
    """Down by 2 at each level and up again, each step up with the mask of the same size."""
    steps = [step([0], 7, 2), *(step([masks + i], 3, 2) for i in range(levels - 1))]
    for i in range(levels):
        skip = 0 if i == levels - 1 else masks + levels - 2 - i
        steps.append(step([masks + levels + i - 1, skip], 3, up=(2, 1)))
    return steps


CHAINS = {
    # name: (sizes of the given masks, steps)
    "unet": ([(2, 1, 128, 128)], unet(7, 1)),  # steps of several blocks, then a run of one-block ones, then back
    "unet_shared": ([(1, 1, 64, 64)], unet(6, 1)),
    "channel_mask": ([(2, 4, 64, 64)], unet(4, 1)),
    "mixed_batches": ([(1, 1, 16, 16), (3, 1, 16, 16)], [step([0], 3), step([1], 3), step([2, 3], 5), step([2], 3, 2)]),
    "long_run": ([(2, 1, 9, 11)], [step([i], 3, channels=1 + i) for i in range(40)]),
    "eight_sources": ([(1, 1, 6, 7)] * 8, [step(list(range(8)), 3), step([8, 0], 3)]),
    "unequal": (
        [(2, 1, 20, 33)],
        [
            WindowStep([0], [3], [1], [2, 5], [1, 2], [0, 3], [3, 1]),
            WindowStep([1], [1], [1], [1, 1], [3, 2], [0, 0], [1, 1]),
        ],
    ),
    "tall": (  # the CPU takes rows in bands: which windows reach past, and which lie in the padding or miss rows
        [(2, 1, 150, 70), (2, 6, 75, 35)],
        [
            WindowStep([0, 1], [3, 6], [1, 2], [3, 4], [3, 2], [2, 1], [25, 2]),
            WindowStep([0], [2], [1], [3, 3], [1, 3], [80, 40], [1, 1]),
            WindowStep([1], [6], [2], [90, 3], [1, 1], [45, 0], [1, 1]),
            WindowStep([0], [1], [1], [1, 1], [70, 35], [0, 0], [1, 1]),
        ],
    ),
    "one_pixel": ([(1, 1, 1, 1)], [step([0], 3), step([1], 1)]),
    "no_sample": ([(0, 1, 8, 8)], [step([0], 3), step([1], 3)]),
    "no_step": ([(1, 1, 8, 8)], []),
}


@everywhere
@pytest.mark.parametrize("share", [0.0, 0.04, 0.5, 1.0])
@pytest.mark.parametrize("name", CHAINS)
def test_chain(name: str, share: float, device: str) -> None:
    """Counts and masks of every step are those of its own partial_window, whatever share of the pixels is valid."""
    sizes, steps = CHAINS[name]
    known = [(torch.rand(size) < share).to(torch.uint8) for size in sizes]
    flat = [value for s in steps for value in s.flat()]
    counts, masks = ops.partial_window_chain([m.to(device) for m in known], flat)
    assert len(counts) == len(masks) == len(steps)
    for s, count, mask in zip(steps, counts, masks, strict=True):
        expected = reference.partial_window([known[i] for i in s.inputs], *s[1:])
        assert torch.equal(count.cpu(), expected[0]) and torch.equal(mask.cpu(), expected[1])
        known.append(expected[1])


BAD_CHAINS = {
    # name: (steps, sentence); two masks, 8 x 8 and 4 x 4
    "truncated": (step([0], 3).flat()[:-1], "steps must be whole, but end within step 0"),
    "truncated_later": ([*step([0], 3).flat(), 1, 2], "steps must be whole, but end within step 1"),
    "no_source": ([0], "a step must have at least 1 source, got 0"),
    "unknown_mask": (step([2], 3).flat(), "step 0 must name a mask below 2, got 2"),
    "negative_mask": (step([-1], 3).flat(), "step 0 must name a mask below 2, got -1"),
    "own_mask": ([*step([0], 3).flat(), *step([3], 3).flat()], "step 1 must name a mask below 3, got 3"),
    "zero_stride": (step([0], 3, 0).flat(), "kernel, stride and dilation must be two numbers of at least 1"),
    "huge_stride": (step([0], 3, 2**40).flat(), "kernel, stride and dilation must be two numbers of at least 1"),
    "sizes": (step([0, 1], 3).flat(), "masks must be of one batch, and of one size after upsampling by 1 or 2"),
    "upsample": (step([0], 3, up=(3,)).flat(), "masks must be of one batch, and of one size after upsampling"),
    "channels": (step([0], 3, channels=0).flat(), "a mask for 0 channels must have 1 or as many, got 1"),
    "kernel": (
        WindowStep([0], [1], [1], [9, 1], [1, 1], [0, 0], [1, 1]).flat(),
        "masks must be at least as large as the kernel",
    ),
}


@everywhere
@pytest.mark.parametrize("name", BAD_CHAINS)
def test_chain_refuses(name: str, device: str) -> None:
    steps, sentence = BAD_CHAINS[name]
    masks = [torch.ones(1, 1, size, size, dtype=torch.uint8, device=device) for size in (8, 4)]
    with pytest.raises(RuntimeError) as refusal:
        ops.partial_window_chain(masks, steps)
    assert f"partial_window_chain: {sentence}" in str(refusal.value).splitlines()[0]


@everywhere
def test_chain_refuses_other_masks(device: str) -> None:
    strided = torch.ones(1, 1, 8, 16, dtype=torch.uint8)[..., ::2]
    for mask, sentence in ((torch.ones(1, 1, 8, 8), "masks must be uint8"), (strided, "masks must be contiguous")):
        with pytest.raises(RuntimeError, match=f"partial_window_chain: {sentence}"):
            ops.partial_window_chain([mask.to(device)], step([0], 3).flat())
