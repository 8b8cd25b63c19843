# SPDX-License-Identifier: Apache-2.0
"""scripts/gpu.sh without a GPU: what it refuses, and with stand-ins for its tools, what it runs."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "gpu.sh"
VERBS = ("build", "test", "sanitize", "bench")
# Answers the script's questions about the machine, and shows any other command.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *is_available*|*find_spec*torch*) exit 0 ;;
  *_backends*) echo "$STAND_IN_REASON" ;;
  *get_device_capability*) echo 9.0 ;;
  *xdist*) exit 1 ;;
  *) echo "python $* arch=${TORCH_CUDA_ARCH_LIST:-} save=${FUSED_INPAINT_BENCH_SAVE:-}"; exit "$STAND_IN_STATUS" ;;
esac
"""
SANITIZER = """#!/usr/bin/env bash
echo "sanitizer $* caching=${PYTORCH_NO_CUDA_MEMORY_CACHING:-}"
case "$*" in *"--tool $STAND_IN_FAULT"*) exit 86 ;; esac
"""

pytestmark = pytest.mark.skipif(not shutil.which("bash") or not shutil.which("timeout"), reason="no bash or timeout")


def gpu(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("OUT", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME")}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(
        command, env={**inherited, "PYTHON": sys.executable, **environment}, capture_output=True, text=True
    )


def refused(done: subprocess.CompletedProcess[str], sentence: str) -> bool:
    return done.returncode == 2 and done.stderr == f"gpu.sh: {sentence}\n" and not done.stdout


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """An environment with tools that only show how they are called."""
    for name, text in (("python", PYTHON), ("nvcc", "#!/bin/sh\n"), ("compute-sanitizer", SANITIZER)):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(text)
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "bin" / "python"),
        "OUT": str(tmp_path / "out"),
        "STAND_IN_REASON": "",
        "STAND_IN_STATUS": "0",
        "STAND_IN_FAULT": "none",
    }


def test_it_is_a_script() -> None:
    assert os.access(SCRIPT, os.X_OK)
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize("verb", ["", "tests", "--help"])
def test_unknown_verb(verb: str) -> None:
    arguments = [verb] if verb else []
    sentence = f"the first argument must be build, test, sanitize or bench, got {verb or 'nothing'}"
    assert refused(gpu(*arguments), sentence)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", VERBS)
def test_no_gpu(verb: str) -> None:
    assert refused(gpu(verb), "torch finds no GPU")


@pytest.mark.parametrize("verb", VERBS)
def test_no_python_or_no_torch(verb: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "python")
    assert refused(gpu(verb, PYTHON=missing), f"PYTHON must be a Python interpreter, got {missing}")
    assert refused(gpu(verb, PYTHON="false"), "torch must be installed for false")


@pytest.mark.parametrize("verb, tool", [("build", "nvcc"), ("sanitize", "compute-sanitizer")])
def test_no_tool(verb: str, tool: str, stand_ins: dict[str, str], tmp_path: Path) -> None:
    # Only what the script itself calls, so that a toolkit of this machine is out of sight.
    for name in ("bash", "dirname", "mkdir"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    (tmp_path / "bin" / tool).unlink()
    hidden = {**stand_ins, "PATH": str(tmp_path / "bin"), "CUDA_HOME": str(tmp_path / "no")}
    assert refused(gpu(verb, **hidden), f"{tool} must be on PATH or in $CUDA_HOME/bin")


@pytest.mark.parametrize("verb", ["test", "sanitize", "bench"])
def test_not_built(verb: str, stand_ins: dict[str, str]) -> None:
    done = gpu(verb, **{**stand_ins, "STAND_IN_REASON": "the extension was built without CUDA"})
    assert refused(done, "scripts/gpu.sh build must come first (the extension was built without CUDA)")


def test_commands(stand_ins: dict[str, str], tmp_path: Path) -> None:
    """What each verb runs, in the log too; `build` compiles for the GPU in sight unless told otherwise."""
    logs = {"build": "build", "test": "test", "sanitize": "memcheck", "bench": "bench"}
    expected = {
        "build": "python -m pip install --no-index --no-deps --no-build-isolation -v -e . arch=9.0",
        "test": "python -m pytest -q",
        "sanitize": "sanitizer --error-exitcode 86 --print-limit 20 --tool memcheck",
        "bench": "python -m pytest benchmarks --benchmark-only -q arch= save=1",
    }
    for verb in VERBS:
        done = gpu(verb, **stand_ins)
        assert done.returncode == 0, done.stderr
        assert expected[verb] in done.stdout
        assert expected[verb] in (tmp_path / "out" / f"{logs[verb]}.log").read_text()
    assert "arch=8.0" in gpu("build", **{**stand_ins, "TORCH_CUDA_ARCH_LIST": "8.0"}).stdout
    assert "python -m fused_inpaint info" in (tmp_path / "out" / "info.log").read_text()
    assert "caching=1" in (tmp_path / "out" / "racecheck.log").read_text()


@pytest.mark.parametrize("verb", ["build", "test", "bench"])
def test_a_failure_is_the_scripts_own(verb: str, stand_ins: dict[str, str]) -> None:
    assert gpu(verb, **{**stand_ins, "STAND_IN_STATUS": "3"}).returncode == 3


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_a_fault_found_by_any_tool(tool: str, stand_ins: dict[str, str], tmp_path: Path) -> None:
    """The other tools run all the same."""
    assert gpu("sanitize", **{**stand_ins, "STAND_IN_FAULT": tool}).returncode == 86
    assert len(list((tmp_path / "out").glob("*check.log"))) == 3
