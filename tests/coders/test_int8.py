"""Matrices as int8 with scales: half the room, the same within half a step, any fault told."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_scope_jax.coders.load import decoder_rows, load_coder
from gemma_scope_jax.coders.release.files import save_coder
from gemma_scope_jax.errors import InputError
from published import MULTI, SINGLE, publish, same_leaves

AFFINE = "transcoder/layer_12_width_16k_l0_big_affine"
MATRICES = ("w_enc", "w_dec", "w_skip")


@pytest.mark.parametrize("where", [SINGLE[0], AFFINE])
def test_round_trip(tmp_path, where):
    coder = load_coder(publish(tmp_path, where, dtype=ml_dtypes.bfloat16))
    save_coder(coder, tmp_path / "small", int8=True)
    small = load_coder(tmp_path / "small")
    for field in MATRICES:
        given, found = getattr(coder, field), getattr(small, field)
        if given is None:
            assert found is None
            continue
        assert found.dtype == jnp.bfloat16
        given, found = np.asarray(given, np.float32), np.asarray(found, np.float32)
        # half a step of int8 of the largest value of its row or column, and half of bfloat16's bit
        largest = np.maximum(*(np.abs(given).max(axis, keepdims=True) for axis in (0, 1)))
        assert (np.abs(found - given) <= largest / 254 + np.abs(found) / 256).all()
    for field in ("b_enc", "threshold", "b_dec"):
        np.testing.assert_array_equal(getattr(coder, field), getattr(small, field))
    assert coder.info.config == small.info.config and coder.reads == small.reads
    stored = load_file(tmp_path / "small/params.safetensors")
    assert all(
        stored[n].dtype == (np.float32 if n.endswith(("_rows", "_columns")) else np.int8)
        for n in stored
        if n.startswith(("w_", "affine"))
    )


def test_reads_alike_in_every_way(tmp_path):
    save_coder(load_coder(publish(tmp_path, AFFINE)), tmp_path / "small", int8=True)
    small = load_coder(tmp_path / "small")
    rows = decoder_rows(tmp_path / "small", [5, 1, 1])
    np.testing.assert_array_equal(rows, np.asarray(small.w_dec)[[5, 1, 1]])
    assert load_coder(tmp_path / "small", dtype="float32").w_dec.dtype == jnp.float32
    # Saved again, it is a published folder of bfloat16, with the same values.
    save_coder(small, tmp_path / "again")
    same_leaves(load_coder(tmp_path / "again"), small)
    names = set(load_file(tmp_path / "again/params.safetensors"))
    assert not any(name.endswith("_rows") for name in names)


def test_a_feature_of_zeros_stays_one(tmp_path):
    coder = load_coder(publish(tmp_path, AFFINE))
    coder = coder.replace(w_dec=coder.w_dec.at[3].set(0), w_enc=coder.w_enc.at[:, 2].set(0))
    save_coder(coder, tmp_path / "small", int8=True)
    small = load_coder(tmp_path / "small")
    assert not np.asarray(small.w_dec[3]).any() and not np.asarray(small.w_enc[:, 2]).any()


def test_sizes_that_differ_a_thousandfold_are_kept_apart(tmp_path):
    coder = load_coder(publish(tmp_path, AFFINE))
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.uniform(-3, 0, 640)
    skip = sizes[:, None] * rng.normal(size=(640, 640)) * sizes
    save_coder(coder.replace(w_skip=jnp.float32(skip)), tmp_path / "small", int8=True)
    found = np.asarray(load_coder(tmp_path / "small").w_skip, np.float64)
    errors = np.abs(found - skip) / (sizes[:, None] * sizes)
    assert errors.max() < 0.05 and errors.mean() < 0.01


BAD = [
    (lambda s: s.pop("w_dec_rows"), "w_dec is I8, without its w_dec_rows"),
    (lambda s: s.pop("w_dec_columns"), "w_dec is I8, without its w_dec_columns"),
    (lambda s: s.update(w_dec=s["w_dec"].astype(np.float32)), "unknown tensor 'w_dec_columns'"),
    (lambda s: s.update(w_dec_rows=s["w_dec_rows"][:, None]), "w_dec_rows is F32 [8, 1]"),
    (lambda s: s.update(w_enc_rows=s["w_enc_columns"]), "w_enc_rows is F32 [8], not F32 [640]"),
    (lambda s: s.update(w_enc_rows=s["w_enc_rows"].astype(np.float64)), "w_enc_rows is F64"),
    (lambda s: s["w_enc_columns"].__setitem__(3, np.nan), "w_enc holds NaN"),
    (lambda s: s.update(b_enc=s["b_enc"].astype(np.int8)), "b_enc is I8, not"),
]


@pytest.mark.parametrize("spoil, words", BAD)
def test_faults_are_told(tmp_path, spoil, words):
    save_coder(load_coder(publish(tmp_path, AFFINE)), tmp_path / "small", int8=True)
    file = tmp_path / "small/params.safetensors"
    stored = load_file(file)
    spoil(stored)
    save_file(stored, file)
    with pytest.raises(InputError) as raised:
        load_coder(tmp_path / "small")
    assert words in str(raised.value) and str(file) in str(raised.value)


def test_several_layers_are_refused(tmp_path):
    crosscoder = load_coder(publish(tmp_path, MULTI[0]))
    with pytest.raises(InputError, match="int8 is for coders of one layer"):
        save_coder(crosscoder, tmp_path / "small", int8=True)
    assert not (tmp_path / "small").exists()
