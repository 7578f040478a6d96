"""The README's examples run as they stand, one after the other, and say what the README says."""

import re
from pathlib import Path

import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.cli import main

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_there_are_five_examples_of_at_most_five_lines():
    assert TEXT.split("## Five examples")[1].split("\n## ")[0].count("```python") == 5
    assert all(len(block.strip().splitlines()) <= 5 for block in BLOCKS)


def test_every_room_and_file_the_readme_names_exists():
    rooms = re.findall(r"^ {6}(\w+(?:/|\.py)) ", TEXT, re.M)
    assert len(rooms) >= 8
    for room in rooms:
        assert (ROOT / "gemma_scope_jax" / room).exists(), room
    for name in re.findall(r"`((?:gemma_scope_jax|configs|benchmarks|notebooks)/[\w/.]+)`", TEXT):
        assert (ROOT / name).exists(), name


@pytest.mark.real
def test_the_examples_run(capsys):
    namespace: dict = {}
    for block in BLOCKS[:5]:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "(1, 6, 262144) (2, 1, 6, 640)"
    assert printed[-1] == "(18, 1, 6)"
    out, spliced, without = (namespace[name] for name in ("out", "spliced", "without"))
    assert spliced.shape == out.logits.shape == without.shape
    assert abs(spliced - out.logits)[0, 1:].max() > 0 and abs(without - out.logits).max() > 0
    assert len(namespace["steered"].sequences[0]) > 6


@pytest.mark.real
def test_the_store_example_runs(tmp_path, monkeypatch, capsys):
    sample = ROOT / "gemma_scope_jax/packaged/sample.txt"
    coder = "gemma-3-270m-resid-post-12-width-4k-l0-50"
    options = ["--text", str(sample), "--out", str(tmp_path / "features")]
    assert main(["extract", coder, *options, "--rows", "4", "--length", "256"]) == 0
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"gs": gs}
    exec(compile(BLOCKS[5], "README.md", "exec"), namespace)
    assert len(BLOCKS) == 6 and namespace["values"].min(initial=1.0) > 0
    offsets, store = namespace["offsets"], namespace["store"]
    assert 40 < offsets[-1] / store.counted < 60  # its L0
