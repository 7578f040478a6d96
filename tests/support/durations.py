"""What tests cost, in CPU seconds, and which of them are left out of `make quick`.

As a plugin (`make durations`) it measures every test and fixture, and writes into
tests/long_tests.txt the names of those that remain when the tests of least cost, their parts of
what they share included, have used up BUDGET. CPU seconds, also of programs that tests start,
depend little on what else the machine does.
"""

import bisect
import itertools
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

BUDGET = 45.0  # of the tests of `make quick`; long laws, imports and pytest itself come on top
LONG = Path(__file__).parent.parent / "long_tests.txt"


def long_tests() -> set[str]:
    """Functions as FILE::NAME, without their folders and parameters."""
    lines = LONG.read_text().splitlines() if LONG.exists() else []
    return {f"{file}::{name}" for file, *names in map(str.split, lines) for name in names}


def name_of(item) -> str:
    return f"{item.path.name}::{getattr(item, 'originalname', item.name)}"


fixtures: dict = defaultdict(float)  # all that each fixture took
users: dict = defaultdict(set)  # tests by fixture
tests: dict = defaultdict(float)  # all that each function took, with all its parameters
inside: list[float] = []  # seconds of the fixtures that the running ones asked for


def cpu_seconds() -> float:
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    start = cpu_seconds()
    inside.append(0.0)
    try:
        return (yield)
    finally:
        whole = cpu_seconds() - start
        fixtures[fixturedef.func] += whole - inside.pop()
        if inside:
            inside[-1] += whole


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    start = cpu_seconds()
    try:
        return (yield)
    finally:
        tests[name_of(item)] += cpu_seconds() - start
        for defs in item._fixtureinfo.name2fixturedefs.values():
            users[defs[-1].func].add(name_of(item))


def pytest_sessionfinish(session):
    cost = dict(tests)
    for fixture, names in users.items():
        for name in names:
            cost[name] += fixtures[fixture] / len(names)
    report = sorted(((seconds, name) for name, seconds in cost.items()), reverse=True)
    if where := os.environ.get("DURATIONS"):
        Path(where).write_text("".join(f"{seconds:.2f} {name}\n" for seconds, name in report))
    else:
        spent = itertools.accumulate(seconds for seconds, _ in reversed(report))
        quick = bisect.bisect(list(spent), BUDGET)
        write_long(name for _, name in report[: len(report) - quick])


def write_long(names: Iterable[str]) -> None:
    """A line for each file: its name, and those of its tests."""
    by_file = itertools.groupby(sorted(n.split("::") for n in names), lambda pair: pair[0])
    LONG.write_text("".join(f"{' '.join([f, *(t for _, t in some)])}\n" for f, some in by_file))
