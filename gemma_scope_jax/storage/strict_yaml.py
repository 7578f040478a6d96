"""Reading YAML from others: only what JSON can say, and one clear line for everything else."""

import json
import os
from pathlib import Path
from typing import Any

from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.storage.strict_json import parse_json, read_bytes

LARGEST = 1 << 20  # bytes of a file that a person writes


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML (or JSON) file. Raises `InputError`, which begins with `path`,
    for what `parse_yaml` refuses and for files that are missing or larger than a config is."""
    data = read_bytes(path)
    if len(data) > LARGEST:
        raise InputError(f"{path}: not YAML that can be used (larger than a config is)")
    return parse_yaml(data, path)


def parse_yaml(data: bytes, where: str | os.PathLike) -> dict[str, Any]:
    """The keys and values of a document in YAML, of which JSON is a part.

    Refuses, with `InputError` that begins with `where`: broken YAML, what JSON cannot represent,
    aliases, keys that occur twice in one mapping, and documents that are not keys and values.
    """
    import yaml

    try:
        text = data.decode("utf-8-sig")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise InputError("it has aliases (*name): write out what they stand for")
        _refuse_twins(yaml.compose(text, yaml.SafeLoader))
        content = parse_json(json.dumps(yaml.safe_load(text)), "it")
    except Exception as error:  # the parser lets other types through: IndexError for `!!int ''`
        why = reason(error).removeprefix("it: ")
        raise InputError(f"{os.fspath(where)}: not YAML that can be used ({why})") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise InputError(f"{os.fspath(where)}: expected keys and values, found a {kind}")
    return content


def _refuse_twins(node: Any) -> None:
    """Raise `InputError` if a mapping at or below `node` has a key twice."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for part in node.value:
            _refuse_twins(part)
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise InputError(f"the key {twice[0]!r:.60} occurs twice")
        for _, value in node.value:
            _refuse_twins(value)
