"""The SAE trainer: its gradients, its folding, its buffer, and a run killed and resumed."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from gemma_scope_jax.coders.gemma_scope_files import load_coder
from gemma_scope_jax.data.text import pack, read_documents, shuffled
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.training import step as steps
from gemma_scope_jax.training import train as training
from gemma_scope_jax.training.losses import jumprelu, quadratic_l0, step
from gemma_scope_jax.training.recipe import TrainConfig

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


class Letters:
    """A tokenizer of one token a letter, so that runs on tiny models need no vocabulary file."""

    bos_id = 2

    def encode(self, text, bos=True):
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return np.concatenate([[2], ids]) if bos else ids


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    text = "\n\f\n".join(" ".join(rng.choice(WORDS, rng.integers(3, 60))) for _ in range(80))
    (tmp_path / "text.txt").write_text(text)
    return str(tmp_path / "text.txt")


@pytest.fixture
def small(corpus, monkeypatch):
    monkeypatch.setattr(training, "load_tokenizer", lambda source: Letters())
    return TrainConfig(
        data=(corpus,), model="tiny", layer=3, width=64, target_l0=8, tokens=128 * 30, rows=4,
        length=32, buffer=512, batch=128, updates=3, learning_rate=3e-3, learning_rate_warmup=10,
        l0_warmup=20, threshold=None, checkpoint_every=1e9,
    )  # fmt: skip


def width(d_model):
    """A model's config as far as an SAE on its residual stream needs it."""
    return dataclasses.replace(PRESETS["gemma-3-270m"], d_model=d_model)


def random_weights(seed=0, d=6, f=10):
    rng = np.random.default_rng(seed)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    return steps.Weights(draw(d, f), 0.1 * draw(f), 0.3 + 0 * draw(f), draw(f, d), draw(d))


def test_jumprelu_and_step_are_strict_and_their_gradients_are_the_published_ones():
    bandwidth = 0.5
    z = jnp.array([[0.2, 0.5, 0.6, 0.9, -1.0], [0.5001, 0.1, 2.0, 0.3, 0.74]])
    threshold = jnp.full(5, 0.5)
    assert jumprelu(z, threshold, bandwidth)[0, 1] == 0 and step(z, threshold, bandwidth)[0, 1] == 0
    g = jnp.asarray(np.random.default_rng(0).standard_normal(z.shape), jnp.float32)
    _, pull = jax.vjp(lambda z, t: jumprelu(z, t, bandwidth), z, threshold)
    dz, dt = pull(g)
    near = np.abs(np.asarray(z) - 0.5) / bandwidth < 0.5
    np.testing.assert_allclose(dz, np.asarray(g) * (np.asarray(z) > 0.5), rtol=1e-6)
    np.testing.assert_allclose(dt, (-0.5 / bandwidth * np.asarray(g) * near).sum(0), rtol=1e-6)
    _, pull = jax.vjp(lambda z, t: step(z, t, bandwidth), z, threshold)
    dz, dt = pull(g)
    assert not np.any(dz)
    np.testing.assert_allclose(dt, (-np.asarray(g) * near / bandwidth).sum(0), rtol=1e-6)


def test_quadratic_penalty_is_equation_5():
    assert quadratic_l0(jnp.float32(30), 20.0) == pytest.approx(2 / 20 * 10**2)


@pytest.mark.parametrize("per_token", [True, False])
def test_gradients_away_from_thresholds_equal_finite_differences(per_token):
    """With no pre-activation within the bandwidth the loss is smooth in all but the thresholds."""
    config = TrainConfig(
        data=(), width=10, target_l0=3, bandwidth=1e-4, per_token=per_token, outlier=2.0
    )
    weights = random_weights()
    x = jnp.asarray(np.random.default_rng(1).standard_normal((7, 6)), jnp.float32)
    dead = jnp.zeros(10).at[1].set(1.0)
    config = dataclasses.replace(config, dead_weight=0.5)
    total = lambda w: steps.loss(w, x, jnp.float32(0.1), dead, config)[0]
    grads = jax.grad(total)(weights)
    for name in ("w_enc", "b_enc", "w_dec", "b_dec"):
        value = getattr(weights, name)
        index = (1,) * value.ndim
        move = jnp.zeros_like(value).at[index].set(3e-3)
        up = total(weights.replace(**{name: value + move}))
        down = total(weights.replace(**{name: value - move}))
        got = float(getattr(grads, name)[index])
        assert got == pytest.approx(float(up - down) / 6e-3, rel=2e-2, abs=2e-3), name


def test_folding_is_exact():
    weights = random_weights()
    scale = jnp.float32(1500.0)
    raw = scale * jnp.asarray(np.random.default_rng(2).standard_normal((20, 6)), jnp.float32)
    x = raw / scale
    z = (x - weights.b_dec[None, :]) @ weights.w_enc + weights.b_enc[None, :]
    f = jnp.where(z > weights.threshold[None, :], jax.nn.relu(z), 0.0)
    y = scale * (f @ weights.w_dec + weights.b_dec[None, :])
    sae = steps.fold(weights, scale, layer=3, site="resid_post")
    np.testing.assert_allclose(sae.encode(raw), scale * f, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(sae.decode(sae.encode(raw)), y, rtol=1e-5, atol=2e-2)


def test_buffer_takes_only_tokens_that_count_and_forgets_the_oldest():
    config = TrainConfig(data=(), width=8, target_l0=2, rows=1, length=4, buffer=8, batch=8)
    state = steps.init_state(config, width(3), jax.random.key(0))
    x = jnp.arange(1.0, 7.0)[:, None] * jnp.ones((1, 3))
    counts = jnp.array([True, False, True, True, True, False])
    state = steps.fill(steps.fill(state, x, counts), 10 * x, counts)
    state = steps.fill(state, 100 * x, counts)
    assert int(state.filled) == 12
    got = sorted(np.asarray(state.buffer[:, 0], np.float32))
    assert got == [10, 30, 40, 50, 100, 300, 400, 500]


def test_model_activations_leave_out_bos_of_every_piece_and_padding():
    model = tiny_model(PRESETS["gemma-3-270m"])
    config = TrainConfig(data=(), layer=2, width=8, target_l0=2)
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])
    _, counts = steps.model_activations(model, jnp.array([[2, 5, 6, 2, 7, 0]]), segments, config)
    assert counts.tolist() == [False, True, True, False, True, False]


def test_update_keeps_decoder_rows_at_unit_norm_and_thresholds_positive():
    config = TrainConfig(
        data=(), width=16, target_l0=4, rows=2, length=8, buffer=64, batch=64, learning_rate=0.1
    )
    state = steps.init_state(config, width(6), jax.random.key(0))
    rows = jax.random.normal(jax.random.key(1), (64, 6)) * 30
    state = steps.start(steps.fill(state, rows, jnp.ones(64, bool)), config)
    for _ in range(5):
        state, _ = steps.update(state, config)
    np.testing.assert_allclose(jnp.linalg.norm(state.weights.w_dec, axis=1), 1.0, rtol=1e-5)
    assert float(state.weights.threshold.min()) >= 0


@pytest.mark.parametrize("length", [2, 6, 32])
def test_packing_starts_every_piece_with_bos_and_loses_nothing(corpus, length):
    documents, tok = read_documents([corpus]), Letters()
    batches = list(pack(documents, lambda t: tok.encode(t, bos=False), 4, length, 2))
    tokens = np.concatenate([b.tokens for b in batches])
    segments = np.concatenate([b.segments for b in batches])
    first = np.diff(segments, axis=1, prepend=0) > 0
    assert np.all(tokens[first] == 2) and np.all(tokens[segments == 0] == 0)
    kept = bytes(tokens[(segments > 0) & ~first].astype(np.uint8)).decode()
    assert kept == "".join(documents)


def test_shuffling_is_a_function_of_the_seed_and_shows_every_document_each_time_round():
    take = lambda seed: [x for x, _ in zip(shuffled("abcdef", seed), range(12))]
    assert take(0) == take(0) != take(1)
    assert sorted(take(0)[:6]) == sorted(take(0)[6:]) == list("abcdef")


def test_a_run_lowers_its_loss_nears_its_target_and_loads_back(small, tmp_path):
    model = tiny_model(PRESETS["gemma-3-270m"])
    sae = training.train(small, tmp_path / "run", model)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log[-1]["tokens"] == small.tokens and log[-1]["update"] == small.total_updates
    loaded = load_coder(tmp_path / "run/coder")
    for a, b in zip(jax.tree.leaves(sae), jax.tree.leaves(loaded)):
        np.testing.assert_array_equal(a, b)
    assert (loaded.layer, loaded.reads, loaded.info.l0) == (3, "resid_post", 8)
    config = dataclasses.replace(small, tokens=128 * 4)  # only fills the buffer
    start = training.train(config, tmp_path / "start", model)
    tok, errors = Letters(), []
    batch = next(pack(read_documents(small.data), lambda t: tok.encode(t, bos=False), 8, 32, 2))
    x, counts = steps.model_activations(model, batch.tokens, jnp.asarray(batch.segments), small)
    x = x[np.asarray(counts)]
    for coder in (start, sae):
        f = coder.encode(x)
        errors.append(float(jnp.sum((coder.decode(f) - x) ** 2)))
    assert errors[1] < 0.6 * errors[0]
    assert 4 < float((f > 0).sum(-1).mean()) < 14


def test_a_run_stopped_by_sigterm_resumes_to_the_same_bits(small, tmp_path, monkeypatch):
    model = tiny_model(PRESETS["gemma-3-270m"])
    whole = training.train(small, tmp_path / "whole", model)
    real, passes = training.TokenBatch, 0

    def interrupted(*args):
        nonlocal passes
        for batch in pack(*args):
            passes += 1
            if passes == 15:
                os.kill(os.getpid(), signal.SIGTERM)
            yield real(batch.tokens, batch.segments)

    monkeypatch.setattr(training, "pack", interrupted)
    with pytest.raises(SystemExit, match="run the same command to go on"):
        training.train(small, tmp_path / "cut", model)
    assert not (tmp_path / "cut/coder").exists()
    monkeypatch.setattr(training, "pack", pack)
    resumed = training.train(small, tmp_path / "cut", model)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed)):
        np.testing.assert_array_equal(a, b)


def test_the_step_compiles_once(small, tmp_path):
    names = []
    model = tiny_model(PRESETS["gemma-3-270m"])
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **k: names.append(k.get("fun_name")) if "backend_compile" in name else None
    )
    training.train(small, tmp_path / "run", model)
    assert sum("train_step" in str(name) for name in names) <= 1


BAD_CONFIGS = {
    "width": dict(width=0),
    "target above width": dict(width=10, target_l0=20),
    "buffer too small": dict(buffer=100),
    "tokens": dict(tokens=-5),
}


@pytest.mark.parametrize("change", BAD_CONFIGS.values(), ids=list(BAD_CONFIGS))
def test_bad_recipes_are_refused(change):
    with pytest.raises(InputError):
        TrainConfig(data=("x",), **change)


def test_bad_runs_are_refused(small, tmp_path):
    model = tiny_model(PRESETS["gemma-3-270m"])
    with pytest.raises(InputError, match="layer 99"):
        training.train(dataclasses.replace(small, layer=99), tmp_path / "a", model)
    with pytest.raises(InputError, match="no text files"):
        training.train(dataclasses.replace(small, data=("nowhere/*.txt",)), tmp_path / "b", model)
    training.train(dataclasses.replace(small, tokens=128), tmp_path / "c", model)
    with pytest.raises(InputError, match="another config"):
        training.train(small, tmp_path / "c", model)


def test_config_files_are_read_and_bad_ones_refused(tmp_path):
    path = tmp_path / "run.py"
    path.write_text("config = 3")
    with pytest.raises(InputError, match="TrainConfig"):
        training.load_config(path)
    path.write_text("config = 1 / 0")
    with pytest.raises(InputError, match="ZeroDivisionError"):
        training.load_config(path)
    with pytest.raises(InputError, match="no such config"):
        training.load_config(tmp_path / "none.py")
    shipped = training.load_config("configs/sae_270m_resid_12.py")
    assert shipped.width == 4096 and shipped.tokens >= 4_000_000
