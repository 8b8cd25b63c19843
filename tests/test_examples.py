# SPDX-License-Identifier: Apache-2.0
"""Each example runs, at toy size, and says what it promises."""

import contextlib
import importlib.util
import io
import math
import re
import shutil
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from fused_inpaint import _extension

FOLDER = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_listed_and_tested():
    names = {path.stem for path in FOLDER.glob("*.py")}
    listed = (FOLDER / "README.md").read_text()
    assert {name for name in names if f"({name}.py)" in listed} == names
    assert names == {"drop_in", "gridded_field", "own_photos", "serving", "own_loop", "export"}


def test_drop_in(capsys):
    example("drop_in").main(["--steps", "4", "--side", "32"])
    said = capsys.readouterr().out
    assert "weights fit" in said
    assert "NaN under the holes changes the output: no" in said


def test_gridded_field(capsys):
    results = example("gridded_field").main(["--steps", "2", "--fields", "8", "--rows", "24", "--width", "4"])
    assert {"mean of the latitude", "partial convolutions", "plain convolutions, mean in the gaps"} <= results.keys()
    assert all(map(math.isfinite, results.values()))
    assert "hidden values" in capsys.readouterr().out


def test_own_photos(tmp_path):
    out = tmp_path / "run"
    toy = ["--steps", "2", "--size", "32", "--batch", "2", "--levels", "3", "--width", "4", "--out", str(out)]
    example("own_photos").main(toy)
    assert {"model.safetensors", "restored.png", "holes.png"} <= {path.name for path in out.iterdir()}
    with Image.open(out / "restored.png") as restored, Image.open(out / "holes.png") as holes:
        assert restored.size == holes.size


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_serving(capsys, backend):
    arguments = ["--side", "64", "--requests", "2", *(["--compile", backend] if backend else [])]
    example("serving").main(arguments)
    said = capsys.readouterr().out
    assert ("packed weights" if backend is None else "compiled by aot_eager") in said
    difference = float(said.rsplit(":", 1)[1])
    assert difference <= 1e-5


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of one run of the example, and what it said."""
    if shutil.which("g++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    folder, said = tmp_path_factory.mktemp("exported"), io.StringIO()
    with contextlib.redirect_stdout(said):
        example("export").main(["--side", "32", "--out", str(folder)])
    return folder, said.getvalue()


EXPORTERS = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # the exporter's own


@EXPORTERS
def test_export_for_aotinductor(exported):
    folder, said = exported
    assert (folder / "network.pt2").is_file()
    assert float(re.search(r"network.pt2: differs from the network by (\S+)", said)[1]) <= 1e-5
    with zipfile.ZipFile(folder / "network.pt2") as package:
        text = b"".join(package.read(name) for name in package.namelist() if name.endswith(".json"))
    calls_ours = b"fused_inpaint::partial_conv2d" in text
    assert calls_ours == (_extension.native_error() is None), "the fused ops are called where there are any"


@EXPORTERS
def test_export_for_onnx(exported):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (fused-inpaint[onnx])")
    import onnxruntime

    session = onnxruntime.InferenceSession(exported[0] / "network.onnx", providers=["CPUExecutionProvider"])
    assert [value.shape for value in session.get_inputs()] == [[1, 3, 32, 32], [1, 1, 32, 32]]


@pytest.mark.parametrize("how", [[], ["--amp"], ["--fabric"], ["--fabric", "--amp"]], ids=" ".join)
def test_own_loop(capsys, how):
    if "--fabric" in how:
        pytest.importorskip("lightning_fabric", reason="lightning-fabric is not installed")
    example("own_loop").main(["--steps", "2", "--side", "48", "--batch", "1", *how])
    said = capsys.readouterr().out
    assert "step 2: l1" in said and "nan" not in said
