# SPDX-License-Identifier: Apache-2.0
"""The papers' losses against the published code's numbers, and on what their code does not survive."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vectors import assert_close, meta, state, tensors

from fused_inpaint import losses, models

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def case(name: str, key: str) -> dict[str, Any]:
    return next(c for c in meta(name)["cases"] if c["id"] == key)


def stand_in(image: Tensor) -> list[Tensor]:
    """The recorded losses' features instead of VGG's: three scales, each with its squares and complement."""
    a = F.avg_pool2d(image, 4)
    return [torch.cat([t, t * t, 1 - t], 1) for t in (a, F.avg_pool2d(a, 2), F.avg_pool2d(a, 4))]


@DTYPES
def test_partial_convolutions(dtype: torch.dtype) -> None:
    """Every term, their weighted sum, and its gradient."""
    c, weights = case("naoto_losses", "l0"), meta("naoto_losses")["weights"]
    t = tensors("naoto_losses", c, dtype)
    output = t["output"].requires_grad_()
    composite = losses.composite(output, t["input"], t["mask"])
    valid, hole = losses.valid_and_hole_l1(output, t["gt"], t["mask"])
    made = [stand_in(image) for image in (output, composite)]
    target = stand_in(t["gt"])
    terms = {
        "valid": valid,
        "hole": hole,
        "prc": sum(losses.perceptual(f, target) for f in made),
        "style": sum(losses.style(f, target) for f in made),
        "tv": losses.total_variation(composite),
    }
    total = sum(weights[name] * term for name, term in terms.items())
    (gradient,) = torch.autograd.grad(total, output)
    for name, term in terms.items():
        assert_close(term.detach(), t[name], c, name)
    assert_close(total.detach(), t["total"], c, "total")
    assert_close(gradient, t["g_output"], c, "g_output")


@DTYPES
@pytest.mark.parametrize("key", ["smgan0", "smgan1", "smgan2", "nsgan0"])
def test_aot_adversarial(key: str, dtype: torch.dtype) -> None:
    c = case("aot_losses", key)
    t = tensors("aot_losses", c, dtype)
    fake, real = t["d_fake"].requires_grad_(), t["d_real"].requires_grad_()
    if c["kind"] == "smgan":
        valid = 1 - t["mask"]
        made = losses.discriminator_soft_mask(real, fake, valid)
        fooled = losses.generator_soft_mask(fake, valid)
    else:
        made, fooled = losses.discriminator_bce(real, fake), losses.generator_bce(fake)
    assert_close(made.detach(), t["dis_loss"], c, "dis_loss")
    assert_close(fooled.detach(), t["gen_loss"], c, "gen_loss")
    for name, gradient in zip(("g_d_real_dis", "g_d_fake_dis"), torch.autograd.grad(made, (real, fake)), strict=True):
        assert_close(gradient, t[name], c, name)
    assert_close(torch.autograd.grad(fooled, fake)[0], t["g_d_fake_gen"], c, "g_d_fake_gen")


@DTYPES
@pytest.mark.parametrize("key, loss", [("style0", losses.style), ("percep0", losses.perceptual)])
def test_aot_features(key: str, loss: Any, dtype: torch.dtype) -> None:
    c = case("aot_losses", key)
    t = tensors("aot_losses", c, dtype)
    output = [t[f"xf_{layer}"].requires_grad_() for layer in c["layers"]]
    found = loss(output, [t[f"yf_{layer}"] for layer in c["layers"]])
    assert_close(found.detach(), t["loss"], c, "loss")
    for layer, gradient in zip(c["layers"], torch.autograd.grad(found, output), strict=True):
        assert_close(gradient, t[f"g_xf_{layer}"], c, f"g_xf_{layer}")


@DTYPES
def test_deepgin(dtype: torch.dtype) -> None:
    c = case("gin_losses", "tv")
    t = tensors("gin_losses", c, dtype)
    x = t["x"].requires_grad_()
    found = 2 * losses.total_variation(x, power=2)
    assert_close(found.detach(), t["loss"], c, "loss")
    assert_close(torch.autograd.grad(found, x)[0], t["gx"], c, "gx")
    c = case("gin_losses", "gan")
    t = tensors("gin_losses", c, dtype)
    maps = [t["p0"].requires_grad_(), t["p1"].requires_grad_()]
    none = [torch.full_like(m, -9.0).requires_grad_(False) for m in maps]
    for name, found in (
        ("d_real", losses.discriminator_hinge(maps, none)),
        ("d_fake", losses.discriminator_hinge([-n for n in none], maps)),
        ("g_real", losses.generator_hinge(maps)),
    ):
        assert_close(found.detach(), t[name], c, name)
        for at, gradient in enumerate(torch.autograd.grad(found, maps)):
            assert_close(gradient, t[f"g_{name}_p{at}"], c, f"g_{name}_p{at}")


def test_region_wise() -> None:
    """The recorded sums are of the whole batch, with the weights 1e-3 of the style and 1e-5 of the correlation."""
    c = case("regionwise_losses", "stage0")
    t = tensors("regionwise_losses", {"id": "common"}, torch.float64)
    image, mask = t["image255"] / 127.5 - 1, t["mask"]
    inferred, perceived = (stand_in(losses.composite(t[f"image_p{i}"], image, mask)) for i in (1, 2))
    target = stand_in(image)
    recorded = tensors("regionwise_losses", c, torch.float64)
    style = 1e-3 * losses.style(perceived, target, "sum")
    correlation = 1e-5 * losses.correlation(inferred[1], target[1])
    # image_p1 and image_p2 are stored as float32.
    assert abs(style.item() / recorded["style_loss"].item() - 1) < 2e-6
    assert abs(correlation.item() / recorded["cor_loss"].item() - 1) < 2e-6


def test_region_wise_adversarial() -> None:
    """Through the published discriminator's weights; what the generator's sum exceeds the stage before by."""
    t = tensors("regionwise_losses", {"id": "common"}, torch.float64)
    steps = {k.removeprefix("u_"): v for k, v in t.items() if k.startswith("u_")}
    weights = {k: v.double() for k, v in state(meta("regionwise_losses")["networks"]["all"], 531).items()} | steps
    net = models.load_published("region_wise", weights, part="discriminator").net
    image, mask = t["image255"] / 127.5 - 1, t["mask"]
    with torch.no_grad():
        real, *fakes = (net(x * (1 - mask), mask) for x in (image, t["image_p1"], t["image_p2"]))
    before, after = (
        tensors("regionwise_losses", case("regionwise_losses", key), torch.float64)
        for key in ("stage0", "stage1_default")
    )
    made = losses.discriminator_region_wise(real, fakes, mask)
    assert abs(made.item() / after["adv_d_loss"].item() - 1) < 1e-6
    fooled = losses.generator_region_wise(fakes, mask)
    # Two float32 numbers of 44000 are 0.004 apart at the least.
    assert abs(fooled.item() - (after["g_loss"] - before["g_loss"]).item()) < 0.008


def test_total_variation_of_hole() -> None:
    """Against a loop over pixels."""
    image, mask = torch.rand(2, 3, 7, 9, dtype=torch.float64), (torch.rand(2, 1, 7, 9) > 0.2).float()
    grown = F.max_pool2d(1 - mask, 3, 1, 1)
    expected = 0.0
    for n in range(2):
        for i in range(7):
            for j in range(9):
                for k, m in ((i + 1, j), (i, j + 1)):
                    if k < 7 and m < 9 and grown[n, 0, i, j] and grown[n, 0, k, m]:
                        expected += (image[n, :, i, j] - image[n, :, k, m]).abs().sum().item()
    assert abs(losses.total_variation_of_hole(image, mask).item() - expected / image.numel()) < 1e-12


@pytest.mark.parametrize("size", [(1, 3, 1, 1), (2, 3, 1, 5), (1, 3, 4, 1)])
def test_thin_images(size: tuple[int, ...]) -> None:
    image, mask = torch.rand(size, requires_grad=True), torch.zeros(size[0], 1, *size[2:])
    for found in (losses.total_variation(image), losses.total_variation_of_hole(image, mask)):
        assert found.isfinite() and torch.autograd.grad(found, image)[0].isfinite().all()


def test_values_that_are_left_out_may_be_anything() -> None:
    mask = torch.ones(1, 1, 4, 4)
    mask[..., :2] = 0
    output = torch.rand(1, 3, 4, 4)
    target = torch.rand(1, 3, 4, 4).masked_fill(mask == 0, torch.nan)
    output.requires_grad_()
    valid, _ = losses.valid_and_hole_l1(output, target, mask)
    assert losses.composite(output, target, mask).isfinite().all()
    assert valid.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_do_not_overflow(dtype: torch.dtype) -> None:
    """Gram sums of large features exceed float16's largest number."""
    a, b = (40 * torch.rand(1, 32, 32, 32) for _ in range(2))
    exact = losses.style([a.to(dtype).double()], [b.to(dtype).double()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses.style([a.to(dtype).requires_grad_()], [b.to(dtype)])
    assert found.dtype == torch.float32
    assert abs(found.item() / exact.item() - 1) < 1e-4


def vgg_layers(depth: int, names: Sequence[str], image: Tensor, state: dict[str, Tensor]) -> list[Tensor]:
    """Layer by layer from the published table, without the module."""
    plan = {
        16: "1 1 P 2 2 P 3 3 3 P 4 4 4 P 5 5 5 P",
        19: "1 1 P 2 2 P 3 3 3 3 P 4 4 4 4 P 5 5 5 5 P",
    }[depth].split()
    x = (image - torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)) / torch.tensor((0.229, 0.224, 0.225)).view(
        1, 3, 1, 1
    )
    at, block, number, found = 0, 1, 0, {}
    for step in plan:
        if step == "P":
            if f"features.{at}.weight" not in state and not any(int(k.split(".")[1]) > at for k in state):
                found.setdefault(f"pool{block}", F.max_pool2d(x, 2))
                break
            x = F.max_pool2d(x, 2)
            found[f"pool{block}"] = x
            at, block, number = at + 1, block + 1, 0
            continue
        if f"features.{at}.weight" not in state:
            break
        x = F.relu(F.conv2d(x, state[f"features.{at}.weight"], state[f"features.{at}.bias"], padding=1))
        number += 1
        found[f"relu{block}_{number}"] = x
        at += 2
    return [found[name] for name in names]


@pytest.mark.parametrize(
    "depth, layers, last",
    [(16, ("pool1", "pool2", "pool3"), "features.14"), (19, ("relu1_1", "relu3_4", "relu5_2"), "features.30")],
)
def test_vgg(depth: int, layers: tuple[str, ...], last: str, tmp_path) -> None:
    vgg = losses.VGG(depth, layers)
    state = vgg.state_dict()
    assert list(state)[-1].startswith(last)  # torchvision's place of the last convolution in use
    image = torch.rand(1, 3, 32, 32)
    for found, expected in zip(vgg(image), vgg_layers(depth, layers, image, state), strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    whole = {**{k: v + 1 for k, v in state.items()}, "classifier.0.weight": torch.ones(2, 2)}
    torch.save(whole, tmp_path / "vgg.pth")
    loaded = losses.VGG(depth, layers, tmp_path / "vgg.pth")
    assert all(torch.equal(v, whole[k]) for k, v in loaded.state_dict().items())
    assert not any(p.requires_grad for p in loaded.parameters())
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    losses.perceptual(vgg(x)[:1], loaded(x.detach())[:1]).backward()
    assert x.grad.abs().sum() > 0


def test_refusals(tmp_path) -> None:
    for arguments, sentence in (
        ((18, ("relu1_1",)), r"VGG: depth must be 16 or 19, got 18"),
        ((16, ("relu1_3",)), r"VGG: layers must be of relu1_1, .*, got relu1_3"),
        ((16, ()), r"VGG: layers must be of relu1_1, .*, got none"),
        ((16, ("relu1_1",), tmp_path / "none.pth"), r"VGG: weights must be an existing file, got "),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}"):
            losses.VGG(*arguments)
    torch.save({"features.0.weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"got none of this shape for features.0.weight in "):
        losses.VGG(16, ("relu1_1",), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"^style: reduction must be mean or sum, got max$"):
        losses.style([torch.ones(1, 1, 1, 1)], [torch.ones(1, 1, 1, 1)], "max")
    with pytest.raises(ValueError, match=r"^losses: features must be of the same layers, at least one, got 1 and 0$"):
        losses.perceptual([torch.ones(1, 1, 1, 1)], [])
