# SPDX-License-Identifier: Apache-2.0
"""The other papers' networks as people run them: the same state on eager operators, in both memory layouts."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import workload
from harness import DEVICE, LAYOUTS, SMOKE, Outputs, Rival
from rivals import on_device
from torch import Tensor, nn

from fused_inpaint import AOTBlock, RegionConv2d, SelfAttention2d, SPDBlock, TapConv2d
from fused_inpaint.baselines import (
    DenseRegionConv2d,
    NonLocalBlock,
    PConvUNet,
    SeparateBranchAOTBlock,
    TwoPassLearnedRegionNorm2d,
    TwoPassRegionNorm2d,
)
from fused_inpaint.models import build_model, region_wise

Tensors = dict[str, Tensor]

# Batch norm, which the published region normalization is made of, refuses a map of one pixel: 7 levels, not 8.
PAPERS: dict[str, dict[str, int]] = {"cgan_pc_rn": {"levels": 7}, "region_wise": {}, "deepgin": {}, "aot_gan": {}}
SMALL = {
    "cgan_pc_rn": {"levels": 3, "width": 4},
    "region_wise": {"width": 4},
    "deepgin": {"width": 8},
    "aot_gan": {"width": 8, "blocks": 1},
}
SMALL_SIDE = 80  # all of them take it
SIDE = SMALL_SIDE if SMOKE else 256
# A softmax and a normalization take away what is added to all: the gradient is rounding.
WITHOUT_EFFECT = ("phi.bias", "gate.1.bias")
FORMS = {key: ("full-channel", "nvidia") if key == "cgan_pc_rn" else ("eager",) for key in PAPERS}


class SeparateBranchSPDBlock(nn.Module):
    """DeepGIN's block as published: a padding, a convolution and a ReLU for each dilation, concatenated."""

    def __init__(self, channels: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.ReplicationPad2d(d), nn.Conv2d(channels, channels // len(dilations), 3, dilation=d), nn.ReLU(True)
            )
            for d in dilations
        )
        self.fuse = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fuse(torch.cat([branch(x) for branch in self.branches], 1))


class Concatenated(nn.Module):
    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        return x if isinstance(x, Tensor) else torch.cat(x, 1)


class NormedBlock(nn.Module):
    """Partial convolution, two-pass region normalization, activation."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, activation: nn.Module | None) -> None:
        super().__init__()
        self.conv, self.norm, self.activation = conv, norm, activation

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x, mask = self.conv(x, mask)
        if self.norm is not None:
            given = (mask[:, :1],) if isinstance(self.norm, TwoPassRegionNorm2d) else ()
            x = self.norm(x, *given)
        return x if self.activation is None else self.activation(x), mask


def region_norm_unet(form: str, **size: int) -> PConvUNet:
    """cgan_pc_rn's generator on the published partial convolutions and region normalizations."""
    net = PConvUNet(form.replace("-", "_"), **size)
    for blocks, norm in ((net.encoder, TwoPassRegionNorm2d), (net.decoder, TwoPassLearnedRegionNorm2d)):
        for i, block in enumerate(blocks):
            channels = block.conv.out_channels
            blocks[i] = NormedBlock(block.conv, None if block.norm is None else norm(channels), block.activation)
    return net


Part = dict[str, list[str]]

# What stands around a TapConv2d's convolution.
UPSAMPLED = {
    "none": [],
    "nearest": [nn.Upsample(scale_factor=2)],
    "bilinear": [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)],
}
PADDED = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d}
ACTIVATED: dict[str, Callable[[TapConv2d], list[nn.Module]]] = {
    "none": lambda module: [],
    "relu": lambda module: [nn.ReLU(inplace=True)],
    "leaky_relu": lambda module: [nn.LeakyReLU(module.slope, inplace=True)],
    "elu": lambda module: [nn.ELU(inplace=True)],
}


def replacement(module: nn.Module) -> tuple[nn.Module, Part] | None:
    """The eager form of one of our layers, and which of its modules share the parameters of each of the layer's."""
    if isinstance(module, AOTBlock):
        branches = [f"block{i:02d}.1" for i in range(len(module.rates))]
        names = {"pyramid": branches, "fuse": ["fuse.1"], "gate": ["gate.1"]}
        return SeparateBranchAOTBlock(module.channels, module.rates), names
    if isinstance(module, SPDBlock):
        channels, dilations = module.pyramid.channels, module.pyramid.dilations
        names = {"pyramid": [f"branches.{i}.1" for i in range(len(dilations))], "fuse": ["fuse.1"]}
        return SeparateBranchSPDBlock(channels, dilations), names
    if isinstance(module, SelfAttention2d):
        return NonLocalBlock(module.channels), {"qkv": ["theta", "phi", "g"], "out": ["W"]}
    if isinstance(module, RegionConv2d):
        layer = DenseRegionConv2d(module.in_channels, module.missing_channels, module.out_channels, module.upsample)
        return layer, {"": ["conv"]}
    if isinstance(module, region_wise._Conv):
        conv = nn.Conv2d(module.in_channels, module.out_channels, module.kernel_size, module.stride, 0, module.dilation)
        return nn.Sequential(nn.ReflectionPad2d(module.around), conv, nn.ELU(inplace=True)), {"": ["1"]}
    if isinstance(module, TapConv2d):
        layers, padding = [Concatenated(), *UPSAMPLED[module.upsampling]], module.kernel_size[0] // 2
        if module.padding_mode != "zeros":
            layers.append(PADDED[module.padding_mode](padding))
            padding = 0
        conv = nn.Conv2d(module.in_channels, module.out_channels, module.kernel_size, padding=padding)
        layers += [conv, *ACTIVATED[module.activation](module)]
        return nn.Sequential(*layers), {"": [str(layers.index(conv))]}
    return None


def replacements(net: nn.Module) -> dict[str, tuple[nn.Module, Part]]:
    found = {name: replacement(module) for name, module in net.named_modules()}
    return {name: new for name, new in found.items() if new is not None}


def under_eager_names(net: nn.Module, tensors: Tensors) -> Tensors:
    """Parameters of our `net`, or their gradients, as the eager form has them."""
    layers = [(f"{name}.", parts) for name, (_, parts) in replacements(net).items()]
    found = {}
    for name, tensor in tensors.items():
        prefix, parts = next((item for item in layers if name.startswith(item[0])), ("", {}))
        part, _, kind = name.removeprefix(prefix).rpartition(".")
        names = [f"{prefix}{new}.{kind}" for new in parts[part]] if parts else [name]
        found |= zip(names, tensor.chunk(len(names)), strict=True)
    return found


def entrances(net: nn.Module) -> list[nn.Module]:
    """The layers that see a network's input, which our networks bring to channels_last."""
    names = ("encoder.0", "coarse.0", "refinement.encoder.0", "inferring.conv1", "perceiving.conv1")
    return [module for name, module in net.named_modules() if name in names]


def fresh(key: str, **size: int) -> nn.Module:
    """The network of a paper, bare, with weights that keep the size of what passes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_model(key, **(size or (SMALL if SMOKE else PAPERS)[key])).net
        for parameter in net.parameters():
            if parameter.dim() == 4:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return net


def eager(key: str, form: str, ours: nn.Module, layout: str) -> nn.Module:
    """The network of `ours`, with its state, on eager operators."""
    state = under_eager_names(ours, dict(ours.state_dict()))
    if key == "cgan_pc_rn":
        net: nn.Module = region_norm_unet(form, levels=ours.levels, width=ours.encoder[0].conv.out_channels)
    else:
        net = copy.deepcopy(ours)
        for name, (module, _) in replacements(ours).items():
            net.set_submodule(name, module)
        for entrance in entrances(net):
            entrance.register_forward_pre_hook(
                lambda module, given: (given[0].contiguous(memory_format=LAYOUTS[layout]), *given[1:])
            )
    net.load_state_dict(state)
    return net.to(memory_format=LAYOUTS[layout])


def built(key: str, form: str, layout: str = "channels_last", **size: int) -> nn.Module:
    ours = fresh(key, **size)
    return ours if form == "ours" else eager(key, form, ours, layout)


def network_input(key: str, side: int, dtype: torch.dtype, layout: str, batch: int = 1) -> tuple[Tensor, Tensor]:
    """(pictures, masks) in the network's own polarity; the pictures are 0 in holes."""
    x, mask = workload.network_input(side, batch)
    holes_are_one = key in ("deepgin", "aot_gan")
    x = x.to(DEVICE, dtype).contiguous(memory_format=LAYOUTS[layout])
    return x, (1 - mask if holes_are_one else mask).to(DEVICE, dtype)


def predictions(key: str, found: Any) -> list[Tensor]:
    if key == "cgan_pc_rn":
        return [found[0]]
    return [found] if isinstance(found, Tensor) else [y for y in found if y is not None]


class NetworkStep:
    """Forward, L1 distance of every prediction from grey, backward."""

    def __init__(
        self,
        key: str,
        form: str,
        side: int,
        layout: str = "channels_last",
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
        **size: int,
    ) -> None:
        self.key, self.form = key, form
        self.net = on_device(built(key, form, layout, **size), dtype).train()
        self.given = network_input(key, side, dtype, layout, batch)

    def loss(self) -> Tensor:
        return torch.stack([(y - 0.5).abs().mean() for y in predictions(self.key, self.net(*self.given))]).sum()

    def __call__(self) -> None:
        self.forget()
        self.loss().backward()

    def forget(self) -> None:
        self.net.zero_grad()

    def outputs(self) -> Outputs:
        self.forget()
        loss = self.loss()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in self.net.named_parameters() if p.grad is not None}
        if self.key == "cgan_pc_rn":
            # In holes RN-B's weight is without effect, and its bias never read; the published form adds it elsewhere.
            first_rows = [name for name in gradients if name.startswith("encoder") and ".norm." in name]
            gradients |= {name: gradients[name][1:] for name in first_rows}
        if self.form == "ours":
            gradients = under_eager_names(self.net, gradients)
        found = {f"gradient of {name}": g for name, g in gradients.items() if not name.endswith(WITHOUT_EFFECT)}
        return {"loss": loss.detach(), **found}


def training_rival(
    key: str,
    form: str,
    layout: str = "channels_last",
    dtype: torch.dtype = torch.float32,
    side: int = SIDE,
    batch: int = 1,
) -> Rival:
    step = NetworkStep(key, form, side, layout, dtype, batch)
    return Rival(step, step.outputs)


def inference_rival(
    key: str,
    form: str,
    layout: str = "channels_last",
    dtype: torch.dtype = torch.float32,
    wrap: Callable[[nn.Module], Any] = lambda module: module,
    side: int = SIDE,
    batch: int = 1,
) -> Rival:
    run = wrap(on_device(built(key, form, layout), dtype).eval())
    given = network_input(key, side, dtype, layout, batch)

    def outputs() -> Outputs:
        return {f"prediction {i}": y for i, y in enumerate(predictions(key, run(*given)))}

    return Rival(lambda: run(*given), outputs)


def convolutions_alone(key: str) -> Rival:
    """The eager network's convolutions of features, each on what it is given there, padded already."""
    net = built(key, FORMS[key][0]).eval()
    calls: list[tuple[Any, ...]] = []

    def note(conv: nn.Conv2d, given: tuple[Any, ...]) -> None:
        x, padding = given[0], conv.padding
        if conv.padding_mode != "zeros":
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode), (0, 0)
        calls.append((x.clone(), conv.weight, conv.bias, conv.stride, padding, conv.dilation))

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    net(*network_input(key, SIDE, torch.float32, "channels_last"))

    def run() -> list[Tensor]:
        return [F.conv2d(*call) for call in calls]

    return Rival(run, lambda: {"last": run()[-1]}, "floor")
