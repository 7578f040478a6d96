"""What compiles and what does not: layers and strengths are data, lengths are filled up to a few.

The model's programs are counted, by their names; cutting a result to its length is one of a few
milliseconds and not among them.
"""

import re
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.model.buckets import bucket
from tiny import tiny_model

LAYERS = 6
IDS = np.random.default_rng(0).integers(2, 300, (2, 10)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return tiny_model(gs.PRESETS["gemma-3-4b"], layers=LAYERS)


@pytest.fixture
def compiled():
    """Names of the model's programs, as XLA compiles them."""
    names = []

    def watch(event, seconds, fun_name="", **_):
        if "backend_compile" in event and re.search("_run|_generate|forward", fun_name):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(watch)
    yield names
    jax.monitoring.unregister_event_duration_listener(watch)


def assert_same(a, b, atol=2e-5):
    """Equal trees: shapes, dtypes, and values up to rounding."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(np.float32(x), np.float32(y), atol=atol, rtol=1e-4)


# -------------------------------------------------------------------------------------------------
# Layers


def add_ones(x, ctx, strength):
    return x + strength


def mean_norm(x, ctx):
    norm = jnp.linalg.norm(x, axis=-1)
    return jnp.where(ctx.valid, norm, 0.0).sum(), jnp.int32(ctx.layer)


SWEEPS = {
    "patch": lambda layer: gs.patch("resid_post", layer, np.full(32, 0.5), positions=(2, 5)),
    "steer": lambda layer: gs.steer("mlp_out", layer, np.ones(32)),
    "capture": lambda layer: [gs.capture("attn_pattern", layer), gs.capture("z", layer)],
    "write": lambda layer: gs.write("resid_mid", layer, add_ones, 2.0),
    "read": lambda layer: gs.read("mlp_in", layer, mean_norm),
    "per_layer": lambda layer: gs.steer("q", layer, gs.per_layer(np.ones((1, 16)))),
    "fold": lambda layer: gs.fold("mlp_out", layer, total, np.float32(1), name="total"),
}


def total(x, ctx, state):
    return 1.5 * x, state + jnp.where(ctx.valid[..., None], x, 0.0).sum()


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_loop_over_layers_compiles_once_and_equals_static_layers(model, compiled, sweep):
    found = []
    for layer in range(LAYERS):
        found.append(gs.run(model, IDS, [SWEEPS[sweep](layer), gs.capture("resid_post", 3)]))
    assert len(compiled) == 1
    static = jax.jit(gs.forward)
    for layer in (0, LAYERS - 1):
        items = [SWEEPS[sweep](layer), gs.capture("resid_post", 3)]
        assert_same(found[layer], static(model, IDS, items))
    assert np.abs(found[0].logits - found[-1].logits).max() > 1e-3 or sweep in ("capture", "read")


def test_patching_over_all_layers_and_positions_compiles_once(model, compiled):
    """From a clean run into a corrupted one: a table of a logit by layer and position."""
    clean, corrupted = IDS[:1], IDS[1:]
    kept = gs.run(model, clean, [gs.capture("resid_post")])
    compiled.clear()
    table = np.zeros((LAYERS, clean.shape[1]))
    for layer, position in np.ndindex(table.shape):
        patch = gs.patch("resid_post", layer, kept.reads["resid_post"][layer], positions=position)
        table[layer, position] = gs.run(model, corrupted, [patch]).logits[0, -1, 7]
    assert len(compiled) == 1
    # At the last position of the last layer nothing but the patch reaches the logits.
    assert abs(table[-1, -1] - kept.logits[0, -1, 7]) < 1e-4
    assert np.ptp(table) > 1e-2


def test_reading_one_layer_after_another_stops_there_and_compiles_once(model, compiled):
    everything = gs.run(model, IDS, [gs.capture("resid_post")]).reads["resid_post"]
    compiled.clear()
    for layer in range(LAYERS):
        out = gs.run(model, IDS, [gs.capture("resid_post", layer)], stop_at_layer=layer + 1)
        assert out.logits is None
        assert_same(out.reads["resid_post"], everything[layer])
    assert len(compiled) == 1


def test_layers_after_the_stop_are_not_run(model):
    ran = []
    say = lambda x, ctx: (jax.debug.callback(lambda l: ran.append(int(l)), ctx.layer), x)[1]
    gs.run(model, IDS, [gs.write("resid_pre", None, say)], stop_at_layer=4)
    jax.effects_barrier()
    assert sorted(ran) == [0, 1, 2, 3]


def test_a_function_at_one_layer_runs_there_alone(model):
    ran = []
    say = lambda x, ctx: (jax.debug.callback(lambda l: ran.append(int(l)), ctx.layer), x)[1]
    jax.block_until_ready(gs.run(model, IDS, [gs.write("resid_pre", 4, say)]).logits)
    jax.effects_barrier()
    assert ran == [4]


def test_a_sweep_of_strengths_and_layers_while_generating_compiles_once(model, compiled):
    ids = set()
    for layer in range(LAYERS):
        for strength in (0.0, 30.0):
            steer = gs.steer("resid_post", layer, strength * np.eye(32)[layer])
            out = gs.generate(model, IDS, 5, [steer, gs.capture("resid_post", layer)])
            assert out.reads["resid_post"].shape == (2, 15, 32)
            ids.add(tuple(np.asarray(out.tokens).ravel()))
    assert len(compiled) == 1
    assert len(ids) > 2


def test_inside_a_jit_and_under_differentiation_layers_are_static(model):
    """The bare function's programs, whose memory is less where something is differentiated."""

    def metric(v, door, **options):
        return door(model, IDS, [gs.steer("resid_mid", 2, v)], **options).logits.sum()

    v = jnp.ones(32)
    one = jax.grad(partial(metric, door=gs.run))(v)
    assert_same(one, jax.jit(jax.grad(partial(metric, door=gs.forward)))(v), atol=1e-3)
    both = jax.vmap(lambda s: metric(s * v, gs.run))(jnp.arange(2.0))
    assert both.shape == (2,)


# -------------------------------------------------------------------------------------------------
# Lengths


READS = [
    gs.capture("attn_pattern"),
    gs.capture("attn_pattern", 5, name="one"),
    gs.capture("embed"),
    gs.capture("q", (0, 5)),
    gs.capture("pre_mlp_scale", 1),
    gs.capture("final_scale"),
    gs.steer("resid_post", 2, np.ones(32), positions=(1, 2)),
]


def lengths_of(given):
    """The same call for eight prompts of eight lengths."""
    return [given[:, :n] for n in range(3, 11)]


@pytest.mark.parametrize("logits", ["all", "last", "none"])
def test_eight_lengths_compile_once_and_equal_the_unpadded_run(model, compiled, logits):
    found = [gs.run(model, ids, READS, logits=logits) for ids in lengths_of(IDS)]
    assert len(compiled) == 1
    for ids, out in list(zip(lengths_of(IDS), found))[::4]:
        assert_same(out, gs.run(model, ids, READS, logits=logits, pad=False))


def test_patches_by_token_masks_and_given_segments_are_filled_up_too(model, compiled):
    values = np.random.default_rng(3).normal(size=(2, 10, 32)).astype(np.float32)

    def call(ids, **options):
        n = ids.shape[1]
        segments = np.ones_like(ids)
        segments[0, :2] = 0
        positions = np.broadcast_to(np.arange(n) + 2, ids.shape)
        work = [
            gs.patch("resid_post", 2, values[:, :n], positions=np.arange(n) % 2 == 0),
            gs.patch("q", 4, values[0, :n, None, :16]),
            gs.patch("attn_pattern", 3, np.full((n, n), 1 / n, np.float32)),
            gs.capture("z"),
        ]
        return gs.run(model, ids, work, segments=segments, positions=positions, **options)

    found = [call(ids) for ids in lengths_of(IDS)]
    assert len(compiled) == 1
    for n in (0, 7):
        assert_same(found[n], call(lengths_of(IDS)[n], pad=False))


def token_mean(x, ctx):
    return x.mean(1)


@gs.tokenwise
def doubled(x, ctx):
    return 2 * x


def test_functions_that_may_see_other_tokens_are_given_none(model, compiled):
    """A mean over tokens is that of the text; a function that is marked is filled up."""
    read = [gs.read("embed", None, token_mean), gs.capture("embed", name="x")]
    for ids in lengths_of(IDS)[:2]:
        reads = gs.run(model, ids, read).reads
        assert_same(reads["embed"], reads["x"].mean(1), atol=1e-6)
    assert len(compiled) == 2
    compiled.clear()
    for ids in lengths_of(IDS):
        read = [gs.capture("resid_post", 5), gs.read("resid_post", 5, doubled, name="twice")]
        reads = gs.run(model, ids, read).reads
        assert_same(reads["twice"], 2 * reads["resid_post"])
    assert len(compiled) == 1


def test_a_cache_and_tokens_on_a_device_or_a_mesh(model, compiled):
    """A cache is left as it is; arrays on devices are filled up there, and stay on their mesh."""
    cache = gs.init_cache(model.config, 2, 16, model.dtype)
    out = gs.run(model, IDS, [gs.capture("attn_pattern", 5)], cache=cache)
    assert int(out.cache.used) == 10 and out.reads["attn_pattern"].shape == (2, 4, 10, 16)
    mesh = gs.make_mesh(2, 2)
    params = jax.device_put(model.params, gs.param_shardings(model.config, mesh))
    compiled.clear()
    spread, read = model.replace(params=params), [gs.capture("q", 3)]
    found = [gs.run(spread, gs.shard_batch(mesh, ids), read) for ids in lengths_of(IDS)]
    assert len(compiled) == 1
    assert_same(found[-1], gs.run(model, IDS, read, pad=False))
    assert len(found[-1].logits.sharding.device_set) == 4


def test_a_packed_batch_and_a_coder_are_filled_up(model, compiled):
    r = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(r.normal(size=shape), jnp.float32)
    sae = gs.SparseCoder(draw(32, 50), draw(50), draw(50) ** 2, draw(50, 32), draw(32), layer=2)
    work = [gs.edit(sae, gs.clamp, 7, 3.0), gs.features(sae), gs.features(sae, k=4, name="top")]
    found = {}
    for n in (5, 7, 9):
        segments = np.array([[1, 1, 2, 2, 3, 3, 3, 3, 3]] * 2)[:, :n]
        found[n] = gs.run(model, IDS[:, :n], work, segments=segments)
    assert len(compiled) == 1
    assert_same(found[9], gs.run(model, IDS[:, :9], work, segments=segments, pad=False), atol=1e-3)


def test_eight_prompts_of_eight_lengths_generate_with_one_program(model, compiled):
    read = [gs.capture("resid_post", 1)]
    found = [gs.generate(model, ids[:1], 4, read, stop_tokens=()) for ids in lengths_of(IDS)]
    assert len(compiled) == 1
    alone = gs.generate(model, IDS[:1], 4, read, stop_tokens=(), pad=False)
    assert len(compiled) == 2
    assert_same((found[-1].tokens, found[-1].reads), (alone.tokens, alone.reads))


def test_buckets_waste_at_most_an_eighth_of_long_texts():
    sizes = [bucket(n, 10**6) for n in range(1, 5000)]
    assert sorted(set(sizes))[:3] == [32, 64, 96]
    for n, size in enumerate(sizes, 1):
        assert n <= size and (size - n < 32 or size - n <= n / 8)
    assert bucket(60, 64) == 64 and bucket(33, 40) == 40
    many = [bucket(n, 10**6, rows=16) for n in (1, 8, 9, 24, 25, 32, 33, 65)]
    assert many == [8, 8, 16, 24, 32, 32, 64, 96] and bucket(9, 10**6, rows=15) == 32
    assert len(set(sizes)) < 60


# -------------------------------------------------------------------------------------------------
# The warning


def call_with(model, n, **changes):
    ids = changes.get("ids", IDS)
    gs.run(model, ids, [gs.write("embed", None, changes.get("fn", doubled))], pad=False)


CAUSES = {
    "functions": lambda model, n: call_with(model, n, fn=lambda x, ctx: x),
    "lengths": lambda model, n: call_with(model, n, ids=IDS[:, : n + 1]),
    "batch sizes": lambda model, n: call_with(model, n, ids=np.repeat(IDS, n + 1, 0)),
    "sets of layers": lambda model, n: gs.run(model, IDS, [gs.write("z", (0, n + 1), doubled)]),
    "shapes of arguments": lambda model, n: gs.run(
        model, IDS, [gs.steer("z", 1, 1.0, positions=np.arange(n + 1))]
    ),
}


@pytest.fixture
def forgotten(monkeypatch):
    """As in a new process, and at two programs, since each costs the test a second."""
    from gemma_scope_jax.model import recompilation

    monkeypatch.setattr(recompilation, "_known", set())
    monkeypatch.setattr(recompilation, "_changes", {})
    monkeypatch.setattr(recompilation, "AGAIN", 3)


def test_lengths_in_buckets_are_few_and_not_told(forgotten, model):
    many = np.tile(IDS, (8, 4))
    for n in range(1, 5):
        call_with(model, n, ids=many[:, : 8 * n])


@pytest.mark.parametrize("cause", CAUSES)
def test_a_call_that_compiles_again_and_again_is_told_why_once(forgotten, cause):
    model = tiny_model(gs.PRESETS["gemma-3-1b"], layers=6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for n in range(4):
            CAUSES[cause](model, n)
            CAUSES[cause](model, 0) if cause != "functions" else None
    (one,) = said
    assert one.category is gs.RecompilationWarning
    assert f"run has been compiled for 3 {cause}, all" in str(one.message)
    assert one.filename == __file__
