"""Published folders of every kind: read, understood, and written back bit for bit."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.coders.interop.circuit_tracer import save_circuit_tracer
from gemma_scope_jax.coders.interop.saelens import save_saelens
from gemma_scope_jax.coders.load import decoder_rows, load_coder, load_decoder, matching
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.coders.release import files
from gemma_scope_jax.coders.release.config import folder_config, hook_point, parse_hook_point
from gemma_scope_jax.coders.release.files import save_coder
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import normalise_model_name
from published import MULTI, REPO, SINGLE, SITES, publish, same_leaves, sparse_file


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("where", SINGLE)
def test_single_layer_round_trip(tmp_path, where, dtype):
    folder = publish(tmp_path, where, dtype=dtype, trained_by={"who": ["x", None, 1.5]})
    coder = load_coder(folder)
    stored = load_file(folder / "params.safetensors")
    for field, name in files.TENSORS.items():
        if name in stored:
            np.testing.assert_array_equal(np.asarray(getattr(coder, field)), stored[name])
    category = where.split("/")[0].removesuffix("_all")
    assert isinstance(coder, SparseCoder)
    assert (coder.w_skip is not None) == where.endswith("_affine")
    assert coder.reads == SITES[category]
    assert coder.writes == ("mlp_out" if category == "transcoder" else coder.reads)
    assert coder.layer == int(where.split("layer_")[1].split("_")[0])
    assert (coder.first, coder.info.l0, coder.info.width) == (1, 55, 8)
    assert coder.info.model_name == "google/gemma-3-270m"

    save_coder(coder, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "params.safetensors"]
    for name in ("config.json", "params.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    again = load_coder(tmp_path / "out")
    same_leaves(again, coder)
    assert again.info.config == coder.info.config and "trained_by" in again.info.config


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("where", MULTI)
def test_multi_layer_round_trip(tmp_path, where, dtype):
    folder = publish(tmp_path, where, dtype=dtype, note="kept")
    coder = load_coder(folder)
    clt = where.startswith("clt")
    assert isinstance(coder, MultiLayerCoder) and (coder.w_dec is None) == clt
    assert coder.layers == (tuple(range(18)) if clt else (5, 9, 12, 15))
    assert (coder.kind, coder.reads) == (where.split("/")[0], SITES[where.split("/")[0]])
    assert (coder.w_skip is not None) == where.endswith("_affine")

    save_coder(coder, tmp_path / "lazy")  # a CLT's decoder goes from file to file
    whole = load_decoder(coder)
    save_coder(whole, tmp_path / "whole")
    for name in sorted(os.listdir(folder)):
        for copy in ("lazy", "whole"):
            assert (tmp_path / copy / name).read_bytes() == (folder / name).read_bytes(), name
    same_leaves(load_decoder(tmp_path / "whole"), whole)

    full = np.asarray(whole.full_decoder())
    for i in range(len(coder.layers)):
        stored = load_file(folder / f"params_layer_{i}.safetensors")
        np.testing.assert_array_equal(full[i], stored["w_dec"])
        np.testing.assert_array_equal(np.asarray(coder.w_enc[i]), stored["w_enc"])
        np.testing.assert_array_equal(np.asarray(coder.b_dec[i]), stored["b_dec"])
        if coder.w_skip is not None:
            np.testing.assert_array_equal(
                np.asarray(coder.w_skip[i]), stored["affine_skip_connection"]
            )


def test_what_lies_before_the_triangle_is_ignored_and_written_as_zeros(tmp_path):
    folder = publish(tmp_path, MULTI[0])
    stored = load_file(folder / "params_layer_2.safetensors")
    stored["w_dec"][:, :2] = np.nan
    save_file(stored, folder / "params_layer_2.safetensors")
    coder = load_coder(folder)
    rows = decoder_rows(folder, [3], layer=2)
    assert not rows[:, :2].any() and rows[:, 2:].all()
    save_coder(coder, tmp_path / "out")
    written = load_file(tmp_path / "out" / "params_layer_2.safetensors")["w_dec"]
    assert not written[:, :2].any() and written[:, 2:].all()


def test_dtype_of_the_weights(tmp_path):
    folder = publish(tmp_path, "transcoder/layer_12_width_16k_l0_big_affine")
    stored = load_coder(folder)
    narrow = load_coder(folder, dtype="bfloat16")
    same_leaves(narrow, jax.tree.map(lambda a: a.astype(jnp.bfloat16), stored))
    clt = publish(tmp_path, MULTI[2], F=4)
    narrow = load_coder(clt, dtype=jnp.bfloat16, decoder=True)
    same_leaves(
        narrow, jax.tree.map(lambda a: a.astype(jnp.bfloat16), load_coder(clt, decoder=True))
    )
    same_leaves(load_decoder(load_coder(clt, dtype=jnp.bfloat16)), narrow)


def test_a_coder_of_ones_own_takes_the_published_keys(tmp_path):
    draw = lambda *shape: jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    coder = SparseCoder(
        draw(6, 9),
        draw(9),
        abs(draw(9)),
        draw(9, 6),
        draw(6),
        layer=2,
        reads="resid_mid",
        writes="resid_mid",
        first=3,
        info=CoderInfo(model_name="tiny", l0=4.5),
    )
    save_coder(coder, tmp_path / "own", config_extra={"run": "a"})
    assert json.loads((tmp_path / "own" / "config.json").read_text()) == {
        "hf_hook_point_in": "model.layers.2.pre_feedforward_layernorm.input",
        "hf_hook_point_out": "model.layers.2.pre_feedforward_layernorm.input",
        "width": 9,
        "model_name": "tiny",
        "architecture": "jump_relu",
        "l0": 4.5,
        "affine_connection": False,
        "type": "sae",
        "first": 3,
        "run": "a",
    }
    again = load_coder(tmp_path / "own")
    same_leaves(again, coder)
    assert (again.info.model_name, again.info.l0, again.first) == ("tiny", 4.5, 3)

    # Changed after loading: what no longer holds is rewritten, the rest stays.
    half = again.replace(
        w_enc=again.w_enc[:, :4],
        b_enc=again.b_enc[:4],
        threshold=again.threshold[:4],
        w_dec=again.w_dec[:4],
        first=1,
    )
    save_coder(half, tmp_path / "half")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["width"] == 4 and config["run"] == "a" and "first" not in config
    same_leaves(load_coder(tmp_path / "half"), half)


# Config and path


def test_instruction_tuned_coders_skip_four_positions(tmp_path):
    folder = publish(tmp_path, SINGLE[0], model_name="gemma-v3-270m-it")
    coder = load_coder(folder)
    assert (coder.first, coder.info.model_name) == (4, "google/gemma-3-270m-it")
    save_coder(coder, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == (folder / "config.json").read_text()


@pytest.mark.parametrize(
    "given, want",
    [
        ("google/gemma-3-270m-pt", "google/gemma-3-270m"),
        ("gemma-v3-270m-pt", "google/gemma-3-270m"),
        ("gemma-3-270m", "google/gemma-3-270m"),
        ("google/gemma-v3-1b-it", "google/gemma-3-1b-it"),
        ("gemma-3-4b-pt", "google/gemma-3-4b-pt"),
        ("google/gemma-3-12b", "google/gemma-3-12b-pt"),
        ("tiny-gemma-3-1b", "tiny-gemma-3-1b"),
        ("", ""),
    ],
)
def test_model_names(given, want):
    assert normalise_model_name(given) == want


@pytest.mark.parametrize("site", ["resid_post", "z", "mlp_in", "mlp_out", "resid_mid", "attn_out"])
@pytest.mark.parametrize("layers, multi", [((7,), False), ((5, 9), True), (None, True)])
def test_hook_points_there_and_back(site, layers, multi):
    assert parse_hook_point(hook_point(site, layers, multi)) == (site, layers)


def test_hook_points_of_multimodal_models():
    assert parse_hook_point("model.language_model.layers.3.output") == ("resid_post", (3,))


ABSENT = [  # path, then what it says on its own
    ("gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_medium",
     ("sae", (12,), "resid_post", "resid_post", 1, None, 60, 16384, "google/gemma-3-270m")),
    ("/h/models--google--gemma-scope-2-4b-it/snapshots/0ab/attn_out_all/layer_3_width_262k_l0_big",
     ("sae", (3,), "z", "z", 4, None, 75 + 0, 262144, "google/gemma-3-4b-it")),
    ("gemma-scope-2-1b-it/transcoder/layer_7_width_65k_l0_small_affine",
     ("transcoder", (7,), "mlp_in", "mlp_out", 4, True, 18, 65536, "google/gemma-3-1b-it")),
    ("x/gemma-scope-2-27b-pt/crosscoder/layer_16_31_40_53_width_1m_l0_big",
     ("crosscoder", (16, 31, 40, 53), "resid_post", "resid_post", 1, None, 150, 2**20,
      "google/gemma-3-27b-pt")),
    ("gemma-scope-2-1b-pt/clt/width_262k_l0_medium_affine",
     ("clt", tuple(range(26)), "mlp_in", "mlp_out", 1, True, None, 262080, "google/gemma-3-1b-pt")),
    ("mlp_out/layer_2_width_16k_l0_tiny_seed_3",
     ("sae", (2,), "mlp_out", "mlp_out", 1, None, None, 16384, "")),
]  # fmt: skip


@pytest.mark.parametrize("path, want", ABSENT)
def test_a_missing_config_is_inferred_from_the_path(path, want):
    c = folder_config({}, path)
    got = (c.type, c.layers, c.reads, c.writes, c.first, c.affine)
    l0 = c.info.l0
    if path.startswith("/h/"):  # 60 + 60 * 3 * 3 / 34, rounded down: the published 4b table
        assert l0 == 75
    assert (*got, l0, c.info.width, c.info.model_name) == want


def test_the_path_fills_only_what_the_config_leaves_out(tmp_path):
    config = {"l0": 61, "type": "transcoder", "model_name": None, "width": 8}
    c = folder_config(config, "/somewhere/layer_4_width_16k_l0_small_affine")
    assert (c.layers, c.reads, c.writes, c.affine) == ((4,), "mlp_in", "mlp_out", True)
    assert (c.info.l0, c.info.width, c.info.model_name) == (61, 8, "")
    folder = publish(tmp_path, SINGLE[0])
    whole = load_coder(folder)
    (folder / "config.json").write_text(json.dumps({"width": 8}))
    same_leaves(load_coder(folder), whole)


def test_a_folder_without_config_loads_at_its_published_size(tmp_path):
    folder = tmp_path / REPO / "resid_post" / "layer_12_width_16k_l0_medium"
    folder.mkdir(parents=True)
    sparse_file(folder / "params.safetensors", 640, 16384, {})
    coder = load_coder(folder)
    assert (coder.layer, coder.info.l0, coder.w_enc.shape) == (12, 60, (640, 16384))
    shutil.move(folder, folder.with_name("layer_12_width_65k_l0_medium"))
    with pytest.raises(InputError, match="16384 features, but the config's width is 65536"):
        load_coder(folder.with_name("layer_12_width_65k_l0_medium"))


# Sizes and memory


def test_folders_of_other_libraries_load_alike(tmp_path):
    coder = load_coder(publish(tmp_path, SINGLE[0]))
    save_saelens(coder, tmp_path / "saelens")
    transcoder = load_coder(publish(tmp_path, "transcoder/layer_12_width_16k_l0_big_affine"))
    save_circuit_tracer([transcoder.replace(layer=0)], tmp_path / "tracer")
    narrow = load_coder(tmp_path / "saelens", dtype="bfloat16")
    assert isinstance(narrow, SparseCoder) and (narrow.layer, narrow.reads) == (12, "resid_post")
    np.testing.assert_array_equal(narrow.w_enc, coder.w_enc.astype(jnp.bfloat16))
    traced = load_coder(tmp_path / "tracer")
    np.testing.assert_array_equal(traced.w_skip, transcoder.w_skip)


def test_a_glob_stands_for_what_it_matches(tmp_path):
    for layer in (2, 10):
        (tmp_path / f"layer_{layer}").mkdir()
    assert matching(f"{tmp_path}/layer_*") == [f"{tmp_path}/layer_2", f"{tmp_path}/layer_10"]
    for name in ("run [1]", "run 1"):  # a name is a name before it is a glob
        (tmp_path / name / "layer_3").mkdir(parents=True)
    assert matching(f"{tmp_path}/run [1]") == [f"{tmp_path}/run [1]"]
    assert matching(f"{tmp_path}/run [1]/layer_*") == [f"{tmp_path}/run [1]/layer_3"]
    packaged = matching("gemma-3-270m-transcoder-*")
    assert len(packaged) == 18 and "-transcoder-17-" in packaged[-1]
    assert len(matching("gemma-scope-2-270m-pt/transcoder_all/*_16k_l0_small")) == 18
    assert matching("layer_2") == ["layer_2"]
    with pytest.raises(InputError, match="matches no folder, packaged coder or address"):
        matching("nothing-*")
