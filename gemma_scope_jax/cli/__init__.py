"""The command `gemma-scope`: one plain typed function a subcommand.

Exit codes: 0 done; 1 `check` has warnings; 2 bad input, with one line "error: ..." on stderr; 130
interrupted. Results go to stdout, progress to stderr. Nothing heavy is imported before a command
runs, so that --help and list answer at once.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import tyro

from gemma_scope_jax.cli.benchmark import benchmark
from gemma_scope_jax.cli.cards import cards
from gemma_scope_jax.cli.evaluate import evaluate
from gemma_scope_jax.cli.explain import explain
from gemma_scope_jax.cli.extract import export, extract, verify
from gemma_scope_jax.cli.look import check, inspect, list_
from gemma_scope_jax.cli.train import activations, train
from gemma_scope_jax.errors import InputError, shown
from gemma_scope_jax.model.processes import abandon
from gemma_scope_jax.progress import shown_streams

COMMANDS = {
    "inspect": inspect,
    "list": list_,
    "check": check,
    "train": train,
    "activations": activations,
    "extract": extract,
    "verify": verify,
    "export": export,
    "cards": cards,
    "evaluate": evaluate,
    "benchmark": benchmark,
    "explain": explain,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's); returns the exit code."""
    if argv is None:
        argv, sys.excepthook = sys.argv[1:], traceback_of_a_bug
    if argv and argv[0] in ("--version", "-V"):
        print(f"gemma-scope-jax {_version()}")
        return 0
    try:
        with shown_streams(styled=True):  # help and mistakes are in colour, and quote arguments
            run = tyro.extras.subcommand_cli_from_dict(
                {name: _later(command) for name, command in COMMANDS.items()},
                prog="gemma-scope",
                config=(tyro.conf.FlagCreatePairsOff,),
                description="Gemma 3 and its sparse coders (Gemma Scope 2), looked into.",
                args=argv,
            )
        with shown_streams():
            code = run()
            sys.stdout.flush()
        return code or 0
    except InputError as error:
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
        abandon(130, "interrupted")
        return 130


def _later(command: Callable[..., Any]) -> Callable[..., Callable[[], int | None]]:
    """The command with its arguments, to be run once they are all understood."""

    @functools.wraps(command)
    def understood(*args, **kwargs):
        return functools.partial(command, *args, **kwargs)

    return understood


def traceback_of_a_bug(*error: Any) -> None:
    """Print it as Python does; its message may quote a file."""
    with shown_streams(styled=True):
        sys.__excepthook__(*error)


def _fail(message: str) -> int:
    print(f"error: {shown(message)}", file=sys.stderr)
    abandon(2, message)
    return 2


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("gemma-scope-jax")
    except PackageNotFoundError:
        return "(not installed)"
