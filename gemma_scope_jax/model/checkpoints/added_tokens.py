"""The tokens that a folder's JSON files add to Gemma's vocabulary."""

import json
import re
from typing import Any

from etils import epath

from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.storage.strict_json import parse_json, read_bytes, read_json

TOKENS = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")


def declared_tokens(path: epath.Path) -> list[tuple[int, Any, dict[str, Any]]]:
    """(id, text, entry) of each token that one of the `TOKENS` files adds. Raises `InputError`."""
    try:
        if path.name == "added_tokens.json":
            return [(int(number), text, {}) for text, number in read_json(path).items()]
        if path.name == "tokenizer_config.json":
            entries = (read_json(path).get("added_tokens_decoder") or {}).items()
        else:
            entries = [(token["id"], token) for token in _added_list(path)]
        return [(int(number), token["content"], token) for number, token in entries]
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: its added tokens are malformed") from error


def _added_list(path: epath.Path) -> list[dict[str, Any]]:
    """added_tokens of a tokenizer.json, without its millions of merges if it comes before them."""
    text = read_bytes(path).decode("utf-8-sig", errors="replace")
    key = '"added_tokens":'
    if text.count(key) != 1:
        return read_json(path).get("added_tokens") or []
    start = text.index(key) + len(key)
    start = re.compile(r"\s*").match(text, start, start + 100).end()  # type: ignore[union-attr]
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not usable as JSON ({reason(error)})") from error
    return parse_json(text[start:end], path) or []
