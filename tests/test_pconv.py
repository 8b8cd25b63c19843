# SPDX-License-Identifier: Apache-2.0
"""The PConv U-Net: Table 2, the published port's numbers, any size, training modes, packed weights, compilation."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import vectors
from cases import assert_close
from safetensors.torch import save_file
from test_partial_conv import skip_unsupported
from torch import Tensor, nn

import fused_inpaint
from fused_inpaint import PartialConv2d, PartialUpConv2d, baselines, models, prepack, use_backend


def small(levels: int = 3, width: int = 8, **config: Any) -> Any:
    return models.build_model("pconv", levels=levels, width=width, **config)


def picture(
    n: int = 2,
    height: int = 24,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    mask = (torch.rand(n, 1, height, width) > 0.2).to(device, dtype)
    mask[..., 3:12, 4:9] = 0
    return torch.rand(n, 3, height, width, dtype=dtype).to(device), mask


def randomise(net: nn.Module) -> None:
    """Away from the initial state, where a forgotten statistic would not show."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def test_table_2() -> None:
    net = models.build_model("pconv").net
    assert sum(p.numel() for p in net.parameters() if p.dim() == 4) == 32_848_849
    kernels = [(block.conv.kernel_size, block.conv.in_channels, block.conv.out_channels) for block in net.encoder]
    assert kernels[:4] == [((7, 7), 3, 64), ((5, 5), 64, 128), ((5, 5), 128, 256), ((3, 3), 256, 512)]
    assert kernels[4:] == [((3, 3), 512, 512)] * 4
    ups = [(block.conv.up_channels, block.conv.skip_channels, block.conv.out_channels) for block in net.decoder]
    assert ups[:4] == [(512, 512, 512)] * 4
    assert ups[4:] == [(512, 256, 256), (256, 128, 128), (128, 64, 64), (64, 3, 3)]
    assert [block.norm is not None for block in net.encoder] == [False] + [True] * 7
    assert [block.norm is not None for block in net.decoder] == [True] * 7 + [False]


@pytest.mark.parametrize("case", vectors.cases("naoto_pconvunet"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_published_port(
    backend: str, device: torch.device, case: dict[str, Any], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """The port's weights give the port's picture (its masks have one plane per channel) within the stored tolerance."""
    skip_unsupported(device, dtype)
    network = vectors.meta("naoto_pconvunet")["networks"][case["network"]]
    state = {key: torch.as_tensor(v) for key, v in vectors.state(network, case["set_seed"]).items()}
    net = models.load_published("pconv", state).to(device, dtype).net
    data = {key: t.to(device) for key, t in vectors.tensors("naoto_pconvunet", case, dtype).items()}
    with torch.no_grad():
        out, out_mask = net(data["input"].contiguous(memory_format=layout), data["mask"])
    vectors.assert_close(out.cpu(), data["out"].cpu(), case, "out")
    assert torch.equal(out_mask, data["out_mask"])


@pytest.mark.parametrize("levels", [5, 6, 7])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_port_family(backend: str, device: torch.device, levels: int, train: bool) -> None:
    """Every depth and mode of the port equals the layers that people run, loaded from the port's own key names."""
    skip_unsupported(device, torch.float64)
    naive = baselines.PConvUNet("full_channel", levels=levels, width=4, window_factor=False).double()
    randomise(naive)
    state = {}
    for key, value in naive.state_dict().items():
        side, index, rest = key.split(".", 2)
        number = int(index) + 1 if side == "encoder" else levels - int(index)
        rest = rest.replace("conv.", "conv.input_conv.").replace("norm.", "bn.")
        state[f"{side[:3]}_{number}.{rest}"] = value
    ours = models.load_published("pconv", {"model": state}).double().net
    naive.train(train), ours.train(train)
    x, mask = torch.randn(2, 3, 128, 128, dtype=torch.float64), picture(2, 128, 128, torch.float64)[1]
    mask = mask.expand(-1, 3, -1, -1).clone()
    mask[:, 1, 64:80, 20:50] = 0  # planes may differ
    with torch.no_grad():
        expected, expected_mask = naive(x * mask, mask)
        out, out_mask = ours(x, mask)
    assert torch.equal(out_mask, expected_mask)
    # The reader divides the weights in float32.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-7 * expected.abs().max().item())
    if train:
        own, theirs = dict(ours.named_buffers()), dict(naive.named_buffers())
        for key in own:
            torch.testing.assert_close(own[key], theirs[key], rtol=1e-6, atol=1e-7, msg=key)


def test_bilinear_upsampling_equals_its_composition() -> None:
    model = small(upsampling="bilinear").double().eval()
    randomise(model)
    image, mask = picture(dtype=torch.float64)
    with torch.no_grad(), use_backend("reference"):
        expected = model.net(image, mask)[0]
    with torch.no_grad():
        torch.testing.assert_close(model.net(image, mask)[0], expected, rtol=1e-9, atol=1e-9)
        nearest = small().double().eval()
        nearest.load_state_dict(model.state_dict())
        assert not torch.allclose(nearest.net(image, mask)[0], expected)
    again = models.load_published("pconv", model.state_dict(), upsampling="bilinear").double()
    with torch.no_grad():
        torch.testing.assert_close(again.net(image, mask)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_gradients_equal_the_reference(backend: str, device: torch.device, train: bool) -> None:
    skip_unsupported(device, torch.float64)
    model = small().double().train(train)
    randomise(model)
    image, mask = picture(dtype=torch.float64)

    def gradients() -> list[Tensor]:
        net = copy.deepcopy(model.net)
        x = image.clone().requires_grad_()
        net(x, mask)[0].square().mean().backward()
        return [x.grad, *(p.grad for p in net.parameters())]

    found = gradients()
    with use_backend("reference"):
        expected = gradients()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert found[0][mask.expand_as(image) == 0].abs().max() == 0


def test_gradients_that_keep_their_graph(backend: str, device: torch.device) -> None:
    """With create_graph=True, first and second derivatives of a network whose features feed several layers."""
    skip_unsupported(device, torch.float64)
    net = small().double().net.train()
    randomise(net)
    image, mask = picture(dtype=torch.float64)

    def derivatives(model: nn.Module) -> list[Tensor]:
        x = image.clone().requires_grad_()
        first = torch.autograd.grad(model(x, mask)[0].square().sum(), [x, *model.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *model.parameters()])
        return [*first, *second]

    found = derivatives(copy.deepcopy(net))
    with use_backend("reference"):
        expected = derivatives(copy.deepcopy(net))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * b.abs().max().item())


def test_a_weight_used_twice_keeps_its_graph(backend: str, device: torch.device) -> None:
    skip_unsupported(device, torch.float64)
    layer = PartialConv2d(3, 3, 3, padding=1).double()
    x, mask = torch.rand(1, 3, 8, 8, dtype=torch.float64), (torch.rand(1, 1, 8, 8) > 0.4).double()
    y = layer(torch.tanh(layer(x, mask)), mask).square().sum()
    kept, plain = (torch.autograd.grad(y, layer.weight, create_graph=c, retain_graph=True)[0] for c in (True, False))
    torch.testing.assert_close(kept, plain, rtol=1e-10, atol=1e-10)


def test_the_network_sees_imagenet_normalised_pictures() -> None:
    model = small().eval()
    image, mask = picture()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    with torch.no_grad():
        out = model.net((image - mean) / std, mask)[0] * std + mean
        torch.testing.assert_close(model(image, mask).image, out.clamp(0, 1))


def test_cumulative_statistics() -> None:
    """momentum=None is torch's cumulative average."""
    net = small(levels=2).net.train()
    norm = net.encoder[1].norm
    norm.momentum = None
    values = []
    for _ in range(3):
        other = copy.deepcopy(net)
        other.encoder[1].norm.momentum, seen = 1.0, picture()
        other(*seen)
        values.append(other.encoder[1].norm.running_mean)
        net(*seen)
    torch.testing.assert_close(norm.running_mean, sum(values) / 3)


def test_inpaint_leaves_every_mode_as_it_was() -> None:
    model = small().train()
    model.net.encoder[1].norm.eval()
    model.inpaint(*picture(1))
    assert model.training and not model.net.encoder[1].norm.training and model.net.encoder[2].norm.training


@pytest.mark.parametrize("size", [(97, 131), (1, 1), (5, 64), (8, 8)])
def test_any_size(backend: str, device: torch.device, size: tuple[int, int]) -> None:
    model = small().to(device).eval()
    image, mask = torch.rand(1, 3, *size, device=device), (torch.rand(1, 1, *size, device=device) > 0.3).float()
    mask[..., 0, 0] = 1
    out = model(image, mask)
    assert out.image.shape == image.shape and out.mask.shape == mask.shape
    assert out.image.min() >= 0 and out.image.max() <= 1
    filled = model.inpaint(image, mask)
    known = mask.expand_as(image) == 1
    assert torch.equal(filled[known], image[known])
    assert torch.isfinite(filled).all()


def test_padding_is_exact() -> None:
    """Padding as hole: what a larger canvas with a larger hole around the picture gives."""
    model = small().eval()
    image, mask = picture(1, 21, 13)
    canvas, canvas_mask = torch.rand(1, 3, 24, 16), torch.zeros(1, 1, 24, 16)
    canvas[..., 1:22, 1:14], canvas_mask[..., 1:22, 1:14] = image, mask
    torch.testing.assert_close(model(image, mask).image, model(canvas, canvas_mask).image[..., 1:22, 1:14])


def test_what_lies_under_the_hole_is_never_read(backend: str, device: torch.device) -> None:
    model = small().to(device).train()
    image, mask = picture(device=device)
    poisoned = torch.where(mask.bool(), image, torch.nan)
    clean = copy.deepcopy(model)(image, mask).image
    out = model(poisoned, mask).image
    assert torch.equal(out, clean)
    out.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_masks_fill_up_or_say_what_is_left() -> None:
    model = small(levels=2)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :4, :4] = 1
    left = model(torch.rand(1, 3, 64, 64), mask).mask
    assert left[..., :4, :4].all() and not left[..., -8:, -8:].any()
    assert models.build_model("pconv", levels=6, width=8).eval()(torch.rand(1, 3, 64, 64), mask).mask.all()
    empty = model(torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64))
    assert not empty.mask.any() and torch.isfinite(empty.image).all()


def test_synchronised_batch_norm() -> None:
    """Of one process it is batch norm."""
    net = models.build_model("pconv", levels=2, width=4).net.double().train()
    others = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in others.modules())
    x, mask = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.ones(2, 1, 32, 32)
    mask[0, :, 2:30, 1:30] = 0  # so that the norms have holes, too
    for module in (net, others):
        for _ in range(2):
            module(x, mask)[0].square().mean().backward()
    for name, expected in net.state_dict().items():
        assert_close(others.state_dict()[name], expected, 1e-10, what=name)
    for (name, p), (_, q) in zip(net.named_parameters(), others.named_parameters(), strict=True):
        assert_close(q.grad, p.grad, 1e-10, what=name)
    assert_close(others(x, mask)[0], net(x, mask)[0], 1e-10)
    assert_close(others.eval()(x, mask)[0], net.eval()(x, mask)[0], 1e-10)


def test_freeze_encoder_bn() -> None:
    model = small().train()
    model.freeze_encoder_bn()
    model.train()
    image, mask = picture()
    before = {k: v.clone() for k, v in model.net.state_dict().items() if ".norm." in k}
    model(image, mask).image.mean().backward()
    after = model.net.state_dict()
    changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
    assert changed and all(k.startswith("decoder") for k in changed)
    for name, p in model.net.named_parameters():
        assert (p.grad is None) == (name.startswith("encoder") and ".norm." in name), name
    model.freeze_encoder_bn(False)
    assert all(block.norm.training for block in model.net.encoder if block.norm is not None)


def test_a_shared_mask_chain_changes_nothing() -> None:
    net = small().net.eval()
    image, mask = picture()
    assert torch.equal(net(image, mask, net.masks(mask))[0], net(image, mask)[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.bfloat16, 2**-5)], ids=["f32", "bf16"])
def test_prepacked_weights_change_nothing_but_the_time(dtype: torch.dtype, tolerance: float) -> None:
    net = small(levels=5, width=16).net.eval()
    randomise(net)
    image, mask = picture(1, 96, 64)
    with torch.no_grad():
        expected = net(image, mask)[0]
        packed = prepack(copy.deepcopy(net)).to(dtype)
        out = packed(image.to(dtype), mask)[0].float()
        assert (out - expected).abs().max() <= tolerance * expected.abs().max()


def test_prepacked_weights_follow_their_source() -> None:
    layer = prepack(PartialConv2d(8, 8, 3, padding=1).eval())
    up = prepack(PartialUpConv2d(8, 4, 8).eval())
    x, mask = torch.rand(1, 8, 16, 16), torch.ones(1, 1, 16, 16)
    skip, skip_mask = torch.rand(1, 4, 32, 32), torch.ones(1, 1, 32, 32)

    def outputs() -> list[Tensor]:
        return [layer(x, mask), up(x, mask, skip, skip_mask)[0]]

    with torch.no_grad():
        first = outputs()
        for module in (layer, up):
            module.weight.mul_(2)
        for before, after in zip(first, outputs(), strict=True):
            assert not torch.allclose(before, after)
        copies = [copy.deepcopy(m) for m in (layer, up)]
        second = outputs()
        assert torch.equal(copies[0](x, mask), second[0]) and torch.equal(
            copies[1](x, mask, skip, skip_mask)[0], second[1]
        )
        prepack(layer, enabled=False)
        torch.testing.assert_close(layer(x, mask), second[0], rtol=1e-5, atol=1e-5)
    with use_backend("reference"), torch.no_grad():
        torch.testing.assert_close(up(x, mask, skip, skip_mask)[0], second[1], rtol=5e-5, atol=5e-5)
    loss = layer.train()(x, mask).sum()
    loss.backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compiles_without_a_graph_break(backend: str, device: torch.device, train: bool) -> None:
    model = small(levels=2, width=4).to(device).train(train)
    image, mask = picture(2, 13, 10, device=device)
    expected = copy.deepcopy(model)(image, mask).image
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(image, mask).image
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    out.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_exports(backend: str, device: torch.device) -> None:
    model = small(levels=2, width=4).to(device).eval()
    image, mask = picture(1, 16, 12, device=device)
    exported = torch.export.export(model, (image, mask)).module()
    torch.testing.assert_close(exported(image, mask).image, model(image, mask).image, rtol=1e-5, atol=1e-5)


def test_checkpoints(tmp_path: Path) -> None:
    model = small().eval()
    randomise(model)
    image, mask = picture()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "a.safetensors")
    torch.save({"model": model.net.state_dict(), "step": 3}, tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        with torch.no_grad():
            loaded = models.load_published("pconv", tmp_path / name)
            assert torch.equal(loaded(image, mask).image, model(image, mask).image)


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    state = small().net.state_dict()
    del state["encoder.1.conv.weight"]
    state["decoder.0.conv.extra"] = torch.zeros(1)
    state["encoder.2.norm.weight"] = torch.zeros(5)
    with pytest.raises(ValueError) as failure:
        models.load_published("pconv", state)
    for part in ("missing encoder.1.conv.weight", "unexpected decoder.0.conv.extra", "encoder.2.norm.weight of (5,)"):
        assert part in str(failure.value)
    (tmp_path / "text.pth").write_text("no checkpoint")
    for given, part in [
        (tmp_path / "absent.pth", "path must be an existing file"),
        (tmp_path / "text.pth", r"path must be a whole checkpoint \(.pth, .safetensors, .npz\)"),
        ({"a": torch.zeros(1)}, "checkpoint must be one of a known source"),
        ({}, "checkpoint must be a mapping of names to tensors"),
    ]:
        with pytest.raises(ValueError, match=part) as failure:
            models.load_published("pconv", given)
        assert "\n" not in str(failure.value)
    with pytest.raises(ValueError, match=r"key must be one of pconv, .*got unet"):
        models.load_published("unet", state)
    with pytest.raises(ValueError, match="source must be one of naoto0804, fused_inpaint, got nvidia"):
        models.load_published("pconv", state, source="nvidia")
    with pytest.raises(ValueError, match="part must be generator, got discriminator"):
        models.load_published("pconv", state, part="discriminator")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.build_model("unet"), "build_model: key must be one of pconv, .*got unet"),
        (lambda: small(levels=0), "pconv: levels must be 1 or more, got 0"),
        (lambda: small(upsampling="cubic"), "pconv: upsampling must be nearest or bilinear, got cubic"),
        (lambda: small()(torch.rand(3, 8, 8), torch.ones(1, 1, 8, 8)), r"pconv: image must be \(N, C, H, W\) float"),
        (lambda: small()(torch.rand(1, 3, 8, 8), torch.ones(1, 2, 8, 8)), r"pconv: mask must be \(1, 1, 8, 8\) or"),
        (lambda: small()(torch.rand(1, 1, 8, 8), torch.ones(1, 1, 8, 8)), "pconv: image must have 3 channels"),
        (lambda: small()(torch.rand(1, 3, 0, 8), torch.ones(1, 1, 0, 8)), "pconv: image must have at least one pixel"),
        (lambda: small().net(torch.rand(1, 3, 8, 9), torch.ones(1, 1, 8, 9)), "sides that are multiples of 8"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_models_load_with_the_package() -> None:
    assert fused_inpaint.models is models
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fused_inpaint.nothing
