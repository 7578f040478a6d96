"""What a command shows: how far long work is, and streams on which no text acts as a control code.

`Progress` is the only way to report progress. It draws a bar in a terminal, writes a line every few
seconds elsewhere, or calls a function given to `on_progress`; `quiet` silences it. Everything else
that the library reports goes to `logging`, with one logger per module.

Names, keys, tokens, labels and explanations come from files, servers and models. Printed text goes
through `shown_streams`, and text drawn by rich through `console`: control characters in a text
appear as escapes, and those that rich itself sends to a terminal pass.
"""

import contextlib
import dataclasses
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from gemma_scope_jax.errors import shown

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")
Report = Callable[[int, int], None]  # called with the work done and the total
_STYLE = re.compile(r"(\x1b\[[0-9;]*m)")
_MOVES = re.compile(r"(?:[\r\n]|\x1b\[A)*")  # how tqdm moves from bar to bar
_REDRAWN = 0.1  # least seconds between two drawings of a bar


@dataclasses.dataclass(frozen=True)
class Reached:
    """How far some work is: `done` of `total` `unit`s of `what`, with a `note`."""

    what: str
    done: int
    total: int | None  # None: unknown
    unit: str
    per_second: float
    note: str


@dataclasses.dataclass
class _Face:
    """Where progress goes, and the width of the bar in the terminal now."""

    silent: bool = False
    callback: Callable[[Reached], None] | None = None
    drawn: int = 0
    spinning: bool = False  # a spinner is shown, and no bar beside it


_face = _Face()


def quiet(silent: bool = True) -> None:
    """Silence progress and all log messages of this package except errors; `quiet(False)` undoes
    it.

    For finer control, set the level of `logging.getLogger("gemma_scope_jax")` or of a module's
    logger; progress is not affected by it.
    """
    _face.silent = silent
    logging.getLogger("gemma_scope_jax").setLevel(logging.ERROR if silent else logging.NOTSET)


def on_progress(callback: Callable[[Reached], None] | None) -> None:
    """Call `callback` with a `Reached` instead of writing to stderr; None: write again."""
    _face.callback = callback


class Progress:
    """Progress over `total` items, `begun` of them done earlier; call `at(done)`.

    what   names the work, on a line of its own in files and pipes
    total  None if unknown: then neither the share nor the time left is shown
    every  seconds between lines; the last one is always written

    It is also a function of (done, total), for functions that take a `Report`.
    """

    def __init__(
        self, total: int | None, unit: str = "tokens", *, what: str = "", begun: int = 0, every=10.0
    ):
        self.total = None if total is None else max(total, 1)
        self.unit, self.what, self._begun, self._every = unit, what, begun, every
        self._start = self._said = self._redrawn = time.monotonic()
        self._quick = bool(what)  # if done before the first line is due, no other is written
        if what and not _face.silent and _face.callback is None and not _on_terminal():
            _write_line(f"{what} ...")

    def __call__(self, done: int, total: int) -> None:
        self.total = max(total, 1)
        self.at(done)

    def part(self, begun: int, work: int, note: str = "") -> Report:
        """A function of (done, total) for a part of `work` items after `begun`; it may count in
        other units."""
        return lambda done, total: self.at(
            begun + int(work * min(done / max(total, 1), 0.99)), note
        )

    def at(self, done: int, note: str = "") -> None:
        """`done` items are done, including those before the start."""
        if _face.silent:
            return
        now = time.monotonic()
        rate = (done - self._begun) / max(now - self._start, 1e-9)
        if _face.callback is not None:
            _face.callback(Reached(self.what, done, self.total, self.unit, rate, note))
            return
        last = self.total is not None and done >= self.total
        if _on_terminal() and not last:
            if now - self._redrawn >= _REDRAWN and not _face.spinning:
                self._redrawn = now
                self._draw(done, self._line(done, rate, note))
        elif last or now - self._said >= self._every:
            erase_bar()
            quick = self._quick and now - self._said < self._every
            self._said = now
            if not quick:
                self._quick = False
                _write_line(self._line(done, rate, note))

    def _line(self, done: int, rate: float, note: str) -> str:
        rated = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        share = after = ""
        if self.total is not None:
            share = f"{min(100 * done / self.total, 100):5.1f} %  "
            left = (self.total - done) / max(rate, 1e-9) / 60
            after = f", {left:,.0f} min left" if left >= 1.5 else f", {60 * left:.0f} s left"
            after = after if done < self.total else ""
        return f"{share}{done:,} {self.unit}  {rated} {self.unit}/s{after}{note}"

    def _draw(self, done: int, line: str) -> None:
        """Draw the bar over the previous one."""
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        screen = console(stderr=True)
        erase_bar()
        width = max(8, min(40, screen.width // 3))
        bar = ProgressBar(total=self.total, completed=done, width=width)
        text = Text(f" {self.what}{'  ' * bool(self.what)}{line.strip()}")
        text.truncate(max(0, screen.width - width - 1), overflow="ellipsis")
        screen.print(bar, end="")
        screen.print(text, end="")
        screen.file.flush()
        _face.drawn = width + text.cell_len


def tracked(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """The items one by one, with progress; give `total` only if they have no length."""
    progress = Progress(len(items) if isinstance(items, Sized) else total, "parts", what=what)
    for done, item in enumerate(items, 1):
        yield item
        progress.at(done)


@contextlib.contextmanager
def stage(message: str) -> Iterator[None]:
    """Show on stderr what happens while its progress is unknown: by a spinner, or by a line where
    there is no terminal."""
    if _face.silent or not _on_terminal():
        if not _face.silent:
            _write_line(f"{message} ...")
        yield
        return
    from rich.markup import escape

    # text printed meanwhile goes through rich, which keeps it clear of the spinner
    _face.spinning = True
    try:
        with console(stderr=True).status(escape(message)), shown_streams():
            yield
    finally:
        _face.spinning = False


def _write_line(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _on_terminal() -> bool:
    return sys.stderr.isatty()


def erase_bar() -> None:
    """Remove the bar before anything else is written to the terminal."""
    if _face.drawn:
        stream, _face.drawn, width = _plain(sys.stderr), 0, _face.drawn
        stream.write(f"\r{' ' * width}\r")
        stream.flush()


class EscapedStream:
    r"""A text stream on which control characters except line breaks and tabs appear as ``\x1b``.

    So do characters that the stream's encoding lacks. In a terminal, progress bars of other
    packages may return to the start of the line; with `styled`, colours pass too.
    """

    def __init__(self, stream: TextIO, styled: bool = False):
        self.stream, self.styled = stream, styled and stream.isatty()

    def write(self, text: str) -> int:
        erase_bar()
        safe = self._safe(text)
        try:
            self.stream.write(safe)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            self.stream.write(safe.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def _safe(self, text: str) -> str:
        if text.isprintable() or text == "\n":
            return text
        back = ""
        if text[0] in "\r\x1b\n" and self.stream.isatty():
            if _MOVES.fullmatch(text):
                return text
            back = "\r" * (text[0] == "\r")
        parts = _STYLE.split(text[len(back) :]) if self.styled else [text[len(back) :]]
        parts[::2] = [shown(part, keep="\n\t") for part in parts[::2]]
        return back + "".join(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def shown_streams(styled: bool = False) -> Iterator[None]:
    """Everything printed meanwhile, on stdout and stderr, goes through `EscapedStream`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (EscapedStream(stream, styled) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _ToStderr(logging.Handler):
    """Log messages as lines on the current stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        known = {logging.WARNING: "warning: ", logging.ERROR: "error: "}
        _write_line(shown(known.get(record.levelno, "") + record.getMessage()))


@contextlib.contextmanager
def shown_log() -> Iterator[None]:
    """The library's log messages, from INFO on, are written to stderr meanwhile."""
    logger, handler = logging.getLogger("gemma_scope_jax"), _ToStderr()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(before[0] or logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def byte_size(count: int) -> str:
    """Bytes in decimal units, as disks and the hub count: 336.1 MB."""
    from rich.filesize import decimal

    return decimal(count)


def console(*, stderr: bool = False, width: int | None = None) -> "Console":
    """A rich `Console` that escapes control codes in text. `width` None: the terminal's."""
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        def render(self, renderable, options=None):
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else shown(text, keep="\n"), style, control)

    stream = _plain(sys.stderr if stderr else sys.stdout)
    return SafeConsole(file=stream, width=width, highlight=False, emoji=False)


def _plain(stream: Any) -> TextIO:
    """The stream inside an `EscapedStream`."""
    while isinstance(stream, EscapedStream):
        stream = stream.stream
    return stream
