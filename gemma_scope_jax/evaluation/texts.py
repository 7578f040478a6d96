"""Text to evaluate on: packed batches that know of each token its source and, in chats, its role.

Documents come in the order of a seed, so that the first tokens are of all sources, and only the
beginning of each is taken: a few novels are no sample. The same data, seed and tokenizer give the
same batches, which is what a run that goes on where it was killed relies on.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.data.document_files import Record
from gemma_scope_jax.data.documents import Documents, TextData, open_documents, parse
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation.evaluate import TextBatch

ROLES = ("turn", "system", "user", "model")
OTHER = "other"
MOST_SOURCES = 32  # further files are counted together
MIN_ROOM = 8  # a piece cut to fewer tokens would see next to nothing


@dataclasses.dataclass(frozen=True)
class EvaluationText:
    """Batches of text, made anew by each iteration.

    tokens      stop at the batch that reaches so many, <bos> included; None: all of the text
    rows, length  of a batch
    document    tokens taken of each document
    seed        of the order of documents
    """

    data: TextData | Sequence[str]
    tokenizer: Any
    tokens: int | None = None
    rows: int = 4
    length: int = 256
    document: int = 1024
    seed: int = 0

    def __post_init__(self):
        if self.rows < 1 or self.length < 2 or self.document < 1:
            raise InputError(
                f"batches of {self.rows} rows of {self.length}, {self.document} tokens a document: "
                "rows must hold <bos> and a token"
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
                found["role"] = ROLES
        return found

    def _sources(self) -> tuple[str, ...]:
        """Files by name, those beyond the most together; none if there is only one."""
        from gemma_scope_jax.data.document_files import text_files

        assert isinstance(self.data, TextData)
        if not self.data.files:
            return ()
        names = [str(path) for path in text_files(self.data.files)]
        if len(names) < 2:
            return ()
        if len(names) <= MOST_SOURCES:
            return tuple(names)
        return (*names[: MOST_SOURCES - 1], OTHER)

    def fingerprint(self) -> str:
        """Tells these batches from others; 16 hexadecimal digits."""
        settings = dataclasses.asdict(self.data) if isinstance(self.data, TextData) else {}
        settings.pop("files", None)  # names and sizes are in the documents' identity
        sample = self.tokenizer.encode("A sample: 12 of them, über\n\tall.", bos=True).tolist()
        shape = [self.tokens, self.rows, self.length, self.document, self.seed]
        parts = [self.documents.identity, settings, shape, sample]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()

    def __iter__(self) -> Iterator[TextBatch]:
        read = 0
        for batch in _pack(self._pieces(), self.rows, self.length, self.tokenizer.bos_id):
            yield batch
            read += int((batch.segments > 0).sum())
            if self.tokens is not None and read >= self.tokens:
                return

    def _pieces(self) -> Iterator[Mapping[str, np.ndarray]]:
        numbers = {name: i for i, name in enumerate(self.groups.get("source", ()))}
        for record in self.documents.ordered(self.seed, 0, (0, 1)):
            ids, counts, roles = self._encode(record)
            name = record.where.rpartition(", ")[0]
            source = numbers.get(name, len(numbers) - 1) if numbers else 0
            piece = {"tokens": ids, "counts": counts, "role": roles}
            piece["source"] = np.full(len(ids), source, np.int32)
            yield {key: value[: self.document] for key, value in piece.items()}

    def _encode(self, record: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids without <bos>, which of them count, and their roles (0 in plain text)."""
        tok = self.tokenizer
        data = self.data if isinstance(self.data, TextData) else TextData()
        try:
            document = parse(record, data)
            if isinstance(document, str):
                ids = tok.encode(document, bos=False)
                return ids, ~tok.special[ids], np.zeros(len(ids), np.int32)
            chat = tok.chat(document, add_generation_prompt=False)
        except InputError as error:
            if data.skip_bad:
                return (np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.int32))
            where = "" if record.where in str(error) else f"{record.where}: "
            raise InputError(f"{where}{error}") from error
        ids = chat.ids[1:]
        roles = np.repeat(
            [ROLES.index(s.role) for s in chat.spans], [s.stop - s.start for s in chat.spans]
        ).astype(np.int32)[1:]
        said = chat.mask(*data.counted_roles)[1:]
        return ids, said & ~tok.special[ids], roles


def _pack(
    pieces: Iterator[Mapping[str, np.ndarray]], rows: int, length: int, bos: int
) -> Iterator[TextBatch]:
    """Rows filled document after document; the last batch is padded."""
    names = ("tokens", "segments", "counts", "role", "source")
    made = {name: np.zeros((rows, length), np.int32) for name in names}
    row, column, number = 0, 0, 1

    def batch() -> TextBatch:
        b = {name: value.copy() for name, value in made.items()}
        labels = {"role": b["role"], "source": b["source"]}
        for value in made.values():
            value[:] = 0
        return TextBatch(b["tokens"], b["segments"], b["counts"].astype(bool), labels)

    for piece in pieces:
        at, size = 0, len(piece["tokens"])
        while at < size:
            room = length - column - 1
            if column and room < min(MIN_ROOM, size - at):
                row, column, number = row + 1, 0, 1
                if row == rows:
                    yield batch()
                    row = 0
                continue
            part = slice(at, min(size, at + room))
            stop = column + 1 + part.stop - part.start
            for name, value in piece.items():
                made[name][row, column + 1 : stop] = value[part]
            made["tokens"][row, column] = bos
            made["source"][row, column] = piece["source"][0]
            made["segments"][row, column:stop] = number
            at, column, number = part.stop, stop, number + 1
    if made["segments"].any():
        yield batch()
