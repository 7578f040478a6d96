"""What tests cost, in CPU seconds, and which of them are left out of `make quick`.

As a plugin (`pytest -p durations`) it measures every test together with the fixtures that it needs,
made for it or before, and writes those that took longer than `LIMIT` into `tests/long_tests.txt`
(`make durations`). CPU seconds, of processes that tests start as well, do not depend on what else
the machine does.
"""

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

LIMIT = 0.7
LONG = Path(__file__).parent.parent / "long_tests.txt"


def long_tests() -> set[str]:
    """Names of the functions, without their files and parameters."""
    return set(LONG.read_text().split())


def cpu_seconds() -> float:
    return sum(os.times()[:4])


fixtures: dict = defaultdict(float)  # what each took at most
tests: dict = defaultdict(float)
inside: list[float] = []  # seconds of the fixtures that the running one asked for


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    start = cpu_seconds()
    inside.append(0.0)
    try:
        return (yield)
    finally:
        whole = cpu_seconds() - start
        key = str(fixturedef.func)
        fixtures[key] = max(fixtures[key], whole - inside.pop())
        if inside:
            inside[-1] += whole


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    start = cpu_seconds()
    try:
        return (yield)
    finally:
        made = {d[-1].func for d in item._fixtureinfo.name2fixturedefs.values()}
        needs = sum(fixtures[str(func)] for func in made)
        tests[item.nodeid] = (cpu_seconds() - start, needs)


def pytest_sessionfinish(session):
    if where := os.environ.get("DURATIONS"):
        Path(where).write_text(json.dumps({"tests": tests, "fixtures": fixtures}))
