# SPDX-License-Identifier: Apache-2.0
"""The contenders: our layers and network, and what people run instead, each in both memory layouts."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import workload
from harness import DEVICE, LAYOUTS, ON_GPU, Outputs, Rival
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


def on_device(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """On the device, in a dtype. On a GPU norms stay in float32, as under autocast: cuDNN's train in no other."""
    module.to(DEVICE, dtype)
    if ON_GPU and dtype in (torch.float16, torch.bfloat16):
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.float()
    return module


tuned = functools.partial(torch.compile, mode="max-autotune-no-cudagraphs")
"""torch.compile in its best form for a layer on a GPU; one large call gains nothing from a graph."""


def graphed(module: Callable[..., Any]) -> Callable[..., Any]:
    """`module` as a CUDA graph, captured at the first call for the tensors of that call; on a CPU, as it is."""
    if not ON_GPU:
        return module
    graph, results = torch.cuda.CUDAGraph(), []

    def replay(*arguments: Any) -> Any:
        if not results:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    module(*arguments)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                results.append(module(*arguments))
        graph.replay()
        return results[0]

    return replay


class Block(nn.Module):
    """An encoder layer with batch statistics and ReLU behind it, as the network has it in training."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        weight = layer.conv.weight
        self.norm = on_device(nn.BatchNorm2d(weight.size(0)), weight.dtype)

    def forward(self, x: Tensor, mask: Tensor | None, *nothing: None) -> tuple[Tensor, Tensor | None]:
        n = self.norm
        if not isinstance(self.layer, OurLayer):
            out, new_mask = self.layer(x, mask, *nothing)
            return F.relu(n(out), inplace=True), new_mask
        from fused_inpaint import ops

        conv = self.layer.conv
        norm = ops.BatchNorm(n.weight, n.bias, n.running_mean, n.running_var, True, 0.1, n.eps)
        return ops.partial_conv2d(
            x, mask, conv.weight, None, conv.stride, conv.padding, activation="relu", batch_norm=norm
        )


def masked_block(layer: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """A naive block whose empty windows are 0 behind the norm, too: as ours leaves them, and the next naive layer."""
    block = Block(layer)

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        out, new_mask = block(*arguments)
        return out * new_mask, new_mask

    return run


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
        return torch.empty_like(real, device=DEVICE, memory_format=LAYOUTS[layout]).copy_(real)

    module = layer_module(form, layer, data).to(DEVICE, dtype).train(training)
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
    generator = torch.Generator(DEVICE).manual_seed(1)
    size = (data.x.size(0), layer.out, layer.size, layer.size)
    cotangent = place(torch.randn(size, generator=generator, device=DEVICE))

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


def exact(
    layer: workload.Layer,
    data: workload.Inputs,
    training: bool,
    wrap: Callable[[nn.Module], Any] = lambda module: module,
) -> dict[str, Callable[[], Outputs]]:
    """The naive full-channel form in float64, which ours and the naive forms of any dtype are compared with."""
    return {"partial": layer_rival("full-channel", layer, data, "nchw", training, torch.float64, wrap).outputs}


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
    return on_device(net, dtype)


def network_rival(
    form: str,
    side: int,
    layout: str = "channels_last",
    dtype: torch.dtype = torch.float32,
    family: str | None = None,
    limit: float | None = None,
    wrap: Callable[[nn.Module], Any] = lambda module: module,
    batch: int = 1,
) -> Rival:
    """Inference of a whole network in eval mode."""
    run = wrap(network(form, layout, dtype).eval())
    x, mask = workload.network_input(side, batch)
    x, mask = x.to(DEVICE, dtype).contiguous(memory_format=LAYOUTS[layout]), mask.to(DEVICE, dtype)

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
        self.x, self.mask = x.to(DEVICE, dtype).contiguous(memory_format=LAYOUTS[layout]), mask.to(DEVICE, dtype)
        self.target = torch.sin(3 * self.x)
        self.weight = 1 + 5 * (1 - self.mask)

    def loss(self) -> Tensor:
        out, _ = self.net(self.x, self.mask)
        return ((out - self.target).abs() * self.weight).mean()

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def forget(self) -> None:
        """What does not stay between steps."""
        self.optimizer.zero_grad()

    def outputs(self) -> Outputs:
        """Loss, gradients and batch statistics of a first step; the parameters stay as they were."""
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        found = {"loss": loss.detach()}
        found |= {f"gradient of {name}": p.grad.clone() for name, p in self.net.named_parameters()}
        found |= {name: b.clone() for name, b in self.net.named_buffers() if "running" in name}
        return found
