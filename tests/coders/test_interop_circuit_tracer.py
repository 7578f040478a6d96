"""circuit-tracer's sets and CLTs: its own function, in and out, and no silent misreading.

The references are its equations, written out in numpy.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from gemma_scope_jax.coders.interop.circuit_tracer import (
    is_circuit_tracer_folder,
    save_circuit_tracer,
)
from gemma_scope_jax.coders.interop.saelens import is_saelens_folder, save_saelens
from gemma_scope_jax.coders.load import load_coder, load_coders
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.errors import InputError
from library_folders import D, F, X, agrees, normal, survives, transcoder

# circuit-tracer


def circuit_tracer_config(kind="transcoder_set", **changes):
    return {
        "model_kind": kind,
        "model_name": "google/gemma-3-270m-pt",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "scan": "someone/some-set",
        **changes,
    }


def write_set(folder, skip=True, threshold=True, **changes):
    folder.mkdir(exist_ok=True)
    layers = []
    for i in range(X):
        t = {"W_enc": normal(F, D), "b_enc": normal(F), "W_dec": normal(F, D), "b_dec": normal(D)}
        if skip:
            t["W_skip"] = normal(D, D)
        if threshold:
            t["activation_function.threshold"] = np.abs(normal(F))
        save_file(t, folder / f"layer_{i}.safetensors")
        layers.append(t)
    (folder / "config.yaml").write_text(yaml.safe_dump(circuit_tracer_config(**changes)))
    return layers


def write_clt(folder, skip=True, threshold=True, **changes):
    folder.mkdir(exist_ok=True)
    layers = []
    for i in range(X):
        t = {"W_enc": normal(F, D), "b_enc": normal(F), "b_dec": normal(D)}
        if skip:
            t["W_skip"] = normal(D, D)
        if threshold:
            t["threshold"] = np.abs(normal(F))
        save_file({f"{k}_{i}": v for k, v in t.items()}, folder / f"W_enc_{i}.safetensors")
        t["W_dec"] = normal(F, X - i, D)
        save_file({f"W_dec_{i}": t["W_dec"]}, folder / f"W_dec_{i}.safetensors")
        layers.append(t)
    config = circuit_tracer_config("cross_layer_transcoder", **changes)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return layers


def jump_relu(z, threshold):
    return np.maximum(z, 0) if threshold is None else z * (z > threshold)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("threshold", [True, False])
def test_circuit_tracer_set(tmp_path, skip, threshold):
    layers = write_set(tmp_path / "s", skip, threshold)
    assert is_circuit_tracer_folder(tmp_path / "s") and not is_circuit_tracer_folder(tmp_path)
    coders = load_coders(tmp_path / "s")
    assert coders.layers == (0, 1, 2) and coders.names == ("layer_0", "layer_1", "layer_2")
    for i, t in enumerate(layers):
        x = normal(5, D)
        f = jump_relu(x @ t["W_enc"].T + t["b_enc"], t.get("activation_function.threshold"))
        y = f @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if skip else 0)
        agrees(coders[i], x, f, y)
        assert (coders[i].reads, coders[i].writes, coders[i].layer) == ("mlp_in", "mlp_out", i)
        assert coders[i].info.model_name == "google/gemma-3-270m"

    save_circuit_tracer(coders, tmp_path / "t")
    for i, t in enumerate(layers):
        written = load_file(tmp_path / "t" / f"layer_{i}.safetensors")
        t.setdefault("activation_function.threshold", np.zeros(F, np.float32))
        assert set(written) == set(t)
        for name in t:
            np.testing.assert_array_equal(written[name], t[name])
    config = yaml.safe_load((tmp_path / "t" / "config.yaml").read_text())
    assert config == circuit_tracer_config(model_name="google/gemma-3-270m")


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("threshold", [True, False])
def test_circuit_tracer_clt(tmp_path, skip, threshold):
    layers = write_clt(tmp_path / "s", skip, threshold)
    (clt,) = load_coders(tmp_path / "s")
    assert isinstance(clt, MultiLayerCoder) and clt.kind == "clt" and clt.layers == (0, 1, 2)
    x = normal(X, 5, D)
    f = [
        jump_relu(x[i] @ t["W_enc"].T + t["b_enc"], t.get("threshold"))
        for i, t in enumerate(layers)
    ]
    y = [
        sum(f[i] @ layers[i]["W_dec"][:, j - i] for i in range(j + 1))
        + layers[j]["b_dec"]
        + (x[j] @ layers[j]["W_skip"] if skip else 0)
        for j in range(X)
    ]
    agrees(clt, x, np.stack(f), np.stack(y))
    assert clt.info.width == X * F

    save_circuit_tracer(clt, tmp_path / "t")
    for i, t in enumerate(layers):
        written = load_file(tmp_path / "t" / f"W_enc_{i}.safetensors")
        written |= load_file(tmp_path / "t" / f"W_dec_{i}.safetensors")
        t.setdefault("threshold", np.zeros(F, np.float32))
        assert set(written) == {f"{name}_{i}" for name in t}
        for name in t:
            np.testing.assert_array_equal(written[f"{name}_{i}"], t[name])


def test_bfloat16_stays_bfloat16(tmp_path):
    coders = [transcoder(i, dtype=jnp.bfloat16) for i in range(2)]
    save_circuit_tracer(coders, tmp_path)
    again = load_coders(tmp_path)
    for coder in coders:
        jax.tree.map(np.testing.assert_array_equal, again[coder.layer], coder)
        assert again[coder.layer].w_dec.dtype == jnp.bfloat16


def test_a_set_that_lists_its_files(tmp_path):
    write_set(tmp_path / "s", transcoders=["layer_2.safetensors", "layer_0.safetensors"])
    coders = load_coders(tmp_path / "s")
    w_enc = load_file(tmp_path / "s" / "layer_2.safetensors")["W_enc"]
    np.testing.assert_array_equal(coders[0].w_enc, w_enc.T)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model_kind": "sae"}, "transcoder_set or cross_layer_transcoder"),
        ({"activation": "topk", "k": 16}, "'topk' is not supported"),
        ({"feature_input_hook": "hook_mlp_in"}, "before the norm"),
        ({"feature_input_hook": "ln2.hook_normalized"}, "gain"),
        ({"feature_output_hook": "mlp.hook_out"}, "post-norm"),
        ({"feature_output_hook": "hook_mlp_ot"}, "did you mean hook_mlp_out"),
        ({"transcoders": "layer_0.safetensors"}, "not a list"),
        ({"transcoders": []}, "no layer_"),
        ({"transcoders": ["gone.safetensors"]}, "no such file"),
        (
            {"transcoders": ["hf://google/gemma-scope-2-4b-it/transcoder_all/layer_0_width_16k_"
                             "l0_small_affine/params.safetensors"]},
            "google/gemma-scope-2-4b-it/transcoder_all/layer_0_width_16k_l0_small_affine$",
        ),
    ],
)  # fmt: skip
def test_circuit_tracer_configs_that_cannot_be_used(tmp_path, changes, says):
    write_set(tmp_path / "s", **{"kind": changes.pop("model_kind", "transcoder_set"), **changes})
    with pytest.raises(InputError, match=says) as error:
        load_coders(tmp_path / "s")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: b: c", "!!int ''", "!!timestamp ''", "\t"])
def test_config_yaml_that_is_none(tmp_path, text):
    write_set(tmp_path / "s")
    (tmp_path / "s" / "config.yaml").write_text(text)
    with pytest.raises(InputError, match="config.yaml"):
        load_coders(tmp_path / "s")


def test_circuit_tracer_files_that_do_not_fit(tmp_path):
    write_clt(tmp_path / "a")
    (tmp_path / "a" / "W_dec_1.safetensors").unlink()
    with pytest.raises(InputError, match="W_dec_1.safetensors: no such file"):
        load_coders(tmp_path / "a")
    layers = write_clt(tmp_path / "b")
    save_file({"W_dec_1": layers[0]["W_dec"]}, tmp_path / "b" / "W_dec_1.safetensors")
    with pytest.raises(InputError, match=r"W_dec_1 has shape \[20, 3, 6\], expected \[20, 2, 6\]"):
        load_coders(tmp_path / "b")
    t = {f"{k}_2": layers[2][k] for k in ("W_enc", "b_enc", "b_dec", "threshold")}
    write_clt(tmp_path / "c")
    save_file(t, tmp_path / "c" / "W_enc_2.safetensors")
    with pytest.raises(InputError, match="2 of 3 layers have W_skip"):
        load_coders(tmp_path / "c")
    layers = write_set(tmp_path / "d")
    layers[0]["activation_function.threshold"][3] = -1
    save_file(layers[0], tmp_path / "d" / "layer_0.safetensors")
    with pytest.raises(InputError, match="negative threshold"):
        load_coders(tmp_path / "d")


def test_what_circuit_tracer_cannot_hold(tmp_path):
    layer_0 = transcoder(0)
    crosscoder = MultiLayerCoder(
        *(
            jnp.asarray(a)
            for a in (normal(X, D, F), normal(X, F), normal(X, F), normal(6, F, D), normal(X, D))
        ),
        layers=(0, 1, 2),
    )
    for coders, says in (
        ([layer_0, transcoder(2)], "every layer from 0 on, got 0, 2"),
        ([layer_0, transcoder(1, skip=False)], "kind is transcoder in layer 1"),
        ([], "at least one"),
        ([1], "expected coders"),
        ([layer_0, crosscoder], "one SparseCoder a layer"),
        ([layer_0.replace(reads="q")], "no hook for site 'q'"),
        (crosscoder, "not a crosscoder"),
        (crosscoder.replace(reads="mlp_in", writes="mlp_out", w_dec=None), "left on disk"),
    ):
        with pytest.raises(InputError, match=says):
            save_circuit_tracer(coders, tmp_path / "t")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="one layer"):
        save_saelens(crosscoder, tmp_path / "t")
    with pytest.raises(InputError, match="'q'"):
        save_saelens(layer_0.replace(reads="q", writes="q", w_skip=None), tmp_path / "t")


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    save_saelens(transcoder(), tmp_path / "s")
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    replace = os.replace

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for save, coder in ((save_saelens, transcoder()), (save_circuit_tracer, [transcoder(0)])):
        for name in ("s", "new"):
            with pytest.raises(InputError, match="no space"):
                save(coder, tmp_path / name)
    monkeypatch.undo()
    assert os.replace is replace
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["s"]

    save_circuit_tracer([transcoder(0), transcoder(1)], tmp_path / "t")
    with pytest.raises(InputError, match="layer_1.safetensors of another coder"):
        save_circuit_tracer([transcoder(0)], tmp_path / "t")


@pytest.mark.parametrize(
    "write, file",
    [
        (write_set, "config.yaml"),
        (write_set, "layer_1.safetensors"),
        (write_clt, "config.yaml"),
        (write_clt, "W_enc_0.safetensors"),
        (write_clt, "W_dec_2.safetensors"),
    ],
)
def test_damaged_circuit_tracer_folders(tmp_path, write, file):
    write(tmp_path / "s")
    survives(load_coders, tmp_path / "s", file, seed=len(file))


@pytest.mark.parametrize("load", [load_coder, load_coders])
def test_folders_that_are_none(tmp_path, load):
    for path in (tmp_path, tmp_path / "gone", str(tmp_path / "nul\0byte")):
        with pytest.raises(InputError):
            load(path)
        assert not is_saelens_folder(path) and not is_circuit_tracer_folder(path)
