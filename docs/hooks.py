"""What the site takes from the code when it is built: the public list, and the commands' help.

`api.md` gets an entry for every public name, by room; `commands.md` what each command's `--help`
prints. Links that lead out of docs/ work in the repository; the site shows their text only. Short
code is not broken at its hyphens.
"""

import dataclasses
import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from typing import Any

WIDTH = 96  # characters of a block
TITLES = {"autointerp": "Explanations", "storage": "Files"}  # where a room's name says too little
CALLED = "    options:\n      merge_init_into_class: true\n"


def public() -> str:
    """A section a room, an entry a public name; a class that is called shows how."""
    import gemma_scope_jax as gs

    rooms: dict[str, list[str]] = {}
    for module, names in gs._PUBLIC.items():
        entries = [
            f"::: gemma_scope_jax.{module}.{name}\n" + CALLED * called(getattr(gs, name))
            for name in names
        ]
        rooms.setdefault(module.partition(".")[0], []).extend(entries)
    return "\n".join(
        f"## {TITLES.get(r, r.capitalize())}\n\n" + "\n".join(e) for r, e in rooms.items()
    )


def called(value: Any) -> bool:
    """Whether it is a class with a constructor of its own; the fields of the others are listed."""
    return (
        isinstance(value, type)
        and "__init__" in vars(value)
        and not dataclasses.is_dataclass(value)
    )


def printed(command: str) -> str:
    """What `gemma-scope COMMAND --help` prints; `command` is the command's module."""
    name = command.replace("_", " ")
    words = [sys.executable, "-m", "gemma_scope_jax", *name.split(), "--help"]
    settings = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": str(WIDTH), "NO_COLOR": "1"}
    done = subprocess.run(words, env=settings, capture_output=True, text=True, check=True)
    lines = "\n".join(map(wrapped, done.stdout.rstrip().splitlines()))
    return f"## {name}\n\n```text\n{lines}\n```\n"


def wrapped(line: str) -> str:
    """A line of prose cut to the width of a block; boxes stay as they are."""
    return line if line[:1] in ("", "│", "╭", "╰") else textwrap.fill(line, WIDTH)


def commands() -> str:
    """Every command with its help."""
    from gemma_scope_jax.cli import COMMANDS

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return "\n".join(pool.map(printed, COMMANDS))


def inside(markdown: str, page: str) -> str:
    """The text of a page, at `page` in docs/, with links that lead out of docs/ as their text."""

    def kept(link: re.Match) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(page), link[2]))
        return link[1] if target.startswith("..") else link[0]

    return re.sub(r"\[([^\]]+)\]\(([^)#:]+)\)", kept, markdown)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    for mark, text in (("<!-- public -->", public), ("<!-- commands -->", commands)):
        if mark in markdown:
            markdown = markdown.replace(mark, text())
    return inside(markdown, page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:
    return re.sub(r"<code>(?=[^<]{1,32}</code>)", '<code class="short">', html)
