# SPDX-License-Identifier: Apache-2.0
"""`pytest benchmarks/ --benchmark-only`: every row is checked, timed beside its rivals, and listed at the end."""

import contextlib
import os
import time

import harness
import pytest
import report
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fused-save",
        action="store_true",
        default=os.environ.get("FUSED_INPAINT_BENCH_SAVE", "") not in ("", "0"),
        help="write the figures to benchmarks/results/ (also FUSED_INPAINT_BENCH_SAVE=1)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: rows that compile for minutes; a full run includes them")
    config.stash[RECORDS] = {}
    config.stash[FACTS] = report.machine()
    config.stash[STARTED] = time.monotonic()


RECORDS = pytest.StashKey[dict[str, harness.Record]]()
FACTS = pytest.StashKey[dict[str, object]]()
STARTED = pytest.StashKey[float]()
COMPILE_UNTIL = 300.0
"""Seconds after which nothing more is compiled, so that a run on a borrowed GPU ends and keeps its figures."""


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(harness.THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def vendor_at_its_best():
    with harness.cudnn(benchmark=True):
        yield


@pytest.fixture
def time_to_compile(request):
    age = time.monotonic() - request.config.stash[STARTED]
    if age > COMPILE_UNTIL:
        pytest.skip(f"the run is {age:.0f} s old, and compiling takes minutes")


@pytest.fixture
def keep(request):
    """Put a finished record into the summary."""

    def put(record: harness.Record) -> None:
        request.config.stash[RECORDS][record.name] = record

    return put


@pytest.fixture
def measure(benchmark, keep):
    """Check and time one row; pytest-benchmark's own table then lists ours, and its JSON every ratio."""

    def run(row: harness.Row) -> harness.Record:
        record = harness.measure(row)
        keep(record)
        for name in record.seconds:
            if name != "ours":
                low, median, high = record.ratio(name, "ours")
                benchmark.extra_info[f"{name} / ours"] = {"p20": low, "median": median, "p80": high}
        benchmark.extra_info["largest relative difference"] = max(record.errors.values())
        benchmark.group = f"ours, {row.name.split()[-1]}"
        with torch.inference_mode() if row.inference else contextlib.nullcontext():
            ours = harness.waited(row.rivals["ours"].call)
            benchmark.pedantic(ours, rounds=1 if harness.SMOKE else 5, iterations=1, warmup_rounds=1)
        return record

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    records, facts = config.stash[RECORDS], config.stash[FACTS]
    if not records:
        return
    write = terminalreporter.write_line
    terminalreporter.section("partial convolution beside its rivals")
    for line in report.header(facts):
        write(line)
    write("")
    write(f"  {'ms per call':<34}{'p20':>10} {'median':>10} {'p80':>10}")
    for record in records.values():
        for line in report.row_lines(record):
            write(line)
    write("")
    for line in report.bar_lines(records):
        write(line)
    if config.getoption("--fused-save"):
        write(f"saved {report.save(facts, records).relative_to(report.ROOT)}")
