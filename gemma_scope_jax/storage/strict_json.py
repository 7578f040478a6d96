"""Reading JSON from others: one clear line for everything that JSON allows and we do not.

Python's reader accepts NaN, Infinity, numbers that overflow to infinity, integers of any length,
half of a surrogate pair and the last of two equal keys, and fails on deep nesting. Every file and
every answer is read here, so that none of these reaches shapes, floats or files we write.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from gemma_scope_jax.errors import InputError, reason

_INT64 = 1 << 63
_LONE = re.compile("[\ud800-\udfff]")
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_KINDS |= {list: "a list", dict: "an object"}
REQUIRED = object()


def parse_json(data: bytes | str, where: str | os.PathLike, *, mend_text: bool = False) -> Any:
    """The value of a JSON document, UTF-8 with or without a byte order mark.

    Refuses, with `InputError` that begins with `where`: input that is not UTF-8 or not JSON;
    nesting of about a thousand levels; NaN and infinities, spelled out or by overflow (1e400, 400
    digits); a key that occurs twice in one object; half a surrogate pair in a text, which no UTF-8
    file can hold. With `mend_text` the last becomes U+FFFD instead. A whole number beyond 64 bits
    becomes a float, which `field` does not accept as a whole number.
    """
    where = os.fspath(where)
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = json.loads(
            text.removeprefix("\ufeff"),
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_integer,
            object_pairs_hook=_object,
        )
        # only an escape can write a surrogate: bytes that hold one are not UTF-8
        if "\\ud" in text or "\\uD" in text or (isinstance(data, str) and _LONE.search(text)):
            if value != (mended := legible(value)) and not mend_text:
                raise ValueError("a text holds half of a surrogate pair")
            value = mended
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte {error.start})") from error
    except RecursionError:
        raise InputError(f"{where}: JSON nested too deeply to be read") from None
    except ValueError as error:
        raise InputError(f"{where}: not usable as JSON ({reason(error)})") from error
    return value


def read_json(path: Path | epath.Path) -> Any:
    """`parse_json` of a file. Raises `InputError` if it does not exist or cannot be read."""
    return parse_json(read_bytes(path), path)


def read_object(path: Path | epath.Path) -> dict[str, Any]:
    """`read_json` of a file that came with weights and must hold an object."""
    data = read_bytes(path)
    try:
        content = parse_json(data, path)
    except InputError as error:
        raise InputError(f"{error}; download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object, but a {type(content).__name__}")
    return content


def read_bytes(path: Path | epath.Path) -> bytes:
    """The content of a file. Raises `InputError` if it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def field(
    content: Any,
    key: str,
    kind: type,
    where: str | os.PathLike,
    *,
    default: Any = REQUIRED,
    least: float = -math.inf,
    most: float = math.inf,
) -> Any:
    """`content[key]`, which must be of the `kind` and within `least` .. `most` (numbers; lengths of
    texts, lists and objects). A whole number is also a number (float), true is not.

    A key that is missing or null gives the `default`, if there is one. Raises `InputError`.
    """
    where = os.fspath(where)
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: is {_said(content)}, not an object with {key!r}")
    value = content.get(key)
    if value is None:
        if default is REQUIRED:
            raise InputError(f"{where}: lacks {key!r}")
        return default
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{where}: {key} is {_said(value)}, not {_KINDS[kind]}")
    size = len(value) if isinstance(value, (str, list, dict)) else value
    if not least <= size <= most:
        bounds = f"at least {least}" if most == math.inf else f"{least} to {most}"
        raise InputError(f"{where}: {key} is {_said(value)}, expected {bounds}")
    return float(value) if kind is float else value  # type: ignore[arg-type]


def _said(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:24]} is too large")
    return value


def _integer(text: str) -> int | float:
    # transformers writes int(1e30) for "no limit", which is never read
    value = int(text) if len(text) <= 20 else _INT64
    return value if -_INT64 <= value < _INT64 else _finite(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:60]!r} occurs twice in one object")
    return value


def finite(value: Any) -> Any:
    """`value` with None for numbers that JSON does not have, NaN and infinities. Tuples become
    lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def legible(value: Any) -> Any:
    """`value` with U+FFFD for each half of a surrogate pair in its texts, as Python has them for
    names that are not UTF-8, so that it can be written and read again. Tuples become lists."""
    if isinstance(value, str):
        return _LONE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {legible(k): legible(v) for k, v in value.items()}
    return [legible(v) for v in value] if isinstance(value, (list, tuple)) else value
