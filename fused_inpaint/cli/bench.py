# SPDX-License-Identifier: Apache-2.0
"""`fused-inpaint bench`: the benchmarks of a checkout, and the pictures of what they measured."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ._common import UserError

CHECKOUT = Path(__file__).resolve().parents[2]


def add(verbs: Any) -> None:
    verb = verbs.add_parser(
        "bench",
        help="run the benchmarks of a checkout, or draw their results",
        description="Run the benchmarks of the checkout that this package is installed from (pip install -e .): each "
        "row is checked for equal results, timed beside its rivals and listed, which takes up to an hour on a CPU.",
    )
    verb.add_argument("--smoke", action="store_true", help="tiny shapes: shows that all runs, measures nothing")
    verb.add_argument("--device", choices=("cpu", "cuda"), help="where (on a GPU if torch finds one)")
    verb.add_argument("--save", action="store_true", help="write the figures to benchmarks/results/")
    verb.add_argument("-k", metavar="ROWS", help="only these, an expression of pytest")
    verb.add_argument("--report", action="store_true", help="run nothing: draw the saved results")
    verb.add_argument("--results", metavar="FOLDER", type=Path, help="of --report (benchmarks/results/)")
    verb.add_argument("-o", "--output", metavar="FOLDER", type=Path, help="of --report (docs/)")
    verb.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    benchmarks = CHECKOUT / "benchmarks"
    if not (benchmarks / "harness.py").is_file():
        raise UserError(f"the benchmarks must be there, in a checkout installed with pip install -e ., got {CHECKOUT}")
    if arguments.report:
        if arguments.smoke or arguments.device or arguments.save or arguments.k:
            raise UserError("--smoke, --device, --save and -k must come without --report, which runs nothing")
        _report(benchmarks, arguments.results or benchmarks / "results", arguments.output or CHECKOUT / "docs")
    else:
        _measure(arguments)


def _report(benchmarks: Path, results: Path, out: Path) -> None:
    if find_spec("matplotlib") is None:
        raise UserError("--report needs matplotlib: pip install 'fused-inpaint[report]'")
    for name, folder in (("results", results), ("output", out)):
        if not folder.is_dir():
            raise UserError(f"{name} must be a folder, got {folder}")
    sys.path.insert(0, str(benchmarks))
    try:
        drawn = importlib.import_module("plots").draw(results, out)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"results must be files that bench --save wrote, got {error!r}") from None
    finally:
        sys.path.remove(str(benchmarks))
    if not drawn:
        raise UserError(f"results must hold files that bench --save wrote, got none in {results}")
    for path in drawn:
        print(path)


def _measure(arguments: argparse.Namespace) -> None:
    if arguments.results or arguments.output:
        raise UserError("--results and --output must come with --report")
    if missing := [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]:
        raise UserError(f"the benchmarks need {' and '.join(missing)}: pip install 'fused-inpaint[test]'")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q"]
    command += ["--fused-save"] if arguments.save else []
    command += ["-k", arguments.k] if arguments.k else []
    environment = dict(os.environ)
    if arguments.smoke:
        environment["FUSED_INPAINT_BENCH_SMOKE"] = "1"
    if arguments.device:
        environment["FUSED_INPAINT_BENCH_DEVICE"] = arguments.device
    done = subprocess.run(command, cwd=CHECKOUT, env=environment)
    if done.returncode:
        raise UserError(f"every row must run, got exit code {done.returncode} from pytest, which says more above")
