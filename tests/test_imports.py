# SPDX-License-Identifier: Apache-2.0
"""Each module imports alone, the package imports little, and the examples in docstrings are true."""

import doctest
import importlib.util
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

import fused_inpaint
import fused_inpaint.models


def modules() -> Iterator[str]:
    yield "fused_inpaint"
    for package in (fused_inpaint, fused_inpaint.models):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            # The compiled library is loaded by _extension, and __main__ is a program.
            if not found.name.endswith(("._C", "__main__")) and found.name != "fused_inpaint.models":
                yield found.name
    yield "fused_inpaint.models"


MODULES = sorted(set(modules()))
# Imported by the call that needs it.
TRITON = {name for name in MODULES if name.endswith((".triton_impl", ".triton_kernels", ".triton_common"))}

# One process for all: each module is imported in a fork of an interpreter that knows torch but none of this package.
ALONE = """
import json, os, sys
import numpy, torch
assert not any(name.startswith("fused_inpaint") for name in sys.modules)
for module in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            __import__(module)
            print(json.dumps([module, None, sorted(sys.modules), torch.cuda.is_initialized()]), flush=True)
            code = 0
        except BaseException as error:
            print(json.dumps([module, f"{type(error).__name__}: {error}", [], False]), flush=True)
        os._exit(code)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[str | None, list[str], bool]]:
    """Module -> (error or None, what it loaded, whether it started a GPU)."""
    command = [sys.executable, "-W", "error::DeprecationWarning:fused_inpaint", "-c", ALONE, json.dumps(MODULES)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    return {module: (error, loaded, gpu) for module, error, loaded, gpu in rows}


@pytest.mark.skipif(not hasattr(sys, "setswitchinterval") or sys.platform == "win32", reason="no fork on Windows")
@pytest.mark.parametrize("module", MODULES)
def test_alone(alone: dict, module: str) -> None:
    error, loaded, gpu = alone[module]
    if module in TRITON and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    assert error is None
    assert not gpu and ("triton" in loaded) == (module in TRITON)


FRESH = """
import json, sys
import fused_inpaint
import torch
print(json.dumps([sorted(sys.modules), torch.cuda.is_initialized()]))
"""


def test_import_is_innocent() -> None:
    """No Triton, no GPU, no compiler, no network, no image library."""
    run = subprocess.run([sys.executable, "-W", "error", "-c", FRESH], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded, gpu = json.loads(run.stdout)
    unwanted = {"triton", "skimage", "scipy", "PIL", "safetensors", "matplotlib", "torch._inductor.codecache",
                "fused_inpaint.models", "fused_inpaint.cli", "fused_inpaint.training"}  # fmt: skip
    assert not unwanted & set(loaded) and not gpu and run.stderr == ""


def test_models_load_on_first_use() -> None:
    code = "import fused_inpaint, sys; fused_inpaint.models.build_model; assert 'fused_inpaint.models' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'fused_inpaint' has no attribute 'model'"):
        _ = fused_inpaint.model


def test_public_names_exist() -> None:
    for module in (fused_inpaint, fused_inpaint.ops, fused_inpaint.nn, fused_inpaint.models):
        for name in module.__all__:
            assert getattr(module, name).__doc__ or name.startswith("__"), f"{module.__name__}.{name}"


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module: str) -> None:
    if module in TRITON:
        pytest.importorskip("triton")
    failed, _ = doctest.testmod(importlib.import_module(module))
    assert failed == 0


def test_the_operators_have_examples() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    for thing in (
        fused_inpaint.ops.partial_conv2d,
        fused_inpaint.ops.partial_upconv2d,
        fused_inpaint.ops.partial_window,
        fused_inpaint.ops.partial_window_chain,
        fused_inpaint.ops.pyramid_conv2d,
        fused_inpaint.ops.region_conv2d,
        fused_inpaint.ops.region_norm,
        fused_inpaint.ops.channel_pool,
        fused_inpaint.LearnedRegionNorm2d,
        fused_inpaint.PyramidConv2d,
        fused_inpaint.RegionConv2d,
        fused_inpaint.RegionNorm2d,
        fused_inpaint.SPDBlock,
        fused_inpaint.PartialConv2d,
        fused_inpaint.PartialUpConv2d,
        fused_inpaint.use_backend,
    ):
        assert any(test.examples for test in finder.find(thing)), thing
