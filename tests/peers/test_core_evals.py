"""The core figures beside SAELens' and SAEBench's own functions, on the same activations.

Both run as they are; what stands behind their model is ours, so that activations and logits are
the same numbers. Where their convention is another, the test says which, and that it is all.
"""

import importlib
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.coders.interop.saelens import save_saelens
from gemma_scope_jax.evaluation.core import core_config, core_result, replacement_result
from gemma_scope_jax.evaluation.evaluate import EvaluationPlan, measure
from gemma_scope_jax.evaluation.figures import frequencies
from gemma_scope_jax.evaluation.geometry import geometry
from gemma_scope_jax.evaluation.texts import EvaluationText
from gemma_scope_jax.model.config import PRESETS
from letters import Letters
from tiny import tiny_model

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore"),  # what the peers warn about is not ours to mend
]
B, T, D, F, LAYER = 6, 20, 32, 64, 1
HOOK = f"blocks.{LAYER}.hook_resid_post"
SAELENS, SAEBENCH = "sae_lens.evals", "sae_bench.evals.core.main"


@pytest.fixture(scope="module")
def model():
    return tiny_model(PRESETS["gemma-3-270m"], layers=3)


@pytest.fixture(scope="module")
def coder():
    """Every position counts (first=0): the peers leave nothing out but special tokens."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape) / D**0.5, jnp.float32)
    return gs.SparseCoder(
        normal(D, F),
        normal(F),
        jnp.abs(normal(F)),
        normal(F, D),
        normal(D),
        layer=LAYER,
        first=0,
        info=CoderInfo("google/gemma-3-270m", "sae"),
    )


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(3)
    return [rng.integers(3, 300, (B, T)).astype(np.int32) for _ in range(2)]


@pytest.fixture(scope="module")
def sae(coder, tmp_path_factory):
    """The coder as SAELens loads it, with SAEBench's names for the parts of its config."""
    from sae_lens import SAE

    folder = tmp_path_factory.mktemp("sae")
    save_saelens(coder, folder)
    found = SAE.load_from_disk(str(folder), device="cpu")
    found.cfg.metadata.hook_name = HOOK
    found.cfg.metadata.hook_head_index = None
    return found


def for_saebench(sae):
    cfg = SimpleNamespace(
        hook_name=HOOK, hook_head_index=None, hook_layer=LAYER, d_sae=F, architecture_str="jumprelu"
    )
    return SimpleNamespace(
        cfg=cfg,
        device=sae.device,
        encode=sae.encode,
        decode=sae.decode,
        W_enc=sae.W_enc,
        W_dec=sae.W_dec,
        b_enc=sae.b_enc,
    )


class OurModel:
    """TransformerLens' interface, as far as the evaluations use it, over our forward pass."""

    def __init__(self, model):
        self.model = model

    def _activation(self, tokens):
        import torch

        out = gs.run(self.model, tokens.numpy(), [gs.capture("resid_post", LAYER)])
        return torch.from_numpy(np.array(out.reads["resid_post"]))

    def _both(self, tokens, intercepts=()):
        import torch

        out = gs.run(self.model, tokens.numpy(), intercepts)
        logits = torch.from_numpy(np.array(out.logits))
        log_p = torch.log_softmax(logits[:, :-1], -1)
        return logits, -log_p.gather(-1, tokens[:, 1:, None].long())[..., 0]

    def run_with_cache(self, tokens, **_):
        return None, {HOOK: self._activation(tokens)}

    def __call__(self, tokens, **_):
        return self._both(tokens)

    def run_with_hooks(self, tokens, *, fwd_hooks, **_):
        ((_, hook),) = fwd_hooks
        value = hook(self._activation(tokens), hook=None).detach().numpy()
        return self._both(tokens, [gs.patch("resid_post", LAYER, value)])


def store_of(batches):
    import torch

    left = iter(batches)
    return SimpleNamespace(get_batch_tokens=lambda *_: torch.from_numpy(next(left)))


def peer(name):
    return importlib.import_module(name)  # `make peers` installs it: missing, it is a failure


def sparsity(name, sae, model, batches):
    """The peer's metrics over the batches, and its records of features."""
    module = peer(name)
    options = dict(
        n_batches=len(batches),
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        eval_batch_size_prompts=B,
        model_kwargs={},
    )
    if name == SAELENS:
        from sae_lens.training.activation_scaler import ActivationScaler

        options["activation_scaler"] = ActivationScaler()
    coder = sae if name == SAELENS else for_saebench(sae)
    return module.get_sparsity_and_variance_metrics(
        coder, OurModel(model), store_of(batches), **options
    )


def ours(model, coder, batches, **plan):
    rows = [(tokens, np.ones_like(tokens)) for tokens in batches]
    return measure(model, [coder], rows, EvaluationPlan(**plan)).tallies[0].metrics()


def close(got, want, rtol=1e-4):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-6)


SHARED = {  # the peers' name: ours
    "l0": "l0",
    "l1": "l1",
    "cossim": "cosine",
    "l2_norm_in": "l2_norm_in",
    "l2_norm_out": "l2_norm_out",
    "l2_ratio": "l2_ratio",
    "explained_variance_legacy": "explained_variance_per_token",
}


@pytest.mark.parametrize("name", [SAELENS, SAEBENCH])
def test_sparsity_and_variance(model, coder, sae, batches, name):
    theirs, features = sparsity(name, sae, model, batches)
    fit = (got := ours(model, coder, batches, loss_tokens=0)).all
    for their_name, our_name in SHARED.items():
        close(getattr(fit, our_name), theirs[their_name])
    close(got.density, features["feature_density"])
    fires = got.density > 0  # a prompt is a row for them; here each row is one document
    close(got.consistency[fires], np.array(features["consistent_activation_heuristic"])[fires])
    if name == SAELENS:
        close(fit.explained_variance, theirs["explained_variance"])
        close(fit.mse, theirs["mse"])
    else:
        close(fit.explained_variance_scalar_mean, theirs["explained_variance"])
        assert abs(fit.explained_variance - theirs["explained_variance"]) > 1e-2
        close(fit.mse / (B * T), theirs["mse"])  # it divides by a batch's tokens once more
    # They average the batches' ratios, we divide the means: equal on one batch.
    alone = ours(model, coder, batches[:1], loss_tokens=0).all
    theirs, _ = sparsity(name, sae, model, batches[:1])
    close(alone.relative_reconstruction_bias, theirs["relative_reconstruction_bias"])


@pytest.mark.parametrize("name", [SAELENS, SAEBENCH])
def test_losses(model, coder, sae, batches, name):
    import torch

    module = peer(name)
    tokens = torch.from_numpy(batches[0])
    if name == SAELENS:
        from sae_lens.training.activation_scaler import ActivationScaler

        theirs = module.get_recons_loss(
            sae, OurModel(model), ActivationScaler(), tokens, True, True, hook_name=HOOK
        )
    else:
        theirs = module.get_recons_loss(
            for_saebench(sae), OurModel(model), tokens, None, True, True
        )
    got = ours(model, coder, batches[:1], ablations=("zero",)).losses
    ce = lambda which: theirs[f"ce_loss_{which}"].mean().item()
    # They count the KL at the last token of a row too, whose next token is not there.
    kl = lambda which: theirs[f"kl_div_with_{which}"][:, :-1].mean().item()
    close(got.clean, ce("without_sae"))
    close(got.spliced, ce("with_sae"))
    close(got.ablated, ce("with_ablation"))
    close(got.kl, kl("sae"))
    close(got.kl_ablated, kl("ablation"))
    score = (ce("with_ablation") - ce("with_sae")) / (ce("with_ablation") - ce("without_sae"))
    close(got.ce_score(), score, rtol=2e-3)
    close(got.kl_score(), (kl("ablation") - kl("sae")) / kl("ablation"))


def test_what_saelens_does_with_bos(model, coder, sae, batches):
    """It keeps it in the reconstruction and zeroes it in the ablation (`exclude_special_tokens`):
    what it calls the CE score is our `ce_loss_score_saelens`."""
    from sae_lens.training.activation_scaler import ActivationScaler

    tokens = batches[0].copy()
    tokens[:, 0] = 2
    theirs = peer(SAELENS).get_downstream_reconstruction_metrics(
        sae,
        OurModel(model),
        store_of([tokens]),
        ActivationScaler(),
        compute_kl=True,
        compute_ce_loss=True,
        n_batches=1,
        eval_batch_size_prompts=B,
        ignore_tokens=[2],
    )
    got = ours(model, coder.replace(first=1), [tokens], ablations=("zero", "zero everywhere"))
    close(got.losses.spliced, theirs["ce_loss_with_sae"])
    close(got.losses.everywhere_ablated, theirs["ce_loss_with_ablation"])
    close(got.losses.ce_score("zero everywhere"), theirs["ce_loss_score"], rtol=2e-3)
    assert abs(got.losses.ce_score() - theirs["ce_loss_score"]) > 5e-3


@pytest.mark.parametrize("name", [SAELENS, SAEBENCH])
def test_geometry(coder, sae, name):
    theirs = peer(name).get_featurewise_weight_based_metrics(
        sae if name == SAELENS else for_saebench(sae)
    )
    shape = geometry(coder)
    close(shape.encoder_bias, theirs["encoder_bias"])
    close(shape.encoder_norm, theirs["encoder_norm"])
    close(shape.encoder_decoder_cosine, theirs["encoder_decoder_cosine_sim"])
    if name == SAEBENCH:
        close(shape.max_encoder_cosine, theirs["max_encoder_cosine_sim"])
        close(shape.max_decoder_cosine, theirs["max_decoder_cosine_sim"])


def test_frequencies(model, coder, sae, batches):
    module = peer(SAEBENCH)
    got = ours(model, coder, batches, loss_tokens=0)
    features = {
        "feature_density": got.density.tolist(),
        "max_encoder_cosine_sim": [0.1, 0.2],
        "max_decoder_cosine_sim": [0.1, 0.3],
    }
    theirs = module.calculate_misc_metrics(features)
    for name, value in frequencies(got.density).items():
        close(value, theirs[name])


def test_saebench_reads_our_documents(model, coder):
    output = peer("sae_bench.evals.core.eval_output")
    pydantic = peer("pydantic")
    coder = coder.replace(first=1)
    data = EvaluationText(["plums and pears " * 20] * 6, Letters(), batch_size=2, context_size=32)
    plan = EvaluationPlan(
        loss_tokens=60, ablations=("zero", "mean"), positions=True, replacement=True
    )
    config = core_config(data, plan, model, "fruit", True)
    measured = measure(model, [coder], data, plan)
    metrics = measured.tallies[0].metrics()
    reader = pydantic.TypeAdapter(output.CoreEvalOutput)
    for shape in (geometry(coder), None):
        result = core_result(metrics, shape, coder, config)
        read = reader.validate_python(result)
        assert read.eval_result_metrics.sparsity.l0 == metrics.l0
        assert read.eval_type_id == "core"
    whole = replacement_result(measured.replacement, [coder], config, "all")
    assert whole["eval_result_metrics"]["model_behavior_preservation"]["kl_div_with_sae"] > 0
