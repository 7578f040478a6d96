"""Tables of labelled texts: no label is no class; what repeats stands on one side of a split."""

import gzip
import importlib

import numpy as np
import pytest

from gemma_scope_jax.data import whole_files
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.probing import tables
from gemma_scope_jax.probing.absorption import alphabetic_tokens
from gemma_scope_jax.probing.jobs import Bench, probing_jobs
from gemma_scope_jax.probing.probing import PROTOCOLS, make_task
from gemma_scope_jax.probing.scr_tpp import scr_task, tpp_task
from gemma_scope_jax.probing.tables import MISSING, classes_of, held_out, read_table, table_files


def table(path, rows, header="prompt,target"):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return read_table(path)


def saebench(table):
    return make_task(table, PROTOCOLS["saebench"])


def sae_probes(table):
    return make_task(table, PROTOCOLS["sae-probes"])


MAKES = [(sae_probes, 2), (saebench, 2), (saebench, 3), (tpp_task, 3)]


@pytest.mark.parametrize("gap", [*sorted(MISSING), "   ", "\t", " NaN "])
def test_a_row_without_a_label_is_refused_with_its_number(tmp_path, gap):
    for make, classes in MAKES:
        rows = [(f"text {i}", gap if i in (7, 9) else "abc"[i % classes]) for i in range(600)]
        with pytest.raises(InputError, match=r"t\.csv, row 9: the target is .*as in 1 more row:"):
            make(table(tmp_path / "t.csv", rows))
    for column in (1, 2):
        rows = [[f"text {i}", i % 2, i // 2 % 2] for i in range(400)]
        rows[5][column] = gap
        with pytest.raises(InputError, match=r"row 7: the (job|sex) is"):
            scr_task(table(tmp_path / "s.csv", rows, "text,job,sex"))
    with pytest.raises(InputError, match=r"row 3: the prompt is (empty|'.+'); leave"):
        table(tmp_path / "t.csv", [("a", 1), (gap, 2)])


def test_classes_that_only_look_like_gaps_are_classes(tmp_path):
    rows = [(f"text {i}", ("none", "no", "0")[i % 3]) for i in range(120)]
    assert list(tpp_task(table(tmp_path / "t.csv", rows)).questions) == ["0", "no", "none"]


def test_rows_are_counted_as_the_file_has_them(tmp_path):
    """Blank lines are no rows of the table, and yet rows of the file; texts may span lines."""
    path = tmp_path / "t.csv"
    path.write_text('prompt,target\n\n"two\nlines",1\n\nb,\n')
    with pytest.raises(InputError, match="row 5: the target is ''"):
        read_table(path).column("target")
    path.write_text("prompt,target\n\na,1\nb\n")
    with pytest.raises(InputError, match="row 4: 1 values for 2 columns"):
        read_table(path)


def test_spaces_around_a_label_make_no_other_class(tmp_path):
    found = table(tmp_path / "t.csv", [("a", "x"), ("b", " x "), ("c", "y"), ("d", "y\t")])
    assert classes_of(found.column("target"), found.path)[0] == ["x", "y"]


def test_one_number_written_in_two_ways_is_no_two_classes(tmp_path):
    with pytest.raises(InputError, match=r"'1' and '1.0' are one number"):
        classes_of(["0", "1", "1.0"], tmp_path)
    assert classes_of(["a", "1", "2"], tmp_path)[0] == ["1", "2", "a"]


@pytest.mark.parametrize("text", ['prompt,target\na,"b\nc,d\n', 'prompt,target\n"a"b,c\n'])
def test_a_quote_that_swallows_rows_is_refused(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match="t.csv: not a CSV file"):
        read_table(tmp_path / "t.csv")


def test_tables_of_one_name_are_refused_and_suffixes_have_any_case(tmp_path):
    (tmp_path / "a").mkdir()
    data = b"prompt,target\nx,1\ny,2\n"
    (tmp_path / "News.CSV").write_bytes(data)
    (tmp_path / "more.Csv.GZ").write_bytes(gzip.compress(data))
    files = table_files([str(tmp_path)])
    assert [tables.table_name(f) for f in files] == ["News", "more"]
    assert [read_table(f).texts for f in files] == [["x", "y"]] * 2
    (tmp_path / "a" / "News.csv.gz").write_bytes(gzip.compress(data))
    with pytest.raises(InputError, match=r"two tables of one name"):
        table_files([str(tmp_path), str(tmp_path / "a")])


def compressed(kind, data):
    if kind == "gz":
        return gzip.compress(data)
    return importlib.import_module("zstandard").ZstdCompressor(write_checksum=True).compress(data)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_table_cut_off_anywhere_is_refused_and_so_is_a_bomb(tmp_path, kind, monkeypatch):
    rows = "".join(f"text {i * i % 977},{i % 2}\n" for i in range(400))
    whole = compressed(kind, f"prompt,target\n{rows}".encode())
    path = tmp_path / f"t.csv.{kind}"
    path.write_bytes(whole)
    assert len(read_table(path).texts) == 400
    for cut in (*range(1, 30), len(whole) // 2, *range(len(whole) - 30, len(whole))):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="broken or truncated"):
            read_table(path)
    monkeypatch.setattr(whole_files, "MOST", 1 << 20)
    path.write_bytes(compressed(kind, b"a" * (1 << 20) + b"a"))
    with pytest.raises(InputError, match="t.csv.*too large: over"):
        read_table(path)


# -------------------------------------------------------------------------------------------------
# What repeats


def sides(task):
    """The texts of both sides over all questions, spaces aside."""
    plain = lambda rows: {" ".join(task.texts[i].split()) for i in rows}
    splits = task.questions.values()
    return [set().union(*(plain(getattr(s, side)) for s in splits)) for side in ("train", "test")]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [saebench, tpp_task, scr_task])
def test_rows_of_one_text_never_stand_on_both_sides(tmp_path, make, seed):
    """Whatever their labels, and however many there are of each."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(150):
        label, space = rng.integers(3), (" ", "  ")
        for _ in range(1 + rng.geometric(0.4)):
            other = label if rng.random() < 0.9 else rng.integers(3)
            values = (other % 2, rng.integers(2)) if make is scr_task else (other,)
            rows.append((f"statement{space[rng.integers(2)]}number {i}", *values))
    rows = [rows[i] for i in rng.permutation(len(rows))]
    header = "text,job,sex" if make is scr_task else "prompt,target"
    task = make(table(tmp_path / "t.csv", rows, header))
    train, test = sides(task)
    assert len(train) > 60 and len(test) > 15 and not train & test
    labels: dict = {}
    for text, *values in rows:
        labels.setdefault(" ".join(text.split()), set()).add(tuple(values))
    several = sum(len(some) > 1 for some in labels.values())
    (said,) = task.doubts
    assert said.endswith(f"/t.csv: {several} texts occur twice or more, under different labels")


def test_sae_probes_draws_stay_and_the_user_is_told(tmp_path, caplog):
    rows = [(f"statement {i % 120}", i % 120 % 2) for i in range(480)]
    found = table(tmp_path / "t.csv", rows)
    task = sae_probes(found)
    (split,) = task.questions.values()
    trained = {task.texts[i] for i in split.train}
    both = sum(task.texts[i] in trained for i in split.test)
    (said,) = task.doubts
    assert 90 < both <= len(split.test) == 99
    assert f"{both} of the 99 test rows have texts that are also trained on" in said
    assert task.repeated == both / 99
    probing_jobs(Bench(None, None, {}, None), [found.path], PROTOCOLS["sae-probes"])
    assert caplog.messages == [said]
    unique = table(tmp_path / "u.csv", [(f"statement {i}", i % 2) for i in range(480)])
    (other,) = sae_probes(unique).questions.values()
    assert (other.train == split.train).all() and (other.test == split.test).all()


def test_without_repeats_a_fifth_of_each_class_tests():
    classes = np.random.default_rng(0).integers(0, 3, 100)
    learnt, held = held_out(classes, 5)
    draw = np.random.default_rng(5)
    for c in range(3):
        rows = draw.permutation(np.flatnonzero(classes == c))
        fifth = -(-len(rows) // 5)
        assert held[c].tolist() == rows[:fifth].tolist()
        assert learnt[c].tolist() == rows[fifth:].tolist()


def test_a_class_of_one_text_alone_is_too_small(tmp_path):
    rows = [("the same", 0) if i % 3 == 0 else (f"text {i}", i % 3) for i in range(300)]
    for make in (saebench, tpp_task):
        with pytest.raises(InputError, match="too small: 10 for each .* texts of their own"):
            make(table(tmp_path / "t.csv", rows))
    rows = [("the same" if i % 4 == 0 else f"text {i}", i % 2, i // 2 % 2) for i in range(400)]
    with pytest.raises(InputError, match="too few texts that occur nowhere else"):
        scr_task(table(tmp_path / "s.csv", rows, "text,job,sex"))


def test_words_that_a_vocabulary_has_twice_are_spelt_once():
    class Twice:
        special = np.zeros(5, bool)

        def decode_tokens(self, ids):
            return [["plum", " plum", "plum", "pear", "7"][i] for i in ids]

    ids, words = alphabetic_tokens(Twice())
    assert words == ["plum", " plum", "pear"] and ids.tolist() == [0, 1, 3]
