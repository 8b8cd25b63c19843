# SPDX-License-Identifier: Apache-2.0
"""Each network as ONNX and as TorchScript: standard operators alone, and the network's numbers."""

import importlib.util
import io
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fused_inpaint import _backends, models, use_backend

# The exporter's own.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")

NETWORKS = {
    "pconv": (("pconv", {"levels": 2, "width": 4}), (18, 13), ["prediction", "defined"]),
    "cgan_pc_rn": (("cgan_pc_rn", {"levels": 2, "width": 4}), 16, ["prediction", "defined"]),
    "rn": (("cgan_pc_rn", {"variant": "rn", "width": 4, "blocks": 1}), 16, ["prediction", "defined"]),
    "region_wise": (("region_wise", {"width": 4}), 72, ["first", "prediction"]),
    "region_wise output": (("region_wise", {"width": 4, "region": "output"}), 72, ["first", "prediction"]),
    "deepgin": (("deepgin", {"width": 8, "block": "dilated"}), 32, ["coarse", "low_resolution", "prediction"]),
    "aot_gan": (("aot_gan", {"width": 8, "blocks": 1}), (37, 40), ["prediction", "defined"]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_network(name: str, tmp_path: Path, one_thread: None) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (fused-inpaint[onnx])")
    import onnx
    import onnxruntime

    model, image, mask, expected = _case(name)
    _, size, outputs = NETWORKS[name]
    model.train()
    path = tmp_path / "network.onnx"
    selected = _backends._selected
    models.export_onnx(model, path, size)
    assert model.training, "the model is left as it is"
    assert _backends._selected == selected, "the backend is left as it is"
    assert {node.domain for node in onnx.load(path).graph.node} == {""}, "standard operators alone"

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": image.numpy(), "mask": mask.numpy()})
    assert [output.name for output in session.get_outputs()] == outputs
    for actual, value in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_network_as_torchscript(name: str, grad: bool, one_thread: None) -> None:
    model, image, mask, expected = _case(name)
    with warnings.catch_warnings(), torch.set_grad_enabled(grad), use_backend("auto"):
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # checks of shapes, which the trace leaves out
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, (image, mask))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    assert "fused_inpaint::" not in str(loaded.inlined_graph), "torch's operators alone"
    with torch.no_grad():
        found = [value for value in loaded(image, mask) if value is not None]
    for actual, value in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("key", ["cgan_pc_rn", "region_wise", "deepgin", "aot_gan"])
def test_exported_discriminator_is_of_torch_alone(key: str, strict: bool) -> None:
    critic = models.build_discriminator(key, width=4).eval()
    given = torch.rand(1, 3, 64, 64), (torch.rand(1, 1, 64, 64) > 0.3).float()
    exported = torch.export.export(critic, given, strict=strict).run_decompositions()
    assert "fused_inpaint" not in str(exported.graph)


def _case(name: str) -> tuple[nn.Module, Tensor, Tensor, list[Tensor]]:
    """A network in evaluation, a picture with holes, and what the network makes of it."""
    (key, config), size, _ = NETWORKS[name]
    height, width = (size, size) if isinstance(size, int) else size
    for seed in range(20):  # some networks of random weights make a constant picture, which would hide errors
        torch.manual_seed(seed)
        model = models.build_model(key, **config).eval()
        for parameter in model.net.parameters():  # that keep the size of what passes, so that a wrong layer shows
            nn.init.normal_(parameter, std=0.1 if parameter.dim() < 2 else parameter[0].numel() ** -0.5)
        image, mask = torch.rand(1, 3, height, width), (torch.rand(1, 1, height, width) > 0.3).float()
        mask[..., :9, :9] = 0
        with torch.no_grad():
            expected = [value for value in model(image, mask) if value is not None]
        if all(value.std() > 0.01 for value in expected if value.size(1) == 3):
            return model, image, mask, expected
    raise AssertionError("a constant picture of every seed")


def test_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = models.build_model("aot_gan", width=8, blocks=1)
    with pytest.raises(ValueError, match=re.escape("export_onnx: size must be at least 1 x 1, got 0 x 8")):
        models.export_onnx(model, tmp_path / "none.onnx", (0, 8))

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = 'export_onnx: onnx and onnxscript must be installed (pip install "fused-inpaint[onnx]"), got neither'
    with pytest.raises(ImportError, match=re.escape(message)):
        models.export_onnx(model, tmp_path / "none.onnx", 40)
