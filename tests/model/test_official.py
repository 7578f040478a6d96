"""Official Orbax checkpoints: every layout bit for bit, one line for every broken one."""

import dataclasses
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from checkpoint_files import CONFIG, assert_same, flat_tree, official_tree, random_model, save_orbax
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.load import load_model, model_config
from gemma_scope_jax.model.config import PRESETS, Model
from gemma_scope_jax.model.sharding import make_mesh


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model()


@pytest.fixture(scope="module")
def official(model, tmp_path_factory) -> Path:
    return save_orbax(tmp_path_factory.mktemp("official") / "ckpt", official_tree(model))


@pytest.mark.parametrize("layout", ["nested", "flat", "trainer"])
def test_official_layouts(model, tmp_path, layout, monkeypatch):
    tree = official_tree(model)
    vision = {"kernel": np.full((2, 2), np.nan, np.float32)}
    if layout == "flat":
        tree = flat_tree(tree) | {"SigLiPFromPatches_0/siglip_encoder/embedding": vision}
        assert tree["transformer/layer_1/mlp/linear"].keys() == {"w"}
        assert tree["transformer/layer_1/attn/q_einsum"].keys() == {"w"}
    elif layout == "nested":
        tree |= {"vision_encoder": vision}
    else:
        tree = {"params": tree, "step": np.int32(7), "opt_state": {"mu": vision}}
    save_orbax(tmp_path / "ckpt", tree)
    assert_same(load_model(tmp_path / "ckpt", dtype="float32", config=CONFIG), model)
    # The published sizes are recognised by themselves.
    monkeypatch.setitem(PRESETS, "gemma-3-tiny", dataclasses.replace(CONFIG, name="gemma-3-tiny"))
    assert model_config(tmp_path / "ckpt").name == "gemma-3-tiny"


def test_official_on_a_mesh_in_bfloat16(model, official):
    loaded = load_model(official, config=CONFIG, mesh=make_mesh(2, 4))
    assert_same(loaded, load_model(official, config=CONFIG))
    np.testing.assert_array_equal(
        loaded.params.blocks.w_up, np.asarray(model.params.blocks.w_up).astype(ml_dtypes.bfloat16)
    )


def _drop(tree):
    del tree["layer_1"]["attn"]["kv_einsum"]


def _reshape(tree):
    tree["layer_0"]["mlp"]["linear"] = tree["layer_0"]["mlp"]["linear"].T.copy()


def _nan(tree):
    tree["layer_1"]["attn"]["kv_einsum"]["w"][1, 0, 0, 0] = np.nan


def _grow(tree):
    tree["layer_2"] = tree["layer_1"]


def _stack(tree):
    tree["stacked_layers/attention_type_0"] = tree.pop("layer_0")


@pytest.mark.parametrize(
    "change, message",
    [
        (_drop, "layer_1/attn/kv_einsum/w is missing"),
        (_reshape, r"mlp/linear/w is \(32, 48\), tiny-gemma-3-4b needs \(48, 32\)"),
        (_nan, "w_v of layer 1 holds NaN"),
        (_grow, "has 3 layers, tiny-gemma-3-4b has 2"),
        (_stack, "stacked"),
        (lambda tree: tree.pop("embedder"), "not a Gemma checkpoint"),
        (lambda tree: tree.pop("final_norm"), "final_norm/scale is missing"),
    ],
)
def test_official_checkpoints_that_cannot_be_used(model, tmp_path, change, message):
    tree = official_tree(model)
    change(tree)
    save_orbax(tmp_path / "ckpt", tree)
    with pytest.raises(InputError, match=message) as caught:
        load_model(tmp_path / "ckpt", config=CONFIG)
    assert "\n" not in str(caught.value)


def test_official_of_no_known_size(official):
    with pytest.raises(InputError, match="2 layers of width 32 match none of gemma-3-270m"):
        load_model(official)


@pytest.mark.parametrize("storage", [{"use_ocdbt": False}, {"use_zarr3": True}])
def test_other_storage(model, tmp_path, storage):
    save_orbax(tmp_path / "ckpt", official_tree(model), **storage)
    assert_same(load_model(tmp_path / "ckpt", dtype="float32", config=CONFIG), model)


def test_a_lost_chunk_is_not_zeros(model, tmp_path):
    save_orbax(tmp_path / "ckpt", official_tree(model), use_ocdbt=False)
    (chunk,) = (tmp_path / "ckpt" / "layer_1.mlp.linear").glob("[0-9]*")
    chunk.unlink()
    with pytest.raises(InputError, match="layer_1/mlp/linear/w is damaged"):
        load_model(tmp_path / "ckpt", config=CONFIG)


@pytest.mark.parametrize(
    "metadata", [b"{}", b"[1]", b"\xff", b'{"tree_metadata": {"a": {"key_metadata": [1]}}}', None]
)
def test_damaged_metadata(official, tmp_path, metadata):
    path = shutil.copytree(official, tmp_path / "ckpt") / "_METADATA"
    path.unlink() if metadata is None else path.write_bytes(metadata)
    with pytest.raises(InputError, match="_METADATA") as caught:
        load_model(path.parent, config=CONFIG)
    assert "\n" not in str(caught.value)


def test_flipped_bytes_raise_input_errors_or_load(official, tmp_path):
    shutil.copytree(official, tmp_path / "ckpt")
    files = sorted(x for x in (tmp_path / "ckpt").rglob("*") if x.is_file() and x.stat().st_size)
    rng = np.random.default_rng(0)
    failed = 0
    for i in range(60):
        path = files[i % len(files)]
        good = path.read_bytes()
        bad = bytearray(good)
        for at in rng.integers(0, len(bad), 2):
            bad[at] = rng.integers(256)
        path.write_bytes(bad)
        try:
            load_model(tmp_path / "ckpt", dtype="float32", config=CONFIG)
        except InputError as error:
            failed += 1
            assert "\n" not in str(error)
        path.write_bytes(good)
    assert failed > 10


def test_truncated_data(official, tmp_path):
    shutil.copytree(official, tmp_path / "ckpt")
    for file in (tmp_path / "ckpt").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(InputError, match="is damaged"):
        load_model(tmp_path / "ckpt", config=CONFIG)
