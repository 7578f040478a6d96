"""The core evaluation of coders as SAEBench's documents: one a coder, one of them all together.

`eval_result_metrics` has SAEBench's groups and names with the definitions of `metrics.py`, which
differ from its own in four: "explained_variance" is 1 - FVU (SAEBench 0.6 takes a scalar for the
mean: here "explained_variance_scalar_mean"), "mse" is E||r||^2 (SAEBench divides it by the tokens
of a batch once more), ablation leaves <bos> alone, as everything here does (SAEBench's and SAELens'
zeros stand at <bos>, too: here "ce_loss_score_saelens", "kl_div_score_saelens"), and a prompt of
"consistent_activation_heuristic" is a piece of a document, not a row that several share. A number
that there is not (no ablation was run) is -1.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation.evaluate import EvaluationPlan
from gemma_scope_jax.evaluation.figures import (
    Losses,
    Metrics,
    Tally,
    density_histogram,
    frequencies,
)
from gemma_scope_jax.evaluation.geometry import Geometry
from gemma_scope_jax.evaluation.metrics import Fit
from gemma_scope_jax.evaluation.results import coder_id, saebench_result
from gemma_scope_jax.evaluation.texts import EvaluationText
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.identity import model_identity
from gemma_scope_jax.storage.manifest import digest
from gemma_scope_jax.storage.strict_json import field

CORE, REPLACEMENT = "core", "replacement"
LOSS_TOKENS = "total_tokens_eval_reconstruction"
WEIGHTS = {  # of a feature's record: SAEBench's name, then ours, and two of our own
    "encoder_bias": "encoder_bias",
    "encoder_norm": "encoder_norm",
    "encoder_decoder_cosine_sim": "encoder_decoder_cosine",
    "max_decoder_cosine_sim": "max_decoder_cosine",
    "max_encoder_cosine_sim": "max_encoder_cosine",
    "decoder_norm": "decoder_norm",
    "threshold": "threshold",
}


def core_config(
    text: EvaluationText, plan: EvaluationPlan, model: Model, dataset: str, geometry: bool
) -> dict[str, Any]:
    """How it is measured (SAEBench's `CoreEvalConfig` and what we have beyond): equal configs on
    the same coder give the same figures."""
    identity = model_identity(model)
    size = text.batch_size * text.context_size
    batches = lambda tokens: 0 if tokens is None else -(-tokens // size)  # 0: all of the text
    loss = text.tokens if plan.loss_tokens is None else plan.loss_tokens
    return {
        "model_name": identity["name"], "llm_dtype": identity["dtype"],
        "batch_size_prompts": text.batch_size,
        "n_eval_reconstruction_batches": batches(loss),
        "n_eval_sparsity_variance_batches": batches(text.tokens), "dataset": dataset,
        "context_size": text.context_size, "compute_kl": loss != 0, "compute_ce_loss": loss != 0,
        "compute_l2_norms": True, "compute_sparsity_metrics": True,
        "compute_variance_metrics": True, "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": geometry,
        "exclude_special_tokens_from_reconstruction": True, "verbose": False,
        "tokens": text.tokens, "loss_tokens": plan.loss_tokens, "document_tokens": text.document,
        "seed": text.seed, "text": text.fingerprint(), "ablations": list(plan.ablations),
        "model_weights": identity["weights"],
    }  # fmt: skip


def core_result(
    metrics: Metrics, geometry: Geometry | None, coder: Coder, config: dict[str, Any]
) -> dict[str, Any]:
    """The document of one coder."""
    fit, typical, losses = metrics.all, metrics.typical, metrics.losses
    groups = {
        **_preservation(losses),
        "reconstruction_quality": {
            "explained_variance": fit.explained_variance,
            "explained_variance_legacy": fit.explained_variance_per_token,
            "mse": fit.mse, "cossim": fit.cosine, "fvu": fit.fvu, "fvu_typical": typical.fvu,
            "mse_per_element": fit.mse_per_element,
            "explained_variance_scalar_mean": fit.explained_variance_scalar_mean,
            "explained_variance_about_zero": fit.explained_variance_about_zero,
            "explained_variance_of_the_rest": fit.explained_variance_of_the_rest,
        },
        "shrinkage": {
            "l2_norm_in": fit.l2_norm_in, "l2_norm_out": fit.l2_norm_out, "l2_ratio": fit.l2_ratio,
            "relative_reconstruction_bias": fit.relative_reconstruction_bias,
        },
        "sparsity": {"l0": fit.l0, "l1": fit.l1, "l0_typical": typical.l0},
        "token_stats": {
            LOSS_TOKENS: 0 if losses is None else losses.tokens,
            "total_tokens_eval_sparsity_variance": fit.tokens, "typical_tokens": typical.tokens,
        },
        "misc_metrics": {
            **frequencies(metrics.density),
            "average_max_encoder_cosine_sim": np.nan, "average_max_decoder_cosine_sim": np.nan,
            **({} if geometry is None else geometry.averages()),
            "features": int(metrics.density.size), "dead": metrics.dead, "dense": metrics.dense,
        },
    }  # fmt: skip
    unstructured = {
        "density_histogram": density_histogram(metrics.density),
        "groups": metrics.groups,
        "typical": dataclasses.asdict(typical),
        "warnings": doubts(metrics),
    }
    if coder.multi_layer:
        unstructured["layers"] = _layer_rows(metrics.layers, coder, metrics.density)
        if geometry is not None and geometry.decoder_norms_by_layer is not None:
            norms = geometry.decoder_norms_by_layer.mean(1, dtype=np.float64)
            unstructured["mean_decoder_norms"] = norms  # [source layer, written layer]
    details = _features(metrics, geometry, coder)
    return saebench_result(CORE, config, groups, details, coder, unstructured)


def replacement_result(
    tally: Tally, coders: Sequence[Coder], config: dict[str, Any], name: str
) -> dict[str, Any]:
    """The document of the model with all coders' reconstructions in place at once."""
    losses = tally.losses()
    assert losses is not None
    stats = {LOSS_TOKENS: losses.tokens}
    groups = {**_preservation(losses), "token_stats": stats}
    members = [_member(c) for c in coders]
    unstructured = {"coders": members, "groups": tally.loss_rows()}
    return saebench_result(REPLACEMENT, config, groups, [], None, unstructured, name=name)


def doubts(metrics: Metrics) -> list[str]:
    """What is so far from what a coder is that its figures must not stand without a word, a
    sentence each. Figures that are not finite have no other trace: documents say -1 for them."""
    fit, losses, found = metrics.all, metrics.losses, []
    if not np.isfinite(fit.l2_norm_in):
        found.append("activations are not finite numbers: run the model in float32")
    elif not np.isfinite(fit.mse):
        found.append("reconstructions are not finite numbers: the coder is broken")
    elif fit.fvu > 1:
        found.append(
            f"FVU {fit.fvu:.3g}: reconstructions are worse than the mean activation: the coder "
            "diverged in training, or is for another model or site (see `gemma-scope check`)"
        )
    if losses is not None and losses.tokens and not np.isfinite(losses.spliced):
        found.append("losses with the coder's reconstructions are not finite numbers")
    if fit.l0 == 0:
        found.append("no feature was ever active")
    return found


def check_document(result: Mapping[str, Any], where: Any) -> None:
    """Raise `InputError` unless a document that was read has what tables and plots are made of."""
    field(field(result["eval_result_metrics"], "token_stats", dict, where), LOSS_TOKENS, int, where)
    more = field(result, "eval_result_unstructured", dict, where)
    tables = [field(more, "groups", dict, where)]
    said = field(more, "warnings", list, where, default=[])
    if not all(isinstance(warning, str) for warning in said):
        raise InputError(f"{where}: damaged: warnings are no texts; delete it")
    if result["eval_type_id"] == CORE:
        histogram = field(more, "density_histogram", dict, where)
        field(histogram, "never", int, where)
        bins = [field(histogram, name, list, where) for name in ("log10_edges", "counts")]
        if len(bins[0]) != len(bins[1]) + 1 or not all(map(_is_number, bins[0] + bins[1])):
            raise InputError(f"{where}: damaged: no histogram in it; delete it")
        tables.append({"layers": field(more, "layers", list, where, default=[])})
    else:
        field(more, "coders", list, where)
    for kind, rows in ((k, rows) for table in tables for k, rows in table.items()):
        fine = isinstance(rows, list) and all(
            isinstance(row, dict)
            and ("name" in row or "layer" in row)
            and all(v is None or _is_number(v) for k, v in row.items() if k != "name")
            for row in rows
        )
        if not fine:
            raise InputError(f"{where}: damaged: no table by {kind} in it; delete it")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def replacement_name(coders: Sequence[Coder]) -> str:
    """A name for several coders together: how many, at what, and 8 digits of which."""
    members = "\n".join(sorted(map(_member, coders)))
    which = digest(members, 4)
    sites = "-".join(sorted({c.writes for c in coders}))
    layers = len({layer for coder in coders for layer in coder.layers})
    return f"replacement-{sites}-{layers}-layers-{which}"


def _member(coder: Coder) -> str:
    return "/".join(coder_id(coder)) if coder.info.path else coder.kind


def _preservation(losses: Losses | None) -> dict[str, dict[str, Any]]:
    if losses is None:
        losses = Losses(0, np.nan, np.nan)
    number = lambda value: np.nan if value is None else value
    behaviour = {
        "kl_div_score": losses.kl_score(), "kl_div_with_ablation": losses.kl_ablated,
        "kl_div_with_sae": losses.kl, "kl_div_score_saelens": losses.kl_score("zero everywhere"),
        "kl_div_with_ablation_saelens": losses.kl_everywhere_ablated,
        "kl_div_score_mean_ablation": losses.kl_score("mean"),
        "kl_div_with_mean_ablation": losses.kl_mean_ablated, "top1_agreement": losses.agreement,
    }  # fmt: skip
    performance = {
        "ce_loss_score": losses.ce_score(), "ce_loss_with_ablation": losses.ablated,
        "ce_loss_with_sae": losses.spliced, "ce_loss_without_sae": losses.clean,
        "ce_loss_score_saelens": losses.ce_score("zero everywhere"),
        "ce_loss_with_ablation_saelens": losses.everywhere_ablated,
        "ce_loss_score_mean_ablation": losses.ce_score("mean"),
        "ce_loss_with_mean_ablation": losses.mean_ablated, "delta_loss": losses.delta,
    }  # fmt: skip
    clean = lambda some: {name: number(value) for name, value in some.items()}
    return {
        "model_behavior_preservation": clean(behaviour),
        "model_performance_preservation": clean(performance),
    }


def _layer_rows(layers: tuple[Fit, ...], coder: Coder, density: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"layer": layer, **dataclasses.asdict(fit), "dead": int((some == 0).sum())}
        for layer, fit, some in zip(coder.layers, layers, density)
    ]


def _features(metrics: Metrics, geometry: Geometry | None, coder: Coder) -> list[dict[str, Any]]:
    """A record a feature, under SAEBench's names; of several layers, layer after layer."""
    columns = {
        "feature_density": metrics.density,
        "consistent_activation_heuristic": metrics.consistency,
    }
    for theirs, our in WEIGHTS.items():
        unknown = np.full_like(metrics.density, np.nan)
        columns[theirs] = unknown if geometry is None else getattr(geometry, our)
    # as many digits as float32 has
    lists = [[float(f"{v:.8g}") for v in np.ravel(a).tolist()] for a in columns.values()]
    records = [
        {"index": i, **dict(zip(columns, values))} for i, values in enumerate(zip(*lists))
    ]  # fmt: skip
    if coder.multi_layer:
        for record in records:
            record["layer"] = coder.layers[record["index"] // coder.width]
    return records
