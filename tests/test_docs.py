# SPDX-License-Identifier: Apache-2.0
"""The documents: links lead somewhere, Python in them compiles, the README's runs, and doctests are true."""

import doctest
import json
import re
import shlex
from pathlib import Path

import pytest

import fused_inpaint
from fused_inpaint import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
# Kinds: "python" compiles and, in the README, runs; "pycon" is a doctest.
BLOCK = re.compile(r"^```([\w{}-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)", re.DOTALL)


def blocks(page: Path, kind: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == kind]


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_resolve(page):
    broken = []
    for link in LINK.findall(BLOCK.sub("", page.read_text())):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_compiles(page):
    for text in blocks(page, "python"):
        compile(text, page.name, "exec")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "pycon")], ids=lambda page: page.name)
def test_doctests_are_true(page):
    parsed = doctest.DocTestParser().get_doctest("\n".join(blocks(page, "pycon")), {}, page.name, str(page), 0)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(parsed, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_readme_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = blocks(ROOT / "README.md", "python")
    assert found
    scope: dict[str, object] = {}
    for text in found:  # one after the other, as a reader types them
        exec(compile(text, "README.md", "exec"), scope)


def test_commands_exist():
    """Every fused-inpaint line of a page is one that the command takes."""
    lines = [line for page in PAGES for kind in ("", "sh") for text in blocks(page, kind) for line in text.splitlines()]
    commands = [line for line in lines if line.startswith("fused-inpaint ")]
    assert commands
    for line in commands:
        words = shlex.split(line, comments=True)[1:]
        cli.parser().parse_args(words)


def test_readme_names_everything_public():
    readme = (ROOT / "README.md").read_text()
    modules = {"losses", "masks", "models", "ops", "NoBackendError"}
    assert [name for name in set(fused_inpaint.__all__) - modules if f"`{name}`" not in readme] == []


MEASURED = [
    ("README.md", "## Measured", "\n## "),
    ("docs/performance.md", "### Layers and networks", "### Training"),
    ("docs/performance.md", "| figure | ratio |", "\n\n"),
]


@pytest.mark.parametrize(("page", "begin", "end"), MEASURED)
def test_figures_are_measured(page: str, begin: str, end: str):
    """Each ratio of a page's table stands in a results file, to the digits that it is given in."""
    figures = [
        figure["measured"]
        for path in (ROOT / "benchmarks" / "results").glob("*.json")
        for figure in json.loads(path.read_text()).get("figures", [])
        if figure["measured"] is not None
    ]
    table = (ROOT / page).read_text().partition(begin)[2].partition(end)[0]
    cells = [cell for row in re.findall(r"^\|.*\|$", table, re.MULTILINE) for cell in row.split("|")[2:]]
    said = [number for cell in cells for number in re.findall(r"(?<![\w.])\d+\.\d+", cell)]
    assert said
    unknown = [s for s in said if not any(abs(float(s) - v) < 0.51 * 10 ** -len(s.partition(".")[2]) for v in figures)]
    assert unknown == []
