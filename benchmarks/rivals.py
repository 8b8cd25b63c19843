# SPDX-License-Identifier: Apache-2.0
"""The contenders: our layers and network, and what people run instead, each in both memory layouts."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import workload
from harness import LAYOUTS, Outputs, Rival
from torch import Tensor, nn

from fused_inpaint.baselines import FullChannelPartialConv2d, NvidiaPartialConv2d, PConvUNet

Forward = Callable[[], tuple[Tensor, Tensor | None]]


class NaiveLayer(nn.Module):
    """An encoder or decoder layer in plain PyTorch; a decoder upsamples and concatenates features and masks."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, mask: Tensor | None, skip: Tensor | None, skip_mask: Tensor | None) -> tuple:
        if skip is not None:
            x = torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skip], 1)
            if mask is not None:
                mask = torch.cat([F.interpolate(mask, scale_factor=2, mode="nearest"), skip_mask], 1)
        if mask is None:
            return self.conv(x), None
        return self.conv(x, mask)


class OurLayer(nn.Module):
    """The public module of one layer, called with what the network would hand it."""

    def __init__(self, layer: workload.Layer) -> None:
        super().__init__()
        import fused_inpaint

        if layer.decoder:
            self.conv = fused_inpaint.PartialUpConv2d(layer.up, layer.skip, layer.out, layer.kernel, bias=layer.bias)
        else:
            self.conv = fused_inpaint.PartialConv2d(
                layer.up, layer.out, layer.kernel, 2, layer.kernel // 2, bias=layer.bias, return_mask=True
            )

    def forward(self, x: Tensor, mask: Tensor, skip: Tensor | None, skip_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.conv(x, mask) if skip is None else self.conv(x, mask, skip, skip_mask)


def naive_conv(form: str, layer: workload.Layer) -> nn.Conv2d:
    """The convolution of one form, unfilled."""
    stride = 1 if layer.decoder else 2
    args = (layer.up + layer.skip, layer.out, layer.kernel, stride, layer.kernel // 2, 1, 1, layer.bias)
    if form == "full-channel":
        return FullChannelPartialConv2d(*args, window_factor=True)
    if form == "nvidia":
        return NvidiaPartialConv2d(*args, multi_channel=layer.decoder)
    return nn.Conv2d(*args)


def prepacked(module: nn.Module) -> nn.Module:
    """Ours with weights laid out beforehand, which a user has to ask for; compare with "frozen" (torch.compile)."""
    import fused_inpaint

    return fused_inpaint.prepack(module)


def frozen(module: nn.Module) -> Any:
    """torch.compile in its best form for inference: weights are constants, folded and laid out for oneDNN."""
    return torch.compile(module, options={"freezing": True})


def layer_module(form: str, layer: workload.Layer, data: workload.Inputs) -> nn.Module:
    module = OurLayer(layer) if form == "ours" else NaiveLayer(naive_conv(form, layer))
    with torch.no_grad():
        module.conv.weight.copy_(data.weight)
        if data.bias is not None:
            module.conv.bias.copy_(data.bias)
    return module


def masks_for(form: str, layer: workload.Layer, data: workload.Inputs) -> tuple[Tensor | None, Tensor | None]:
    """The masks a form is handed: none, one uint8 plane, one float plane, or a float plane per channel."""
    if form == "plain":
        return None, None
    if form == "ours":
        return data.mask.to(torch.uint8), None if data.skip_mask is None else data.skip_mask.to(torch.uint8)
    if form == "nvidia" and not layer.decoder:
        return data.mask, None
    mask = data.mask.expand(-1, layer.up, -1, -1)
    return mask, None if data.skip_mask is None else data.skip_mask.expand(-1, layer.skip, -1, -1)


def layer_rival(
    form: str,
    layer: workload.Layer,
    data: workload.Inputs,
    layout: str = "channels_last",
    training: bool = False,
    dtype: torch.dtype = torch.float32,
    wrap: Callable[[nn.Module], Any] = lambda module: module,
) -> Rival:
    """One layer of one form, forward alone or with the gradients of features and parameters."""

    def place(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        real = tensor.to(dtype) if tensor.is_floating_point() else tensor
        # A copy always: a rival owns its inputs, and an expanded mask becomes the planes it stands for.
        return torch.empty_like(real, memory_format=LAYOUTS[layout]).copy_(real)

    module = layer_module(form, layer, data).to(dtype).train(training)
    if form != "ours":
        module.to(memory_format=LAYOUTS[layout])
    mask, skip_mask = (place(value) for value in masks_for(form, layer, data))
    x, skip = place(data.x), place(data.skip)
    run = wrap(module)
    if not training:

        def outputs() -> Outputs:
            out, new_mask = run(x, mask, skip, skip_mask)
            return {"out": out, **({} if new_mask is None else {"mask": new_mask[:, :1].float()})}

        return Rival(lambda: run(x, mask, skip, skip_mask), outputs, "plain" if form == "plain" else "partial")

    leaves = {"x": x, "weight": module.conv.weight, "bias": module.conv.bias, "skip": skip}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    generator = torch.Generator().manual_seed(1)
    cotangent = place(torch.randn(1, layer.out, layer.size, layer.size, generator=generator))

    def step() -> tuple[Tensor, Tensor | None]:
        for leaf in leaves.values():
            leaf.grad = None
        out, new_mask = run(x, mask, skip, skip_mask)
        out.backward(cotangent)
        return out, new_mask

    def outputs_and_gradients() -> Outputs:
        out, new_mask = step()
        found = {"out": out.detach(), **{f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}}
        return found if new_mask is None else {**found, "mask": new_mask[:, :1].float()}

    return Rival(step, outputs_and_gradients, "plain" if form == "plain" else "partial")


def fresh_network(form: str, layout: str = "channels_last", **size: int) -> nn.Module:
    """A U-Net of one form as its constructor leaves it; `size` overrides levels, channels, width."""
    size = {"levels": workload.LEVELS, "channels": workload.CHANNELS, "width": workload.WIDTH, **size}
    if form != "ours":
        return PConvUNet(form.replace("-", "_"), **size).to(memory_format=LAYOUTS[layout])
    from fused_inpaint.models import build_model

    return build_model("pconv", **size).net


def network(form: str, layout: str = "channels_last", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A U-Net of one form with the workload's parameters."""
    net = fresh_network(form, layout)
    net.load_state_dict(workload.network_state())
    return net.to(dtype)


def network_rival(
    form: str,
    side: int,
    layout: str = "channels_last",
    dtype: torch.dtype = torch.float32,
    family: str | None = None,
    limit: float | None = None,
    wrap: Callable[[nn.Module], Any] = lambda module: module,
) -> Rival:
    """Inference of a whole network in eval mode."""
    run = wrap(network(form, layout, dtype).eval())
    x, mask = workload.network_input(side)
    x, mask = x.to(dtype).contiguous(memory_format=LAYOUTS[layout]), mask.to(dtype)

    def outputs() -> Outputs:
        out, new_mask = run(x, mask)
        return {"out": out, **({} if form == "plain" else {"mask": new_mask[:, :1].float()})}

    return Rival(lambda: run(x, mask), outputs, family or ("plain" if form == "plain" else "partial"), limit)


class TrainingStep:
    """Forward, loss, backward, Adam on one network; the loss weighs holes six times as the paper does."""

    def __init__(
        self, net: nn.Module, side: int, batch: int, layout: str = "channels_last", dtype: torch.dtype = torch.float32
    ) -> None:
        self.net = net.train()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=2e-4)
        x, mask = workload.network_input(side, batch)
        self.x, self.mask = x.to(dtype).contiguous(memory_format=LAYOUTS[layout]), mask.to(dtype)
        self.target = torch.sin(3 * self.x)
        self.weight = 1 + 5 * (1 - self.mask)

    def loss(self) -> Tensor:
        out, _ = self.net(self.x, self.mask)
        return ((out - self.target).abs() * self.weight).mean()

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def outputs(self) -> Outputs:
        """Loss, gradients and batch statistics of a first step; the parameters stay as they were."""
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        found = {"loss": loss.detach()}
        found |= {f"gradient of {name}": p.grad.clone() for name, p in self.net.named_parameters()}
        found |= {name: b.clone() for name, b in self.net.named_buffers() if "running" in name}
        return found
