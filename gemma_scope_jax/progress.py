"""What a command shows: how far long work is, and streams on which no text is ever obeyed.

Names, keys, tokens, labels and explanations come from files, servers and models. What is printed
goes through `shown_streams`, what rich draws through `console`: control characters of a text appear
as escapes, and those that rich itself sends to a terminal pass.
"""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from gemma_scope_jax.errors import shown

ReportProgress = Callable[[str, int, int], None]  # what is done, how much of it, of how much
_STYLE = re.compile(r"(\x1b\[[0-9;]*m)")
_MOVES = re.compile(r"(?:[\r\n]|\x1b\[A)*")  # how tqdm goes from bar to bar


class Progress:
    """Of work of `total` things, of which `begun` were done before: tell it where it is by `at`.

    With `every` seconds between lines; the last one is always printed. Of a `total` that is not
    known (None), neither the share nor the time left is said.
    """

    def __init__(
        self, total: int | None, unit: str = "tokens", *, begun: int = 0, every: float = 10.0
    ):
        self.total = None if total is None else max(total, 1)
        self.unit, self._begun, self._every = unit, begun, every
        self._start = self._said = time.monotonic()

    def at(self, done: int, note: str = "") -> None:
        """`done` things are done, those before the start included."""
        now = time.monotonic()
        if now - self._said < self._every and (self.total is None or done < self.total):
            return
        self._said = now
        rate = (done - self._begun) / max(now - self._start, 1e-9)
        rated = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        share = after = ""
        if self.total is not None:
            share = f"{min(100 * done / self.total, 100):5.1f} %  "
            left = (self.total - done) / max(rate, 1e-9) / 60
            after = f", {left:,.0f} min left" if left >= 1.5 else f", {60 * left:.0f} s left"
            after = after if done < self.total else ""
        print(
            f"{share}{done:,} {self.unit}  {rated} {self.unit}/s{after}{note}",
            file=sys.stderr,
            flush=True,
        )


class EscapedStream:
    r"""A text stream on which control characters but line breaks and tabs appear as ``\x1b``.

    So do characters that the stream's encoding lacks. In a terminal, progress bars of other
    packages may go back to the start of the line; with `styled`, colours pass as well.
    """

    def __init__(self, stream: Any, styled: bool = False):
        self.stream, self.styled = stream, styled and stream.isatty()

    def write(self, text: str) -> int:
        safe = self._safe(text)
        try:
            self.stream.write(safe)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            self.stream.write(safe.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
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
    """All that is printed meanwhile, on stdout and stderr, goes through `EscapedStream`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (EscapedStream(stream, styled) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def console(*, stderr: bool = False, width: int | None = None) -> Any:
    """A rich `Console` that obeys no text it is given. `width` None: the terminal's."""
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        def render(self, renderable, options=None):
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else shown(text, keep="\n"), style, control)

    stream = sys.stderr if stderr else sys.stdout
    while isinstance(stream, EscapedStream):
        stream = stream.stream
    return SafeConsole(file=stream, width=width, highlight=False, emoji=False)
