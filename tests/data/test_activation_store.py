"""The activation store against the model itself; killed, cut, corrupted and resumed."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open

import store_writer
from gemma_scope_jax.data.activations import files
from gemma_scope_jax.data.activations.store import ActivationStore, write_activations
from gemma_scope_jax.data.batches import TokenBatches
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.run import run
from gemma_scope_jax.model.sharding import make_mesh, param_shardings
from gemma_scope_jax.storage.locks import only_writer
from store_writer import SITES, make, texts, write
from tiny import tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store of 1,000 tokens in 28 shards, and its folder's bytes."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    return write(folder, tokens=1000), contents(folder)


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole[0].folder, tmp_path / "copy")


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def by_hand(model, batches, tokens, first=1):
    """{site: float32 [layers, tokens, D]} from the whole model, a token at a time."""
    rows = {site: [] for site in SITES}
    while len(rows["mlp_out"]) < tokens:
        batch = next(batches)
        captures = [capture(site, layers) for site, layers in SITES.items()]
        out = run(model, batch.tokens, captures, segments=batch.segments)
        for r, c in np.ndindex(batch.tokens.shape):
            segment = batch.segments[r, c]
            start = int(np.argmax(batch.segments[r] == segment))
            if segment and c - start >= first and batch.mask[r, c]:
                for site in SITES:
                    rows[site].append(np.asarray(out.reads[site][:, r, c]))
    return {site: np.stack(x[:tokens], 1) for site, x in rows.items()}


# -------------------------------------------------------------------------------------------------
# What is in it


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_store_holds_what_the_model_computes(model, tmp_path, dtype):
    store = write(tmp_path, tokens=300, dtype=dtype, first=3)
    expected = by_hand(model, make(), 300, first=3)
    got = store.read(np.arange(len(store)))
    assert len(store) == 300 and store.sites == SITES and store.width("mlp_out") == 32
    for site, x in expected.items():
        assert got[site].dtype.name == ("float32" if dtype == "int8" else "bfloat16")
        y, top = got[site].astype(np.float32), np.abs(x).max(-1, keepdims=True)
        if dtype == "int8":
            assert np.all(np.abs(y - x) <= top / 127 * 0.501)
        else:
            np.testing.assert_allclose(y, x, rtol=2**-8, atol=1e-5)
        wide = y.astype(np.float64)
        sums = store.manifest["sums"][site]
        np.testing.assert_allclose(sums["sum"], wide.sum(1), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(sums["squared_norm"], (wide**2).sum((1, 2)), rtol=1e-6)
    store.verify()


def test_what_the_data_leaves_out_is_not_stored(model, tmp_path):
    class NoA(TokenBatches):
        def __next__(self):
            batch = super().__next__()
            return batch.replace(mask=batch.mask & (batch.tokens != ord("a") % 297 + 3))

    def batches():
        return NoA(texts(), make().text.tokenizer, 4, 32, seed=3)

    store = write_activations(model, batches(), SITES, tmp_path, 200, shard_rows=64)
    expected = by_hand(model, batches(), 200)
    assert np.any(next(make()).tokens == ord("a") % 297 + 3)
    got = store.read(np.arange(200))["resid_post"].astype(np.float32)
    np.testing.assert_allclose(got, expected["resid_post"], rtol=2**-8, atol=1e-5)


def test_a_text_of_which_nothing_counts_ends_and_is_said(model, tmp_path, caplog):
    batches = TokenBatches(["abc", "defg"], make().text.tokenizer, 4, 32)
    with pytest.raises(InputError, match="no token counts.*position 5 or later"):
        write_activations(model, batches, SITES, tmp_path / "a", 100, first=5)
    assert not list((tmp_path / "a").glob("*.safetensors"))
    write_activations(model, batches, SITES, tmp_path / "b", 29, first=4)  # one a reading counts
    assert "the text has been read" in caplog.text


def test_shards_are_safetensors_files(whole):
    path = whole[0].folder / "00002.resid_post.safetensors"
    with safe_open(path, framework="numpy") as file:
        np.testing.assert_array_equal(
            file.get_tensor("values"), whole[0].read(np.arange(74, 111))["resid_post"]
        )


def test_reading_gives_rows_in_the_order_asked_and_only_the_sites_asked(whole, monkeypatch):
    monkeypatch.setattr("gemma_scope_jax.data.activations.store._OPEN_FILES", 3)
    store = ActivationStore(whole[0].folder)
    rows = np.random.default_rng(0).integers(0, 1000, 200)  # some of them twice
    everything, got = store.read(np.arange(1000)), store.read(rows)
    for site in SITES:
        np.testing.assert_array_equal(got[site], everything[site][:, rows])
    part = ActivationStore(store.folder, {"resid_post": (2,)})
    assert part.sites == {"resid_post": (2,)}
    np.testing.assert_array_equal(part.read(rows)["resid_post"], got["resid_post"][1:])
    assert store.read(np.zeros(0, int))["mlp_out"].shape == (1, 0, 32)


def test_batches_are_a_global_shuffle_that_resumes_by_number(whole):
    store = whole[0]
    number = lambda **k: [store.batch_rows(96, n, **k) for n in range(25)]
    rows = np.concatenate(number(seed=5))
    for epoch in range(2):
        assert sorted(rows[1000 * epoch : 1000 * (epoch + 1)]) == list(range(1000))
    assert np.any(rows[:1000] != rows[1000:2000])
    assert np.any(rows != np.concatenate(number(seed=6)))
    shards = rows[:96] // 37
    assert len(set(shards.tolist())) > 20  # a batch comes from everywhere
    batches = store.batches(96, seed=5, start=7)
    for n in (7, 8, 9, 10, 11):
        batch, expected = next(batches), store.read(rows[96 * n : 96 * (n + 1)])
        for site in SITES:
            np.testing.assert_array_equal(batch[site], expected[site])


def test_a_model_on_a_mesh_stores_the_same(model, tmp_path):
    mesh = make_mesh(data=2, model=2, devices=jax.devices()[:4])
    params = jax.device_put(model.params, param_shardings(model.config, mesh))
    spread = write_activations(
        model.replace(params=params), make(), SITES, tmp_path / "a", 200, shard_rows=64
    )
    one = write_activations(model, make(), SITES, tmp_path / "b", 200, shard_rows=64)
    rows = np.arange(200)
    for site in SITES:
        a, b = (s.read(rows)[site].astype(np.float32) for s in (spread, one))
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-4)


# -------------------------------------------------------------------------------------------------
# Killed and resumed


@pytest.mark.parametrize(
    ("tokens", "kills"), [(3000, 2), pytest.param(20_000, 20, marks=pytest.mark.slow)]
)
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, tokens, kills):
    folder, shards = tmp_path / "killed", tokens // 37
    final = contents(write(tmp_path / "whole", tokens=tokens).folder)
    rng, killed, ended = random.Random(0), 0, None
    program = [sys.executable, Path(store_writer.__file__), folder, str(tokens)]
    writer = subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with writer:
        while ended != 0:
            print(file=writer.stdin, flush=True)
            child = int(writer.stdout.readline())
            wanted, patience = count_shards(folder) + rng.randint(5, 30), time.monotonic() + 100
            while count_shards(folder) < wanted <= shards:
                assert time.monotonic() < patience, "nothing is written"
                time.sleep(0.002)
            if wanted <= shards:  # else it is left to finish
                time.sleep(rng.random() * 0.02)
                with contextlib.suppress(ProcessLookupError):  # it may have just ended
                    os.kill(child, signal.SIGKILL)
            ended = int(writer.stdout.readline())
            killed += ended == signal.SIGKILL
            # Whatever has a final name is complete, and the store can be opened as it is.
            for name, data in contents(folder).items():
                assert name.startswith(".") or name == "manifest.json" or data == final[name]
            assert len(ActivationStore(folder)) == min(tokens, 37 * count_shards(folder))
        writer.stdin.close()
    assert killed >= kills
    assert contents(folder) == final


def count_shards(folder):
    try:
        return len(json.loads((folder / "manifest.json").read_text())["shards"])
    except FileNotFoundError:
        return 0


def test_more_tokens_extend_a_store_and_the_same_call_changes_nothing(whole, copy):
    before = contents(copy)
    assert len(write(copy, tokens=1000)) == 1000 and contents(copy) == before
    longer = write(copy, tokens=1200)
    rows = np.arange(1000)
    for site in SITES:
        np.testing.assert_array_equal(longer.read(rows)[site], whole[0].read(rows)[site])
    other = write(copy.parent / "other", tokens=1200)
    for site in SITES:
        np.testing.assert_array_equal(
            longer.read(np.arange(1200))[site], other.read(np.arange(1200))[site]
        )
        ours, theirs = (s.manifest["sums"][site]["sum"] for s in (longer, other))
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_text_that_ends_early_leaves_a_shorter_store(model, tmp_path, caplog):
    store = write_activations(model, make(epochs=1), SITES, tmp_path, 10**5, shard_rows=500)
    everything = sum(int(b.mask.sum()) for b in make(epochs=1))
    assert len(store) == everything and "the text ended" in caplog.text
    store.verify()
    again = write_activations(model, make(epochs=1), SITES, tmp_path, 10**5, shard_rows=500)
    assert len(again) == everything


@pytest.mark.parametrize("call", [0, 6, 20])  # of a file; its folder is synced after it
def test_a_full_disk_is_said_and_the_same_call_goes_on(whole, tmp_path, monkeypatch, call):
    real, calls = os.fsync, iter(range(10**6))

    def fsync(handle):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(InputError, match=r"tokens still to be stored need .* GB"):
        write(tmp_path / "store", tokens=1000)
    left = contents(tmp_path / "store") if (tmp_path / "store").exists() else {}
    assert not [n for n in left if n.startswith(".")]
    write(tmp_path / "store", tokens=1000)
    assert contents(tmp_path / "store") == whole[1]


def test_a_disk_too_small_is_refused_before_the_first_pass(tmp_path, monkeypatch):
    free = shutil._ntuple_diskusage(10**9, 10**9, 150_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(InputError, match="1,000 tokens still to be stored need 0.000192 GB"):
        write(tmp_path / "store", tokens=1000)
    assert not (tmp_path / "store").exists()


# -------------------------------------------------------------------------------------------------
# Bad input


def test_changed_bytes_are_found_and_named(copy):
    path = copy / "00017.mlp_out.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="00017.mlp_out.safetensors: its bytes have changed"):
        ActivationStore(copy).verify()


def manifest_of(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


DAMAGE = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "holds no activations"),
    "cut manifest": (lambda f: os.truncate(f / "manifest.json", 200), "not usable as JSON"),
    "foreign": (lambda f: (f / "manifest.json").write_text("[]"), "not the manifest"),
    "version": (lambda f: manifest_of(f, lambda m: m.update(version=9)), "version is 9, not 1"),
    "lacks": (lambda f: manifest_of(f, lambda m: m.pop("sums")), "lacks sums"),
    "shard gone": (lambda f: (f / "00003.mlp_out.safetensors").unlink(), "is missing"),
    "shard cut": (lambda f: os.truncate(f / "00003.mlp_out.safetensors", 99), "has 99 bytes"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=list(DAMAGE))
def test_damaged_stores_are_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(InputError, match=message):
        ActivationStore(copy)


def test_a_foreign_shard_is_refused_when_it_is_read(copy):
    path = copy / "00003.mlp_out.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(InputError, match="00003.mlp_out.safetensors: not a complete shard"):
        ActivationStore(copy).read(np.arange(200))


def test_another_run_is_not_mixed_into_a_store(model, copy):
    changes = {
        "dtype": lambda: write(copy, dtype="int8"),
        "first": lambda: write(copy, first=4),
        "shard_rows": lambda: write(copy, shard_rows=64),
        "data": lambda: write_activations(model, make(16), SITES, copy, 9, shard_rows=37),
        "sites": lambda: write_activations(model, make(), {"z": (0,)}, copy, 9, shard_rows=37),
        "model": lambda: write_activations(
            tiny_model(PRESETS["gemma-3-270m"], 1, layers=4), make(), SITES, copy, 9, shard_rows=37
        ),
    }
    before = contents(copy)
    for what, call in changes.items():
        with pytest.raises(InputError, match=f"activations of another {what}"):
            call()
    with only_writer(copy), pytest.raises(InputError, match="another process"):
        write(copy, tokens=2000)
    assert contents(copy) == before


BAD_CALLS = {
    "bucket": (dict(folder="gs://bucket/store"), "copy them to a local disk"),
    "a file": (dict(folder=__file__), "cannot be written"),
    "site": (dict(sites={"attn_pattern": (1,)}), "no coder can stand"),
}


@pytest.mark.parametrize(("change", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_calls_are_refused(model, tmp_path, change, message):
    options = {"sites": SITES, "folder": tmp_path / "store", "tokens": 10, **change}
    with pytest.raises(InputError, match=message):
        write_activations(model, make(), **options)


def test_bad_reads_are_refused(whole):
    store = whole[0]
    for rows in (np.array([1000]), np.array([-1]), np.zeros((2, 2), int)):
        with pytest.raises(InputError, match="0..999"):
            store.read(rows)
    for sites, message in (({"mlp_in": (1,)}, "did you mean mlp_out"), ({"mlp_out": (0,)}, "no l")):
        with pytest.raises(InputError, match=message):
            ActivationStore(store.folder, sites)
