"""Label material: what lets a person see at a glance what a feature is about.

For each feature: the tokens its decoder row pushes up and down most, a few short snippets of text
on which it is strongest, and how often it fires. It is an excerpt of the feature's card, small
enough to ship: `labels.json.gz` beside a coder keeps it.
"""

import dataclasses
import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gemma_scope_jax.cards.build import build_cards
from gemma_scope_jax.cards.card_files import Example, FeatureCards
from gemma_scope_jax.cards.examples import CardSettings
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.extraction.extract import extract
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.storage.atomic import write_bytes
from gemma_scope_jax.storage.manifest import Format
from gemma_scope_jax.storage.strict_json import field

FILES = ("labels.json.gz", "labels.json")
FORMAT = 1
MOST_BYTES = 1 << 30  # of a file, decompressed
BEFORE, AFTER = 11, 4  # tokens of a snippet around the one on which the feature is strongest

Label = dict[
    str, Any
]  # top_logits, bottom_logits: tokens; examples: {tokens, values, source}; density


def build_labels(
    model: Model,
    coder: SparseCoder,
    tokenizer: Tokenizer,
    texts: Iterable[tuple[str, str]],
    *,
    examples: int = 3,
    logits: int = 10,
    context_size: int = 128,
) -> dict[str, Any]:
    """The label material of every feature of `coder`, as `write_labels` takes it.

    texts: (source, text) pairs; the source is named beside each snippet. They should be long and
        of many kinds, and their licences must let snippets be shipped with the labels.
    examples: snippets a feature, each from another piece of a text, at most `context_size` tokens
        long; logits: tokens listed.
    Raises `InputError` if the coder does not fit the model or the texts are empty.
    """
    named = list(texts)
    if not any(text.strip() for _, text in named):
        raise InputError("no text to take examples from")
    settings = CardSettings(
        top=examples, each=0, before=BEFORE, after=AFTER, groups=1, bins=1, listed=logits
    )
    with tempfile.TemporaryDirectory() as folder:
        store = extract(
            model,
            {"coder": coder},
            tokenizer,
            [text for _, text in named],
            f"{folder}/store",
            seed=None,
            context_size=context_size,
        )
        cards = build_cards(
            store, coder, f"{folder}/cards", model=model, tokenizer=tokenizer, settings=settings
        )
        return labels_of(cards, tokenizer, examples, lambda e: named[e.document][0])


def labels_of(
    cards: FeatureCards,
    tokenizer: Tokenizer,
    examples: int = 3,
    source: Callable[[Example], str] = lambda example: example.source,
) -> dict[str, Any]:
    """The label material of cards: their `examples` strongest examples, control tokens left out."""

    def words(name: str, feature: int) -> list[str]:
        return tokenizer.decode_tokens(cards[name][feature]) if name in cards else []

    def snippet(example: Example) -> dict[str, Any]:
        kept = [(i, v) for i, v in zip(example.ids, example.values) if not tokenizer.special[i]]
        return {
            "tokens": tokenizer.decode_tokens([i for i, _ in kept]),
            "values": [float(f"{v:.3g}") for _, v in kept],
            "source": source(example),
        }

    features = [
        {
            "top_logits": words("top_ids", f),
            "bottom_logits": words("bottom_ids", f),
            "examples": [
                s for e in cards.groups(f)[0].examples[:examples] if (s := snippet(e))["tokens"]
            ],
            "density": round(float(cards["density"][f]), 7),
        }
        for f in range(len(cards))
    ]
    return {"format": FORMAT, "tokens": cards.tokens, "features": features}


# -------------------------------------------------------------------------------------------------
# The file


@dataclasses.dataclass(frozen=True)
class Labels:
    """The label material of a coder: `labels[feature]`."""

    features: list[Label]
    tokens: int  # how many the snippets and densities come from

    def __getitem__(self, feature: int) -> Label:
        return self.features[feature]

    def __len__(self) -> int:
        return len(self.features)


def write_labels(labels: dict[str, Any], folder: str | os.PathLike) -> Path:
    """Write what `build_labels` returned beside a coder, as labels.json.gz; returns its path."""
    text = json.dumps(labels, ensure_ascii=False, separators=(",", ":"))
    path = Path(folder) / FILES[0]
    write_bytes(path, gzip.compress(text.encode(), mtime=0))
    return path


def read_labels(folder: str | os.PathLike, width: int) -> Labels | None:
    """The label material beside a coder of `width` features; None if there is none.

    Raises `InputError` for a file that cannot be understood or is another coder's.
    """
    path = next((p for name in FILES if (p := Path(folder) / name).is_file()), None)
    if path is None:
        return None
    content = _FORMAT.parse(_read(path), path)
    if len(content["features"]) != width:
        raise InputError(
            f"{path}: has {len(content['features'])} features, the coder beside it {width}"
        )
    return Labels(content["features"], content["tokens"])


def _check(content: dict[str, Any], path: Any) -> None:
    features = field(content, "features", list, path)
    field(content, "tokens", int, path, least=0)
    for label in features:  # older files may have examples of special tokens alone, which show none
        if isinstance(label, dict) and isinstance(label.get("examples"), list):
            label["examples"] = [e for e in label["examples"] if not _is_empty(e)]
    if wrong := [i for i, label in enumerate(features) if not _is_label(label)]:
        raise InputError(f"{path}: not the label material of a coder (number {wrong[0]} is none)")


_FORMAT = Format("the label material of a coder", {"format": FORMAT}, _check, "delete it")


def _is_empty(example: Any) -> bool:
    return isinstance(example, dict) and example.get("tokens") == example.get("values") == []


def _read(path: Path) -> bytes:
    """What a plain or compressed file of labels holds. Raises `InputError`."""
    advice = "delete it or download it again"
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)}); {advice}") from None
    if len(data) > MOST_BYTES:
        raise InputError(f"{path}: more than {MOST_BYTES >> 30} GiB are no labels; {advice}")
    return data


def _is_label(label: Any) -> bool:
    """Whether this has the form of a `Label`, so that nothing later trips over it."""

    def strings(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(v, str) for v in value)

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and all(map(number, value))

    return (
        isinstance(label, dict)
        and strings(label.get("top_logits"))
        and strings(label.get("bottom_logits"))
        and number(label.get("density"))
        and isinstance(label.get("examples"), list)
        and all(
            isinstance(e, dict)
            and strings(e.get("tokens"))
            and numbers(e.get("values"))
            and len(e["tokens"]) == len(e["values"]) > 0
            and isinstance(e.get("source"), str)
            for e in label["examples"]
        )
    )
