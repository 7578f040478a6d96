"""The benchmarks' JSON lines as Markdown tables, and a page brought up to date with them.

    .venv/bin/python benchmarks/table.py benchmarks/results/forward_cpu.jsonl
    .venv/bin/python benchmarks/table.py --write docs/benchmarks.md

A script prints one JSON line for each comparison; append it to a file in benchmarks/results/, one
for each machine and kind. In a page a table stands between `<!-- table: FILE -->` and
`<!-- end -->`.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)
HEADINGS = {"floor_share": "share of the floor", "of_forward": "share of the bare forward"}


def cell(value: Any) -> str:
    """A value of a JSON line as a cell."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if not isinstance(value, int | float):
        return "" if value is None else str(value)
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 10 else f"{value:.2f}"


def figure(v: Mapping[str, Any] | None, form: str = ".2f") -> str:
    """An estimate with its interval, as JSON data, as a cell: "0.68 [0.53, 0.81]"."""
    if v is None or v["value"] is None:
        return ""
    value, low, high = ("" if v[k] is None else f"{v[k]:{form}}" for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; a column for every key, in the order of their first appearance."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [not isinstance(next(r[k] for r in rows if k in r), str) for k in keys]
    lines = [" | ".join(HEADINGS.get(key, key.replace("_", " ")) for key in keys)]
    lines += [" | ".join("---:" if right else "---" for right in numeric)]
    lines += [" | ".join(cell(row.get(key)) for key in keys) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def read(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; whatever else a script printed is passed over."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def renewed(page: str) -> str:
    """A page with its tables made anew."""
    return MARKED.sub(lambda m: f"{m[1]}{table(read(ROOT / m[2]))}{m[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE.jsonl")
    parser.add_argument("--write", type=Path, metavar="PAGE.md")
    args = parser.parse_args()
    for file in args.files:
        print(table(read(file)))
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        args.write.write_text(renewed(text), encoding="utf-8")


if __name__ == "__main__":
    main()
