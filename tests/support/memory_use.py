"""How much memory a piece of Python takes."""

import tracemalloc
from collections.abc import Callable


def least_peak(run: Callable[[], object]) -> int:
    """The most bytes that Python's objects took while `run` ran: the lesser of two runs, because
    the interpreter's own table of strings doubles (by 4 to 16 MB) at any moment, but not twice.
    """
    peaks = []
    for _ in range(2):
        tracemalloc.start()
        try:
            run()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return min(peaks)
