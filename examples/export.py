# SPDX-License-Identifier: Apache-2.0
"""A network as files that need none of its Python code: an AOTInductor package on the fused kernels, and ONNX.

    python examples/export.py --weights model.safetensors --out exported

`network.pt2` is machine code for this machine and size, which calls the fused ops through torch's dispatcher. So the
process that loads it has to `import fused_inpaint` before. `torch.ops.load_library` of the compiled extension alone is
not enough: it holds the kernels, but the operators are declared in Python. A process without this package takes a file
made with `--standard`, in which each op stands as its equation in torch's own operators.

`network.onnx` is of standard operators, too, for other runtimes, and needs `pip install -e ".[onnx]"`.
"""

import argparse
import contextlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from fused_inpaint import use_backend
from fused_inpaint.masks import random_mask
from fused_inpaint.models import build_model, export_onnx, load_published


class Composited(nn.Module):
    """What is exported: tensors in, one tensor out, no branch on values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask.bool(), image, self.model(image, mask).image)


def compiled(module: nn.Module, inputs: tuple[Tensor, ...], path: Path, standard: bool) -> str:
    """Compile a module for inputs of this size into one file; its path."""
    with use_backend("reference") if standard else contextlib.nullcontext():
        program = torch.export.export(module, inputs)
        return torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="of the partial-convolution U-Net (random ones of a small network)")
    parser.add_argument("--side", type=int, default=256, help="pixels (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("exported"), help="folder for the files (%(default)s)")
    parser.add_argument("--standard", action="store_true", help="torch's own operators in place of the fused ones")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_published("pconv", arguments.weights) if arguments.weights else build_model("pconv", levels=3, width=8)
    model = model.to(device).eval().requires_grad_(False)
    image = torch.rand(1, 3, arguments.side, arguments.side).to(device)
    mask = random_mask("pconv", arguments.side, 0)[None, None].to(device, torch.float32)
    arguments.out.mkdir(parents=True, exist_ok=True)

    with torch.no_grad():
        network = Composited(model)
        expected = network(image, mask)
        path = compiled(network, (image, mask), arguments.out / "network.pt2", arguments.standard)
        run = torch._inductor.aoti_load_package(path)
        print(f"{path}: differs from the network by {(run(image, mask) - expected).abs().max().item():.0e}")

    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"no ONNX file: {' and '.join(missing)} not installed (pip install 'fused-inpaint[onnx]')")
    else:
        path = str(arguments.out / "network.onnx")
        export_onnx(model.cpu(), path, arguments.side)
        print(f"{path}: inputs image and mask, outputs prediction and defined")


if __name__ == "__main__":
    main()
