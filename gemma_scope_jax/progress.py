"""How far long work is, on stderr: share, rate and time left, a line every ten seconds."""

import sys
import time


class Progress:
    """Of work of `total` things, of which `begun` were done before: tell it where it is by `at`.

    With `every` seconds between lines; the last one is always printed.
    """

    def __init__(self, total: int, unit: str = "tokens", *, begun: int = 0, every: float = 10.0):
        self.total, self.unit, self._begun, self._every = max(total, 1), unit, begun, every
        self._start = self._said = time.monotonic()

    def at(self, done: int, note: str = "") -> None:
        """`done` things are done, those before the start included."""
        now = time.monotonic()
        if now - self._said < self._every and done < self.total:
            return
        self._said = now
        rate = (done - self._begun) / max(now - self._start, 1e-9)
        left = (self.total - done) / max(rate, 1e-9) / 60
        rated = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        after = f", {left:,.0f} min left" if left >= 1.5 else f", {60 * left:.0f} s left"
        print(
            f"{min(100 * done / self.total, 100):5.1f} %  {done:,} {self.unit}  {rated} "
            f"{self.unit}/s{after if done < self.total else ''}{note}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
