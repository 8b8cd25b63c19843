# SPDX-License-Identifier: Apache-2.0
"""`fused-inpaint bench`: what it runs, what it draws of the saved figures, and what it refuses."""

import importlib
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from fused_inpaint.cli import bench, main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (fused-inpaint[report])")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("plots")


def times(**milliseconds: float) -> dict[str, Any]:
    return {"rivals": {name.replace("_", " "): {"median_ms": value} for name, value in milliseconds.items()}}


def run_of(date: str, rows: dict[str, Any], **facts: Any) -> dict[str, Any]:
    figures = [
        {"figure": "U-Net 512 inference, b1: ours graphed / floor of 0.080 ms", "bar": "<= 4.0", "measured": None},
        {"figure": "encoder layers 2-5 forward, b16: ours / plain conv", "bar": "<= 1.12", "measured": None},
    ]
    machine = {"date": f"{date}T10:00:00+00:00", "cpu": "Toy", "threads": 2, "smoke": False, **facts}
    return {"machine": machine, "figures": figures, "rows": rows}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Files as benchmarks/report.py writes them: a GPU's rows in two runs, a CPU's, a smoke run, something else."""
    folder = tmp_path / "results"
    folder.mkdir()
    old, new = 8.0, 4.0
    layer = {"ours": 2.0, "graphed ours": 1.0, "plain nchw": 6.0, "plain channels_last": 5.0, "graphed plain nchw": 3.0}
    network = times(ours=0.4, full_channel=4.0, graphed_ours=0.2, graphed_full_channel=1.0)
    files = {
        "toy-gpu-old": run_of("2026-01-01", {"enc3 b16 forward": times(ours=1, plain=old)}, gpu="Toy GPU 1"),
        "toy-gpu-new": run_of(
            "2026-02-01",
            {
                "enc3 b16 forward": times(ours=1, plain=new),
                "enc3 b1 forward": {"rivals": {name: {"median_ms": value} for name, value in layer.items()}},
                "enc3 b16 nvidia compiled": times(ours=1, compiled_nvidia=2),
                "unet512 b1 inference": network,
                "unet512 b16 memory": {"rivals": {}, "figures": {"ours peak": 3.0, "ours kept": 1.0, "ours step": 2.0}},
            },
            gpu="Toy GPU 1",
        ),
        "cpu": run_of("2026-01-01", {"unet256 inference": times(ours=1, plain=3)}),
        "smoke": run_of("2026-03-01", {"enc3 b16 forward": times(ours=1, plain=99)}, gpu="Toy GPU 1", smoke=True),
        "learning": {"machine": {"torch": "2"}, "networks": {}},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_figures_are_those_of_the_files(plots: ModuleType, results: Path) -> None:
    machines = {machine.name: machine for machine in plots.read(results)}
    assert machines.keys() == {"Toy GPU 1", "Toy, 2 threads"}
    gpu = machines["Toy GPU 1"]
    assert gpu.slug == "toy-gpu-1" and gpu.dates == ["2026-01-01", "2026-02-01"]
    assert gpu.floors == {"unet512 b1 inference": 0.08}
    assert dict(plots.ratios(gpu.rows["enc3 b16 forward"])) == {"": {"plain": 4.0}}
    assert dict(plots.ratios(gpu.rows["enc3 b1 forward"])) == {"": {"plain": 2.5}, "graphed": {"plain": 3.0}}
    drawn = dict(plots.ratios(gpu.rows["unet512 b1 inference"], 0.08))
    assert drawn[""] == pytest.approx({"full channel": 10.0, "floor": 0.2})
    assert drawn["graphed"] == pytest.approx({"full channel": 5.0, "floor": 0.4})


def test_report_draws_every_processor(
    plots: ModuleType, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert main(["bench", "--report", "--results", str(results), "-o", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    kinds = ("layers", "networks", "memory")
    assert names == {*(f"bench-toy-gpu-1-{kind}.png" for kind in kinds), "bench-toy-2-threads-networks.png"}
    assert capsys.readouterr().out.split() == [str(out / f"bench-toy-2-threads-{kinds[1]}.png")] + [
        str(out / f"bench-toy-gpu-1-{kind}.png") for kind in kinds
    ]
    for path in out.iterdir():
        with Image.open(path) as picture:
            assert len(picture.convert("L").getcolors()) > 10


def test_the_drawn_lines(plots: ModuleType, results: Path) -> None:
    gpu = next(machine for machine in plots.read(results) if machine.name == "Toy GPU 1")
    panels = {axes.get_title(): axes for axes in plots.layers(gpu).axes}
    assert panels.keys() == {"b16 forward", "b1 forward", "b1 forward graphed", "b16 compiled"}
    plain = next(line for line in panels["b1 forward graphed"].get_lines() if line.get_label() == "plain")
    assert plain.get_ydata().tolist() == [3.0]
    lines = [line for line in plots.networks(gpu).axes[0].get_lines() if line.get_label() == plots.FLOOR_LABEL]
    assert sorted(line.get_xdata()[0] for line in lines) == pytest.approx([0.2, 0.4])
    bars = plots.memory(gpu).axes[0].patches
    assert [(bar.get_x(), bar.get_width()) for bar in bars] == [(0.0, 1.0), (1.0, 2.0)]


def test_pages_show_every_plot() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert [path.name for path in (ROOT / "docs").glob("bench-*.png") if f"({path.name})" not in page] == []


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What would have been run."""
    seen: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
        assert cwd == bench.CHECKOUT
        seen.append((command, env))
        return subprocess.CompletedProcess(command, 1 if "broken" in command else 0)

    monkeypatch.delenv("FUSED_INPAINT_BENCH_SMOKE", raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    return seen


def test_runs_the_benchmarks(commands: list[tuple[list[str], dict[str, str]]]) -> None:
    assert main(["bench"]) == 0
    assert main(["bench", "--smoke", "--device", "cpu", "--save", "-k", "region"]) == 0
    (plain, environment), (chosen, changed) = commands
    assert plain[1:] == ["-m", "pytest", "benchmarks", "--benchmark-only", "-q"]
    assert "FUSED_INPAINT_BENCH_SMOKE" not in environment
    assert chosen[6:] == ["--fused-save", "-k", "region"]
    assert changed["FUSED_INPAINT_BENCH_SMOKE"] == "1" and changed["FUSED_INPAINT_BENCH_DEVICE"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-k", "broken"], "every row must run, got exit code 1 from pytest, which says more above"),
        (["--results", "x"], "--results and --output must come with --report"),
        (["--report", "--smoke"], "--smoke, --device, --save and -k must come without --report, which runs nothing"),
        (["--report", "--results", "nowhere"], "results must be a folder, got nowhere"),
        (["--report", "--results", "empty"], "results must hold files that bench --save wrote, got none in empty"),
        (["--report", "--results", "broken"], "results must be files that bench --save wrote, got "),
    ],
)
def test_refusals(
    arguments: list[str],
    message: str,
    commands: list[tuple[list[str], dict[str, str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--report" in arguments:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed (fused-inpaint[report])")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.json").write_text("{")
    before = set(tmp_path.rglob("*"))
    assert main(["bench", *arguments, *(["-o", "."] if "--report" in arguments else [])]) == 2
    assert capsys.readouterr().err.startswith(f"fused-inpaint bench: {message}")
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", [[], ["--report"]])
def test_an_installed_wheel_has_none(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fused-inpaint bench: the benchmarks must be there, in a checkout") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "absent", "extra"), [([], "pytest_benchmark", "test"), (["--report"], "matplotlib", "report")]
)
def test_missing_packages(
    arguments: list[str], absent: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench.find_spec
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == absent else found(name))
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.endswith(f"pip install 'fused-inpaint[{extra}]'\n")
