"""A user's data file as items: in the layout in which a set was published, or by named columns.

Sets that no package carries are read from the file that their authors publish.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma_scope_jax.behaviour.suites.items import Item
from gemma_scope_jax.behaviour.suites.rows import Row, text_of, value_of
from gemma_scope_jax.behaviour.suites.sets import bbq_item
from gemma_scope_jax.errors import InputError, nearest, reason
from gemma_scope_jax.storage.strict_json import parse_json

FIELDS = ("prompt", "choices", "answer", "group", "unit", "a", "b")

Reader = Callable[[Sequence[Row], str], list[Item]]


def _requests(column: str, group: str | None = None, by: str = "") -> Reader:
    """Prompts in one column; the group is fixed or the value of the column `by`."""

    def read(rows: Sequence[Row], where: str) -> list[Item]:
        found = []
        for n, row in enumerate(rows, 1):
            prompt = text_of(row, column, where, n)
            named = group if group is not None else text_of(row, by, where, n)
            found.append(Item((prompt,), group=named, texts={"prompt": prompt}))
        return found

    return read


def _xstest(rows: Sequence[Row], where: str) -> list[Item]:
    """XSTest: the unsafe prompts have a type that begins with "contrast"."""
    found = []
    for n, row in enumerate(rows, 1):
        prompt, kind = text_of(row, "prompt", where, n), text_of(row, "type", where, n)
        group = "unsafe" if kind.startswith("contrast") else "safe"
        found.append(Item((prompt,), group=group, texts={"prompt": prompt}, facts={"type": kind}))
    return found


def _harmbench(rows: Sequence[Row], where: str) -> list[Item]:
    """HarmBench's behaviours; those with a context have it before the request."""
    found = []
    for n, row in enumerate(rows, 1):
        prompt = text_of(row, "Behavior", where, n)
        context = str(row.get("ContextString") or "").strip()
        prompt = f"{context}\n\n---\n\n{prompt}" if context else prompt
        facts = {"category": row.get("SemanticCategory", "")}
        found.append(Item((prompt,), group="harmful", texts={"prompt": prompt}, facts=facts))
    return found


def _bbq(rows: Sequence[Row], where: str) -> list[Item]:
    """BBQ as published: a line of JSON a question, with its polarity and the stereotyped group."""
    found = []
    for n, row in enumerate(rows, 1):
        get = lambda key, row=row, n=n: text_of(row, key, where, n)
        choices = tuple(get(f"ans{i}") for i in range(3))
        label = value_of(row, "label", where, n)
        if label not in (0, 1, 2) or isinstance(label, bool):
            raise InputError(f"{where}, row {n}: label is {label!r:.40}, not 0, 1 or 2")
        facts: dict[str, Any] = {
            key: get(key) for key in ("question_polarity", "context_condition", "category")
        }
        facts["target"] = _target(row, where, n)
        found.append(bbq_item(get("context"), get("question"), choices, label, facts))
    return found


def _target(row: Row, where: str, number: int) -> int:
    """The answer that names the stereotyped group; -1 if none or several do."""
    try:
        groups = [g.lower() for g in row["additional_metadata"]["stereotyped_groups"]]
        named = [row["answer_info"][f"ans{i}"] for i in range(3)]
    except (KeyError, TypeError, AttributeError) as error:
        why = f"answer_info or additional_metadata is not as published ({reason(error)})"
        raise InputError(f"{where}, row {number}: {why}") from error
    about = [{str(part).lower().removeprefix("m-").removeprefix("f-") for part in a} for a in named]
    hit = [i for i, parts in enumerate(about) if parts & set(groups)]
    return hit[0] if len(hit) == 1 else -1


def _truthfulqa(rows: Sequence[Row], where: str) -> list[Item]:
    """TruthfulQA.csv: the best answer against the incorrect ones (MC1)."""
    found = []
    for n, row in enumerate(rows, 1):
        question, best = (text_of(row, key, where, n) for key in ("Question", "Best Answer"))
        wrong = text_of(row, "Incorrect Answers", where, n).split(";")
        choices = (best.strip(), *(w.strip() for w in wrong if w.strip()))
        prompt = f"Question: {question}\nAnswer:"
        texts = {"prompt": prompt, "true": f"{prompt} {best}", "false": f"{prompt} {choices[1]}"}
        found.append(Item((prompt,), choices, 0, str(row.get("Category", "")), texts=texts))
    return found


FORMATS: dict[str, Reader] = {
    "xstest": _xstest,
    "advbench": _requests("goal", "harmful"),
    "strongreject": _requests("forbidden_prompt", "harmful"),
    "harmbench": _harmbench,
    "jailbreakbench": _requests("Goal", by="Category"),
    "bbq": _bbq,
    "truthfulqa": _truthfulqa,
}


def by_fields(rows: Sequence[Row], fields: Mapping[str, Any], where: str) -> list[Item]:
    """Items of columns that a suite names.

    prompt   the column of the prompt
    choices  a list of columns, or the one column that holds a list (JSON, or one a line)
    answer   the column of the right choice: its number, counted from 0, or its text
    group, unit  columns of names
    a, b     columns of whole texts: of a pair, and of the two arms of the contrast
    """
    if unknown := set(fields) - set(FIELDS):
        name = min(unknown)
        known = f"known are {', '.join(FIELDS)}{nearest(name, FIELDS)}"
        raise InputError(f"{where}: no field {name!r}; {known}")
    return [_item(row, fields, where, n) for n, row in enumerate(rows, 1)]


def _item(row: Row, fields: Mapping[str, Any], where: str, number: int) -> Item:
    get = lambda name: text_of(row, fields[name], where, number) if name in fields else ""
    prompt, pair = get("prompt"), tuple(get(name) for name in ("a", "b") if name in fields)
    choices = _choices(row, fields["choices"], where, number) if "choices" in fields else ()
    if not choices and len(pair) == 2 and "prompt" not in fields:
        choices = pair
    answer = -1
    if "answer" in fields:
        answer = _answer(value_of(row, fields["answer"], where, number), choices, where, number)
    texts = {name: get(name) for name in ("prompt", "a", "b") if name in fields}
    return Item((prompt,), choices, answer, get("group"), get("unit"), texts)


def _choices(row: Row, columns: Any, where: str, number: int) -> tuple[str, ...]:
    if isinstance(columns, list):
        return tuple(text_of(row, name, where, number) for name in columns)
    value = value_of(row, columns, where, number)
    if isinstance(value, str):
        here = f"{where}, row {number}"
        value = parse_json(value, here) if value.lstrip().startswith("[") else value.split("\n")
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise InputError(f"{where}, row {number}: {columns} is not a list of texts")
    return tuple(re.sub(r"^[A-Z][.)] ", "", v).strip() for v in value)


def _answer(value: Any, choices: Sequence[str], where: str, number: int) -> int:
    if isinstance(value, str) and value.strip() in choices:
        return list(choices).index(value.strip())
    try:
        found = int(value)
    except (TypeError, ValueError):
        found = -1
    if not 0 <= found < len(choices):
        said = f"the answer {json.dumps(value)[:60]} is neither a choice nor its number"
        raise InputError(f"{where}, row {number}: {said} (0 to {len(choices) - 1})")
    return found
