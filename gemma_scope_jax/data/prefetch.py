"""Work done ahead of time in threads: documents in a pool, batches one after the other.

The consumer gets the same results in the same order, and every error.
"""

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

AHEAD = 4  # batches that wait for the consumer
_END = object()


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int
) -> Iterator[Any]:
    """`map(function, items)`, in order, with up to `ahead` items pending in the pool."""
    waiting: collections.deque = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextlib.contextmanager
def prefetch(batches: Iterable[Any]) -> Iterator[Iterator[tuple[Any, Any]]]:
    """(batch, position after it), made ahead of time by a thread that ends with the block.

    `position` is `batches.position` after that batch, or None.
    """
    source = iter(batches)

    def take(_: None) -> tuple[Any, Any]:
        batch = next(source, _END)
        return batch, getattr(batches, "position", None)

    pool = ThreadPoolExecutor(1, "prefetch")
    try:
        taken = map_ahead(pool, take, itertools.repeat(None), AHEAD)
        yield itertools.takewhile(lambda found: found[0] is not _END, taken)
    finally:
        pool.shutdown(cancel_futures=True)
