"""Every core figure against float64 numpy written out plainly, and on a planted dictionary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from assertions import close
from coders import random_coder
from core_runs import MEASURED
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.coders.splice import replacement, splice
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation import metrics as m
from gemma_scope_jax.evaluation.evaluate import EvaluationPlan, measure, position_names
from gemma_scope_jax.evaluation.figures import ABLATIONS
from gemma_scope_jax.evaluation.geometry import geometry
from gemma_scope_jax.evaluation.predictions import compare, final_residual
from gemma_scope_jax.model.batch import TokenBatch, TokenLabels
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.run import run

D, F, B, T = 32, 64, 2, 24
SOURCES = ("one", "two", "unused")


def batches():
    """Two batches of packed documents, some tokens not to be counted, two sources."""
    rng = np.random.default_rng(5)
    ends = [((3, 11, 24), (20,)), ((24,), (5, 9, 18))]
    for rows in ends:
        tokens = rng.integers(3, 300, (B, T)).astype(np.int32)
        segments = np.zeros((B, T), np.int32)
        for row, stops in enumerate(rows):
            for number, (start, stop) in enumerate(zip((0, *stops), stops), 1):
                segments[row, start:stop] = number
        mask = rng.random((B, T)) < 0.9
        source = rng.integers(0, 2, (B, T)).astype(np.int32)
        labels = {"source": TokenLabels(source, SOURCES)}
        yield TokenBatch(tokens * (segments > 0), segments, mask, labels)


def positions_of(segments):
    out = np.zeros_like(segments)
    for b, row in enumerate(segments):
        for t in range(1, len(row)):
            out[b, t] = out[b, t - 1] + 1 if row[t] == row[t - 1] else 0
    return out


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def encode_decode(c, x):
    w = {k: np.asarray(getattr(c, k), np.float64) for k in ("w_enc", "b_enc", "threshold")}
    w |= {k: np.asarray(getattr(c, k), np.float64) for k in ("w_dec", "b_dec")}
    z = x @ w["w_enc"] + w["b_enc"]
    f = np.where(z > w["threshold"], z, 0)
    back = f @ w["w_dec"] + w["b_dec"]
    return f, back if c.w_skip is None else back + x @ np.asarray(c.w_skip, np.float64)


def reference_fit(y, back, f, centres):
    """Every field of `Fit`; `centres` [N, D] is the mean of each token's batch."""
    r = y - back
    norms, backs = np.linalg.norm(y, axis=1), np.linalg.norm(back, axis=1)
    energy, total = (y**2).sum(1).mean(), ((y - y.mean(0)) ** 2).sum(1).mean()
    error = (r**2).sum(1)
    return {
        "tokens": len(y),
        "l0": (f > 0).sum(1).mean(),
        "l1": f.sum(1).mean(),
        "fvu": error.mean() / total,
        "mse": error.mean(),
        "mse_per_element": (r**2).mean(),
        "cosine": ((y * back).sum(1) / (norms * backs)).mean(),
        "l2_norm_in": norms.mean(),
        "l2_norm_out": backs.mean(),
        "l2_ratio": (backs / norms).mean(),
        "relative_reconstruction_bias": (backs**2).mean() / (y * back).sum(1).mean(),
        "explained_variance": 1 - error.mean() / total,
        "explained_variance_per_token": (1 - error / ((y - centres) ** 2).sum(1)).mean(),
        "explained_variance_scalar_mean": 1 - error.mean() / (energy - (y**2).mean() ** 2),
        "explained_variance_about_zero": 1 - error.mean() / energy,
        "explained_variance_of_the_rest": 1 - r.var(0).sum() / y.var(0).sum(),
    }


class Reference:
    """Activations, features and predictions of all batches, concatenated, in float64."""

    def __init__(self, model, c):
        self.y, self.back, self.f, self.centres, self.piece = [], [], [], [], []
        self.position, self.source, self.log_p = [], [], []
        pieces = 0
        for batch in batches():
            reads = [capture(s, c.layer) for s in {c.reads, c.writes}]
            out = run(model, batch.tokens, reads, segments=batch.segments)
            seen = out.reads
            self.log_p.append(log_softmax(out.logits))
            x, y = (np.asarray(seen[s], np.float64).reshape(B * T, D) for s in (c.reads, c.writes))
            position = positions_of(batch.segments)
            keep = (batch.segments > 0) & (position >= c.first) & batch.mask
            start = (position == 0) | (np.arange(T) == 0)[None]
            piece = pieces + np.cumsum(start.reshape(-1))
            pieces = piece.max()
            k = keep.reshape(-1)
            f, back = encode_decode(c, x)
            self.y.append(y[k]), self.back.append(back[k]), self.f.append(f[k])
            self.centres.append(np.broadcast_to(y[k].mean(0), y[k].shape))
            self.piece.append(piece[k])
            self.position.append(position.reshape(-1)[k])
            self.source.append(batch.labels["source"].numbers.reshape(-1)[k])
        for name in ("y", "back", "f", "centres", "piece", "position", "source"):
            setattr(self, name, np.concatenate(getattr(self, name)))
        self.mean = self.y.mean(0)

    def fit(self, some):
        return reference_fit(self.y[some], self.back[some], self.f[some], self.centres[some])


def reference_losses(model, c, mean, log_p):
    """Per predicting token: own loss, position, source; {run: (loss, KL, agreement)}."""
    own, position, source = [], [], []
    changed = {name: [] for name in ("spliced", *ABLATIONS)}
    for batch, p in zip(batches(), log_p):
        at = positions_of(batch.segments)
        logits = lambda *i, b=batch: run(model, b.tokens, list(i), segments=b.segments).logits
        q = {"spliced": log_softmax(logits(splice(c, error=False)))}
        for name, value in zip(ABLATIONS, (np.zeros(D), np.zeros(D), mean), strict=True):
            silent = jnp.full(F, 1e9)  # a coder that says the same whatever it reads
            skip = None if c.w_skip is None else jnp.zeros_like(c.w_skip)
            bias = jnp.asarray(value, jnp.float32)
            first = 0 if name == "zero everywhere" else c.first
            fixed = c.replace(threshold=silent, b_dec=bias, w_skip=skip, first=first)
            q[name] = log_softmax(logits(splice(fixed, error=False)))
        for b in range(B):
            for t in range(T - 1):
                same = batch.segments[b, t] == batch.segments[b, t + 1] > 0
                if not (same and at[b, t] >= c.first and batch.mask[b, t]):
                    continue
                following = batch.tokens[b, t + 1]
                own.append(-p[b, t, following])
                position.append(at[b, t])
                source.append(batch.labels["source"].numbers[b, t])
                for name, log_q in q.items():
                    kl = (np.exp(p[b, t]) * (p[b, t] - log_q[b, t])).sum()
                    top = p[b, t].argmax() == log_q[b, t].argmax()
                    changed[name].append((-log_q[b, t, following], kl, top))
    return (
        np.array(own),
        np.array(position),
        np.array(source),
        {k: np.array(v, np.float64) for k, v in changed.items()},
    )


@pytest.mark.parametrize("kind", MEASURED)
def test_every_figure_equals_float64_numpy(model, kind):
    c = MEASURED[kind]
    plan = EvaluationPlan(ablations=ABLATIONS, positions=True, groups={"source": SOURCES})
    tally = measure(model, [c], batches(), plan).tallies[0]
    got, want = tally.metrics(), Reference(model, c)

    for name, value in want.fit(slice(None)).items():
        close(getattr(got.all, name), value)
    norms = np.linalg.norm(want.y, axis=1)
    assert got.typical.tokens == len(norms)  # none of this model's tokens is enormous
    close(got.density, (want.f > 0).mean(0))
    fires = (want.f > 0).sum(0)
    in_pieces = [(len({p for p, on in zip(want.piece, want.f[:, i] > 0) if on})) for i in range(F)]
    close(got.consistency, [n / k if k else np.nan for n, k in zip(fires, in_pieces)])
    assert max(in_pieces) > 2 and got.dead == (fires == 0).sum()

    own, position, source, changed = reference_losses(model, c, want.mean, want.log_p)
    losses = got.losses
    assert losses.tokens == len(own)
    means = {name: values.mean(0) for name, values in changed.items()}
    loss_atol = 2e-5
    close(losses.clean, own.mean(), atol=loss_atol)
    for run_name, fields in {
        "spliced": ("spliced", "kl", "agreement"),
        "zero": ("ablated", "kl_ablated"),
        "zero everywhere": ("everywhere_ablated", "kl_everywhere_ablated"),
        "mean": ("mean_ablated", "kl_mean_ablated"),
    }.items():
        for field, value in zip(fields, means[run_name]):
            close(getattr(losses, field), value, atol=loss_atol)
    spliced = means["spliced"]
    for name in ABLATIONS:
        loss, kl, _ = means[name]
        close(losses.ce_score(name), (loss - spliced[0]) / (loss - own.mean()), rtol=1e-3)
        close(losses.kl_score(name), (kl - spliced[1]) / kl, rtol=1e-3)
    apart = abs(losses.ablated - losses.everywhere_ablated)
    assert apart > 1e-2 if kind == "sae" else apart < 1e-6  # above the last layer none reads <bos>

    rows = {row["name"]: row for row in got.groups["source"]}
    assert list(rows) == ["one", "two"]
    for i, name in enumerate(rows):
        fit = want.fit(want.source == i)
        for field in ("tokens", "l0", "fvu", "cosine"):
            close(rows[name][field], fit[field])
        some = source == i
        close(rows[name]["delta_loss"], (changed["spliced"][:, 0] - own)[some].mean(), atol=4e-5)
        close(rows[name]["kl"], changed["spliced"][some, 1].mean(), atol=4e-5)
        assert rows[name]["loss_tokens"] == some.sum()
    for row in got.groups["position"]:
        low, _, high = row["name"].partition("-")
        some = (want.position >= int(low)) & (want.position <= int(high or low))
        assert row["tokens"] == some.sum() > 0
        if some.sum() > 1:
            close(row["fvu"], want.fit(some)["fvu"], rtol=1e-4)
    assert sum(row["tokens"] for row in got.groups["position"]) == got.all.tokens


def test_position_names():
    assert position_names(64) == ("0", "1", "2-3", "4-7", "8-15", "16-31", "32-63")
    assert position_names(65)[-1] == "64-127"


def test_enormous_tokens_have_figures_of_their_own():
    """Chunks, groups and the typical tokens of one batch of raw activations."""
    rng = np.random.default_rng(0)
    y = rng.standard_normal((300, D)) + 3.0
    y[[7, 130]] *= 50
    c, mask, group = random_coder(F, layer=0), rng.random(300) < 0.8, rng.random(300) < 0.5
    mask[[7, 130]] = True
    x = jnp.asarray(y[None], jnp.float32)
    sums = m.coder_sums(c, x, x, mask, group[None], np.zeros(300, np.int32))
    merged = m.merge(None, m.on_host(sums))
    f, back = encode_decode(c, y)
    usual = np.linalg.norm(y, axis=1) < 100
    for i, some in enumerate((mask, mask & usual, mask & group)):
        centres = np.broadcast_to(y[mask].mean(0), y[some].shape)
        got = m.fit(merged, i)
        for name, value in reference_fit(y[some], back[some], f[some], centres).items():
            close(getattr(got, name), value, rtol=1e-4)


def test_a_planted_dictionary_gives_the_known_answers():
    """Activations made of 3 of 48 known features, orthogonal: nothing is left to explain."""
    rng = np.random.default_rng(1)
    width, n = 48, 4000
    directions, _ = np.linalg.qr(rng.standard_normal((width, width)))
    f = np.zeros((n, width))
    for row in f:
        row[rng.choice(width - 2, 3, replace=False)] = rng.uniform(1, 2, 3)  # the last 2 never
    offset = rng.standard_normal(width)
    y = f @ directions + offset
    c = SparseCoder(
        jnp.asarray(directions.T, jnp.float32),
        jnp.asarray(-directions @ offset, jnp.float32),
        jnp.full(width, 0.5),
        jnp.asarray(directions, jnp.float32),
        jnp.asarray(offset, jnp.float32),
        layer=0,
    )
    x = jnp.asarray(y[None], jnp.float32)
    none, pieces = np.zeros((0, n), bool), np.arange(n, dtype=np.int32) // 10
    sums = m.coder_sums(c, x, x, np.ones(n, bool), none, pieces)
    got = m.fit(m.merge(None, m.on_host(sums)))
    assert got.l0 == 3 and got.fvu < 1e-9 and abs(got.cosine - 1) < 1e-6
    assert abs(got.l2_ratio - 1) < 1e-6 and abs(got.relative_reconstruction_bias - 1) < 1e-6
    close(got.l1, f.sum(1).mean())
    density = np.asarray(sums.fired)[0] / n
    np.testing.assert_array_equal(density, (f > 0).mean(0))
    assert (density[-2:] == 0).all() and (density[:-2] > 0).all()
    hits = (f > 0).reshape(-1, 10, width).any(1).sum(0)
    np.testing.assert_array_equal(np.asarray(sums.pieces)[0], hits)
    shape = geometry(c)
    close(shape.encoder_norm, 1.0)
    close(shape.encoder_decoder_cosine, 1.0)
    assert np.abs(shape.max_decoder_cosine).max() < 1e-5


@pytest.mark.parametrize("kind", ["one_layer", "several"])
def test_a_replacement_model_is_every_splice_at_once(model, kind):
    """Transcoders of two layers and a coder of another site; a CLT: as by `splice` one by one."""
    batch = next(iter(batches()))
    coders = {
        "one_layer": (
            MEASURED["skip_transcoder"],
            random_coder(F, seed=2, layer=0, reads="mlp_in", writes="mlp_out"),
            random_coder(F, seed=3),
        ),
        "several": (random_coder(F, seed=9, layers=(0, 2), reads="mlp_in", writes="mlp_out"),),
    }[kind]
    got = final_residual(model, batch.plain, replacement(coders))
    reads = [*(splice(c, error=False) for c in coders), capture("resid_final")]
    want = run(model, batch.tokens, reads, segments=batch.segments).reads["resid_final"]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_comparing_in_chunks_changes_nothing(model, monkeypatch):
    batch = next(iter(batches()))
    tokens, clean = jnp.asarray(batch.tokens), final_residual(model, batch.plain, ())
    changed = jnp.stack([clean, clean[::-1], clean * 1.5])
    whole = compare(model, clean, changed, tokens)  # 3 runs, as the other tests
    monkeypatch.setattr("gemma_scope_jax.evaluation.predictions.LOGIT_CHUNK", 7)
    chunked = jax.jit(compare.__wrapped__)(model, clean, changed, tokens)  # traced anew
    for a, b in zip(whole, chunked):
        np.testing.assert_allclose(a[..., :-1], b[..., :-1], atol=2e-5)
    np.testing.assert_allclose(whole.kl[0], 0, atol=1e-6)
    assert (np.asarray(whole.same[0]) == 1).all() and (np.asarray(whole.kl[1]) > 0.01).any()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("layer", "for layer 9, but"),
        ("site", "reads 32 values at z, where .* has 64"),
        ("twice", "two coders write resid_post of layer 1"),
        ("shape", "tokens and segments must have one shape"),
        ("id beyond", r"token id 300 is outside 0\.\.299"),
        ("id below", r"token id -1 is outside 0\.\.299"),
        ("fractions", r"tokens must be integers"),
        ("empty", "nothing to evaluate on"),
        ("uncounted", "nothing to evaluate on"),
    ],
)
def test_what_cannot_be_measured_is_one_line(model, kind, message):
    batch, c, plan = next(iter(batches())), MEASURED["sae"], EvaluationPlan(loss_tokens=0)
    coders, some = [c], [batch]
    if kind == "layer":
        coders = [c.replace(layer=9)]
    elif kind == "site":
        coders = [c.replace(reads="z", writes="z")]
    elif kind == "twice":
        coders, plan = [c, random_coder(F, seed=7)], EvaluationPlan(replacement=True)
    elif kind == "shape":
        some = [(batch.tokens, batch.segments[:, 1:])]
    elif kind in ("id beyond", "id below"):
        tokens = np.array(batch.tokens)
        tokens[0, 1] = 300 if kind == "id beyond" else -1
        some = [(jnp.asarray(tokens), batch.segments)]  # of whatever kind of array
    elif kind == "fractions":
        some = [(np.asarray(batch.tokens, np.float32), batch.segments)]
    elif kind == "empty":
        some = []
    else:
        some = [batch.replace(mask=np.zeros((B, T), bool))]
    with pytest.raises(InputError, match=message):
        measure(model, coders, some, plan).tallies[0].metrics()
