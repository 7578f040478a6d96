"""Docstrings as Markdown: what the package aligns in columns becomes a list.

The package's docstrings are plain text. A paragraph whose lines begin with names, as

    folder     a local folder
    sites      {site: layers} to read; default: all that is stored

or `folder: a local folder`, with further lines indented, is rendered as a list of those names;
everything else is Markdown already. Fields of a class are documented by the comments beside them,

    width: int = 4096  # features, of each layer

or by a string below them; both become a list below the class's docstring, or their types a part of
the list that is there. A constant without a docstring has the comment above it, and another name of
a class what the class says.
"""

import io
import re
import tokenize
from typing import Any

import griffe

_ENTRY = re.compile(r"(`?(?:\.{3})?[a-z_][\w.]*`?(?:, `?\w+`?)*)(: |  +)(?=\S)(.*)")
_SECTION = re.compile(r"Args:\n")
_INTRODUCED = re.compile(r"((?:\S.*\n)*\S.*:\n)((?: {4}.*(?:\n|$))+)")  # by a colon
_MARKUP = re.compile(r"(`[^`]*`)|<(\w+)>|<|(?<!\w)_(?=\w)")
_FIELD = re.compile(r"(?:\w+\.)*(?:static_)?field\((.*)\)")


def plain(text: str) -> str:
    """What is not code, without what Markdown would take for a tag or for emphasis."""

    def kept(found: re.Match) -> str:
        if found[1]:
            return found[1]
        return f"`<{found[2]}>`" if found[2] else {"<": "&lt;", "_": r"\_"}[found[0]]

    return _MARKUP.sub(kept, text)


def as_list(paragraph: str) -> str:
    """The paragraph with its run of entries, "name: text" or "name   text", as a list.

    Prose before and after them stays; a single "name: text" among prose is prose, too.
    """
    if found := _INTRODUCED.fullmatch(paragraph):
        return f"{as_list(found[1].rstrip())}\n\n{as_list(found[2])}"
    lines = _SECTION.sub("", paragraph).split("\n")
    base = min(len(line) - len(line.lstrip()) for line in lines)
    before: list[str] = []
    entries: list[list[str]] = []
    after: list[str] = []
    aligned = False
    for line in (line[base:] for line in lines):
        found = _ENTRY.match(line)
        if found and not after:
            names = ", ".join(f"`{name.strip('`')}`" for name in found[1].split(", "))
            entries.append([names, found[3]])
            aligned |= found[2] != ": "
        elif entries and not after and line[:2].isspace():
            entries[-1].append(line.strip())
        else:
            (after if entries else before).append(line)
    if not entries or (len(entries) == 1 and (before or after) and not aligned):
        return paragraph if base >= 4 else plain(paragraph)
    made = "\n".join(f"- {names}: {plain(' '.join(text))}" for names, *text in entries)
    prose = (plain("\n".join(part)) for part in (before, after))
    return "\n\n".join(part for part in (next(prose), made, next(prose)) if part)


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
                if last in found and token.string.startswith("#   "):
                    found[last] += f" {text}"
            else:
                last = line
                if not text.startswith(("type:", "noqa")):
                    found[line] = text
        elif token.type not in (tokenize.NL, tokenize.NEWLINE):
            last = 0
    return found


def default(value: str) -> str:
    """The default of a field, " = VALUE", from its value in the source."""
    if not (made := _FIELD.fullmatch(value)):
        return f" = {value}"
    given = re.search(r"default(?:_factory)?=(.+?)(?:, \w+=|$)", made[1])
    return f" = {'{}' if given[1] == 'dict' else given[1]}" if given else ""


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
        lines = cls.docstring.value.split("\n")
        places = {f.name: re.compile(rf"(- (?:`[^`]+`, )*)`{f.name}`") for f in fields}
        at = next((n for n, li in enumerate(lines) for p in places.values() if p.match(li)), None)
        if at is not None and lines[at - 2].endswith(":"):  # a list of something else
            at, places = None, dict.fromkeys(places, re.compile("(?!)"))
        if at is None and fields:
            lines += ["", "Fields:", ""] if lines[-1].startswith("- ") else [""]
            at = len(lines)
        for field in fields:
            numbers = range(field.lineno or 0, (field.endlineno or 0) + 1)
            about = " ".join(said.get(n + 1 - (cls.lineno or 0), "") for n in numbers).strip()
            if field.docstring:
                about, field.docstring = " ".join(field.docstring.value.split()), None
            value = default(str(field.value)) if "class-attribute" in field.labels else ""
            typed = f"`{field.name}: {field.annotation}{value}`"
            listed = next((n for n, li in enumerate(lines) if places[field.name].match(li)), None)
            if listed is None:
                lines.insert(at, f"- {typed}" + (f": {plain(about)}" if about else ""))
            else:
                at, head = listed, places[field.name].match(lines[listed])
                lines[at] = f"{head[1]}{typed}{lines[at][head.end() :]}"
            at += 1
        cls.docstring.value = "\n".join(lines)

    def on_module_members(self, *, mod: griffe.Module, **_: Any) -> None:
        own = {name: m for name, m in mod.members.items() if not m.is_alias}
        for constant in own.values():
            if not constant.is_attribute:
                continue
            if re.search(r"\b_[a-z]", str(constant.value)):  # made by what is not public
                constant.value = None
            if constant.docstring:
                continue
            same = own.get(str(constant.value))
            above = []
            for line in reversed(mod.lines[: (constant.lineno or 1) - 1]):
                if not line.startswith("# ") or line.startswith("# -"):
                    break
                above.insert(0, line[2:])
            if same is not None and same.docstring:
                constant.docstring = griffe.Docstring(same.docstring.value, parent=constant)
            elif above:
                constant.docstring = griffe.Docstring(plain("\n".join(above)), parent=constant)
