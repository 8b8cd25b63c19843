# SPDX-License-Identifier: Apache-2.0
"""Draws the JSON files of benchmarks/results: times by layer and by network in units of ours, and peak memory.

A processor has three pictures. Of a row in several of its files the newest is drawn; a ratio is of medians of one file.
"""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

LAYER = re.compile(r"((?:enc|dec)\d) (.+)")
LAYERS = [f"enc{i}" for i in range(1, 9)] + [f"dec{i}" for i in range(8, 0, -1)]
LAYOUT = re.compile(r" (nchw|channels_last)$")
# A floor stands in the name of the figure that is measured against it.
FLOOR = re.compile(r"U-Net (\d+) (\w+), (b\d+): .* floor of ([\d.]+) ms")
APART = ("graphed", "bf16")  # prefixes of rivals that are compared with ours of the same prefix
COLOURS = {
    "ours": "tab:blue",
    "plain": "tab:grey",
    "naive, full-channel": "tab:red",
    "nvidia": "tab:green",
    "as published": "tab:pink",
    "both filters": "tab:orange",
    "batch norm": "black",
    "convolutions alone": "tab:brown",
}
# What is the same in different rows has one label.
LABELS = {
    "full-channel": "naive, full-channel",
    "eager full-channel": "naive, full-channel",
    "eager nvidia": "nvidia",
    "published": "as published",
    "eager": "as published",
    "dense": "as published",
}
FLOOR_LABEL = "floor: least time of the device"
STYLES = {"": "o", "prepacked": "D", "compiled": "^", "frozen": "v"}


@dataclass
class Machine:
    """The rows of one processor, each from the newest file that has it."""

    name: str
    dates: list[str] = field(default_factory=list)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)  # row -> ms

    @property
    def slug(self) -> str:
        return re.sub("[^a-z0-9]+", "-", self.name.lower()).strip("-")


def read(folder: Path) -> list[Machine]:
    """What was measured, by processor; smoke runs and files of something else are left out."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    runs = [run for run in runs if "rows" in run and not run["machine"]["smoke"]]
    machines: dict[str, Machine] = {}
    for run in sorted(runs, key=lambda run: run["machine"]["date"]):
        facts = run["machine"]
        name = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
        machine = machines.setdefault(name, Machine(name))
        machine.dates.append(facts["date"][:10])
        machine.rows |= run["rows"]
        for found in filter(None, (FLOOR.match(figure["figure"]) for figure in run["figures"])):
            side, what, batch, milliseconds = found.groups()
            machine.floors[f"unet{side} {batch} {what}"] = float(milliseconds)
    return list(machines.values())


def ratios(row: dict[str, Any], floor: float | None = None) -> Iterator[tuple[str, dict[str, float]]]:
    """(prefix, time of each form and of the floor in units of ours), a form being a rival in its better layout."""
    best: dict[str, float] = {}
    for rival, times in row["rivals"].items():
        form = LAYOUT.sub("", rival)
        best[form] = min(times["median_ms"], best.get(form, float("inf")))
    for prefix in ("", *APART):
        start = f"{prefix} " if prefix else ""
        forms = {form.removeprefix(start): ms for form, ms in best.items() if form.startswith(start)}
        if not prefix:
            forms = {form: ms for form, ms in forms.items() if not form.startswith(APART)}
        ours = forms.pop("ours", None) or forms.pop("prepacked ours", None)
        forms.pop("standalone ours", None)
        if ours and floor:
            forms["floor"] = floor
        if ours and forms:
            yield prefix, {form: ms / ours for form, ms in forms.items()}


def _marker(form: str) -> dict[str, Any]:
    how, _, base = form.rpartition(" ") if form.rpartition(" ")[0] in STYLES else ("", "", form)
    base = LABELS.get(base, base)
    colour = COLOURS.get(base, "tab:purple")
    label = f"{how} {base}".strip()
    return {"marker": STYLES[how], "color": colour, "markerfacecolor": "none" if how else colour, "label": label}


def _units(axes: Axes, axis: str) -> None:
    """A logarithmic axis in units of ours."""
    getattr(axes, f"set_{axis}scale")("log", base=2)
    getattr(axes, f"{axis}axis").set_major_formatter(lambda value, _: f"{value:g}")
    {"x": axes.axvline, "y": axes.axhline}[axis](1, color="tab:blue", linewidth=1, label="ours")
    axes.grid(alpha=0.3)


def _legend(figure: Figure, axes: list[Axes]) -> None:
    """One entry for each label of all panels."""
    entries = {
        label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def layers(machine: Machine) -> Figure | None:
    """A panel for each kind of row, the layers along it."""
    kinds: dict[str, dict[str, dict[str, float]]] = {}  # kind -> form -> layer -> ratio
    for name, row in machine.rows.items():
        if found := LAYER.fullmatch(name):
            # What is compiled has a row for each rival.
            kind = re.sub(r"(full-channel|nvidia) compiled", "compiled", found[2])
            for prefix, forms in ratios(row):
                panel = kinds.setdefault(f"{kind} {prefix}".strip(), {})
                for form, ratio in forms.items():
                    panel.setdefault(form, {})[found[1]] = ratio
    if not kinds:
        return None
    # Beside curves, a panel of two layers would be mostly white; they are in the files.
    curves = {kind: forms for kind, forms in kinds.items() if len({layer for at in forms.values() for layer in at}) > 2}
    kinds = curves or kinds
    figure = Figure((11, 1 + 2.6 * -(-len(kinds) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(kinds) // 2), 2, sharey=True, squeeze=False).flatten().tolist()
    for axes, (kind, forms) in zip(panels, kinds.items(), strict=False):
        shown = [layer for layer in LAYERS if any(layer in values for values in forms.values())]
        for form, values in forms.items():
            at = [i for i, layer in enumerate(shown) if layer in values]
            line = ":" if len(at) > 2 else ""
            axes.plot(at, [values[shown[i]] for i in at], linestyle=line, linewidth=0.8, markersize=5, **_marker(form))
        axes.set_xticks(range(len(shown)), shown, fontsize=8)
        axes.set_title(kind, fontsize=9)
        _units(axes, "y")
    for axes in panels[len(kinds) :]:
        axes.remove()
    figure.supylabel("time / ours", fontsize=9)
    _legend(figure, panels[: len(kinds)])
    return figure


def networks(machine: Machine) -> Figure | None:
    """A line for each network and op that is no layer of the U-Net."""
    lines = [
        (f"{name} {prefix}".strip(), forms)
        for name, row in machine.rows.items()
        if not LAYER.fullmatch(name)
        for prefix, forms in ratios(row, machine.floors.get(name))
    ]
    if not lines:
        return None
    figure = Figure((10, 1.6 + 0.3 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for at, (_, forms) in enumerate(lines):
        for form, ratio in forms.items():
            if form == "floor":
                axes.plot(ratio, at, linestyle="", marker="|", markersize=10, color="black", label=FLOOR_LABEL)
            else:
                axes.plot(ratio, at, linestyle="", markersize=6, **_marker(form))
    axes.set_yticks(range(len(lines)), [name for name, _ in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time / ours", fontsize=9)
    _units(axes, "x")
    _legend(figure, [axes])
    return figure


def memory(machine: Machine) -> Figure | None:
    """A bar for each rival: what stays between steps, and the peak of a step above it."""
    bars = [
        (f"{name.removesuffix(' memory')}: {key.removesuffix(' peak')}", row["figures"], key.removesuffix(" peak"))
        for name, row in machine.rows.items()
        for key in row.get("figures", {})
        if name.endswith(" memory") and key.endswith(" peak")
    ]
    if not bars:
        return None
    figure = Figure((10, 1.2 + 0.3 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for at, (_, figures, form) in enumerate(bars):
        colour = "tab:blue" if form.split()[-1] == "ours" else "tab:grey"
        kept, step = figures[f"{form} kept"], figures[f"{form} step"]
        axes.barh(at, kept, color=colour, alpha=0.4, label="kept between steps" if at == 0 else None)
        axes.barh(at, step, left=kept, color=colour, label="peak of a step, above that" if at == 0 else None)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("MiB", fontsize=9)
    axes.grid(alpha=0.3, axis="x")
    _legend(figure, [axes])
    return figure


def draw(results: Path, out: Path) -> list[Path]:
    """Writes out/bench-<processor>-<layers, networks or memory>.png; the paths."""
    pictures = {}
    for machine in read(results):
        for kind in (layers, networks, memory):
            if figure := kind(machine):
                dates = ", ".join(dict.fromkeys(machine.dates))
                figure.suptitle(f"{kind.__name__}: {machine.name}; {dates}", fontsize=10)
                drawn = io.BytesIO()
                figure.savefig(drawn, dpi=100, metadata={"Software": None})
                pictures[out / f"bench-{machine.slug}-{kind.__name__}.png"] = drawn.getvalue()
    for path, picture in pictures.items():
        path.write_bytes(picture)
    return list(pictures)
