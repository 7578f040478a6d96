"""All cards of a coder in one go, from a feature store or from published examples.

    cards = build_cards(store, coder, "out/cards", model=model, tokenizer=tokenizer)
    cards["largest"][4510], cards.groups(4510)[0].examples

What each array holds: see `card_files.py`. The work is in stages, each of which is kept; the same
call goes on where an earlier one was stopped, and makes anew what was made of other things.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_scope_jax.cards import decoders
from gemma_scope_jax.cards.card_files import CardFiles, FeatureCards
from gemma_scope_jax.cards.correlations import correlate
from gemma_scope_jax.cards.examples import OUTLIER, CardSettings, gather_examples
from gemma_scope_jax.cards.published import read_published
from gemma_scope_jax.coders.coder import Coder, public_name, weights_identity
from gemma_scope_jax.coders.directions import Gain
from gemma_scope_jax.data.text_identity import file_digest
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.manifest import name_in_store
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.identity import model_identity
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.storage.manifest import digest
from gemma_scope_jax.storage.strict_json import field


def build_cards(
    source: Any,
    coder: Coder,
    folder: str | os.PathLike,
    *,
    layer: int | None = None,
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
    settings: CardSettings | None = None,
    gain: Gain = "exact",
    compare: Mapping[str, Coder] | None = None,
) -> FeatureCards:
    """Make the cards of every feature of `coder` (of its source layer `layer`) in `folder`.

    source: a feature store, or the path of an examples.safetensors.
    model, tokenizer: for the logit tokens; without them a store's cards have none, and those of
        published examples have the file's.
    compare: other coders by name, whose decoders are looked through for similar features.
    Raises `InputError` for a store that lacks the coder or is another model's, and for coders that
    cannot be compared.
    """
    if model is not None and tokenizer is None:
        raise InputError("cards with logit tokens need the model and its tokenizer=")
    settings = settings or CardSettings()
    layer = coder.layers[coder.source(layer)]
    others = compare or {}
    for other in others.values():
        decoders.check_comparable(coder, layer, other, same_layer(other, layer))
    weights, from_file = weights_identity(coder), isinstance(source, str | os.PathLike)
    with CardFiles(folder, [weights, layer, "file" if from_file else "store"]) as files:
        _make(
            files,
            source,
            coder,
            weights,
            layer,
            model=model,
            tokenizer=tokenizer,
            settings=settings,
            gain=gain,
            others=others,
        )
    return FeatureCards(folder)


def _make(
    files: CardFiles,
    source: Any,
    coder: Coder,
    weights: str,
    layer: int,
    *,
    model: Model | None,
    tokenizer: Tokenizer | None,
    settings: CardSettings,
    gain: Gain,
    others: Mapping[str, Coder],
) -> None:
    """Make the stages that are not there."""
    from_file = isinstance(source, str | os.PathLike)
    as_published = from_file and model is None
    files.manifest |= _about(coder, layer, settings, "as published" if as_published else gain)
    if from_file:
        origin: dict[str, Any] = {"examples": file_digest(Path(source))}
        name = ""
    else:
        name = name_in_store(source, coder)
        if model is not None:
            _check_model(source, model)
        origin = {"store": digest(source.manifest), "tokens": len(source), "coder": name}
    made_of = {"from": origin, "settings": dataclasses.asdict(settings), "enormous": OUTLIER}

    if not files.has("examples", made_of):
        with files.stage("examples", made_of) as stage:
            if from_file:
                vocab = None if tokenizer is None else len(tokenizer.special)
                read_published(Path(source), coder.width, settings, stage, vocab)
            else:
                stage.facts |= {"strongest_only": None, **_text(source.manifest)}
                gather_examples(source, name, layer, settings, stage)
    k = settings.listed
    context = lambda stage: decoders.CardContext(stage, settings)
    if not from_file and not files.has("correlations", made_of):
        with files.stage("correlations", made_of) as stage:
            correlate(source, name, layer, k, stage)
    logits = [weights, gain, k, settings.bins, model and model_identity(model)]
    if model is None and (files.manifest.get("stages", {}).get("logits") or [])[:4] != logits[:4]:
        files.drop("logits")
    if model is not None and tokenizer is not None and not files.has("logits", logits):
        with files.stage("logits", logits) as stage:
            decoders.write_logits(model, coder, tokenizer, layer, gain, context(stage))
    if not files.has("neighbours", [weights, k]):
        with files.stage("neighbours", [weights, k]) as stage:
            decoders.write_neighbours(coder, layer, context(stage))
    compared = [weights, k, {other: weights_identity(c) for other, c in others.items()}]
    if not files.has("compared", compared):
        with files.stage("compared", compared) as stage:
            stage.facts["compared"] = [[other, c.width] for other, c in others.items()]
            for number, other in enumerate(others.values()):
                theirs = same_layer(other, layer)
                decoders.write_comparison(coder, layer, other, theirs, number, context(stage))


def same_layer(other: Coder, layer: int) -> int | None:
    """The layer of a coder that is compared with another one's `layer`: the same, or its only."""
    return layer if layer in other.layers or len(other.layers) > 1 else None


def _check_model(store: Any, model: Model) -> None:
    """Refuse another model's store; the dtype that it was run in may differ, if no weight does."""
    ours, where = model_identity(model), f"{store.folder}, of its model"
    held = field(store.manifest, "model", dict, f"{store.folder}")
    held = {key: field(held, key, str, where) for key in ours}
    if any(held[key] != value for key, value in ours.items() if key != "dtype"):
        same = held["dtype"] == ours["dtype"]
        hint = "" if same else f"; rounded weights are others, so load the model in {held['dtype']}"
        raise InputError(
            f"{store.folder}: holds features of another model ({', '.join(held.values())}; this is "
            f"{', '.join(ours.values())}){hint}"
        )


def store_dtype(store: Any) -> str:
    """The dtype of the model that filled a feature store. Raises `InputError` for another than
    float32 and bfloat16."""
    where = f"{store.folder}, of its model"
    dtype = field(field(store.manifest, "model", dict, f"{store.folder}"), "dtype", str, where)
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"{where}: dtype is {dtype!r}, not float32 or bfloat16; extract again")
    return dtype


def _about(coder: Coder, layer: int, settings: CardSettings, gain: str) -> dict[str, Any]:
    return {
        "coder": public_name(coder),
        "model": coder.info.model_name,
        "kind": coder.kind,
        "layer": layer,
        "reads": coder.reads,
        "writes": coder.writes,
        "width": coder.width,
        "first": coder.first,
        "settings": dataclasses.asdict(settings),
        "gain": gain,
    }


def _text(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a store's text is called, how many documents it has and how long its pieces are."""
    data = manifest["data"]
    names = [os.path.basename(name) for name in data.get("files") or ()] or [data.get("tfds") or ""]
    return {
        "text": " ".join(names),
        "prompts": manifest["documents"],
        "prompt_tokens": data["context_size"],
    }
