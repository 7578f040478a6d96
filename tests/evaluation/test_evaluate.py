"""A coder's figures against a float64 brute force; padding, <bos> and batching change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from coders import random_coder
from gemma_scope_jax.coders import load
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.coders.splice import splice
from gemma_scope_jax.data.document_files import SEPARATOR
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation.evaluate import (
    EvaluationPlan,
    _fit_step,
    _read,
    evaluate,
    measure,
    text_batches,
)
from gemma_scope_jax.evaluation.predictions import compare, final_residual
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.run import run
from letters import Letters

# One shape of batch, one width and few kinds, so that few programs are compiled.
WIDTH = 64
KINDS = {
    "sae": dict(layer=2),
    "z": dict(d=64, layer=2, reads="z", writes="z"),
    "transcoder": dict(layer=1, reads="mlp_in", writes="mlp_out"),
    "skip": dict(layer=1, reads="mlp_in", writes="mlp_out", skip=True, first=4),
}


def coder_of(kind, seed=0):
    return random_coder(WIDTH, seed=seed, **KINDS[kind])


def random_batch(seed=0, B=3, T=24, lengths=(24, 17, 5)):
    tokens = np.random.default_rng(seed).integers(3, 300, (B, T)).astype(np.int32)
    segments = (np.arange(T)[None] < np.array(lengths)[:, None]).astype(np.int32)
    return tokens * segments, segments


def positions_of(segments):
    """Written out with loops: the position within each run of equal ids."""
    out = np.zeros_like(segments)
    for b, row in enumerate(segments):
        for t in range(1, len(row)):
            out[b, t] = out[b, t - 1] + 1 if row[t] == row[t - 1] else 0
    return out


def brute_force(model, coder, tokens, segments):
    """The figures in float64, and which counted tokens are typical."""
    reads = [capture(site, coder.layer) for site in {coder.reads, coder.writes}]
    out = run(model, tokens, reads, segments=segments)
    w = {k: np.asarray(getattr(coder, k), np.float64) for k in ("w_enc", "b_enc", "threshold")}
    w |= {k: np.asarray(getattr(coder, k), np.float64) for k in ("w_dec", "b_dec")}
    x, y = (np.asarray(out.reads[s], np.float64) for s in (coder.reads, coder.writes))
    keep = (segments > 0) & (positions_of(segments) >= coder.first)
    x, y = x[keep], y[keep]
    z = x @ w["w_enc"] + w["b_enc"]
    f = np.where(z > w["threshold"], z, 0)
    back = f @ w["w_dec"] + w["b_dec"]
    if coder.w_skip is not None:
        back = back + x @ np.asarray(coder.w_skip, np.float64)
    error = ((y - back) ** 2).sum(1)
    norms = np.linalg.norm(y, axis=1)
    usual = norms <= 3 * np.median(norms)
    figures = {"l0": (f > 0).sum(1).mean(), "mse": error.mean(), "density": (f > 0).mean(0)}
    for name, some in (("fvu", usual | True), ("typical", usual)):
        spread = ((y[some] - y[some].mean(0)) ** 2).sum(1).mean()
        figures[name] = error[some].mean() / spread
    return {**figures, "clean": brute_force_loss(out, tokens, segments, coder.first)}, usual


def brute_force_loss(out, tokens, segments, first):
    logits, positions, losses = np.asarray(out.logits, np.float64), positions_of(segments), []
    for b in range(tokens.shape[0]):
        for t in range(tokens.shape[1] - 1):
            if segments[b, t] == segments[b, t + 1] > 0 and positions[b, t] >= first:
                row = logits[b, t] - logits[b, t].max()
                losses.append(np.log(np.exp(row).sum()) - row[tokens[b, t + 1]])
    return np.mean(losses)


def figures(metrics):
    return [metrics.l0, metrics.fvu, metrics.mse, metrics.typical.fvu]


def wanted(brute):
    return [brute[k] for k in ("l0", "fvu", "mse", "typical")]


@pytest.mark.parametrize("kind", KINDS)
def test_figures_equal_a_float64_brute_force(model, kind):
    tokens, segments = random_batch()
    coder = coder_of(kind)
    with_loss = kind in ("sae", "skip")
    got = evaluate(model, coder, [(tokens, segments)], delta_loss=with_loss)
    want, usual = brute_force(model, coder, tokens, segments)
    assert got.all.tokens == 24 + 17 + 5 - 3 * coder.first
    assert got.typical.tokens == usual.sum()
    np.testing.assert_allclose(figures(got), wanted(want), rtol=2e-5)
    np.testing.assert_allclose(got.density, want["density"], rtol=1e-6)
    assert got.dead == (want["density"] == 0).sum()
    if with_loss:
        out = run(model, tokens, [splice(coder, error=False)], segments=segments)
        spliced = brute_force_loss(out, tokens, segments, coder.first)
        np.testing.assert_allclose(got.losses.clean, want["clean"], rtol=1e-5)
        np.testing.assert_allclose(got.losses.spliced, spliced, rtol=1e-5)
        np.testing.assert_allclose(got.delta_loss, spliced - want["clean"], atol=1e-4)
        assert abs(got.delta_loss) > 1e-2


def test_many_at_once_have_the_figures_of_each_alone(model):
    coders = [coder_of(kind) for kind in ("sae", "skip", "z", "sae")]
    coders[3] = coders[3].replace(first=4)
    batches = [random_batch(), random_batch(1)]
    plan = EvaluationPlan(ablations=("zero", "zero everywhere"))
    together = measure(model, coders, batches, plan).tallies
    for coder, got in zip(coders, (tally.metrics() for tally in together)):
        alone = evaluate(model, coder, batches, ablation=True)
        np.testing.assert_allclose(figures(got), figures(alone), rtol=1e-6)
        np.testing.assert_array_equal(got.density, alone.density)
        for name in ("tokens", "clean", "spliced", "ablated"):
            one, other = getattr(got.losses, name), getattr(alone.losses, name)
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_few_enormous_tokens_are_told_apart(model):
    """A token of many times the norm dominates FVU; the typical figures are without it."""
    embed = model.params.embed.at[7].multiply(100.0)
    model = model.replace(params=model.params.replace(embed=embed))
    tokens, segments = random_batch()
    tokens[tokens == 7] = 8
    tokens[1, 9] = 7
    coder = coder_of("sae")
    got = evaluate(model, coder, [(tokens, segments)], delta_loss=False)
    want, usual = brute_force(model, coder, tokens, segments)
    assert usual.sum() == got.typical.tokens == got.all.tokens - 1
    np.testing.assert_allclose(figures(got), wanted(want), rtol=2e-5)
    assert abs(got.fvu - got.typical.fvu) > 0.05


def test_padding_does_not_count(model):
    """What stands in padding, and how much of it there is, has no effect."""
    tokens, segments = random_batch()
    coder = coder_of("skip")
    one = evaluate(model, coder, [(tokens, segments)])
    noise = np.where(segments == 0, 299, tokens).astype(np.int32)
    two = evaluate(
        model, coder, [(np.pad(noise, ((0, 1), (0, 8))), np.pad(segments, ((0, 1), (0, 8))))]
    )
    np.testing.assert_allclose(figures(one), figures(two), rtol=1e-5)
    np.testing.assert_allclose(one.density, two.density)
    np.testing.assert_allclose(one.losses.clean, two.losses.clean, rtol=1e-5)
    np.testing.assert_allclose(one.losses.spliced, two.losses.spliced, rtol=1e-5)


def test_packed_documents_count_as_separate_ones(model):
    """Two documents in each row give what they give in rows of their own."""
    tokens, _ = random_batch(1)
    packed = (tokens, np.repeat([[1, 2]], 12, axis=1).repeat(3, axis=0))
    alone = np.pad(np.ones((3, 12), np.int32), ((0, 0), (0, 12)))
    apart = [(tokens, alone), (np.roll(tokens, 12, axis=1), alone)]
    coder = coder_of("sae")
    one, two = evaluate(model, coder, [packed]), evaluate(model, coder, apart)
    np.testing.assert_allclose([one.l0, one.fvu], [two.l0, two.fvu], rtol=1e-5)
    np.testing.assert_allclose(one.losses.clean, two.losses.clean, rtol=1e-5)
    assert one.losses.tokens == two.losses.tokens == 6 * 10 and one.all.tokens == 6 * 11


def test_batching_changes_nothing(model):
    """Merged sums equal the sums of the whole: FVU needs the mean over everything."""
    tokens, segments = random_batch(2, lengths=(24, 24, 20))
    coder = coder_of("sae")
    whole = evaluate(model, coder, [(tokens, segments)])
    rows = [(tokens, segments * (np.arange(3) == i)[:, None]) for i in range(3)]
    parts = evaluate(model, coder, rows)
    assert parts.all.tokens == whole.all.tokens
    np.testing.assert_allclose(
        [parts.l0, parts.fvu, parts.mse], [whole.l0, whole.fvu, whole.mse], rtol=2e-6
    )
    np.testing.assert_allclose(parts.density, whole.density)
    np.testing.assert_allclose(parts.delta_loss, whole.delta_loss, atol=2e-6)


def test_coder_of_several_layers(model):
    """Per-layer figures of a crosscoder equal those of a float64 triangular sum."""
    keys = jax.random.split(jax.random.key(3), 5)
    layers, X, D, F = (0, 1, 3), 3, 32, 20
    normal = lambda key, *shape: jax.random.normal(key, shape) / D**0.5
    coder = MultiLayerCoder(
        normal(keys[0], X, D, F),
        normal(keys[1], X, F),
        jnp.full((X, F), 0.1),
        normal(keys[2], 6, F, D),
        normal(keys[3], X, D),
        layers=layers,
    )
    tokens, segments = random_batch()
    got = evaluate(model, coder, [(tokens, segments)])
    x = run(model, tokens, [capture("resid_post", layers)], segments=segments).reads["resid_post"]
    keep = (segments > 0) & (positions_of(segments) >= 1)
    x = np.asarray(x, np.float64)[:, keep]
    z = np.einsum("xnd,xdf->xnf", x, np.asarray(coder.w_enc, np.float64))
    z = z + np.asarray(coder.b_enc, np.float64)[:, None]
    f = np.where(z > 0.1, z, 0)
    full = np.asarray(coder.full_decoder(), np.float64)
    back = np.einsum("xnf,xfyd->ynd", f, full) + np.asarray(coder.b_dec, np.float64)[:, None]
    error = ((x - back) ** 2).sum((1, 2))
    spread = ((x - x.mean(1, keepdims=True)) ** 2).sum((1, 2))
    np.testing.assert_allclose([layer.fvu for layer in got.layers], error / spread, rtol=2e-5)
    np.testing.assert_allclose(got.l0, (f > 0).sum(-1).mean(), rtol=1e-6)
    assert got.density.shape == (X, F) and got.delta_loss is not None


def test_ablation_is_the_yardstick(model):
    """A coder that reconstructs exactly recovers all of the loss, one that says zero none."""
    eye = jnp.eye(32)
    exact = SparseCoder(
        jnp.concatenate([eye, -eye], 1),
        jnp.zeros(64),
        jnp.zeros(64),
        jnp.concatenate([eye, -eye], 0),
        jnp.zeros(32),
        layer=2,
    )
    batch = random_batch()
    got = evaluate(model, exact, [batch], ablation=True)
    assert abs(got.fvu) < 1e-12 and abs(got.delta_loss) < 1e-5
    np.testing.assert_allclose(got.loss_recovered, 1.0, atol=1e-4)
    silent = exact.replace(threshold=jnp.full(64, 1e9))
    np.testing.assert_allclose(
        evaluate(model, silent, [batch], ablation=True).loss_recovered, 0.0, atol=1e-5
    )


def test_new_data_and_another_layer_compile_nothing(model):
    steps = (_read, _fit_step, final_residual, compare)
    evaluate(model, coder_of("sae"), [random_batch(0)])
    before = [step._cache_size() for step in steps]
    evaluate(model, coder_of("sae", seed=5), [random_batch(1, lengths=(9, 24, 3))])
    assert [step._cache_size() for step in steps] == before
    elsewhere = coder_of("sae", seed=5).replace(layer=1)
    evaluate(model, elsewhere, [random_batch(1)])
    assert [step._cache_size() for step in steps[1:]] == before[1:]  # it reads less of the model


def test_what_does_not_fit_is_one_line(model):
    batch = random_batch()
    coder = coder_of("sae")
    with pytest.raises(InputError, match="layer 9, but .* has layers 0 to 3"):
        evaluate(model, coder.replace(layer=9), [batch])
    with pytest.raises(InputError, match="reads 32 values at z, where .* has 64"):
        evaluate(model, coder.replace(reads="z", writes="z"), [batch])
    with pytest.raises(InputError, match="nothing to evaluate on"):
        evaluate(model, coder, [(batch[0], np.zeros_like(batch[1]))])
    with pytest.raises(InputError, match="nothing to evaluate on"):
        evaluate(model, coder, [])
    with pytest.raises(InputError, match="no coder can stand at site 'attn_pattern'"):
        evaluate(model, coder.replace(reads="attn_pattern"), [batch])


def test_text_in_rows():
    """Every character once, <bos> before every document, batches of one shape."""
    texts = ["abcdefghijklmnopqrstuvw", "", "xyz"]
    batches = list(text_batches(Letters(), texts, context_size=12, batch_size=2))
    assert {b.tokens.shape for b in batches} == {(2, 12)}
    tokens = np.concatenate([b.tokens for b in batches])
    segments = np.concatenate([b.segments for b in batches])
    characters = Letters().decode_tokens(tokens[segments > 0])
    assert "".join(characters).replace("<bos>", "") == "".join(texts)
    starts = (segments > 0) & (positions_of(segments) == 0)
    assert (tokens[starts] == 2).all()


@pytest.mark.real
def test_the_packaged_transcoders_compute_what_the_mlps_do():
    """One pass for all 18 layers, on the bundled sample, which none of them was trained on."""
    names = [p.name for p in load.PACKAGED.glob("gemma-3-270m-transcoder-*")]
    coders = sorted(map(gs.load_coder, names), key=lambda coder: coder.layer)
    assert [coder.layer for coder in coders] == list(range(18))
    documents = (load.PACKAGED / "sample.txt").read_text(encoding="utf-8").split(SEPARATOR)
    model, tok = gs.load_model("gemma-3-270m"), gs.load_tokenizer("gemma-3-270m")
    batches, plan = text_batches(tok, documents), EvaluationPlan(loss_tokens=0)
    found = [tally.metrics() for tally in measure(model, coders, batches, plan).tallies]
    assert np.mean([metrics.typical.fvu for metrics in found]) < 0.5
    for coder, metrics in zip(coders, found):
        assert 0.5 < metrics.l0 / coder.info.l0 < 2
