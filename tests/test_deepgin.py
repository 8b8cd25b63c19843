# SPDX-License-Identifier: Apache-2.0
"""DeepGIN: Table 1, the published numbers under their own names, any size, training, compilation, discriminators."""

import copy
import functools
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import vectors
from torch import Tensor, nn

from fused_inpaint import models, use_backend
from fused_inpaint.models.spectral import SpectralConv2d

TABLE_1 = [
    ({"block": "standard", "coarse_only": True}, 8.168),
    ({"block": "standard", "attention": "none", "back_projection": False}, 40.850),
    ({"block": "standard", "attention": "single", "back_projection": False}, 41.376),
    ({"block": "standard", "back_projection": False}, 42.892),
    ({"block": "dilated", "back_projection": False}, 42.892),
    ({"back_projection": False}, 42.892),
    ({}, 42.930),
]
CONFIGS = [config for config, _ in TABLE_1]
NAMES = ("compltd_img", "reconst_img", "lr_x", "lr_img")


@pytest.fixture(autouse=True)
def _tiny(one_thread: None) -> None:
    """Most networks here are small."""


def small(width: int = 4, **config: Any) -> Any:
    """With weights that keep the size of what passes, so that a wrong layer shows in the output."""
    model = models.build_model("deepgin", width=width, **config)
    randomise(model)
    return model


def randomise(net: nn.Module) -> None:
    for parameter in net.parameters():
        scale = 0.1 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, std=scale)


def picture(n: int = 1, height: int = 32, width: int = 48, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Image and mask (1 = valid), NaN under the holes."""
    mask = (torch.rand(n, 1, height, width) > 0.3).to(dtype)
    mask[..., 0, 0] = 1
    return torch.rand(n, 3, height, width, dtype=dtype).masked_fill(mask == 0, torch.nan), mask


def net_input(model: Any, n: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """What the bare network takes: white holes, 1 = hole."""
    image, mask = picture(n, dtype=dtype)
    return image.masked_fill(mask == 0, 1.0), 1 - mask


@pytest.mark.parametrize(("config", "millions"), TABLE_1)
def test_table_1(config: dict[str, Any], millions: float) -> None:
    with torch.device("meta"):
        net = models.build_model("deepgin", **config).net
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 3) == millions


@functools.cache
def published(case_id: str) -> Any:
    recorded = vectors.meta("gin_generator")
    case = next(case for case in recorded["cases"] if case["id"] == case_id)
    state = vectors.state(recorded["networks"][case["network"]], case["set_seed"])
    return models.load_published("deepgin", state)


@pytest.mark.parametrize("case", vectors.cases("gin_generator"))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_published_generator(
    backend: str, device: torch.device, case: dict[str, Any], layout: torch.memory_format
) -> None:
    compare_with_published(case, torch.float32, device, layout)


@pytest.mark.parametrize("case", vectors.cases("gin_generator")[:2])
def test_published_generator_in_float64(backend: str, device: torch.device, case: dict[str, Any]) -> None:
    if device.type != "cpu" or backend == "triton":
        pytest.skip("float64 runs on the CPU only")
    compare_with_published(case, torch.float64, device, torch.channels_last)


def compare_with_published(
    case: dict[str, Any], dtype: torch.dtype, device: torch.device, layout: torch.memory_format
) -> None:
    net = published(case["id"]).net.to(device, dtype)
    data = vectors.tensors("gin_generator", case, dtype)
    with torch.no_grad():
        outputs = net(data["input"].to(device, memory_format=layout), data["mask"].to(device))
    for name, value in zip(NAMES, outputs, strict=True):
        for field, part in parts(name, value.cpu(), case.get("crop")):
            vectors.assert_close(part, data[field], case, field)


def parts(name: str, value: Tensor, crop: list[int] | None) -> list[tuple[str, Tensor]]:
    """(field, value) of what is stored of an output: all of it, or a window, means and deviations."""
    if crop is None:
        return [(name, value)]
    top, left = crop if value.size(2) > 64 else (0, 0)
    return [
        (f"{name}_crop", value[..., top : top + 64, left : left + 64]),
        (f"{name}_mean", value.mean((2, 3))),
        (f"{name}_std", value.std((2, 3), correction=0)),
    ]


@pytest.mark.parametrize("case", vectors.cases("gin_generator")[:1])
def test_predictions_are_the_published_ones(case: dict[str, Any]) -> None:
    """Under the library's convention: 1 = valid, whatever lies in the holes; clamped in eval mode alone."""
    data = vectors.tensors("gin_generator", case)
    image, mask = data["image"].masked_fill(data["mask"] == 1, torch.nan), 1 - data["mask"]
    model = published(case["id"]).float()
    with torch.no_grad():
        for training in (True, False):
            out = model.train(training)(image, mask)
            for name, value in (("lr_x", out.coarse), ("lr_img", out.low_resolution), ("reconst_img", out.image)):
                vectors.assert_close(value, data[name] if training else data[name].clamp(0, 1), case, name)
        filled = model.inpaint(image, mask)
    vectors.assert_close(filled, data["compltd_img"].clamp(0, 1), case, "compltd_img")


@pytest.mark.parametrize(("block", "dilation"), [("standard", 1), ("dilated", 2)])
def test_residual_blocks(block: str, dilation: int) -> None:
    """Figure 3 (a) and (b): two 3x3 convolutions with a ReLU between, the first one dilated, and the input."""
    net = small(block=block).double().net
    for found in (net.coarse[4], net.refinement.middle[0]):
        x = torch.randn(1, found.pyramid.weight.size(0), 9, 7, dtype=torch.float64)
        padded = F.pad(x, (dilation,) * 4, mode="replicate")
        h = F.relu(F.conv2d(padded, found.pyramid.weight, found.pyramid.bias, dilation=dilation))
        y = x + F.conv2d(F.pad(h, (1,) * 4, mode="replicate"), found.fuse.weight, found.fuse.bias)
        torch.testing.assert_close(found(x), y)


def test_configurations_are_parts_of_the_whole() -> None:
    """With what an argument takes away set to nothing, the larger network gives the same picture."""

    def part(whole: nn.Module, **config: Any) -> Any:
        net = models.build_model("deepgin", width=4, **config).double().net
        state = whole.state_dict()
        net.load_state_dict({key: state[key] for key in net.state_dict()})
        return net(x, hole)

    whole, single = (small(attention=attention).double().net for attention in ("multi", "single"))
    x, hole = net_input(whole, dtype=torch.float64)
    with torch.no_grad():
        corrected = whole(x, hole)[1]
        nn.init.constant_(whole.refinement.alpha.bias, -1e9)
        completed, refined, coarse, low = whole(x, hole)
        assert torch.equal(refined, completed) and not torch.allclose(refined, corrected)
        assert low.shape == (1, 3, 8, 12)
        plain = part(whole, back_projection=False)
        torch.testing.assert_close(plain[0], completed)
        assert not torch.allclose(plain[1], completed) and plain[3] is None
        first = part(whole, coarse_only=True)
        torch.testing.assert_close(first[0], torch.where(hole == 1, coarse, x))
        assert torch.equal(first[1], first[2]) and torch.equal(first[2], coarse) and first[3] is None
        attended = single(x, hole)[0]
        for parameter in single.refinement.middle[3].out.parameters():
            nn.init.zeros_(parameter)
        torch.testing.assert_close(part(single, attention="none")[0], single(x, hole)[0])
        assert not torch.allclose(single(x, hole)[0], attended)


def test_fresh_weights() -> None:
    """He's, times 0.1; attention starts as the identity."""
    net = models.build_model("deepgin", width=16).net
    for name, parameter in net.named_parameters():
        if name.endswith("bias") or (name.split(".")[-2] == "out" and parameter.size(2) == 1):
            assert not parameter.any(), name
        elif parameter.numel() > 2000:
            expected = 0.1 * (2 / parameter[0].numel()) ** 0.5
            assert abs(parameter.std().item() / expected - 1) < 0.1, name


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("size", [(97, 131), (1, 1), (5, 3), (32, 16)])
def test_any_size(backend: str, device: torch.device, config: dict[str, Any], size: tuple[int, int]) -> None:
    model = small(**config).to(device).eval()
    image, mask = (t.to(device) for t in picture(2, *size))
    with torch.no_grad():
        out = model(image, mask)
    assert out.coarse.shape == out.image.shape == image.shape
    if out.low_resolution is None:
        assert config.get("coarse_only") or not config.get("back_projection", True)
    else:
        assert out.low_resolution.shape == (2, 3, -(-size[0] // 4), -(-size[1] // 4))
    for value in out:
        assert value is None or (torch.isfinite(value).all() and value.min() >= 0 and value.max() <= 1)
    filled = model.inpaint(image, mask)
    known = mask.expand_as(image) == 1
    assert torch.equal(filled[known], image[known]) and torch.isfinite(filled).all()


def test_padding_is_hole() -> None:
    """What a larger canvas with a larger hole around the picture gives, and the low resolution pixels over it."""
    model = small().eval()
    image, mask = picture(1, 21, 10)
    canvas, canvas_mask = torch.rand(1, 3, 32, 16), torch.zeros(1, 1, 32, 16)
    canvas[..., 5:26, 3:13], canvas_mask[..., 5:26, 3:13] = image, mask
    with torch.no_grad():
        out, larger = model(image, mask), model(canvas, canvas_mask)
    assert torch.equal(out.coarse, larger.coarse[..., 5:26, 3:13])
    assert torch.equal(out.image, larger.image[..., 5:26, 3:13])
    assert torch.equal(out.low_resolution, larger.low_resolution[..., 1:7, 0:3])


def test_masks_of_any_form() -> None:
    """Of three planes, shared by the batch, uint8 or bool: one plane inside, a hole where any has one."""
    model = small().eval()
    image, mask = picture(2, 32, 32)
    planes = torch.ones(2, 3, 32, 32)
    planes[:, 1:2] = mask
    clean = image.nan_to_num(0.5)
    with torch.no_grad():
        expected = model(image, mask).image
        for given in (mask.bool(), mask.to(torch.uint8), planes, mask.expand_as(image)):
            assert torch.equal(model(clean, given).image, expected)
        each = torch.cat([model(part, mask[:1]).image for part in clean.split(1)])
        torch.testing.assert_close(model(clean, mask[:1]).image, each, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_learns(backend: str, device: torch.device, config: dict[str, Any]) -> None:
    model = small(width=8, **config).to(device).train()
    image, mask = (t.to(device) for t in picture(2, 40, 64))
    out = model(image, mask)
    assert out.image.max() > 1 or out.image.min() < 0  # not clamped, for the losses
    sum(value.square().mean() for value in out if value is not None).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), name


def test_gradients_equal_the_reference(backend: str, device: torch.device) -> None:
    if device.type != "cpu" or backend == "triton":
        pytest.skip("float64 runs on the CPU only")
    model = small().double().train()
    image, mask = picture(dtype=torch.float64)

    def gradients() -> list[Tensor]:
        net, x = copy.deepcopy(model), image.clone().requires_grad_()
        sum(value.square().mean() for value in net(x, mask)).backward()
        return [x.grad, *(p.grad for p in net.parameters())]

    found = gradients()
    with use_backend("reference"):
        expected = gradients()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert not found[0][mask.expand_as(image) == 0].any()


@pytest.mark.parametrize(
    ("config", "train"), [({}, True), ({"coarse_only": True}, False)], ids=["train", "coarse-eval"]
)
def test_compiles_without_a_graph_break(
    backend: str, device: torch.device, traceable: None, config: Any, train: bool
) -> None:
    model = small(**config).to(device).train(train)
    image, mask = (t.to(device) for t in picture(1, 19, 32))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    found, expected = compiled(image, mask), model(image, mask)
    torch.testing.assert_close(found.image, expected.image, rtol=1e-5, atol=1e-5)
    found.image.mean().backward()
    assert all(p.grad is not None for p in compiled.parameters())


def test_exports(backend: str, device: torch.device) -> None:
    model = small().to(device).eval()
    image, mask = (t.to(device) for t in picture(1, 16, 21))
    exported = torch.export.export(model, (image, mask)).module()
    for found, expected in zip(exported(image, mask), model(image, mask), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "half"])
def test_low_precision(backend: str, device: torch.device, how: str) -> None:
    model = small(width=8).to(device).train()
    image, mask = (t.to(device) for t in picture(1, 32, 32))
    expected = model(image, mask)
    if how == "autocast":
        with torch.autocast(device.type, torch.bfloat16):
            found = model(image, mask)
    else:
        dtype = getattr(torch, how)
        found = model.to(dtype)(image.to(dtype), mask.to(dtype))
    limit = 0.01 if how == "half" else 0.05
    for a, b in zip(found, expected, strict=True):
        assert 0 < (a.float() - b).norm() < limit * b.norm()
    found.image.float().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_copies_and_layouts() -> None:
    model = small().eval()
    image, mask = picture(2)
    expected = model(image, mask).image
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(memory_format=torch.channels_last)):
        found = other(image.contiguous(memory_format=torch.channels_last), mask).image
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_backends_share_a_state_dict() -> None:
    with use_backend("reference"):
        state = small().state_dict()
    small().load_state_dict(state)


# Discriminator


def critic(width: int = 4, **config: Any) -> Any:
    return models.build_discriminator("deepgin", width=width, **config)


def power_vectors(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items() if key.endswith(("weight_u", "weight_v"))}


@pytest.mark.parametrize("case", vectors.cases("gin_discriminator"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_published_discriminator(case: dict[str, Any], dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Two forwards, each with its step of the power method."""
    network = vectors.meta("gin_discriminator")["networks"][case["network"]]
    state = vectors.state(network, case["set_seed"])
    net = models.load_published("deepgin", state, part="discriminator").net.to(dtype)
    assert sum(p.numel() for p in net.parameters()) == network["trainable_parameter_count"]
    data = vectors.tensors("gin_discriminator", case, dtype)
    x = data["x"].contiguous(memory_format=layout).requires_grad_()
    forwards = [net(x), net(x)]
    for number, scales in enumerate(forwards, 1):
        for scale, maps in enumerate(scales):
            assert [list(m.shape) for m in maps] == [case["full_shapes"][f"s{scale}_f0"]]
            field = f"s{scale}_f0_{number}_c16"
            vectors.assert_close(maps[0][:, :16], data[field], case, field)
    vectors.assert_close(torch.autograd.grad(forwards[0][0][-1].sum(), x)[0], data["gx"], case, "gx")
    compared = 0
    for key, value in power_vectors(net).items():
        _, scale, place, which = key.split(".")
        field = f"after_layer{1 - int(scale)}.{place}.module.{which}"
        vectors.assert_close(value, data[field], case, field)
        compared += 1
    assert compared == sum(field.startswith("after_") for field in case["check"])


def test_discriminator_under_the_convention() -> None:
    """(given with white holes, image), one map a scale; every parameter learns."""
    model = critic().eval()
    for module in model.modules():
        if isinstance(module, SpectralConv2d):
            module.always = False
    given, mask = picture(2, 33, 21)
    image = torch.rand_like(given)
    scores = model(image, mask, given)
    masked = torch.where(mask == 1, given, torch.ones(()))
    expected = model.net(torch.cat([masked, image], 1))
    assert [tuple(s.shape) for s in scores] == [(2, 16, 11, 8), (2, 16, 7, 6)]
    assert all(torch.equal(score, maps[-1]) for score, maps in zip(scores, expected, strict=True))
    assert torch.equal(model(image, mask)[0], model(image, mask, image)[0])
    model.train()
    real, fake = model(image, mask), model(given.nan_to_num(0.0), mask, given)  # two forwards, one backward
    sum(score.square().mean() for score in (*real, *fake)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    tiny = critic(scales=3)(torch.rand(1, 3, 1, 1), torch.ones(1, 1, 1, 1))
    assert [tuple(score.shape[2:]) for score in tiny] == [(3, 3)] * 3


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_discriminator_compiles_and_copies(train: bool) -> None:
    model = critic().train(train)
    image, mask = torch.rand(1, 3, 16, 16), picture(1, 16, 16)[1]
    other = copy.deepcopy(model)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        found, expected = compiled(image, mask), other(image, mask)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = other(image, mask)
    assert half[0].dtype == torch.bfloat16 and all(v.dtype == torch.float32 for v in power_vectors(other).values())
    torch.testing.assert_close(half[0].float(), model.double()(image.double(), mask)[0].float(), rtol=0.1, atol=0.05)


# Files


def gin_state(name: str, network: str, width: int = 4) -> dict[str, Tensor]:
    """A smaller network of the published kind: its names, and its shapes with all widths divided."""
    keys = vectors.meta(name)["networks"][network]["keys"]
    divided = {key: [d * width // 64 if d >= 32 else d for d in shape] for key, shape in keys.items()}
    return {key: torch.randn(shape) for key, shape in divided.items()}


def test_published_names() -> None:
    """Each is read once, to a network of the width that the file has; training files are looked through."""
    state = gin_state("gin_generator", "ImageTinker2")
    model = models.load_published("deepgin", {"state_dict": {f"module.{k}": v for k, v in state.items()}})
    assert model.config["width"] == 4 and not model.training
    ours, theirs = (torch.cat([v.flatten() for v in d.values()]) for d in (model.net.state_dict(), state))
    assert torch.equal(ours.sort().values, theirs.sort().values)
    assert torch.equal(model.net.coarse[6].pyramid.weight[2:4], state["lr_coarse_tinker.14.branch2.conv.weight"])
    assert torch.equal(model.net.refinement.middle[2].fuse.bias, state["r_md_mres5.fusion5.conv.bias"])
    assert torch.equal(model.net.refinement.skip64[1].qkv.bias[2:4], state["r_de_satn3.phi.bias"])
    dilated = models.load_published("deepgin", state, source="gin", block="dilated")
    assert tuple(dilated.net.coarse[4].pyramid.dilations) == (2,)


def test_files_that_do_not_fit() -> None:
    state = gin_state("gin_generator", "ImageTinker2")
    for wrong, told in [
        ({"r_en_conv3.bias": None}, "missing refinement.encoder.2.bias"),
        ({"r_de_satn2.phi.weight": None}, "missing refinement.skip32.1.qkv.weight; unexpected r_de_satn2.g.weight"),
        ({"r_de_conv6.bias": torch.zeros(3)}, "unexpected r_de_conv6.bias"),
        ({"r_de_conv2.weight": torch.zeros(8, 8, 3, 3)}, r"r_de_conv2.weight of (8, 8, 3, 3) instead of (8, 16, 3, 3)"),
        ({"lr_coarse_tinker.1.weight": None}, "a gin generator with a 4-dimensional lr_coarse_tinker.1.weight"),
    ]:
        given = {key: value for key, value in (state | wrong).items() if value is not None}
        with pytest.raises(ValueError, match=re.escape(told)):
            models.load_published("deepgin", given)
    state = gin_state("gin_discriminator", "default64")
    del state["layer1.2.module.weight_u"]
    with pytest.raises(ValueError, match=r"missing scales\.0\.2\.weight_u"):
        models.load_published("deepgin", state, part="discriminator")
    with pytest.raises(ValueError, match=r"a gin discriminator with layer0\.0\.module\.bias"):
        models.load_published("deepgin", {"layer1.0.module.weight_bar": torch.zeros(1)}, part="discriminator")
    with pytest.raises(ValueError, match="checkpoint must be one of a known source"):
        models.load_published("deepgin", state)
    with pytest.raises(ValueError, match="source must be one of gin, fused_inpaint, got rn"):
        models.load_published("deepgin", state, source="rn")


@pytest.mark.parametrize("config", [*CONFIGS, {"attention": "single"}])
def test_own_files(config: dict[str, Any], tmp_path: Path) -> None:
    model = small(**config).eval()
    image, mask = picture()
    again = models.load_published("deepgin", model.state_dict(), width=4, **config)
    with torch.no_grad():
        assert torch.equal(again(image, mask).image, model(image, mask).image)
    assert again.config == model.config
    torch.save({"netG": model.net.state_dict()}, tmp_path / "a.pth")
    models.load_published("deepgin", tmp_path / "a.pth", width=4, **config)


def test_own_discriminator_files() -> None:
    model = critic().eval()
    again = models.load_published("deepgin", model.state_dict(), part="discriminator", width=4)
    x = torch.rand(1, 6, 32, 32)
    assert torch.equal(again.net(x)[1][0], model.net(x)[1][0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(block="spp"), "deepgin: block must be standard, dilated or spd, got spp"),
        (lambda: small(attention="multi-scale"), "deepgin: attention must be none, single or multi, got multi-scale"),
        (lambda: small(width=5), "deepgin: width must be even and at least 2, got 5"),
        (lambda: critic(scales=0), "deepgin: scales must be at least 1, got 0"),
        (lambda: critic(width=0), "deepgin: width must be at least 1, got 0"),
        (
            lambda: small().net(torch.rand(1, 3, 16, 24), torch.ones(1, 1, 16, 24)),
            r"deepgin: msked_img must have sides that are multiples of 16, got \(1, 3, 16, 24\)",
        ),
        (
            lambda: critic()(torch.rand(1, 3, 8, 8), torch.ones(1, 1, 8, 9)),
            r"deepgin: mask must be \(1, 1, 8, 8\) or \(1, 3, 8, 8\), got \(1, 1, 8, 9\)",
        ),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
