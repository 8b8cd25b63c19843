# SPDX-License-Identifier: Apache-2.0
"""Files to tensors and back: known pixels keep their stored values, and every refusal is one sentence."""

import os
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fused_inpaint import images
from fused_inpaint.images import ImageError

HIGH, WIDE = 13, 19
MODES = ["L", "LA", "RGB", "RGBA", "I;16"]


def stored(mode: str, seed: int = 0) -> np.ndarray:
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "I;16": ()}[mode]
    kind = np.uint16 if mode == "I;16" else np.uint8
    return np.random.default_rng(seed).integers(
        0, np.iinfo(kind).max, (HIGH, WIDE, *channels), endpoint=True, dtype=kind
    )


def centre_hole() -> torch.Tensor:
    known = torch.ones(1, 1, HIGH, WIDE)
    known[..., 4:9, 5:12] = 0
    return known


def save_mask(path, hole: np.ndarray, mode: str = "L", inside: int = 255) -> None:
    values = np.where(hole, inside, 255 - inside).astype(np.uint8)
    Image.fromarray(values).convert(mode).save(path)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("mode", MODES)
def test_known_pixels_mode_and_alpha_survive_the_round_trip(tmp_path, mode, suffix):
    before = stored(mode)
    Image.fromarray(before).save(tmp_path / f"in{suffix}", icc_profile=b"a colour profile")
    photo = images.read_photo(tmp_path / f"in{suffix}")
    known = centre_hole()
    images.write_photo(photo.filled(1 - photo.tensor(), known), tmp_path / f"out{suffix}")

    with Image.open(tmp_path / f"out{suffix}") as written:
        assert written.mode == mode
        assert written.info["icc_profile"] == b"a colour profile"
        after = np.asarray(written)
    hole = known[0, 0].numpy() == 0
    assert after.dtype == before.dtype
    np.testing.assert_array_equal(after[~hole], before[~hole])
    white, colours = np.iinfo(before.dtype).max, photo.colours
    flat_before, flat_after = before.reshape(HIGH, WIDE, -1), after.reshape(HIGH, WIDE, -1)
    np.testing.assert_array_equal(flat_after[hole][:, :colours], white - flat_before[hole][:, :colours])
    np.testing.assert_array_equal(flat_after[..., colours:], flat_before[..., colours:])


@pytest.mark.parametrize("mode", MODES)
def test_tensor_is_rgb_in_zero_to_one(tmp_path, mode):
    before = stored(mode)
    Image.fromarray(before).save(tmp_path / "in.png")
    tensor = images.read_photo(tmp_path / "in.png").tensor()
    assert tensor.shape == (1, 3, HIGH, WIDE) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    first = before.reshape(HIGH, WIDE, -1)[..., 0] / np.iinfo(before.dtype).max
    np.testing.assert_allclose(tensor[0, 0].numpy(), first, atol=1e-6)


def test_palette_and_colour_key_become_plain_colour(tmp_path):
    colours = Image.fromarray(stored("RGB")).quantize(16)
    colours.save(tmp_path / "p.png")
    assert images.read_photo(tmp_path / "p.png").pixels.shape == (HIGH, WIDE, 3)
    np.testing.assert_array_equal(images.read_photo(tmp_path / "p.png").pixels, np.asarray(colours.convert("RGB")))
    colours.save(tmp_path / "t.png", transparency=0)
    assert images.read_photo(tmp_path / "t.png").pixels.shape == (HIGH, WIDE, 4)


def test_exif_rotation_is_applied_to_photo_and_mask(tmp_path):
    before = stored("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    Image.fromarray(before).save(tmp_path / "in.png", exif=exif)
    photo = images.read_photo(tmp_path / "in.png")
    np.testing.assert_array_equal(photo.pixels, np.rot90(before, -1))

    hole = np.zeros((HIGH, WIDE), bool)
    hole[0, 0] = True
    Image.fromarray((255 * hole).astype(np.uint8)).save(tmp_path / "mask.png", exif=exif)
    known, _ = images.read_mask(tmp_path / "mask.png", photo.size)
    assert (known == 0).sum() == 1 and known[0, 0, 0, -1] == 0


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "I;16"])
@pytest.mark.parametrize("hole_colour", ["white", "black"])
def test_masks_of_every_mode_and_either_colour(tmp_path, mode, hole_colour):
    hole = centre_hole()[0, 0].numpy() == 0
    inside = 255 if hole_colour == "white" else 0
    if mode == "I;16":
        Image.fromarray(np.where(hole == (inside > 0), 65535, 0).astype(np.uint16)).save(tmp_path / "m.png")
    else:
        save_mask(tmp_path / "m.png", hole, mode, inside)
    known, note = images.read_mask(tmp_path / "m.png", (HIGH, WIDE), hole_colour)
    assert torch.equal(known, centre_hole()) and note == ""


@pytest.mark.parametrize(("hole_colour", "paint"), [("white", 255), ("black", 0)])
def test_transparent_parts_of_a_mask_are_known(tmp_path, hole_colour, paint):
    hole = centre_hole()[0, 0].numpy() == 0
    pixels = np.full((HIGH, WIDE, 4), paint, np.uint8)
    pixels[..., 3] = np.where(hole, 255, 0)
    Image.fromarray(pixels).save(tmp_path / "m.png")
    assert torch.equal(images.read_mask(tmp_path / "m.png", (HIGH, WIDE), hole_colour)[0], centre_hole())


def test_a_few_grey_pixels_are_cut_at_half_and_mentioned(tmp_path):
    values = np.where(centre_hole()[0, 0].numpy() == 0, 255, 0).astype(np.uint8)
    values[0, :5] = [120, 121, 126, 129, 200]
    Image.fromarray(values).save(tmp_path / "m.png")
    known, note = images.read_mask(tmp_path / "m.png", (HIGH, WIDE))
    assert known[0, 0, 0, :5].tolist() == [1, 1, 1, 0, 0]
    assert note == "2.0 % of the mask is grey; it is cut at half"


@pytest.mark.parametrize("hole_colour", ["white", "black"])
def test_masks_of_zeros_and_ones(tmp_path, hole_colour):
    hole = centre_hole()[0, 0].numpy() == 0
    Image.fromarray((hole == (hole_colour == "white")).astype(np.uint8)).save(tmp_path / "m.png")
    known, note = images.read_mask(tmp_path / "m.png", None, hole_colour)
    assert torch.equal(known, centre_hole()) and note == ""


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (np.zeros((HIGH, WIDE)), "mask must mark some hole in white, got none"),
        (np.full((HIGH, WIDE), 255), "mask must leave some known pixels, got only white"),
        (np.tile(np.linspace(0, 255, WIDE), (HIGH, 1)), r"mask must be black and white, got \d\d % grey pixels"),
        (np.zeros((WIDE, HIGH)), r"mask must be 19x13 pixels \(width x height\) like the photo, got 13x19"),
    ],
    ids=["empty", "full", "grey", "size"],
)
def test_unusable_masks(tmp_path, values, sentence):
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(ImageError, match=sentence):
        images.read_mask(tmp_path / "m.png", (HIGH, WIDE))


def deep_colour_png(path) -> None:
    """A 2 x 1 PNG with 16 bits a colour; Pillow would read it as 8-bit."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = (2).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    data = zlib.compress(bytes(1 + 2 * 6))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_unusable_photos(tmp_path, monkeypatch):
    def refusal(name: str) -> str:
        with pytest.raises(ImageError) as error:
            images.read_photo(tmp_path / name)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refusal("absent.png").startswith("photo must be an existing file")
    (tmp_path / "text.png").write_text("not an image")
    assert "none that Pillow knows" in refusal("text.png")
    Image.fromarray(stored("RGB")).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    assert "whole, readable image" in refusal("cut.png")
    Image.fromarray(stored("RGB")).convert("CMYK").save(tmp_path / "cmyk.tif")
    assert "got mode CMYK" in refusal("cmyk.tif")
    deep_colour_png(tmp_path / "deep.png")
    assert "got 16-bit colour" in refusal("deep.png")
    monkeypatch.setattr(images, "MAX_MEGAPIXELS", HIGH * WIDE / 1e6 / 2)
    assert "megapixels" in refusal("whole.png")


def test_pillows_own_bomb_check_is_one_sentence_too(tmp_path, monkeypatch):
    Image.fromarray(stored("RGB")).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match="at most 80 megapixels"):
        images.read_photo(tmp_path / "big.png")


def test_outputs_are_refused_before_any_work(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "in.png").touch()
    for name, sentence in [
        ("out.jpg", "try out.png"),
        ("no/out.png", "existing folder"),
        ("folder.png", "got the folder"),
        ("in.png", "another file than the inputs"),
    ]:
        with pytest.raises(ImageError, match=sentence):
            images.check_output(tmp_path / name, (tmp_path / "in.png",))
    images.check_output(tmp_path / "out.png", (tmp_path / "in.png",))
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "in.png"]


@pytest.mark.parametrize("shift", [0, -1, 70000])
def test_grey_of_32_bits_is_that_of_16_where_it_fits(tmp_path, shift):
    """Pillow reads some 16-bit files as of 32."""
    values = np.arange(HIGH * WIDE, dtype=np.int32).reshape(HIGH, WIDE) * 100 + shift
    Image.fromarray(values).save(tmp_path / "deep.tif")
    if shift == 0:
        np.testing.assert_array_equal(images.read_photo(tmp_path / "deep.tif").pixels, values)
        return
    with pytest.raises(ImageError, match=r"^photo must be RGB, .* got mode I in "):
        images.read_photo(tmp_path / "deep.tif")


def test_refusals_of_masks_and_folders(tmp_path, monkeypatch):
    with pytest.raises(ImageError, match=r"^hole must be white or black, got grey$"):
        images.read_hole(tmp_path / "m.png", "grey")

    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images.tempfile, "NamedTemporaryFile", full)
    with pytest.raises(ImageError, match=r"^output must be in a writable folder, got .* \(No space left on device\)$"):
        images.check_output(tmp_path / "out.png")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")], ids=["Ctrl-C", "disk full"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    (tmp_path / "out.png").write_text("the old file")
    photo = images.Photo(stored("RGB"))

    def half(self, file, *args, **kwargs):
        file.write(b"half a picture")
        raise error

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises((KeyboardInterrupt, ImageError)):
        images.write_photo(photo, tmp_path / "out.png")
    assert os.listdir(tmp_path) == ["out.png"]
    assert (tmp_path / "out.png").read_text() == "the old file"
