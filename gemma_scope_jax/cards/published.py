"""Cards from the `examples.safetensors` that the release has beside many coders.

    tokens [S, T]                                  ids of sequences
    activations, seq_ids, positions [F, N]         the N strongest, descending; padded with 0
    logit_effects [F, N]                           effect of an example on the next token; unused
    feature_frequencies [F]                        share of tokens on which a feature is active
    top_tokens, top_logits, bottom_tokens, bottom_logits [F, 10]

Only the strongest activations are known: histograms, random examples and the values in windows are
limited to these, and there are no correlations.

Source: the layout as described by users of the release, with any dtypes.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from gemma_scope_jax.cards.card_files import Stage
from gemma_scope_jax.cards.examples import Best, CardSettings, Sample, SegmentActivations, windows
from gemma_scope_jax.coders.coder import Coder, public_name
from gemma_scope_jax.coders.release.catalog import parse_address
from gemma_scope_jax.coders.release.hub import fetch_file
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.progress import tracked
from gemma_scope_jax.storage.safetensors_files import open_safetensors

FILE = "examples.safetensors"
BLOCK = 2048  # features at a time
PER_FEATURE = ("activations", "seq_ids", "positions")
LOGITS = ("top_tokens", "top_logits", "bottom_tokens", "bottom_logits")


def find_examples(coder: Coder) -> Path:
    """The file beside a coder, fetched if the coder came from the hub. Raises `InputError` if there
    is none."""
    path: Path | None = Path(coder.info.folder) / FILE
    if coder.info.folder and path.is_file():
        return path
    is_published = coder.info.path.startswith("gemma-scope-2-")
    path = fetch_file(parse_address(coder.info.path), FILE) if is_published else None
    if path is None:
        why = "no examples are published beside it: give text or a feature store"
        raise InputError(f"{public_name(coder)}: {why}")
    return path


def read_published(
    path: Path, width: int, settings: CardSettings, vocab: int | None, stage: Stage
) -> None:
    """Make the arrays `density` to `example_values`, and the logit tokens if the file has them.

    vocab: the size of the tokenizer's vocabulary, if it is known. Raises `InputError` for a file
    that does not hold examples, or those of another coder or tokenizer.
    """
    with open_safetensors(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
        _check(path, shapes, width)
        tokens = np.asarray(file.get_tensor("tokens"))
        frequency = np.asarray(file.get_tensor("feature_frequencies"), np.float64)
        listed = [np.asarray(file.get_tensor(n)) for n in LOGITS[::2] if n in shapes]
        for ids in (tokens, *listed):
            if ids.size and not (ids.min() >= 0 and ids.max() < (vocab or 1 << 31)):
                raise InputError(
                    f"{path}: has tokens {ids.min()} to {ids.max()}, and the tokenizer {vocab}: it "
                    "is for another one"
                )
        if not (np.isfinite(frequency) & (frequency >= 0)).all():
            raise InputError(f"{path}: feature_frequencies must be numbers from 0 on")
        read = lambda name, start, stop: np.asarray(file.get_slice(name)[start:stop])
        _gather(path, tokens, read, width, settings, stage)
        stage.put("density", frequency)
        stage.facts |= {
            "tokens": None,
            "strongest_only": shapes["activations"][1],
            "text": "the published examples",
            "prompts": len(tokens),
            "prompt_tokens": tokens.shape[1],
        }
        for name in LOGITS if set(LOGITS) <= shapes.keys() else ():
            is_ids, values = name.endswith("tokens"), np.asarray(file.get_tensor(name))
            made = name.replace("tokens", "ids")
            stage.put(made, values.astype(np.int32 if is_ids else np.float32))


def _check(path: Path, shapes: dict[str, tuple[int, ...]], width: int) -> None:
    needed = ("tokens", "feature_frequencies", *PER_FEATURE)
    if missing := [name for name in needed if name not in shapes]:
        raise InputError(f"{path}: not a file of examples: {', '.join(missing)} missing")
    found = shapes["activations"]
    if len(found) != 2 or any(shapes[name] != found for name in PER_FEATURE):
        raise InputError(f"{path}: activations, seq_ids and positions are not all [F, N]")
    if found[0] != width or shapes["feature_frequencies"] != (width,):
        raise InputError(f"{path}: has {found[0]} features, the coder beside it {width}")
    if len(shapes["tokens"]) != 2:
        raise InputError(f"{path}: tokens has shape {list(shapes['tokens'])}, expected [S, T]")


def _gather(
    path: Path,
    tokens: np.ndarray,
    read: Callable[[str, int, int], np.ndarray],
    width: int,
    s: CardSettings,
    stage: Stage,
) -> None:
    create = stage.create
    largest, mean = (create(name, (width,), np.float32, 0) for name in ("largest", "mean"))
    histogram = create("histogram", (width, s.bins), np.int64, 0)
    rows = create("example_rows", (width, s.slots), np.int64, -1)
    ids = create("example_tokens", (width, s.slots, s.window), np.int32, -1)
    values = create("example_values", (width, s.slots, s.window), np.float32, 0)
    documents = create("example_documents", (width, s.slots), np.int64, -1)
    positions = create("example_positions", (width, s.slots), np.int32, -1)
    length = tokens.shape[1]
    sequence = np.repeat(np.arange(len(tokens), dtype=np.int32), length)  # of each token
    for start in tracked(range(0, width, BLOCK), "published examples"):
        here = slice(start, min(start + BLOCK, width))
        activations, sequences, places = (read(n, here.start, here.stop) for n in PER_FEATURE)
        features, slots = np.nonzero(activations > 0)
        values_of = activations[features, slots].astype(np.float32)
        at = sequences.astype(np.int64) * length + places.astype(np.int64)
        at = at[features, slots]
        order = np.lexsort((at, features))
        active = SegmentActivations(features[order].astype(np.int32), at[order], values_of[order])
        if len(active.rows) and not (active.rows.min() >= 0 and active.rows.max() < tokens.size):
            raise InputError(f"{path}: an example is outside the tokens; download it again")
        n = len(activations)
        largest[here] = np.where(activations > 0, activations, 0).max(-1)
        count = np.bincount(active.features, minlength=n)
        total = np.bincount(active.features, active.values, minlength=n)
        mean[here] = total / np.maximum(count, 1)
        top, sample = Best(n, s.top), Sample(largest[here], histogram[here], s, start)
        pieces = active.rows // length
        top.add(active.features, active.values, active.rows, pieces, 0)
        sample.add(active, pieces, 0)
        chosen = rows[here] = np.concatenate([top.rows, sample.rows], -1)
        which, slot = np.nonzero(chosen >= 0)
        place, at = (start + which, slot), chosen[which, slot]
        documents[place], positions[place] = np.divmod(at, length)
        ids[place], values[place] = windows(tokens.ravel(), sequence, active, which, at, s)
