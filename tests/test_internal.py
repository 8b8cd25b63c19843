# SPDX-License-Identifier: Apache-2.0
"""Internal learning: fills, held-out pixels, the canvas, the fit, and the choice between candidates."""

import math
import sys

import pytest
import torch
from torch import nn

from fused_inpaint.training import fills, fitting, internal


def wavy(height: int = 64, width: int = 80) -> torch.Tensor:
    down, across = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    return torch.stack([0.5 + 0.4 * torch.sin(2 * down), 0.5 + 0.4 * torch.cos(across), 0.2 + 0.1 * across])[None]


def box_hole(height: int = 64, width: int = 80, side: int = 12) -> torch.Tensor:
    known = torch.ones(1, 1, height, width)
    known[..., 20 : 20 + side, 30 : 30 + side] = 0
    return known


class Nothing(nn.Module):
    """Stands for a network; adds `value` to the smooth fill everywhere."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value / fitting.SPREAD))

    def forward(self, x, mask):
        return self.value.expand_as(x), mask


@pytest.mark.parametrize("fill", [fills.push_pull, fills.smooth, fills.biharmonic])
def test_fills_keep_known_pixels_and_never_read_the_hole(fill):
    image, known = wavy(61, 83), box_hole(61, 83)
    filled = fill(torch.where(known > 0, image, math.nan) if fill is not fills.biharmonic else image, known)
    assert torch.equal(torch.where(known > 0, filled, 0), torch.where(known > 0, image, 0))
    assert (filled - image).abs().max() < 0.15


def test_smooth_fill_approaches_biharmonic():
    image, known = wavy(), box_hole()
    exact = fills.biharmonic(image, known)
    apart = [(fills.smooth(image, known, iterations) - exact).abs().max().item() for iterations in (0, 30, 300)]
    assert apart[0] > 5 * apart[2] and apart[1] < apart[0] and apart[2] < 0.01


def test_smooth_fill_of_a_batch_is_that_of_its_parts():
    image = torch.cat([wavy(), wavy().flip(2)])
    known = torch.cat([box_hole(), box_hole().flip(3)])
    parts = torch.cat([fills.smooth(image[i : i + 1], known[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(fills.smooth(image, known), parts, atol=1e-5, rtol=0)


def test_biharmonic_fills_only_the_holes_asked_for_and_in_batches(monkeypatch):
    image, known = wavy(), box_hole()
    known[..., 50:54, 5:9] = 0
    damaged = torch.where(known > 0, image, 0.9)
    where = torch.zeros_like(known)
    where[..., 52, 7] = 1
    one = fills.biharmonic(damaged, known, where)
    assert (one != damaged).any(1).sum() == 16
    both = fills.biharmonic(damaged, known)
    torch.testing.assert_close(both[..., 45:, :], one[..., 45:, :])
    monkeypatch.setattr(fills, "BIHARMONIC_MAX_UNKNOWNS", 150)  # 144 + 16: two calls
    torch.testing.assert_close(fills.biharmonic(damaged, known), both)


def test_thickness():
    for side in (1, 4, 12, 20):
        assert side <= fitting.thickness(box_hole(side=side)) <= side + 1


@pytest.mark.parametrize("kind", ["box", "half", "scattered", "large"])
def test_held_out_pixels_are_known_and_few(kind):
    known = box_hole(200, 260)
    if kind == "half":
        known[..., :130] = 0
    elif kind == "scattered":
        known = (torch.rand(1, 1, 200, 260, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    elif kind == "large":
        known = box_hole(900, 1100)
    generator = torch.Generator().manual_seed(0)
    chosen = internal.held_out(1 - known, known, 0.15, 6, generator)
    assert chosen.any() and set(chosen.unique().tolist()) <= {0.0, 1.0}
    assert not (chosen * (1 - known)).any()
    assert chosen.sum() <= 0.17 * known.sum()
    if kind in ("box", "large"):
        assert chosen.sum() >= 0.9 * 6 * 144  # six copies, hardly cut by each other or by the hole
        assert kind == "large" or fitting.thickness(1 - chosen) <= 13


def test_canvas_predicts_over_many_windows_as_over_one():
    image, known = wavy(200, 230), box_hole(200, 230)
    known[..., 150:153, :] = 0
    whole = fitting.Canvas(known, cap=256, levels=3).predict(Nothing(0.1), image, known, 1 - known)
    tiled_canvas = fitting.Canvas(known, cap=160, levels=3)
    assert len(list(tiled_canvas._windows())) >= 4
    tiled = tiled_canvas.predict(Nothing(0.1), image, known, 1 - known)
    torch.testing.assert_close(tiled, whole, atol=1e-3, rtol=0)  # the smooth fill ends at the window
    expected = (fills.smooth(image, known) + 0.1).clamp(0, 1)
    torch.testing.assert_close(whole, torch.where(known > 0, image, expected), atol=1e-5, rtol=0)


def test_a_thick_hole_is_worked_on_at_lower_resolution():
    known = torch.ones(1, 1, 500, 500)
    known[..., 100:400, 100:400] = 0
    canvas = fitting.Canvas(known, levels=3)
    assert canvas.scale < 0.4
    image, small_known = canvas.shrink(wavy(500, 500), known)
    assert image.shape[-2:] == canvas.size == small_known.shape[-2:]
    assert fitting.thickness(small_known) <= 1.1 * fitting.THICKEST
    filled = canvas.predict(Nothing(), wavy(500, 500), known, 1 - known)
    assert torch.equal(filled * known, wavy(500, 500) * known)


def test_training_never_sees_hole_or_held_out_pixels():
    image, known = wavy(), box_hole()
    stop = internal.held_out(1 - known, known, 0.1, 2, torch.Generator().manual_seed(0))
    shown = known * (1 - stop)
    poisoned = torch.where(shown > 0, image, math.nan)
    crops = fitting.Crops(fitting.Canvas(known, levels=3), poisoned, shown, known, seed=0, side=32)
    for _ in range(20):
        crop, visible, target, _ = crops.batch()
        assert crop.shape == (fitting.BATCH, 3, 32, 32) and target.any()
        assert not (visible * target).any()
        assert crop[(visible + target).expand_as(crop) > 0].isfinite().all()
        assert crop.isfinite().all()


def fit_small(steps: int, validate=None) -> tuple[nn.Module, fitting.Fit]:
    image, known = wavy(), box_hole()
    canvas = fitting.Canvas(known, levels=3)
    net = internal.new_network(3, 8, seed=0)
    crops = fitting.Crops(canvas, image, known, known, seed=0, side=32)
    return net, fitting.fit_network(net, crops, lambda done: done < steps, validate)


def test_a_fresh_network_is_the_smooth_fill():
    image, known = wavy(), box_hole()
    net = internal.new_network(3, 8, seed=0).eval()
    filled = fitting.Canvas(known, levels=3).predict(net, image, known, 1 - known)
    expected = fills.smooth(image, known).clamp(0, 1)
    torch.testing.assert_close(filled, torch.where(known > 0, image, expected), atol=1e-6, rtol=0)


def test_fit_stops_early_and_keeps_the_best_weights(monkeypatch):
    monkeypatch.setattr(fitting, "CHECK_EVERY", 2)
    monkeypatch.setattr(fitting, "PATIENCE", 3)
    seen: list[torch.Tensor] = []
    errors = iter([0.5, 0.4, 0.1, 0.2, 0.3, 0.2, 0.0])

    def validate(net: nn.Module) -> float:
        seen.append(next(net.parameters()).clone())
        return next(errors)

    net, fit = fit_small(100, validate)
    assert fit.converged and fit.steps == 10 and len(fit.step_seconds) == 10
    assert torch.equal(next(net.parameters()), seen[2]) and not torch.equal(seen[2], seen[3])
    assert not net.training


def test_restore_is_deterministic_and_keeps_known_pixels():
    image, known = wavy(), box_hole()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first, report = internal.restore(image, known, steps=4, seed=5, levels=3, width=8)
    assert torch.equal(torch.get_rng_state(), state)
    second, again = internal.restore(image, known, steps=4, seed=5, levels=3, width=8)
    assert torch.equal(first, second) and report.psnr == again.psnr and report.steps == 4
    assert torch.equal(torch.where(known > 0, first, 0), torch.where(known > 0, image, 0))
    assert set(report.psnr) == {"network", "smooth fill", "biharmonic"}
    assert report.psnr[report.kept] == max(report.psnr.values())
    assert fitting.hole_error(first, image, 1 - known) < 1e-3


def test_what_the_hole_holds_changes_nothing():
    image, known = wavy(), box_hole()
    results = []
    for value in (0.0, 1.0):
        damaged = torch.where(known > 0, image, value)
        result, _ = internal.restore(damaged, known, steps=2, levels=3, width=8)
        results.append(result)
    assert torch.equal(*results)


@pytest.mark.parametrize("best", ["network", "smooth fill", "biharmonic"])
def test_the_best_on_held_out_pixels_is_kept(best, monkeypatch):
    image, known = wavy(), box_hole()

    def off_by(name: str, visible: torch.Tensor) -> torch.Tensor:
        return torch.where(visible > 0, image, image + (0.01 if name == best else 0.05))

    def predict(self, net, _, visible, where):
        return off_by("smooth fill" if net is None else "network", visible)

    monkeypatch.setattr(internal, "fit_network", lambda *args, **options: fitting.Fit())
    monkeypatch.setattr(fills, "biharmonic", lambda _, visible, where: off_by("biharmonic", visible))
    monkeypatch.setattr(fitting.Canvas, "predict", predict)
    result, report = internal.restore(image, known, steps=1, levels=3, width=8)
    assert report.kept == best
    assert report.sentence().endswith(f"-> kept {best}")
    torch.testing.assert_close(result, torch.where(known > 0, image, image + 0.01), atol=1e-6, rtol=0)


def test_without_scikit_image_it_says_so_and_goes_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.restoration", None)
    _, report = internal.restore(wavy(), box_hole(), steps=1, levels=3, width=8)
    assert set(report.psnr) == {"network", "smooth fill"}
    assert len(report.notes) == 1 and "pip install 'fused-inpaint[demo]'" in report.notes[0]


def test_a_hole_too_large_for_biharmonic_is_left_to_the_others(monkeypatch):
    monkeypatch.setattr(fills, "BIHARMONIC_MAX_UNKNOWNS", 100)
    _, report = internal.restore(wavy(), box_hole(), steps=1, levels=3, width=8)
    assert "biharmonic" not in report.psnr and "at most 100 pixels" in report.notes[0]


@pytest.mark.parametrize("corner", [True, False])
def test_hardly_any_known_pixels_still_give_a_picture(corner):
    known = torch.zeros(1, 1, 40, 40)
    known[..., :1, :1] = 1
    image = torch.full((1, 3, 40, 40), 0.3)
    result, report = internal.restore(image, known if corner else known.flip(2, 3), steps=1, levels=3, width=8)
    torch.testing.assert_close(result, image, atol=1e-5, rtol=0)
    assert report.kept == "smooth fill" and "too few known pixels" in report.sentence()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_restore_refuses_masks_without_hole_or_known_pixel(value):
    with pytest.raises(ValueError, match="known must have both ones and zeros"):
        internal.restore(wavy(), torch.full((1, 1, 64, 80), value), steps=1)
