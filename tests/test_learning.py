# SPDX-License-Identifier: Apache-2.0
"""benchmarks/learning.py, two steps of it."""

import argparse
import importlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from fused_inpaint.models import registry

pytest.importorskip("skimage")


def test_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))  # the script adds its own
    learning = importlib.import_module("learning")
    learning.write_photos(tmp_path)
    training, held_out = ({path.stem for path in (tmp_path / name).iterdir()} for name in ("training", "held_out"))
    assert training and held_out and not training & held_out

    chosen = argparse.Namespace(steps=2, every=1, size=32, seed=0, squares=1)
    threads = torch.get_num_threads()
    try:
        run = learning.train("plain_conv_told", tmp_path, tmp_path / "run", chosen)
    finally:
        torch.set_num_threads(threads)
    assert [point["step"] for point in run["curve"]] == [0, 1, 2]
    assert len({point["box"] for point in run["curve"]}) == 3, "each step must change the network"

    cases = learning.held_out_cases(tmp_path / "held_out", 32, 1)
    fill = learning.trained("plain_conv_told", tmp_path / "run")
    assert learning.score(fill, cases)["box"] == pytest.approx(run["curve"][-1]["box"], abs=1e-3)
    learning.write_sheet(cases, {"network": fill}, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 3 * 32, 2 * learning.SHOWN * 32)
