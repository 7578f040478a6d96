"""The command `gemma-scope`: one file a subcommand, written over the public names of the package.

Exit codes: 0 done; 1 `check` has warnings; 2 bad input, with one line "error: ..." on stderr; 130
interrupted. Results go to stdout, progress and log messages to stderr. Only the subcommand that is
called is imported, so that --help and list answer at once.
"""

import ast
import functools
import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable
from inspect import getdoc  # cli.inspect is a module of its own
from pathlib import Path
from typing import Any

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli.shared import Refused
from gemma_scope_jax.errors import InputError, shown
from gemma_scope_jax.progress import shown_log, shown_streams

COMMANDS = (
    "inspect",
    "attribute",
    "list",
    "check",
    "train",
    "activations",
    "extract",
    "verify",
    "export",
)
COMMANDS += ("cards", "evaluate", "benchmark", "explain", "steer", "audit")
COMMANDS += ("audit_diff",)  # "audit diff"
OVERRIDES = ("train", "activations")  # also take the fields of a config as options
CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's); returns the exit code."""
    if argv is None:
        argv, sys.excepthook = sys.argv[1:], traceback_of_a_bug
    if argv and argv[0] in ("--version", "-V"):
        found = importlib.metadata.distributions(name="gemma-scope-jax")
        print("gemma-scope-jax", next((d.version for d in found), "(not installed)"))
        return 0
    try:
        with shown_streams(styled=True):  # help and mistakes are in colour, and quote arguments
            run = _parsed(argv)
        with shown_streams(), shown_log():
            code = run()
            sys.stdout.flush()
        return code or 0
    except (InputError, Refused) as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader has gone; keep the interpreter from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        gs.abandon(130, "interrupted")
        return 130


def _parsed(argv: list[str]) -> Callable[[], int | None]:
    """The command with its arguments, ready to be run."""
    words = next((n for n in (2, 1) if "_".join(argv[:n]) in COMMANDS), 0)
    if not words:
        about = "Look into Gemma 3 with its sparse coders (Gemma Scope 2)."
        known = {_said(name): _summary(name) for name in COMMANDS}
        return tyro.extras.subcommand_cli_from_dict(
            known, prog="gemma-scope", description=about, args=argv
        )
    name, rest = "_".join(argv[:words]), argv[words:]
    command = importlib.import_module(f"{__name__}.{name}").command
    # an argument's text wraps at the width of the terminal, not where the docstring's lines end
    command.__doc__ = re.sub(r"\n {8,}", " ", getdoc(command) or "")

    @functools.wraps(command)
    def later(*args, **kwargs):
        return functools.partial(command, *args, **kwargs)

    options: dict[str, Any] = {"prog": f"gemma-scope {_said(name)}", "config": CONFIG, "args": rest}
    if name not in OVERRIDES:
        return tyro.cli(later, **options)
    run, overrides = tyro.cli(later, return_unknown_args=True, **options)
    return functools.partial(run, overrides=tuple(overrides))


def _said(name: str) -> str:
    """A command as it is called: the module audit_diff is `gemma-scope audit diff`."""
    return name.replace("_", " ")


def _summary(name: str) -> Callable[[], Any]:
    """A function that has the first line of a command's help, without importing the command."""
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "command")

    def stub() -> None: ...

    stub.__doc__ = (ast.get_docstring(found) or "").splitlines()[0]
    return stub


def traceback_of_a_bug(*error: Any) -> None:
    """Print a traceback as Python does, safely: its message may quote a file."""
    with shown_streams(styled=True):
        sys.__excepthook__(*error)


def _fail(message: str) -> int:
    print(f"error: {shown(message)}", file=sys.stderr)
    gs.abandon(2, message)
    return 2
