"""Text to evaluate on: packed batches whose labels give each token's source and, in chats, role.

Documents come in a random order, so that the first tokens come from all sources, and only the
beginning of each is used: a few novels are not a sample. The same data, seed and tokenizer give the
same batches, which an interrupted run relies on to continue.
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
from gemma_scope_jax.model.tokenizer import SPAN_ROLES, Tokenizer
from gemma_scope_jax.storage.manifest import digest

OTHER = "other"
MOST_SOURCES = 32  # further files form one group


@dataclasses.dataclass(frozen=True)
class EvaluationText:
    """Batches of text, made anew by each iteration.

    tokens      stop at the batch that reaches this many, <bos> included; None: all of the text
    batch_size, context_size  sequences in a batch, and tokens in each
    document    tokens used of each document
    seed        of the order of the documents
    """

    data: TextData | Sequence[str]
    tokenizer: Tokenizer
    tokens: int | None = None
    batch_size: int = 4
    context_size: int = 256
    document: int = 1024
    seed: int = 0

    def __post_init__(self):
        if self.batch_size < 1 or self.context_size < 2 or self.document < 1:
            raise InputError(
                f"batch_size {self.batch_size}, context_size {self.context_size}, document "
                f"{self.document}: a sequence must hold <bos> and a token"
            )
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"evaluate on at least one token, not {self.tokens}")
        object.__setattr__(self, "_documents", open_documents(self.data))

    @property
    def documents(self) -> Documents:
        return self._documents  # type: ignore[attr-defined]

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The kinds of labels of the batches, with their names. Sources are files by name, from the
        `MOST_SOURCES`th on as one; a single file gives none."""
        found: dict[str, tuple[str, ...]] = {}
        if len(names := tuple(self._names())) > 1:
            most = len(names) <= MOST_SOURCES
            found["source"] = names if most else (*names[: MOST_SOURCES - 1], OTHER)
        if self._settings.messages:
            found["role"] = SPAN_ROLES
        return found

    def _names(self) -> dict[str, str]:
        """{name: path} of the files, in order; names are relative to the folder above them all."""
        if not self._settings.files:
            return {}
        paths = [str(path) for path in text_files(self._settings.files)]
        above = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        # paths as in `Record.where`
        return {shown(os.path.relpath(path, above)): shown(path) for path in paths}

    def fingerprint(self, *, named: bool = False) -> str:
        """16 hexadecimal digits that identify these batches. `named`: see `data.batches`."""
        about = (self.documents, self._settings, self.tokenizer, self.seed)
        text = fingerprint(*about, named=named)
        shape = [text, self.tokens, self.batch_size, self.context_size, self.document]
        return digest(shape)

    def same_text(self, there: Any) -> bool:
        """Whether `there` is the `fingerprint` of these batches, or that of older versions."""
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
        """The beginnings of the documents, with the role and source of each token as labels."""
        paths = self._names()
        numbers = {paths.get(name, name): i for i, name in enumerate(sources)}
        for record in self.documents.ordered(self.seed):
            ids, mask, roles = (
                a[: self.document] for a in labelled_record(self.tokenizer, record, self._settings)
            )
            source = numbers.get(record.where.rpartition(", ")[0], len(numbers) - 1)
            labels = {"role": roles, "source": np.full(len(ids), source, np.int32)}
            yield Piece(0, 0, ids, mask, labels=labels)
