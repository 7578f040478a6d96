"""Labelled texts for benchmarks, in the layout of SAE-Probes: CSV files with a column `prompt`.

A table is read whole (a few thousand rows); which rows train a probe and which test it is drawn
here, so that every benchmark of a table sees the same split.
"""

import csv
import dataclasses
import gzip
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gemma_scope_jax.data.document_files import decompressed
from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.storage.globs import named_paths

TEXT = ("prompt", "text")  # the names that the column of texts may have
IGNORED = ("prompt_len",)  # a column of SAE-Probes' files that says nothing new
SUFFIXES = (".csv", ".csv.zst", ".csv.gz")


@dataclasses.dataclass(frozen=True)
class Table:
    """`columns` hold a string for each of `texts`."""

    name: str  # the file's, without folders and suffix
    path: Path
    texts: list[str]
    columns: dict[str, list[str]]

    def column(self, *names: str) -> list[str]:
        """The first of the columns `names` there is; else the only one. Raises `InputError`."""
        for name in names:
            if name in self.columns:
                return self.columns[name]
        if len(self.columns) == 1:
            return next(iter(self.columns.values()))
        raise InputError(
            f"{self.path}: no column {' or '.join(names)} among {', '.join(self.columns)}"
        )


def table_files(patterns: Sequence[str]) -> list[Path]:
    """The tables that files, folders and globs name. Raises `InputError` where one names none."""
    found: list[Path] = []
    for pattern in patterns:
        names = named_paths(pattern)
        if len(names) == 1 and os.path.isdir(names[0]):
            inside = sorted(name for name in os.listdir(names[0]) if name[0] != ".")
            names = [os.path.join(names[0], name) for name in inside]
        some = [Path(n) for n in names if os.path.isfile(n)]
        tables = [p for p in some if p.name.endswith(SUFFIXES)]
        if not tables:
            what = f"{some[0].name} is not one" if some else "there is none"
            raise InputError(f"{pattern}: tables are named {', '.join(SUFFIXES)}; {what}")
        found += tables
    return list(dict.fromkeys(found))


def table_name(path: Path) -> str:
    """A table's file name without its suffix."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.stem


def read_table(path: str | Path) -> Table:
    """Read a CSV file, plain or compressed, with a column `prompt` or `text` and a header.

    Bytes that are not UTF-8 become U+FFFD: some of SAE-Probes' files have them. Raises `InputError`
    naming the row for a file that is not such a table.
    """
    path = Path(path).expanduser()
    try:
        if path.suffix in (".zst", ".gz"):
            with decompressed(path) as file:
                data = file.read()
        else:
            data = path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: broken or truncated file ({reason(error)})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or reason(error)})") from error
    except InputError:
        raise
    except Exception as error:
        if "zst" not in type(error).__module__:
            raise
        raise InputError(f"{path}: broken or truncated file ({reason(error)})") from error
    csv.field_size_limit(2**31 - 1)
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig", "replace"), newline="")))
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV file ({reason(error)})") from error
    return _table(path, [row for row in rows if row])


def _table(path: Path, rows: list[list[str]]) -> Table:
    if len(rows) < 2:
        raise InputError(f"{path}: a table needs a header and rows below it")
    header = [name.strip() for name in rows[0]]
    text = next((name for name in TEXT if name in header), None)
    if text is None or len(set(header)) < len(header):
        raise InputError(
            f"{path}: the header must name a column {' or '.join(TEXT)}, and no column twice; it "
            f"is {','.join(header)[:200]}"
        )
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise InputError(f"{path}, row {number}: {len(row)} values for {len(header)} columns")
        if not row[header.index(text)].strip():
            raise InputError(f"{path}, row {number}: the {text} is empty")
    columns = {name: [row[i] for row in rows[1:]] for i, name in enumerate(header)}
    texts = columns.pop(text)
    columns = {k: v for k, v in columns.items() if k not in IGNORED}
    if not columns:
        raise InputError(f"{path}: no column of labels beside {text}")
    return Table(table_name(path), path, texts, columns)


def classes_of(labels: Sequence[str], path: Path, most: int = 20) -> tuple[list[str], np.ndarray]:
    """The distinct labels, sorted, and which of them each row has, int [N].

    Raises `InputError` for fewer than two, or more than `most`: those are numbers, not classes.
    """
    names = sorted(set(labels))
    if not 2 <= len(names) <= most:
        shown = ", ".join(names[:3])
        raise InputError(
            f"{path}: {len(names)} different labels ({shown}{', ...' if len(names) > 3 else ''}); "
            f"from 2 to {most} make classes"
        )
    index = {name: i for i, name in enumerate(names)}
    return names, np.array([index[label] for label in labels])


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


def held_out(classes: np.ndarray, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The rows of each class, shuffled: those that train, and the fifth of them that tests."""
    draw = np.random.default_rng(seed)
    count = int(classes.max()) + 1
    shuffled = [draw.permutation(np.flatnonzero(classes == c)) for c in range(count)]
    fifth = [-(-len(rows) // 5) for rows in shuffled]
    return [r[n:] for r, n in zip(shuffled, fifth)], [r[:n] for r, n in zip(shuffled, fifth)]


def one_against_rest(
    classes: np.ndarray,
    path: Path,
    *,
    every: bool = False,
    train: int = 4000,
    test: int = 1000,
    seed: int = 42,
) -> dict[int, Split]:
    """SAEBench's balanced questions, class c [N] against as many of all the others, evenly.

    A row trains probes or tests them, for every class alike: a fifth of each class tests. `train`
    and `test` are the largest numbers of rows of one question. Of two classes only class 1 is asked
    for, unless `every`. Raises `InputError` if a class has too few rows.
    """
    count = int(classes.max()) + 1
    learnt, held = held_out(classes, seed)
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
                    f"{path}: a class of {few} rows is too small: 10 for each of the others"
                )
            negative = np.concatenate([rows[:each] for rows in others])
            rows = np.concatenate([pool[c][: len(negative)], negative])
            parts[name] = draw.permutation(rows)  # the last of them are held out to choose C
        y = {name: (classes[rows] == c).astype(np.int64) for name, rows in parts.items()}
        questions[c] = Split(parts["train"], y["train"], parts["test"], y["test"])
    return questions
