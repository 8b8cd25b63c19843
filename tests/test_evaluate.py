# SPDX-License-Identifier: Apache-2.0
"""Evaluation: metrics by hand and by scikit-image, classes and pairing of masks, and files that say the same."""

import csv
import json
import math
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fused_inpaint
from fused_inpaint import masks
from fused_inpaint.cli import main
from fused_inpaint.images import ImageError
from fused_inpaint.training import evaluate, fills, learned_metrics, metrics, report
from fused_inpaint.training.photos import MadeMasks, Photos

SIZE, BORDER = 32, 3
COLUMNS = [(masks.bucket_name(bucket), place) for bucket in masks.BUCKETS for place in ("free", "border")]


@pytest.fixture(autouse=True)
def alone(one_thread, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos() -> Photos:
    """Three photos, one in a subfolder, of different sizes."""
    Path("photos/sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "sub/c.png")):
        down, across = np.mgrid[: 40 + 8 * number, :44]
        wave = np.sin(down / (3 + number)) * np.cos(across / 5)
        picture = np.stack([127 + 100 * wave, 3 * down + across, 5 * across + number], -1).astype(np.uint8)
        Image.fromarray(picture).save(Path("photos") / name)
    return Photos("photos", SIZE, MadeMasks("irregular"), augment=False)


@pytest.fixture
def weights() -> str:
    fused_inpaint.models.build_model("pconv", levels=3, width=4).save_pretrained("w.safetensors")
    return "w.safetensors"


def save_mask(path: str, hole: np.ndarray) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Image.fromarray(np.where(hole, 255, 0).astype(np.uint8)).save(path)


def box(high: int, wide: int, top: int, left: int, side: int) -> np.ndarray:
    hole = np.zeros((high, wide), bool)
    hole[top : top + side, left : left + side] = True
    return hole


def run(photos: Photos, methods: dict, source=None) -> evaluate.Results:
    source = source or evaluate.MadeMasks(SIZE, BORDER)
    found = evaluate.cases(photos, source, BORDER)
    return evaluate.evaluate(found, len(photos) * source.per_photo, methods)


def test_metrics_by_hand():
    truth = torch.zeros(1, 3, 12, 10)
    filled, known = truth.clone(), torch.ones(1, 1, 12, 10)
    known[..., 2:4, 5:8] = 0  # 6 of 120 pixels
    filled[:, 0, 2:4, 5:8], filled[:, 1, 2:4, 5:8] = 0.5, 0.25
    got = metrics.scores(truth, filled, known)
    in_hole, squared = 0.75 / 3, 0.3125 / 3
    assert got["hole_l1"] == pytest.approx(100 * in_hole, rel=1e-12)
    assert got["l1"] == pytest.approx(100 * in_hole / 20, rel=1e-12)
    assert got["hole_psnr"] == pytest.approx(-10 * math.log10(squared), rel=1e-12)
    assert got["psnr"] == pytest.approx(-10 * math.log10(squared / 20), rel=1e-12)


def test_metrics_are_scikit_images():
    skimage = pytest.importorskip("skimage.metrics")
    truth, filled = torch.rand(2, 1, 3, 20, 17)
    a, b = (image[0].permute(1, 2, 0).numpy() for image in (truth, filled))
    expected = skimage.peak_signal_noise_ratio(a, b, data_range=1.0)
    assert metrics.psnr(truth, filled) == pytest.approx(expected, rel=1e-6)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    similarity = metrics.Similarity()
    assert similarity(truth, filled) == pytest.approx(skimage.structural_similarity(a, b, channel_axis=-1, **options))
    assert similarity(truth, truth) == 1.0
    similarity(truth[..., : metrics.LEAST_SIDE], filled[..., : metrics.LEAST_SIDE])


def test_nan_is_not_perfect():
    broken = torch.full((1, 3, 4, 4), math.nan)
    assert math.isnan(metrics.psnr(torch.zeros_like(broken), broken))


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_intervals_contain_the_mean_and_lie_among_the_values(values):
    found = metrics.interval(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert min(values) - 1e-9 <= found.low <= found.mean <= found.high <= max(values) + 1e-9


def test_intervals_shrink_and_are_those_of_the_normal_law():
    values = np.random.default_rng(3).normal(5, 2, 4000)
    widths = []
    for count in (40, 400, 4000):
        _, low, high = metrics.interval(values[:count])
        widths.append(high - low)
        assert high - low == pytest.approx(2 * 1.96 * values[:count].std() / math.sqrt(count), rel=0.12)
    assert widths[0] > 2 * widths[1] > 4 * widths[2]
    assert metrics.interval(values, seed=1) == metrics.interval(values, seed=1) != metrics.interval(values, seed=2)


def test_intervals_of_infinities_and_of_nothing():
    assert metrics.interval([math.inf, math.inf]) == (math.inf,) * 3
    found = metrics.interval([1.0, 2.0, 3.0, math.inf] * 10)
    assert found.mean == found.high == math.inf and not math.isnan(found.low)
    with pytest.raises(ValueError, match="interval: values must hold at least one number, got none"):
        metrics.interval([])


def test_a_perfect_fill_scores_perfectly(photos):
    truths = iter([photos.middle(item)[None] for item in range(3) for _ in range(12)])
    results = run(photos, {"perfect": lambda image, known: next(truths)})
    assert len(results.scores) == 36
    for score in results.scores:
        expected = {"l1": 0, "psnr": math.inf, "hole_l1": 0, "hole_psnr": math.inf, "ssim": 1}
        assert score.metrics == {key: expected[key] for key in score.metrics}
    assert {cell.interval for cell in report.summary(results)} <= {(0,) * 3, (1,) * 3, (math.inf,) * 3}


def test_made_masks_fill_every_class_and_are_reproducible(photos):
    source = evaluate.MadeMasks(SIZE, BORDER, seed=5)
    found = list(evaluate.cases(photos, source, BORDER))
    assert [(case.bucket, case.place) for case in found] == COLUMNS * 3
    for case in found:
        assert case.mask == f"irregular {case.bucket} {case.place}"
        low, high = map(float, case.bucket.split("-"))
        assert low < masks.hole_ratio(case.known) <= high
        assert (masks.border_distance(case.known) >= BORDER) == (case.place == "free")
    assert not torch.equal(found[0].known, found[12].known)
    again = list(evaluate.MadeMasks(SIZE, BORDER, seed=5).of(1))
    assert all(torch.equal(case.known[0, 0], mask) for case, (_, mask) in zip(found[12:24], again, strict=True))


def test_masks_that_are_clear_of_the_border_by_chance_are_moved(monkeypatch):
    def central(kind, size, rng, ratio, border=None):
        mask = torch.ones(size, size, dtype=torch.uint8)
        mask[10:14, 12:17] = 0
        return mask

    monkeypatch.setattr(masks, "random_mask", central)
    for name, mask in evaluate.MadeMasks(SIZE, BORDER).of(0):
        assert int((mask == 0).sum()) == 20
        assert masks.border_distance(mask) == (0 if name.endswith("border") else 10)


def test_methods_see_no_hole_and_change_no_known_pixel(photos):
    def spy(image, known):
        assert not image[:, :, known[0, 0] == 0].any()
        return torch.full_like(image, 7.0)

    results = run(photos, {"spy": spy})
    for case, composites in results.sheet:
        assert torch.equal(composites["spy"], torch.where(case.known > 0, case.truth, 1.0))


def test_count_draws_photos_and_broken_ones_are_replaced(photos):
    source = evaluate.MadeMasks(SIZE, BORDER)
    some = {case.photo for case in evaluate.cases(photos, source, BORDER, count=2)}
    assert len(some) == 2 and some < {"a.png", "b.png", "sub/c.png"}
    assert len(list(evaluate.cases(photos, source, BORDER, count=9))) == 36
    whole = Path("photos", min(some)).read_bytes()
    Path("photos", min(some)).write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="cannot be read and is skipped"):
        others = {case.photo for case in evaluate.cases(photos, source, BORDER, count=2)}
    assert len(others) == 2 and min(some) not in others and photos.skipped == 1


def test_masks_are_paired_by_name_and_cut_like_the_photo(photos):
    for number, path in enumerate(photos.files):
        high, wide = 40 + 8 * number, 44
        save_mask(f"masks/{path.stem}.tif", box(high, wide, 4 * number + 10, 12, 10 + number))
    source = evaluate.GivenMasks("masks", "white", SIZE, photos.files)
    found = list(evaluate.cases(photos, source, BORDER))
    assert source.paired and [(case.photo, case.mask) for case in found] == [
        ("a.png", "a.tif"),
        ("b.png", "b.tif"),
        ("sub/c.png", "c.tif"),
    ]
    # The middle 40x40 of 40x44, brought to 32: a 10 pixel box at (10, 12) is an 8 pixel box at (8, 8).
    assert torch.equal(found[0].known[0, 0] == 0, torch.from_numpy(box(SIZE, SIZE, 8, 8, 8)))
    save_mask("masks/b.tif", np.ones((40, 44), bool))
    source = evaluate.GivenMasks("masks", "white", SIZE, photos.files)
    assert [case.mask for case in evaluate.cases(photos, source, BORDER)] == ["a.tif", "c.tif"]
    assert source.unusable == 1


def test_masks_without_the_photos_names_are_drawn_in_turn(photos):
    for number in range(4):
        save_mask(f"masks/{number}.png", box(64, 64, 0 if number % 2 else 20, 20, 5 + 13 * number))
    save_mask("masks/a.png", box(64, 64, 10, 10, 0))  # no hole
    source = evaluate.GivenMasks("masks", "white", SIZE, photos.files, seed=1)
    assert not source.paired and source.matching == 1
    names = [next(source.of(item))[0] for item in range(10)]
    assert set(names) == {"0.png", "1.png", "2.png", "3.png"} and names[:4] == names[4:8] and source.unusable == 1
    found = {case.mask: case for _ in range(2) for case in evaluate.cases(photos, source, BORDER)}
    assert len(found) == 4
    for name, case in found.items():
        assert case.bucket == {"0.png": "other", "1.png": "0.01-0.1", "2.png": "0.2-0.3", "3.png": "0.4-0.5"}[name]
        assert case.place == ("border" if int(name[0]) % 2 else "free")
    os.remove("masks/a.png")
    white, black = (evaluate.GivenMasks("masks", hole, SIZE, photos.files) for hole in ("white", "black"))
    (name, mask), (same, turned) = next(white.of(0)), next(black.of(0))
    assert name == same and torch.equal(mask, 1 - turned)


def test_a_folder_without_a_usable_mask_is_refused(photos):
    save_mask("masks/a.png", box(64, 64, 10, 10, 0))
    with pytest.raises(ImageError, match="masks must be usable, got none that is in masks"):
        list(evaluate.cases(photos, evaluate.GivenMasks("masks", "white", SIZE, photos.files), BORDER))


def test_baselines(photos, monkeypatch):
    known = torch.ones(1, 1, 16, 16)
    known[..., 4:9, 4:9] = 0
    image = torch.rand(1, 3, 16, 16) * known
    expected = image[:, :, known[0, 0] > 0].mean(-1)
    torch.testing.assert_close(evaluate.mean_colour(image, known)[0, :, 0, 0], expected[0], rtol=1e-6, atol=0)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(fills.CannotFillError, match="telea is left out, OpenCV is not installed"):
        evaluate.telea(image, known)
    seen = []
    cv2 = types.SimpleNamespace(INPAINT_TELEA=1, inpaint=lambda *given: seen.append(given) or given[0] // 2)
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    filled = evaluate.telea(image, known)
    torch.testing.assert_close(filled, (image * 255).round().div(2, rounding_mode="floor") / 255, rtol=0, atol=1e-6)
    pixels, hole, _, method = seen[0]
    assert pixels.shape == (16, 16, 3) and pixels.dtype == hole.dtype == np.uint8 and method == 1
    np.testing.assert_array_equal(hole, known[0, 0].numpy() == 0)


def test_what_cannot_fill_or_be_measured_is_left_out_with_a_sentence(photos, monkeypatch):
    def picky(image, known):
        if masks.hole_ratio(known) > 0.4:
            raise fills.CannotFillError(f"picky is left out, {masks.hole_ratio(known)}")
        return image

    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    results = run(photos, {"mean": evaluate.mean_colour, "picky": picky})
    notes = report.notes(results)
    assert notes[0].startswith("picky is left out") and notes[0].endswith("(12 of 36 images)")
    assert [note.split(" ")[0] for note in notes[1:]] == ["SSIM", "LPIPS", "FID"]
    assert "ssim" not in results.scores[0].metrics
    assert "–" in next(line for line in report.table(report.summary(results)).splitlines() if "picky" in line)
    found = evaluate.cases(photos, evaluate.MadeMasks(SIZE, BORDER), BORDER, 1)
    results = evaluate.evaluate(found, 12, {"mean": evaluate.mean_colour}, fid_weights="inception.pth")
    assert results.left_out[-1].startswith("FID is left out, torchmetrics cannot be imported")


def test_an_interval_of_few_images_is_said_to_be_one(photos):
    results = run(photos, {"mean": evaluate.mean_colour})
    sentence = "Fewer than 10 images, too few for an interval: {} of 12 classes."
    assert sentence.format(12) in report.markdown(results, report.summary(results), {})
    one = [score for score in results.scores if score[3:5] == results.scores[0][3:5]]
    results.scores += one * 3
    assert sentence.format(11) in report.markdown(results, report.summary(results), {})
    results.scores *= 4
    assert "too few" not in report.markdown(results, report.summary(results), {})


class Alike:
    """Stands for torchmetrics' LPIPS: a factor, read as torchvision reads AlexNet, of the mean absolute difference."""

    def __init__(self, net_type, normalize):
        assert net_type == "alex" and normalize
        path = os.path.join(torch.hub.get_dir(), "checkpoints", "alexnet-1.pth")
        self.factor = torch.load(path, weights_only=False)["factor"]

    def eval(self):
        return self

    def __call__(self, filled, truth):
        return self.factor * (filled - truth).abs().mean()


def test_lpips_by_a_file_of_weights(photos, monkeypatch, tmp_path):
    alexnet = types.SimpleNamespace(DEFAULT=types.SimpleNamespace(url="https://none/alexnet-1.pth"))
    for name, module in (
        ("torchmetrics", None),
        ("torchmetrics.image", None),
        ("torchmetrics.image.lpip", types.SimpleNamespace(LearnedPerceptualImagePatchSimilarity=Alike)),
        ("torchvision", None),
        ("torchvision.models", types.SimpleNamespace(AlexNet_Weights=alexnet)),
    ):
        monkeypatch.setitem(sys.modules, name, module or types.ModuleType(name))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "cache"))
    path = tmp_path / "weights.pth"
    torch.save({"factor": torch.tensor(3.0)}, path)
    found = evaluate.cases(photos, evaluate.MadeMasks(SIZE, BORDER), BORDER, 1)
    results = evaluate.evaluate(found, 12, {"mean": evaluate.mean_colour}, lpips_weights=str(path))
    for scored in results.scores:
        assert scored.metrics["lpips"] == pytest.approx(3 * scored.metrics["l1"] / 100, rel=1e-4)
    assert torch.hub.get_dir() == str(tmp_path / "cache"), "torch's cache is where it was"

    with pytest.raises(metrics.UnavailableError, match=r"^LPIPS is left out, alexnet-1.pth is not in .*cache/checkp"):
        learned_metrics.Perceptual()
    ran = tmp_path / "ran"
    path.write_bytes(pickle.dumps(Code(str(ran))))
    with pytest.raises(metrics.UnavailableError, match=r"^LPIPS is left out, its network cannot be built \("):
        learned_metrics.Perceptual(str(path))
    assert not ran.exists(), "a file of weights must not run code"


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


class Distance:
    """Stands for torchmetrics' FID: the difference of mean brightness, in percent."""

    def __init__(self, feature, feature_extractor_weights_path, normalize):
        assert feature == 2048 and normalize
        if feature_extractor_weights_path == "bad":
            raise RuntimeError("Error(s) in loading\nmore")
        self.seen = {True: [], False: []}

    def update(self, image, real):
        self.seen[real].append(image)

    def compute(self):
        real, fake = (torch.cat(self.seen[key]).mean() for key in (True, False))
        return 100 * (fake - real).abs()


def test_fid_of_each_method_against_each_photo_once(photos, monkeypatch):
    fid = types.SimpleNamespace(FrechetInceptionDistance=Distance)
    for name, module in (("torchmetrics", None), ("torchmetrics.image", None), ("torchmetrics.image.fid", fid)):
        monkeypatch.setitem(sys.modules, name, module or types.ModuleType(name))
    methods = {"mean": evaluate.mean_colour, "never": evaluate.telea}
    monkeypatch.setitem(sys.modules, "cv2", None)
    found = evaluate.cases(photos, evaluate.MadeMasks(SIZE, BORDER), BORDER)
    composites = []
    monkeypatch.setattr(learned_metrics.Frechet, "add", recording(learned_metrics.Frechet.add, composites))
    results = evaluate.evaluate(found, 36, methods, fid_weights="good")
    truth = torch.stack([photos.middle(item) for item in range(3)]).mean()
    expected = 100 * abs(float(torch.cat(composites).mean() - truth))
    assert results.fid == {"mean": pytest.approx(expected, rel=1e-4)}
    assert "FID against 3 photos: mean " in report.notes(results)[0]
    with pytest.raises(metrics.UnavailableError, match=r"FID is left out, its network .* \(Error\(s\) in loading\)$"):
        learned_metrics.Frechet("bad", ["mean"])


def recording(add, into):
    def wrapped(self, method, image):
        into.append(image)
        add(self, method, image)

    return wrapped


def evaluated(*arguments: str) -> int:
    command = ["evaluate", "pconv", "--weights", "w.safetensors", "--data", "photos", "--size", str(SIZE)]
    return main([*command, "--baselines", "mean", *arguments])


def test_end_to_end_the_files_agree(photos, weights, capsys):
    assert evaluated("--out", "run", "--seed", "4") == 0
    printed = capsys.readouterr()
    assert sorted(os.listdir("run")) == ["contact_sheet.png", "results.csv", "results.json", "results.md"]
    held = json.loads(Path("run/results.json").read_text())
    assert held["arguments"]["seed"] == 4 and held["versions"]["torch"] == torch.__version__ and held["machine"]["cpu"]
    with open("run/results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    flat = [
        {**{key: str(score[key]) for key in lines[0].keys() - {"metric", "value"}}, "metric": m, "value": str(v)}
        for score in held["images"]
        for m, v in score["metrics"].items()
    ]
    assert flat == lines and len(lines) == 3 * 12 * 2 * len(held["images"][0]["metrics"])

    page = Path("run/results.md").read_text()
    table = page.split("\n\n")[3]
    header, _, counts, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    assert header[1:] == [f"{bucket} {'N' if place == 'free' else 'B'}" for bucket, place in COLUMNS]
    assert counts == ["images"] + ["3"] * 12
    labels = {
        f"{metrics.METRICS[m].label} ({method})": (m, method) for m in metrics.METRICS for method in ("pconv", "mean")
    }
    assert {row[0] for row in rows} == {label for label, (m, _) in labels.items() if m in held["images"][0]["metrics"]}
    for row in rows:
        metric, method = labels[row[0]]
        for (bucket, place), cell in zip(COLUMNS, row[1:], strict=True):
            wanted = {"metric": metric, "method": method, "bucket": bucket, "place": place}
            values = [float(line["value"]) for line in lines if wanted.items() <= line.items()]
            (found,) = [cell for cell in held["summary"] if wanted.items() <= cell.items()]
            assert found["images"] == 3 and found["interval"]["mean"] == pytest.approx(np.mean(values), rel=1e-12)
            low, high = found["interval"]["low"], found["interval"]["high"]
            assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
            assert float(cell) == pytest.approx(np.mean(values), abs=0.51 * 0.1 ** metrics.METRICS[metric].digits)
    # The terminal has the columns of N and those of B, one below the other.
    told = [line for line in printed.out.splitlines() if line.startswith("|")]
    narrow = [[cell.strip() for cell in line.strip("|").split("|")] for line in told]
    half = len(narrow) // 2
    for start, place in ((0, 0), (half, 1)):
        assert narrow[start] == ["", *dict.fromkeys(bucket for bucket, _ in COLUMNS)]
        assert narrow[start + 2 : start + half] == [[row[0], *row[1 + place :: 2]] for row in (counts, *rows)]
    assert max(len(line) for line in printed.out.splitlines()) < 100
    assert printed.out.startswith(f"N: the hole keeps at least {BORDER} pixels from the image's border\n\n|")
    with Image.open("run/contact_sheet.png") as sheet:
        assert sheet.size == (4 * (SIZE + 6) + 6, 6 * (SIZE + 6) + 6 + 18)
    assert "fused-inpaint evaluate: note: FID is left out" in printed.err


def test_the_networks_numbers_are_those_of_inpaint_and_repeat(photos, weights):
    for name in ("one", "two"):
        assert evaluated("--out", name) == 0
    assert Path("one/results.csv").read_bytes() == Path("two/results.csv").read_bytes()
    held = json.loads(Path("one/results.json").read_text())
    model = fused_inpaint.models.load_published("pconv", weights)
    case = next(evaluate.cases(photos, evaluate.MadeMasks(SIZE, BORDER), BORDER))
    expected = metrics.l1_percent(case.truth, model.inpaint(case.truth, case.known))
    assert held["images"][0]["method"] == "pconv"
    assert held["images"][0]["metrics"]["l1"] == pytest.approx(expected, rel=1e-6)


def test_perfect_scores_are_strict_json(photos):
    truths = iter([photos.middle(item)[None] for item in range(3) for _ in range(12)])
    results = run(photos, {"perfect": lambda image, known: next(truths)})
    text = report.as_json(results, report.summary(results), {})
    held = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert float(held["images"][0]["metrics"]["psnr"]) == math.inf
    assert " inf " in report.table(report.summary(results))


def test_masks_of_a_folder_from_the_command_line(photos, weights, capsys):
    save_mask("masks/x.png", ~box(64, 64, 20, 20, 12))
    assert evaluated("--masks", "masks", "--count", "1") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("B: the hole comes nearer than 3 pixels") and " other |" in printed.out
    assert "drawn in turn, 0 photos have one of their name" in printed.err
    assert "if holes are black, say --hole black" in printed.err
    assert evaluated("--masks", "masks", "--hole", "black") == 0
    printed = capsys.readouterr()
    assert "other" not in printed.out and "--hole" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--data", "absent"), "data must be an existing folder, got absent"),
        (("--data", "empty"), "data must hold pictures, got none"),
        (("--weights", "absent.pth"), "path must be an existing file"),
        (("--weights", "photos/a.png"), "path must be a whole checkpoint"),
        (("--masks", "empty"), "masks must be a folder with pictures, got none in empty"),
        (("--out", "no/run"), "out must be in an existing folder, got no/run"),
        (("--out", "photos/a.png"), "out must be a folder, got the file photos/a.png"),
        (("--fid-weights", "absent.pth"), "fid-weights must be an existing file, got absent.pth"),
        (("--lpips-weights", "absent.pth"), "lpips-weights must be an existing file, got absent.pth"),
        (("--border", "200"), "border must leave room for 50% hole, got 12 pixels of 32x32"),
        (("--device", "abacus"), "device must be one that torch can use here, got abacus"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(photos, weights, capsys, arguments, sentence):
    os.mkdir("empty")
    assert evaluated("--out", "run", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fused-inpaint evaluate: ") and sentence in error and error.count("\n") == 1
    assert not os.path.exists("run")


def test_photos_that_all_break_are_one_sentence(photos, weights, capsys):
    for path in photos.files:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="cannot be read"):
        assert evaluated("--out", "run") == 2
    error = capsys.readouterr().err
    assert (
        "data must hold readable photos with usable masks, got none (photos that cannot be read, skipped: 3)" in error
    )
    assert not os.path.exists("run")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--baselines", "mean,magic"), "must be some of mean,biharmonic,telea, or none, got mean,magic"),
        (("--size", "16"), "must be at least 32 pixels, got 16"),
        (("--count", "0"), "must be a positive whole number, got 0"),
    ],
)
def test_bad_arguments_exit_with_2(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        evaluated(*arguments)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_an_interrupt_leaves_nothing_behind(photos, weights, capsys, monkeypatch):
    def stop(image, known):
        raise KeyboardInterrupt

    monkeypatch.setitem(evaluate.BASELINES, "mean", stop)
    assert evaluated("--out", "run") == 130
    assert not os.path.exists("run")


def test_the_parsers_baselines_are_those_that_exist():
    from fused_inpaint.cli.evaluate import BASELINES

    assert tuple(evaluate.BASELINES) == BASELINES
