"""Text to evaluate on: packed batches whose labels give each token's source and, in chats, role.

Documents come in the order of a seed, so that the first tokens are of all sources, and only the
beginning of each is taken: a few novels are no sample. The same data, seed and tokenizer give the
same batches, which is what a run that goes on where it was killed relies on.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.data.batches import fingerprint, labelled_record
from gemma_scope_jax.data.document_files import text_files
from gemma_scope_jax.data.documents import Documents, TextData, open_documents
from gemma_scope_jax.data.packing import Piece, fill_rows
from gemma_scope_jax.errors import InputError, shown
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.tokenizer import SPAN_ROLES
from gemma_scope_jax.storage.manifest import digest

OTHER = "other"
MOST_SOURCES = 32  # further files are counted together


@dataclasses.dataclass(frozen=True)
class EvaluationText:
    """Batches of text, made anew by each iteration.

    tokens      stop at the batch that reaches so many, <bos> included; None: all of the text
    batch_size, context_size  sequences of a batch, and tokens of each
    document    tokens taken of each document
    seed        of the order of documents
    """

    data: TextData | Sequence[str]
    tokenizer: Any
    tokens: int | None = None
    batch_size: int = 4
    context_size: int = 256
    document: int = 1024
    seed: int = 0

    def __post_init__(self):
        if self.batch_size < 1 or self.context_size < 2 or self.document < 1:
            raise InputError(
                f"batch_size {self.batch_size}, context_size {self.context_size}, {self.document} "
                "tokens a document: a sequence must hold <bos> and a token"
            )
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"evaluate on at least one token, not {self.tokens}")
        object.__setattr__(self, "_documents", open_documents(self.data))

    @property
    def documents(self) -> Documents:
        return self._documents  # type: ignore[attr-defined]

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The kinds of labels of the batches, with their names."""
        found: dict[str, tuple[str, ...]] = {}
        if isinstance(self.data, TextData):
            if sources := self._sources():
                found["source"] = sources
            if self.data.messages:
                found["role"] = SPAN_ROLES
        return found

    def _sources(self) -> tuple[str, ...]:
        """Files by name, below the folder that holds them all; those beyond the most together; none
        if there is only one."""
        assert isinstance(self.data, TextData)
        if not self.data.files:
            return ()
        names = list(self._names())
        if len(names) < 2:
            return ()
        if len(names) <= MOST_SOURCES:
            return tuple(names)
        return (*names[: MOST_SOURCES - 1], OTHER)

    def _names(self) -> dict[str, str]:
        """{name: path} of the files, in their order."""
        assert isinstance(self.data, TextData)
        paths = [str(path) for path in text_files(self.data.files)]
        above = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        # paths as in `Record.where`
        return {shown(os.path.relpath(path, above)): shown(path) for path in paths}

    def fingerprint(self, *, named: bool = False) -> str:
        """Tells these batches from others; 16 hexadecimal digits. `named`: see `data.batches`."""
        about = (self.documents, self._settings, self.tokenizer, self.seed)
        text = fingerprint(*about, named=named)
        shape = [text, self.tokens, self.batch_size, self.context_size, self.document]
        return digest(shape)

    def same_text(self, there: Any) -> bool:
        """Whether `there` is the `fingerprint` of these batches, also as older versions gave it."""
        return there == self.fingerprint() or there == self.fingerprint(named=True)

    @property
    def _settings(self) -> TextData:
        return self.data if isinstance(self.data, TextData) else TextData()

    def __iter__(self) -> Iterator[TokenBatch]:
        read, groups = 0, self.groups
        pieces, bos = self._pieces(groups.get("source", ())), self.tokenizer.bos_id
        for batch, _ in fill_rows(pieces, self.batch_size, self.context_size, bos, groups):
            yield batch
            read += batch.size
            if self.tokens is not None and read >= self.tokens:
                return

    def _pieces(self, sources: Sequence[str]) -> Iterator[Piece]:
        """The beginnings of the documents, each token labelled with its role and source."""
        paths = self._names() if sources else {}
        numbers = {paths.get(name, name): i for i, name in enumerate(sources)}
        for record in self.documents.ordered(self.seed, 0, (0, 1)):
            ids, mask, roles = (
                a[: self.document] for a in labelled_record(self.tokenizer, record, self._settings)
            )
            source = numbers.get(record.where.rpartition(", ")[0], len(numbers) - 1)
            labels = {"role": roles, "source": np.full(len(ids), source, np.int32)}
            yield Piece(0, 0, ids, mask, labels=labels)
