# SPDX-License-Identifier: Apache-2.0
"""Region-wise inpainting: the published variables' numbers, any size, ablations, training, compilation, checkpoints."""

import copy
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import vectors
from safetensors.torch import save_file
from torch import Tensor, nn

from fused_inpaint import models, use_backend
from fused_inpaint.models import region_wise


@pytest.fixture(autouse=True)
def _small(one_thread: None) -> None:
    """Sizes are small."""


def small(**config: Any) -> Any:
    return models.build_model("region_wise", **{"width": 4, **config})


def small_discriminator(still: bool = False) -> Any:
    """`still`: no steps of the power method but in training."""
    judge = models.build_discriminator("region_wise", width=4)
    for conv in judge.net.convs:
        conv.always = not still
    return judge


def picture(n: int = 2, height: int = 68, width: int = 72, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    mask = (torch.rand(n, 1, height, width) > 0.2).to(dtype)
    mask[..., 20:50, 8:40] = 0
    return torch.rand(n, 3, height, width, dtype=dtype), mask


def published(name: str, networks: list[str], seed: int) -> dict[str, Tensor]:
    known = vectors.meta(name)["networks"]
    return {key: value for network in networks for key, value in vectors.state(known[network], seed).items()}


def test_layers() -> None:
    net = models.build_model("region_wise").net
    assert sum(p.numel() for p in net.inferring.parameters()) == 2_830_083
    assert sum(p.numel() for p in net.perceiving.parameters()) == 1_875_971
    assert sum(p.numel() for p in models.build_discriminator("region_wise").parameters()) == 5_946_816
    region = [getattr(net.inferring, f"conv{i}") for i in (13, 14, 15)]
    assert [(c.in_channels, c.missing_channels, c.out_channels, c.upsample) for c in region] == [
        (256, 128, 128, 2),
        (192, 128, 128, 1),
        (192, 128, 128, 2),
    ]
    dilations = [getattr(net.perceiving, f"conv{i}").dilation[0] for i in range(1, 13)]
    assert dilations == [1, 1, 1, 1, 1, 1, 2, 4, 8, 16, 1, 1]


@pytest.mark.parametrize("case", vectors.cases("regionwise_generator"))
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float64, torch.contiguous_format), (torch.float32, torch.channels_last)],
    ids=["float64_nchw", "float32_nhwc"],
)
def test_published_networks(
    backend: str, device: torch.device, case: dict[str, Any], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """The published variables give the published pictures."""
    if dtype == torch.float64 and (device.type != "cpu" or backend == "triton"):
        pytest.skip("float64 runs on the CPU only")
    state = published("regionwise_generator", case["networks"], case["set_seed"])
    net = models.load_published("region_wise", state).to(device, dtype).net
    data = {k: v.to(device) for k, v in vectors.tensors("regionwise_generator", case, dtype).items()}
    x, mask = data["input"].contiguous(memory_format=layout), data["mask"]
    with torch.no_grad():
        first, second = net(x, mask)
        found = {"p1": first, "p2": second, "gp_only": net.perceiving(x, mask)}
        found["final"] = x * mask + second * (1 - mask)
    for name, value in found.items():
        vectors.assert_close(value.cpu(), data[name].cpu(), case, name)
    assert (second.abs() == 1).any()  # clipping is part of what was compared


@pytest.mark.parametrize("case", vectors.cases("regionwise_discriminator"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_published_discriminator(case: dict[str, Any], dtype: torch.dtype) -> None:
    """Three runs, each with its step of the power method."""
    state = published("regionwise_discriminator", [case["network"]], case["set_seed"])
    net = models.load_published("region_wise", state, part="discriminator").to(dtype).net
    data = vectors.tensors("regionwise_discriminator", case, dtype)
    x, mask = data["x"], data["mask"]
    for name, activation in (("out_leaky_1", "leaky_relu"), ("out_leaky_2", "leaky_relu"), ("out_none_3", None)):
        vectors.assert_close(net(x, mask, activation), data[name], case, name)
    for i, conv in enumerate(net.convs, 1):
        name = f"after_discriminator/d_conv{i}u"
        vectors.assert_close(conv.weight_u[None], data[name], case, name)


def test_published_training_file(tmp_path: Path) -> None:
    """A file of training holds both parts, the optimiser's variables and TensorFlow's suffixes."""
    stage = vectors.meta("regionwise_losses")["cases"][1]
    case = {"check": vectors.meta("regionwise_losses")["common_check"]}
    state = published("regionwise_losses", ["all"], stage["set_seed"])
    data = vectors.tensors("regionwise_losses", {"id": "common"}, torch.float64)
    state |= {key.removeprefix("u_"): value.float() for key, value in data.items() if key.startswith("u_")}
    kernel = state["inpaint_net/conv1_1/kernel"]
    state |= {"inpaint_net/conv1_1/kernel/Adam": kernel, "inpaint_net/conv1_1/kernel/Adam_1": kernel}
    np.savez(tmp_path / "model.npz", global_step=np.int64(7), **{f"{key}:0": v.numpy() for key, v in state.items()})
    model = models.load_published("region_wise", tmp_path / "model.npz").double()
    judge = models.load_published("region_wise", tmp_path / "model.npz", part="discriminator").double()
    image, mask = data["image255"] / 255, data["mask"]
    with torch.no_grad():
        out = model(image, mask)
        vectors.assert_close(2 * out.first - 1, data["image_p1"], case, "image_p1")
        vectors.assert_close(2 * out.image - 1, data["image_p2"], case, "image_p2")
        vectors.assert_close(judge(image, mask)[:, :32], data["d_real_leaky"], case, "d_real_leaky")


def test_published_resize() -> None:
    data = vectors.load("regionwise_ops")[1]
    names = [case["id"] for case in vectors.meta("regionwise_ops")["cases"] if case["id"].startswith("resize")]
    assert names
    for name in names:
        x, expected = (torch.from_numpy(data[f"{name}.{field}"]) for field in ("x", "out"))
        assert torch.equal(region_wise._resize(x, expected), expected)


def test_resizing_rounds_as_float32_does() -> None:
    """15 * 75 / 18 is 62.5, which float32 rounds below; 10 * 83 / 20 is 41.5, which rounds up."""
    for size, i, nearest in ((76, 15, 62), (84, 10, 42)):
        line = torch.arange(size).view(1, 1, 1, -1).expand(1, 1, size, -1)
        quarter = torch.empty(1, 1, size // 4, size // 4)
        assert region_wise._resize(line, quarter)[0, 0, 0, i] == nearest
        assert region_wise._resize(line.mT, quarter)[0, 0, i, 0] == nearest


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 4)])
def test_upsampling_at_the_low_resolution(size: tuple[int, int]) -> None:
    layer = region_wise._UpConv(6, 5).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    leaves = [x, layer.weight, layer.bias]
    up = F.interpolate(x, scale_factor=2.0, mode="nearest")
    expected = F.elu(F.conv2d(F.pad(up, (1, 1, 1, 1), mode="reflect"), layer.weight, layer.bias))
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_ablations() -> None:
    """Where every pixel is known, equation (1) is a standard convolution with one of the two filters."""
    standard, by_output = small(region="none").double().eval(), small(region="output").double().eval()
    state = standard.state_dict()
    for i in (13, 14, 15):
        for name in (f"net.inferring.conv{i}.weight", f"net.inferring.conv{i}.bias"):
            hole = torch.randn_like(state[name])
            state[name] = torch.stack([hole, state[name]]) if name.endswith("bias") else torch.cat([hole, state[name]])
    by_output.load_state_dict(state)
    image, mask = picture(dtype=torch.float64)
    with torch.no_grad():
        everything = torch.ones_like(mask)
        torch.testing.assert_close(by_output(image, everything).first, standard(image, everything).first)
        assert not torch.allclose(by_output(image, mask).first, standard(image, mask).first)
    count = {r: sum(p.numel() for p in small(region=r).parameters()) for r in ("none", "output", "input")}
    assert count["none"] < count["input"] < count["output"]


def test_the_region_filters_read_their_regions() -> None:
    """What the hole's filter of layer 14 makes of known pixels, and the other way round, does not matter."""
    net = small().double().net.inferring
    x, mask = (t.double() for t in picture())
    with torch.no_grad():
        expected = {value: net(x, torch.full_like(mask, value)) for value in (0.0, 1.0)}
        net.conv14.weight[:, : net.conv14.in_channels] += 1  # the filter of known pixels
        assert torch.equal(net(x, torch.zeros_like(mask)), expected[0.0])
        assert not torch.allclose(net(x, torch.ones_like(mask)), expected[1.0])


def test_gradients_equal_the_reference(backend: str, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("torch pads by reflection with atomic sums on a GPU")
    model = small().double().train()
    image, mask = picture(1, dtype=torch.float64)

    def gradients() -> list[Tensor]:
        net = copy.deepcopy(model)
        x = image.clone().requires_grad_()
        out = net(x, mask)
        (out.first.square().sum() + out.image.square().sum()).backward()
        return [x.grad, *(p.grad for p in net.parameters())]

    found = gradients()
    with use_backend("reference"):
        expected = gradients()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * b.abs().max().item())
    assert found[0][mask.expand_as(image) == 0].abs().max() == 0


@pytest.mark.parametrize("size", [(97, 131), (1, 1), (5, 3), (68, 72)])
def test_any_size(backend: str, device: torch.device, size: tuple[int, int]) -> None:
    model = small().to(device).eval()
    image, mask = torch.rand(1, 3, *size, device=device), (torch.rand(1, 1, *size, device=device) > 0.4).float()
    image = image.masked_fill(mask == 0, torch.nan)
    with torch.no_grad():
        out = model(image, mask)
    assert out._fields == ("first", "image") and out[-1] is out.image
    for prediction in out:
        assert prediction.shape == image.shape and prediction.dtype == image.dtype
        assert prediction.min() >= 0 and prediction.max() <= 1
    filled = model.inpaint(image, mask)
    known = mask.expand_as(image) == 1
    assert torch.equal(filled[known], image[known])
    assert torch.isfinite(filled).all()


def test_padding_is_a_larger_hole() -> None:
    model = small().eval()
    image, mask = picture(1, 69, 70)
    canvas, canvas_mask = torch.rand(1, 3, 72, 72), torch.zeros(1, 1, 72, 72)
    canvas[..., 1:70, 1:71], canvas_mask[..., 1:70, 1:71] = image, mask
    with torch.no_grad():
        torch.testing.assert_close(model(image, mask).image, model(canvas, canvas_mask).image[..., 1:70, 1:71])


def test_masks_of_every_kind() -> None:
    """Of bool, uint8 and float, shared by the batch, and of three channels, of which any makes a hole."""
    model = small().eval()
    image, mask = picture()
    mask[1] = mask[0]
    channels = mask.repeat(1, 3, 1, 1)
    channels[:, 1, 40:60, 60:70] = 0
    with torch.no_grad():
        expected = model(image, mask).image
        for other in (mask.bool(), mask.to(torch.uint8), mask[:1], mask.expand(-1, 3, -1, -1)):
            torch.testing.assert_close(model(image, other).image, expected)
        all_of_them = channels.amin(1, keepdim=True)
        torch.testing.assert_close(model(image, channels).image, model(image, all_of_them).image)


def test_what_lies_under_the_hole_is_never_read(backend: str, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("torch pads by reflection with atomic sums on a GPU")
    model = small().train()
    image, mask = picture()
    poisoned = image.masked_fill(mask == 0, torch.nan)
    clean, out = model(image, mask), model(poisoned, mask)
    assert all(torch.equal(a, b) for a, b in zip(out, clean, strict=True))
    (out.first.mean() + out.image.mean()).backward()
    for name, p in model.named_parameters():
        assert torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name


def test_a_training_step_improves() -> None:
    model, judge = small().train(), small_discriminator().train()
    image, mask = picture()
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        out = model(image, mask)
        loss = (out.first - image).abs().mean() + (out.image - image).abs().mean()
        loss = loss - 1e-3 * judge(out.first, mask).mean() - 1e-3 * judge(out.image, mask).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in judge.parameters())


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (97, 131)])
def test_discriminator_sees_holes_only(size: tuple[int, int]) -> None:
    judge = small_discriminator(still=True).eval()
    image, mask = torch.rand(2, 3, *size), torch.zeros(2, 1, *size)
    mask[1] = 1
    score = judge(image, mask)
    assert score.shape == (2, 16, *(math.ceil(side / 64) for side in size))
    changed = judge((image + 0.3) % 1, mask)
    assert torch.equal(changed[1], score[1]) and not torch.allclose(changed[0], score[0])
    torch.testing.assert_close(judge.net((2 * image - 1) * (1 - mask), mask), score)


@pytest.mark.parametrize("size", [(1, 2), (6, 7), (9, 12), (13, 5)])
def test_same_padding(size: tuple[int, int]) -> None:
    """TensorFlow's: as much as the last window needs, the odd pixel at the end."""
    conv = region_wise._HalvingConv(3, 4).double()
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    around = []
    for side in reversed(size):
        total = max((math.ceil(side / 2) - 1) * 2 + 5 - side, 0)
        around += [total // 2, total - total // 2]
    again = copy.deepcopy(conv)
    expected = F.conv2d(F.pad(x, around), again.normalised_weight(), conv.bias, stride=2)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize(("region", "train"), [("input", False), ("input", True), ("output", False)])
def test_compiles_without_a_graph_break(region: str, train: bool) -> None:
    model = small(region=region).train(train)
    image, mask = picture(1, 69, 70)
    expected = model(image, mask)
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(image, mask)
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if train:
        out.image.mean().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_discriminator_compiles_without_a_graph_break() -> None:
    judge, (image, mask) = small_discriminator().train(), picture()
    other = copy.deepcopy(judge)
    compiled = torch.compile(judge, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(image, mask), other(image, mask))


def test_exports() -> None:
    model = small().eval()
    image, mask = picture(1, 69, 70)
    exported = torch.export.export(model, (image, mask)).module()
    torch.testing.assert_close(exported(image, mask).image, model(image, mask).image, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    model, (image, mask) = small(width=8).to(device).eval(), (t.to(device) for t in picture())
    with torch.no_grad():
        expected = model(image, mask)
        with torch.autocast(device.type, dtype=dtype):
            mixed = model(image, mask)
        half = copy.deepcopy(model).to(dtype)(image.to(dtype), mask.to(dtype))
    assert half.image.dtype == dtype
    for a, b, c in zip(expected, mixed, half, strict=True):
        scale = 8 * torch.finfo(dtype).eps
        assert (a - b.float()).abs().max() < scale and (a - c.float()).abs().max() < scale


def test_discriminator_in_half_precision() -> None:
    judge, (image, mask) = small_discriminator().eval(), picture()
    with torch.no_grad():
        expected = judge(image, mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = judge(image, mask)
        half = copy.deepcopy(judge).bfloat16()(image.bfloat16(), mask)
    scale = 2**-5 * expected.abs().max()
    assert (mixed.float() - expected).abs().max() < scale and (half.float() - expected).abs().max() < scale


@pytest.mark.parametrize("build", [small, small_discriminator])
def test_copies(build: Any) -> None:
    module, (image, mask) = build(), picture(1)
    if build is small_discriminator:
        module = build(still=True)
    module.eval()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)

    def result(m: nn.Module) -> Tensor:
        out = m(image, mask)
        return out if isinstance(out, Tensor) else out.image

    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert torch.equal(result(other), result(module))
    last = copy.deepcopy(module).to(memory_format=torch.channels_last)
    torch.testing.assert_close(result(last), result(module))


def test_own_checkpoints(tmp_path: Path) -> None:
    for build, part in ((models.build_model, "generator"), (models.build_discriminator, "discriminator")):
        module = build("region_wise", width=4)
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, tmp_path / "a.safetensors")
        torch.save({part: module.net.state_dict()}, tmp_path / "b.pth")
        for given in (tmp_path / "a.safetensors", tmp_path / "b.pth", module.state_dict()):
            loaded = models.load_published("region_wise", given, part=part, width=4)
            assert not loaded.training and loaded.config["width"] == 4
            for key, value in module.state_dict().items():
                assert torch.equal(loaded.state_dict()[key], value), key


def tensorflow(net: nn.Module) -> dict[str, Tensor]:
    """A small discriminator's parameters as the authors' variables."""
    names = {"weight": "_w", "bias": "_bias", "weight_u": "u"}
    state = {}
    for key, value in net.state_dict().items():
        _, index, kind = key.split(".")
        if kind == "weight_v":
            continue
        kernel = value.permute(2, 3, 1, 0) if kind == "weight" else value[None] if kind == "weight_u" else value
        state[f"discriminator/d_conv{int(index) + 1}{names[kind]}"] = kernel
    return state


def test_checkpoints_that_do_not_fit() -> None:
    state = tensorflow(small_discriminator().net)
    loaded = models.load_published("region_wise", state, source="region-wise", part="discriminator")
    assert loaded.config == {"width": 4}
    del state["discriminator/d_conv2_bias"]
    state["discriminator/d_conv7_w"] = torch.zeros(1)
    state["discriminator/d_conv3u"] = torch.zeros(1, 5)
    with pytest.raises(ValueError) as failure:
        models.load_published("region_wise", state, part="discriminator")
    for told in (
        "missing convs.1.bias",
        "unexpected discriminator/d_conv7_w",
        "discriminator/d_conv3u of (1, 5) instead of (16,)",
    ):
        assert told in str(failure.value)
    with pytest.raises(ValueError, match=r"checkpoint must be one of a known source \(region-wise, fused_inpaint\)"):
        models.load_published("region_wise", state)
    state["discriminator/d_conv1_w"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"a 4-dimensional discriminator/d_conv1_w, got \(4,\)$"):
        models.load_published("region_wise", state, part="discriminator")
    with pytest.raises(ValueError, match=r"a 4-dimensional inpaint_net/conv1_1/kernel, got none$"):
        models.load_published("region_wise", state, source="region-wise")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(width=5), "region_wise: width must be even and at least 2, got 5"),
        (lambda: small(region="tap"), "region_wise: region must be input, output or none, got tap"),
        (lambda: small()(torch.rand(1, 1, 8, 8), torch.ones(1, 1, 8, 8)), "region_wise: image must have 3 channels"),
        (
            lambda: small().net(torch.rand(1, 3, 64, 72), torch.ones(1, 1, 64, 72)),
            r"region_wise: x must have sides that are multiples of 4 and at least 68, got \(1, 3, 64, 72\)",
        ),
        (
            lambda: small().net.perceiving(torch.rand(1, 3, 72, 70), torch.ones(1, 1, 72, 70)),
            r"region_wise: x must have sides that are multiples of 4 and at least 68, got \(1, 3, 72, 70\)",
        ),
        (
            lambda: small_discriminator().net(torch.rand(1, 3, 8, 8), torch.ones(1, 1, 8, 8), "elu"),
            "region_wise: activation must be leaky_relu or None, got elu",
        ),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
