"""What leaves for a terminal or a log: text in it is shown, never obeyed."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import json
import re
import sys
import typing
import warnings
from pathlib import Path

import pytest

from gemma_scope_jax import cli
from gemma_scope_jax.cli import shared
from gemma_scope_jax.data.documents import TextData
from gemma_scope_jax.errors import in_markdown
from gemma_scope_jax.evaluation.report import core_tables
from gemma_scope_jax.inspection.inspect_text import Inspection
from gemma_scope_jax.inspection.terminal import inspection_tables
from gemma_scope_jax.probing.report import markdown
from gemma_scope_jax.progress import Progress, console, shown_streams
from gemma_scope_jax.training.card import _text as card_text
from gemma_scope_jax.training.recipe import CoderConfig, TrainConfig
from gemma_scope_jax.web.pages import inert_json

EVIL = "a\x1b]0;title\x07\x1b[2J\r\x9b31mb\x7f\u202ec\u2028d"
SENT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028]")  # line breaks and tabs may be


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and keeps what it is sent."""

    encoding = "utf-8"

    def isatty(self):
        return True


def a_terminal(monkeypatch):
    """From here on stdout and stderr are a terminal; a function that says what it has been sent."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return stream.getvalue


def without_style(text):
    """What rich itself sends: colours, and where a spinner or a bar is drawn, and taken away."""
    return re.sub(r"\x1b\[(?:[0-9;]*m|\?25[lh]|2K|1A)|\r(?=\x1b\[)|\r *\r", "", text)


def test_what_is_printed_is_shown(monkeypatch):
    terminal = a_terminal(monkeypatch)
    with shown_streams():
        print(EVIL, "kept\tnaïve 漢字", file=sys.stderr)
        sys.stdout.writelines([EVIL, "\n"])
        sys.stderr.write(warnings.formatwarning(UserWarning(EVIL), UserWarning, "x.py", 1))
        Progress(1).at(1, EVIL)
    said = terminal()
    assert not SENT.search(said) and said.count(r"\x1b]0;title\x07") == 4
    assert r"\x9b31mb\x7f\u202ec\u2028d" in said and "kept\tnaïve 漢字\n" in said
    sys.stdout.write("\x1b[1m")
    assert terminal() == said + "\x1b[1m"  # only while the command runs


def test_bars_of_other_packages_may_go_back_to_the_start_of_their_line(monkeypatch):
    terminal = a_terminal(monkeypatch)
    with shown_streams():
        for text in ("\r 50 %", "\n\x1b[A", "\r 99 %\r", "x\x1b[A"):
            sys.stderr.write(text)
    assert terminal() == "\r 50 %\n\x1b[A\r 99 %" + r"\r" + r"x\x1b[A"


def test_a_pipe_gets_neither_colours_nor_characters_that_it_lacks(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    with shown_streams(styled=True):
        print("\x1b[31mred\x1b[0m é \udce9 漢", "\r", flush=True)
    assert narrow.buffer.getvalue() == rb"\x1b[31mred\x1b[0m \xe9 \udce9 \u6f22 \r" + b"\n"


def test_what_rich_draws_is_shown_and_rich_is_let_be(monkeypatch):
    terminal = a_terminal(monkeypatch)
    from rich.table import Table
    from rich.text import Text

    with shown_streams():
        table = Table(EVIL)
        table.add_row(Text(EVIL, "bold"))
        console(width=200).print(table, EVIL)
        with shared.stage(EVIL), contextlib.suppress(KeyError):
            print(EVIL)
        progress = Progress(9, what=EVIL)
        monkeypatch.setattr("gemma_scope_jax.progress._REDRAWN", 0.0)
        progress.at(1, EVIL)
        print(EVIL, file=sys.stderr)
    said = terminal()
    assert "\x1b[1m" in said and not SENT.search(without_style(said))
    assert said.count(r"\x1b]0;title") >= 6


def test_an_inspection_and_a_report_are_shown(monkeypatch):
    terminal = a_terminal(monkeypatch)
    label = {"top_logits": [EVIL], "examples": [], "explanation": EVIL}
    seen = Inspection(
        model=EVIL,
        coder=EVIL,
        kind="sae",
        layer=0,
        reads="z",
        writes="z",
        width=2,
        first=0,
        ids=[5],
        tokens=[EVIL],
        next=[],
        features=[[(1, 1.0)]],
        strongest=[1],
        heat=[[0.0]],
        labels={1: label},
        figures={k: None for k in ("l0", "fvu", "loss", "delta_loss")} | {"typical": {"fvu": None}},
    )
    groups = {"source": [{"name": f"[/]{EVIL[:14]}", "tokens": 3}]}
    result = {
        "eval_type_id": "core", "sae_lens_id": f"[bold]{EVIL}:apple:",
        "eval_result_metrics": {"token_stats": {"total_tokens_eval_reconstruction": 0}},
        "eval_result_unstructured": {"groups": groups},
    }  # fmt: skip
    with shown_streams():
        for part in inspection_tables(seen, 80):
            shared.screen().print(part)
        for results in ([result], [result, result]):
            for part in core_tables(results, 300):
                shared.print_whole(part)
    said = without_style(terminal())
    assert not SENT.search(said) and said.count(r"\x1b]0;title") >= 5
    assert said.count("[bold]a") == 3 and "[/]a" in said and ":apple:" in said


def test_json_keeps_its_texts_and_shows_no_control_character(monkeypatch):
    terminal = a_terminal(monkeypatch)
    value = {EVIL: ["naïve 漢字 \U000e0067", EVIL, "half \udce9"]}
    with shown_streams():
        shared.print_json(value)
    said = terminal()
    assert not SENT.search(said) and "naïve 漢字" in said
    read = json.loads(said)
    assert read == {EVIL: ["naïve 漢字 \U000e0067", EVIL, "half \ufffd"]}


def test_pages_hold_their_data_and_nothing_of_it_is_obeyed():
    text = inert_json({"</script>\u2028": "<!-- & \udce9"})
    assert not set("<>&\u2028") & set(text) and text.encode()
    assert json.loads(text) == {"</script>\u2028": "<!-- & \ufffd"}


def test_names_in_markdown_are_no_markup():
    name = "[run](x) `1` |2| <img onerror=x> **a_b** c&d"
    wanted = r"\[run\](x) \`1\` \|2\| &lt;img onerror=x> \*\*a_b\*\* c&amp;d"
    assert in_markdown(name) == wanted and in_markdown("layer_1_width_16k") == "layer_1_width_16k"
    table = markdown([{"coder": name + EVIL, "auc": 0.5}])
    assert wanted in table and not SENT.search(table) and len(table.splitlines()) == 3
    data = TextData(files=(f"{name}.txt",))
    config = TrainConfig((CoderConfig(0, name="a|b"),), data=data)
    card = card_text("a|b", config, [], 9, (2, 1), None, False)
    assert card.startswith("# a\\|b\n") and f"9 tokens of {wanted}.txt, read 2 times" in card


def test_mistakes_on_the_command_line_quote_it_safely(monkeypatch):
    terminal = a_terminal(monkeypatch)
    for argv in (["inspect", "x", f"--{EVIL}"], [EVIL], ["inspect", "x", "--top-k", EVIL]):
        with pytest.raises(SystemExit):
            cli.main(argv)
    for argv in (["check", "c", "--text", f"/none/{EVIL}"], ["train", EVIL, "--out", "o"]):
        assert cli.main(argv) == 2
    said = terminal()
    assert "\x1b[31m" in said and not SENT.search(re.sub(r"\x1b\[[0-9;]*m", "", said))
    assert said.count(r"\x1b]0;title") >= 4


def test_a_bug_quotes_files_safely(monkeypatch):
    terminal = a_terminal(monkeypatch)
    try:
        raise RuntimeError(EVIL)
    except RuntimeError as error:
        cli.traceback_of_a_bug(type(error), error, error.__traceback__)
    said = re.sub(r"\x1b\[[0-9;]*m", "", terminal())
    assert r"RuntimeError: a\x1b]0;title" in said and not SENT.search(said)


# -------------------------------------------------------------------------------------------------
# Paths on the command line


PLACES = ("coder", "config", "file", "folder", "glob", "store", "table")
NAMES = ("model", "coder", "judge_model", "base", "other")


def module(name):
    return importlib.import_module(f"gemma_scope_jax.cli.{name}")


def places(command):
    """The options of a command that name places, and whether they take several; those of a
    dataclass among its parameters as PARAMETER.FIELD, called OPTION."""
    hints = typing.get_type_hints(command, include_extras=True)
    for name in inspect.signature(command).parameters if callable(command) else hints:
        parts = typing.get_args(hints[name])
        known = [getattr(part, "metavar", None) or "" for part in parts]
        called = [n for p in parts if isinstance(n := getattr(p, "name", None), str)] + [name]
        if dataclasses.is_dataclass(hints[name]):
            for inner, several in places(hints[name]):
                yield f"{name}.{inner}", several
        elif any(m.strip(".").lower() in PLACES for m in known if m.isupper()) or name in NAMES:
            yield (called[0] if called[0] == name else f"{name} {called[0]}"), "..." in str(known)


def given_as(place):
    """`data.files text` is given as --text."""
    return place.split(".")[-1].split()[-1].replace("_", "-")


@pytest.mark.parametrize("name", [n for n in cli.COMMANDS if n != "list"])
def test_a_tilde_is_the_home_folder_in_every_path(name, monkeypatch):
    """As --option=~/x, which no shell expands; addresses in buckets stay as they are."""
    command, seen = module(name).command, {}

    @functools.wraps(command)
    def record(**given):
        seen.update(given)

    monkeypatch.setattr(module(name), "command", record)
    monkeypatch.setenv("HOME", "/home/me")
    signature = inspect.signature(command).parameters
    positional = [p.name for p in signature.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    found = dict(places(command))
    assert len(found) >= 2 - (name == "verify")
    for text, wanted in (("~/x[1].y", "/home/me/x[1].y"), ("gs://b/~/x", "gs://b/~/x")):
        argv = [text for p in positional if p in found]
        for option in found.keys() - set(positional):
            argv.append(f"--{given_as(option)}={text}")
        assert cli.main([name, *argv]) == 0
        for option, several in found.items():
            outer, _, inner = option.split()[0].partition(".")
            value = getattr(seen[outer], inner) if inner else seen[outer]
            value = value[0] if several else value
            assert value == (Path(wanted) if isinstance(value, Path) else wanted), option


def test_all_paths_of_the_commands_are_known_to_this_test():
    commands = {name: module(name).command for name in cli.COMMANDS}
    found = {(name, given_as(option)) for name, c in commands.items() for option, _ in places(c)}
    wanted = [("inspect", "html"), ("inspect", "file"), ("check", "text"), ("train", "config"),
              ("extract", "text"), ("verify", "store"), ("export", "out"), ("cards", "compare"),
              ("explain", "answers"), ("benchmark", "tpp"), ("evaluate", "coders"),
              ("activations", "out"), ("extract", "model")]  # fmt: skip
    assert set(wanted) <= found and len(found) >= 36


def test_a_text_that_begins_with_a_tilde_is_a_text(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    seen = {}

    @functools.wraps(module("inspect").command)
    def record(text="", **_):
        seen["text"] = text

    monkeypatch.setattr(module("inspect"), "command", record)
    assert cli.main(["inspect", "~/x"]) == 0 and seen["text"] == "~/x"


@pytest.mark.parametrize("data", [b"\xef\xbb\xbfone\r\ntwo\n", b"one\ntwo"])
def test_text_from_a_file_and_from_a_pipe_is_the_same(tmp_path, monkeypatch, data):
    (tmp_path / "a.txt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert shared.given_text("", tmp_path / "a.txt") == shared.given_text("-", None) == "one\ntwo"
