"""Fields of a `TrainConfig` by name: changed from a command line, and listed with their meaning.

config = override(config, ["--tokens", "100000", "--coders.0.width", "8192"])
field_table()[0]  # ("coders", "any number of CoderConfig", "required", "The coders ...")
"""

import ast
import dataclasses
import functools
import importlib.util
import inspect
import os
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.storage.paths import expanded
from gemma_scope_jax.training.lengths import BY_LENGTH
from gemma_scope_jax.training.recipe import TrainConfig

NONE = ("none", "null")
BOOLS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
ALL = "*"  # in place of a number: every coder
FieldPath = tuple[str, ...]


def load_config(path: str | os.PathLike) -> TrainConfig:
    """The `config` that a configs/*.py file sets; the file is run. Raises `InputError`."""
    path = expanded(path)
    if not path.is_file():
        raise InputError(f"{path}: no such config file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: {type(error).__name__}: {error}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, TrainConfig):
        raise InputError(f"{path}: must set `config` to a TrainConfig")
    return config


def override(config: TrainConfig, words: Sequence[str]) -> TrainConfig:
    """The config with some fields changed, which `words` of a command line name.

    `--tokens 100000`, `--tokens=100000`, `--coders.0.loss.kl_weight 1`, `--coders.*.width 8192`.
    Values of a tuple are words (`--data.files a.txt b.txt`); commas may separate numbers, and
    `none` empties it.
    Raises `InputError` for an unknown field, with the nearest names, for a value of another type,
    and for what the config's own checks refuse.
    """
    known, changes = dict(_paths(config)), {}
    for name, values in _options(words):
        pattern = name.split(".")
        paths = [path for path in known if _matches(path, pattern)]
        if not paths:
            raise InputError(f"no field {name}{nearest(name, map('.'.join, known))}")
        changes |= {path: _value(name, known[path], values) for path in paths}
    return _changed(config, changes)


def _options(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(name, values) of each option."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.append((name.replace("-", "_"), [value] if equals else []))
        elif not found:
            raise InputError(f"{word}: expected a field, such as --tokens 100000")
        else:
            found[-1][1].append(word)
    return found


def _matches(path: FieldPath, pattern: Sequence[str]) -> bool:
    fits = (b == ALL and a.isdecimal() or a == b for a, b in zip(path, pattern))
    return len(path) == len(pattern) and all(fits)


def _paths(value: Any, at: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """(path, type) of every field of a tree of dataclasses."""
    if isinstance(value, tuple):
        for n, one in enumerate(value):
            yield from _paths(one, (*at, str(n)))
    elif dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        for f in dataclasses.fields(value):
            yield (*at, f.name), hints[f.name]
            yield from _paths(getattr(value, f.name), (*at, f.name))


def _changed(value: Any, changes: dict[FieldPath, Any], at: FieldPath = ()) -> Any:
    """The tree with the leaves of `changes` replaced, each dataclass rebuilt once."""
    if not changes or () in changes:
        return changes.get((), value)
    below = lambda name: {path[1:]: new for path, new in changes.items() if path[0] == name}
    if isinstance(value, tuple):
        return tuple(_changed(one, below(str(n)), (*at, str(n))) for n, one in enumerate(value))
    names = dict.fromkeys(path[0] for path in changes)
    new = {name: _changed(getattr(value, name), below(name), (*at, name)) for name in names}
    try:
        return dataclasses.replace(value, **new)
    except InputError as error:
        raise InputError(f"{'.'.join(at)}: {error}" if at else f"{error}") from None


def _value(name: str, kind: Any, values: Sequence[str]) -> Any:
    """`values` as the type `kind` of the field `name`."""
    for choice in _choices(kind):
        found, fits = _as(choice, values)
        if fits:
            return found
    if any(map(dataclasses.is_dataclass, (kind, *typing.get_args(kind)))):
        raise InputError(f"{name} is a group of fields: name one of them, see --fields")
    said = " ".join(values) if values else "nothing"
    raise InputError(f"{name} takes {_type_name(kind)}, not {said}")


def _choices(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def _as(kind: Any, values: Sequence[str]) -> tuple[Any, bool]:
    """(the value, whether the words are a value of this type)."""
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        values = [] if len(values) == 1 and values[0].lower() in NONE else values
        if kinds[0] in (int, float):
            values = [part for value in values for part in re.split(r"[,\s]+", value) if part]
        found = [_as(kinds[0], [value]) for value in values]
        right = kinds[-1] is ... or len(found) == len(kinds)
        return tuple(v for v, _ in found), right and all(fits for _, fits in found)
    if kind is bool and not values:
        return True, True
    if len(values) != 1:
        return None, False
    (text,) = values
    if kind is type(None):
        return None, text.lower() in NONE
    if kind is bool:
        return BOOLS.get(text.lower()), text.lower() in BOOLS
    if kind is str:
        return text, True
    try:
        return (kind(text), True) if kind in (int, float) else (None, False)
    except ValueError:
        return None, False


def field_table(kind: type = TrainConfig, at: str = "") -> list[tuple[str, str, str, str]]:
    """(name, type, default, meaning) of every field; nested fields follow their config's row."""
    rows, hints, docs = [], typing.get_type_hints(kind), field_docs(kind)
    for f in dataclasses.fields(kind):
        default = "required" if f.default is dataclasses.MISSING else _shown(f.default)
        if by_length := BY_LENGTH.get(kind.__name__, {}).get(f.name):
            default = " or ".join(dict.fromkeys(map(_shown, by_length)))
        rows.append((at + f.name, _type_name(hints[f.name]), default, docs[f.name]))
        for inner in (hints[f.name], *typing.get_args(hints[f.name])):
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                number = "" if inner is hints[f.name] else f"{ALL}."
                rows += field_table(inner, f"{at}{f.name}.{number}")
    return rows


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass, on one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:]):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[field.target.id] = " ".join(str(after.value.value).split())
    return found


def _type_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if len(choices := _choices(kind)) > 1:
        return " or ".join(map(_type_name, choices))
    if typing.get_origin(kind) is tuple:
        first, *rest = typing.get_args(kind)
        if dataclasses.is_dataclass(first):
            return f"any number of {_type_name(first)}"
        plural = {int: "whole numbers", float: "numbers", str: "texts"}[first]
        return plural if rest == [...] else f"{len(rest) + 1} {plural}"
    return "None" if kind is type(None) else names.get(kind) or kind.__name__


def _shown(default: Any) -> str:
    if dataclasses.is_dataclass(default):
        return ""
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    return str(default) if default != "" else "''"
