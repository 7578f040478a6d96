"""The core evaluation as SAEBench's documents: one for each coder, and one for all together.

`eval_result_metrics` has SAEBench's groups and names. Four definitions differ from SAEBench 0.6:
"explained_variance" is 1 - FVU (SAEBench's, with a scalar for the mean, is here
"explained_variance_scalar_mean"); "mse" is E||r||^2 (SAEBench divides it by the tokens of a batch
once more); ablation leaves <bos> alone (SAEBench and SAELens set it to zero, too: here
"ce_loss_score_saelens", "kl_div_score_saelens"); and "consistent_activation_heuristic" takes a
piece of a document for a prompt, not a row that several documents share. A number that does not
exist (an ablation that was not run) is -1.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation import figures
from gemma_scope_jax.evaluation.evaluate import EvaluationPlan
from gemma_scope_jax.evaluation.figures import Losses, Metrics, Tally
from gemma_scope_jax.evaluation.geometry import NAMES, Geometry
from gemma_scope_jax.evaluation.results import LOSS_TOKENS, coder_id, saebench_result
from gemma_scope_jax.evaluation.texts import EvaluationText
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.identity import model_identity
from gemma_scope_jax.storage.manifest import digest
from gemma_scope_jax.storage.strict_json import field

CORE, REPLACEMENT = "core", "replacement"


def core_config(
    text: EvaluationText, plan: EvaluationPlan, model: Model, dataset: str, geometry: bool
) -> dict[str, Any]:
    """How a coder is measured (SAEBench's `CoreEvalConfig`, and more): equal configs on the same
    coder give the same figures."""
    identity = model_identity(model)
    size = text.batch_size * text.context_size
    batches = lambda tokens: 0 if tokens is None else -(-tokens // size)  # 0: the whole text
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
            **figures.frequencies(metrics.density),
            "average_max_encoder_cosine_sim": np.nan, "average_max_decoder_cosine_sim": np.nan,
            **({} if geometry is None else geometry.averages()),
            "features": int(metrics.density.size), "dead": metrics.dead, "dense": metrics.dense,
        },
    }  # fmt: skip
    unstructured = {
        "density_histogram": figures.density_histogram(metrics.density),
        "groups": metrics.groups,
        "typical": dataclasses.asdict(typical),
        "warnings": doubts(metrics),
    }
    if coder.multi_layer:
        unstructured["layers"] = [
            {"layer": layer, **dataclasses.asdict(fit), "dead": int((some == 0).sum())}
            for layer, fit, some in zip(coder.layers, metrics.layers, metrics.density)
        ]
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
    groups = {**_preservation(losses), "token_stats": {LOSS_TOKENS: losses.tokens}}
    unstructured = {"coders": [_member(c) for c in coders], "groups": tally.rows()}
    return saebench_result(REPLACEMENT, config, groups, [], None, unstructured, name=name)


def doubts(metrics: Metrics) -> list[str]:
    """A sentence for each figure that no working coder has. Figures that are not finite leave no
    other trace: documents hold -1 in their place."""
    fit, losses, found = metrics.all, metrics.losses, []
    if not np.isfinite(fit.l2_norm_in):
        found.append("activations are not finite numbers: run the model in float32")
    elif not np.isfinite(fit.mse):
        found.append("reconstructions are not finite numbers: the coder is broken")
    elif fit.fvu > 1:
        found.append(
            f"FVU {fit.fvu:.3g}: reconstructions are worse than the mean activation: the coder "
            "diverged in training or was trained too briefly, or was made for another model or "
            "site (see `gemma-scope check`)"
        )
    if losses is not None and losses.tokens and not np.isfinite(losses.spliced):
        found.append("losses with the coder's reconstructions are not finite numbers")
    if fit.l0 == 0:
        found.append("no feature was ever active")
    return found


def check_document(result: Mapping[str, Any], where: Any) -> None:
    """Raise `InputError` unless a document that was read holds the data of tables and plots."""
    field(field(result["eval_result_metrics"], "token_stats", dict, where), LOSS_TOKENS, int, where)
    more = field(result, "eval_result_unstructured", dict, where)
    tables = dict(field(more, "groups", dict, where))
    if not all(isinstance(w, str) for w in field(more, "warnings", list, where, default=[])):
        raise InputError(f"{where}: damaged: its warnings are not texts; delete it")
    if result["eval_type_id"] == CORE:
        histogram = field(more, "density_histogram", dict, where)
        field(histogram, "never", int, where)
        edges, counts = (field(histogram, name, list, where) for name in ("log10_edges", "counts"))
        numbers = all(isinstance(value, int | float) for value in edges + counts)
        if len(edges) != len(counts) + 1 or not numbers:
            raise InputError(f"{where}: damaged: its histogram is broken; delete it")
        tables["layers"] = field(more, "layers", list, where, default=[])
    else:
        field(more, "coders", list, where)
    for kind in tables:
        for row in field(tables, kind, list, where):
            field(row, *(("layer", int) if kind == "layers" else ("name", str)), where)
            for name in row.keys() - {"name"}:
                field(row, name, float, where, default=None)


def replacement_name(coders: Sequence[Coder]) -> str:
    """A name for several coders together: their sites, how many layers, 8 digits of their names."""
    which = digest("\n".join(sorted(map(_member, coders))), 4)
    sites = "-".join(sorted({c.writes for c in coders}))
    layers = len({layer for coder in coders for layer in coder.layers})
    return f"replacement-{sites}-{layers}-layers-{which}"


def _member(coder: Coder) -> str:
    return "/".join(coder_id(coder)) if coder.info.path else coder.kind


def _preservation(losses: Losses | None) -> dict[str, dict[str, Any]]:
    if losses is None:
        losses = Losses(0, np.nan, np.nan)
    kl = {"kl_div_with_sae": losses.kl, "top1_agreement": losses.agreement}
    ce: dict[str, float | None] = {"ce_loss_without_sae": losses.clean, "delta_loss": losses.delta}
    ce["ce_loss_with_sae"] = losses.spliced
    for name, run, score in (
        ("zero", "ablation", "score"),
        ("zero everywhere", "ablation_saelens", "score_saelens"),
        ("mean", "mean_ablation", "score_mean_ablation"),
    ):
        ce[f"ce_loss_with_{run}"], kl[f"kl_div_with_{run}"] = losses.ablation(name)
        ce[f"ce_loss_{score}"] = losses.ce_score(name)
        kl[f"kl_div_{score}"] = losses.kl_score(name)
    known = lambda some: {name: np.nan if v is None else v for name, v in some.items()}
    return {"model_behavior_preservation": known(kl), "model_performance_preservation": known(ce)}


def _features(metrics: Metrics, geometry: Geometry | None, coder: Coder) -> list[dict[str, Any]]:
    """A record for each feature, under SAEBench's names; layer after layer."""
    density = metrics.density
    columns = {"feature_density": density, "consistent_activation_heuristic": metrics.consistency}
    columns |= dict.fromkeys(NAMES.values(), np.full_like(density, np.nan))
    if geometry is not None:
        columns |= {theirs: getattr(geometry, ours) for ours, theirs in NAMES.items()}
    # with the digits of float32
    lists = [[float(f"{v:.8g}") for v in np.ravel(a).tolist()] for a in columns.values()]
    records = [{"index": i} | dict(zip(columns, row)) for i, row in enumerate(zip(*lists))]
    if coder.multi_layer:
        for record in records:
            record["layer"] = coder.layers[record["index"] // coder.width]
    return records
