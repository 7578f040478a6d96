"""Docstrings as Markdown: what the package aligns in columns becomes a list.

The package's docstrings are plain text. A paragraph whose lines begin with names, as

    folder     a local folder
    sites      {site: layers} to read; default: all that is stored

or `folder: a local folder`, with further lines indented, is rendered as a list of those names;
everything else is Markdown already. Fields of a class are documented by the comments beside them,

    width: int = 4096  # features, of each layer

or by a string below them; both become a list below the class's docstring.
"""

import io
import re
import tokenize
from typing import Any

import griffe

_ENTRY = re.compile(r"(`?[a-z_][\w.]*`?(?:, `?\w+`?)*)(?:: |  +)(?=\S)(.*)")
_SECTION = re.compile(r"Args:\n")


def as_list(paragraph: str) -> str:
    """The paragraph with its run of entries, "name: text" or "name   text", as a list.

    Prose before and after them stays; a single entry among prose is prose, too.
    """
    lines = _SECTION.sub("", paragraph).split("\n")
    base = min(len(line) - len(line.lstrip()) for line in lines)
    before: list[str] = []
    entries: list[list[str]] = []
    after: list[str] = []
    for line in (line[base:] for line in lines):
        found = _ENTRY.match(line)
        if found and not after:
            names = ", ".join(f"`{name.strip('`')}`" for name in found[1].split(", "))
            entries.append([names, found[2]])
        elif entries and not after and line[:2].isspace():
            entries[-1].append(line.strip())
        else:
            (after if entries else before).append(line)
    if not entries or (len(entries) == 1 and (before or after)):
        return paragraph
    made = "\n".join(f"- {names}: {' '.join(text)}" for names, *text in entries)
    return "\n\n".join(part for part in ("\n".join(before), made, "\n".join(after)) if part)


def as_markdown(docstring: str) -> str:
    """A docstring with its aligned paragraphs as lists; indented examples stay code."""
    return "\n\n".join(as_list(p) for p in docstring.split("\n\n"))


def comments(lines: list[str]) -> dict[int, str]:
    """The comment that each line of code has, with the lines of comment that continue it."""
    found: dict[int, str] = {}
    last = 0  # the line of code whose comment goes on
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline):
        if token.type == tokenize.COMMENT:
            line, text = token.start[0], token.string.lstrip("#").strip()
            if token.line.lstrip().startswith("#"):
                if last and token.string.startswith("#   "):
                    found[last] += f" {text}"
            else:
                found[line], last = text, line
        elif token.type not in (tokenize.NL, tokenize.NEWLINE):
            last = 0
    return {line: re.sub(r"(?<!`)<(\w+)>", r"`<\1>`", text) for line, text in found.items()}


class Columns(griffe.Extension):
    """Rewrites every docstring that mkdocstrings is going to show."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring and not obj.is_class:  # of classes below, when their fields are known
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if not cls.docstring:
            return
        cls.docstring.value = as_markdown(cls.docstring.value)
        fields = [
            m
            for m in cls.attributes.values()
            if m.annotation and m.name[0] != "_" and "property" not in m.labels
        ]
        said = comments(cls.lines) if fields else {}
        entries = []
        for field in fields:
            lines = range(field.lineno or 0, (field.endlineno or 0) + 1)
            at = [line + 1 - (cls.lineno or 0) for line in lines]
            text = " ".join(said[n] for n in at if n in said)
            if field.docstring:
                text, field.docstring = " ".join(field.docstring.value.split()), None
            value = f" = {field.value}" if field.value is not None else ""
            entry = f"- `{field.name}: {field.annotation}{value}`"
            entries.append(entry + (f": {text}" if text else ""))
        if entries:
            cls.docstring.value += "\n\n" + "\n".join(entries)
