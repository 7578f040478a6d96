"""What is known about features: explanations and label material beside coders, and made cards.

known = read_known(coders, cards="cards")
gs.feature_details(..., names=known.names(pairs), examples=known.examples(pairs, tokenizer))
"""

import dataclasses
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gemma_scope_jax.autointerp.explanations import (
    Explanation,
    explained_folder,
    layer_folder,
    read_explanations,
)
from gemma_scope_jax.cards.card_files import FILE, FeatureCards
from gemma_scope_jax.cards.export.anthropic import export_anthropic_json
from gemma_scope_jax.cards.labels import Label, card_label, read_labels
from gemma_scope_jax.coders.coder import Coder, public_name
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.storage.paths import expanded

Pair = tuple[int, int]  # layer, feature
EXAMPLES = 5  # of a feature's cards


@dataclasses.dataclass(frozen=True)
class KnownFeatures:
    """What is known about the features of some coders, by layer; see `read_known`."""

    explanations: Mapping[int, Mapping[int, Explanation]]
    labels: Mapping[int, Sequence[Label]]
    cards: Mapping[int, FeatureCards]

    def names(self, features: Iterable[Pair]) -> dict[Pair, str]:
        """The explanations of the (layer, feature) that have one."""
        found = {(l, f): self.explanations.get(l, {}).get(f) for l, f in features}
        return {pair: entry["text"] for pair, entry in found.items() if entry is not None}

    def examples(self, features: Iterable[Pair], tokenizer: Tokenizer) -> dict[Pair, list]:
        """Texts on which features are active, each its tokens and the activations on them."""
        found = {}
        for layer, feature in features:
            label: Mapping[str, Any] = {}
            if layer in self.cards:
                label = card_label(self.cards[layer], feature, tokenizer, EXAMPLES)
            elif layer in self.labels:
                label = self.labels[layer][feature]
            if some := [(e["tokens"], e["values"]) for e in label.get("examples", ())]:
                found[layer, feature] = some
        return found

    def write_feature_files(
        self, features: Iterable[Pair], tokenizer: Tokenizer, folder: Path
    ) -> bool:
        """Write the files of graph viewers from the cards of these features; whether there were
        any. Raises `InputError` if the folder holds anything else."""
        wanted: dict[int, list[int]] = defaultdict(list)
        for layer, feature in sorted(set(features)):
            if layer in self.cards:
                wanted[layer].append(feature)
        some = {layer: self.cards[layer] for layer in wanted}
        if some:
            export_anthropic_json(some, tokenizer, folder, features=wanted)
        return bool(some) and any(folder.glob("[0-9]*.json"))


def read_known(
    coders: Iterable[Coder], *, explanations: str | os.PathLike = "", cards: str | os.PathLike = ""
) -> KnownFeatures:
    """What is known about the features of `coders`, one a layer, before any of it is needed.

    explanations  a folder with layer_N/explanations.json; default: beside each coder, in whose
                  folder label material is found, too
    cards         a folder made by `gemma-scope cards`, with cards of these coders; none otherwise

    Raises `InputError` for files that cannot be used, and for folders that hold nothing of these
    coders.
    """
    explained, labels, made = {}, {}, {}
    given, found = os.fspath(explanations).rstrip("/"), _made(cards) if cards else {}
    pairs = [(coder, layer) for coder in coders for layer in coder.layers]
    for coder, layer in pairs:
        own = partial(layer_folder, layers=len(coder.layers), layer=layer)
        beside = explained_folder(coder.info)
        if given or beside:
            place = f"{given}/layer_{layer}" if given else own(beside)
            explained[layer] = read_explanations(place, coder.width)
        if coder.info.folder:
            known = read_labels(own(coder.info.folder), coder.width)
            labels |= {} if known is None else {layer: known}
        if (named := (public_name(coder), layer, coder.width)) in found:
            made[layer] = found[named]
    if given and not any(explained.values()):
        what = "layer_N/explanations.json of these coders' layers"
        raise InputError(f"{given}: holds no {what}; `gemma-scope explain` writes them")
    if cards and not made:
        raise InputError(
            f"{cards}: holds cards of {next(iter(found))[0]}, not of these coders; make them "
            "with `gemma-scope cards`"
        )
    return KnownFeatures(explained, labels, made)


def _made(folder: str | os.PathLike) -> dict[tuple[str, int, int], FeatureCards]:
    """The finished cards of one site or of several, by coder, layer and width."""
    place = expanded(folder)
    paths = [place / FILE, place / "cards" / FILE, *sorted(place.glob(f"*/cards/{FILE}"))]
    found = [FeatureCards(path.parent) for path in paths if path.is_file()]
    if not found:
        raise InputError(f"{folder}: holds no feature cards; `gemma-scope cards` makes them")
    return {(m["coder"], m["layer"], m["width"]): c for c in found for m in (c.manifest,)}
