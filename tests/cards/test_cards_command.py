"""`gemma-scope cards`: what it reads, what it links, and that it removes nothing of others."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from card_folders import card_coder, data_of
from coders import random_coder
from commands import command, give_tiny
from gemma_scope_jax.autointerp.explanations import write_explanations
from gemma_scope_jax.cards.card_files import CardFiles, FeatureCards
from gemma_scope_jax.coders import opened
from gemma_scope_jax.coders.release.files import save_coder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.storage.atomic import new_folder
from gemma_scope_jax.storage.locks import temporary_name
from tiny import tiny_model

ABOUT = {"model_name": "acme/tiny"}
FOX = "a quick brown fox jumps over the lazy dog "


@pytest.fixture
def one(tmp_path):
    save_coder(card_coder(), tmp_path / "one", config_extra=ABOUT)
    (tmp_path / "text.txt").write_text(FOX * 6)
    return tmp_path / "one"


def cards(*args, model="tiny"):
    return command("cards", *args, "--model", model)


def entry(text):
    return {"text": text, "method": "endpoint", "model": "m", "scores": {}}


def overview(folder):
    return data_of(folder / "data" / "list.js")


# --- several layers ------------------------------------------------------------------------------


def test_layers_have_their_own_explanations_and_links(tiny, tmp_path):
    for name, seed in {"a": 0, "b": 7}.items():
        save_coder(
            random_coder(layers=(1, 2), seed=seed, threshold=0.1),
            tmp_path / name,
            config_extra=ABOUT,
        )
    for layer in (1, 2):
        write_explanations(tmp_path / f"a/layer_{layer}", "a", {3: entry(f"of layer {layer}")})
    (tmp_path / "text.txt").write_text(FOX * 6)
    out = tmp_path / "out"
    options = ("--text", tmp_path / "text.txt", "--context-size", 64, "--out", out)
    assert cards(tmp_path / "a", tmp_path / "b", *options, "--compare", tmp_path / "b") == 0
    for layer in (1, 2):
        seen = overview(out / f"a-layer-{layer}")
        assert seen["labels"][3] == f"of layer {layer}"
        assert seen["compared"] == [["b", f"../b-layer-{layer}/index.html", 48]]
        assert overview(out / f"b-layer-{layer}")["compared"] == []


def test_explanations_from_elsewhere(tiny, one, tmp_path, capsys):
    write_explanations(one, "one", {3: entry("beside it")})
    write_explanations(tmp_path / "x", "one", {3: entry("elsewhere")})
    options = ("--text", tmp_path / "text.txt", "--context-size", 64, "--out", tmp_path / "out")
    for given, label in {
        (): "beside it",
        ("--explanations", tmp_path / "x"): "elsewhere",
        ("--explanations", tmp_path / "x" / "explanations.json"): "elsewhere",
    }.items():
        assert cards(one, *options, *given) == 0
        assert overview(tmp_path / "out" / "one")["labels"][3] == label
    assert cards(one, *options, "--explanations", tmp_path / "nothing") == 2
    assert "holds no explanations of this coder's features" in capsys.readouterr().err
    assert cards(one, one, *options, "--explanations", tmp_path / "x") == 2
    assert "explains one coder" in capsys.readouterr().err


# --- stores --------------------------------------------------------------------------------------


def test_cards_of_a_store_load_the_model_as_the_store_did(tiny, one, tmp_path, monkeypatch, capsys):
    loaded = {
        d: tiny_model(PRESETS["gemma-3-270m"], dtype=jnp.dtype(d), layers=4)
        for d in ("float32", "bfloat16")
    }
    give_tiny(monkeypatch, loaded["float32"], models=loaded)
    store = tmp_path / "store"
    text = ("--text", tmp_path / "text.txt", "--context-size", 64, "--model", "tiny")
    assert command("extract", one, *text, "--dtype", "bfloat16", "--out", store) == 0
    capsys.readouterr()
    assert cards(one, "--store", store, "--out", tmp_path / "cards") == 0
    assert "loading model tiny (bfloat16)" in capsys.readouterr().err
    assert cards(one, "--store", store, "--dtype", "float32", "--out", tmp_path / "other") == 2
    assert "rounded weights differ, so load the model in bfloat16" in capsys.readouterr().err


# --- what text is --------------------------------------------------------------------------------


def test_json_records(tiny, one, tmp_path):
    lines = [{"body": FOX * 3}, {"body": 5}, {"body": FOX}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ("--text", tmp_path / "a.jsonl", "--field", "body", "--skip-bad")
    options += ("--context-size", 32)
    assert cards(one, *options, "--out", tmp_path / "field") == 0
    manifest = FeatureCards(tmp_path / "field" / "one" / "cards").manifest
    assert manifest["prompt_tokens"] == 32 and manifest["tokens"] > 3 * len(FOX)
    assert cards(one, *options[:4], "--context-size", 32, "--out", tmp_path / "bad") == 2


# --- nothing of others is lost -------------------------------------------------------------------


def test_other_folders_are_left_alone(tiny, one, tmp_path, capsys):
    (one / "data").mkdir()
    (one / "data" / "mine.txt").write_text("precious")
    options = ("--text", tmp_path / "text.txt", "--context-size", 64)
    assert cards(one, *options, "--out", tmp_path) == 2
    assert "is the coder itself" in capsys.readouterr().err
    other = tmp_path / "out" / "one" / "data"
    other.mkdir(parents=True)
    (other / "mine.txt").write_text("precious")
    assert cards(one, *options, "--out", tmp_path / "out") == 2
    assert "holds something other than cards" in capsys.readouterr().err
    for folder in (one / "data", other):
        assert (folder / "mine.txt").read_text() == "precious"


def test_folders_and_arrays_in_the_way(tmp_path):
    (tmp_path / "data").mkdir()
    with new_folder(tmp_path / "data", "list.js") as new:  # an empty one is nobody's
        (new / "list.js").write_text("old")
    with new_folder(tmp_path / "data", "list.js") as new:
        (new / "other.js").write_text("new")
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["other.js"]
    with pytest.raises(InputError, match="is in the way"), new_folder(tmp_path / "data", "list.js"):
        raise AssertionError("nothing is to be written")
    np.save(tmp_path / "mine.npy", np.arange(3))
    with pytest.raises(InputError, match="other arrays than cards"):
        CardFiles(tmp_path, 1)
    assert np.load(tmp_path / "mine.npy").tolist() == [0, 1, 2]


def test_a_run_killed_at_once_goes_on(tiny, one, tmp_path, monkeypatch):
    """Its folder is known as its own before anything is in it."""
    from gemma_scope_jax.cards import build

    options = ("--text", tmp_path / "text.txt", "--context-size", 64, "--out", tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(SystemError):
        stop = lambda *_: (_ for _ in ()).throw(SystemError)
        patch.setattr(build, "gather_examples", stop)
        cards(one, *options)
    made = tmp_path / "out" / "one" / "cards"
    (made / temporary_name("density.npy")).write_bytes(b"half")  # as SIGKILL leaves it
    (made / "cards.json").rename(made / ".cards.json")
    assert cards(one, *options) == 0


# --- mistakes show first -------------------------------------------------------------------------


def test_mistakes_show_before_the_work(tiny, one, tmp_path, monkeypatch, capsys):
    save_coder(card_coder(d=16), tmp_path / "small", config_extra=ABOUT)
    save_coder(random_coder(layers=(2, 3)), tmp_path / "layers", config_extra=ABOUT)
    (tmp_path / "wrong.json").write_text("{")
    fails = lambda *_, **__: (_ for _ in ()).throw(AssertionError("too late"))
    monkeypatch.setattr(gs, "extract", fails)
    monkeypatch.setattr(gs, "load_model", fails)
    text = ("--text", tmp_path / "text.txt")
    for args, says in {
        (*text, "--compare", tmp_path / "small"): "cannot be compared",
        (*text, "--compare", tmp_path / "layers"): "layer 1: this coder has features of 2, 3",
        (*text, "--explanations", tmp_path / "wrong.json"): "not usable as JSON",
    }.items():
        assert cards(one, *args, "--out", tmp_path / "out") == 2
        assert says in capsys.readouterr().err
    monkeypatch.setattr(opened, "load_coders", fails)
    for args, says in {
        ("--text", tmp_path / "nosuch.txt"): "no text files match",
        (*text, "--roles", "nobody"): "no such role",
    }.items():
        assert cards(one, *args, "--out", tmp_path / "out") == 2
        assert says in capsys.readouterr().err
