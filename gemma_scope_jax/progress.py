"""How far long work is, on stderr: share, rate and time left, a line every ten seconds."""

import sys
import time


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
            file=sys.stderr, flush=True,
        )  # fmt: skip
