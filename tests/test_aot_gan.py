# SPDX-License-Identifier: Apache-2.0
"""AOT-GAN: the published numbers of generator and discriminator, any size, training, compilation, files."""

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import vectors
from torch import Tensor, nn

from fused_inpaint import models, use_backend
from fused_inpaint.models.files import write_safetensors
from fused_inpaint.models.spectral import SpectralConv2d

CHANNELS_LAST = torch.channels_last


def small(**config: Any) -> Any:
    return models.build_model("aot_gan", **{"blocks": 2, "width": 8, **config})


def critic(width: int = 8) -> Any:
    return models.build_discriminator("aot_gan", width=width)


def picture(n: int = 2, height: int = 40, width: int = 44, **options: Any) -> tuple[Tensor, Tensor]:
    mask = (torch.rand(n, 1, height, width, **options) > 0.1).to(options.get("dtype", torch.float32))
    mask[..., 3:12, 4:9] = 0
    return torch.rand(n, 3, height, width, **options), mask


def lively(model: Any) -> Any:
    """With weights as large as those of a trained network; from the initial ones hardly any signal arrives."""
    for p in model.parameters():
        if p.dim() == 4:
            nn.init.normal_(p, std=1.5 * p[0].numel() ** -0.5)
        else:
            nn.init.normal_(p, std=0.1)
    return model


def authors_names(own: dict[str, Tensor], rates: int = 4) -> dict[str, Tensor]:
    """A generator's parameters under the authors' names."""
    state = {}
    for key, value in own.items():
        part, number, *rest = key.split(".")
        if part == "blocks" and rest[0] == "pyramid":
            for j, branch in enumerate(value.chunk(rates)):
                state[f"middle.{number}.block0{j}.1.{rest[1]}"] = branch
        elif part == "blocks":
            state[f"middle.{number}.{rest[0]}.1.{rest[1]}"] = value
        elif part == "encoder":
            state[f"encoder.{int(number) + 1}.{rest[0]}"] = value
        else:
            state[{"1": "decoder.0.conv", "4": "decoder.2.conv", "6": "decoder.4"}[number] + "." + rest[0]] = value
    return state


def mmagic_names(authors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names, of the generator or the discriminator, to OpenMMLab's."""
    state = {}
    for key, value in authors.items():
        part, number, *rest = key.split(".")
        if part == "middle":
            branch = f"blocks.{int(rest[0][-2:])}" if rest[0].startswith("block") else rest[0]
            name = f"dilation_neck.model.{number}.{branch}.1.conv.{rest[-1]}"
        elif part == "conv":
            name = f"model.{int(number) // 2}.{'' if number == '8' else 'conv.'}{rest[-1]}"
        else:
            name = f"{part}.{part}.{(int(number) + 1) // 2}.conv.{rest[-1]}"
        state[name] = value
    return state


@functools.cache
def recorded(name: str, identity: str, part: str = "generator") -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """(the case, its state dict, the network loaded from it)"""
    case = next(case for case in vectors.meta(name)["cases"] if case["id"] == identity)
    state = vectors.state(vectors.meta(name)["networks"][case["network"]], case["set_seed"])
    return case, state, models.load_published("aot_gan", state, part=part)


GENERATORS = [
    pytest.param(name, case.values[0], id=f"{name}-{case.id}", marks=case.marks)
    for name in ("aot_generator", "mmagic_aot")
    for case in vectors.cases(name)
]


@pytest.mark.parametrize(("name", "case"), GENERATORS)
def test_published_generator(backend: str, device: torch.device, name: str, case: dict[str, Any]) -> None:
    net = recorded(name, case["id"])[2].net.to(device)
    # The largest picture takes its time in float64.
    wide = device.type == "cpu" and backend != "triton" and case["hw"] != [96, 128]
    for dtype, layout in ((torch.float32, torch.contiguous_format), (torch.float64, CHANNELS_LAST))[: 1 + wide]:
        data = vectors.tensors(name, case, dtype)
        arguments = [data[k].to(device).contiguous(memory_format=layout) for k in ("input", "mask") if k in data]
        with torch.no_grad():
            vectors.assert_close(net.to(dtype)(*arguments).cpu(), data["out"], case, "out")


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float64, torch.contiguous_format), (torch.float32, CHANNELS_LAST)],
    ids=["float64", "float32"],
)
def test_published_discriminator(dtype: torch.dtype, layout: Any) -> None:
    name = "aot_discriminator"
    data = vectors.tensors(name, vectors.meta(name)["cases"][0], dtype)
    case, state, model = recorded(name, "d64", "discriminator")
    net = copy.deepcopy(model.net).to(dtype)
    x = data["x"].contiguous(memory_format=layout).requires_grad_()
    found = {"eval_raw": net(x)}
    net.train()
    found["train1"] = net(x)
    (found["train1"] * data["g"]).sum().backward()
    found["gx"] = x.grad
    found["g_conv.0.weight_orig"] = net.conv[0].weight.grad
    found["g_conv.8.weight"] = net.conv[8].weight.grad
    found["train2"] = net(x)
    after = net.state_dict()
    for key in state:
        if key.endswith(("weight_u", "weight_v")):
            found[f"after_{key}"] = after[key]
    found["eval1"] = net.eval()(x)
    assert found.keys() == case["check"].keys()
    for field, value in found.items():
        vectors.assert_close(value.detach(), data[field], case, field)


def test_table() -> None:
    model = models.build_model("aot_gan")
    assert sum(p.numel() for p in model.parameters()) == 15_200_835
    assert sum(p.numel() for p in models.build_discriminator("aot_gan").parameters()) == 2_763_777
    shapes = [tuple(p.shape) for p in model.net.encoder.parameters() if p.dim() == 4]
    assert shapes == [(64, 4, 7, 7), (128, 64, 4, 4), (256, 128, 4, 4)]
    assert [block.pyramid.dilations for block in model.net.blocks] == [(1, 2, 4, 8)] * 8
    assert model.config == {"blocks": 8, "rates": (1, 2, 4, 8), "width": 64}


def test_the_net_s_range_and_polarity() -> None:
    """-1 to 1 with 1 in the holes, and a mask that is 1 in the holes."""
    model = lively(small()).eval()
    image, mask = picture(2, 36, 40)
    hole = 1 - mask
    x = (2 * image - 1) * mask + hole
    with torch.no_grad():
        out = model(image, mask)
        torch.testing.assert_close(out.image, (model.net(x, hole) + 1) / 2)
        assert torch.equal(model.net(torch.cat([x, hole], 1)), model.net(x, hole))
        torch.testing.assert_close(model.net(x[:1], hole[:1]), model.net(x, hole[:1])[:1], rtol=1e-3, atol=1e-4)
        planes = mask.repeat(1, 3, 1, 1)
        planes[:, 1, 20:30] = 0  # a hole in one plane
        assert torch.equal(model(image, planes).image, model(image, planes.amin(1, keepdim=True)).image)
    assert out.image.std() > 0.01 and out.mask.dtype == torch.uint8 and out.mask.shape == mask.shape and out.mask.all()


@pytest.mark.parametrize("size", [(97, 131), (1, 1), (5, 3), (36, 40)])
def test_any_size(backend: str, device: torch.device, size: tuple[int, int]) -> None:
    model = lively(small()).to(device)
    image, mask = (t.to(device) for t in picture(2, *size))
    mask[0, 0, 0, 0] = 1
    image = torch.where(mask.bool(), image, torch.nan)
    for mode in (True, False):
        out = model.train(mode)(image, mask)
        assert out.image.shape == image.shape and out.mask.shape == mask.shape
        assert out.image.min() >= 0 and out.image.max() <= 1
    filled = model.inpaint(image, mask)
    known = mask.expand_as(image) == 1
    assert torch.equal(filled[known], image[known])
    assert torch.isfinite(filled).all()


def test_padding_is_hole() -> None:
    model = lively(small()).eval()
    image, mask = picture(1, 37, 38)
    canvas, canvas_mask = torch.rand(1, 3, 40, 40), torch.zeros(1, 1, 40, 40)
    canvas[..., 1:38, 1:39], canvas_mask[..., 1:38, 1:39] = image, mask
    with torch.no_grad():
        torch.testing.assert_close(model(image, mask).image, model(canvas, canvas_mask).image[..., 1:38, 1:39])


def test_what_lies_under_the_hole_is_never_read(backend: str, device: torch.device) -> None:
    model = lively(small()).to(device)
    image, mask = (t.to(device) for t in picture())
    clean = model(image, mask).image.detach()
    image = torch.where(mask.bool(), image, torch.nan).requires_grad_()
    out = model(image, mask).image
    assert torch.equal(out, clean)
    out.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert image.grad.any() and torch.equal(image.grad * (1 - mask), torch.zeros_like(image))


def test_gradients_reach_every_parameter(backend: str, device: torch.device) -> None:
    """And are those of the reference."""
    dtype = torch.float64 if backend in ("reference", "cpu") else torch.float32
    model = lively(small(rates=(1, 3))).to(device, dtype)
    image, mask = (t.to(device, dtype) for t in picture())

    def gradients() -> dict[str, Tensor]:
        net = copy.deepcopy(model)
        net(image, mask).image.square().mean().backward()
        return {name: p.grad for name, p in net.named_parameters()}

    found = gradients()
    with use_backend("reference"):
        expected = gradients()
    rtol = 1e-8 if dtype == torch.float64 else 1e-3
    for name, gradient in found.items():
        if name.endswith("gate.bias"):  # without influence: the gate is normalised over the map
            assert gradient.abs().max() < rtol * expected[name.replace("bias", "weight")].abs().max(), name
        else:
            assert expected[name].any()
            assert (gradient - expected[name]).abs().max() <= rtol * expected[name].abs().max(), name


def test_a_training_step_lowers_the_loss() -> None:
    model = lively(small()).train()
    image, mask = picture(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.l1_loss(model(image, mask).image, image)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compiles_without_a_graph_break(backend: str, device: torch.device, train: bool) -> None:
    torch.compiler.reset()
    model = lively(small(blocks=1, width=4)).train(train).to(device)
    image, mask = (t.to(device) for t in picture(1, 38, 37))
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        out = run(image, mask).image
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * one.abs().max().item() + 1e-7)


def test_exports(backend: str, device: torch.device) -> None:
    model = lively(small(blocks=1, width=4)).eval().to(device)
    image, mask = (t.to(device) for t in picture(1, 38, 37))
    exported = torch.export.export(model, (image, mask)).module()
    torch.testing.assert_close(exported(image, mask).image, model(image, mask).image, rtol=1e-4, atol=1e-5)


def test_the_discriminator_compiles_and_exports() -> None:
    torch.compiler.reset()
    eager, compiled = critic(4).train(), critic(4).train()
    compiled.load_state_dict(eager.state_dict())
    image, mask = picture(1, 24, 24)
    scores = [f(image, mask) for f in (eager, torch.compile(compiled, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(scores[1], scores[0])
    for score in scores:
        score.mean().backward()
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)
    for one, other in zip(eager.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(other, one)
    exported = torch.export.export(eager.eval(), (image, mask)).module()
    torch.testing.assert_close(exported(image, mask), eager(image, mask))


@pytest.mark.parametrize("how", ["autocast", torch.bfloat16, torch.float16], ids=["autocast", "bfloat16", "float16"])
def test_half_precision(backend: str, device: torch.device, how: Any) -> None:
    model, discriminator = lively(small()).eval().to(device), critic().eval().to(device)
    image, mask = (t.to(device) for t in picture())
    with torch.no_grad():
        expected = model(image, mask).image, discriminator(image, mask)
        if how == "autocast":
            with torch.autocast(device.type, dtype=torch.bfloat16):
                found = model(image, mask).image, discriminator.train()(image, mask)
        else:
            found = model.to(how)(image.to(how), mask).image, discriminator.to(how)(image.to(how), mask)
    for one, other in zip(expected, found, strict=True):
        assert other.dtype == (torch.bfloat16 if how == "autocast" else how)
        assert (other.float() - one).abs().mean() < 0.05 * one.std()


def test_a_singular_value_is_never_of_half_precision() -> None:
    layer = SpectralConv2d(3, 8, 4)
    expected = copy.deepcopy(layer).normalised_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.normalised_weight(), expected)


def test_copies_and_layouts(backend: str, device: torch.device) -> None:
    model = lively(small()).eval().to(device)
    image, mask = (t.to(device) for t in picture())
    with torch.no_grad():
        expected = model(image, mask).image
        assert torch.equal(copy.deepcopy(model)(image, mask).image, expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(image, mask).image, expected)
        assert torch.equal(model(image.contiguous(memory_format=CHANNELS_LAST), mask).image, expected)
        keys = list(model.state_dict())
        model.to(memory_format=CHANNELS_LAST)
        torch.testing.assert_close(model(image, mask.bool()).image, expected, rtol=1e-3, atol=1e-4)
        with use_backend("reference"):
            torch.testing.assert_close(model(image, mask).image, expected, rtol=1e-3, atol=1e-4)
    assert list(model.state_dict()) == keys


def test_features_stay_channels_last() -> None:
    model, seen = small().eval(), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, out: seen.append(out.is_contiguous(memory_format=CHANNELS_LAST)))
    model(*picture())
    assert len(seen) >= 6 and all(seen)


def test_discriminator() -> None:
    model = critic().eval()
    image, mask = picture(2, 64, 80)
    score = model(image, mask)
    assert score.shape == (2, 1, 6, 8)
    assert torch.equal(score, model.net(2 * image - 1))
    assert torch.equal(score, model(image, 1 - mask, torch.full_like(image, torch.nan)))
    assert torch.equal(score, copy.deepcopy(model)(image, mask))
    assert model(image[..., :24, :24], mask[..., :24, :24]).shape == (2, 1, 1, 1)
    model.train()
    real, fake = model(image, mask), model(image.flip(3), mask)  # one backward through two steps of the power iteration
    (real.square() + (1 - fake).square()).mean().backward()
    assert all(p.grad.any() for p in model.parameters())
    assert not torch.equal(model(image, mask), real)


@pytest.mark.parametrize("always", [False, True])
def test_spectral_norm(always: bool) -> None:
    """Converges in training, or always; stands still otherwise; and is pickled."""
    layer = SpectralConv2d(3, 8, 4, always=always).double()
    expected = (layer.weight / torch.linalg.matrix_norm(layer.weight.flatten(1), 2)).detach()
    before = layer.eval().normalised_weight()
    torch.testing.assert_close(before, expected, rtol=0.05, atol=0)
    assert torch.equal(layer.normalised_weight(), before) != always
    for _ in range(300):
        converged = layer.train(not always).normalised_weight()
    torch.testing.assert_close(converged, expected)
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    again = pickle.loads(pickle.dumps(layer.eval()))
    torch.testing.assert_close(again(x), nn.functional.conv2d(x, expected, layer.bias))


@pytest.mark.parametrize("names", [dict, mmagic_names], ids=["aot-gan", "mmagic"])
def test_files_of_either_source(tmp_path: Path, names: Any) -> None:
    """Sizes are seen in the file; whole files hold both parts and the losses' weights."""
    model, discriminator = lively(small(blocks=3, rates=(2, 3))).eval(), critic(64).eval()
    image, mask = picture()
    generator = names(authors_names(model.net.state_dict(), 2))
    judge = {}
    for key, value in discriminator.net.state_dict().items():
        judge[f"{key}_orig" if key.endswith(".weight") and not key.startswith("conv.8") else key] = value
    judge = names(judge)
    torch.save(generator, tmp_path / "G0000001.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in judge.items()}}, tmp_path / "D0000001.pt")
    given = [(tmp_path / "G0000001.pt", tmp_path / "D0000001.pt")]
    if names is mmagic_names:
        whole = {f"generator.{k}": v for k, v in generator.items()} | {f"disc.{k}": v for k, v in judge.items()}
        given.append(2 * ({"meta": {}, "state_dict": {**whole, "loss_percep.vgg.mean": torch.zeros(1)}},))
    with torch.no_grad():
        for one, other in given:
            loaded = models.load_published("aot_gan", one, rates=(2, 3))
            assert loaded.config == model.config and not loaded.training
            assert torch.equal(loaded(image, mask).image, model(image, mask).image)
            loaded = models.load_published("aot_gan", other, part="discriminator")
            assert torch.equal(loaded(image, mask), discriminator(image, mask))


def test_mmagic_s_names_are_those_of_the_vectors() -> None:
    meta = vectors.meta("mmagic_aot")
    mapped = {key: torch.empty(0) for key in vectors.meta("aot_generator")["networks"]["InpaintGenerator_8"]["keys"]}
    assert set(mmagic_names(mapped)) == set(meta["networks"]["AOTEncoderDecoder"]["keys"])
    mapped = {key: torch.empty(0) for key in vectors.meta("aot_discriminator")["networks"]["Discriminator"]["keys"]}
    assert set(mmagic_names(mapped)) == set(meta["networks"]["SoftMaskPatchDiscriminator"]["keys"])


def test_own_files(tmp_path: Path) -> None:
    model, discriminator = lively(small(rates=(1, 5))).eval(), critic(64).eval()
    image, mask = picture()
    path = tmp_path / "a.safetensors"
    write_safetensors(path, model.state_dict(), {"key": "aot_gan", "part": "generator", "config": model.config})
    torch.save({"model": discriminator.state_dict()}, tmp_path / "d.pth")
    with torch.no_grad():
        for loaded in (
            models.load_published("aot_gan", path),
            models.load_published("aot_gan", model.state_dict(), rates=(1, 5)),
            models.load_published("aot_gan", model.net.state_dict(), rates=(1, 5)),
        ):
            assert loaded.config == model.config
            assert torch.equal(loaded(image, mask).image, model(image, mask).image)
        loaded = models.load_published("aot_gan", tmp_path / "d.pth", part="discriminator")
        assert torch.equal(loaded(image, mask), discriminator(image, mask))


@pytest.mark.parametrize("names", [dict, mmagic_names], ids=["aot-gan", "mmagic"])
def test_files_that_do_not_fit(names: Any) -> None:
    state = names(authors_names(small().net.state_dict()))
    fuse = "middle.1.fuse.1" if names is dict else "dilation_neck.model.1.fuse.1.conv"
    last = "decoder.4" if names is dict else "decoder.decoder.2.conv"
    del state[f"{fuse}.bias"]
    state["encoder.9.weight"] = torch.zeros(1)
    state[f"{last}.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as failure:
        models.load_published("aot_gan", state)
    assert str(failure.value) == (
        "load_published: checkpoint must be a state dict of this network, got missing blocks.1.fuse.bias; unexpected "
        f"encoder.9.weight; {last}.bias of (5,) instead of (3,) (1 missing, 1 unexpected, 1 mis-shaped)"
    )
    with pytest.raises(ValueError, match=r"checkpoint must be one of a known source \(aot-gan, mmagic"):
        models.load_published("aot_gan", state, part="discriminator")
    five = names(authors_names(small().net.state_dict()))
    with pytest.raises(ValueError, match=r"missing blocks.0.pyramid.weight; unexpected .*(block00|blocks.0).*weight"):
        models.load_published("aot_gan", five, rates=(1, 2, 3, 4, 5, 6, 7, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(blocks=0), "aot_gan: blocks must be 1 or more, got 0"),
        (
            lambda: small(rates=(1, 2, 3)),
            r"aot_gan: rates must be positive, of a number that divides 32, got \(1, 2, 3\)",
        ),
        (lambda: small(rates=(0, 1)), r"aot_gan: rates must be positive, of a number that divides 32, got \(0, 1\)"),
        (
            lambda: small()(torch.rand(1, 1, 8, 8), torch.ones(1, 1, 8, 8)),
            r"aot_gan: image must have 3 channels, got \(1, 1, 8, 8\)",
        ),
        (
            lambda: small().net(torch.rand(1, 3, 40, 40)),
            r"aot_gan: x must be \(N, 4, H, W\) without a mask, got \(1, 3, 40, 40\)",
        ),
        (
            lambda: small().net(torch.rand(1, 4, 40, 40), torch.rand(1, 1, 40, 40)),
            r"aot_gan: x must be \(N, 3, H, W\) beside a mask, got \(1, 4, 40, 40\)",
        ),
        (
            lambda: small().net(torch.rand(1, 4, 40, 42)),
            "aot_gan: x must have sides that are multiples of 4 from 36 on, got 40 x 42",
        ),
        (
            lambda: small(rates=(1, 2)).net(torch.rand(1, 4, 12, 8)),
            "aot_gan: x must have sides that are multiples of 4 from 12 on, got 12 x 8",
        ),
        (
            lambda: critic()(torch.rand(1, 3, 23, 64), torch.ones(1, 1, 23, 64)),
            r"aot_gan: x must be \(N, 3, H, W\) with sides of at least 24, got \(1, 3, 23, 64\)",
        ),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()
