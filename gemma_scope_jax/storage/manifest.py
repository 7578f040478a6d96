"""Our own JSON documents on disk: what one must contain to be read, and digests.

A manifest describes its folder. It is read before anything else, so whatever is wrong with it
(another program's file, another version, a flipped bit) is one line that says what to do.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.strict_json import parse_json, read_bytes


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of document.

    what    its name in errors: "the manifest of activations"
    marks   what identifies it: {"format": "...", "version": 1}
    check   `check(content, path)` raises `InputError` unless everything read has its type and size
    advice  what to do with one that cannot be used: "write the store again"
    keys    further keys that it must have
    """

    what: str
    marks: Mapping[str, Any]
    check: Callable[[dict[str, Any], Any], None]
    advice: str
    keys: tuple[str, ...] = ()
    mend_text: bool = False  # see `strict_json.parse_json`

    def read(self, path: Path | epath.Path) -> dict[str, Any]:
        """The document in a file. Raises `InputError` for one that cannot be used."""
        return self.parse(read_bytes(path), path)

    def parse(self, data: bytes, path: str | os.PathLike) -> dict[str, Any]:
        """The document in bytes read from `path`, which errors name."""
        try:
            content = parse_json(data, path, mend_text=self.mend_text)
            if not isinstance(content, dict):
                raise InputError(f"{path}: not {self.what}")
            for key, wanted in self.marks.items():
                if (found := content.get(key)) != wanted or isinstance(found, bool):
                    said = f"{key} is {found!r:.60}, not {wanted!r}"
                    raise InputError(f"{path}: not {self.what} ({said})")
            if lacking := sorted(set(self.keys) - set(content)):
                raise InputError(f"{path}: lacks {', '.join(lacking)}")
            self.check(content, path)
        except InputError as error:
            raise InputError(f"{error}; {self.advice}") from error
        return content


def digest(value: Any, size: int = 8) -> str:
    """2 `size` hexadecimal digits that identify a value (BLAKE2b).

    Bytes and texts are hashed unchanged, everything else as JSON with sorted keys.
    """
    text = value if isinstance(value, (str, bytes)) else json.dumps(value, sort_keys=True)
    data = text.encode() if isinstance(text, str) else text
    return hashlib.blake2b(data, digest_size=size).hexdigest()
