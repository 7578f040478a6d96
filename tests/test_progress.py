"""How far long work is: a line, a bar or a call; and what silences it."""

import io
import logging
import sys

import pytest

import gemma_scope_jax as gs
from gemma_scope_jax import progress
from gemma_scope_jax.progress import Progress, Reached, tracked


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told to."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_every_few_seconds_and_at_the_end(clock, capsys):
    work = Progress(400, begun=100)
    for done in (110, 120, 250, 260, 400):
        clock[0] += 6
        work.at(done, "  L0 5")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        " 30.0 %  120 tokens  1.7 tokens/s, 3 min left  L0 5",
        " 65.0 %  260 tokens  6.7 tokens/s, 21 s left  L0 5",
        "100.0 %  400 tokens  10 tokens/s  L0 5",
    ]


def test_quick_work_with_a_name_is_one_line(clock, capsys):
    assert list(tracked([3, 4], "windows")) == [3, 4]
    assert capsys.readouterr().err == "windows ...\n"
    slow = Progress(None, "bytes", what="loading")
    clock[0] += 11
    slow(40, 80)
    clock[0] += 1
    slow(80, 80)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "loading ..." and [line[:5] for line in lines[1:]] == [" 50.0", "100.0"]


def test_a_part_counts_in_units_of_its_own(clock, capsys):
    whole = Progress(1000, every=0.0)
    report = whole.part(200, 100, "  task")
    clock[0] += 1
    report(5, 10)
    report(10, 10)  # the whole says itself when a part is done
    said = capsys.readouterr().err
    assert said.startswith(" 25.0 %  250 tokens") and "299 tokens" in said


def test_a_terminal_has_a_bar_that_leaves_one_line(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    work = Progress(10, "features", what="logits")
    for done in range(1, 11):
        clock[0] += 1
        work.at(done)
    said = stream.getvalue()
    assert said.count("━") > 50 and "logits" in said
    shown = said.replace("\r\r", "\r").rsplit("\r", 1)[-1]  # what is left on the screen
    assert shown in ("", "100.0 %  10 features  1 features/s\n")


def test_a_callback_takes_its_place(clock, capsys):
    seen = []
    gs.on_progress(seen.append)
    try:
        work = Progress(8, "parts", what="site", begun=4)
        clock[0] += 2
        work.at(6, "  note")
    finally:
        gs.on_progress(None)
    assert seen == [Reached("site", 6, 8, "parts", 1.0, "  note")]
    assert capsys.readouterr().err == ""


def test_quiet_silences_progress_and_the_log_but_errors(clock, capsys, caplog):
    log = logging.getLogger("gemma_scope_jax.some.room")
    gs.quiet()
    try:
        Progress(3, what="site").at(3)
        log.warning("a warning")
        log.error("an error")
    finally:
        gs.quiet(False)
    assert capsys.readouterr().err == "" and caplog.messages == ["an error"]
    log.warning("a warning")
    assert caplog.messages == ["an error", "a warning"]
