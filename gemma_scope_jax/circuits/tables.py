"""Tables as text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 2) -> str:
    """Columns of text, the first `left` set to the left and the others, numbers, to the right."""
    table = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    set_ = lambda i, cell: cell.ljust(widths[i]) if i < left else cell.rjust(widths[i])
    lines = ("  ".join(set_(i, cell) for i, cell in enumerate(row)) for row in table)
    return "\n".join(line.rstrip() for line in lines)


def text_tables(tables: Mapping[str, Sequence[Sequence[Any]]], *, left: int = 1) -> str:
    """Tables with headings, as `.tables()` of results gives them: the first row is the head."""
    parts = []
    for heading, (head, *rows) in tables.items():
        cells = [[str(cell) for cell in row] for row in rows]
        parts.append(f"{heading}\n{text_table([str(c) for c in head], cells, left=left)}")
    return "\n\n".join(parts)
