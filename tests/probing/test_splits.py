"""Tables of texts, their labels, and how they are split."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.probing import tables
from gemma_scope_jax.probing.probing import folds
from gemma_scope_jax.probing.tables import (
    classes_of,
    first_of_each,
    one_against_rest,
    read_table,
    sae_probes_split,
    table_files,
)

HERE = Path("table.csv")


def test_a_table_reads_alike_plain_and_compressed(tmp_path):
    text = 'prompt,prompt_len,target\n"a, b",4,yes\n"line\nbreak \xff",10,no\n'.encode("latin-1")
    (tmp_path / "one.csv").write_bytes(text)
    (tmp_path / "two.csv.gz").write_bytes(gzip.compress(text))
    (tmp_path / "ignored.txt").write_text("x")
    files = table_files([str(tmp_path)])
    (bracketed := tmp_path / "tables [1]").mkdir()
    (bracketed / "a[1].csv").write_text("prompt,target\nx,1\n")
    assert table_files([f"{bracketed}/a[1].csv", f"{bracketed}/*"]) == [bracketed / "a[1].csv"]
    assert [f.name for f in files] == ["one.csv", "two.csv.gz"]
    one, two = map(read_table, files)
    assert (one.texts, one.columns) == (two.texts, two.columns)
    assert one.texts == ["a, b", "line\nbreak \ufffd"]
    assert (one.name, two.name, one.columns) == ("one", "two", {"target": ["yes", "no"]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header and rows"),
        (b"prompt,target\n", "a header and rows"),
        (b"question,target\nx,1\n", "must name a column prompt or text"),
        (b"prompt,prompt,target\nx,y,1\n", "no column twice"),
        (b"prompt,target\nx,1\ny\n", "row 3: 1 values for 2 columns"),
        (b"prompt,target\nx,1\n ,2\n", "row 3: the prompt is empty"),
        (b"prompt\nx\n", "no column of labels"),
    ],
)
def test_files_that_are_no_tables(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_table(path)
    assert "bad.csv" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv.gz", b"no gzip"), ("b.csv.zst", b"no zstandard")]
)
def test_broken_compressed_tables(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="broken or truncated"):
        read_table(tmp_path / name)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("none*.csv", "there is none"), ("notes.txt", "is not one"), ("empty", "there is none")],
)
def test_patterns_that_name_no_table(tmp_path, pattern, message):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        table_files([str(tmp_path / pattern)])


def test_labels_become_classes_or_say_why_not(tmp_path):
    names, classes = classes_of(["b", "a", "b"], tmp_path)
    assert names == ["a", "b"] and classes.tolist() == [1, 0, 1]
    with pytest.raises(InputError, match="21 different labels .* from 2 to 20"):
        classes_of([str(i) for i in range(21)], tmp_path)
    with pytest.raises(InputError, match="1 different labels"):
        classes_of(["a", "a"], tmp_path)


def test_sae_probes_split_is_balanced_disjoint_and_its_size():
    classes = np.random.default_rng(0).permutation(np.repeat([0, 1], [700, 1000]))
    split = sae_probes_split(classes, HERE)
    assert (len(split.train), len(split.test)) == (1024, 1400 - 1024 - 1)
    assert not set(split.train) & set(split.test)
    assert split.train_y.sum() == 512 and split.test_y.sum() == 188
    assert (classes[split.train] == split.train_y).all()
    assert (classes[split.test] == split.test_y).all()
    assert (sae_probes_split(classes, HERE).train == split.train).all()
    with pytest.raises(InputError, match="too few"):
        sae_probes_split(np.repeat([0, 1], 50), HERE)


def test_one_against_rest_is_balanced(monkeypatch):
    """It is balanced over the other classes, too, and no text that trained is tested."""
    classes = np.repeat([0, 1, 2, 3], [100, 80, 60, 90])
    questions = one_against_rest(classes, HERE)
    train = set(np.concatenate([s.train for s in questions.values()]))
    assert not train & set(np.concatenate([s.test for s in questions.values()]))
    for c, split in questions.items():
        assert (split.train_y == (classes[split.train] == c)).all()
        assert split.train_y.mean() == split.test_y.mean() == 0.5
        assert 0 < split.train_y[folds(split.train_y)[0]].mean() < 1  # both classes to choose C on
        others = np.bincount(classes[split.train], minlength=4)
        assert len(set(np.delete(others, c))) == 1
    assert list(one_against_rest(np.repeat([0, 1], 20), HERE)) == [1]
    monkeypatch.setattr(tables, "MOST_TRAIN", 30)
    small = one_against_rest(classes, HERE)
    assert max(len(s.train) for s in small.values()) == 30
    with pytest.raises(InputError, match="too small"):
        one_against_rest(np.repeat([0, 1, 2], [100, 100, 1]), HERE)


def test_a_limit_keeps_the_first_of_each_class():
    classes = np.array([0, 0, 0, 1, 1, 0, 1, 1])
    assert first_of_each(classes, 4).tolist() == [0, 1, 3, 4]
    assert first_of_each(classes, None).tolist() == list(range(8))
