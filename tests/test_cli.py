# SPDX-License-Identifier: Apache-2.0
"""The command as a user meets it: exit codes, one sentence for each mistake, files whole or not at all."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fused_inpaint
from fused_inpaint import _backends
from fused_inpaint.cli import main
from fused_inpaint.cli._common import ProgressBar

HIGH, WIDE = 40, 52


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    down, across = np.mgrid[:HIGH, :WIDE]
    picture = np.stack([5 * down, 4 * across, 2 * (down + across)], -1).astype(np.uint8)
    Image.fromarray(picture).save("photo.png")
    mask = np.zeros((HIGH, WIDE), np.uint8)
    mask[10:16, 20:30] = 255
    Image.fromarray(mask).save("mask.png")
    return tmp_path


def read(name: str) -> np.ndarray:
    with Image.open(name) as image:
        return np.asarray(image)


def inpaint(*arguments: str) -> int:
    return main(["inpaint", "photo.png", "--mask", "mask.png", "-o", "out.png", *arguments])


def test_internal_learning_end_to_end(folder, capsys):
    assert inpaint("--steps", "2") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("out.png: held-out known pixels: network ") and "-> kept " in printed.out
    before, after = read("photo.png"), read("out.png")
    hole = read("mask.png") > 0
    np.testing.assert_array_equal(after[~hole], before[~hole])
    assert np.abs(after[hole].astype(int) - before[hole]).max() < 12
    assert sorted(os.listdir()) == ["mask.png", "out.png", "photo.png"]


def test_black_holes(folder):
    Image.fromarray(255 - read("mask.png")).save("mask.png")
    assert inpaint("--steps", "1", "--hole", "black") == 0
    before, after = read("photo.png"), read("out.png")
    np.testing.assert_array_equal(after[:10], before[:10])


def test_a_mask_that_may_be_the_wrong_way_round_is_mentioned_once(folder, weights, capsys):
    Image.fromarray(255 - read("mask.png")).save("mask.png")
    for name in ("photos", "masks"):
        os.mkdir(name)
        for i in range(2):
            os.link(f"{name[:-1]}.png", f"{name}/{i}.png")
    command = ["inpaint", "photos", "--mask", "masks", "-o", "restored", "--weights", weights]
    assert main(command) == 0
    noted = [line for line in capsys.readouterr().err.splitlines() if "as hole" in line]
    share = (read("mask.png") > 0).mean()
    assert noted == [
        f"fused-inpaint inpaint: note: masks/0.png marks {share:.0%} of its photo as hole; "
        "if holes are black, say --hole black"
    ]
    assert main([*command, "--hole", "black"]) == 0
    assert "as hole" not in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"fused-inpaint {fused_inpaint.__version__}\n"


def test_weights_are_one_forward_pass(folder, capsys):
    torch.manual_seed(0)
    model = fused_inpaint.models.build_model("pconv", levels=3, width=8).eval()
    torch.save(model.state_dict(), "weights.pth")
    assert inpaint("--weights", "weights.pth") == 0
    assert "filled by pconv" in capsys.readouterr().out
    before, after = read("photo.png"), read("out.png")
    known = torch.from_numpy((read("mask.png") == 0).astype(np.float32))[None, None]
    image = torch.from_numpy(before.astype(np.float32) / 255).permute(2, 0, 1)[None]
    expected = (model.inpaint(image, known)[0].permute(1, 2, 0) * 255).round().numpy()
    assert np.abs(after - expected).max() <= 1


def test_hole_out_of_the_networks_reach_is_reported_and_filled(folder, capsys):
    mask = np.full((HIGH, WIDE), 255, np.uint8)
    mask[:2, :2] = 0
    Image.fromarray(mask).save("mask.png")
    model = fused_inpaint.models.build_model("pconv", levels=1, width=4).eval()
    torch.save(model.state_dict(), "weights.pth")
    assert inpaint("--weights", "weights.pth") == 0
    assert "out of the network's reach" in capsys.readouterr().out
    assert read("out.png")[-1, -1].max() < 20  # the four known pixels are dark


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("absent.png", "--mask", "mask.png", "-o", "out.png"), "photo must be an existing file, got absent.png"),
        (
            ("photo.png", "--mask", "small.png", "-o", "out.png"),
            "mask must be 52x40 pixels (width x height) like",
        ),
        (("photo.png", "--mask", "mask.png", "-o", "out.jpg"), "try out.png"),
        (("photo.png", "--mask", "mask.png", "-o", "no/out.png"), "output must be in an existing folder"),
        (("photo.png", "--mask", "mask.png", "-o", "photo.png"), "output must be another file than the inputs"),
        (
            ("photo.png", "--mask", "mask.png", "-o", "out.png", "--weights", "none.pth"),
            "path must be an existing file",
        ),
        (
            ("photo.png", "--mask", "mask.png", "-o", "out.png", "--weights", "mask.png"),
            "path must be a whole checkpoint (",
        ),
        (
            ("photo.png", "--mask", "mask.png", "-o", "out.png", "--strategy", "tile", "--size", "9"),
            "--strategy and --size must come with --weights, got none",
        ),
        (
            ("photo.png", "--mask", "mask.png", "-o", "out.png", "--weights", "none.pth", "--size", "9"),
            "--size must come with a --strategy that takes them, got whole",
        ),
        (
            ("photo.png", "--mask", "mask.png", "-o", "out.png", "--weights", "none.pth", "--seconds", "4"),
            "--seconds must come without --weights, got both",
        ),
    ],
    ids=[
        "photo",
        "size",
        "jpg",
        "folder",
        "overwrite",
        "no weights",
        "bad weights",
        "no network",
        "whole",
        "no fitting",
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(folder, capsys, arguments, sentence):
    Image.new("L", (5, 5)).save("small.png")
    before = {name: (folder / name).read_bytes() for name in os.listdir()}
    assert main(["inpaint", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fused-inpaint inpaint: ") and sentence in error and error.count("\n") == 1
    assert {name: (folder / name).read_bytes() for name in os.listdir()} == before


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--seconds", "nan"], ["--steps", "-1"], ["--hole", "grey"]])
def test_bad_arguments_exit_with_2(folder, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        inpaint(*arguments)
    assert stop.value.code == 2 and "fused-inpaint inpaint: error: argument" in capsys.readouterr().err


def test_interrupt_leaves_nothing_behind(folder):
    command = [sys.executable, "-m", "fused_inpaint", "inpaint", "photo.png", "--mask", "mask.png", "-o", "out.png"]
    with subprocess.Popen([*command, "--steps", "100000"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline().startswith("filling ")  # its first sign of life, after ten seconds
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in error and error.endswith("fused-inpaint inpaint: interrupted, nothing written\n")
    assert sorted(os.listdir()) == ["mask.png", "photo.png"]


def test_output_that_nobody_reads():
    command = [sys.executable, "-m", "fused_inpaint", "info"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as `| head` does, once it has enough
    assert process.stderr.read() == "" and process.wait(timeout=60) == 141
    process.stderr.close()


def test_output_that_is_closed():
    command = f"{sys.executable} -m fused_inpaint info >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE)
    assert done.returncode == 0 and done.stderr == b""


def test_a_pipe_of_its_own_that_breaks_is_no_reader_gone(monkeypatch, capfd):
    def run(_):
        raise BrokenPipeError

    monkeypatch.setattr("fused_inpaint.cli.info.run", run)
    with pytest.raises(BrokenPipeError):
        main(["info"])


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["fused_inpaint"] == fused_inpaint.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backends"]["reference"] == "usable" and len(facts["backends"]["cuda"]) > 0
    assert facts["build"]["kind"] and facts["machine"]["threads"] == torch.get_num_threads()
    assert main(["info"]) == 0
    assert "backends" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["fastest", "cuda"])
def test_info_says_what_is_wrong_with_a_backend(name, capsys, monkeypatch):
    if name == "cuda" and not _backends.status()["cuda"]:
        pytest.skip("there is nothing wrong with it here")
    monkeypatch.setattr(_backends, "_selected", name)
    assert main(["info", "--json"]) == 0
    selected = json.loads(capsys.readouterr().out)["backends"]["selected"]
    assert selected.startswith("none: FUSED_INPAINT_BACKEND: ") and f", got {name}" in selected
    monkeypatch.setattr(_backends, "_selected", "reference")
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["selected"] == "reference"


def test_demo_compares_two_fits_and_writes_the_picture(folder, capsys, monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.setattr("fused_inpaint.cli.demo.SIDE", 64)
    assert main(["demo", "--steps", "2", "-o", "demo.png"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "seconds per step (median)",
        "peak memory",
        "largest difference at step one",
        "PSNR in the hole: naive",
    ):
        assert part in printed
    line = next(line for line in printed.splitlines() if line.startswith("largest difference"))
    outputs, gradients, scale = (float(word.strip("(),")) for word in line.split() if "e-" in word)
    assert outputs < 1e-4 and gradients < 1e-3 * scale
    assert read("demo.png").shape[1] > 5 * 64


def test_a_fit_that_dies_is_one_sentence(folder, capsys, monkeypatch):
    from fused_inpaint.training import compare

    pytest.importorskip("skimage")
    monkeypatch.setattr(compare, "initial_state", lambda seed: {})
    assert main(["demo", "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert "fused-inpaint demo: the naive fit must run to its end, got" in error and "Traceback" not in error
    assert not os.path.exists("demo.png")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bar(terminal, monkeypatch):
    class Stream:
        text = ""

        def isatty(self):
            return terminal

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    stream = Stream()
    bar = ProgressBar("fitting", stream)
    for step in range(10):
        bar(step / 10, f"step {step}")
    bar.close()
    if terminal:
        assert stream.text.count("\r") == 11 and "\n" not in stream.text and "#" in stream.text
    else:
        assert stream.text.count("\n") == 3 and "\r" not in stream.text


@pytest.fixture
def weights(folder) -> str:
    torch.manual_seed(0)
    fused_inpaint.models.build_model("pconv", levels=3, width=8).save_pretrained("weights.safetensors")
    return "weights.safetensors"


def test_the_parsers_models_are_those_that_exist():
    from fused_inpaint.cli._common import MODELS
    from fused_inpaint.models.registry import MODELS as REGISTERED

    assert list(REGISTERED) == list(MODELS)


def test_a_folder_of_photos(folder, weights, capsys):
    (folder / "photos").mkdir()
    for name in ("a.png", "b.tif"):
        Image.fromarray(read("photo.png")).save(folder / "photos" / name)
    (folder / "photos" / "notes.txt").write_text("not a picture")
    assert main(["inpaint", "photos", "--mask", "mask.png", "-o", "out", "--weights", weights]) == 0
    assert capsys.readouterr().out.count("filled by pconv with weights.safetensors") == 2
    assert sorted(os.listdir("out")) == ["a.png", "b.png"]
    np.testing.assert_array_equal(read("out/a.png"), read("out/b.png"))
    assert (read("out/a.png")[read("mask.png") == 0] == read("photo.png")[read("mask.png") == 0]).all()


def test_bad_photos_of_a_folder_are_named_and_the_others_filled(folder, weights, capsys):
    for name in ("photos", "masks"):
        (folder / name).mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(read("photo.png")).save(folder / "photos" / name)
        Image.fromarray(read("mask.png")).save(folder / "masks" / name)
    (folder / "photos" / "b.png").write_bytes(b"no picture")
    assert main(["inpaint", "photos", "--mask", "masks", "-o", "out", "--weights", weights]) == 2
    error = capsys.readouterr().err
    assert "got 1 of 2 that are not: b.png (photo must be an image file" in error and error.count("\n") == 1
    assert os.listdir("out") == ["a.png"]
    os.remove("masks/a.png")
    assert main(["inpaint", "photos", "--mask", "masks", "-o", "out", "--weights", weights]) == 2
    assert "with a mask of the same name each, got none for a.png" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["resize", "tile", "crop", "subsample"])
def test_strategies(folder, weights, strategy):
    assert inpaint("--weights", weights, "--strategy", strategy, "--size", "24", "--overlap", "4") == 0
    hole = read("mask.png") > 0
    np.testing.assert_array_equal(read("out.png")[~hole], read("photo.png")[~hole])


def test_convert(folder, weights, capsys):
    state = fused_inpaint.models.load_published("pconv", weights).net.state_dict()
    published = {}
    for name, value in state.items():
        side, index, rest = name.split(".", 2)
        number = int(index) + 1 if side == "encoder" else 3 - int(index)
        rest = rest.replace("conv.", "conv.input_conv.") if rest.startswith("conv.") else rest.replace("norm.", "bn.")
        published[f"{side[:3]}_{number}.{rest}"] = value
    torch.save({"model": published}, "published.pth")
    assert main(["convert", "published.pth", "-o", "ours.safetensors"]) == 0
    assert capsys.readouterr().out.startswith("ours.safetensors: pconv generator, 0.")
    assert inpaint("--weights", "ours.safetensors") == 0
    ours = fused_inpaint.models.PConv.from_pretrained("ours.safetensors")
    assert ours.config["levels"] == 3
    torch.save({"odd.weight": torch.zeros(1)}, "odd.pth")
    torch.save({"step": 1, "key": "pconv", "model": {}, "optimiser": {}}, "checkpoint.pt")
    before = sorted(os.listdir())
    for options, sentence in (
        (["checkpoint.pt", "-o", "odd.safetensors"], "got a state of its training in checkpoint.pt; model.safetensors"),
        (["odd.pth", "-o", "odd.safetensors"], "input must be of a known source, got none that its keys tell"),
        (["ours.safetensors", "-o", "ours.safetensors"], "output must be another file than the input, got ours.saf"),
        (["published.pth", "-o", "ours.pth"], "output must end in .safetensors, got ours.pth"),
        (
            ["mask.png", "-o", "ours.safetensors"],
            "path must be a whole checkpoint (.pth, .safetensors, .npz), got mask.png",
        ),
        (["published.pth", "-o", "ours.safetensors", "--from", "nvidia", "--model", "pconv"], "source must be one of"),
        (["published.pth", "-o", "none/ours.safetensors"], "output must be in an existing folder"),
    ):
        assert main(["convert", *options]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    assert sorted(os.listdir()) == before
