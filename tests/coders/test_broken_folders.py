"""Broken folders, failing disks and an unreachable hub: one line each, and nothing half done."""

import errno
import json
import os
import random
import resource
import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import errors as hub_errors
from safetensors.numpy import load_file, save_file

from gemma_scope_jax.coders import load
from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.coders.load import decoder_rows, load_coder, load_decoder
from gemma_scope_jax.coders.release import files
from gemma_scope_jax.coders.release.files import save_coder
from gemma_scope_jax.errors import InputError
from published import MULTI, REPO, SINGLE, publish, same_leaves, sparse_file, tensors


def edit_tensors(change, name="params.safetensors"):
    def spoil(folder):
        stored = load_file(folder / name)
        stored = change(stored) or stored
        save_file(stored, folder / name)

    return spoil


def edit_config(**keys):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **keys}))

    return spoil


def put(name, index, value):
    def change(stored):
        stored[name][index] = value

    return edit_tensors(change)


def without(name):
    return edit_tensors(lambda stored: {k: v for k, v in stored.items() if k != name})


def cast(name, dtype):
    return edit_tensors(lambda stored: {**stored, name: stored[name].astype(dtype)})


def cut(file, size):
    return lambda folder: os.truncate(folder / file, size)


def text(value):
    return lambda folder: (folder / "config.json").write_bytes(value)


SAE, AFFINE = SINGLE[0], "transcoder/layer_12_width_16k_l0_big_affine"
BAD = [  # folder, what is done to it, words of the message
    (SAE, put("threshold", 0, -1e-3), "negative"),
    (SAE, put("threshold", 1, np.inf), "threshold"),
    (SAE, put("w_enc", (1, 2), np.nan), "w_enc"),
    (SAE, put("w_dec", (1, 2), -np.inf), "w_dec"),
    (SAE, put("b_dec", 0, np.nan), "b_dec"),
    (SAE, without("threshold"), "threshold"),
    (SAE, cast("w_enc", np.int32), "I32"),
    (SAE, cast("b_enc", np.float64), "F64"),
    (SAE, edit_tensors(lambda s: {**s, "w_enc": s["w_enc"].T.copy()}), "shape"),
    (SAE, edit_tensors(lambda s: {**s, "b_enc": s["b_enc"][None]}), "b_enc"),
    (SAE, edit_tensors(lambda s: tensors(0, 1152, 8)), "640"),
    (SAE, edit_tensors(lambda s: tensors(0, 640, 0)), "shape"),
    (SAE, edit_config(width=16384), "16384"),
    (SAE, edit_config(width="8"), "width"),
    (SAE, edit_config(width=-8), "width"),
    (SAE, edit_config(l0=float("nan")), "l0"),
    (SAE, edit_config(l0=[60]), "l0"),
    (SAE, edit_config(affine_connection=True), "affine_skip_connection is missing"),
    (AFFINE, edit_config(affine_connection=False), "affine_skip_connection is there"),
    (AFFINE, without("affine_skip_connection"), "affine_skip_connection is missing"),
    (SAE, edit_config(affine_connection="no"), "affine_connection"),
    (SAE, edit_config(type="transcoder"), "contradicts"),
    (SAE, edit_config(type="saes"), "did you mean sae"),
    (SAE, edit_config(type="clt"), "contradicts"),
    (SAE, edit_config(architecture="topk"), "topk"),
    (SAE, edit_config(model_name="google/gemma-3-9b-pt"), "gemma-3-9b"),
    (SAE, edit_config(model_name="google/gemma-3-1b-pt"), "1152"),
    (SAE, edit_config(model_name=["gemma"]), "model_name"),
    (SAE, edit_config(hf_hook_point_in="blocks.12.hook_resid_post"), "hook point"),
    (SAE, edit_config(hf_hook_point_in="model.layers.12.outputs"), "did you mean output"),
    (SAE, edit_config(hf_hook_point_in="model.layers.11.output"), "differ in their layers"),
    (SAE, edit_config(hf_hook_point_in="model.layers.18.output",
                      hf_hook_point_out="model.layers.18.output"), "18"),
    (SAE, edit_config(first=-1), "first"),
    (SAE, text(b'{"width": 8'), "not usable as JSON"),
    (SAE, text(b"[1, 2]"), "list"),
    (SAE, text(b"\xff\xfe{}"), "not UTF-8 text"),
    (SAE, text(b"[" * 100_000), "nested too deeply"),
    (SAE, cut("params.safetensors", 1000), "not a complete safetensors"),
    (SAE, cut("params.safetensors", 0), "not a complete safetensors"),
    (SAE, lambda folder: os.remove(folder / "params.safetensors"), "params_layer_0"),
    (SAE, lambda folder: shutil.copy(folder / "params.safetensors",
                                     folder / "params_layer_0.safetensors"), "do not belong"),
    (MULTI[0], lambda folder: os.remove(folder / "params_layer_2.safetensors"), "params_layer_2"),
    (MULTI[0], edit_tensors(lambda s: tensors(0, 640, 9, 4), "params_layer_3.safetensors"),
     "differ from"),
    (MULTI[0], edit_tensors(lambda s: {**s, "w_dec": s["w_dec"][:, 0].copy()},
                            "params_layer_0.safetensors"), "params_layer_1"),
    (MULTI[0], edit_config(hf_hook_point_in="model.layers.{5,9,12}.output",
                           hf_hook_point_out="model.layers.{5,9,12}.output"), "w_dec"),
    (MULTI[0], edit_config(hf_hook_point_in="model.layers.{9,5,12,15}.output",
                           hf_hook_point_out="model.layers.{9,5,12,15}.output"), "increasing"),
    (MULTI[0], edit_config(type="clt"), "contradicts"),
    (MULTI[1], lambda folder: os.remove(folder / "params_layer_17.safetensors"), "of 18"),
    (MULTI[1], edit_config(width=262080), "262080"),
]  # fmt: skip


@pytest.mark.parametrize("where, spoil, words", BAD)
def test_bad_folders(tmp_path, where, spoil, words):
    folder = publish(tmp_path, where)
    load_coder(folder)
    spoil(folder)
    with pytest.raises(InputError) as error:
        load_coder(folder)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    "source, options, words",
    [
        ("", {}, "neither"),
        ("a\0b", {}, "neither"),
        (None, {}, "NoneType"),
        ("/nowhere/at/all", {}, "no such folder"),
        (Path("nowhere"), {}, "no such folder"),
        ("gemma-3-270m-resid-post-99", {}, "gemma-3-270m-resid-post-99"),
        (f"{REPO}/resid_post/layer_12_width_16k_l0_large", {}, "big"),
        (f"{REPO}/resid_post/layer_13_width_16k_l0_small", {}, "layer_12_width_16k_l0_small"),
        (f"{REPO}/resid_post/layer_12_width_16k_l0_small", {"dtype": "int8"}, "dtype"),
        (f"{REPO}/resid_post/layer_12_width_16k_l0_small", {"dtype": "nonsense"}, "dtype"),
    ],
)
def test_bad_sources(source, options, words):
    with pytest.raises(InputError) as error:
        load_coder(source, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_file_in_place_of_a_folder_and_a_folder_of_nothing(tmp_path):
    folder = publish(tmp_path, SAE)
    with pytest.raises(InputError, match="pass the folder"):
        load_coder(folder / "params.safetensors")
    with pytest.raises(InputError, match=r"neither params\.safetensors nor"):
        load_coder(tmp_path)
    with pytest.raises(InputError, match="on disk"):
        load_coder(folder, decoder=False)
    same_leaves(load_decoder(folder), load_coder(folder))
    with pytest.raises(InputError, match="float16"):
        load_coder(spoiled(folder, put("w_dec", 0, 1e6)), dtype="float16")


def spoiled(folder, spoil):
    spoil(folder)
    return folder


@pytest.mark.parametrize("where", [SAE, MULTI[0]])
@pytest.mark.parametrize("seed", range(4))
def test_random_damage_is_an_input_error_or_harmless(tmp_path, where, seed):
    draw = random.Random(f"{where}{seed}")
    folder = publish(tmp_path, where, F=2, model_name="tiny")
    names = sorted(os.listdir(folder))
    whole = {name: (folder / name).read_bytes() for name in names}
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(60):
        name = draw.choice(names[:2])
        data = bytearray(whole[name])
        head = min(len(data), 450) if draw.random() < 0.8 else len(data)
        for _ in range(draw.choice((1, 1, 2, 8))):
            data[draw.randrange(head)] = draw.randrange(256)
        if draw.random() < 0.2:
            del data[draw.randrange(len(data)) :]
        (folder / name).write_bytes(data)
        try:
            coder = load_coder(folder)
            assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(coder))
            outcomes["loaded"] += 1
        except InputError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        (folder / name).write_bytes(whole[name])
    assert outcomes["refused"] > 10, outcomes


# Writing


def test_a_failed_write_leaves_the_old_folder_as_it_was(tmp_path, monkeypatch):
    coder = load_coder(publish(tmp_path, MULTI[0]))
    save_coder(coder, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    other = coder.replace(b_enc=coder.b_enc + 1)
    calls = []

    def fsync(_):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(InputError, match="no space left"):
            save_coder(other, tmp_path / "out")
        calls.clear()
        with pytest.raises(InputError, match="no space left"):
            save_coder(other, tmp_path / "new")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_a_write_cut_short_by_the_system(tmp_path):
    coder = load_coder(publish(tmp_path, SAE))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written"):
            save_coder(coder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()


def test_saving_over_the_folder_it_came_from(tmp_path):
    folder = publish(tmp_path, MULTI[2], F=4)
    coder = load_coder(folder)
    save_coder(coder.replace(threshold=coder.threshold + 1), folder)
    again = load_decoder(folder)
    np.testing.assert_array_equal(again.threshold, coder.threshold + 1)
    assert all(np.asarray(again.w_dec).any(axis=(1, 2)))


@pytest.mark.parametrize(
    "change, extra, words",
    [
        (dict(b_enc=jnp.zeros(3)), {}, "b_enc"),
        (dict(reads="logits", writes="logits"), {}, "logits"),
        (dict(layer=40), {}, "40"),
        (dict(), {"width": 7}, "7"),
        (dict(), {"made": {1, 2}}, "JSON"),
        (dict(), {"hf_hook_point_in": "model.layers.3.output"}, "layers"),
        (dict(b_enc=np.zeros(8, np.float64)), {}, "float64"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_written(tmp_path, change, extra, words):
    coder = load_coder(publish(tmp_path, SAE)).replace(**change)
    with pytest.raises(InputError, match=words):
        save_coder(coder, tmp_path / "out", config_extra=extra)
    assert not (tmp_path / "out").exists()


def test_no_mixture_of_two_coders(tmp_path):
    single, cross = load_coder(publish(tmp_path, SAE)), load_coder(publish(tmp_path, MULTI[0]))
    save_coder(single, tmp_path / "out")
    with pytest.raises(InputError, match="another coder"):
        save_coder(cross, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_coder(single, tmp_path / "file")
    lost = load_coder(publish(tmp_path, MULTI[1])).replace(info=CoderInfo())
    with pytest.raises(InputError, match="not loaded from a folder"):
        save_coder(lost, tmp_path / "clt")


# The hub


def hub_error(name, *parts):
    """An error of huggingface_hub without the response that its constructors ask for."""
    error = getattr(hub_errors, name).__new__(getattr(hub_errors, name))
    error.args = (f"{name}\nof the hub", *parts)
    return error


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that serves a local tree and notes what was asked of it."""
    asked = []

    def download(repo_id, filename, *, revision=None):
        asked.append((repo_id, filename, revision))
        file = tmp_path / repo_id.removeprefix("google/") / filename
        if not file.exists():
            raise hub_error("EntryNotFoundError")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


@pytest.mark.parametrize("where", [SAE, AFFINE, *MULTI])
def test_addresses_fetch_the_weights_and_config_only(tmp_path, hub, where):
    folder = publish(tmp_path, where)
    (folder / "examples.safetensors").write_bytes(b"large")
    coder = load_coder(f"google/{REPO}/{where}", revision="abc")
    same_leaves(coder, load_coder(folder))
    assert coder.info.path == f"{REPO}/{where}"
    names = {"config.json", *files.parameter_files(folder)}
    assert set(hub) == {(f"google/{REPO}", f"{where}/{name}", "abc") for name in names}
    hub.clear()
    load_decoder(coder) if where.startswith("clt") else load_coder(folder)
    assert not hub, "a decoder left on disk comes from the disk"


def test_an_address_without_config_is_understood(tmp_path, hub):
    folder = tmp_path / REPO / SAE
    folder.mkdir(parents=True)
    sparse_file(folder / "params.safetensors", 640, 16384, {5: np.ones(640)})
    coder = load_coder(f"{REPO}/{SAE}")
    assert (coder.layer, coder.info.l0, coder.first) == (12, 20, 1)
    assert decoder_rows(f"{REPO}/{SAE}", [5]).all()


def test_an_address_that_is_not_there_names_the_nearest(hub):
    with pytest.raises(InputError, match="layer_12_width_16k_l0_medium"):
        load_coder(f"{REPO}/{SAE}")


@pytest.mark.parametrize(
    "error, words",
    [
        (hub_error("GatedRepoError"), "accept its terms"),
        (hub_error("RepositoryNotFoundError"), "hf auth login"),
        (hub_error("RevisionNotFoundError"), "revision"),
        (hub_error("LocalEntryNotFoundError"), "check the network"),
        (hub_error("OfflineModeIsEnabled"), "check the network"),
        (hub_error("HfHubHTTPError"), "check the network"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "check the network"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (RuntimeError("anything\nelse"), "anything else"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(monkeypatch, error, words):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(InputError) as raised:
        load_coder(f"{REPO}/{SAE}")
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_packaged_coders_go_by_their_folder_name(tmp_path, monkeypatch):
    publish(tmp_path, SAE)
    shutil.move(tmp_path / REPO / SAE, tmp_path / "gemma-3-270m-resid-post-12")
    monkeypatch.setattr(load, "PACKAGED", tmp_path)
    coder = load_coder("gemma-3-270m-resid-post-12")
    assert (coder.layer, coder.info.path) == (12, "gemma-3-270m-resid-post-12")
    with pytest.raises(InputError, match="did you mean gemma-3-270m-resid-post-12"):
        load_coder("gemma-3-270m-resid-post-9")
