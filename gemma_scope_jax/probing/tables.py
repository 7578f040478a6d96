"""Labelled texts for benchmarks, in the layout of SAE-Probes: CSV files with a column `prompt`.

A table is read whole (a few thousand rows); which rows train a probe and which test it is drawn
here, so that every benchmark of a table sees the same split. A row without a label is no row of
another class, but refused; rows of the same text are all drawn to the same side.
"""

import csv
import dataclasses
import gzip
import io
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gemma_scope_jax.data.document_files import decompressed
from gemma_scope_jax.errors import InputError, reason, shown
from gemma_scope_jax.storage.paths import named_paths

TEXT = ("prompt", "text")  # the names that the column of texts may have
IGNORED = ("prompt_len",)  # a column of SAE-Probes' files that says nothing new
SUFFIXES = (".csv", ".csv.zst", ".csv.gz")
MOST_BYTES = 1 << 30  # of a table, decompressed
# What spreadsheets and pandas write and read for a value that is not there.
MISSING = frozenset((
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Table:
    """`columns` hold a string for each of `texts`, `rows` the number of its row in the file."""

    name: str  # the file's, without folders and suffix
    path: Path
    texts: list[str]
    columns: dict[str, list[str]]
    rows: list[int]

    def column(self, *names: str) -> list[str]:
        """The first of the columns `names` there is; else the only one; without spaces around.

        Raises `InputError` where there is no such column, and naming the row for a label that is
        missing.
        """
        wanted = [name for name in names if name in self.columns] or list(self.columns)
        if wanted[0] not in names and len(wanted) > 1:
            raise InputError(
                f"{self.path}: no column {' or '.join(names)} among {', '.join(self.columns)}"
            )
        labels = [label.strip() for label in self.columns[wanted[0]]]
        missing = [row for row, label in zip(self.rows, labels) if label in MISSING]
        if missing:
            label = labels[self.rows.index(missing[0])]
            others = len(missing) - 1
            more = f", as in {others} more row{'s' * (others > 1)}" if others else ""
            raise InputError(
                f"{self.path}, row {missing[0]}: the {wanted[0]} is {label!r}{more}: that is no "
                "label; leave such rows out, or give the class another name"
            )
        return labels

    def numbered(self, some: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Which text each row has, int [N] (of the rows `some`): equal but for spaces is equal."""
        chosen = self.texts if some is None else [self.texts[i] for i in some]
        seen: dict[str, int] = {}
        return np.array([seen.setdefault(" ".join(t.split()), len(seen)) for t in chosen], np.int64)


def table_files(patterns: Sequence[str]) -> list[Path]:
    """The tables that files, folders and globs name. Raises `InputError` where one names none."""
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
                f"{other} and {path}: two tables of one name, by which results are told apart: "
                "rename one, or leave it out"
            )
    return found


def table_name(path: Path) -> str:
    """A table's file name without its suffix."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def read_table(path: str | Path) -> Table:
    """Read a CSV file, plain or compressed, with a column `prompt` or `text` and a header.

    Bytes that are not UTF-8 become U+FFFD: some of SAE-Probes' files have them. Raises `InputError`
    naming the row for a file that is not such a table.
    """
    path = Path(path).expanduser()
    csv.field_size_limit(2**31 - 1)
    text = io.StringIO(_bytes(path).decode("utf-8-sig", "replace"), newline="")
    try:
        rows = list(enumerate(csv.reader(text, strict=True), 1))
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV file ({reason(error)})") from error
    return _table(path, [(number, row) for number, row in rows if row])


def _bytes(path: Path) -> bytes:
    """What a plain or compressed file holds, `MOST_BYTES` at most. Raises `InputError`."""
    try:
        kind = path.suffix.lower()
        opened = gzip.open if kind == ".gz" else decompressed if kind == ".zst" else io.FileIO
        with opened(path) as file:  # type: ignore[operator]
            data = file.read(MOST_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: broken or truncated file ({reason(error)})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or reason(error)})") from error
    except InputError:
        raise
    except Exception as error:
        if "zst" not in type(error).__module__:
            raise
        raise InputError(f"{path}: broken or truncated file ({reason(error)})") from error
    if len(data) > MOST_BYTES:
        raise InputError(
            f"{path}: more than {MOST_BYTES >> 30} GiB of text is no table of examples"
        )
    return data


def _table(path: Path, numbered: list[tuple[int, list[str]]]) -> Table:
    if len(numbered) < 2:
        raise InputError(f"{path}: a table needs a header and rows below it")
    numbers, rows = [n for n, _ in numbered[1:]], [row for _, row in numbered]
    header = [name.strip() for name in rows[0]]
    text = next((name for name in TEXT if name in header), None)
    if text is None or len(set(header)) < len(header):
        raise InputError(
            f"{path}: the header must name a column {' or '.join(TEXT)}, and no column twice; it "
            f"is {','.join(header)[:200]}"
        )
    for number, row in zip(numbers, rows[1:]):
        if len(row) != len(header):
            raise InputError(f"{path}, row {number}: {len(row)} values for {len(header)} columns")
        if (value := row[header.index(text)].strip()) in MISSING:
            raise InputError(
                f"{path}, row {number}: the {text} is {repr(value) if value else 'empty'}: there "
                "is no text to read; leave such rows out"
            )
    columns = {name: [row[i] for row in rows[1:]] for i, name in enumerate(header)}
    texts = columns.pop(text)
    columns = {k: v for k, v in columns.items() if k not in IGNORED}
    if not columns:
        raise InputError(f"{path}: no column of labels beside {text}")
    return Table(table_name(path), path, texts, columns, numbers)


def classes_of(labels: Sequence[str], path: Path, most: int = 20) -> tuple[list[str], np.ndarray]:
    """The distinct labels, sorted, and which of them each row has, int [N].

    Raises `InputError` for fewer than two, or more than `most`: those are numbers, not classes; and
    for two that are one number, as where 1 became 1.0 on the way through another program.
    """
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
        raise InputError(
            f"{path}: the labels {other!r} and {name!r} are one number: write it alike"
        )
    index = {name: i for i, name in enumerate(names)}
    return names, np.array([index[label] for label in labels])


def _number(label: str) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None


# -------------------------------------------------------------------------------------------------
# Which rows train, which test


@dataclasses.dataclass(frozen=True)
class Split:
    """One binary question about a table: rows and their labels, positives 1."""

    train: np.ndarray  # int [N]
    train_y: np.ndarray  # int [N]
    test: np.ndarray
    test_y: np.ndarray


def first_of_each(classes: np.ndarray, limit: int | None) -> np.ndarray:
    """The rows of the first `limit` examples, the same number of each class; None: all rows.

    Raises `InputError` for a limit that leaves no example of a class.
    """
    if limit is None or limit >= len(classes):
        return np.arange(len(classes))
    count = int(classes.max()) + 1
    each = limit // count
    if each < 1:
        raise InputError(f"a limit of {limit} examples is too small for {count} classes")
    kept = [np.flatnonzero(classes == c)[:each] for c in np.unique(classes)]
    return np.sort(np.concatenate(kept))


def repeated(table: Table, kept: np.ndarray, split: Split) -> int:
    """How many of the rows that test, of the rows `kept`, have a text that was trained on."""
    texts = table.numbered(kept)
    return int(np.isin(texts[split.test], texts[split.train]).sum())


def say_repeats(table: Table, kept: np.ndarray, classes: np.ndarray, both: int, of: int) -> None:
    """Tell on stderr what repeats among the rows `kept` of classes [len(kept)]: `both` of the rows
    that test have texts that were trained on; and how many texts have several labels."""
    if both:
        print(
            shown(
                f"{table.path}: texts occur twice: {both} of the {of} rows that test have one that "
                "was trained on, as the protocol draws them, so scores are too good"
            ),
            file=sys.stderr,
        )
    labels = np.unique(np.stack([table.numbered(kept), classes]), axis=1)[0]
    if several := int((np.bincount(labels) > 1).sum()):
        line = f"{table.path}: {several} texts occur twice or more, under different labels"
        print(shown(line), file=sys.stderr)


def sae_probes_split(classes: np.ndarray, path: Path, seed: int = 42) -> Split:
    """SAE-Probes' split of a binary table, class [N] in {0, 1}: balanced, 1,024 rows to train.

    The draws are those of its `get_train_test_indices`, so that on the same balanced table (all of
    them are) the same rows are chosen. An unbalanced table is cut to its rarer class. Raises
    `InputError` if fewer than 100 rows would test the probe.
    """
    usable = 2 * int(np.bincount(classes, minlength=2).min())
    train = min(usable - 100, 1024)
    if train < 8:
        raise InputError(
            f"{path}: {usable} balanced rows are too few: 100 to test, and some to train"
        )
    test = usable - train - 1
    draw = np.random.RandomState(seed)
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
    """The rows of each class, shuffled: those that train, and the fifth of them that tests.

    texts: which text each row has, int [N]; the rows of one are on one side, whatever their class,
    so that a little more than a fifth may test. Default: each row has its own.
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
    classes: np.ndarray,
    path: Path,
    *,
    every: bool = False,
    train: int = 4000,
    test: int = 1000,
    seed: int = 42,
    texts: np.ndarray | None = None,
) -> dict[int, Split]:
    """SAEBench's balanced questions, class c [N] against as many of all the others, evenly.

    A row trains probes or tests them, for every class alike: a fifth of each class tests, the rows
    of one of `texts` together (see `held_out`). `train` and `test` are the largest numbers of rows
    of one question. Of two classes only class 1 is asked for, unless `every`. Raises `InputError`
    if a class has too few rows.
    """
    count = int(classes.max()) + 1
    learnt, held = held_out(classes, seed, texts)
    draw = np.random.default_rng(seed)
    pools = {"test": (held, test), "train": (learnt, train)}
    questions: dict[int, Split] = {}
    for c in [1] if count == 2 and not every else range(count):
        parts: dict[str, np.ndarray] = {}
        for name, (pool, most) in pools.items():
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
