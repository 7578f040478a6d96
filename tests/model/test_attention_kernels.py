"""The accelerators' kernels against `attend`: in interpret mode, and by lowering for TPUs.

What cuDNN computes can only run on a GPU; its arguments are checked through JAX's own "xla"
implementation of the same function.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gemma_scope_jax as gs
from gemma_scope_jax.model import attention_kernels as kernels
from gemma_scope_jax.model.attention import Tokens, attend
from gemma_scope_jax.model.batch import default_positions
from gemma_scope_jax.model.config import Model, init_params
from tiny import tiny

T = 256  # two tiles of queries and keys once BLOCK is 128
SCALE = 0.3
interpreted = partial(kernels.splash, interpret=True)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 128)


def qkv(batch: int, heads: int, kv_heads: int, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    count = (heads, kv_heads, kv_heads)
    return tuple(
        jax.random.normal(key, (batch, T, n, 16)).astype(dtype) for key, n in zip(keys, count)
    )


def packed_segments(batch: int) -> jax.Array:
    """Padding on both sides, three documents, one of them across the tiles."""
    row = np.repeat([0, 1, 2, 3, 0], [20, 50, 100, 76, 10]).astype(np.int32)
    return jnp.tile(row[None], (batch, 1))


def expected(q, k, v, segments, window):
    if segments is None:
        segments = jnp.ones(q.shape[:2], jnp.int32)
    tokens = Tokens(default_positions(segments), segments)
    return attend(q, k, v, SCALE, tokens, tokens, jnp.int32(window or 2**30), True)


def expected_here(q, k, v, segments, *, scale, window):
    """`attend` in the clothes of a kernel."""
    assert scale == SCALE
    return expected(q, k, v, segments, window)


def masked(kernel, q, k, v, segments, window):
    z = kernel(q, k, v, segments, scale=SCALE, window=window)
    if segments is None:
        return z
    return jnp.where((segments > 0)[:, :, None, None], z, jnp.zeros((), z.dtype))


# -------------------------------------------------------------------------------------------------
# The kernels by themselves


@pytest.mark.parametrize(
    "kv_heads, window, packed", [(1, None, False), (2, 100, True), (4, 128, True), (1, 1, False)]
)
def test_splash_equals_attend_and_so_do_its_gradients(kv_heads, window, packed):
    q, k, v = qkv(2, 4, kv_heads)
    segments = packed_segments(2) if packed else None
    weights = jax.random.normal(jax.random.key(1), q.shape)

    def run(fn):
        def total(q, k, v):
            z = fn(q, k, v, segments, window)
            return (z * weights).sum(), z

        (_, z), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
        return z, *gradients

    ours, theirs = run(partial(masked, interpreted)), run(expected)
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_splash_in_bfloat16_is_as_near_to_float32_as_attend():
    q, k, v = qkv(1, 4, 2, jnp.bfloat16)
    exact = expected(*(x.astype(jnp.float32) for x in (q, k, v)), None, 100)
    z = jax.jit(lambda *x: interpreted(*x, None, scale=SCALE, window=100))(q, k, v)
    assert z.dtype == jnp.bfloat16
    error = lambda z: float(jnp.sqrt(jnp.mean((z.astype(jnp.float32) - exact) ** 2)))
    assert error(z) < 2e-3
    assert error(z) < 2 * error(expected(q, k, v, None, 100))


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_what_cudnn_is_asked_for_is_what_attend_computes(kv_heads, window):
    q, k, v = qkv(2, 4, kv_heads)
    z = kernels.flash(q, k, v, None, scale=SCALE, window=window, implementation="xla")
    np.testing.assert_allclose(z, expected(q, k, v, None, window), atol=2e-6)


@pytest.mark.parametrize(
    "batch, heads, kv_heads",
    [(4, 4, 4), (2, 4, 2), (2, 4, 1), (2, 3, 1), (1, 4, 1)],
    ids=["both split", "kv repeated", "one kv head", "heads whole", "batch whole"],
)
def test_a_kernel_over_a_mesh_equals_one_device(batch, heads, kv_heads):
    mesh = gs.make_mesh(2, 4)
    q, k, v = qkv(batch, heads, kv_heads)
    segments = packed_segments(batch)
    inputs = jax.device_put((q, k, v, segments), NamedSharding(mesh, PartitionSpec()))
    kernel = lambda q, k, v, segments: masked(expected_here, q, k, v, segments, 100)
    z = jax.jit(kernels.over_mesh(kernel, mesh.abstract_mesh, q, k))(*inputs)
    np.testing.assert_allclose(z, expected(q, k, v, segments, 100), atol=2e-6)
    split = (2 if batch > 1 else 1, 1, 4 if heads == 4 else 1, 1)
    assert z.addressable_shards[0].data.shape == tuple(n // s for n, s in zip(z.shape, split))


# -------------------------------------------------------------------------------------------------
# Which kernel


@pytest.mark.parametrize(
    "platform, shape, dtype, packed, capability, kernel",
    [
        ("cpu", (1, 128, 4, 128), "bfloat16", False, "9.0", None),
        ("tpu", (1, 128, 4, 128), "bfloat16", True, "", kernels.splash),
        ("tpu", (1, 1024, 4, 256), "float32", False, "", kernels.splash),
        ("tpu", (1, 100, 4, 128), "bfloat16", False, "", None),
        ("tpu", (1, 128, 4, 64), "bfloat16", False, "", None),
        ("gpu", (1, 100, 4, 256), "bfloat16", False, "9.0", kernels.flash),
        ("gpu", (1, 100, 4, 128), "float16", False, "8.0", kernels.flash),
        ("gpu", (1, 100, 4, 256), "bfloat16", False, "8.9", None),
        ("gpu", (1, 100, 4, 128), "bfloat16", False, "7.5", None),
        ("gpu", (1, 100, 4, 128), "bfloat16", False, "gfx90a", None),
        ("gpu", (1, 100, 4, 128), "bfloat16", True, "9.0", None),
        ("gpu", (1, 100, 4, 128), "float32", False, "9.0", None),
    ],
)
def test_kernels_are_taken_only_where_they_fit(
    monkeypatch, platform, shape, dtype, packed, capability, kernel
):
    @dataclasses.dataclass
    class Device:
        compute_capability: str

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(capability)])
    q = jax.ShapeDtypeStruct(shape, dtype)
    assert kernels.kernel_for(platform, q, packed) is kernel


def test_on_a_cpu_attend_is_all_there_is():
    q, k, v = qkv(1, 2, 1)
    segments = jnp.ones((1, T), jnp.int32)
    tokens = Tokens(default_positions(segments), segments)
    window = jnp.where(jnp.array(True), jnp.int32(2**30), jnp.int32(100))

    def ours(q, k, v):
        return kernels.attend_in_order(q, k, v, SCALE, tokens, False, 100, jnp.array(True))

    def plain(q, k, v):
        return attend(q, k, v, SCALE, tokens, tokens, window, True)

    ours, plain = (jax.jit(f).lower(q, k, v).compile().as_text() for f in (ours, plain))
    for word in ("conditional", "while", "custom-call"):
        assert ours.count(word) == plain.count(word)
    assert ours.count("fusion") == plain.count("fusion")


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(tiny(gs.PRESETS["gemma-3-4b"], 7), window=40, context=T)
    return Model(init_params(config, jax.random.key(0)), config)


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """Let the CPU take the TPU's kernel, interpreted, and note how often it is asked for."""
    asked = []

    def kernel_for(platform, q, packed):
        asked.append((platform, packed))
        return interpreted

    monkeypatch.setattr(kernels, "kernel_for", kernel_for)
    return asked


def ids(batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 300, (batch, T)).astype(np.int32)


@pytest.mark.parametrize("devices, packed", [(1, False), (8, True)])
def test_the_forward_pass_and_its_gradients_are_the_same_with_kernels(
    model, monkeypatch, devices, packed
):
    segments = packed_segments(2) if packed else None
    if packed:
        segments = jnp.where(segments == 3, 1, segments)  # the id of the first document again
    tokens = ids(2)

    def run(params, steer):
        work = [gs.capture("z", (5,)), gs.steer("embed", None, steer)]  # 0-4 scanned, 5, 6
        out = gs.forward(model.replace(params=params), tokens, work, segments=segments)
        real = (jnp.ones_like(tokens) if segments is None else segments) > 0
        return jnp.where(real[..., None], out.logits, 0.0).std(), out.reads["z"]

    program = lambda: jax.jit(jax.value_and_grad(lambda p, s: run(p, s), argnums=1, has_aux=True))
    steer = jax.random.normal(jax.random.key(1), (32,))
    (total_, z_), grad_ = program()(model.params, steer)
    params = model.params
    if devices > 1:
        mesh = gs.make_mesh(2, 4)
        params = jax.device_put(params, gs.param_shardings(model.config, mesh))
    asked = []
    monkeypatch.setattr(kernels, "kernel_for", lambda *a: asked.append(a) or interpreted)
    (total, z), grad = program()(params, steer)
    assert asked
    np.testing.assert_allclose(total, total_, rtol=1e-5)
    np.testing.assert_allclose(z, z_, atol=2e-5)
    np.testing.assert_allclose(grad, grad_, atol=1e-6)


def test_kernels_can_be_vmapped(model, monkeypatch):
    monkeypatch.setattr(kernels, "kernel_for", lambda *_: interpreted)
    tokens, vectors = ids(1), jax.random.normal(jax.random.key(1), (2, 32))

    def run(vector):
        work = [gs.steer("resid_post", 2, vector), gs.capture("resid_post", 3)]
        return gs.forward(model, tokens, work, stop_at_layer=4).reads["resid_post"]

    swept = jax.jit(jax.vmap(run))(vectors)
    for one, vector in zip(swept, vectors):
        np.testing.assert_allclose(one, jax.jit(run)(vector), atol=1e-5)


@pytest.mark.parametrize("kind", ["other names", "only tokens", "manual"])
def test_over_other_meshes_than_ours_only_manual_code_takes_kernels(model, monkeypatch, kind):
    def read(model, tokens):
        work = [gs.capture("resid_post", 0)]
        return gs.forward(model, tokens, work, stop_at_layer=1).reads["resid_post"]

    def kernel(*args, **options):
        used.append(options["window"])
        return interpreted(*args, **options)

    used: list[int | None] = []
    names = ("data", "model") if kind == "only tokens" else ("x", "y")
    mesh = jax.make_mesh((2, 4), names, axis_types=(AxisType.Auto, AxisType.Auto))
    whole, rows = PartitionSpec(), PartitionSpec(names[0])
    tokens = ids(2)[:, :128]
    one_device = jax.jit(read)(model, tokens)
    run = read
    if kind == "manual":
        options = {"in_specs": (whole, rows), "out_specs": rows, "check_vma": False}
        run = jax.shard_map(read, mesh=mesh, **options)
    if kind != "only tokens":
        model = jax.device_put(model, NamedSharding(mesh, whole))
    monkeypatch.setattr(kernels, "kernel_for", lambda *_: kernel)
    many = jax.jit(run)(model, jax.device_put(tokens, NamedSharding(mesh, rows)))
    np.testing.assert_allclose(many, one_device, atol=1e-5)
    assert used == ([40] if kind == "manual" else [])


def test_other_orders_caches_and_patterns_take_no_kernel(model, kernels_everywhere):
    tokens = ids(1)[:, :128]
    ahead = np.arange(128, dtype=np.int32)[None]
    trace = lambda *args, **options: jax.eval_shape(lambda: gs.forward(*args, **options))
    trace(model, tokens, positions=ahead)
    trace(model, tokens, [gs.capture("attn_pattern", 1)])
    trace(model, tokens, cache=gs.init_cache(model.config, 1, 128, jnp.float32))
    assert kernels_everywhere == []
    trace(model, tokens)
    here = jax.default_backend()
    assert set(kernels_everywhere) == {(here, False)}
    trace(model, tokens, segments=np.ones_like(tokens))
    assert (here, True) in kernels_everywhere


# -------------------------------------------------------------------------------------------------
# Lowering for a TPU, of weights that lie on no mesh


def test_only_programs_for_tpus_hold_the_tpu_kernel(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    config = dataclasses.replace(tiny(gs.PRESETS["gemma-3-4b"]), head_dim=128, context=T, window=40)
    model = Model(init_params(config, jax.random.key(0)), config)
    tokens = ids(1)

    def slope(vector):
        run = lambda v: gs.forward(model, tokens, [gs.steer("embed", None, v)]).logits.std()
        return jax.grad(run)(vector)

    traced = jax.jit(slope).trace(jnp.ones(32))
    on_tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert on_tpu.count("splash_mha_fwd") and on_tpu.count("splash_mha_dkv")
    assert "tpu_custom_call" in on_tpu
    assert "tpu_custom_call" not in on_cpu
