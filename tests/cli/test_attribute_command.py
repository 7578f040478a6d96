"""`gemma-scope attribute`: what it prints and writes, and what is wrong is known at once."""

import json

import numpy as np
import pytest

import gemma_scope_jax as gs
from attribution import coders_of
from commands import command

TEXT = "plums"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("coders")
    for coder in coders_of("affine"):
        extra = {"model_name": "acme/tiny"}
        gs.save_coder(coder, path / f"layer_{coder.layers[0]}", config_extra=extra)
    return path


@pytest.fixture
def given(folder):
    return ("--coders", folder / "layer_*", "--model", "tiny", "--validate", 4)


def test_prints_paths_and_whether_they_hold(tiny, given, capsys):
    assert command("attribute", TEXT, *given, "--max-feature-nodes", 50) == 0
    out = capsys.readouterr().out
    assert "prompt    plums" in out and "50 explained of" in out
    assert "replacement" in out and "completeness" in out
    assert "raises" in out or "lowers" in out
    assert "4 features are ablated" in out and "spearman" in out


def test_writes_page_and_graph(tiny, given, tmp_path, capsys):
    out = tmp_path / "new" / "graphs"
    wanted = ("--target", "a", "b", "--minus", "c", "--json")
    assert command("attribute", TEXT, *given, *wanted, "--out", out) == 0
    found = json.loads(capsys.readouterr().out)
    assert [t["target"] for t in found["targets"]] == ["'a' - 'c'", "'b' - 'c'"]
    assert found["features"]["explained"] == found["features"]["active"]
    assert found["scores_rest"] is None  # nothing is left
    assert found["validation"]["ablated"] == 4 and len(found["paths"]) == 10
    page = (out / "graph.html").read_text()
    assert "<title>plums" in page and "completeness" in page and "spearman" in page
    whole, shown = gs.load_graph(out / "graph.npz"), gs.load_graph(out / "graph.json")
    assert whole.selected == found["features"]["explained"]
    assert len(shown.sources) <= found["shown"]["nodes"] < len(whole.sources)
    assert np.isclose(whole.scores().replacement, found["scores"]["replacement"])
    document = json.loads((out / "graph.json").read_text())
    groups = {label: ids for label, *ids in document["qParams"]["supernodes"]}
    assert groups and groups == {g["label"]: g["nodes"] for g in found["supernodes"]["groups"]}


def test_a_clt_whose_decoder_stays_on_disk(tiny, tmp_path, capsys):
    gs.save_coder(coders_of("affine clt"), tmp_path / "clt", config_extra={"model_name": "tiny"})
    given = ("--coders", tmp_path / "clt", "--model", "tiny", "--max-feature-nodes", 40)
    assert command("attribute", TEXT, *given, "--validate", 3, "--out", tmp_path / "out") == 0
    assert "3 features are ablated" in capsys.readouterr().out
    assert gs.load_graph(tmp_path / "out" / "graph.npz").selected == 40


def test_a_prompt_without_features_has_a_graph(tiny, tmp_path, capsys):
    for coder in coders_of("plain", first=4):
        extra = {"model_name": "acme/tiny-it"}
        gs.save_coder(coder, tmp_path / f"layer_{coder.layers[0]}", config_extra=extra)
    given = ("--coders", tmp_path / "layer_*", "--model", "tiny")
    assert command("attribute", "ab", *given, "--out", tmp_path / "out") == 0
    assert "0 explained of 0 active" in capsys.readouterr().out


def wrong(tmp_path):
    (tmp_path / "file").write_text("")
    yield ("",), "the text is empty"
    yield ("x" * 64,), "more than the context"
    yield (TEXT, "--target", "words"), "is 5 tokens"
    yield (TEXT, "--minus", "a"), "--minus needs --target"
    yield (TEXT, "--paths", -1), "--paths and --validate"
    yield (TEXT, "--target", "a", "a"), "given twice"
    yield (TEXT, "--node-threshold", 2), "node_threshold is 2"
    yield (TEXT, "--max-n-logits", 0), "max_n_logits"
    yield (TEXT, "--desired-logit-prob", 0), "desired_logit_prob"
    yield (TEXT, "--max-feature-nodes", 0), "max_feature_nodes"
    yield (TEXT, "--out", tmp_path / "file" / "below"), "file is not a folder"
    yield (TEXT, "--coders", tmp_path / "none*"), "matches no"


def test_what_is_wrong_is_one_line_before_the_model_loads(
    tiny, folder, given, tmp_path, capsys, monkeypatch
):
    def late(*args, **kwargs):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(gs, "load_model", late)
    cases = []
    for argv, says in wrong(tmp_path):
        cases.append((("attribute", argv[0], *given, *argv[1:]), says))
    some = ("--coders", folder / "layer_[0-2]", "--model", "tiny")
    cases.append((("attribute", TEXT, *some), "no transcoder for layer 3"))
    for argv, says in cases:
        assert command(*argv) == 2, argv
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("error: ") and says in err, (argv, err)
