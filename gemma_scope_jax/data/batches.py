"""Text in, packed token batches out: deterministic, shuffled, resumable at any batch boundary.

A position is a document's number and a token in it, so resuming tokenises nothing that came before.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gemma_scope_jax.data import documents as sources
from gemma_scope_jax.data.document_files import Record
from gemma_scope_jax.data.documents import Documents, Indexed, Source, StreamedDocuments, TextData
from gemma_scope_jax.data.packing import Piece, fill_rows
from gemma_scope_jax.data.prefetch import map_ahead
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.tokenizer import ROLES, Tokenizer
from gemma_scope_jax.storage.manifest import digest

THREADS = min(16, os.cpu_count() or 1)  # that tokenise, at about 0.5 million tokens/s each
_PLACE = ("epoch", "document", "offset")


@contextlib.contextmanager
def tokenisers() -> Iterator[ThreadPoolExecutor]:
    """`THREADS` threads, which are not waited for at the end.

    It may be the garbage collector that ends a generator, in the middle of the start of any other
    thread: to wait for a thread there locks up the program (CPython 3.11).
    """
    pool = ThreadPoolExecutor(THREADS, "tokenise")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents in an order, as tokens. seed None: unshuffled."""

    documents: Documents
    data: TextData
    tokenizer: Tokenizer
    seed: int | None

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.documents, self.data, self.tokenizer, self.seed)

    def same_text(self, there: Any) -> bool:
        """Whether `there` is the `fingerprint` of this text, in today's or an older form."""
        about = (self.documents, self.data, self.tokenizer, self.seed)
        return there == self.fingerprint or there == fingerprint(*about, named=True)

    @property
    def count(self) -> int | None:
        """The number of documents, None if only reading them all would tell."""
        return self.documents.count if isinstance(self.documents, Indexed) else None

    @property
    def shuffled(self) -> int | None:
        """The number of documents that are shuffled; None: numbers are places in the order."""
        return None if self.seed is None else self.count

    def records(self, start: int, stop: int | None = None) -> Iterator[tuple[int, Record]]:
        """(number, record) of the documents at places `start` to `stop` of the order.

        Numbers count documents in the order of the files; for compressed files and iterables they
        are the places in the shuffled order.
        """
        documents = self.documents
        if not isinstance(documents, Indexed):
            return itertools.islice(enumerate(documents.ordered(self.seed)), start, stop)
        numbers = documents.numbers(self.seed, 0, start, stop)
        return ((number, documents.read(number)) for number in numbers)

    def encode(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a document without <bos>, int32 [n]; the mask of those to use, bool [n]."""
        return labelled_record(self.tokenizer, record, self.data)[:2]


class TokenBatches:
    """An iterator of `TokenBatch`es [batch_size, context_size], packed by `fill_rows`.

    source     a `TextData`, a list or other iterable of strings, a function returning one, or a
               `TokenBatch`, whose documents are packed again
    seed       of the order, which is another in every epoch
    epochs     passes over the documents; None: without end. The last batch may be padded
    position   a `position` of an earlier iterator over the same data: continue from there

    `position` is a small JSON-able dict: where the next batch begins. Only `batch_size` and
    `context_size` may then change. Raises `InputError` for bad sources and positions of other data.
    """

    names: Mapping[str, tuple[str, ...]] = {}  # of the groups, if batches are labelled

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        batch_size: int,
        context_size: int,
        *,
        seed: int = 0,
        epochs: int | None = None,
        position: Mapping[str, Any] | None = None,
    ):
        self.batch_size, self.context_size = batch_size, context_size
        data = source if isinstance(source, TextData) else TextData()
        self.text = Text(sources.open_documents(source), data, tokenizer, seed)
        self._epochs = 1 if self.text.documents.once else epochs
        self.fingerprint = self.text.fingerprint
        beginning = {"data": self.fingerprint, **dict.fromkeys(_PLACE, 0)}
        self._go_to(beginning if position is None else position)

    def at(self, position: Mapping[str, Any]) -> "TokenBatches":
        """The same batches from a position on, without scanning the files again."""
        other = copy.copy(self)
        other._go_to(position)
        return other

    def _go_to(self, position: Mapping[str, Any]) -> None:
        numbers = [position.get(k) for k in _PLACE] if isinstance(position, Mapping) else [None]
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise InputError(f"not a position in a text: {position!r}")
        if not self.text.same_text(position.get("data")):
            raise InputError(
                "the position to resume from belongs to other data: the text, its settings, seed "
                "or tokenizer have changed; restore them, or start again"
            )
        self.position: dict[str, Any] = {**position, "data": self.fingerprint}
        shape, bos = (self.batch_size, self.context_size), self.text.tokenizer.bos_id
        self._batches = fill_rows(self._pieces(), *shape, bos, self.names)

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        batch, rest = next(self._batches)
        place = (self._epochs, 0, 0) if rest is None else (rest.epoch, rest.document, rest.offset)
        self.position = {"data": self.fingerprint, **dict(zip(_PLACE, place))}
        return batch

    def _pieces(self) -> Iterator[Piece]:
        epoch, start, offset = (self.position[k] for k in _PLACE)
        documents, seed = self.text.documents, self.text.seed
        with tokenisers() as pool:
            while self._epochs is None or epoch < self._epochs:
                some = start > 0 or offset > 0
                records = documents.ordered(seed, epoch, start)
                encoded = map_ahead(pool, self._encode, records, 4 * THREADS)
                for number, (ids, mask, labels) in enumerate(encoded, start):
                    if offset > len(ids):
                        raise InputError("the text has changed since the run was stopped")
                    some |= len(ids) > 0
                    yield Piece(epoch, number, ids, mask, offset, labels)
                    offset = 0
                if not some:
                    raise InputError("no text: all documents are empty or unusable")
                epoch, start, offset = epoch + 1, 0, 0

    def _encode(self, record: Record) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Ids, mask and labels of a document, as in `Piece`."""
        return *self.text.encode(record), {}


def fingerprint(
    documents: Documents,
    data: TextData,
    tokenizer: Tokenizer,
    seed: int | None,
    *,
    named: bool = False,
) -> str:
    """16 hexadecimal digits that identify data, order and tokenizer, wherever the text is stored.

    `named`: in the form of older versions, which identified files by names and sizes.
    """
    settings = dataclasses.asdict(data)
    for name in ("files", "tfds", "tfds_folder"):  # those are in the documents' identity
        del settings[name]
    if not isinstance(documents, StreamedDocuments):
        del settings["shuffle_window"]
    sample = tokenizer.encode("A sample: 12 of them, über\n\tall.", bos=True).tolist()
    identity = documents.named() if named else documents.identity
    whole = [0, 1]  # in older versions hosts had parts of a text
    return digest(json.dumps([identity, settings, seed, whole, sample]))


def readings(position: Mapping[str, Any]) -> int:
    """How often the text has been begun before a position: 2 while it is read again."""
    epoch, *rest = (position[name] for name in _PLACE)
    return epoch + any(rest)


def counting(
    batches: Iterable[tuple[TokenBatch, Any]], first: int, position: Mapping[str, Any]
) -> Iterator[tuple[TokenBatch, Any]]:
    """(batch, position after it), from `position` on, unchanged.

    Raises `InputError` once a whole pass over the text has had no token in the mask at position
    `first` of its piece or later.
    """
    place = lambda position: tuple(position[name] for name in _PLACE)
    epoch, *rest = place(position)
    waiting = True
    for batch, after in batches:
        if waiting:
            waiting = not batch.counted(first).any()
            if waiting and place(after) >= (epoch + 1, *rest):
                raise InputError(
                    "no token counts in the whole text: none has one of the selected roles and "
                    f"kinds and lies at position {first} or later of its piece of a document"
                )
        yield batch, after


def labelled_record(
    tokenizer: Tokenizer, record: Record, data: TextData
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids of a document without <bos>, int32 [n], the mask of those to use, bool [n], and the
    number of each token's role in `SPAN_ROLES`, int32 [n]; -1 outside of chats."""
    no_roles = lambda n: np.full(n, -1, np.int32)
    if record.kind == "tokens":
        ids, mask = record.value
        if ids[0] != tokenizer.bos_id:
            bos = tokenizer.bos_id
            raise InputError(f"{record.where} begins with token {ids[0]}, not <bos> ({bos})")
        return ids[1:], mask[1:], no_roles(len(ids) - 1)
    try:
        document = sources.parse(record, data)
        if isinstance(document, str):
            ids = tokenizer.encode(document, bos=False)
            return ids, ~tokenizer.special[ids], no_roles(len(ids))
        chat = tokenizer.chat(document, add_generation_prompt=False)
    except InputError as error:
        if data.skip_bad:
            return no_roles(0), np.zeros(0, bool), no_roles(0)
        where = "" if record.where in str(error) else f"{record.where}: "
        hint = "" if record.kind == "string" else " (or set skip_bad=True)"
        raise InputError(f"{where}{error}{hint}") from error
    ids, selected = chat.ids[1:], chat.mask(*(ROLES[role] for role in data.roles))[1:]
    return ids, selected & ~tokenizer.special[ids], chat.roles[1:]
