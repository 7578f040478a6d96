"""A suite: a small file that says what an audit asks, of what data, and how it is judged.

    name: my_suite
    question: Does the model prefer the first sentence of each pair?
    kind: pairs
    licence: CC BY 4.0
    source: my own sentences
    data: {file: pairs.csv, fields: {a: first, b: second, group: topic}}
    measure: preference
    arms: {a: a, b: b, paired: true}

YAML or JSON, checked field by field: a mistake is one line with the file, the field and what is
allowed. docs/guides/audit_a_behaviour.md explains every field.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from gemma_scope_jax.behaviour.contrasts.arms import HOWS
from gemma_scope_jax.behaviour.suites.formats import FORMATS, by_fields
from gemma_scope_jax.behaviour.suites.items import Item, Template, drawn
from gemma_scope_jax.behaviour.suites.rows import read_rows
from gemma_scope_jax.behaviour.suites.scores import JUDGED, MEASURES
from gemma_scope_jax.behaviour.suites.sets import SETS, read_set, wrapped
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.storage.manifest import digest
from gemma_scope_jax.storage.paths import expanded
from gemma_scope_jax.storage.strict_json import field
from gemma_scope_jax.storage.strict_yaml import parse_yaml, read_yaml

KINDS = ("pairs", "choices", "generate")
JUDGES = ("refusal", "lexicon", "ask", "endpoint", "probe")
_TEXTS = ("name", "question", "kind", "licence", "source", "measure")
_OPTIONAL = (
    "template",
    "data",
    "judge",
    "arms",
    "limit",
    "seed",
    "new_tokens",
    "about",
    "elsewhere",
)
_DATA = ("set", "wrap", "file", "format", "fields", "items", "group", "limit")
_ITEM = ("prompt", "prompts", "choices", "answer", "group", "unit", "texts", "facts")
_SUFFIXES = (".yaml", ".yml", ".json")


@dataclasses.dataclass(frozen=True)
class Suite:
    """What an audit asks. Made by `load_suite`.

    kind        "pairs" (whole texts by likelihood), "choices" (continuations by likelihood) or
                "generate" (the model's answers are judged)
    sources     where items come from, as in the file
    arms        {"a", "b", "paired"}: texts of each item; or {"by": "group", "a", "b"}: prompts of
                two groups; or {"by": "outcome"}: of items where the behaviour shows or not.
                "how" a text's features are pooled, as in `contrast`
    elsewhere   the name of a suite on whose arms found features are tested, too
    about       sentences on what the suite cannot show
    """

    name: str
    question: str
    kind: str
    licence: str
    source: str
    measure: str
    template: Template
    sources: tuple[Mapping[str, Any], ...]
    judge: str
    arms: Mapping[str, Any]
    elsewhere: str
    limit: int | None
    seed: int
    new_tokens: int
    about: tuple[str, ...]
    place: str  # the file, for messages and for data files beside it

    def identity(self) -> str:
        """A digest of all that changes what is asked or how it is judged, but for the data."""
        content = dataclasses.asdict(self)
        del content["place"]
        return digest(content)


@dataclasses.dataclass(frozen=True)
class SuiteItems:
    """The items of a suite, and where they are from.

    origins  a line for each source: {"what", "licence", "source", "note", "digest", "items"}
    """

    items: tuple[Item, ...]
    origins: tuple[Mapping[str, Any], ...]


def suite_names() -> list[str]:
    """The built-in suites."""
    folder = resources.files(str(__package__))
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_suite(source: str | os.PathLike) -> Suite:
    """A built-in suite by its name, or one of a YAML or JSON file.

    Raises `InputError`, one line with the file, the field and what is allowed.
    """
    name = os.fspath(source)
    if name in suite_names():
        file = resources.files(str(__package__)) / f"{name}.yaml"
        return _suite(parse_yaml(file.read_bytes(), name), name)
    if not name.lower().endswith(_SUFFIXES):
        known = suite_names()
        said = f"{name}: no built-in suite, nor a file named {' or '.join(_SUFFIXES)}"
        raise InputError(f"{said}{nearest(name, known)} (built in: {', '.join(known)})")
    return _suite(read_yaml(Path(expanded(name))), name)


def _suite(content: dict[str, Any], where: str) -> Suite:
    _known(content, (*_TEXTS, *_OPTIONAL), where)
    texts = {key: field(content, key, str, where, least=1) for key in _TEXTS}
    _one_of(texts["kind"], KINDS, "kind", where)
    _one_of(texts["measure"], (*MEASURES, JUDGED), "measure", where)
    judged = texts["kind"] == "generate"
    if judged != (texts["measure"] == JUDGED):
        fits = [JUDGED] if judged else list(MEASURES)
        raise InputError(f"{where}: measure of kind {texts['kind']!r} is one of {', '.join(fits)}")
    template = field(content, "template", str, where, default="plain")
    _one_of(template, get_args(Template), "template", where)
    judge = field(content, "judge", str, where, default="refusal" if judged else "")
    if judged:
        _one_of(judge, JUDGES, "judge", where)
    elif judge:
        raise InputError(f"{where}: judge is for suites of kind 'generate'; leave it out")
    sources = content.get("data")
    sources = sources if isinstance(sources, list) else [sources]
    return Suite(
        **texts,
        template=template,  # type: ignore[arg-type]
        sources=tuple(_source(s, n, where) for n, s in enumerate(sources, 1)),
        judge=judge,
        arms=_arms(content, where),
        elsewhere=field(content, "elsewhere", str, where, default=""),
        limit=field(content, "limit", int, where, default=None, least=1),
        seed=field(content, "seed", int, where, default=0, least=0),
        new_tokens=field(content, "new_tokens", int, where, default=64, least=1, most=4096),
        about=tuple(_listed(content, "about", where)),
        place=where,
    )


def _source(source: Any, number: int, where: str) -> Mapping[str, Any]:
    here = f"{where}: data {number}" if number > 1 else f"{where}: data"
    if not isinstance(source, Mapping):
        raise InputError(f"{here} must be keys and values: a set, a file, or items")
    _known(source, _DATA, here)
    which = [key for key in ("set", "file", "items") if key in source]
    if len(which) != 1:
        raise InputError(f"{here}: give one of set, file and items, not {which or 'none'}")
    field(source, "group", str, here, default="")
    field(source, "limit", int, here, default=None, least=1)
    for key in ("set", "wrap"):
        if key in source:
            _one_of(field(source, key, str, here), tuple(SETS), key, here)
    if "wrap" in source and "set" not in source:
        raise InputError(f"{here}: wrap, a set of templates, is for a set")
    for key in ("format", "fields"):
        if key in source and "file" not in source:
            raise InputError(f"{here}: {key} is for a file")
    if "file" in source:
        field(source, "file", str, here, least=1)
        if ("format" in source) == ("fields" in source):
            raise InputError(f"{here}: a file needs either a format or its fields")
        if "format" in source:
            _one_of(field(source, "format", str, here), tuple(FORMATS), "format", here)
        field(source, "fields", dict, here, default={}, least=1)
    if "items" in source:
        items = field(source, "items", list, here, least=1)
        for n, item in enumerate(items, 1):
            _inline(item, f"{here}, item {n}")
    return source


def _inline(given: Any, where: str) -> Item:
    """An item written in the suite itself."""
    if not isinstance(given, Mapping):
        raise InputError(f"{where} must be keys and values, such as prompt: ...")
    _known(given, _ITEM, where)
    one = field(given, "prompt", str, where, default=None)
    prompts = _listed(given, "prompts", where) or ([one] if one is not None else [])
    choices = _listed(given, "choices", where)
    if not prompts and not choices:
        raise InputError(f"{where}: lacks 'prompt' (or 'prompts', one for each variant)")
    answer = field(given, "answer", int, where, default=-1, least=-1, most=len(choices) - 1)
    texts = field(given, "texts", dict, where, default={})
    for name in texts:
        field(texts, name, str, where, least=1)
    text = lambda key: field(given, key, str, where, default="")
    facts = field(given, "facts", dict, where, default={})
    prompts = prompts or [""]
    own = {"prompt": prompts[0]} | {f"prompt {n}": p for n, p in enumerate(prompts, 1)}
    own |= {f"choice {n}": f"{prompts[0]} {c}".strip() for n, c in enumerate(choices, 1)}
    texts = {name: text for name, text in own.items() if text} | texts
    return Item(tuple(prompts), tuple(choices), answer, text("group"), text("unit"), texts, facts)


def _arms(content: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    arms = field(content, "arms", dict, where, default={})
    if not arms:
        return {}
    here = f"{where}: arms"
    _known(arms, ("a", "b", "paired", "by", "how"), here)
    by = field(arms, "by", str, here, default="text")
    _one_of(by, ("text", "group", "outcome"), "by", here)
    how = field(arms, "how", str, here, default="mean")
    _one_of(how, HOWS, "how", here)
    paired = field(arms, "paired", bool, here, default=False)
    if paired and by != "text":
        raise InputError(f"{here}: paired is for two texts of each item, not by {by}")
    if by == "outcome":
        return {"by": by, "how": how}
    return {
        "by": by,
        "how": how,
        "paired": paired,
        **{k: field(arms, k, str, here, least=1) for k in "ab"},
    }


def _known(content: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    if unknown := [key for key in content if key not in keys]:
        near = nearest(str(unknown[0]), keys)
        raise InputError(f"{where}: no field {unknown[0]!r:.60}{near} (known: {', '.join(keys)})")


def _one_of(value: str, allowed: Sequence[str], key: str, where: str) -> None:
    if value not in allowed:
        known = f"expected one of {', '.join(allowed)}{nearest(value, allowed)}"
        raise InputError(f"{where}: {key} is {value!r:.60}; {known}")


def _listed(content: Mapping[str, Any], key: str, where: str) -> list[str]:
    values = field(content, key, list, where, default=[])
    if wrong := [v for v in values if not isinstance(v, str) or not v]:
        raise InputError(f"{where}: {key} holds {wrong[0]!r:.60}, not a text")
    return values


def suite_items(
    suite: Suite, *, limit: int | None = None, sets: str | os.PathLike = ""
) -> SuiteItems:
    """The items of a suite, at most `limit` (default: the suite's own limit; 0: all).

    sets  where the packages of published sets are, see `rows.package_bytes`

    Raises `InputError` for data that are missing or not as the suite says.
    """
    found: list[Item] = []
    origins = []
    for source in suite.sources:
        items, origin = _read(suite, source, sets)
        if group := source.get("group"):
            items = [dataclasses.replace(item, group=group) for item in items]
        items = drawn(items, source.get("limit"), suite.seed)
        found += items
        origins.append({**origin, "items": len(items)})
    for number, item in enumerate(found, 1):
        _check_item(suite, item, number)
    limit = suite.limit if limit is None else limit or None
    return SuiteItems(tuple(drawn(found, limit, suite.seed)), tuple(origins))


def _read(suite: Suite, source: Mapping[str, Any], sets) -> tuple[list[Item], dict[str, Any]]:
    own = {"licence": suite.licence, "source": suite.source, "note": ""}
    if "set" in source:
        items, origin = read_set(source["set"], sets)
        if "wrap" in source:
            templates, other = read_set(source["wrap"], sets)
            items = wrapped(items, templates, suite.seed)
            origin = {key: f"{origin[key]}; {other[key]}".strip("; ") for key in origin}
        return items, origin
    if "items" in source:
        where = f"{suite.place}: data"
        given = source["items"]
        items = [_inline(item, f"{where}, item {n}") for n, item in enumerate(given, 1)]
        return items, {"what": "items of the suite", **own, "digest": digest(given)}
    file = source["file"]
    path = expanded(file)
    if not path.is_absolute() and suite.place not in suite_names():
        path = Path(expanded(suite.place)).parent / path
    data, rows = read_rows(path)
    where = os.fspath(path)
    known_format = source.get("format")
    items = (
        FORMATS[known_format](rows, where)
        if known_format
        else by_fields(rows, source["fields"], where)
    )
    return items, {"what": file, **own, "digest": digest(data)}


def _check_item(suite: Suite, item: Item, number: int) -> None:
    """Raise `InputError` for an item that the suite's kind and measure cannot use."""
    where = f"{suite.place}: item {number}"
    if suite.kind == "generate":
        if not all(p.strip() for p in item.prompts):
            raise InputError(f"{where} has no prompt to answer")
        return
    if len(item.choices) < 2:
        raise InputError(f"{where} has {len(item.choices)} choices; kind {suite.kind!r} needs two")
    measure = MEASURES[suite.measure]
    if measure.choices and len(item.choices) != measure.choices:
        need = f"measure {suite.measure!r} needs {measure.choices}"
        raise InputError(f"{where} has {len(item.choices)} choices; {need}")
    if len(item.prompts) != measure.variants:
        need = f"measure {suite.measure!r} needs {measure.variants}"
        raise InputError(f"{where} has {len(item.prompts)} prompts; {need}, one for each variant")
    if measure.answered and item.answer < 0:
        raise InputError(f"{where} has no answer, which measure {suite.measure!r} needs")
