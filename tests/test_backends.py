# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend: by function, by context, by environment; and that a forced one never falls back."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_inpaint
from fused_inpaint import NoBackendError, _backends, ops, use_backend

UNUSABLE = [name for name, reason in _backends.status().items() if reason]
USABLE = [name for name, reason in _backends.status().items() if not reason]


def call() -> torch.Tensor:
    return ops.partial_conv2d(torch.ones(1, 2, 5, 5), torch.ones(1, 1, 5, 5), torch.ones(3, 2, 3, 3))[0]


def test_status_names_every_backend() -> None:
    status = _backends.status()
    assert list(status) == [name for name in _backends.NAMES if name != "auto"]
    assert status["reference"] == "" and all(isinstance(reason, str) for reason in status.values())


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_the_operator_tests_leave_out(name: str) -> None:
    """Said once, here, with the reason."""
    pytest.skip(f"{name}: {_backends.status()[name]}")


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda file: file.stem)
def test_a_test_of_the_backends_makes_its_tensors_on_their_device(file: Path) -> None:
    """Where the GPU's kernels are emulated all tensors lie on the CPU, and a forgotten device shows on a GPU only."""
    forgotten = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            names = {argument.arg for argument in node.args.args}
            marks = " ".join(map(ast.unparse, node.decorator_list))
            # "backend" may also be a parameter of the test's own, of another meaning.
            if (
                "backend" in names
                and not re.search(r"cpu_only|parametrize\('backend'", marks)
                and "device" not in names
            ):
                forgotten.append(node.name)
    assert not forgotten


@pytest.mark.skipif(
    "CI" not in os.environ, reason="a machine without a compiler may run the tests on the reference alone"
)
def test_ci_has_the_kernels_it_is_to_test() -> None:
    assert _backends.status()["cpu"] == ""


def test_a_context_can_be_entered_again() -> None:
    context = use_backend("reference")
    for _ in range(2):
        with context:
            assert _backends._selected == "reference"
        assert _backends._selected == "auto"


@pytest.mark.skipif(not UNUSABLE, reason="every backend runs here")
@pytest.mark.parametrize("name", UNUSABLE)
def test_forced_backend_says_why_it_cannot_run(name: str) -> None:
    """In the words of status(), and without computing by another one."""
    reason = _backends.status()[name]
    sentence = f"partial_conv2d: backend must be able to run this call, got {name}: "
    with use_backend(name), pytest.raises(NoBackendError, match=f"^{re.escape(sentence)}"):
        call()
    if name == "cpu":
        assert reason.startswith("fused_inpaint: ") and "pip install" in reason


def test_forced_backend_refuses_the_wrong_device() -> None:
    if _backends.status()["cpu"]:
        pytest.skip(_backends.status()["cpu"])
    x, mask, weight = (torch.ones(size, device="meta") for size in [(1, 2, 5, 5), (1, 1, 5, 5), (3, 2, 3, 3)])
    with use_backend("cpu"), pytest.raises(NoBackendError, match="it runs on CPU tensors, these are on meta"):
        ops.partial_conv2d(x, mask, weight)


def test_context_puts_the_former_choice_back() -> None:
    with use_backend("reference"):
        with use_backend("auto") as inner:
            assert _backends._selected == "auto" and isinstance(inner, use_backend)
        assert _backends._selected == "reference"
        with pytest.raises(KeyError), use_backend("auto"):
            raise KeyError
        assert _backends._selected == "reference"
    assert _backends._selected == os.environ.get("FUSED_INPAINT_BACKEND", "auto")


def test_setter_stays() -> None:
    former = _backends._selected
    try:
        use_backend("reference")
        assert _backends.choose("partial_conv2d", "cpu") == "reference"
    finally:
        use_backend(former)


def test_unknown_name_changes_nothing() -> None:
    former = _backends._selected
    sentence = "use_backend: name must be one of auto, reference, cpu, cuda, triton, got CPU"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        use_backend("CPU")
    assert _backends._selected == former


@pytest.mark.parametrize("name", USABLE)
def test_the_chosen_backend_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is called when, and only when, it is chosen."""
    from fused_inpaint.ops.partial_conv import reference

    calls = []
    genuine = reference.partial_conv2d
    monkeypatch.setattr(reference, "partial_conv2d", lambda *a: calls.append(1) or genuine(*a))
    device = "cpu" if name in ("cpu", "reference") else "cuda"
    with use_backend(name):
        ops.partial_conv2d(torch.ones(1, 2, 5, 5, device=device), None, torch.ones(3, 2, 3, 3, device=device))
    assert bool(calls) == (name == "reference")


def test_auto_prefers_the_kernels() -> None:
    with use_backend("auto"):
        assert _backends.choose("partial_conv2d", "cpu") == ("reference" if _backends.status()["cpu"] else "cpu")


ENVIRONMENT = """
import torch
from fused_inpaint import ops
try:
    ops.partial_conv2d(torch.ones(1, 2, 5, 5), None, torch.ones(3, 2, 3, 3))
    from fused_inpaint import _backends
    print(_backends.choose("partial_conv2d", "cpu"))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    "value, printed",
    [
        ("reference", "^reference$"),
        ("auto", "^(cpu|reference)$"),
        ("fastest", r"^ValueError \S+: \S+ must be one of auto, reference, cpu, cuda, triton, got fastest$"),
        *((name, rf"^NoBackendError partial_conv2d: .* got {name}: ") for name in UNUSABLE),
    ],
)
def test_environment_variable(value: str, printed: str) -> None:
    environment = {**os.environ, "FUSED_INPAINT_BACKEND": value}
    run = subprocess.run([sys.executable, "-c", ENVIRONMENT], env=environment, capture_output=True, text=True)
    assert re.search(printed, run.stdout.strip()), run.stdout + run.stderr


def test_fresh_memory_is_poisoned(poisoned: None) -> None:
    """What the op tests rely on to see an output that was not written."""
    assert bool(torch.empty(5).isnan().all())


def test_backends_are_public() -> None:
    assert fused_inpaint.use_backend is use_backend and issubclass(fused_inpaint.NoBackendError, RuntimeError)


def test_triton_without_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_interpreted", False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(_backends.importlib.util, "find_spec", lambda name: object())
    assert _backends._without_triton() == "Triton needs a C compiler, and none is on PATH"
    monkeypatch.setattr(_backends, "_interpreted", True)
    assert _backends._without_triton() == ""
    monkeypatch.setattr(_backends.importlib.util, "find_spec", lambda name: None)
    assert _backends._without_triton() == "Triton is not installed (pip install 'fused-inpaint[triton]')"
