# SPDX-License-Identifier: Apache-2.0
"""Enlarging as inpainting (Liu et al. 2018, section 5.2): where each pixel goes, and the command."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fused_inpaint import images, models
from fused_inpaint.cli import main


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 4), (0, 3, 2, 3)])
def test_each_pixel_is_where_the_paper_puts_it(shape: tuple[int, ...], factor: int) -> None:
    image = torch.rand(shape, dtype=torch.float64) + 1  # nowhere 0
    large, mask = images.spread(image, factor)
    n, c, high, wide = shape
    assert large.shape == (n, c, factor * high, factor * wide) and mask.shape == (1, 1, factor * high, factor * wide)
    assert large.dtype == mask.dtype == torch.float64
    for y in range(high):
        for x in range(wide):
            place = (..., factor * y + factor // 2, factor * x + factor // 2)
            assert torch.equal(large[place], image[..., y, x]) and mask[place].item() == 1
    assert mask.sum().item() == high * wide
    assert not large[mask.expand_as(large) == 0].any()


def test_spread_reads_any_layout() -> None:
    image = torch.rand(1, 3, 6, 5)
    for other in (image.contiguous(memory_format=torch.channels_last), image.mT.contiguous().mT):
        assert torch.equal(images.spread(other, 3)[0], images.spread(image, 3)[0])


def test_spread_refuses() -> None:
    with pytest.raises(ValueError, match=r"^spread: image must be \(N, C, H, W\), got \(3, 4, 4\)$"):
        images.spread(torch.zeros(3, 4, 4), 2)
    with pytest.raises(ValueError, match=r"^spread: factor must be 1 or more, got 0$"):
        images.spread(torch.zeros(1, 3, 4, 4), 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    models.build_model("pconv", levels=2, width=4).save_pretrained("weights.safetensors")
    return tmp_path


def photo(channels: int, dtype: type = np.uint8) -> np.ndarray:
    """Saved as photo.png, of odd sides; (13, 17) or (13, 17, channels)."""
    shape = (13, 17, channels) if channels > 1 else (13, 17)
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)
    Image.fromarray(pixels).save("photo.png")
    return pixels


def upscale(*arguments: str) -> int:
    return main(["upscale", "photo.png", "-o", "out.png", *arguments])


def read(name: str) -> np.ndarray:
    with Image.open(name) as image:
        return np.asarray(image)


@pytest.mark.parametrize("strategy", ["whole", "tile"])
def test_pixels_stay_exact_and_the_network_fills_the_rest(folder: Path, capsys, strategy: str) -> None:
    pixels = photo(3)
    arguments = ["--strategy", strategy, "--size", "32", "--overlap", "8"]
    assert upscale("--factor", "3", "--weights", "weights.safetensors", *arguments) == 0
    assert capsys.readouterr().out == "out.png: 51x39, filled by pconv with weights.safetensors\n"
    out = read("out.png")
    assert out.shape == (39, 51, 3)
    np.testing.assert_array_equal(out[1::3, 1::3], pixels)
    if strategy == "whole":
        image, known = images.spread(torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None], 3)
        filled = models.load_published("pconv", "weights.safetensors").inpaint(image, known)
        expected = (filled[0].permute(1, 2, 0) * 255).round().numpy()
        assert np.abs(out - expected).max() <= 1


def test_transparency_is_enlarged_pixel_by_pixel(folder: Path) -> None:
    pixels = photo(4)
    assert upscale("--factor", "2", "--weights", "weights.safetensors") == 0
    out = read("out.png")
    np.testing.assert_array_equal(out[1::2, 1::2], pixels)
    np.testing.assert_array_equal(out[..., 3], pixels[..., 3].repeat(2, 0).repeat(2, 1))


def test_sixteen_bits_stay_sixteen(folder: Path) -> None:
    pixels = photo(1, np.uint16)
    assert upscale("--factor", "2", "--weights", "weights.safetensors") == 0
    np.testing.assert_array_equal(read("out.png")[1::2, 1::2], pixels)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--factor", "2", "--weights", "absent.pth"], "absent.pth"),
        (
            ["--factor", "900", "--weights", "weights.safetensors"],
            "factor must give at most 80 megapixels, got 15300x11",
        ),
        (["--factor", "2", "--weights", "weights.safetensors", "-o", "out.jpg"], "output must end in .png"),
        (["--factor", "2", "--weights", "weights.safetensors", "-o", "photo.png"], "output must be another file than "),
    ],
)
def test_mistakes_are_one_sentence(folder: Path, capsys, arguments: list[str], sentence: str) -> None:
    photo(3)
    assert upscale(*arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("fused-inpaint upscale: ") and sentence in told and told.count("\n") == 1
    assert not Path("out.png").exists()


@pytest.mark.parametrize("factor", ["1", "0", "-2", "1.5"])
def test_a_factor_that_enlarges_nothing_is_refused(folder: Path, capsys, factor: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        upscale("--factor", factor, "--weights", "weights.safetensors")
    assert stopped.value.code == 2 and "--factor" in capsys.readouterr().err
