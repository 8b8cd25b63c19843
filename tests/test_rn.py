# SPDX-License-Identifier: Apache-2.0
"""The published region normalization network, `cgan_pc_rn`'s variant "rn": its numbers, sizes, training, files."""

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import vectors
from torch import Tensor, nn

from fused_inpaint import LearnedRegionNorm2d, RegionNorm2d, models, use_backend
from fused_inpaint.models.files import write_safetensors
from fused_inpaint.models.rn import RNNet, RNPatchGAN

NAN = float("nan")


@pytest.fixture(autouse=True)
def _small(one_thread: None) -> None:
    """Sizes are small."""


def small(width: int = 4, blocks: int = 1, **config: Any) -> Any:
    return models.build_model("cgan_pc_rn", variant="rn", width=width, blocks=blocks, **config)


def critic(width: int = 4, **config: Any) -> Any:
    return models.build_discriminator("cgan_pc_rn", variant="rn", width=width, **config)


def picture(n: int = 2, height: int = 24, width: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    mask = (torch.rand(n, 1, height, width) > 0.2).to(dtype)
    mask[..., 3:12, 4:9] = 0
    return torch.rand(n, 3, height, width, dtype=dtype), mask


def randomise(net: nn.Module) -> None:
    """Away from the initial state: regions that differ, and maps that cross their threshold."""
    for module in net.modules():
        if isinstance(module, RegionNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        elif isinstance(module, LearnedRegionNorm2d):
            nn.init.normal_(module.map_conv.weight, std=0.3)


@functools.cache
def published(name: str, case: str) -> dict[str, Tensor]:
    """The case's state dict under the published names; filling it takes longer than running it."""
    configuration = vectors.meta(name)
    seed, network = next((c["set_seed"], c["network"]) for c in configuration["cases"] if c["id"] == case)
    return vectors.state(configuration["networks"][network], seed)


def skip_without_float64(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and (device.type != "cpu" or backend == "triton"):
        pytest.skip("float64 runs on the CPU only")


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@pytest.mark.parametrize("case", vectors.cases("rn_gnet"))
@DTYPES
def test_published_generator(backend: str, device: torch.device, case: dict[str, Any], dtype: torch.dtype) -> None:
    """The recorded picture, and the recorded share of each RN-L's map inside; either layout."""
    skip_without_float64(backend, device, dtype)
    state = {key: value.to(dtype) for key, value in published("rn_gnet", case["id"]).items()}
    net = models.load_published("cgan_pc_rn", state, threshold=case["threshold"]).net.to(device)
    shares: list[float] = []
    for module in net.modules():
        if isinstance(module, LearnedRegionNorm2d):
            module.register_forward_pre_hook(
                lambda m, given: shares.append((m.map(given[0]) >= m.threshold).double().mean().item())
            )
    data = vectors.tensors("rn_gnet", case, dtype)
    image = data["image"].masked_fill(data["mask"] != 0, NAN)
    if dtype == torch.float32:
        image = image.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        out = net(image.to(device), data["mask"].to(device))
    vectors.assert_close(out.cpu(), data["out"], case, "out")
    recorded = list(case["region_fractions"].values())
    assert len(shares) == len(recorded) and max(abs(a - b) for a, b in zip(shares, recorded, strict=True)) < 1e-4


@pytest.mark.parametrize("case", vectors.cases("rn_dnet"))
@DTYPES
def test_published_discriminator(case: dict[str, Any], dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in published("rn_dnet", case["id"]).items()}
    net = models.load_published("cgan_pc_rn", state, part="discriminator").net
    data = vectors.tensors("rn_dnet", case, dtype)
    with torch.no_grad():
        found = {"eval_raw": net(data["x"])[1][-1], "train1": net.train()(data["x"])[1][-1]}
        for i, conv in enumerate(net.convs, 1):
            found |= {f"after_conv{i}.0.weight_{name}": getattr(conv, f"weight_{name}") for name in "uv"}
        found["sig_eval1"], maps = net.eval()(data["x"])
    found["eval1"] = maps[-1]
    found["feat_mean"] = torch.stack([m.mean() for m in maps])
    found["feat_std"] = torch.stack([m.std() for m in maps])
    assert found.keys() == data.keys() - {"x"}
    for name, value in found.items():
        vectors.assert_close(value, data[name], case, name)


def test_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        for net, count in ((RNNet(blocks=2), 4_513_255), (RNNet(), 11_596_591), (RNPatchGAN(), 2_763_776)):
            assert sum(p.numel() for p in net.parameters()) == count


def test_gradients_equal_the_reference(backend: str, device: torch.device) -> None:
    dtype = torch.float32 if device.type != "cpu" or backend == "triton" else torch.float64
    net = small().net.to(dtype)
    randomise(net)
    image, mask = picture(dtype=dtype)

    def gradients(device: torch.device) -> list[Tensor]:
        own = copy.deepcopy(net).to(device)
        x = image.to(device).requires_grad_()
        own(x, 1 - mask.to(device)).square().mean().backward()
        return [g.cpu() for g in (x.grad, *(p.grad for p in own.parameters()))]

    found = gradients(device)
    with use_backend("reference"):
        expected = gradients(torch.device("cpu"))
    scale = max(e.abs().max().item() for e in expected)  # a norm leaves rounding of its convolution's bias gradient
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= (1e-9 if dtype == torch.float64 else 1e-3) * scale
    assert found[0][(mask == 0).expand_as(image)].abs().max() == 0


def test_the_network_takes_the_hole_mask() -> None:
    model = small().eval()
    randomise(model)
    image, mask = picture()
    with torch.no_grad():
        out = model(image, mask)
        assert torch.equal(out.image, model.net(image, 1 - mask)) and out.mask.all()
        assert torch.equal(out.image, model.net(image, mask == 0))
        shared = model(image, mask[:1].repeat(2, 1, 1, 1)).image
        torch.testing.assert_close(model(image, mask[:1]).image, shared, rtol=0, atol=1e-5)
        # A hole in one channel is one in all.
        planes = torch.cat([mask, torch.ones_like(mask), torch.ones_like(mask)], 1)
        assert torch.equal(out.image, model(image, planes).image)


def test_statistics_of_each_picture_alone() -> None:
    image, mask = picture()
    for stats, alike in (("instance", True), ("batch", False)):
        model = small(stats=stats).eval()
        with torch.no_grad():
            together, alone = model(image, mask).image[:1], model(image[:1], mask[:1]).image
        assert torch.allclose(together, alone, atol=1e-6) == alike


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


def test_trains(backend: str, device: torch.device) -> None:
    model = small().train().to(device)
    image, mask = (t.to(device) for t in picture())
    out = model(image.masked_fill(mask == 0, NAN), mask).image
    assert out.shape == image.shape
    (out - image).abs().mean().backward()
    for name, p in model.named_parameters():
        # The norms take the biases of their convolutions away again.
        reached = torch.isfinite(p.grad).all() if name.endswith("conv.bias") else p.grad.abs().max() > 0
        assert reached, name


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compiles_without_a_graph_break(backend: str, device: torch.device, train: bool) -> None:
    torch.compiler.reset()
    model = small().train(train).to(device)
    image, mask = (t.to(device) for t in picture(2, 13, 10))
    expected = copy.deepcopy(model)(image, mask).image
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(image, mask).image
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    out.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_exports(backend: str, device: torch.device) -> None:
    model = small().eval().to(device)
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
        assert (out.float() - expected).abs().mean() < 0.005 < expected.std() / 10


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


def test_discriminator() -> None:
    net = critic().train()
    image, mask = picture(2, 32, 48)
    image.requires_grad_()
    scores = net(image, mask, image.detach().masked_fill(mask == 0, NAN))
    assert scores.shape == (2, 1, 2, 4)
    F.binary_cross_entropy_with_logits(scores, torch.ones_like(scores)).backward()
    assert all(p.grad.abs().max() > 0 for p in (image, *net.parameters()))
    with torch.no_grad():
        net.eval()
        sigmoid, maps = net.net(image)
        assert torch.equal(sigmoid, torch.sigmoid(net(image, mask))) and len(maps) == 5
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(image, mask), net(image, mask))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (net(image, mask).float() - maps[-1]).abs().max() < 0.05


def test_own_checkpoints(tmp_path: Path) -> None:
    model = small(stats="instance", blocks=2).eval()
    randomise(model)
    image, mask = picture()
    with torch.no_grad():
        expected = model(image, mask).image
        for state in (model.state_dict(), model.net.state_dict()):
            loaded = models.load_published("cgan_pc_rn", state, stats="instance")
            assert torch.equal(loaded(image, mask).image, expected)
        about = {"key": model.key, "part": "generator", "config": model.config}
        write_safetensors(tmp_path / "a.safetensors", model.state_dict(), about)
        loaded = models.load_published("cgan_pc_rn", tmp_path / "a.safetensors")
        assert torch.equal(loaded(image, mask).image, expected)
        other = critic().eval()
        loaded = models.load_published("cgan_pc_rn", other.state_dict(), part="discriminator", width=4)
        image = torch.rand(1, 3, 32, 32)
        assert torch.equal(loaded(image, torch.ones(1, 1, 32, 32)), other(image, torch.ones(1, 1, 32, 32)))


def named_as_published() -> dict[str, Tensor]:
    """A generator's keys, of width 4 and one block."""
    keys = vectors.meta("rn_gnet")["networks"]["G_Net_2"]["keys"]
    sizes = {64: 4, 128: 8, 256: 16, 512: 32}
    return {
        key: torch.zeros([sizes.get(size, size) for size in shape])
        for key, shape in keys.items()
        if not key.startswith("middle.1.")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("encoder_in2.background_gamma"), r"missing encoder_in2\.background_gamma \(1 missing, 0 un"),
        (lambda s: s.update({"decoder.3.weight": torch.zeros(1)}), r"unexpected decoder\.3\.weight \(0 missing, 1 un"),
        (lambda s: s.update({"decoder.9.bias": torch.zeros(4)}), r"decoder\.9\.bias of \(4,\) instead of \(3,\)"),
        (
            lambda s: s.update({"encoder_in1.foreground_beta": torch.zeros(5)}),
            r"encoder_in1\.foreground_beta and encoder_in1\.background_beta of one shape, got \[\(5,\), \(4,\)\]",
        ),
        (
            lambda s: s.update({"encoder_conv1.weight": torch.zeros(4)}),
            r"one with a 4-dimensional encoder_conv1\.weight",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(change: Any, message: str) -> None:
    state = named_as_published()
    assert models.load_published("cgan_pc_rn", {"generator": state}).config["blocks"] == 1
    change(state)
    with pytest.raises(ValueError, match=message) as failure:
        models.load_published("cgan_pc_rn", state)
    assert str(failure.value).startswith("load_published: checkpoint must be ")


def test_a_discriminator_is_no_generator() -> None:
    state = vectors.state(vectors.meta("rn_dnet")["networks"]["D_Net"], 1)
    with pytest.raises(ValueError, match="checkpoint must be one of a known source"):
        models.load_published("cgan_pc_rn", state)
    del state["conv3.0.weight_u"]
    with pytest.raises(ValueError, match=r"missing convs\.2\.weight_u \(1 missing, 0 unexp"):
        models.load_published("cgan_pc_rn", state, part="discriminator", source="rn")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(stats="layer"), "stats must be batch or instance, got layer"),
        (lambda: small()(torch.rand(3, 8, 8), torch.ones(1, 1, 8, 8)), r"image must be \(N, C, H, W\) float"),
        (lambda: critic()(torch.rand(1, 3, 32, 23), torch.ones(1, 1, 32, 23)), "image must have sides of at least 24"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^cgan_pc_rn: {message}"):
        call()
