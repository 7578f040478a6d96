"""Generating with a cache equals recomputing, for every preset, intercept, batch and setting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.model.token_choice import checked_sampling, choose
from tiny import tiny, tiny_model

PROMPTS = [[2, 17, 250, 9, 31, 77, 140, 5, 60, 61, 290, 33, 8], [2, 44, 7], [2, 90, 91, 8, 205]]
NEW = 12  # rows of 15 to 25 tokens: the tiny window of 8 is crossed, in decoding too
LONG = list(range(2, 35))  # 33 tokens, one more than fits the smallest bucket


@pytest.fixture(scope="module")
def small():
    """Two layers: compiles fast, for what does not depend on the layers."""
    return tiny_model(gs.PRESETS["gemma-3-1b"], layers=2, seed=7)  # its rows say different things


def count(x, ctx, limit):
    return jnp.sum(jnp.where(ctx.valid & (ctx.positions < limit), 1, 0))


READS = [gs.capture("resid_post", 1), gs.read("embed", None, count, 1 << 20, name="count")]


@pytest.fixture(scope="module")
def greedy(small):
    """The plain greedy continuation that several tests compare with."""
    return generate(small, PROMPTS, NEW, READS, stop_tokens=())


def recomputed(model, generation, intercepts=()):
    """One plain forward pass over the sequences, padded on the right: another road than ours."""
    rows = generation.sequences
    width = max(len(r) for r in rows)
    tokens, segments = np.zeros((2, len(rows), width), np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row)], segments[n, : len(row)] = row, 1
    out = gs.run(model, tokens, intercepts, segments=segments)
    return jax.device_get(out), segments.astype(bool)


def generate(*args, **settings):
    return jax.device_get(gs.generate(*args, **settings))


def assert_greedy(generation, logits):
    """Every generated token is the argmax of the recomputed logits of the token before it."""
    for row, start, own in zip(generation.sequences, generation.prompt_lengths, logits):
        np.testing.assert_array_equal(row[start:], np.argmax(own, -1)[start - 1 : len(row) - 1])


def assert_reads_equal(got, wanted, real, axis, atol=2e-5):
    """`got`, which may be longer, equals `wanted` where tokens are `real` and is zero elsewhere."""
    got, wanted = np.moveaxis(got, axis, 1), np.moveaxis(wanted, axis, 1)
    width = wanted.shape[1]
    assert not np.any(got[:, width:])
    for n, mask in enumerate(real):
        np.testing.assert_allclose(got[n, :width][mask], wanted[n][mask], atol=atol, rtol=1e-4)
        assert not np.any(got[n, :width][~mask])


# --------------------------------------------------------------------------------------------------
# The law: with cache == recomputed


@pytest.mark.law
@pytest.mark.parametrize("name", gs.PRESETS)
def test_a_steered_ragged_batch_equals_recomputing(name):
    model = tiny_model(gs.PRESETS[name])
    vector = 2.0 * jax.random.normal(jax.random.key(1), (32,))
    # At positions of the prompt, of generated tokens, and of both, depending on the row.
    steer = gs.steer("resid_post", None, vector, positions=(2, 6, 14))
    reads = gs.capture("resid_post")
    out = generate(model, [*PROMPTS, LONG], NEW, [steer, reads], stop_tokens=())
    again, real = recomputed(model, out, [steer, reads])
    assert_greedy(out, again.logits)
    assert len(np.unique(out.tokens)) > 6  # a model stuck at one token would prove little
    assert out.reads["resid_post"].shape == (8, 4, 33 + NEW, 32)
    for layer, wanted in enumerate(again.reads["resid_post"]):
        assert_reads_equal(out.reads["resid_post"][layer], wanted, real, 1, atol=1e-4)


def largest(x, ctx, *, k):
    return dict(zip(("values", "ids"), jax.lax.top_k(x, k)))


def zero_norms(embed, weight):
    return {"norm": jnp.zeros(embed.shape[:2], jnp.float32), "layers": jnp.zeros((), jnp.int32)}


def add_norms(x, ctx, state, weight):
    norm = state["norm"] + weight * jnp.linalg.norm(x, axis=-1)
    return x + 0.01 * norm[..., None], {"norm": norm, "layers": state["layers"] + 1}


def test_every_kind_of_read_is_joined():
    model = tiny_model(gs.PRESETS["gemma-3-270m"], layers=6)  # layer 5 is global
    intercepts = [
        gs.patch("z", 4, jnp.ones(64), positions=(4, 15)),
        gs.capture("attn_pattern", (5, 4)),
        gs.capture("k", 5, name="keys"),
        gs.capture("logits"),
        gs.read("mlp_act", (5, 4), largest, k=3),
        gs.read("resid_final", None, count, jnp.int32(14), name="count"),
        gs.fold("mlp_out", (4, 5), add_norms, zero_norms, jnp.float32(0.5), name="norms"),
    ]
    out = generate(model, PROMPTS, NEW, intercepts, stop_tokens=())
    again, real = recomputed(model, out, intercepts)
    assert_greedy(out, again.logits)
    got, wanted = out.reads, again.reads
    width = 13 + NEW
    assert got["attn_pattern"].shape == (2, 3, 4, width, width)
    for layer in range(2):
        assert_reads_equal(got["attn_pattern"][layer], wanted["attn_pattern"][layer], real, 2)
        ids = got["mlp_act"]["ids"][layer]
        assert ids.dtype == jnp.int32
        assert_reads_equal(ids, wanted["mlp_act"]["ids"][layer], real, 1)
    assert_reads_equal(got["keys"], wanted["keys"], real, 1)
    assert_reads_equal(got["logits"], wanted["logits"], real, 1, atol=1e-4)
    assert_reads_equal(got["norms"]["norm"], wanted["norms"]["norm"], real, 1, atol=1e-4)
    # Values without a token axis: one a pass. Passes 1.. see the rows' next positions.
    lengths = np.array([13, 3, 5])
    steps = [(lengths + step < 14).sum() for step in range(NEW)]
    np.testing.assert_array_equal(got["count"], [lengths.sum(), *steps])
    np.testing.assert_array_equal(got["norms"]["layers"], np.full(NEW + 1, 2))


def test_rows_are_continued_as_if_alone(small, greedy):
    for n, prompt in enumerate(PROMPTS):
        alone = generate(small, np.array([prompt]), NEW, READS, stop_tokens=())
        np.testing.assert_array_equal(alone.sequences[0], greedy.sequences[n])
        read = alone.reads["resid_post"][0]
        assert read.shape == (len(prompt) + NEW, 32)
        np.testing.assert_allclose(read, greedy.reads["resid_post"][n, : len(read)], atol=1e-4)


def test_a_prompt_may_fill_its_bucket_and_the_context(small):
    full = generate(small, [LONG[:32]], 32, stop_tokens=())
    assert full.tokens.shape == (1, 32) and len(full.sequences[0]) == small.config.context
    assert_greedy(full, recomputed(small, full)[0].logits)


def test_logits_are_those_of_each_choice_and_writing_them_chooses(small):
    bias = jnp.zeros(300).at[123].set(1e4)
    out = generate(small, PROMPTS, 4, [gs.patch("logits", None, bias, first=4)], logits=True)
    # A prompt's last token at position >= 4 has its logits replaced; shorter rows follow later.
    tokens = out.tokens
    assert (tokens[0] == 123).all() and (tokens[2] == 123).all()
    assert tokens[1, 0] != 123 and tokens[1, 1] != 123 and (tokens[1, 2:] == 123).all()
    assert out.logits.shape == (3, 4, 300)
    np.testing.assert_array_equal(out.logits[0, 0], bias)


def test_coders_read_and_edit_while_generating(small, greedy):
    keys = jax.random.split(jax.random.key(0), 3)
    w_enc, w_dec = (jax.random.normal(k, s) for k, s in zip(keys, ((32, 50), (50, 32))))
    zeros = jnp.zeros(50)
    sae = gs.SparseCoder(w_enc, zeros, zeros + 1.0, w_dec, jnp.zeros(32), layer=0)
    edited = [
        gs.edit(sae, gs.clamp, 7, 30.0),
        gs.features(sae),
        gs.features(sae, k=4, name="top"),
        gs.capture("resid_post", 0),
    ]
    out = generate(small, PROMPTS, NEW, edited, stop_tokens=())
    again, real = recomputed(small, out, edited)
    assert_greedy(out, again.logits)
    assert_reads_equal(out.reads["features"], again.reads["features"], real, 1, atol=1e-3)
    values, ids = out.reads["top"]
    f = out.reads["features"]
    np.testing.assert_allclose(np.take_along_axis(f, ids, -1), values, atol=1e-5)
    f_of_capture = np.asarray(sae.encode(out.reads["resid_post"]))
    np.testing.assert_allclose(f[0, 1:], f_of_capture[0, 1:], atol=1e-3)
    assert (out.tokens != greedy.tokens).any()


def test_a_mesh_equals_one_device(small, greedy):
    mesh = gs.make_mesh(data=2, model=2)
    params = jax.device_put(small.params, gs.param_shardings(small.config, mesh))
    sharded = generate(gs.Model(params, small.config), PROMPTS, NEW, READS, stop_tokens=())
    np.testing.assert_array_equal(sharded.tokens, greedy.tokens)
    read = sharded.reads["resid_post"]
    np.testing.assert_allclose(read, greedy.reads["resid_post"], atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Stopping


def test_stopped_rows_emit_padding_and_leave_the_others_alone(small, greedy):
    tokens = greedy.tokens
    stop = next(t for t in tokens[1, 2:] if t not in tokens[0] and t not in tokens[1, :2])
    ends = [list(row).index(stop) + 1 if stop in row else NEW for row in tokens]
    out = generate(small, PROMPTS, NEW, READS, stop_tokens=(1, int(stop)))
    np.testing.assert_array_equal(out.lengths, ends)
    assert ends[1] < NEW == ends[0]
    for n, end in enumerate(ends):
        np.testing.assert_array_equal(out.tokens[n, :end], tokens[n, :end])
        assert not np.any(out.tokens[n, end:])
        assert out.sequences[n].tolist() == PROMPTS[n] + tokens[n, :end].tolist()
        length = len(PROMPTS[n]) + end
        got, wanted = out.reads["resid_post"][n], greedy.reads["resid_post"][n]
        np.testing.assert_allclose(got[:length], wanted[:length], atol=1e-4)
        assert not np.any(got[length:])
    passes = np.array([sum(step < end for end in ends) for step in range(NEW)])
    np.testing.assert_array_equal(out.reads["count"][1:], passes)

    # When all rows have stopped, nothing more is run: the counts of later passes stay zero.
    out = generate(small, PROMPTS, NEW, READS, stop_tokens=np.unique(tokens[:, 2]))
    last = int(out.lengths.max())
    assert last <= 3
    np.testing.assert_array_equal(out.reads["count"][1:] > 0, np.arange(NEW) < last)


# --------------------------------------------------------------------------------------------------
# Sampling


def processed(logits, temperature, top_k, top_p):
    """Probabilities after temperature, top-k and top-p, spelled out token by token."""
    scores = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-scores)
    kept = order[: top_k or len(order)]
    p = np.exp(scores[kept] - scores[kept].max())
    p /= p.sum()
    if top_p is not None:
        count = next((n + 1 for n in range(len(p)) if p[: n + 1].sum() >= top_p), len(p))
        kept, p = kept[:count], p[:count] / p[:count].sum()
    probs = np.zeros(len(scores))
    probs[kept] = p
    return probs


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(1.0, None, None), (0.6, None, None), (1.5, 3, None), (1.0, None, 0.7), (1.3, 5, 0.8)],
)
def test_frequencies_are_the_processed_probabilities(temperature, top_k, top_p):
    config = tiny(gs.PRESETS["gemma-3-270m"])
    logits = jax.random.normal(jax.random.key(3), (12,)) * 1.5
    sampling = checked_sampling(
        config, temperature, top_k, top_p, 0, (), np.arange(1000, dtype=np.int32)
    )
    draws, rows = 40, 1000
    step = jax.jit(lambda s: choose(sampling, jnp.broadcast_to(logits, (rows, 12)), s))
    ids = np.concatenate([step(jnp.int32(s)) for s in range(draws)])
    got = np.bincount(ids, minlength=12) / len(ids)
    wanted = processed(logits, temperature, top_k, top_p)
    assert set(np.flatnonzero(got)) <= set(np.flatnonzero(wanted))
    np.testing.assert_allclose(got, wanted, atol=5 * np.sqrt(0.25 / len(ids)))


def test_one_candidate_left_is_greedy():
    config = tiny(gs.PRESETS["gemma-3-270m"])
    logits = jax.random.normal(jax.random.key(3), (50, 12))
    for settings in ((2.0, 1, None), (2.0, None, 1e-6), (1e-6, None, None), (0.0, 5, 0.5)):
        sampling = checked_sampling(config, *settings, 0, (), np.arange(50, dtype=np.int32))
        got = jax.jit(choose)(sampling, logits, jnp.int32(0))
        np.testing.assert_array_equal(got, np.argmax(logits, -1))


def test_seeds_reproduce_and_rows_draw_alone(small, greedy):
    def tokens(prompts, temperature, key):
        settings = dict(temperature=temperature, key=key, top_k=100, top_p=0.99)
        return generate(small, prompts, NEW, stop_tokens=(), **settings).tokens

    hot = tokens(PROMPTS, 2.0, 5)
    np.testing.assert_array_equal(hot, tokens(PROMPTS, 2.0, jax.random.key(5)))
    assert (hot != tokens(PROMPTS, 2.0, 6)).any()
    assert (hot != greedy.tokens).any()
    np.testing.assert_array_equal(tokens(PROMPTS, 1e-6, 5), greedy.tokens)
    # Identical prompts draw differently, and a row's draws do not depend on the others.
    same = tokens([PROMPTS[0]] * 3, 2.0, 5)
    assert (same[0] != same[1]).any()
    np.testing.assert_array_equal(same[0], hot[0])


# --------------------------------------------------------------------------------------------------
# Compilation


def add_scaled(x, ctx, vector, strength):
    return x + strength * vector[None, None, :]


@pytest.mark.law
def test_new_data_compiles_nothing(small, compiled):
    vectors = np.eye(32, dtype=np.float32)

    def go(seed, temperature, top_p, strength, lengths, stop):
        prompts = [np.arange(2, 2 + n) + seed for n in lengths]
        acts = [
            gs.steer("resid_post", 1, vectors[seed]),
            gs.write("mlp_out", 0, add_scaled, vectors[seed], np.float32(strength)),
        ]
        settings = dict(temperature=temperature, top_p=top_p, top_k=20, key=seed)
        gs.generate(small, prompts, 5, acts, stop_tokens=stop, **settings)

    go(0, 0.7, 0.9, 1.0, (3, 4), (1,))
    before = len(compiled)
    assert before
    go(1, 1.1, 0.5, -3.0, (9, 32), (1, 106, 9))
    go(2, 0.3, 0.95, 0.0, (1, 1), ())
    assert len(compiled) == before


# --------------------------------------------------------------------------------------------------
# Bad input


def squeezed(x, ctx):
    return x.reshape(-1, x.shape[-1])


def tokens_first(x, ctx):
    return jnp.swapaxes(x, 0, 1)


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([], {}, "no prompts"),
        ([[2, 3], []], {}, "prompt 1 is empty"),
        (np.zeros((2, 0), np.int32), {}, "prompt 0 is empty"),
        (np.array([2, 3]), {}, "ids[None]"),
        ([2, 3], {}, "ids[None]"),
        ("text", {}, "gs.tokens("),
        (7, {}, "ids[None]"),
        (np.ones((1, 3)), {}, "float64[3]"),
        ([[2, 300]], {}, "prompt 0: token id 300 is outside 0..299"),
        ([[2], [-1]], {}, "prompt 1: token id -1"),
        ([[2] * 60], {}, "context of 64"),
        ([[2]], {"max_new_tokens": 0}, "at least 1"),
        ([[2]], {"max_new_tokens": 2.5}, "max_new_tokens must be"),
        ([[2]], {"temperature": -1.0}, "temperature"),
        ([[2]], {"temperature": float("nan")}, "temperature"),
        ([[2]], {"temperature": "hot"}, "must be numbers"),
        ([[2]], {"top_p": 0.0}, "top_p"),
        ([[2]], {"top_k": 0}, "top_k must be at least 1"),
        ([[2]], {"stop_tokens": 1}, "stop_tokens"),
        ([[2]], {"stop_tokens": ("<eos>",)}, "stop_tokens"),
        ([[2]], {"stop_tokens": (300,)}, "outside 0..299"),
        ([[2]], {"key": "seed"}, "key must be"),
        ([[2]], {"key": 1 << 70}, "64 bits"),
        ([[2]], {"intercepts": [gs.capture("resid_post", 9)]}, "layers 0..1"),
        ([[2]], {"intercepts": [gs.read("embed", None, squeezed)]}, "return [B, T, ...]"),
        ([[2]] * 2, {"intercepts": [gs.read("embed", None, tokens_first)]}, "return [B, T, ...]"),
        ([[2]], {"intercepts": [gs.patch("embed", None, np.ones((1, 3, 32)))]}, "1 x 32 tokens"),
    ],
)
def test_bad_input_says_what_to_do(small, prompts, settings, message):
    settings = {"max_new_tokens": 5, **settings}
    with pytest.raises(gs.InputError) as error:
        gs.generate(small, prompts, **settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# The real model


@pytest.mark.real
@pytest.mark.slow  # tests/model/test_golden.py has the real model generate, too
def test_the_real_model_continues_deterministically():
    model = gs.load_model("gemma-3-270m", dtype="float32")
    ids = gs.load_tokenizer("gemma-3-270m").encode("The capital of France is")
    out = generate(model, ids[None], 16)
    again = generate(model, ids[None], 16)
    np.testing.assert_array_equal(out.tokens, again.tokens)
    logits = gs.run(model, out.sequences[0][None]).logits
    assert_greedy(out, logits)
