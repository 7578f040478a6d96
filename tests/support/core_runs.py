"""Small core evaluations of two coders, whole or killed."""

from functools import partial

import pytest

from coders import random_coder
from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.data.documents import TextData
from gemma_scope_jax.evaluation import core_run
from gemma_scope_jax.evaluation.core import core_config
from gemma_scope_jax.evaluation.core_run import evaluate_core
from gemma_scope_jax.evaluation.evaluate import EvaluationPlan
from gemma_scope_jax.evaluation.results import read_result, result_path
from gemma_scope_jax.evaluation.texts import EvaluationText
from letters import Letters

D, F = 32, 48


CORE_NAMES = {  # what SAEBench's core schema requires
    "model_behavior_preservation": ["kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"],
    "model_performance_preservation": [
        "ce_loss_score",
        "ce_loss_with_ablation",
        "ce_loss_with_sae",
        "ce_loss_without_sae",
    ],
    "reconstruction_quality": ["explained_variance", "explained_variance_legacy", "mse", "cossim"],
    "shrinkage": ["l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"],
    "sparsity": ["l0", "l1"],
    "token_stats": ["total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"],
    "misc_metrics": [
        "freq_over_1_percent",
        "freq_over_10_percent",
        "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent",
        "average_max_encoder_cosine_sim",
        "average_max_decoder_cosine_sim",
        "frac_alive",
    ],
}


DETAIL_NAMES = {
    "index",
    "feature_density",
    "consistent_activation_heuristic",
    "encoder_bias",
    "encoder_norm",
    "encoder_decoder_cosine_sim",
    "max_decoder_cosine_sim",
    "max_encoder_cosine_sim",
}


coder = partial(random_coder, info=CoderInfo(l0=10.0))


def setup(model, text, loss_tokens=150):
    data = EvaluationText(
        TextData(files=(f"{text}/*.txt",)), Letters(), tokens=400, batch_size=2, context_size=32
    )
    plan = EvaluationPlan(
        loss_tokens=loss_tokens, ablations=("zero", "mean"), positions=True, groups=data.groups
    )
    return data, plan, core_config(data, plan, model, "fruit", True)


def written(out, results):
    """The documents as they are in the folder."""
    names = [(r["eval_type_id"], r["sae_lens_release_id"], r["sae_lens_id"]) for r in results]
    return [read_result(result_path(out, *name)) for name in names]


class Killed(Exception):
    pass


def kill_after(monkeypatch, at):
    """The stages of the steps that are run; the process ends after `at` of them."""
    real, steps = core_run._After.__call__, []

    def step(self, sums, stage, tokens):
        real(self, sums, stage, tokens)
        steps.append(stage)
        if len(steps) == at:
            raise Killed

    monkeypatch.setattr(core_run._After, "__call__", step)
    return steps


def goes_on(measured, model, text, folder):
    """Run twice, the first being killed: the result is that of a run that was not."""
    whole, coders, results = measured
    data, plan, config = setup(model, text)
    out = str(folder)
    with pytest.raises(Killed):
        evaluate_core(model, coders, data, plan, config, out, replacement=True)
    assert len(list(folder.glob("partial-*.npz"))) == 1
    again = evaluate_core(model, coders, data, plan, config, out, replacement=True)
    assert not list(folder.glob("partial-*"))
    for one, two in zip(written(whole, results), written(out, again), strict=True):
        for name in ("eval_result_metrics", "eval_result_details", "eval_result_unstructured"):
            assert one[name] == two[name]


# What figures are checked for, besides: of 64 features, as no other dimension is.
MEASURED = {
    "sae": random_coder(64),
    "skip_transcoder": random_coder(
        64, seed=1, skip=True, layer=3, reads="mlp_in", writes="mlp_out", first=3
    ),
}
