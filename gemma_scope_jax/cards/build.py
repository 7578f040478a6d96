"""Makes all cards of a coder, from a feature store or from published examples.

    cards = build_cards(store, coder, "out/cards", model=model, tokenizer=tokenizer)
    cards["largest"][4510], cards.groups(4510)[0].examples

For the arrays see `card_files.py`. The work is in stages, each of which is kept: the same call
resumes an interrupted one, and makes those stages again whose inputs have changed.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_scope_jax.cards.card_files import CardFiles, FeatureCards, Stage
from gemma_scope_jax.cards.correlations import correlate
from gemma_scope_jax.cards.examples import OUTLIER, CardSettings, gather_examples
from gemma_scope_jax.cards.published import read_published
from gemma_scope_jax.coders import directions
from gemma_scope_jax.coders.coder import Coder, public_name, weights_identity
from gemma_scope_jax.data.text_identity import file_digest
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.manifest import name_in_store
from gemma_scope_jax.extraction.store.store import FeatureStore
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.identity import model_identity
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import Progress
from gemma_scope_jax.storage.manifest import digest
from gemma_scope_jax.storage.strict_json import field


def build_cards(
    source: FeatureStore | str | os.PathLike,
    coder: Coder,
    folder: str | os.PathLike,
    *,
    layer: int | None = None,
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
    settings: CardSettings | None = None,
    gain: directions.Gain = "exact",
    compare: Mapping[str, Coder] | None = None,
) -> FeatureCards:
    """Make the cards of every feature of `coder` (of its source layer `layer`) in `folder`.

    source: a feature store, or the path of an examples.safetensors.
    model, tokenizer: for the logit tokens; without them a store's cards have none, and those of
        published examples have the file's.
    compare: other coders by name, whose decoders are searched for similar features.
    Raises `InputError` for a store that lacks the coder or is another model's, and for coders that
    cannot be compared.
    """
    if model is not None and tokenizer is None:
        raise InputError("cards with logit tokens need the model and its tokenizer=")
    settings = settings or CardSettings()
    layer = coder.layers[coder.source(layer)]
    others = compare or {}
    for other in others.values():
        directions.check_comparable(coder, layer, other, same_layer(other, layer))
    weights, k, bins = weights_identity(coder), settings.listed, settings.bins
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    with CardFiles(folder, [weights, layer, "file" if path else "store"]) as files:
        as_published = path is not None and model is None
        files.manifest |= _about(coder, layer, settings, "as published" if as_published else gain)
        made_of: dict[str, Any] = {"settings": dataclasses.asdict(settings), "enormous": OUTLIER}
        if path is not None:
            made_of["from"] = {"examples": file_digest(path)}
            vocab = None if tokenizer is None else len(tokenizer.special)
            files.make("examples", made_of, read_published, path, coder.width, settings, vocab)
        else:
            assert not isinstance(source, str | os.PathLike)
            name = name_in_store(source, coder)
            if model is not None:
                _check_model(source, model)
            made_of["from"] = {"store": digest(source.manifest), "tokens": len(source)}
            made_of["from"]["coder"] = name
            files.make("examples", made_of, _read_store, source, name, layer, settings)
            files.make("correlations", made_of, correlate, source, name, layer, k)
        logits = [weights, gain, k, bins, model and model_identity(model)]
        made = files.manifest.get("stages", {}).get("logits") or []
        if model is None and made[:4] != logits[:4]:
            files.drop("logits")
        if model is not None and tokenizer is not None:
            options = (model, coder, tokenizer, layer, gain, settings)
            files.make("logits", logits, _write_logits, *options)
        files.make("neighbours", [weights, k], _write_neighbours, coder, layer, k)
        compared = [weights, k, {other: weights_identity(c) for other, c in others.items()}]
        files.make("compared", compared, _write_comparisons, coder, layer, others, k)
    return FeatureCards(folder)


def _read_store(
    store: FeatureStore, coder: str, layer: int, settings: CardSettings, stage: Stage
) -> None:
    data = store.manifest["data"]
    names = [os.path.basename(name) for name in data.get("files") or ()] or [data.get("tfds") or ""]
    stage.facts |= {"strongest_only": None, "text": " ".join(names)}
    stage.facts |= {"prompts": store.manifest["documents"], "prompt_tokens": data["context_size"]}
    gather_examples(store, coder, layer, settings, stage)


def _write_logits(
    model: Model,
    coder: Coder,
    tokenizer: Tokenizer,
    layer: int,
    gain: directions.Gain,
    settings: CardSettings,
    stage: Stage,
) -> None:
    """Make `top_ids` to `logit_histogram`, unless the coder does not write to the stream."""
    if coder.writes not in directions.TO_LOGITS:
        return
    F, done = coder.width, 0
    ends = ("top_ids", "top_logits", "bottom_ids", "bottom_logits")
    names, arrays = (*ends, "logit_range", "logit_histogram"), []
    progress, every = Progress(F, "features", what="logits"), np.arange(F)
    options: dict[str, Any] = {"k": settings.listed, "bins": settings.bins, "gain": gain}
    for chunk in directions.extreme_logits(model, coder, tokenizer, every, layer=layer, **options):
        progress.at(done)
        for name, found in zip(names, chunk) if not arrays else ():
            arrays.append(stage.create(name, (F, *found.shape[1:]), found.dtype, 0))
        stop = done + len(chunk[0])
        for array, found in zip(arrays, chunk):
            array[done:stop] = found
        done = stop


def _write_neighbours(coder: Coder, layer: int, k: int, stage: Stage) -> None:
    rows = directions.written(coder, layer)
    ids, cosines = directions.most_similar(rows, None, k, "decoder neighbours")
    stage.put("neighbour_ids", ids)
    stage.put("neighbour_cosines", cosines)


def _write_comparisons(
    coder: Coder, layer: int, others: Mapping[str, Coder], k: int, stage: Stage
) -> None:
    """Make `compared_N_ids`, `_cosines` and `_same` against the decoders of other coders."""
    stage.facts["compared"] = [[name, other.width] for name, other in others.items()]
    if not others:
        return
    mine = directions.written(coder, layer)
    for n, other in enumerate(others.values()):
        theirs = directions.written(other, same_layer(other, layer))
        ids, cosines = directions.most_similar(mine, theirs, k, "neighbours in another coder")
        stage.put(f"compared_{n}_ids", ids)
        stage.put(f"compared_{n}_cosines", cosines)
        same = np.full(len(mine), np.nan, np.float32)
        both = min(len(mine), len(theirs))
        one, another = (directions.unit_rows(rows[:both]) for rows in (mine, theirs))
        same[:both] = (one * another).sum(-1)
        stage.put(f"compared_{n}_same", same)


def same_layer(other: Coder, layer: int) -> int | None:
    """The layer of a coder to compare with another coder's `layer`: the same one, or its only."""
    return layer if layer in other.layers or len(other.layers) > 1 else None


def _check_model(store: FeatureStore, model: Model) -> None:
    """Raise `InputError` for another model's store. The dtype may differ if the weights do not."""
    ours, where = model_identity(model), f"{store.folder}, of its model"
    held = field(store.manifest, "model", dict, f"{store.folder}")
    held = {key: field(held, key, str, where) for key in ours}
    if any(held[key] != value for key, value in ours.items() if key != "dtype"):
        same = held["dtype"] == ours["dtype"]
        hint = "" if same else f"; rounded weights differ, so load the model in {held['dtype']}"
        raise InputError(
            f"{store.folder}: holds features of another model ({', '.join(held.values())}; this is "
            f"{', '.join(ours.values())}){hint}"
        )


def store_dtype(store: FeatureStore) -> str:
    """The dtype of a feature store's model. Raises `InputError` unless float32 or bfloat16."""
    where = f"{store.folder}, of its model"
    dtype = field(field(store.manifest, "model", dict, f"{store.folder}"), "dtype", str, where)
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"{where}: dtype is {dtype!r}, not float32 or bfloat16; extract again")
    return dtype


def _about(coder: Coder, layer: int, settings: CardSettings, gain: str) -> dict[str, Any]:
    about = {key: getattr(coder, key) for key in ("kind", "reads", "writes", "width", "first")}
    about |= {"coder": public_name(coder), "model": coder.info.model_name, "layer": layer}
    return about | {"settings": dataclasses.asdict(settings), "gain": gain}
