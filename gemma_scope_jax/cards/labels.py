"""Label material: what shows at a glance what a feature is about.

For each feature: the tokens whose logits its decoder row raises and lowers most, a few snippets of
text on which it is strongest, and how often it fires. It is an excerpt of the feature's card, small
enough to ship as `labels.json.zst` beside a coder.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gemma_scope_jax.autointerp.explanations import is_number
from gemma_scope_jax.cards.build import build_cards
from gemma_scope_jax.cards.card_files import FeatureCards
from gemma_scope_jax.cards.examples import CardSettings
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.data.whole_files import read_whole
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.extract import extract
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.storage.atomic import write_bytes
from gemma_scope_jax.storage.manifest import Format
from gemma_scope_jax.storage.paths import expanded
from gemma_scope_jax.storage.strict_json import field

FILES = ("labels.json.zst", "labels.json.gz", "labels.json")
FORMAT = 1
LOWERED = 3  # tokens whose logits a feature lowers: they seldom say what it is about
BEFORE, AFTER = 11, 4  # tokens of a snippet around the one on which the feature is strongest

# top_logits, bottom_logits: tokens; examples: {tokens, values, source}; density
Label = dict[str, Any]


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
    """The label material of every feature of `coder`, for `write_labels`.

    texts: (source, text) pairs; the source is shown beside each snippet. They should be long and
        diverse, and their licences must permit shipping snippets.
    examples: snippets per feature, each from another piece of at most `context_size` tokens.
    logits: tokens that are listed.
    Raises `InputError` if the coder does not fit the model or the texts are empty.
    """
    named = list(texts)
    if not any(text.strip() for _, text in named):
        raise InputError("there is no text to take examples from")
    settings = CardSettings(
        top=examples, each=0, before=BEFORE, after=AFTER, groups=1, bins=1, listed=logits
    )
    with tempfile.TemporaryDirectory() as folder:
        out, plain = f"{folder}/store", [text for _, text in named]
        options: dict[str, Any] = {"seed": None, "context_size": context_size}
        store = extract(model, {"coder": coder}, tokenizer, plain, out, **options)
        options = {"model": model, "tokenizer": tokenizer, "settings": settings}
        cards = build_cards(store, coder, f"{folder}/cards", **options)
        sources = [source for source, _ in named]
        features = [card_label(cards, f, tokenizer, examples, sources) for f in range(len(cards))]
        return {"format": FORMAT, "tokens": cards.tokens, "features": features}


def card_label(
    cards: FeatureCards,
    feature: int,
    tokenizer: Tokenizer,
    examples: int,
    sources: Sequence[str] | None = None,
) -> Label:
    """The label material of a feature's cards, with so many of its strongest examples.

    sources: what to call each document; default: its file
    """
    words = lambda key: tokenizer.decode_tokens(cards[key][feature]) if key in cards else []
    label = {"top_logits": words("top_ids"), "bottom_logits": words("bottom_ids")[:LOWERED]}
    snippets = []
    for e in cards.groups(feature)[0].examples[:examples]:
        kept = [(i, v) for i, v in zip(e.ids, e.values) if not tokenizer.special[i]]
        tokens = tokenizer.decode_tokens([i for i, _ in kept])
        values = [float(f"{v:.2g}") for _, v in kept]
        values = [int(v) if v.is_integer() else v for v in values]  # shorter in files
        if tokens:  # others than control tokens
            source = e.source if sources is None else sources[e.document]
            snippets.append({"tokens": tokens, "values": values, "source": source})
    density = round(float(cards["density"][feature]), 7)
    return {**label, "examples": snippets, "density": density}


def write_labels(labels: dict[str, Any], folder: str | os.PathLike) -> Path:
    """Write the result of `build_labels` beside a coder, as labels.json.zst; returns its path."""
    import zstandard

    text = json.dumps(labels, ensure_ascii=False, separators=(",", ":"))
    path = expanded(folder) / FILES[0]
    packed = zstandard.ZstdCompressor(level=22, write_checksum=True).compress(text.encode())
    write_bytes(path, packed)
    return path


def read_labels(folder: str | os.PathLike, width: int) -> list[Label] | None:
    """The label material beside a coder, of each of its `width` features; None if there is none.
    Raises `InputError` for a file that cannot be used or is another coder's."""
    path = next((p for name in FILES if (p := expanded(folder) / name).is_file()), None)
    if path is None:
        return None
    try:
        data = read_whole(path)
    except InputError as error:
        raise InputError(f"{error}; delete it or download it again") from error
    content = _FORMAT.parse(data, path)
    if len(content["features"]) != width:
        raise InputError(
            f"{path}: has {len(content['features'])} features, the coder beside it {width}"
        )
    return content["features"]


def _check(content: dict[str, Any], path: os.PathLike) -> None:
    features = field(content, "features", list, path)
    field(content, "tokens", int, path, least=0)
    is_empty = lambda e: isinstance(e, dict) and e.get("tokens") == e.get("values") == []
    for label in features:  # older files have empty examples, of special tokens alone
        if isinstance(label, dict) and isinstance(label.get("examples"), list):
            label["examples"] = [e for e in label["examples"] if not is_empty(e)]
    if wrong := [i for i, label in enumerate(features) if not _is_label(label)]:
        raise InputError(f"{path}: not the label material of a coder (number {wrong[0]} is wrong)")


_FORMAT = Format("the label material of a coder", {"format": FORMAT}, _check, "delete it")


def _is_label(label: Any) -> bool:
    """Whether this has the form of a `Label`."""
    strings = lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value)
    numbers = lambda value: isinstance(value, list) and all(map(is_number, value))
    return (
        isinstance(label, dict)
        and strings(label.get("top_logits"))
        and strings(label.get("bottom_logits"))
        and is_number(label.get("density"))
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
