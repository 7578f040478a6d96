"""Exports cards as SAEDashboard's batch JSON, which Neuronpedia's tools and others read.

    batch-N.json           {model_id, layer, sae_set, sae_id_suffix, features: [...]}, 128 each
    run_settings.json      how the dashboards were made
    skipped_indexes.json   the dead features, which have no dashboard

The correlated neurons are left empty, as they need other activations of the model.
`qualifying_token_index` is the index of the token in `tokens`; the group of the strongest examples
has bin_min and bin_contains -1 and the largest activation as bin_max. Floats have five places.

Source: sae-dashboard 0.8, neuronpedia/neuronpedia_dashboard.py and neuronpedia_converter.py.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gemma_scope_jax.cards.card_files import FeatureCards
from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.coders.directions import written
from gemma_scope_jax.coders.release.catalog import parse_address
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import tracked
from gemma_scope_jax.storage.atomic import new_folder

BATCH = 128  # features per file
ALIGNED = 3  # neurons listed
LONGEST = 120  # characters of a name that becomes a folder's
# Names of facts about the text, and their keys in cards.json.
TEXT_FACTS = {
    "n_prompts_total": "prompts",
    "n_tokens_in_prompt": "prompt_tokens",
    "dataset": "text",
}


def export_saedashboard(
    cards: FeatureCards,
    coder: Coder,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    heads: int | None = None,
) -> None:
    """Write the batches of `cards`. heads: the number of attention heads, for coders at `z`."""
    with new_folder(folder, "run_settings.json") as new:
        about = batch_facts(cards)
        for number, (_, features) in enumerate(batches(cards, coder, tokenizer, heads)):
            _write(new / f"batch-{number}.json", {**about, "features": features})
        _write(new / "run_settings.json", _settings(cards, about))
        skipped = {key: str(about[key]) for key in ("model_id", "layer", "sae_set")}
        dead = np.flatnonzero(np.asarray(cards["largest"]) <= 0).tolist()
        skipped |= {"log_sparsity": -6, "skipped_indexes": dead}
        _write(new / "skipped_indexes.json", skipped)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def batches(
    cards: FeatureCards, coder: Coder, tokenizer: Tokenizer, heads: int | None = None
) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    """The numbers and dashboards of all features but dead ones, 128 at a time."""
    active = np.flatnonzero(np.asarray(cards["largest"]) > 0)
    rows = np.asarray(written(coder, cards.manifest["layer"]))
    for start in tracked(range(0, len(active), BATCH), "dashboards"):
        batch = active[start : start + BATCH].tolist()
        yield batch, [_feature(cards, f, rows[f], tokenizer, heads) for f in batch]


def batch_facts(cards: FeatureCards) -> dict[str, Any]:
    """The names of model, layer and set in Neuronpedia's form."""
    m = cards.manifest
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", str(m["model"]).split("/")[-1]).strip(".-")
    return {
        "model_id": model[:LONGEST] or "unknown",
        "layer": m["layer"],
        "sae_set": set_name(str(m["coder"]), str(m["belongs"][0])),
        "sae_id_suffix": None,
    }


def set_name(coder: str, weights: str) -> str:
    """A unique name of a coder, in letters, digits and dashes: an address of the release, or the
    name of a folder and eight digits of `weights`, as folders may be namesakes."""
    name = re.sub(r"[^a-z0-9]+", "-", coder.lower()).strip("-")
    try:
        parse_address(coder)
    except InputError:
        return f"{name[:LONGEST] or 'coder'}-{weights[:8]}"
    return name


def text_facts(cards: FeatureCards) -> dict[str, Any]:
    """The name and the size of the text that the cards come from."""
    return {name: cards.manifest[key] for name, key in TEXT_FACTS.items()}


def _feature(
    cards: FeatureCards, f: int, row: np.ndarray, tokenizer: Tokenizer, heads: int | None
) -> dict[str, Any]:
    correlated = cards.listed("correlated", f, "pearson", "cosine")
    aligned = np.argsort(-row, kind="stable")[:ALIGNED]
    size = float(np.abs(row).sum()) or 1.0
    largest, counts = float(cards["largest"][f]), cards["histogram"][f]
    by_head: list[float] = []
    if heads and cards.manifest["writes"] == "z":
        norms = np.linalg.norm(row.reshape(heads, -1), axis=-1)
        by_head = rounded(norms / max(float(norms.sum()), 1e-30))
    return {
        "feature_index": f,
        "neuron_alignment_indices": aligned.tolist(),
        "neuron_alignment_values": rounded(row[aligned]),
        "neuron_alignment_l1": rounded(np.abs(row[aligned]) / size),
        "correlated_neurons_indices": [],
        "correlated_neurons_pearson": [],
        "correlated_neurons_l1": [],
        "correlated_features_indices": [i for i, _, _ in correlated],
        "correlated_features_pearson": rounded([r for _, r, _ in correlated]),
        "correlated_features_l1": rounded([c for _, _, c in correlated]),
        **_logits(cards, f, tokenizer),
        "frac_nonzero": round(float(cards["density"][f]), 9),
        "freq_hist_data_bar_values": rounded(_middles(0.0, largest, len(counts))),
        "freq_hist_data_bar_heights": counts.astype(float).tolist(),
        **text_facts(cards),
        "decoder_weights_dist": by_head,
        "activations": _activations(cards, f, tokenizer),
        "vector": [],
    }


def rounded(values: ArrayLike) -> list[float]:
    return np.round(np.asarray(values, np.float64), 5).tolist()


def _middles(low: float, high: float, bins: int) -> np.ndarray:
    return low + (high - low) * (np.arange(bins) + 0.5) / bins


def _logits(cards: FeatureCards, f: int, tokenizer: Tokenizer) -> dict[str, Any]:
    found: dict[str, Any] = {"neg_str": [], "neg_values": [], "pos_str": [], "pos_values": []}
    found |= {"logits_hist_data_bar_heights": [], "logits_hist_data_bar_values": []}
    if "top_ids" in cards:
        for side, end in (("pos", "top"), ("neg", "bottom")):
            found[f"{side}_str"] = tokenizer.decode_tokens(cards[f"{end}_ids"][f])
            found[f"{side}_values"] = rounded(cards[f"{end}_logits"][f])
    if "logit_histogram" in cards:
        heights = cards["logit_histogram"][f]
        low, high = cards["logit_range"][f].tolist()
        found["logits_hist_data_bar_heights"] = heights.astype(float).tolist()
        found["logits_hist_data_bar_values"] = rounded(_middles(low, high, len(heights)))
    return found


def _activations(cards: FeatureCards, f: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    found, groups = [], cards.groups(f)
    for number, group in enumerate(groups):
        share = group.count / max(groups[0].count, 1)
        bins = (-1.0, group.high, -1.0) if number == 0 else (group.low, group.high, share)
        for e in group.examples:
            row = dict(zip(("bin_min", "bin_max", "bin_contains"), rounded(bins)))
            row |= {"tokens": tokenizer.decode_tokens(e.ids), "values": rounded(e.values)}
            found.append(row | {"qualifying_token_index": e.at})
    return found


def _settings(cards: FeatureCards, about: dict[str, Any]) -> dict[str, Any]:
    """The fields of sae-dashboard's `NeuronpediaRunnerConfig` that apply here."""
    s, facts = cards.settings, text_facts(cards)
    return {
        "sae_set": about["sae_set"], "sae_path": str(cards.manifest["coder"]), "outputs_dir": ".",
        "np_sae_id_suffix": None, "np_set_name": None, "from_local_sae": False,
        "sparsity_threshold": -6, "huggingface_dataset_path": facts["dataset"],
        "n_prompts_total": facts["n_prompts_total"],
        "n_tokens_in_prompt": facts["n_tokens_in_prompt"], "n_prompts_in_forward_pass": None,
        "n_features_at_a_time": BATCH, "start_batch": 0, "end_batch": None,
        "n_quantiles": s["groups"], "top_acts_group_size": s["top"],
        "quantile_group_size": s["each"], "use_dfa": False, "model_dtype": "", "sae_dtype": "",
        "model_id": about["model_id"], "layer": about["layer"], "generator": "gemma_scope_jax",
        "tokens_before": s["before"], "tokens_after": s["after"], "logits": cards.manifest["gain"],
    }  # fmt: skip
