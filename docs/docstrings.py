"""Docstrings as Markdown: what the package aligns in columns becomes a list.

The package's docstrings are plain text. A paragraph whose lines begin with names, as

    folder     a local folder
    sites      {site: layers} to read; default: all that is stored

or `folder: a local folder`, with further lines indented, is rendered as a list of those names;
everything else is Markdown already.
"""

import re
from typing import Any

import griffe

_ENTRY = re.compile(r"(`?[a-z_][\w.]*`?(?:, `?\w+`?)*)(?:: |  +)(?=\S)(.*)")
_SECTION = re.compile(r"Args:\n")


def as_list(paragraph: str) -> str:
    """The paragraph, as a list if all of it is entries "name: text" or "name   text"."""
    lines = _SECTION.sub("", paragraph).split("\n")
    base = min(len(line) - len(line.lstrip()) for line in lines)
    entries: list[list[str]] = []
    for line in (line[base:] for line in lines):
        if found := _ENTRY.match(line):
            names = ", ".join(f"`{name.strip('`')}`" for name in found[1].split(", "))
            entries.append([names, found[2]])
        elif entries and line[:2].isspace():
            entries[-1].append(line.strip())
        else:
            return paragraph
    return "\n".join(f"- {names}: {' '.join(text)}" for names, *text in entries)


def as_markdown(docstring: str) -> str:
    """A docstring with its aligned paragraphs as lists; indented examples stay code."""
    return "\n\n".join(as_list(p) for p in docstring.split("\n\n"))


class Columns(griffe.Extension):
    """Rewrites every docstring that mkdocstrings is going to show."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
