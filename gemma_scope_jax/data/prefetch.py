"""Work done ahead of time: batches in a thread, documents in a pool.

The consumer gets the same results in the same order, and every error.
"""

import collections
import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gemma_scope_jax.errors import InputError


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


class Prefetched:
    """The result of `prefetch`: an iterator of (batch, position after it).

    `close()` ends the thread, as does leaving a `with` block or dropping the iterator.
    """

    def __init__(self, batches: Iterable[Any], n: int):
        self._queue: queue.Queue = queue.Queue(n)
        self._stop = threading.Event()
        arguments = (batches, self._queue, self._stop)  # not self: it must be collectable
        self._thread = threading.Thread(target=_run_ahead, args=arguments, daemon=True)
        weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __iter__(self) -> "Prefetched":
        return self

    def __next__(self) -> tuple[Any, Any]:
        if self._stop.is_set():
            raise StopIteration
        batch, position, error = self._queue.get()
        if error is not None:
            self._stop.set()
            raise error
        return batch, position

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> "Prefetched":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _run_ahead(batches: Iterable[Any], done: queue.Queue, stop: threading.Event) -> None:
    def put(item: tuple) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                done.put(item, timeout=0.1)
                return

    try:
        for batch in batches:
            put((batch, getattr(batches, "position", None), None))
            if stop.is_set():
                return
        put((None, None, StopIteration()))
    except BaseException as error:  # the consumer must see all errors
        put((None, None, error))


def prefetch(batches: Iterable[Any], n: int = 4) -> Prefetched:
    """(batch, position after it), made ahead of time by a background thread; up to `n` wait.

    `position` is `batches.position` after that batch, or None. The consumer gets all errors.
    """
    if n < 1:
        raise InputError(f"prefetch at least one batch, not {n}")
    return Prefetched(batches, n)
