# SPDX-License-Identifier: Apache-2.0
"""The PConv U-Net under region normalization and its discriminator: Table 2, the paper's layers one by one, any size,
training, compilation, checkpoints. The published network of the same key is in test_rn.py."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_inpaint import LearnedRegionNorm2d, RegionNorm2d, models, ops, use_backend
from fused_inpaint.models.files import write_safetensors

NAN = float("nan")


@pytest.fixture(autouse=True)
def _small(one_thread: None) -> None:
    """Sizes are small."""


def small(levels: int = 3, width: int = 8, **config: Any) -> Any:
    return models.build_model("cgan_pc_rn", levels=levels, width=width, **config)


def critic(width: int = 4, **config: Any) -> Any:
    return models.build_discriminator("cgan_pc_rn", width=width, **config)


def picture(n: int = 2, height: int = 24, width: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    mask = (torch.rand(n, 1, height, width) > 0.2).to(dtype)
    mask[..., 3:12, 4:9] = 0
    return torch.rand(n, 3, height, width, dtype=dtype), mask


def randomise(net: nn.Module) -> None:
    """Away from the initial state: biases everywhere, and maps that cross their threshold."""
    for module in net.modules():
        if isinstance(module, RegionNorm2d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        elif isinstance(module, LearnedRegionNorm2d):
            nn.init.normal_(module.map_conv.weight, std=0.3)
            nn.init.normal_(module.beta_conv.bias)


def test_table_2() -> None:
    with torch.device("meta"):
        net = models.build_model("cgan_pc_rn").net
    convs = [block.conv for block in (*net.encoder, *net.decoder)]
    assert sum(conv.weight.numel() for conv in convs) == 32_848_849
    encoder, decoder = ([block.norm for block in side] for side in (net.encoder, net.decoder))
    assert encoder[0] is None and all(isinstance(norm, RegionNorm2d) for norm in encoder[1:])
    assert decoder[-1] is None and all(isinstance(norm, LearnedRegionNorm2d) for norm in decoder[:-1])
    assert [norm.num_features for norm in encoder[1:]] == [128, 256, *[512] * 5]
    assert [norm.num_features for norm in decoder[:-1]] == [*[512] * 4, 256, 128, 64]
    assert all(norm.threshold == 0.8 for norm in decoder[:-1])
    # Weight and bias of two regions for 2944 channels; 98 + 49 + 1 + 49 + 1 for each RN-L; the last layer's 3 biases.
    assert sum(p.numel() for p in net.parameters()) == 32_848_849 + 4 * 2944 + 7 * 198 + 3


def test_discriminator_is_that_of_pix2pix() -> None:
    with torch.device("meta"):
        net = models.build_discriminator("cgan_pc_rn").net
    assert sum(p.numel() for p in net.parameters()) == 2_768_705
    assert [conv.out_channels for conv in net.convs] == [64, 128, 256, 512, 1]
    assert [conv.stride[0] for conv in net.convs] == [2, 2, 2, 1, 1]


def paper(net: Any, x: Tensor, mask: Tensor, stats: str) -> Tensor:
    """The paper's layers one after the other: nothing fused, nothing zeroed but by the convolutions themselves."""
    features, masks = [x], [mask]
    unread = []  # what norms leave in holes
    for i, block in enumerate(net.encoder):
        conv, norm = block.conv, block.norm
        y, m = ops.partial_conv2d(features[-1], masks[-1], conv.weight, None, 2, conv.padding)
        if i:
            y = ops.region_norm(y, m, norm.weight, norm.bias, stats=stats)
            unread.append(y.detach().abs().amax(1, keepdim=True)[m.expand(y.size(0), -1, -1, -1) == 0])
        features.append(F.relu(y))
        masks.append(m)
    h, m = features.pop(), masks.pop()
    regions = []
    for block in net.decoder:
        conv, norm = block.conv, block.norm
        h, m = ops.partial_upconv2d(h, m, features.pop(), masks.pop(), conv.weight, conv.bias)
        if norm is not None:
            belongs = torch.sigmoid(F.conv2d(ops.channel_pool(h), norm.map_conv.weight, padding=3))
            regions.append((belongs >= 0.8).float().mean().item())
            scale, shift = 1 + norm.gamma_conv(belongs), norm.beta_conv(belongs)
            h = ops.region_norm(h, belongs >= 0.8, scale=scale, shift=shift, stats=stats)
            unread.append(h.detach().abs().amax(1, keepdim=True)[m.expand(h.size(0), -1, -1, -1) == 0])
            h = F.leaky_relu(h, 0.2)
    assert all(values.numel() and values.min() > 0 for values in unread), "every layer must have holes that hold values"
    assert any(0.05 < region < 0.95 for region in regions), "a map must cross its threshold"
    return h


@pytest.mark.parametrize("stats", ["batch", "instance"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_equals_the_papers_layers(backend: str, device: torch.device, stats: str, layout: torch.memory_format) -> None:
    """In value and in every gradient; holes that the norms would fill with their biases reach nothing."""
    exact = device.type == "cpu" and backend != "triton"
    dtype, tolerance = (torch.float64, 1e-9) if exact else (torch.float32, 1e-3)
    net = small(levels=4, stats=stats).net.to(dtype)
    randomise(net)
    x, mask = torch.randn(2, 3, 64, 48, dtype=dtype), torch.zeros(2, 1, 64, 48, dtype=dtype)
    mask[0, :, 8:11, 3:7] = 1
    mask[1, :, 30:33, 40:43] = 1
    cotangent = torch.randn(2, 3, 64, 48, dtype=dtype)

    def found(call: Any, module: nn.Module, where: torch.device) -> list[Tensor]:
        leaf = x.to(where).contiguous(memory_format=layout).requires_grad_()
        y = call(module, leaf, mask.to(where))
        y.backward(cotangent.to(where))
        return [t.detach().cpu() for t in (y, leaf.grad, *(p.grad for p in module.parameters()))]

    actual = found(lambda m, *given: m(*given)[0], copy.deepcopy(net).to(device), device)
    with use_backend("reference"):
        expected = found(lambda m, *given: paper(m, *given, stats), copy.deepcopy(net), torch.device("cpu"))
    names = ["y", "x", *(name for name, _ in net.named_parameters())]
    for name, a, e in zip(names, actual, expected, strict=True):
        assert (a - e).abs().max() <= tolerance * e.abs().max() + 1e-12, name
        if name.startswith("encoder") and "norm" in name:
            assert not a[0].any() and a[1].any(), name


def test_partial_convolution_alone() -> None:
    """The paper's baseline is the network of pconv.py."""
    model, other = small(norm="batch").eval(), models.build_model("pconv", levels=3, width=8).eval()
    other.load_state_dict(model.state_dict())
    image, mask = picture()
    with torch.no_grad():
        assert torch.equal(model(image, mask).image, other(image, mask).image)
        assert not torch.allclose(small().eval()(image, mask).image, other(image, mask).image)


def test_the_network_sees_imagenet_normalised_pictures() -> None:
    model = small().eval()
    image, mask = picture()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    with torch.no_grad():
        out, out_mask = model.net((image - mean) / std, mask)
        torch.testing.assert_close(model(image, mask).image, (out * std + mean).clamp(0, 1))
    assert torch.equal(out_mask[:, :1] != 0, model(image, mask).mask != 0)


def test_statistics_of_each_picture_alone() -> None:
    image, mask = picture()
    for stats, alike in (("instance", True), ("batch", False)):
        model = small(stats=stats).eval()
        with torch.no_grad():
            together, alone = model(image, mask).image[:1], model(image[:1], mask[:1]).image
        assert torch.allclose(together, alone, atol=1e-6) == alike


def test_one_mask_serves_a_batch() -> None:
    model = small().eval()
    image, mask = picture()
    mask[..., :16, :] = 0  # so that holes are left in the decoder, too
    with torch.no_grad():
        expected = model(image, mask[:1].repeat(2, 1, 1, 1))
        torch.testing.assert_close(model(image, mask[:1]).image, expected.image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(97, 131), (1, 1), (5, 3)])
def test_any_size(backend: str, device: torch.device, size: tuple[int, int]) -> None:
    model = small().eval().to(device)
    image, mask = torch.rand(1, 3, *size, device=device), (torch.rand(1, 1, *size, device=device) > 0.3).float()
    mask[..., 0, 0] = 1
    poisoned = image.masked_fill(mask == 0, NAN)
    out = model(poisoned, mask)
    assert out.image.shape == image.shape and out.mask.shape == mask.shape and out.mask.dtype == torch.uint8
    assert out.image.min() >= 0 and out.image.max() <= 1
    filled = model.inpaint(poisoned, mask)
    known = mask.expand_as(image) == 1
    assert torch.equal(filled[known], image[known]) and torch.isfinite(filled).all()


def test_one_pixel_or_none() -> None:
    image, mask = torch.rand(1, 3, 1, 1), torch.ones(1, 1, 1, 1)
    for m in (mask, 0 * mask):
        assert torch.isfinite(small().eval()(image, m).image).all()


@pytest.mark.parametrize("planes", [1, 3])
def test_training_reads_nothing_under_the_hole(backend: str, device: torch.device, planes: int) -> None:
    model = small().train().to(device)
    image, mask = (t.to(device) for t in picture())
    mask = mask.repeat(1, planes, 1, 1)
    mask[:, -1, :5, :5] = 0
    found = []
    for given in (image, image.masked_fill(mask == 0, NAN)):
        model.zero_grad()
        out = model(given, mask).image
        out.square().mean().backward()
        found.append((out.detach(), [p.grad.clone() for p in model.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    for (name, _), grad, poisoned in zip(model.named_parameters(), found[0][1], found[1][1], strict=True):
        assert torch.equal(grad, poisoned) and grad.abs().max() > 0, name


def test_predictions_are_clamped_in_eval_mode_only() -> None:
    model = small().train()
    model.net.decoder[-1].conv.bias.data += 9
    image, mask = picture()
    with torch.no_grad():
        assert model(image, mask).image.max() > 1
        assert model.eval()(image, mask).image.max() == 1


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compiles_without_a_graph_break(backend: str, device: torch.device, train: bool) -> None:
    torch.compiler.reset()
    model = small(levels=2, width=4).train(train).to(device)
    image, mask = (t.to(device) for t in picture(2, 13, 10))
    expected = copy.deepcopy(model)(image, mask).image
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(image, mask).image
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    out.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_exports(backend: str, device: torch.device) -> None:
    model = small(levels=2, width=4).eval().to(device)
    image, mask = (t.to(device) for t in picture(1, 16, 12))
    exported = torch.export.export(model, (image, mask)).module()
    torch.testing.assert_close(exported(image, mask).image, model(image, mask).image, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Under autocast and with half weights, close to float32; maps of fresh weights are far from their threshold."""
    model = small().eval().to(device)
    image, mask = (t.to(device) for t in picture(2, 32, 32))
    with torch.no_grad():
        expected = model(image, mask).image
        with torch.autocast(device.type, dtype=dtype):
            mixed = model(image, mask).image
        halved = copy.deepcopy(model).to(dtype)(image.to(dtype), mask).image
    assert halved.dtype == dtype
    for out in (mixed, halved):
        assert (out.float() - expected).abs().mean() < 0.02 and expected.std() > 0.1


def test_copies_and_pickles_and_channels_last() -> None:
    model = small().eval()
    image, mask = picture()
    with torch.no_grad():
        expected = model(image, mask).image
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(image, mask).image, expected)
        assert torch.equal(model(image.contiguous(memory_format=torch.channels_last), mask).image, expected)
        names = list(model.state_dict())
        with use_backend("reference"):
            torch.testing.assert_close(model(image, mask).image, expected, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == names


def test_a_patch_is_70_pixels_wide() -> None:
    net = critic().eval()
    image = torch.rand(1, 3, 160, 160).requires_grad_()
    net(image, torch.ones(1, 1, 160, 160))[0, 0, 9, 9].backward()
    seen = image.grad.abs().amax((0, 1)) > 0
    assert seen.any(0).sum() == 70 and seen.any(1).sum() == 70


def test_discriminator_sees_both_pictures() -> None:
    net = critic().eval()
    image, mask = picture(2, 32, 48)
    given = torch.rand_like(image)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    with torch.no_grad():
        scores = net(image, mask, given.masked_fill(mask == 0, NAN))
        expected = net.net(torch.cat([(given - mean) / std * mask, (image - mean) / std], 1))
        torch.testing.assert_close(scores, expected)
        torch.testing.assert_close(net(image, mask), net(image, mask, image))
        assert not torch.allclose(net(image, mask), scores)


def test_discriminator_trains() -> None:
    net = critic().train()
    image, mask = picture(2, 32, 48)
    image.requires_grad_()
    expected = net(image, mask)
    F.binary_cross_entropy_with_logits(expected, torch.ones_like(expected)).backward()
    assert all(p.grad.abs().max() > 0 for p in (image, *net.parameters()))
    compiled = torch.compile(critic().eval(), fullgraph=True, backend="aot_eager")
    assert torch.isfinite(compiled(image.detach(), mask)).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (net(image, mask).float() - expected).abs().max() < 0.1


@pytest.mark.parametrize("config", [{}, {"norm": "batch"}, {"levels": 2, "width": 4}], ids=str)
def test_own_checkpoints(config: dict[str, Any]) -> None:
    model = small(**config).eval()
    randomise(model)
    image, mask = picture()
    for state in (model.state_dict(), model.net.state_dict(), {"generator": model.state_dict()}):
        loaded = models.load_published("cgan_pc_rn", state)
        with torch.no_grad():
            assert torch.equal(loaded(image, mask).image, model(image, mask).image)


def test_own_files_remember_what_no_key_shows(tmp_path: Path) -> None:
    model = small(stats="instance").eval()
    about = {"key": model.key, "part": "generator", "config": model.config}
    write_safetensors(tmp_path / "a.safetensors", model.state_dict(), about)
    loaded = models.load_published("cgan_pc_rn", tmp_path / "a.safetensors")
    image, mask = picture()
    with torch.no_grad():
        assert torch.equal(loaded(image, mask).image, model(image, mask).image)


def test_own_discriminator_checkpoints() -> None:
    net = critic(64).eval()
    image, mask = picture(1, 32, 32)
    for state in (net.state_dict(), net.net.state_dict()):
        loaded = models.load_published("cgan_pc_rn", state, part="discriminator")
        with torch.no_grad():
            assert torch.equal(loaded(image, mask), net(image, mask))


def test_checkpoints_that_do_not_fit() -> None:
    state = small().net.state_dict()
    del state["encoder.1.norm.weight"]
    state["decoder.0.norm.extra"] = torch.zeros(1)
    state["encoder.2.norm.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as failure:
        models.load_published("cgan_pc_rn", state)
    for part in ("missing encoder.1.norm.weight", "unexpected decoder.0.norm.extra", "encoder.2.norm.bias of (5,)"):
        assert part in str(failure.value)


BATCH = {"norm": "batch", "stats": "instance"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(norm="layer"), "norm must be region or batch, got layer"),
        (lambda: small(stats="layer"), "stats must be batch or instance with norm=region, got layer"),
        (lambda: small(**BATCH), "stats must be batch with norm=batch, got instance"),
        (lambda: models.build_model("cgan_pc_rn", variant="gan"), "variant must be unet or rn, got gan"),
        (lambda: small()(torch.rand(1, 1, 8, 8), torch.ones(1, 1, 8, 8)), "image must have 3 channels"),
        (lambda: small()(torch.rand(1, 3, 8, 8), torch.ones(1, 1, 8, 9)), r"mask must be \(1, 1, 8, 8\) or"),
        (lambda: critic()(torch.rand(1, 3, 23, 32), torch.ones(1, 1, 23, 32)), "image must have sides of at least 24"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^cgan_pc_rn: {message}"):
        call()
