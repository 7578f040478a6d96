"""What is known about features: explanations and label material beside coders, and made cards.

known = read_known(coders, cards="cards")
gs.feature_details(..., names=known.names(pairs), examples=known.examples(pairs, tokenizer))
"""

import dataclasses
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_scope_jax.autointerp.explanations import (
    Explanation,
    explained_folder,
    layer_folder,
    read_explanations,
)
from gemma_scope_jax.cards.card_files import FILE, FeatureCards
from gemma_scope_jax.cards.export.anthropic import check_json_folder, export_anthropic_json
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

    def check_feature_folder(self, folder: Path) -> None:
        """Raise `InputError` if `write_feature_files` would refuse the folder."""
        if self.cards:
            check_json_folder(folder)

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

    explanations  a folder with layer_N/explanations.json, or, for one layer, explanations.json;
                  default: beside each coder, in whose folder label material is found, too
    cards         a folder made by `gemma-scope cards`, with cards of these coders; none otherwise

    Raises `InputError` for files that cannot be used, folders that hold nothing of these coders,
    and cards of a namesake.
    """
    explained, labels, made = {}, {}, {}
    given, found = os.fspath(explanations), _made(cards) if cards else []
    pairs = [(coder, layer) for coder in coders for layer in coder.layers]
    for coder, layer in pairs:
        explained[layer] = explained_layer(coder, layer, given, len(pairs))
        if coder.info.folder:
            own = layer_folder(coder.info.folder, len(coder.layers), layer)
            known = read_labels(own, coder.width)
            labels |= {} if known is None else {layer: known}
        if own_cards := _cards_of(coder, layer, found):
            made[layer] = own_cards[0]
    if given and not any(explained.values()):
        several = any(len(coder.layers) > 1 for coder, _ in pairs)  # explained below --out
        place = given if several else f"{given.rstrip('/')}/layer_N"
        raise InputError(
            f"{given}: holds no layer_N/explanations.json of these coders' layers; explain each "
            f"coder with `gemma-scope explain --out {place}`"
        )
    if cards and not made:
        raise InputError(
            f"{cards}: holds cards of {found[0].manifest['coder']}, not of these coders; make "
            "them with `gemma-scope cards`"
        )
    return KnownFeatures(explained, labels, made)


def explained_layer(
    coder: Coder, layer: int, given: str = "", layers: int = 1
) -> dict[int, Explanation]:
    """The explanations of a layer's features: beside the coder, or in `given`, a folder that
    explains so many layers; of one layer it is also layer_N's own folder, or a file."""
    if not given:
        place = explained_folder(coder.info)
        own = layer_folder(place, len(coder.layers), layer)
        return read_explanations(own, coder.width) if place else {}
    below = layer_folder(given, 2, layer)
    if layers > 1:
        if given.endswith(".json"):
            raise InputError(f"{given}: explains one layer; for several, give the folder of all")
        return read_explanations(below, coder.width)
    return read_explanations(given, coder.width) or read_explanations(below, coder.width)


def _made(folder: str | os.PathLike) -> list[FeatureCards]:
    """The finished cards of one site or of several."""
    place = expanded(folder)
    paths = [place / FILE, place / "cards" / FILE, *sorted(place.glob(f"*/cards/{FILE}"))]
    found = [FeatureCards(path.parent) for path in paths if path.is_file()]
    if not found:
        raise InputError(f"{folder}: holds no feature cards; `gemma-scope cards` makes them")
    return found


def _cards_of(coder: Coder, layer: int, found: Sequence[FeatureCards]) -> list[FeatureCards]:
    """The cards of a layer of `coder` among those `found`, or none. Raises `InputError` if two
    folders hold them, and for cards of a namesake only."""
    ours = {"coder": public_name(coder), "layer": layer, "width": coder.width}
    named = [cards for cards in found if ours.items() <= cards.manifest.items()]
    own = [cards for cards in named if not _difference(coder, cards.manifest)]
    if len(own) > 1:
        raise InputError(
            f"{own[0].folder} and {own[1].folder} both hold cards of {ours['coder']}, layer "
            f"{layer}; give a folder with one of them"
        )
    if named and not own:
        difference = _difference(coder, named[0].manifest)
        raise InputError(
            f"{named[0].folder}: holds cards of another coder that is called {ours['coder']}: "
            f"{difference}; make cards of this coder with `gemma-scope cards`"
        )
    return own


def _difference(coder: Coder, manifest: Mapping[str, Any]) -> str:
    """What tells a coder from the namesake that cards were made of; "" for the same coder."""
    ours = {key: getattr(coder, key) for key in ("kind", "reads", "writes", "first")}
    if coder.info.model_name and manifest["model"]:
        ours["model"] = coder.info.model_name
    plain = lambda value: str(value).removeprefix("google/")
    for key, value in ours.items():
        theirs = manifest.get(key, value)
        if plain(theirs) != plain(value):
            return f"its {key} is {theirs}, not {value}"
    return ""
