"""The sparse step against dense brute force: every backend, values, gradients, edges, fallbacks."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.kernels import active, cpu, triton, xla
from gemma_scope_jax.kernels.active import decode_active, encode_active, kth_largest

B, D, F, E, K = 21, 9, 70, 37, 12  # no multiple of any tile or vector


CPU = jax.default_backend() == "cpu"
COMPILER = CPU and any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
BACKENDS = {"cpu": cpu, "triton": triton, "xla": xla}  # Triton's are interpreted here
if not COMPILER:
    del BACKENDS["cpu"]
on_cpu = pytest.mark.skipif(not CPU, reason="about the kernels for CPUs")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler on this machine")


@pytest.fixture(scope="module", autouse=True)
def compiled():
    assert not CPU or cpu.available() == COMPILER


@pytest.fixture(params=BACKENDS.values(), ids=list(BACKENDS))
def kernels(request, monkeypatch):
    monkeypatch.setattr(xla, "CHUNK", 4 * K * E)  # chunks of four tokens
    monkeypatch.setattr(active, "TOKENS", 8)
    return request.param


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def coder(s=2, quantile=0.88):
    """x, w_enc, b_enc, low with a few active features a token, and none on token 3."""
    x, w, b = draw(0, s, B, D), draw(1, s, F, D), draw(2, s, F)
    x[:, 3] = 0
    z = np.einsum("sbd,sfd->sbf", x, w) + b[:, None]
    low = np.maximum(np.quantile(z, quantile, axis=1), b + 0.01).astype(np.float32)
    low[:, 7] = 1e9  # active nowhere
    return x, w, b, low


def entries(s=2, seed=0):
    """f, feature, count: distinct features of each token in any order, some f zero, token 5 empty,
    token 6 above capacity; rubbish after count."""
    rng = np.random.default_rng(seed)
    feature = np.stack([[rng.permutation(F)[:K] for _ in range(B)] for _ in range(s)])
    f = draw(seed + 1, s, B, K)
    f[rng.random(f.shape) < 0.2] = 0
    count = rng.integers(1, K + 1, (s, B))
    count[:, 5], count[:, 6] = 0, K + 3
    return f, feature.astype(np.int32), count.astype(np.int32)


def dense(f, feature, count):
    """[S,B,F] of the entries that count, a numpy loop."""
    out = np.zeros((*f.shape[:2], F), np.float32)
    for s, b in np.ndindex(*count.shape):
        for k in range(min(K, count[s, b])):
            out[s, b, feature[s, b, k]] = f[s, b, k]
    return out


def dense_decode(f, w, pairs, targets, ends):
    """[T,M,B,E] from dense features."""
    y = [[jnp.zeros((B, E))] * len(ends) for _ in range(targets)]
    for p, (s, t) in enumerate(pairs):
        for m, (a, b) in enumerate(zip((0, *ends), ends)):
            y[t][m] = y[t][m] + f[s, :, a:b] @ w[p, a:b]
    return jnp.stack([jnp.stack(row) for row in y])


TRIANGLE = ((0, 0), (0, 1), (1, 1))
CASES = (
    (1, ((0, 0),), 1, (F,)),
    (2, ((0, 0), (1, 1)), 2, (F,)),
    (2, TRIANGLE, 2, (F,)),
    (1, ((0, 0),), 1, (5, 32, F)),
    (2, TRIANGLE, 3, (5, 32, F)),  # a target that nothing writes
)


def test_encode_lists_what_is_above(kernels):
    x, w, b, low = coder()
    z = np.einsum("sbd,sfd->sbf", x, w) + b[:, None]
    encode = jax.jit(encode_active, static_argnums=4, static_argnames="using")
    got = encode(x, w, b, low, 30, using=kernels)
    for s, i in np.ndindex(2, B):
        (wanted,) = np.nonzero(z[s, i] > low[s])
        n = len(wanted)
        assert got.count[s, i] == n <= 30
        np.testing.assert_array_equal(got.feature[s, i, :n], wanted)
        np.testing.assert_allclose(got.z[s, i, :n], z[s, i, wanted], rtol=1e-5, atol=1e-5)
        assert not np.any(got.z[s, i, n:]) and not np.any(got.feature[s, i, n:])
    assert np.all(got.count[:, 3] == 0)
    assert got.count.max() > 5


def test_encode_reports_overflow_and_keeps_the_first(kernels):
    x, w, b, low = coder()
    full = encode_active(x, w, b, low, 30, using=kernels)
    few = encode_active(x, w, b, low, 2, using=kernels)
    np.testing.assert_array_equal(few.count, full.count)
    np.testing.assert_array_equal(few.feature, full.feature[:, :, :2])
    np.testing.assert_array_equal(few.z, full.z[:, :, :2])


def test_tokens_with_many_entries_have_several_lists(kernels):
    """Together they hold what one long list does, with its gradients."""
    x, w, b, low = map(jnp.asarray, coder())
    full = encode_active(x, w, b, low, 30, using=kernels)
    needs = -(-np.asarray(full.count).max(0) // 3)
    tokens, lists = int((needs > 1).sum()), int(needs[needs > 1].sum())
    assert 2 < tokens < B and lists > tokens + 2
    weight = jnp.asarray(draw(5, 2, B, F))

    def by_feature(w, b, capacity, more):
        found = encode_active(x, w, b, low, capacity, more, using=kernels)
        assert found.z.shape == (2, B + more[1], capacity) and bool(found.complete)
        z = np.zeros((2, B, F), np.float32)  # unused slots are 0, and add nothing
        for s, at in np.ndindex(2, B + more[1]):
            np.add.at(z, (s, found.token[at], found.feature[s, at]), found.z[s, at])
        return z

    one, several = by_feature(w, b, 30, (0, 0)), by_feature(w, b, 3, (tokens + 1, lists + 4))
    np.testing.assert_allclose(several, one, rtol=1e-6)
    for more in ((tokens - 1, lists), (tokens, lists - 1)):
        assert not bool(encode_active(x, w, b, low, 3, more, using=kernels).complete)

    def total(w, b, capacity, more):
        found = encode_active(x, w, b, low, capacity, more, using=kernels)
        rows = weight[:, found.token]
        return jnp.sum(found.z**2 * jnp.take_along_axis(rows, found.feature, -1))

    gradient = jax.grad(total, (0, 1))
    for a, c in zip(gradient(w, b, 3, (tokens, lists)), gradient(w, b, 30, (0, 0)), strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-4)


def test_ties_and_nan_are_not_active(kernels):
    x = np.ones((1, 2, 1), np.float32)
    w = np.arange(40, dtype=np.float32)[None, :, None]
    b = np.zeros((1, 40), np.float32)
    low = w[:, :, 0].copy()
    low[0, [3, 17, 38]] -= 1.0  # strictly above here only
    low[0, 20] = np.nan
    got = encode_active(x, w, b, low, 5, using=kernels)
    np.testing.assert_array_equal(got.count, [[3, 3]])
    np.testing.assert_array_equal(got.feature[0, 1], [3, 17, 38, 0, 0])
    np.testing.assert_array_equal(got.z[0, 1], [3, 17, 38, 0, 0])


def test_encode_gradients_are_the_dense_ones(kernels):
    x, w, b, low = map(jnp.asarray, coder())
    weight = jnp.asarray(draw(5, 2, B, F))

    def wanted(w, b):
        z = jnp.einsum("sbd,sfd->sbf", x, w) + b[:, None]
        return jnp.sum(jnp.where(z > low[:, None], weight * z**2, 0.0))

    def ours(x, w, b, low):
        a = encode_active(x, w, b, low, 30, using=kernels)
        at = jnp.take_along_axis(weight, a.feature, -1)
        # the second term must send nothing: z of an empty slot is a constant
        empty = jnp.arange(30)[None, None, :] >= a.count[..., None]
        return jnp.sum(at * a.z**2) + jnp.sum(jnp.where(empty, 7.0 * a.z, 0.0))

    assert ours(x, w, b, low) == pytest.approx(float(wanted(w, b)), rel=1e-5)
    dx, dw, db, dlow = jax.jit(jax.grad(ours, (0, 1, 2, 3)))(x, w, b, low)
    rw, rb = jax.grad(wanted, (0, 1))(w, b)
    np.testing.assert_allclose(dw, rw, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(db, rb, rtol=1e-4, atol=1e-4)
    assert not np.any(dx) and not np.any(dlow)
    assert not np.any(dw[:, 7])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_and_gradients_are_the_dense_ones(kernels, case):
    s, pairs, targets, ends = case
    f, feature, count = entries(s)
    w, g = jnp.asarray(draw(7, len(pairs), F, E)), jnp.asarray(draw(8, targets, len(ends), B, E))
    full = jnp.asarray(dense(f, feature, count))
    ours = lambda f, w: decode_active(f, feature, count, w, pairs, targets, ends, using=kernels)
    wanted = lambda f, w: dense_decode(f, w, pairs, targets, ends)
    y, back = jax.vjp(jax.jit(ours), jnp.asarray(f), w)
    ry, rback = jax.vjp(wanted, full, w)
    np.testing.assert_allclose(y, ry, rtol=1e-4, atol=1e-4)
    (df, dw), (rf, rw) = back(g), rback(g)
    np.testing.assert_allclose(dw, rw, rtol=1e-4, atol=1e-4)
    # df at every entry, f == 0 too, and nothing after count
    used = np.arange(K) < count[..., None]
    np.testing.assert_allclose(
        df, np.where(used, np.take_along_axis(np.asarray(rf), feature, -1), 0), rtol=1e-4, atol=1e-4
    )
    assert np.any((f == 0) & used & (np.asarray(df) != 0))


def test_a_feature_twice_on_a_token_counts_twice(kernels):
    f, feature = np.ones((1, 1, 3), np.float32), np.full((1, 1, 3), 4, np.int32)
    w = jnp.asarray(draw(0, 1, F, E))
    y, back = jax.vjp(lambda w: decode_active(f, feature, jnp.full((1, 1), 2), w, using=kernels), w)
    np.testing.assert_allclose(y[0, 0, 0], 2 * w[0, 4], rtol=1e-6)
    np.testing.assert_allclose(back(jnp.ones((1, 1, 1, E)))[0][0, 4], 2 * np.ones(E), rtol=1e-6)


def test_a_long_and_a_wide_case_agree(kernels):
    """Several tiles of features and tokens, rows of several vectors."""
    x, w = jnp.asarray(draw(0, 1, 70, 150)), jnp.asarray(draw(1, 1, 9000, 150))
    b, low = jnp.asarray(draw(2, 1, 9000)), jnp.full((1, 9000), 30.0)

    def loss(w, kernels):
        a = encode_active(x, w, b, low, 300, using=kernels)
        y = decode_active(a.z, a.feature, a.count, w, using=kernels)
        return jnp.sum((x[:, None] - y) ** 2) / 1e6, a.count

    (got, count), dw = jax.value_and_grad(loss, has_aux=True)(w, kernels)

    def wanted(w):
        z = x[0] @ w[0].T + b
        return jnp.sum((x[0] - jnp.where(z > low, z, 0.0) @ w[0]) ** 2) / 1e6

    value, grad = jax.value_and_grad(wanted)(w)
    assert count.min() > 10 and count.max() <= 300
    np.testing.assert_allclose(got, value, rtol=1e-4)
    np.testing.assert_allclose(dw, grad, rtol=1e-3, atol=1e-3 * float(jnp.max(jnp.abs(grad))))


def test_overflow_falls_back_inside_jit_cond_and_scan(kernels):
    x, w, b, low = map(jnp.asarray, coder(1))
    w_dec = jnp.asarray(draw(9, 1, F, E))

    def full(w, w_dec):
        z = jnp.einsum("sbd,sfd->sbf", x, w) + b[:, None]
        return jnp.sum(jnp.einsum("sbf,sfe->sbe", jnp.where(z > low[:, None], z, 0.0), w_dec) ** 2)

    def loss(w, w_dec, capacity):
        a = encode_active(x, w, b, low, capacity, using=kernels)
        few = lambda w_dec: jnp.sum(
            decode_active(a.z, a.feature, a.count, w_dec, using=kernels) ** 2
        )
        return jax.lax.cond(jnp.any(a.count > capacity), lambda d: full(w, d), few, w_dec)

    @jax.jit
    def run(w, w_dec):
        def body(carry, _):
            values = [jax.value_and_grad(loss, (0, 1))(*carry, c) for c in (2, 30)]
            return jax.tree.map(lambda p, g: p - 1e-4 * g, carry, values[1][1]), values

        return jax.lax.scan(body, (w, w_dec), None, length=2)[1]

    overflowed, fits = run(w, w_dec)
    wanted = jax.value_and_grad(full, (0, 1))(w, w_dec)
    for got in (overflowed, fits):
        for a, c in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
            np.testing.assert_allclose(a[0], c, rtol=2e-4, atol=2e-3)
    assert fits[0][1] < fits[0][0]


@needs_compiler
def test_kernels_do_not_depend_on_the_run():
    f, feature, count = entries(2)
    g, w = draw(8, 2, 1, B, E), jnp.asarray(draw(7, 3, F, E))

    def gradients(f, w):
        y, back = jax.vjp(
            lambda f, w: decode_active(f, feature, count, w, TRIANGLE, using=cpu), f, w
        )
        return y, *back(jnp.asarray(g))

    first = gradients(f, w)
    for _ in range(5):
        for a, b in zip(first, gradients(f, w)):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("k", (1, 2, 700, 1400))
def test_kth_largest(kernels, k):
    z = draw(0, 2, 7, 100)
    z[0, :3] = 0.0  # ties, and both zeros
    z[1, 0, :5] = [-0.0, 1e-42, -1e-42, np.inf, -np.inf]
    got = jax.jit(kth_largest, static_argnums=1, static_argnames="using")(z, k, using=kernels)
    assert got.shape == () and got == np.sort(z.ravel())[::-1][k - 1]
    assert not np.any(jax.grad(lambda z: kth_largest(z, k, using=kernels))(z))


def test_wrong_input_is_one_line():
    x, w, b, low = coder()
    f, feature, count = entries(2)
    w_dec = draw(0, 2, F, E)
    with pytest.raises(InputError, match="x must be float32 of 3 axes, not float64"):
        encode_active(x.astype(np.float64), w, b, low, 4)
    with pytest.raises(InputError, match="shapes do not fit"):
        encode_active(x, w[:, :, 1:], b, low, 4)
    with pytest.raises(InputError, match="capacity 71 must be 1 to 70"):
        encode_active(x, w, b, low, 71)
    with pytest.raises(InputError, match="w_dec must be float32"):
        decode_active(f, feature, count, w_dec.astype(np.float64))
    with pytest.raises(InputError, match="shapes do not fit"):
        decode_active(f, feature[:, 1:], count, w_dec)
    with pytest.raises(InputError, match="pairs .* do not fit 2 sources, 1 targets"):
        decode_active(f, feature, count, w_dec, targets=1)
    with pytest.raises(InputError, match="must increase to 70"):
        decode_active(f, feature, count, w_dec, ends=(5, 5, F))
    with pytest.raises(InputError, match="z must be float32"):
        kth_largest(np.zeros(3), 1)
    with pytest.raises(InputError, match="k 4 must be 1 to 3"):
        kth_largest(np.zeros(3, np.float32), 4)


def test_the_gpu_kernels_become_triton_code(monkeypatch):
    """Lowered for an H100 without one. What they compute is checked above, interpreted (on a GPU
    this file runs them: JAX_PLATFORMS=cuda JAX_DEFAULT_MATMUL_PRECISION=float32)."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
    call = triton.pl.pallas_call
    monkeypatch.setattr(
        triton.pl, "pallas_call", lambda *a, **k: call(*a, **k | {"interpret": False})
    )

    def loss(f, w, feature, count):
        y = decode_active(f, feature, count, w, TRIANGLE, ends=(256, 4096), using=triton)
        return jnp.sum(y) + jnp.sum(active.per_feature(f, feature, count, 4096, using=triton) ** 2)

    shapes = [
        jax.ShapeDtypeStruct(s, t)
        for s, t in (
            ((2, 64, 48), jnp.float32),
            ((3, 4096, 640), jnp.float32),
            ((2, 64, 48), jnp.int32),
            ((2, 64), jnp.int32),
        )
    ]
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        step = jax.jit(jax.grad(loss, (0, 1))).trace(*shapes)
        code = step.lower(lowering_platforms=("cuda",)).as_text()
    # values and rows of the decoder, sums and lookups; y itself has no part in the gradient
    assert code.count("__gpu$xla.gpu.triton") >= 3


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache folder, and no memory of an earlier compile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clear = lambda: (cpu.available.cache_clear(), active.backend.cache_clear())
    clear()
    yield tmp_path
    clear()


@on_cpu
def test_kernels_are_there_after_the_cache_has_moved(fresh, monkeypatch):
    for folder in ("a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / folder))
        cpu.available.cache_clear()
        assert cpu.available() == COMPILER


@on_cpu
@pytest.mark.parametrize("why", ("missing", "fails", "readonly"))
def test_without_kernels_one_line_and_those_of_xla(why, fresh, monkeypatch, caplog, request):
    if why == "missing":
        monkeypatch.setenv("CXX", str(fresh / "none"))
    elif why == "fails":
        source = fresh / "broken.cc"
        source.write_text("int main( {")
        monkeypatch.setattr(cpu, "SOURCE", source)
    else:
        (fresh / "gemma_scope_jax").write_text("in the way of the folder")
    assert active.backend() is active.backend() is xla
    (printed,) = caplog.messages
    assert printed.startswith("no CPU kernels") and "\n" not in printed
    expected = {"missing": "no C++ compiler", "fails": "error", "readonly": "gemma_scope_jax"}
    assert expected[why] in printed
    x, w, b, low = coder()
    got, wanted = encode_active(x, w, b, low, 30), encode_active(x, w, b, low, 30, using=xla)
    np.testing.assert_array_equal(got.z, wanted.z)


@needs_compiler
def test_compiled_once_and_found_again(fresh, monkeypatch):
    """A stand-in source: what counts here is the file, not what it does."""
    source = fresh / "small.cc"
    source.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(cpu, "SOURCE", source)
    file = cpu._library()
    made = file.stat().st_mtime_ns
    assert cpu._library() == file and file.stat().st_mtime_ns == made
    assert list(file.parent.iterdir()) == [file]
    source.write_text('extern "C" int answer() { return 43; }')
    assert cpu._library() != file
