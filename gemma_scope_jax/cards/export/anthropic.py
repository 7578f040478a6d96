"""Exports cards as feature files of attribution-graph viewers (Anthropic's, circuit-tracer's).

    features/index.json.gz      {layer: {"filename": ..., "offsets": [F + 1]}}
    features/layer_L.bin        for each feature: its length (4 bytes, little endian), zlib(JSON)
    CANTOR.json                 or one file per feature, CANTOR = (l + f)(l + f + 1) / 2 + f

A viewer fetches bytes offsets[f] to offsets[f + 1] of the layer's file. A histogram has equal bins
from `act_min` to `act_max`; `quantile_values` are the 1st to 99th percentiles of a feature's
activations where it is active.

Source: circuit-tracer 0.5, frontend/feature_models.py and frontend/assets/feature_examples.
"""

import gzip
import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_scope_jax.cards.card_files import FeatureCards
from gemma_scope_jax.cards.export.saedashboard import rounded
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import tracked
from gemma_scope_jax.storage.atomic import check_replaceable, new_folder, write_bytes

BLOCK = 256  # features at a time
TOP = 10  # logits listed
JSON_FILES = "[0-9]*.json"  # whose folder is ours to replace


def cantor(layer: int, feature: int) -> int:
    """The number that identifies a feature in viewers."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def feature_files(
    cards: FeatureCards, tokenizer: Tokenizer, only: Collection[int] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(feature, its file) for all features in order, or `only` some; dead features have no
    examples."""
    layer = cards.manifest["layer"]
    for start in range(0, len(cards), BLOCK):
        stop = min(start + BLOCK, len(cards))
        block = [f for f in range(start, stop) if only is None or f in only]
        percentiles = cards.percentiles(slice(start, stop)) if block else ()
        for f in block:
            file = {
                "transcoder_id": str(cards.manifest["coder"]),
                "index": cantor(layer, f),
                "examples_quantiles": _quantiles(cards, f, tokenizer),
                "top_logits": _tokens(cards, "top_ids", f, tokenizer),
                "bottom_logits": _tokens(cards, "bottom_ids", f, tokenizer),
                "act_min": 0.0,
                "act_max": round(float(cards["largest"][f]), 5),
                "quantile_values": rounded(percentiles[f - start]),
                "histogram": cards["histogram"][f].astype(float).tolist(),
                "activation_frequency": float(cards["density"][f]),
            }
            yield f, file


def _tokens(cards: FeatureCards, name: str, f: int, tokenizer: Tokenizer) -> list[str]:
    return tokenizer.decode_tokens(cards[name][f][:TOP]) if name in cards else []


def _quantiles(cards: FeatureCards, f: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The groups of examples; an example in an earlier group is marked as repeated."""
    found, seen = [], set()
    for number, group in enumerate(cards.groups(f)):
        examples = []
        for e in group.examples:
            place = (e.document, e.position)
            examples.append(
                {
                    "tokens_acts_list": rounded(e.values),
                    "train_token_ind": e.at,
                    "is_repeated_datapoint": place in seen,
                    "tokens": tokenizer.decode_tokens(e.ids),
                }
            )
            seen.add(place)
        name = "Top activations" if number == 0 else f"Subsample, {group.name} of the largest"
        if examples:
            found.append({"quantile_name": name, "examples": examples})
    return found


def _text(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode()


def export_anthropic(
    coders: Mapping[int, FeatureCards], tokenizer: Tokenizer, folder: Path
) -> None:
    """Write the cards of one or several layers in packed form: `folder`/features."""
    index = {}
    with new_folder(folder / "features", "index.json.gz") as new:
        for layer, cards in sorted(coders.items()):
            offsets, features = [0], feature_files(cards, tokenizer)
            with open(new / f"layer_{layer}.bin", "wb") as file:
                for _, value in tracked(features, "feature files", len(cards)):
                    data = zlib.compress(_text(value))
                    file.write(len(data).to_bytes(4, "little") + data)
                    offsets.append(offsets[-1] + 4 + len(data))
            index[str(layer)] = {"filename": f"layer_{layer}.bin", "offsets": offsets}
        write_bytes(new / "index.json.gz", gzip.compress(_text(index), mtime=0))  # type: ignore[arg-type]


def check_json_folder(folder: Path) -> None:
    """Raise `InputError` if `export_anthropic_json` would find something else in the folder."""
    check_replaceable(folder.absolute(), JSON_FILES)


def export_anthropic_json(
    coders: Mapping[int, FeatureCards],
    tokenizer: Tokenizer,
    folder: Path,
    features: Mapping[int, Collection[int]] | None = None,
) -> None:
    """Write one JSON file per feature that is not dead, named by its `cantor` number; features: of
    each layer only these."""
    with new_folder(folder, JSON_FILES) as new:
        for layer, cards in sorted(coders.items()):
            only = None if features is None else set(features.get(layer, ()))
            count = len(cards) if only is None else len(only)
            files = feature_files(cards, tokenizer, only)
            for f, value in tracked(files, "feature files", count):
                if value["act_max"] > 0:
                    (new / f"{cantor(layer, f)}.json").write_bytes(_text(value))
