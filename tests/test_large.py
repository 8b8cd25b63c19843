# SPDX-License-Identifier: Apache-2.0
"""Images larger than a network was made for: every strategy keeps known pixels and bounds what the network is given."""

import pytest
import torch
from torch import Tensor

from fused_inpaint import models
from fused_inpaint.models.large import STRATEGIES, Bounds, _boxes, _runs, _starts

BOUNDED = [name for name in STRATEGIES if name != "whole"]


class Oracle:
    """Knows the picture, and notes what it is asked."""

    def __init__(self, answer: Tensor) -> None:
        self.answer, self.asked = answer, []

    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        assert image.shape[2:] == mask.shape[2:] and mask.size(1) == 1 and not image.isnan().any()
        self.asked.append(image.shape)
        return self.answer.expand(image.size(0), -1, *image.shape[2:]).clone()


@pytest.fixture
def model() -> models.InpaintingModel:
    torch.manual_seed(0)
    return models.build_model("pconv", levels=3, width=8)


def picture(high: int = 61, wide: int = 83, batch: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    image, mask = torch.rand(batch, 3, high, wide, generator=g), torch.ones(batch, 1, high, wide)
    mask[:, :, 5:9, 7:20] = 0
    mask[0, :, 40:44, 60:70] = 0
    return image, mask


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_known_pixels_stay_and_holes_are_never_read(model: models.InpaintingModel, strategy: str) -> None:
    image, mask = picture()
    poisoned = image.masked_fill(mask == 0, torch.nan)
    known = mask.expand_as(image) == 1
    seen = []
    filled = model.inpaint(poisoned, mask, strategy, size=32, overlap=8, progress=lambda f, text: seen.append(f))
    assert torch.equal(filled[known], image[known]) and filled.isfinite().all()
    assert torch.equal(filled, model.inpaint(image, mask, strategy, size=32, overlap=8))
    assert filled.min() >= 0 and filled.max() <= 1 and model.training
    assert strategy in ("whole", "resize") or (seen == sorted(seen) and seen[-1] == 1.0)


@pytest.mark.parametrize("strategy", BOUNDED)
@pytest.mark.parametrize("size", [(61, 83), (16, 200), (7, 5), (1, 1), (64, 32)])
def test_what_the_network_is_given_is_bounded(strategy: str, size: tuple[int, int]) -> None:
    image = torch.rand(1, 3, *size)
    mask = torch.ones(1, 1, *size)
    mask[..., : size[0] // 2 + 1, : size[1] // 2 + 1] = 0
    oracle = Oracle(torch.full((1, 3, 1, 1), 0.25))
    whole = STRATEGIES[strategy](oracle, image, mask, Bounds(32, 8, lambda fraction, text: None))
    assert oracle.asked and all(max(shape[2:]) <= 32 for shape in oracle.asked)
    hole = (mask == 0).expand_as(whole)
    assert whole.shape == image.shape
    assert (whole[hole] - 0.25).abs().max() < 1e-6


def test_tiles_fade_into_each_other() -> None:
    """Of two neighbours with different fills, each weighs less the nearer its edge is."""
    mask = torch.zeros(1, 1, 16, 56)
    answers = iter((0.0, 1.0))

    def fill(image: Tensor, mask: Tensor) -> Tensor:
        return torch.full_like(image, next(answers))

    whole = STRATEGIES["tile"](fill, torch.zeros(1, 1, 16, 56), mask, Bounds(32, 8, lambda fraction, text: None))
    row = whole[0, 0, 8]
    assert not row[:24].any() and (row[32:] == 1).all()
    assert (row[24:32].diff() > 0).all() and torch.allclose(row[24:32] + row[24:32].flip(0), torch.ones(8))


def test_tiles_without_a_hole_are_left_out() -> None:
    image, mask = picture(200, 200, 1)
    oracle = Oracle(image.mean((2, 3), keepdim=True))
    STRATEGIES["tile"](oracle, image, mask, Bounds(32, 8, lambda fraction, text: None))
    assert len(oracle.asked) < 10 < len(_starts(200, 32, 8)) ** 2


def test_subsample_gives_every_pixel_its_own_sample_back() -> None:
    image, mask = torch.rand(1, 2, 37, 50), torch.zeros(1, 1, 37, 50)
    given = []

    def fill(image: Tensor, mask: Tensor) -> Tensor:
        given.append(image.shape[2:])
        return image + 1

    whole = STRATEGIES["subsample"](fill, image, mask, Bounds(20, 8, lambda fraction, text: None))
    assert torch.equal(whole, image + 1) and len(given) == 9 and given[0] == (13, 17)


def test_boxes_around_holes() -> None:
    mask = torch.ones(40, 60)
    mask[3:5, 4:8] = 0
    mask[6, 10] = 0  # near the first
    mask[30, 50] = 0
    assert _boxes(mask, 4) == [(0, 0, 11, 15), (26, 46, 35, 55)]
    assert _boxes(torch.ones(4, 4), 2) == []
    assert _runs(torch.tensor([True, False, False, True, True]), 1) == [(0, 1), (3, 5)]
    assert _starts(100, 32, 8) == [0, 23, 45, 68] and _starts(20, 32, 8) == [0]


def test_refusals(model: models.InpaintingModel) -> None:
    image, mask = picture()
    with pytest.raises(ValueError, match=r"^pconv: strategy must be one of whole, resize, .*, got huge$"):
        model.inpaint(image, mask, "huge")
    with pytest.raises(ValueError, match=r"^pconv: size must be 8 or more and overlap 0 or more, got 4 and 64$"):
        model.inpaint(image, mask, "tile", size=4)


def test_saved_and_read_back(model: models.InpaintingModel, tmp_path) -> None:
    """To a folder or a file; the arguments travel with the weights."""
    image, mask = picture()
    expected = model.inpaint(image, mask)
    for path in (tmp_path / "new" / "folder", tmp_path / "one.safetensors"):
        model.save_pretrained(path)
        file, ordinary = path / "model.safetensors" if path.is_dir() else path, tmp_path / "new" / "ordinary"
        ordinary.touch()
        assert file.stat().st_mode == ordinary.stat().st_mode
        again = models.PConv.from_pretrained(path)
        assert again.config == model.config and not again.training
        assert torch.equal(again.inpaint(image, mask), expected)
    read = models.load_published("pconv", tmp_path / "one.safetensors")
    assert read.config == model.config and torch.equal(read.inpaint(image, mask), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "one.safetensors"]
    half = models.PConv.from_pretrained(tmp_path / "one.safetensors").half()
    half.save_pretrained(tmp_path / "half.safetensors")
    assert next(models.PConv.from_pretrained(tmp_path / "half.safetensors").parameters()).dtype == torch.float16


def test_reading_refuses(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^from_pretrained: path must hold a readable .safetensors file, got "):
        models.PConv.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"^from_pretrained: path must hold a readable .safetensors file, got "):
        models.PConv.from_pretrained(tmp_path)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match=r"must hold a pconv generator, got a file that this library did not write: "):
        models.PConv.from_pretrained(tmp_path)
