"""Labelled texts for benchmarks, in the layout of SAE-Probes: CSV files with a column `prompt`.

A table has a few thousand rows and is read whole. The split into training and test rows is drawn
here, so it is the same for every benchmark of a table. Rows without a label are refused, and rows
with the same text are all on one side.
"""

import csv
import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gemma_scope_jax.data.whole_files import read_whole
from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.storage.paths import expanded, named_paths

TEXT = ("prompt", "text")  # the names that the column of texts may have
IGNORED = ("prompt_len",)  # a redundant column of SAE-Probes' files
SUFFIXES = (".csv", ".csv.zst", ".csv.gz")
MOST_TRAIN, MOST_TEST = 4000, 1000  # rows of a question (SAEBench)
SEED = 42
# What spreadsheets and pandas write and read for a missing value.
MISSING = frozenset((
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Table:
    """Texts, the values of each column, and the number of each row in the file."""

    name: str  # the file's, without folders and suffix
    path: Path
    texts: list[str]
    columns: dict[str, list[str]]
    rows: list[int]

    def column(self, *names: str) -> list[str]:
        """The first of the columns `names` that exists, else the only column; values are stripped.
        Raises `InputError` if there is no such column, or if a label is missing."""
        wanted = [name for name in names if name in self.columns] or list(self.columns)
        if wanted[0] not in names and len(wanted) > 1:
            columns = ", ".join(self.columns)
            raise InputError(f"{self.path}: no column {' or '.join(names)} among {columns}")
        labels = [label.strip() for label in self.columns[wanted[0]]]
        if missing := [(row, text) for row, text in zip(self.rows, labels) if text in MISSING]:
            (row, label), others = missing[0], len(missing) - 1
            more = f", as in {others} more row{'s' * (others > 1)}" if others else ""
            raise InputError(
                f"{self.path}, row {row}: the {wanted[0]} is {label!r}{more}: that is not a "
                "label; leave such rows out, or give the class another name"
            )
        return labels

    def numbered(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of the texts of `rows`, int [N]; texts that differ in spaces alone share one."""
        plain, seen = [" ".join(self.texts[i].split()) for i in rows], {}
        return np.array([seen.setdefault(text, len(seen)) for text in plain], np.int64)


def table_files(patterns: Sequence[str]) -> list[Path]:
    """The tables that files, folders and globs name. Raises `InputError` if one names none."""
    found: list[Path] = []
    for pattern in patterns:
        names = named_paths(pattern)
        if len(names) == 1 and os.path.isdir(names[0]):
            inside = sorted(name for name in os.listdir(names[0]) if name[0] != ".")
            names = [os.path.join(names[0], name) for name in inside]
        some = [Path(n) for n in names if os.path.isfile(n)]
        tables = [p for p in some if p.name.lower().endswith(SUFFIXES)]
        if not tables:
            what = f"{some[0].name} is not one" if some else "there is none"
            raise InputError(f"{pattern}: tables are named {', '.join(SUFFIXES)}; {what}")
        found += tables
    found = list(dict.fromkeys(found))
    named: dict[str, Path] = {}
    for path in found:
        if (other := named.setdefault(table_name(path), path)) != path:
            raise InputError(
                f"{other} and {path}: two tables of one name, under which results are stored: "
                "rename one, or leave it out"
            )
    return found


def table_name(path: Path) -> str:
    """A table's file name without its suffix."""
    name = path.name.lower()
    size = next((len(s) for s in SUFFIXES if name.endswith(s)), len(path.suffix))
    return path.name[: len(path.name) - size]


def read_table(path: str | Path) -> Table:
    """Read a CSV file, plain or compressed, with a header and a column `prompt` or `text`. Bytes
    that are not UTF-8, which some of SAE-Probes' files have, become U+FFFD. Raises `InputError`,
    with the row, for a file that is not such a table."""
    path = expanded(path)
    csv.field_size_limit(2**31 - 1)
    file = io.StringIO(read_whole(path).decode("utf-8-sig", "replace"), newline="")
    try:
        rows = {number: row for number, row in enumerate(csv.reader(file, strict=True), 1) if row}
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV file ({reason(error)})") from error
    if len(rows) < 2:
        raise InputError(f"{path}: a table needs a header and rows below it")
    header = [name.strip() for name in rows.pop(min(rows))]
    text = next((name for name in TEXT if name in header), None)
    if text is None or len(set(header)) < len(header):
        raise InputError(
            f"{path}: the header must name a column {' or '.join(TEXT)}, and no column twice; it "
            f"is {','.join(header)[:200]}"
        )
    for number, row in rows.items():
        if len(row) != len(header):
            raise InputError(f"{path}, row {number}: {len(row)} values for {len(header)} columns")
        if (value := row[header.index(text)].strip()) in MISSING:
            raise InputError(
                f"{path}, row {number}: the {text} is {repr(value) if value else 'empty'}; leave "
                "such rows out"
            )
    kept = [(i, name) for i, name in enumerate(header) if name not in IGNORED]
    columns = {name: [row[i] for row in rows.values()] for i, name in kept}
    texts = columns.pop(text)
    if not columns:
        raise InputError(f"{path}: no column of labels beside {text}")
    return Table(table_name(path), path, texts, columns, list(rows))


def classes_of(labels: Sequence[str], path: Path, most: int = 20) -> tuple[list[str], np.ndarray]:
    """The distinct labels, sorted, and the index of each row's label, int [N]. Raises `InputError`
    for fewer than two labels; for more than `most`, which are numbers rather than classes; and for
    two that are one number, as when another program turned 1 into 1.0."""
    names = sorted(set(labels))
    if not 2 <= len(names) <= most:
        shown = ", ".join(names[:3])
        raise InputError(
            f"{path}: {len(names)} different labels ({shown}{', ...' if len(names) > 3 else ''}); "
            f"from 2 to {most} make classes"
        )
    numbers: dict[float, str] = {}
    for name in names:
        if (value := _number(name)) is None or (other := numbers.setdefault(value, name)) == name:
            continue
        raise InputError(f"{path}: the labels {other!r} and {name!r} are one number: use one form")
    index = {name: i for i, name in enumerate(names)}
    return names, np.array([index[label] for label in labels])


def _number(label: str) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None


# -------------------------------------------------------------------------------------------------
# Training and test rows


@dataclasses.dataclass(frozen=True)
class Split:
    """One binary question about a table: rows int [N] and their labels int [N], 1 for positives."""

    train: np.ndarray
    train_y: np.ndarray
    test: np.ndarray
    test_y: np.ndarray


@dataclasses.dataclass(frozen=True)
class Task:
    """The binary questions about a table, and the texts they need."""

    name: str
    texts: list[str]
    questions: dict[str, Split]  # by class or attribute; rows are indices into `texts`
    repeated: float = 0.0  # the share of test rows whose texts are also trained on
    doubts: tuple[str, ...] = ()  # what the user should know, a line each


def first_of_each(classes: np.ndarray, limit: int | None) -> np.ndarray:
    """The rows of the first `limit` examples, as many of each class; None: all rows. Raises
    `InputError` for a limit smaller than the number of classes."""
    if limit is None or limit >= len(classes):
        return np.arange(len(classes))
    count = int(classes.max()) + 1
    each = limit // count
    if each < 1:
        raise InputError(f"a limit of {limit} examples is too small for {count} classes")
    kept = [np.flatnonzero(classes == c)[:each] for c in np.unique(classes)]
    return np.sort(np.concatenate(kept))


def task_of(
    table: Table, kept: np.ndarray, classes: np.ndarray, questions: dict[str, Split]
) -> Task:
    """The task of the rows `kept` of a table, whose rows have `classes` [N]. Doubtful are test rows
    whose texts are also trained on, and texts with several labels."""
    texts = table.numbered(kept)
    both = sum(int(np.isin(texts[s.test], texts[s.train]).sum()) for s in questions.values())
    of = sum(len(split.test) for split in questions.values())
    doubts = []
    if both:
        doubts.append(
            f"{table.path}: {both} of the {of} test rows have texts that are also trained on, as "
            "the protocol draws them, so scores are too good"
        )
    labels = np.unique(np.stack([texts, classes[kept]]), axis=1)[0]
    if several := int((np.bincount(labels) > 1).sum()):
        doubts.append(f"{table.path}: {several} texts occur twice or more, under different labels")
    shown, share = [table.texts[i] for i in kept], both / of if both else 0.0
    return Task(table.name, shown, questions, share, tuple(doubts))


def sae_probes_split(classes: np.ndarray, path: Path) -> Split:
    """SAE-Probes' split of a binary table, class [N] in {0, 1}: balanced, 1,024 rows to train.

    The draws are those of its `get_train_test_indices`, so the same rows of a balanced table, as
    all of its tables are, are chosen. An unbalanced table is cut to its rarer class. Raises
    `InputError` if fewer than 100 rows would test the probe.
    """
    usable = 2 * int(np.bincount(classes, minlength=2).min())
    train = min(usable - 100, 1024)
    if train < 8:
        raise InputError(f"{path}: {usable} balanced rows are too few: at least 108 are needed")
    test = usable - train - 1
    draw = np.random.RandomState(SEED)
    by_class = {c: np.flatnonzero(classes == c) for c in (1, 0)}
    chosen: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for name, count in (("train", train), ("test", test)):
        sizes = {1: -(-count // 2), 0: count // 2}
        for c in (1, 0):
            left = np.setdiff1d(by_class[c], np.concatenate(chosen["train"][:2] or [[]]))
            chosen[name].append(draw.choice(left.astype(np.int64), sizes[c], replace=False))
    rows = {name: draw.permutation(np.concatenate(parts)) for name, parts in chosen.items()}
    y = {name: (classes[r] == 1).astype(np.int64) for name, r in rows.items()}
    return Split(rows["train"], y["train"], rows["test"], y["test"])


def held_out(
    classes: np.ndarray, seed: int, texts: np.ndarray | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The training rows of each class, and the test rows, a fifth of them; shuffled.

    texts: the number of each row's text, int [N]. Rows with the same text are on one side, whatever
    their class, so a little more than a fifth may test. Default: all texts differ.
    """
    draw = np.random.default_rng(seed)
    texts = np.arange(len(classes)) if texts is None else texts
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    tests: dict[int, bool] = {}
    for c in range(int(classes.max()) + 1):
        rows = draw.permutation(np.flatnonzero(classes == c))
        sizes = dict(zip(*np.unique(texts[rows], return_counts=True)))
        left = -(-len(rows) // 5) - sum(n for text, n in sizes.items() if tests.get(text))
        for text in texts[rows].tolist():
            if text not in tests:
                tests[text] = left > 0
                left -= sizes[text] if tests[text] else 0
        held = np.array([tests[text] for text in texts[rows].tolist()], bool)
        sides[0].append(rows[~held])
        sides[1].append(rows[held])
    return sides


def one_against_rest(
    classes: np.ndarray, path: Path, texts: np.ndarray | None = None
) -> dict[int, Split]:
    """SAEBench's balanced questions: class c [N] against as many rows of each of the others.

    A row trains probes or tests them, for every class alike: a fifth of each class tests, the rows
    of one of `texts` together (see `held_out`). Of two classes only class 1 is asked for. Raises
    `InputError` if a class has too few rows.
    """
    count = int(classes.max()) + 1
    learnt, held = held_out(classes, SEED, texts)
    draw = np.random.default_rng(SEED)
    questions: dict[int, Split] = {}
    for c in [1] if count == 2 else range(count):
        parts: dict[str, np.ndarray] = {}
        for name, pool, most in (("test", held, MOST_TEST), ("train", learnt, MOST_TRAIN)):
            others = [rows for i, rows in enumerate(pool) if i != c]
            each = min(min(map(len, others)), len(pool[c]) // len(others), most // 2 // len(others))
            if each < 1:
                few = min(int((classes == i).sum()) for i in range(count))
                raise InputError(
                    f"{path}: a class of {few} rows is too small: 10 for each of the others, with "
                    "texts of their own"
                )
            negative = np.concatenate([rows[:each] for rows in others])
            rows = np.concatenate([pool[c][: len(negative)], negative])
            parts[name] = draw.permutation(rows)  # the last of them are held out to choose C
        y = {name: (classes[rows] == c).astype(np.int64) for name, rows in parts.items()}
        questions[c] = Split(parts["train"], y["train"], parts["test"], y["test"])
    return questions
