"""The README is short, and its examples run as they stand and say what it says."""

import re

import pytest

from pages import ROOT, blocks

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = blocks(README, "python")


def test_it_is_a_door():
    assert len(TEXT.splitlines()) <= 150
    pictures = [ROOT / name for name in re.findall(r'(?:src|srcset)="([^"]+)"', TEXT)]
    assert pictures and sum(p.stat().st_size for p in pictures) < 100_000


def test_there_are_five_examples_of_at_most_five_lines():
    assert TEXT.split("## Five examples")[1].split("\n## ")[0].count("```python") == 5
    assert all(len(block.strip().splitlines()) <= 5 for block in BLOCKS)


@pytest.mark.real
def test_the_examples_run(capsys):
    namespace: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "(1, 6, 262144) (2, 1, 6, 640)"
    assert printed[-1] == "(18, 1, 6)"
    out, spliced, without = (namespace[name] for name in ("out", "spliced", "without"))
    assert spliced.shape == out.logits.shape == without.shape
    assert abs(spliced - out.logits)[0, 1:].max() > 0 and abs(without - out.logits).max() > 0
    assert len(namespace["steered"].sequences[0]) > 6
