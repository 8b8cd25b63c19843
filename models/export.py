# SPDX-License-Identifier: Apache-2.0
"""Networks as files for other runtimes."""

import copy
import importlib.util
import os

import torch

from fused_inpaint import use_backend

from .base import InpaintingModel

# A graph's names are of one space: outputs must differ from the inputs.
_NAMES = {"image": "prediction", "mask": "defined"}


def export_onnx(model: InpaintingModel, path: str | os.PathLike[str], size: int | tuple[int, int]) -> None:
    """Write a network as ONNX, in standard operators only: every fused op stands there as its equation.

    Inputs are `image` (1, C, H, W) in [0, 1] and `mask` (1, 1, H, W), 1 = valid, 0 = hole, both in the type of the
    network's weights. Outputs are what `model` returns in eval mode, by name: but `prediction` for its `image` and
    `defined` for its `mask`. Runtimes compute the equations pass by pass, so that this is for portability, not speed.

    Args:
        model: of `build_model` or `load_published`; float32 is what runtimes know best. It is left as it is.
        path: of the .onnx file; weights of more than 2 GB go into another one beside it.
        size: (H, W) in pixels, or one number for both. The file takes no other; the network pads what it must.

    Raises:
        ValueError: a size below 1.
        ImportError: onnx and onnxscript are missing (pip install "fused-inpaint[onnx]").

    >>> import os, tempfile, torch, fused_inpaint
    >>> model = fused_inpaint.models.build_model("aot_gan", blocks=1, width=8)
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
    ...     fused_inpaint.models.export_onnx(model, os.path.join(folder, "aot.onnx"), 64)
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"export_onnx: size must be at least 1 x 1, got {height} x {width}")
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        got = "neither" if len(missing) == 2 else f"no {missing[0]}"
        raise ImportError(
            f'export_onnx: onnx and onnxscript must be installed (pip install "fused-inpaint[onnx]"), got {got}'
        )
    model = copy.deepcopy(model).eval()
    like = next(model.parameters())
    image = torch.rand(1, model.channels, height, width, dtype=like.dtype, device=like.device)
    mask = torch.ones(1, 1, height, width, dtype=like.dtype, device=like.device)
    with use_backend("reference"), torch.no_grad():
        found = model(image, mask)._asdict()
        names = [_NAMES.get(name, name) for name, value in found.items() if value is not None]
        torch.onnx.export(
            model,
            (image, mask),
            path,
            input_names=["image", "mask"],
            output_names=names,
            dynamo=True,
            external_data=sum(p.nbytes for p in model.parameters()) > 2**31 - 2**20,
            verbose=False,
        )
