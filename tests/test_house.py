"""What keeps tests readable: short files and names, and no test that needs another."""

import ast
import re
from pathlib import Path

import pytest

from durations import long_tests

HERE = Path(__file__).parent
TESTS = sorted(HERE.rglob("*.py"))
ROOMS = sorted({path.parent for path in TESTS if path.name.startswith("test_")} - {HERE / "peers"})
LINES, NAME = 400, 70


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.relative_to(HERE).as_posix())
def test_files_are_short_and_import_no_test(path):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= LINES, "split it by idea"
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    borrowed = {name for name in modules if re.match(r"(.*\.)?test_", name)}
    assert not borrowed, "what tests share belongs into tests/support/"


def test_names_of_files_are_unique():
    """Two files of one name could not both be imported by name."""
    names = [path.name for path in TESTS if path.name != "conftest.py"]
    assert len(names) == len(set(names))


def test_names_are_short():
    """The rest belongs into the docstring."""
    defined = {(path.name, name) for path in TESTS for name in functions(path)}
    assert [name for _, name in defined if len(name) > NAME] == []
    gone = long_tests() - {f"{file}::{name}" for file, name in defined}
    assert not gone, "tests/long_tests.txt names tests that are gone: `make durations`"


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.name)
def test_every_room_has_quick_tests(room):
    names = {f"{path.name}::{name}" for path in room.glob("test_*.py") for name in functions(path)}
    assert names - long_tests()


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[:5] == "test_"]
