# SPDX-License-Identifier: Apache-2.0
"""The compiled library: what it may depend on, and that no state of it can break `import fused_inpaint`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_inpaint
from fused_inpaint import _extension

PACKAGE = Path(fused_inpaint.__file__).parent
LIBRARY = "_C.abi3.so"
COMPILER = shutil.which("c++") or shutil.which("g++")

needs_library = pytest.mark.skipif(_extension.native_error() is not None, reason=str(_extension.native_error()))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

REFERENCE = """
import fused_inpaint
from fused_inpaint import _extension
import torch
ones = torch.ones(1, 1, 5, 5)
with fused_inpaint.use_backend("reference"):
    y, mask = fused_inpaint.ops.partial_conv2d(ones, ones, torch.ones(1, 1, 3, 3))
assert torch.equal(y, torch.full((1, 1, 3, 3), 9.0)), y
assert mask.shape[-2:] == (3, 3) and bool(mask.all()), mask
assert _extension.load() is False
assert _extension.build_info()["library_facts"] == {}
print(_extension.native_error())
"""


@pytest.fixture
def shadow(tmp_path):
    """A fused_inpaint package of links to the real one, without a library: a place to put a broken one."""
    package = tmp_path / "fused_inpaint"
    package.mkdir()
    for entry in PACKAGE.iterdir():
        if not entry.name.startswith("_C.") and entry.name not in ("_build.json", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    return package


def recorded(shadow, **facts):
    known = {"kind": "cpu", "reason": "", "torch": "2.13.0", "library": LIBRARY}
    (shadow / "_build.json").write_text(json.dumps({**known, **facts}))


def error_of(shadow, prelude=""):
    """native_error() of a fresh interpreter that imports the shadow package and computes by the reference path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FUSED_INPAINT_")}
    environment["PYTHONPATH"] = str(shadow.parent)
    result = subprocess.run(
        [sys.executable, "-c", prelude + REFERENCE], cwd=shadow.parent, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def compile_library(shadow, source):
    (shadow / "broken.cpp").write_text(source)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", shadow / LIBRARY, shadow / "broken.cpp"], check=True)


@needs_library
def test_loads_and_reports():
    info = _extension.build_info()
    assert _extension.load() is True
    assert info["kind"] in ("cpu", "cuda")
    assert info["running_torch"] == str(torch.__version__)
    assert info["library_facts"]["torch_target"] == "0x020a000000000000"
    assert info["library_facts"]["openmp"], "at least -fopenmp must have reached the compiler"
    assert info["library_facts"]["cuda"] == (info["kind"] == "cuda")
    assert "-ffast-math" not in json.dumps(info["flags"])


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_only_stable_symbols_are_needed():
    library = PACKAGE / _extension.build_info()["library"]
    lines = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True).stdout
    symbols = [line.split()[-1] for line in lines.splitlines()]
    stable = re.compile(r"(aoti_torch_|torch_|Py|_ITM_|__gmon_start__$|__tls_get_addr$)")
    # A version after the @ says whose symbol it is; torch's own C++ symbols have none.
    system = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP|libcudart)")
    assert [symbol for symbol in symbols if not stable.match(symbol) and not system.search(symbol)] == []


@needs_library
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_linked_libraries():
    """Not torch's Python bindings; and libstdc++ shared, since a second copy of it crashes at the first exception."""
    library = PACKAGE / _extension.build_info()["library"]
    dynamic = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    assert "libtorch_cpu" in dynamic and "libstdc++" in dynamic
    assert "libtorch_python" not in dynamic


def test_not_built(shadow):
    error = error_of(shadow)
    assert "has not been built" in error
    assert _extension.REBUILD in error


def test_built_without_extension_gives_the_recorded_reason(shadow):
    recorded(shadow, kind="none", reason="no C++ compiler was found", torch=None)
    assert "no C++ compiler was found" in error_of(shadow)


@pytest.mark.parametrize("record", ["{", "[1]", '{"kind": "cpu"}'])
def test_unreadable_record(shadow, record):
    (shadow / "_build.json").write_text(record)
    assert "_build.json" in error_of(shadow)


def test_torch_too_old(shadow):
    recorded(shadow)
    error = error_of(shadow, prelude="import torch\ntorch.__version__ = '2.9.1+cpu'\n")
    assert "torch must be 2.10 or newer" in error
    assert "2.13.0" in error and "2.9.1+cpu" in error
    assert _extension.REBUILD in error


def test_missing_library(shadow):
    recorded(shadow)
    assert "does not load" in error_of(shadow)


@needs_compiler
def test_undefined_symbol_names_both_versions(shadow):
    recorded(shadow, torch="9.9.0")
    compile_library(shadow, 'extern "C" int torch_of_the_future();\nint registered = torch_of_the_future();\n')
    error = error_of(shadow)
    assert "9.9.0" in error and str(torch.__version__) in error
    assert "torch_of_the_future" in error
    assert _extension.REBUILD in error
    assert "\n" not in error


@needs_compiler
def test_some_other_library(shadow):
    recorded(shadow)
    compile_library(shadow, "int nothing;\n")
    assert "fused_inpaint_build_facts" in error_of(shadow)


def test_versions_that_differ_are_no_reason_to_refuse(monkeypatch):
    """The stable ABI promises that a newer torch runs an older library: only the floor is compared."""
    if _extension.native_error() is not None:
        pytest.skip(str(_extension.native_error()))
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert _extension._attempt.__wrapped__()[0] is None
