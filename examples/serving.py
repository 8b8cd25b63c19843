# SPDX-License-Identifier: Apache-2.0
"""A loop that serves a network: one fixed size, compiled if asked for, as a CUDA graph where there is a GPU.

    python examples/serving.py --weights model.safetensors --compile inductor

On a CPU the weights are laid out once (`prepack`), or the network is compiled; compiled graphs use no packed weights.
The GPU's half of this file has not run on a GPU yet.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fused_inpaint import prepack
from fused_inpaint.masks import random_mask
from fused_inpaint.models import build_model, load_published

Serve = Callable[[Tensor, Tensor], Tensor]


class Composited(nn.Module):
    """What is compiled and captured: tensors in, one tensor out, no branch on values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask.bool(), image, self.model(image, mask).image)


def graphed(call: Serve, image: Tensor, mask: Tensor) -> Serve:
    """`call` as a CUDA graph of this size; the result is overwritten by the next call."""
    held_image, held_mask = image.clone(), mask.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(held_image, held_mask)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(held_image, held_mask)

    def serve(image: Tensor, mask: Tensor) -> Tensor:
        held_image.copy_(image)
        held_mask.copy_(mask)
        graph.replay()
        return result

    return serve


def prepared(model: nn.Module, image: Tensor, mask: Tensor, backend: str | None) -> tuple[Serve, str]:
    """(the call, how it runs)"""
    call: Serve = Composited(model)
    how = []
    if backend:
        call = torch.compile(call, fullgraph=True, backend=backend)
        how.append(f"compiled by {backend}")
    if image.is_cuda:
        call = graphed(call, image, mask)
        how.append("CUDA graph")
    elif not backend:
        prepack(model)
        how.append("packed weights")
    return call, ", ".join(how)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="of the partial-convolution U-Net (random ones of a small network)")
    parser.add_argument("--side", type=int, default=256, help="pixels (%(default)s)")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--compile", metavar="BACKEND", help="of torch.compile, such as inductor (no compilation)")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_published("pconv", arguments.weights) if arguments.weights else build_model("pconv", levels=5, width=8)
    model = model.to(device).eval().requires_grad_(False)

    def request(seed: int) -> tuple[Tensor, Tensor]:
        mask = random_mask("pconv", arguments.side, seed)[None, None]
        return torch.rand(1, 3, arguments.side, arguments.side).to(device), mask.to(device, torch.float32)

    with torch.no_grad():
        call, how = prepared(model, *request(0), arguments.compile)
        image, mask = request(0)
        apart = (call(image, mask) - model.inpaint(image, mask)).abs().max().item()
        seconds = []
        for seed in range(arguments.requests):
            image, mask = request(seed)
            begun = time.perf_counter()
            call(image, mask).cpu()  # waits for a GPU, too
            seconds.append(time.perf_counter() - begun)
    middle = sorted(seconds)[len(seconds) // 2]
    print(f"{device}, {how}: {1000 * middle:.1f} ms a request (median of {len(seconds)}), {arguments.side} pixels")
    print(f"largest difference from model.inpaint: {apart:.0e}")


if __name__ == "__main__":
    main()
