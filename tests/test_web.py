# SPDX-License-Identifier: Apache-2.0
"""The page of `fused-inpaint web`: what it computes, what it refuses, and all of it in a browser, painted by a mouse.

The picture of docs/web.md: FUSED_INPAINT_SCREENSHOT=docs/web.png python -m pytest tests/test_web.py -k screenshot
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fused_inpaint import completion, images, models, web
from fused_inpaint.cli import main
from fused_inpaint.cli import web as command

HIGH, WIDE = 40, 52


def silent(fraction: float, text: str) -> None:
    pass


def black(image, known, progress):
    """A method whose fill shows in every hole and nowhere else."""
    progress(0.5, "half")
    return completion.Completion(image * 0, "filled with black", ("a note",))


def painted(size, rows, columns):
    layer = np.zeros((*size, 4), np.uint8)
    layer[rows, columns] = (255, 45, 111, 255)
    return layer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    down, across = np.mgrid[:HIGH, :WIDE]
    picture = np.stack([5 * down + 9, 4 * across + 9, 2 * (down + across) + 9], -1).astype(np.uint8)
    Image.fromarray(picture).save("photo.png")
    mask = np.zeros((HIGH, WIDE), np.uint8)
    mask[10:16, 20:30] = 255
    Image.fromarray(mask).save("mask.png")
    return tmp_path


PHOTOS = {
    "colour": np.arange(HIGH * WIDE * 3).reshape(HIGH, WIDE, 3).astype(np.uint8) | 1,
    "alpha": np.arange(HIGH * WIDE * 4).reshape(HIGH, WIDE, 4).astype(np.uint8) | 1,
    "grey": np.arange(HIGH * WIDE).reshape(HIGH, WIDE).astype(np.uint8) | 1,
    "16 bits": (np.arange(HIGH * WIDE) * 31 + 1).reshape(HIGH, WIDE).astype(np.uint16) | 1,
}


@pytest.mark.parametrize("kind", PHOTOS)
def test_known_pixels_keep_their_bits(folder, kind):
    pixels = PHOTOS[kind]
    Image.fromarray(pixels).save("photo.png")
    layers = [painted((HIGH // 2, WIDE // 2), slice(5, 8), slice(10, 15))]  # of a preview half as large
    before, after, sentences = web.complete("photo.png", layers, None, black, silent)
    hole = np.zeros((HIGH, WIDE), bool)
    hole[10:16, 20:30] = True
    np.testing.assert_array_equal(before.pixels, pixels)
    np.testing.assert_array_equal(after.pixels[~hole], pixels[~hole])
    colours = after.pixels.reshape(HIGH, WIDE, -1)[..., : after.colours]
    assert not colours[hole].any() and sentences == ["filled with black", "a note"]


def test_paint_and_mask_file_are_one_hole(folder):
    layers = [painted((HIGH, WIDE), slice(0, 2), slice(0, 3)), painted((HIGH, WIDE), slice(30, 31), slice(50, 52))]
    before, after, _ = web.complete("photo.png", layers, "mask.png", black, silent)
    hole = np.zeros((HIGH, WIDE), bool)
    hole[:2, :3] = hole[30, 50:] = hole[10:16, 20:30] = True
    np.testing.assert_array_equal((before.pixels != after.pixels).any(-1), hole)


def test_internal_learning_says_what_was_kept(folder):
    _, after, sentences = web.complete("photo.png", [], "mask.png", completion.InternalLearning(steps=1), silent)
    assert sentences[0].startswith("held-out known pixels: network ") and "-> kept " in sentences[0]
    assert np.abs(after.pixels.astype(int) - np.asarray(Image.open("photo.png"))).max() < 12


@pytest.mark.parametrize(("size", "shape"), [((7, 9), (3, 5)), ((8, 6), (4, 3)), ((6, 4), (6, 4)), ((1, 500), (1, 64))])
def test_painted_hole_covers_what_was_painted(size, shape):
    assert web.painted_hole([painted(shape, slice(None), slice(None))], size).all()
    assert not web.painted_hole([np.zeros((*shape, 4), np.uint8)], size).any()
    hole = web.painted_hole([painted(shape, slice(None), slice(shape[1] - 1, None))], size)
    assert hole.shape == size and hole[:, -1].all() and not hole[:, 0].any()


@pytest.mark.parametrize("kind", PHOTOS)
def test_preview_looks_like_the_photo(kind):
    photo = images.Photo(PHOTOS[kind])
    np.testing.assert_allclose(web.preview(photo, 100) / 255, photo.tensor()[0].permute(1, 2, 0), atol=1 / 255)
    assert web.preview(photo, 26).shape == (20, 26, 3)


REFUSED = {
    "no photo": (None, "photo yet: drop one on field 1"),
    "text": ("text.jpg", "photo must be an image file, got text.jpg, which is none that Pillow knows"),
    "cut": ("cut.png", "photo must be a whole, readable image file, got cut.png ("),
    "bomb": ("bomb.png", "photo must have at most 80 megapixels, got more in bomb.png"),
    "deep": ("deep.png", "photo must have 8 bits a colour, or 16-bit grey, got 16-bit colour in deep.png"),
}


def spoil(folder: Path) -> None:
    """The files of REFUSED."""
    (folder / "text.jpg").write_text("no picture at all")
    whole = bytearray((folder / "photo.png").read_bytes())
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    whole[24] = 16  # bits a colour in a PNG's header; the checksum after it is not what is looked at first
    header = bytes(whole[12:29])
    whole[29:33] = zlib.crc32(header).to_bytes(4, "big")
    (folder / "deep.png").write_bytes(whole)
    Image.new("1", (40_000, 3_000)).save(folder / "bomb.png")


@pytest.mark.parametrize("kind", REFUSED)
def test_a_bad_photo_is_one_sentence_that_names_it(folder, kind):
    spoil(folder)
    name, sentence = REFUSED[kind]
    with pytest.raises(images.ImageError) as error:
        web.complete(name and str(folder / name), [], None, black, silent)
    assert sentence in str(error.value) and str(folder) not in str(error.value)


def test_a_bad_hole_is_one_sentence(folder):
    Image.new("L", (5, 5), 255).save("small.png")
    full = [painted((HIGH, WIDE), slice(None), slice(None))]
    for layers, mask, sentence in (
        ([], None, "There is no hole yet: paint over"),
        (full, None, "must leave some of the photo"),
        ([], str(folder / "small.png"), r"mask must be 52x40 pixels \(width x height\) like the photo, got 5x5"),
        ([], str(folder / "photo.png"), "mask must be black and white, got "),
    ):
        with pytest.raises(images.ImageError, match=sentence):
            web.complete("photo.png", layers, mask, black, silent)


def test_sentences_are_text_to_the_browser():
    assert "<img" not in web.said("got <img src=x>.png", "a note", refused=True) and web.said() == ""


def test_work_is_stopped_where_it_tells_its_progress():
    runs = web.Runs()

    def work(tell):
        runs.stop("mine")
        tell(0.1, "step 1")
        raise AssertionError("went on")

    runs.begin("mine")
    with pytest.raises(web.Stopped):
        runs.run("mine", work, lambda fraction, desc: None)
    assert runs.run("mine", lambda tell: "done", lambda fraction, desc: None) == "done"


def test_equal_pictures_are_different_files(tmp_path, monkeypatch):
    """Whoever reads one is not disturbed by the other's being written."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    photo = images.Photo(np.zeros((4, 5, 3), np.uint8))
    paths = {web.stored(photo, "a.png") for _ in range(2)}
    assert len(paths) == 2 and all(images.read_photo(path).size == (4, 5) for path in paths)


def test_one_work_at_a_time_and_waiting_is_stopped_too():
    runs, started, go_on, heard = web.Runs(), threading.Event(), threading.Event(), []

    def long(tell):
        started.set()
        assert go_on.wait(30)

    first = threading.Thread(target=runs.run, args=("first", long, lambda fraction, desc: None))
    first.start()
    assert started.wait(30)

    def tell(fraction, desc):
        heard.append(desc)
        runs.stop_all()

    with pytest.raises(web.Stopped):
        runs.run("second", lambda tell: "done", tell)
    assert heard == ["waiting for another picture"]
    go_on.set()
    first.join(30)


def test_without_gradio_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["web"]) == 2
    sentence = "fused-inpaint web: gradio must be installed, it makes the page: pip install 'fused-inpaint[web]'\n"
    assert capsys.readouterr().err == sentence


def test_mistakes_are_one_sentence_and_exit_code_2(folder, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, sentence in (
            (["--port", port], f"port must be free, got {port}, which is in use"),
            (["--port", "0", "--host", "203.0.113.1"], "host must be an address of this machine, got 203.0.113.1"),
            (["--port", "0", "--weights", "none.pth"], "path must be an existing file"),
            (["--port", "0", "--weights", "aot_gan=photo.png"], "path must be a whole checkpoint"),
        ):
            assert main(["web", *arguments]) == 2
            error = capsys.readouterr().err
            assert error.startswith("fused-inpaint web: ") and sentence in error and error.count("\n") == 1
    assert sorted(os.listdir()) == ["mask.png", "photo.png"]


@pytest.mark.parametrize("arguments", [["--port", "65536"], ["--seconds", "0"], ["--max-size", "-1"]])
def test_bad_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["web", *arguments])
    assert stop.value.code == 2 and "fused-inpaint web: error: argument" in capsys.readouterr().err


def test_networks_are_chosen_by_name(folder):
    from fused_inpaint.cli import parser

    models.build_model("pconv", levels=3, width=8).save_pretrained("a=b.safetensors")
    arguments = ["web", "--weights", "a=b.safetensors", "--weights", "pconv=a=b.safetensors"]
    methods = command._methods(parser().parse_args(arguments))
    assert list(methods)[1:] == ["pconv: a=b.safetensors"] and "at most 60 s" in next(iter(methods))
    before, after, sentences = web.complete("photo.png", [], "mask.png", methods["pconv: a=b.safetensors"], silent)
    changed = (before.pixels != after.pixels).any(-1)
    assert changed.any() and not changed[np.asarray(Image.open("mask.png")) == 0].any()
    assert sentences == ["filled by pconv with a=b.safetensors"]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["Chromium"]
in_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]

# The command; in connections.jsonl where it listens, and whom it or its libraries call or ask the name of.
AUDITED = """
import json, sys
calls = open("connections.jsonl", "w", buffering=1)
def audit(event, arguments):
    if event in ("socket.bind", "socket.connect", "socket.sendto"):
        calls.write(json.dumps([event, repr(arguments[1])]) + "\\n")
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        calls.write(json.dumps([event, repr(arguments[0])]) + "\\n")
sys.addaudithook(audit)
from fused_inpaint.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Server:
    def __init__(self, process: subprocess.Popen, folder: Path, address: str) -> None:
        self.process, self.folder, self.address = process, folder, address

    def end(self, number: int) -> str:
        """What it says on stderr until it ends."""
        self.process.send_signal(number)
        _, error = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, error
        return error


# An image is there before it has a size.
BOTH_LOADED = """() => {
    const images = [...document.querySelectorAll('#result img')];
    return images.length == 2 && images.every(image => image.naturalWidth);
}"""


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Server]:
    for name in ("home", "temporary", "work"):
        (folder / name).mkdir()
    environment = {**os.environ, "HOME": str(folder / "home"), "TMPDIR": str(folder / "temporary")}
    words = [sys.executable, "-c", AUDITED, "web", "--port", "0", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=folder / "work", env=environment, **streams) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("http://127.0.0.1:"), process.communicate()[1]
            yield Server(process, folder, line.split()[0])
        finally:
            process.kill()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(chromium, address: str, outlived: bool = False):
    """The page of a server; nothing else may have been asked for, and no script may have failed, when it is closed; but
    scripts may have if the server has ended before."""
    asked, failed = [], []
    page = chromium.new_page(viewport={"width": 1180, "height": 980})
    page.set_default_timeout(60_000)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.on("dialog", lambda dialog: failed.append(dialog.message))
    page.on("console", lambda message: failed.append(message.text) if "Content Security" in message.text else None)
    page.goto(address)
    page.wait_for_selector("#photo input[type=file]", state="attached")
    yield page
    page.close()
    assert [url for url in asked if not url.startswith((f"{address}/", "data:", "blob:"))] == []
    assert outlived or failed == []


def upload(page, path: Path) -> None:
    page.set_input_files("#photo input[type=file]", path)
    # The preview has arrived when its picture is as large as it will be.
    page.wait_for_selector("#editor canvas")
    page.wait_for_function("document.querySelector('#editor canvas').getBoundingClientRect().height > 300")
    page.wait_for_timeout(1000)


def paint(page, *points: tuple[float, float]) -> None:
    """A stroke; points in pixels from the middle of the canvas, where the middle of the photo is."""
    box = page.locator("#editor canvas").first.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    (x, y), *others = points
    page.mouse.move(middle[0] + x, middle[1] + y)
    page.mouse.down()
    for x, y in others:
        page.mouse.move(middle[0] + x, middle[1] + y, steps=10)
    page.mouse.up()


def said(page, words: str) -> str:
    page.wait_for_function("words => document.querySelector('#status').innerText.includes(words)", arg=words)
    return page.inner_text("#status .said")


def downloaded(page, folder: Path) -> np.ndarray:
    page.wait_for_selector("#download:not([disabled])")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "photo-filled.png"
    download.value.save_as(folder / "downloaded.png")
    with Image.open(folder / "downloaded.png") as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """One for all tests of the page; when it has ended, nothing is left and no other machine was called."""
    folder = tmp_path_factory.mktemp("web")
    models.build_model("pconv", levels=3, width=8).save_pretrained(folder / "small.safetensors")
    arguments = ("--seconds", "1", "--max-size", "0.5", "--weights", str(folder / "small.safetensors"))
    with serving(folder, *arguments) as running:
        yield running
        assert running.end(signal.SIGTERM) == "\nended\n"
    assert os.listdir(folder / "work") == ["connections.jsonl"]
    assert os.listdir(folder / "temporary") == os.listdir(folder / "home") == []
    calls = [json.loads(line) for line in (folder / "work" / "connections.jsonl").read_text().splitlines()]
    assert ["socket.bind", "('127.0.0.1', 0)"] in calls
    assert [call for call in calls if "127.0.0.1" not in call[1]] == []


@pytest.fixture
def photo(tmp_path) -> Path:
    """A smooth picture, 240x180, with a black spot in the middle."""
    down, across = np.mgrid[:180, :240]
    picture = np.stack([90 + down / 2, 200 - across / 3, 80 + (down + across) / 4], -1).astype(np.uint8)
    picture[86:94, 114:126] = 0
    Image.fromarray(picture).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@in_browser
def test_a_painted_stroke_is_filled(chromium, server, photo):
    with opened(chromium, server.address) as page:
        upload(page, photo)
        page.click("text=Internal learning")
        paint(page, (-40, 0), (40, 0))
        page.click("#fill")
        sentence = said(page, "-> kept ")
        assert sentence.startswith("Held-out known pixels: network ") and "biharmonic" in sentence
        page.wait_for_function(BOTH_LOADED)
        widths = page.evaluate("[...document.querySelectorAll('#result img')].map(image => image.naturalWidth)")
        assert widths == [240, 240] and page.is_enabled("#fill") and page.is_disabled("#stop")
        after = downloaded(page, photo.parent).astype(int)
    before = np.asarray(Image.open(photo)).astype(int)
    changed = np.flatnonzero((after != before).any(2).any(1)), np.flatnonzero((after != before).any(2).any(0))
    rows, columns = (slice(places[0], places[-1] + 1) for places in changed)
    # The stroke lies in the middle, is longer than high, and all of the photo but its bounds is as it was.
    assert 60 < rows.start < 86 and 94 < rows.stop < 120 and 50 < columns.start < 114 and 126 < columns.stop < 190
    assert after[86:94, 114:126].min() > 60  # the spot is gone


@in_browser
def test_a_network_fills_the_hole_of_a_mask_file(chromium, server, photo):
    mask = np.zeros((180, 240), np.uint8)
    mask[20:50, 160:220] = 255
    Image.fromarray(mask).save(photo.parent / "mask.png")
    with opened(chromium, server.address) as page:
        upload(page, photo)
        page.click("#masks button")
        page.set_input_files("#mask input[type=file]", photo.parent / "mask.png")
        page.wait_for_selector("#mask button[aria-label='Clear']")  # there when the file is
        page.click("text=pconv: ")
        page.click("#fill")
        said(page, "Filled by pconv with ")
        after = downloaded(page, photo.parent)
    changed = (after != np.asarray(Image.open(photo))).any(-1)
    assert changed[mask > 0].mean() > 0.9 and not changed[mask == 0].any()


@in_browser
def test_bad_uploads_get_a_sentence(chromium, server, photo):
    spoil(photo.parent)
    name = "<img src=x onerror=alert(1)>.png"
    (photo.parent / name).write_text("no picture at all")
    with opened(chromium, server.address) as page:
        for file, sentence in (*REFUSED.values(), (name, "Photo must be an image file, got ")):
            if file is not None:
                page.set_input_files("#photo input[type=file]", photo.parent / file)
                text = said(page, sentence[1:])
                assert text.count("\n") == 0 and page.locator("#status .refused").count() == 1
                page.click("#photo button[aria-label='Clear']")
                page.wait_for_selector("#status .refused", state="detached")
        noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
        Image.fromarray(noise).save(photo.parent / "large.png")
        page.set_input_files("#photo input[type=file]", photo.parent / "large.png")
        page.wait_for_selector("text=File(s) exceed the maximum allowed size")
    with opened(chromium, server.address) as page:
        upload(page, photo)
        page.click("#fill")
        said(page, "There is no hole yet: paint over what is to be filled")


@in_browser
def test_an_upload_past_the_limit_is_refused_by_the_server_too(chromium, server, photo):
    big = {"name": "big.png", "mimeType": "image/png", "buffer": bytes(1_000_000)}
    with opened(chromium, server.address) as page:
        answer = page.request.post(f"{server.address}/gradio_api/upload", multipart={"files": big})
        assert answer.status == 413
        # Another site's name for this machine gets nothing.
        assert page.request.get(server.address, headers={"Host": "elsewhere.example"}).status == 400


@in_browser
def test_stop_stops_the_work_and_ctrl_c_the_server(chromium, tmp_path, photo):
    (tmp_path / "server").mkdir()
    Image.open(photo).resize((80, 60)).save(photo)
    with (
        serving(tmp_path / "server", "--seconds", "36000") as server,
        opened(chromium, server.address, outlived=True) as page,
    ):
        upload(page, photo)
        paint(page, (-10, 0), (10, 0))
        page.click("#fill")
        page.wait_for_selector("text=/step [1-9]/")
        page.click("#stop")
        said(page, "Stopped.")
        page.click("#fill:not([disabled])")
        page.wait_for_selector("text=/step [1-9]/")
        assert server.end(signal.SIGINT) == "\nended\n"
    assert os.listdir(tmp_path / "server" / "temporary") == []


@in_browser
@pytest.mark.skipif("FUSED_INPAINT_SCREENSHOT" not in os.environ, reason="FUSED_INPAINT_SCREENSHOT is not set")
def test_screenshot(chromium, tmp_path):
    from skimage import data

    Image.fromarray(data.astronaut()).save(tmp_path / "astronaut.png")
    with serving(tmp_path, "--seconds", "40") as server, opened(chromium, server.address) as page:
        page.set_default_timeout(180_000)
        upload(page, tmp_path / "astronaut.png")
        rows = [(-99, -35, y) if y % 20 else (-35, -99, y) for y in range(70, 140, 10)]
        paint(page, *((x, y) for first, last, y in rows for x in (first, last)))  # the patch on the left
        page.click("#fill")
        said(page, "-> kept ")
        page.wait_for_function(BOTH_LOADED)
        box = page.locator("#result img").first.bounding_box()
        across, down = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(across, down)
        page.mouse.down()
        page.mouse.move(across - 78, down, steps=10)  # the slider, to the middle of the patch
        page.mouse.up()
        page.wait_for_timeout(1000)
        page.screenshot(path=tmp_path / "page.png")
    # A palette keeps the file small.
    Image.open(tmp_path / "page.png").convert("RGB").quantize(200).save(
        os.environ["FUSED_INPAINT_SCREENSHOT"], optimize=True
    )
