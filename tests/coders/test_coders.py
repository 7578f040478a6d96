"""The maths of the coders against float64 sums written out, and what compiles and what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder, block_index, triangle
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError

D, F, X = 24, 40, 5


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def sparse(skip=False, d_out=D, dtype=jnp.float32, **more):
    arrays = {
        "w_enc": normal(0, D, F, dtype=dtype),
        "b_enc": normal(1, F, dtype=dtype),
        "threshold": abs(normal(2, F, dtype=dtype)),
        "w_dec": normal(3, F, d_out, dtype=dtype),
        "b_dec": normal(4, d_out, dtype=dtype),
        "w_skip": normal(5, D, d_out, dtype=dtype) if skip else None,
    }
    return SparseCoder(**arrays, **{"layer": 3, **more})


def multi(skip=False, dtype=jnp.float32, **more):
    arrays = {
        "w_enc": normal(0, X, D, F, dtype=dtype),
        "b_enc": normal(1, X, F, dtype=dtype),
        "threshold": abs(normal(2, X, F, dtype=dtype)),
        "w_dec": normal(3, X * (X + 1) // 2, F, D, dtype=dtype),
        "b_dec": normal(4, X, D, dtype=dtype),
        "w_skip": normal(5, X, D, D, dtype=dtype) if skip else None,
    }
    sites = {"reads": "mlp_in", "writes": "mlp_out"} if skip else {}
    return MultiLayerCoder(**arrays, layers=tuple(range(X)), **sites, **more)


def f64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def loop_encode(x, w_enc, b_enc, threshold):
    """Feature by feature in float64: x [D] -> [F]."""
    f = np.zeros(len(b_enc))
    for k in range(len(b_enc)):
        z = sum(x[d] * w_enc[d, k] for d in range(len(x))) + b_enc[k]
        if z > threshold[k]:
            f[k] = max(z, 0.0)
    return f


def loop_decode(f, w_dec, b_dec):
    """Feature by feature in float64: f [F] -> [D_out]."""
    y = b_dec.copy()
    for k in range(len(f)):
        y = y + f[k] * w_dec[k]
    return y


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sparse_coder_equals_a_float64_loop(skip, dtype):
    coder = sparse(skip, dtype=dtype)
    x = normal(6, 2, 3, D, dtype=dtype)
    c, xs = f64(coder), np.asarray(x, np.float64)
    f, y = coder.encode(x), coder.reconstruct(x)
    assert f.dtype == y.dtype == jnp.float32 and f.shape == (2, 3, F) and y.shape == (2, 3, D)
    active = 0
    for at in np.ndindex(2, 3):
        want = loop_encode(xs[at], c.w_enc, c.b_enc, c.threshold)
        active += np.count_nonzero(want)
        np.testing.assert_allclose(f[at], want, rtol=1e-5, atol=1e-5)
        want = loop_decode(want, c.w_dec, c.b_dec) + (xs[at] @ c.w_skip if skip else 0)
        np.testing.assert_allclose(y[at], want, rtol=1e-5, atol=1e-4)
    assert 0 < active < f.size, "the comparison needs both active and silent features"


def test_any_leading_shape():
    coder = sparse()
    x = normal(6, 2, 3, D)
    f = coder.encode(x)
    np.testing.assert_array_equal(coder.encode(np.asarray(x)), f)
    for point in ((0, 0), (1, 2)):
        np.testing.assert_allclose(coder.encode(x[point]), f[point], rtol=1e-6, atol=1e-6)
    assert coder.encode(jnp.zeros((0, D))).shape == (0, F)
    assert coder.decode(jnp.zeros((4, 0, F))).shape == (4, 0, D)


def test_jump_relu_is_strict_and_is_not_a_shifted_relu():
    eye = jnp.eye(4, dtype=jnp.float32)
    zero = jnp.zeros(4)
    coder = SparseCoder(eye, zero, jnp.asarray([2.0, 2.0, 0.0, 0.0]), eye, zero, layer=0)
    just_above = np.nextafter(np.float32(2), np.float32(3))
    f = coder.encode(jnp.asarray([2.0, just_above, 0.0, -1.0]))
    np.testing.assert_array_equal(f, [0.0, just_above, 0.0, 0.0])


def test_a_negative_pre_activation_never_comes_out_and_nan_does():
    eye, zero = jnp.eye(2, dtype=jnp.float32), jnp.zeros(2)
    coder = SparseCoder(eye, zero, jnp.asarray([-3.0, -3.0]), eye, zero, layer=0)
    f = coder.encode(jnp.asarray([[-1.0, 1.0], [0.0, jnp.nan]]))
    np.testing.assert_array_equal(f[0], [0.0, 1.0])
    assert np.isnan(f[1]).any()


def test_arithmetic_is_float32_whatever_comes_in():
    coder, x = sparse(dtype=jnp.bfloat16), normal(6, 7, D, dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), coder)
    np.testing.assert_array_equal(coder.reconstruct(x), wide.reconstruct(x.astype(jnp.float32)))


def test_kinds_and_sizes():
    assert sparse().kind == "sae"
    assert sparse(reads="mlp_in", writes="mlp_out").kind == "transcoder"
    assert sparse(skip=True, reads="mlp_in", writes="mlp_out").kind == "skip_transcoder"
    other = sparse(d_out=8, reads="mlp_in", writes="mlp_out")
    assert (other.d_in, other.width, other.d_out) == (D, F, 8)
    assert (multi().kind, multi(True).kind) == ("crosscoder", "clt")
    assert (multi().d_in, multi().width, multi().d_out) == (D, F, D)


@pytest.mark.parametrize("build", [sparse, multi])
def test_weights_and_info_do_not_recompile(build):
    reconstruct = jax.jit(lambda coder, x: coder.reconstruct(x))
    coder, x = build(), normal(6, X, 2, D)
    first = reconstruct(coder, x)
    double = jax.tree.map(lambda a: 2 * a, coder)
    info = CoderInfo("google/gemma-3-4b-it", "sae", 60, F, "elsewhere", {"seed": [1, 2]})
    second = reconstruct(double.replace(info=info), x)
    assert reconstruct._cache_size() == 1
    assert not np.allclose(first, second)
    reconstruct(coder.replace(first=4), x)
    assert reconstruct._cache_size() == 2, "static fields do choose the program"


@pytest.mark.law
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_multi_layer_coder_equals_a_float64_triangular_sum(skip, dtype):
    coder, x = multi(skip, dtype), normal(6, X, 3, D, dtype=dtype)
    coder.check_shapes()
    c, xs = f64(coder), np.asarray(x, np.float64)
    f, y = coder.encode(x), coder.reconstruct(x)
    assert f.dtype == y.dtype == jnp.float32 and f.shape == (X, 3, F) and y.shape == (X, 3, D)
    for t in range(3):
        want = [loop_encode(xs[i, t], c.w_enc[i], c.b_enc[i], c.threshold[i]) for i in range(X)]
        np.testing.assert_allclose(f[:, t], want, rtol=1e-5, atol=1e-5)
        block = 0
        out = c.b_dec.copy()
        for i in range(X):
            for j in range(i, X):
                out[j] += loop_decode(want[i], c.w_dec[block], np.zeros(D))
                block += 1
            out[i] += xs[i, t] @ c.w_skip[i] if skip else 0
        np.testing.assert_allclose(y[:, t], out, rtol=1e-5, atol=2e-4)


def test_decoding_equals_the_dense_decoder():
    coder, f = multi(), abs(normal(7, X, 2, 3, F))
    full = np.asarray(coder.full_decoder(), np.float64)
    assert full.shape == (X, F, X, D)
    want = np.einsum("i...f,ifjd->j...d", np.asarray(f, np.float64), full)
    want = want + np.asarray(coder.b_dec)[:, None, None, :]
    np.testing.assert_allclose(coder.decode(f), want, rtol=1e-5, atol=1e-4)
    for i, j in zip(*triangle(X)):
        np.testing.assert_array_equal(coder.decoder(i, j), full[i, :, j].astype(np.float32))
    assert not full[np.tril_indices(X, -1)[0], :, np.tril_indices(X, -1)[1]].any()


def test_blocks_are_source_major():
    source, target = triangle(X)
    assert [block_index(i, j, X) for i, j in zip(source, target)] == list(range(len(source)))


def test_contributions_of_a_traced_layer_add_up_to_decode():
    coder, x = multi(skip=True), normal(6, X, 3, D)
    encode_layer = jax.jit(lambda i, x: coder.encode_layer(i, x))
    contributions = jax.jit(lambda i, f: coder.contributions(i, f))
    skip = jax.jit(lambda i, x: coder.skip_layer(i, x))
    f = jnp.stack([encode_layer(i, x[i]) for i in range(X)])
    np.testing.assert_allclose(f, coder.encode(x), rtol=1e-6, atol=1e-6)
    written = [contributions(i, f[i]) for i in range(X)]
    for i in range(X):
        assert not written[i][:i].any() and np.asarray(written[i][i:]).any(axis=(1, 2)).all()
    np.testing.assert_allclose(written[2], coder.contributions(2, f[2]), rtol=1e-6, atol=1e-5)
    y = sum(written) + coder.b_dec[:, None, :] + jnp.stack([skip(i, x[i]) for i in range(X)])
    np.testing.assert_allclose(y, coder.decode(f, x), rtol=1e-5, atol=2e-4)


def test_gradients_of_contributions_and_decode_agree():
    coder, f = multi(), abs(normal(7, X, 3, F))
    weight = normal(8, X, 3, D)

    def by_decode(coder, f):
        return jnp.sum(weight * coder.decode(f))

    def by_scan(coder, f):
        add = lambda y, layer: (y + coder.contributions(*layer), None)
        start = jnp.broadcast_to(coder.b_dec[:, None, :], (X, 3, D))
        y, _ = jax.lax.scan(add, start, (jnp.arange(X), f))
        return jnp.sum(weight * y)

    for one, other in zip(
        *map(
            jax.tree.leaves,
            [jax.jit(jax.grad(g, argnums=(0, 1)))(coder, f) for g in (by_decode, by_scan)],
        )
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    full = np.asarray(coder.full_decoder(), np.float64)
    want = np.einsum("jtd,ifjd->itf", np.asarray(weight, np.float64), full)
    np.testing.assert_allclose(
        jax.jit(jax.grad(by_decode, 1))(coder, f), want, rtol=1e-4, atol=1e-4
    )


def test_gradient_of_contributions_keeps_no_copy_of_the_decoder():
    X, D, F = 8, 32, 512
    shapes = {"w_enc": (X, D, F), "b_enc": (X, F), "threshold": (X, F), "b_dec": (X, D)}
    shapes["w_dec"] = (X * (X + 1) // 2, F, D)
    coder = MultiLayerCoder(
        **{k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()},
        layers=tuple(range(X)),
    )

    def loss(f, coder):
        add = lambda y, layer: (y + coder.contributions(*layer), None)
        y, _ = jax.lax.scan(add, jnp.zeros((X, 4, D)), (jnp.arange(X), f))
        return jnp.sum(y * y)

    f = jax.ShapeDtypeStruct((X, 4, F), jnp.float32)
    memory = jax.jit(jax.grad(loss)).lower(f, coder).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.25 * 4 * X * (X + 1) // 2 * F * D


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: sparse().encode(jnp.zeros((2, D + 1))), ["resid_post of layer 3", str(D)]),
        (lambda: sparse(reads="z", writes="z").encode(jnp.zeros(())), ["z of layer 3"]),
        (lambda: sparse().decode(jnp.zeros((2, F - 1))), ["feature", str(F)]),
        (lambda: sparse(True).decode(jnp.zeros((2, F))), ["decode(f, x)"]),
        (lambda: sparse(True).decode(jnp.zeros(F), jnp.zeros(D - 1)), [str(D)]),
        (lambda: multi().encode(jnp.zeros((X - 1, 2, D))), [f"[{X}, ..., {D}]"]),
        (lambda: multi().encode(jnp.zeros((X, 2, D - 1))), ["resid_post", str(D)]),
        (lambda: multi().encode(jnp.zeros((X,))), [f"[{X}, ..., {D}]"]),
        (lambda: multi().decode(jnp.zeros((X, 2, F - 1))), [str(F)]),
        (lambda: multi(True).decode(jnp.zeros((X, 2, F))), ["decode(f, x)"]),
        (lambda: multi().replace(w_dec=None).decode(jnp.zeros((X, F))), ["load_decoder"]),
        (lambda: multi().replace(w_dec=None).contributions(0, jnp.zeros(F)), ["load_decoder"]),
        (lambda: multi().replace(w_dec=None).full_decoder(), ["load_decoder"]),
        (lambda: multi().contributions(X, jnp.zeros(F)), [f"0 to {X - 1}"]),
        (lambda: multi().encode_layer(-1, jnp.zeros(D)), [f"0 to {X - 1}"]),
        (lambda: multi().decoder(2, 1), ["earlier"]),
        (lambda: sparse().replace(b_enc=jnp.zeros(F + 1)).check_shapes(), ["b_enc", str(F)]),
        (lambda: sparse().replace(w_enc=jnp.zeros(F)).check_shapes(), ["w_enc", "[D, F]"]),
        (lambda: sparse().replace(threshold=None).check_shapes(), ["threshold"]),
        (lambda: sparse().replace(b_dec=jnp.zeros(D, int)).check_shapes(), ["b_dec", "int"]),
        (lambda: sparse(True).replace(w_skip=jnp.zeros((D, 3))).check_shapes(), ["w_skip"]),
        (lambda: sparse(d_out=8).check_shapes(), ["8", "resid_post"]),
        (lambda: sparse(layer=-1).check_shapes(), ["-1"]),
        (lambda: multi().replace(w_dec=jnp.zeros((X, F, D))).check_shapes(), ["w_dec"]),
        (lambda: multi().replace(layers=(4, 3, 2, 1, 0)).check_shapes(), ["layers"]),
        (lambda: multi().replace(layers=(0, 1)).check_shapes(), ["layers"]),
    ],
)
def test_wrong_input_is_one_line(call, words):
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
