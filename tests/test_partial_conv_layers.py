# SPDX-License-Identifier: Apache-2.0
"""PartialConv2d and PartialUpConv2d: the recorded outputs of the published layers, and the habits of nn.Conv2d."""

import copy
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import vectors
from cases import assert_close
from test_partial_conv import skip_unsupported
from torch import Tensor, nn

import fused_inpaint
from fused_inpaint import PartialConv2d, PartialUpConv2d, _backends, ops, use_backend
from fused_inpaint.ops.partial_conv import packing, routes

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
SMALL = Path(__file__).with_name("data") / "nvidia_partialconv2d.npz"


def small_cases() -> list:
    """A few of the recorded cases travel with the suite, with all of their configuration."""
    with np.load(SMALL) as archive:
        cases = json.loads(str(archive["meta"]))["cases"]
        arrays = {key: archive[key] for key in archive.files if key != "meta"}
    of = {
        case["id"]: {k.split(".")[1]: v for k, v in arrays.items() if k.startswith(case["id"] + ".")} for case in cases
    }
    return [pytest.param(case, of[case["id"]], id=case["id"]) for case in cases]


def check(layer: PartialConv2d, case: dict, data: dict[str, Tensor], window: int) -> None:
    """Output, mask and gradients of sum(out * g); `window` is what the recorded layer leaves out of the ratio."""
    with torch.no_grad():
        layer.weight.copy_(data["weight"] / window)
        if "bias" in data:
            assert layer.bias is not None
            layer.bias.copy_(data["bias"])
    x = data["x"].requires_grad_()
    out, mask = layer(x, data.get("mask"))
    (out * data["g"]).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    actual = {"out": out.detach(), "out_mask": mask, "gx": x.grad, "gw": layer.weight.grad / window}
    if layer.bias is not None:
        assert layer.bias.grad is not None
        actual["gb"] = layer.bias.grad
    assert set(actual) == set(case["check"])
    for field, value in actual.items():
        vectors.assert_close(value.cpu(), data[field].cpu(), case, field)


def nvidia(case: dict, arrays: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    skip_unsupported(device, dtype)
    args = [case[key] for key in ("cin", "cout", "kernel", "stride", "padding", "dilation", "groups", "bias")]
    layer = PartialConv2d(*args, case["multi_channel"], True, device=device, dtype=dtype)
    check(layer, case, {key: value.to(device, dtype) for key, value in arrays.items()}, 1)


@DTYPES
@pytest.mark.parametrize("case", vectors.cases("nvidia_partialconv2d"))
def test_nvidia(backend: str, device: torch.device, case: dict, dtype: torch.dtype) -> None:
    nvidia(case, vectors.tensors("nvidia_partialconv2d", case, dtype), dtype, device)


@DTYPES
@pytest.mark.parametrize("case, arrays", small_cases())
def test_nvidia_small(backend: str, device: torch.device, case: dict, arrays: dict, dtype: torch.dtype) -> None:
    nvidia(case, {key: torch.from_numpy(value) for key, value in arrays.items()}, dtype, device)


@DTYPES
@pytest.mark.parametrize("case", vectors.cases("naoto_partialconv"))
def test_naoto(backend: str, device: torch.device, case: dict, dtype: torch.dtype) -> None:
    """That layer divides by the count alone: ours with its weight divided by the window's size."""
    skip_unsupported(device, dtype)
    args = [case[key] for key in ("cin", "cout", "kernel", "stride", "padding")]
    layer = PartialConv2d(*args, bias=case["bias"], multi_channel=True, return_mask=True, device=device, dtype=dtype)
    data = {key: value.to(device) for key, value in vectors.tensors("naoto_partialconv", case, dtype).items()}
    check(layer, case, data, layer.weight[0].numel())


@pytest.mark.parametrize("groups, dilation, bias", [(1, 1, True), (2, (2, 1), False)])
def test_state_is_that_of_conv2d(backend: str, device: torch.device, groups: int, dilation: object, bias: bool) -> None:
    """Same parameters, same initial values, same numbers where everything is valid and nothing is padded."""
    arguments = dict(groups=groups, dilation=dilation, bias=bias)
    torch.manual_seed(3)
    plain = nn.Conv2d(4, 6, 3, **arguments).to(device)
    torch.manual_seed(3)
    layer = PartialConv2d(4, 6, 3, **arguments).to(device)
    assert list(layer.state_dict()) == list(plain.state_dict())
    for mine, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    x = torch.randn(2, 4, 9, 9, device=device)
    assert_close(layer(x), plain(x), 1e-5)
    with torch.no_grad():
        plain.weight.mul_(2)
    layer.load_state_dict(plain.state_dict())
    assert_close(layer(x), plain(x), 1e-5)
    plain.load_state_dict(layer.state_dict())
    assert isinstance(layer, nn.Conv2d)


def layers() -> list:
    torch.manual_seed(0)
    conv = PartialConv2d(3, 4, (3, 5), (2, 1), (1, 2), (1, 1), 1, True, True, True)
    return [pytest.param(conv, id="conv"), pytest.param(PartialUpConv2d(3, 2, 4, 5), id="upconv")]


def arguments(layer: nn.Module) -> list[Tensor]:
    """On the layer's device."""
    g = torch.Generator().manual_seed(1)
    given = [torch.randn(2, 3, 6, 8, generator=g), (torch.rand(2, 1, 6, 8, generator=g) > 0.5).float()]
    if isinstance(layer, PartialUpConv2d):
        given += [torch.randn(2, 2, 12, 16, generator=g), torch.ones(1, 1, 12, 16)]
    return [t.to(layer.weight.device) for t in given]


def through_torch_save(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "save": through_torch_save}


@pytest.mark.parametrize(
    "prepacked", [False, pytest.param(True, marks=pytest.mark.cpu_only)], ids=["plain", "prepacked"]
)
@pytest.mark.parametrize("method", COPIES)
@pytest.mark.parametrize("layer", layers())
def test_copies(backend: str, device: torch.device, layer: nn.Module, method: str, prepacked: bool) -> None:
    layer = fused_inpaint.prepack(copy.deepcopy(layer).to(device).eval(), prepacked)
    with torch.no_grad():
        expected, mask = layer(*arguments(layer))
        copied = COPIES[method](layer)
        actual, mask2 = copied(*arguments(layer))
        assert torch.equal(actual, expected) and torch.equal(mask, mask2)
        copied.weight.zero_()
        assert torch.equal(layer(*arguments(layer))[0], expected)
    assert repr(copied) == repr(layer)
    assert list(copied.state_dict()) == ["weight", "bias"]


@pytest.mark.cpu_only
@pytest.mark.parametrize("layer", layers())
def test_prepacked_weights_follow_the_weight(backend: str, layer: nn.Module) -> None:
    plain = copy.deepcopy(layer).eval()
    packed = fused_inpaint.prepack(copy.deepcopy(layer).eval())
    with torch.no_grad():
        for change in (lambda w: None, lambda w: w.mul_(-2), lambda w: w.add_(1)):
            change(plain.weight), change(packed.weight)
            assert_close(packed(*arguments(layer))[0], plain(*arguments(layer))[0], 5e-5)
    packed(*arguments(layer))[0].sum().backward()
    assert packed.weight.grad is not None


@pytest.mark.cpu_only
@pytest.mark.skipif(not packing._available(), reason="this torch has no oneDNN to pack for")
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("side", [2, 12], ids=["small", "folded"])
def test_prepacked_weights_are_used_and_equal(kernel: int, side: int) -> None:
    """Both forms of every kernel size, and one entry for each form however many sizes come."""
    layer = fused_inpaint.prepack(PartialUpConv2d(5, 3, 6, kernel).eval())
    mask, skip_mask = (torch.rand(1, 1, n, n) > 0.3 for n in (side, 2 * side))
    given = (torch.randn(1, 5, side, side), mask, torch.randn(1, 3, 2 * side, 2 * side), skip_mask)
    if _backends.status()["cpu"]:
        pytest.skip(_backends.status()["cpu"])
    with torch.no_grad():
        packed = layer(*given)[0]
        with use_backend("reference"):
            assert_close(packed, layer(*given)[0], 5e-5)
        layer(*[t[..., :-2, :] if t.size(-1) > side else t[..., :-1, :] for t in given])
    form = side * side >= routes.fold_from("packed")
    assert isinstance(layer._prepacked.entries[form], packing.PackedWeight)
    assert len(layer._prepacked.entries) == 1
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(*given)[0].dtype == torch.bfloat16


@pytest.mark.cpu_only
def test_prepacked_weights_belong_to_one_tensor() -> None:
    """A new weight at the address of a freed one is not taken for it."""
    layer = fused_inpaint.prepack(PartialConv2d(16, 16, 3, padding=1, bias=False).eval())
    x, weight = torch.randn(1, 16, 8, 8), layer.weight.detach().clone()
    with torch.no_grad():
        once = layer(x)
        for factor in (2.0, 3.0, 5.0, 7.0):
            out = torch.func.functional_call(layer, {"weight": weight * factor}, (x,))
            torch.testing.assert_close(out, factor * once, rtol=1e-4, atol=1e-4)
        for factor in (2.0, 3.0, 5.0, 7.0):
            layer.weight = None
            layer.weight = nn.Parameter(weight * factor)
            torch.testing.assert_close(layer(x), factor * once, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", layers())
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_conversion(backend: str, device: torch.device, layer: nn.Module, dtype: torch.dtype) -> None:
    """layer.to(dtype), with masks in that dtype too."""
    skip_unsupported(device, dtype)
    layer = copy.deepcopy(layer).to(device)
    expected, mask = layer(*arguments(layer))
    converted = copy.deepcopy(layer).to(dtype)
    y, mask2 = converted(*[a.to(dtype) for a in arguments(layer)])
    assert y.dtype == mask2.dtype == dtype and torch.equal(mask2.float(), mask)
    # Inputs, weights and bias are rounded too here.
    assert_close(y, expected, 1e-5 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in converted.parameters())


@pytest.mark.parametrize("layer", layers())
def test_layer_is_its_function(backend: str, device: torch.device, layer: nn.Module) -> None:
    layer = copy.deepcopy(layer).to(device)
    a = arguments(layer)
    y, mask = layer(*a)
    if isinstance(layer, PartialConv2d):
        expected = ops.partial_conv2d(*a, layer.weight, layer.bias, (2, 1), (1, 2), multi_channel=True)
        assert mask.shape == (2, 4, 3, 8)
        window, block = layer.window(a[1]), layer.block(a[0], layer.window(a[1]), activation="relu")
    else:
        expected = ops.partial_upconv2d(*a, layer.weight, layer.bias)
        window = layer.window(a[1], a[3])
        block = layer.block([a[0], a[2]], window, activation="relu")
    assert torch.equal(y, expected[0]) and torch.equal(mask, expected[1])
    assert torch.equal(window.mask, mask[:, :1].to(torch.uint8))
    assert_close(block, torch.relu(y), 1e-5)


def test_return_mask() -> None:
    layer = PartialConv2d(3, 4, 3)
    assert isinstance(layer(torch.randn(1, 3, 8, 8)), Tensor)
    layer.return_mask = True
    assert isinstance(layer(torch.randn(1, 3, 8, 8)), tuple)


def test_on_the_meta_device() -> None:
    assert (
        PartialConv2d(3, 4, 3, device="meta").weight.is_meta and PartialUpConv2d(3, 4, 5, device="meta").weight.is_meta
    )
    layer = PartialUpConv2d(3, 4, 5, bias=False)
    assert list(layer.state_dict()) == ["weight"] and layer.weight.shape == (5, 7, 3, 3)


def test_trains(backend: str, device: torch.device) -> None:
    """A few steps of SGD on one layer lower the loss."""
    layer = PartialConv2d(3, 3, 3, padding=1).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    x = torch.randn(2, 3, 16, 16, device=device)
    mask = (torch.rand(2, 1, 16, 16) > 0.3).float().to(device)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x, mask) - x * mask).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_window_chain_is_one_window_after_another(backend: str, device: torch.device) -> None:
    """Encoder, decoder and a step with two masks of several channels, against `partial_window`."""
    g = torch.Generator().manual_seed(5)
    first = (torch.rand(2, 3, 13, 18, generator=g) > 0.5).to(device, torch.uint8)
    other = (torch.rand(1, 1, 13, 18, generator=g) > 0.9).float().to(device)
    layers = [
        PartialConv2d(3, 4, 5, 2, 2),
        PartialConv2d(4, 4, (3, 1), (1, 2), (3, 0), (3, 1)),
        PartialUpConv2d(4, 4, 2, 5),
    ]
    steps = [layers[0].window_step(0), layers[1].window_step(2), layers[2].window_step(3, 2)]
    steps[2] = steps[2]._replace(inputs=[2, 5])
    steps.insert(2, ops.WindowStep([0, 1], [3, 7], [1, 1], [3, 3], [1, 1], [1, 1], [1, 1]))
    steps.insert(3, ops.WindowStep([2], [4], [2], [1, 1], [1, 1], [0, 0], [1, 1]))
    steps[4] = steps[4]._replace(inputs=[2, 5])
    windows = ops.partial_window_chain([first, other], steps)
    a = layers[0].window(first)
    b = layers[1].window(a.mask)
    c = ops.partial_window([first, other], (3, 7), 3, padding=1)
    d = ops.partial_window(a.mask, 4, 1, upsample=2)
    e = layers[2].window(a.mask, d.mask)
    for window, expected in zip(windows, (a, b, c, d, e), strict=True):
        assert window.full == expected.full
        for one, another in zip((*window.planes, *window[1:3]), (*expected.planes, *expected[1:3]), strict=True):
            assert one.dtype == another.dtype and torch.equal(one, another)


STEP = ops.WindowStep([0], [1], [1], [3, 3], [1, 1], [0, 0], [1, 1])


@pytest.mark.parametrize(
    "steps, sentence",
    [
        ([STEP._replace(inputs=[1])], r"inputs of step 0 must be masks known by then, 0 to 0, got \[1\]"),
        ([STEP, STEP._replace(inputs=[-1])], r"inputs of step 1 must be masks known by then, 0 to 1, got \[-1\]"),
        ([STEP, STEP._replace(inputs=[])], r"inputs of step 1 must be masks known by then, 0 to 1, got \[\]"),
        ([STEP._replace(inputs=[0, 0], channels=[1, 1], upsample=[1, 2])], r"masks of step 0 must be of one size"),
        ([STEP._replace(channels=[])], r"channels and upsample of step 0 must be 1 numbers each"),
        ([STEP._replace(channels=[0])], r"mask of step 0 must be of 1 or 0 channels, got 1"),
        ([STEP._replace(upsample=[3])], r"channels and upsample of step 0 must be 1 numbers each, upsample 1 or 2"),
        ([STEP._replace(stride=[0, 1])], r"stride of step 0 must be an int or two of at least 1, got \[0, 1\]"),
        ([STEP._replace(kernel=[3])], r"kernel of step 0 must be an int or two of at least 1, got \[3\]"),
        ([STEP, STEP._replace(inputs=[1])], r"mask of step 1 must be at least as large as the kernel \(3, 3\)"),
    ],
)
def test_window_chain_refuses(backend: str, device: torch.device, steps: list[ops.WindowStep], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^partial_window_chain: {sentence}"):
        ops.partial_window_chain(torch.ones(1, 1, 4, 4, device=device), steps)
