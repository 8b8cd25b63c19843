# SPDX-License-Identifier: Apache-2.0
"""Fill the gaps of a gridded field, which are NaN, on a globe; beside simple fills, which often do as well.

    python examples/gridded_field.py                                       # synthetic sea surface temperature
    python examples/gridded_field.py --file sst.nc --variable sst          # (time, latitude, longitude), with xarray

Nothing but known values is used: some of them are hidden, in the shape of gaps, to train on, and others, in the last
quarter of the fields, to measure by. Longitude goes round (`padding_mode="circular"`), beyond the poles there is
nothing (rows of hole).
"""

import argparse
import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_inpaint import PartialConv2d, masks
from fused_inpaint.training import fills

DILATIONS = (1, 2, 4, 8, 4, 2, 1)


class GlobeNet(nn.Module):
    """Dilated 3 x 3 convolutions; partial ones, or plain ones that see 0, the mean, in the gaps."""

    def __init__(self, width: int, partial: bool) -> None:
        super().__init__()
        self.partial = partial
        sizes = [1, *[width] * (len(DILATIONS) - 1), 1]
        self.layers = nn.ModuleList()
        for i, d in enumerate(DILATIONS):
            options = {"padding": (0, d), "dilation": d, "padding_mode": "circular"}
            if partial:
                self.layers.append(PartialConv2d(sizes[i], sizes[i + 1], 3, return_mask=True, **options))
            else:
                self.layers.append(nn.Conv2d(sizes[i], sizes[i + 1], 3, **options))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (N, 1, H, W) both
        if not self.partial:
            x = torch.where(mask.bool(), x, 0)
        for layer, d in zip(self.layers, DILATIONS, strict=True):
            x, mask = (F.pad(t, (0, 0, d, d)) for t in (x, mask))
            if self.partial:
                x, mask = layer(x, mask)
            else:
                x, mask = layer(x), mask[..., d:-d, :]
            if layer is not self.layers[-1]:
                x = F.relu(x)
        return x


def synthetic(count: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(count, height, width) in degrees Celsius, with NaN under clouds: a cosine of latitude, waves and eddies."""
    latitude = np.linspace(-np.pi / 2.2, np.pi / 2.2, height)[:, None]
    longitude = np.linspace(0, 2 * np.pi, width, endpoint=False)[None]
    fields = np.empty((count, height, width), np.float32)
    for field in fields:
        field[:] = 28 * np.cos(latitude) ** 2
        for wave in range(1, 9):
            tilt, phase, size = rng.normal(0, wave), rng.uniform(0, 2 * np.pi), rng.normal(0, 2 / wave)
            field += size * np.cos(wave * longitude + tilt * latitude + phase)
        field[clouds(height, width, rng)] = np.nan
    return fields


def clouds(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width) bool: discs, which go on at the other end of a row."""
    rows, columns = np.mgrid[:height, :width]
    covered = np.zeros((height, width), bool)
    for _ in range(6):
        away = np.abs(columns - rng.uniform(0, width))
        away = np.minimum(away, width - away)
        covered |= away**2 + (rows - rng.uniform(0, height)) ** 2 < rng.uniform(2, height / 6) ** 2
    return covered


def read(path: str, variable: str) -> np.ndarray:
    try:
        import xarray
    except ImportError:
        raise SystemExit("--file needs xarray: pip install xarray netcdf4") from None
    with xarray.open_dataset(path) as data:
        return data[variable].values.astype(np.float32)


def around(field: Tensor, margin: int) -> Tensor:
    """Columns of the other end on both sides, for fills that know no globe."""
    return torch.cat([field[..., -margin:], field, field[..., :margin]], -1)


def hide(known: Tensor, rng: np.random.Generator) -> Tensor:
    """The mask (N, 1, H, W) with more gaps in it, placed as clouds are."""
    covered = np.stack([clouds(*known.shape[2:], rng) for _ in range(len(known))])
    return known * torch.from_numpy(~covered)[:, None]


def train(net: GlobeNet, fields: Tensor, known: Tensor, steps: int, rng: np.random.Generator, name: str) -> None:
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    for step in range(steps):
        if step % 50 == 0:
            print(f"{name}: step {step} of {steps}", flush=True)
        chosen = torch.from_numpy(rng.integers(0, len(fields), 8))
        x, mask = fields[chosen], known[chosen]
        given = hide(mask, rng)
        scored = (mask > given).float()
        loss = (torch.where(scored > 0, net(x, given) - x, 0).abs()).sum() / scored.sum().clamp(min=1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", help="netCDF, read by xarray (synthetic fields)")
    parser.add_argument("--variable", default="sst")
    parser.add_argument("--steps", type=int, default=200, help="of each network (%(default)s)")
    parser.add_argument("--fields", type=int, default=64, help="synthetic ones (%(default)s)")
    parser.add_argument("--rows", type=int, default=48, help="of a synthetic field, with twice as many columns")
    parser.add_argument("--width", type=int, default=24, help="channels (%(default)s)")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    if arguments.file:
        raw = read(arguments.file, arguments.variable)
    else:
        raw = synthetic(arguments.fields, arguments.rows, 2 * arguments.rows, rng)
    given = torch.from_numpy(raw)[:, None]  # (T, 1, H, W), NaN in gaps
    known = masks.from_nan(given)
    training = slice(0, 3 * len(given) // 4)
    # What is known of a latitude on average, from the training fields; a latitude of land alone has none.
    row = torch.nanmean(torch.where(known.bool(), given, torch.nan)[training], (0, 3), keepdim=True).nan_to_num()
    spread = (given - row)[training][known[training].bool()].std()
    fields = (given - row) / spread  # NaN stays in the gaps: no layer reads it

    test, test_known = fields[training.stop :], known[training.stop :]
    test_given = hide(test_known, np.random.default_rng(1))
    hidden = (test_known > test_given).bool()

    def score(filled: Tensor) -> float:
        return ((filled - test)[hidden].square().mean().sqrt() * spread).item()

    results = {"mean of the latitude": score(torch.zeros_like(test))}
    margin = test.size(-1) // 4
    wide, wide_known = (around(t, margin) for t in (torch.where(test_given.bool(), test, 0), test_given.float()))
    results["smooth (nearly biharmonic)"] = score(fills.smooth(wide, wide_known)[..., margin:-margin])
    try:
        from skimage.restoration import inpaint_biharmonic
    except ImportError:
        print("scikit-image is not installed: without its biharmonic fill")
    else:
        pairs = zip(wide.double().numpy()[:, 0], wide_known.numpy()[:, 0] == 0, strict=True)
        filled = np.stack([inpaint_biharmonic(field, gap) for field, gap in pairs])
        results["biharmonic (scikit-image)"] = score(torch.from_numpy(filled).float()[:, None, :, margin:-margin])
    for name, partial in (("plain convolutions, mean in the gaps", False), ("partial convolutions", True)):
        torch.manual_seed(0)
        net = GlobeNet(arguments.width, partial)
        train(net, fields[training], known[training], arguments.steps, copy.deepcopy(rng), name)
        with torch.no_grad():
            results[name] = score(net(test, test_given))

    print(f"{int(hidden.sum())} hidden values in {len(test)} fields; root mean squared error in the field's unit:")
    for name, value in sorted(results.items(), key=lambda pair: pair[1]):
        print(f"  {name:<38}{value:8.3f}")
    return results


if __name__ == "__main__":
    main()
