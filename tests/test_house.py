"""What keeps the files readable: short, each of one idea, and no test that needs another."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = sorted(HERE.rglob("*.py"))
LINES = 400


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
