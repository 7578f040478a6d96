"""`gemma-scope attribute` on neurons and chats, and with what is known about features."""

import gzip
import json

import numpy as np
import pytest

import gemma_scope_jax as gs
from attribution import coders_of
from card_folders import make_cards
from commands import command, give_tiny
from gemma_scope_jax.autointerp.explanations import write_explanations
from gemma_scope_jax.cards.known import KnownFeatures
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.tokenizer import Chat
from letters import Letters

TEXT = "plums"
SMALL = ("--max-feature-nodes", 50, "--validate", 0)


class ChatLetters(Letters):
    """Chats are the characters of their messages; <eos> ends a turn."""

    end_of_turn_id = 1

    def chat(self, messages, add_generation_prompt=True):
        ids = [2]
        for message in messages:
            ids += [*self.encode(message["content"], bos=False).tolist(), self.end_of_turn_id]
        ids += self.encode("m", bos=False).tolist() * add_generation_prompt
        return Chat(np.array(ids, np.int32), np.zeros(len(ids), np.int32))


@pytest.fixture
def folder(tmp_path):
    for coder in coders_of("affine"):
        place = tmp_path / "coders" / f"layer_{coder.layers[0]}"
        gs.save_coder(coder, place, config_extra={"model_name": "acme/tiny"})
    return tmp_path / "coders"


@pytest.fixture
def given(folder):
    return ("--coders", folder / "layer_*", "--model", "tiny", *SMALL)


def entry(text):
    return {"text": text, "method": "model", "model": "m", "scores": {}}


def label(f, token):
    example = {"tokens": ["x", token], "values": [0, 1.5], "source": "s"}
    return {"top_logits": [], "bottom_logits": [], "examples": [example], "density": 0.1}


def write_card_folder(folder, layer, width=24, name="", **more):
    """Cards of a coder in a folder named layer_N, whose examples are around "a"."""
    cards = folder / (name or f"layer_{layer}") / "cards"
    make_cards(cards, F=width)
    manifest = json.loads((cards / "cards.json").read_text())
    manifest |= {"coder": f"layer_{layer}", "layer": layer, "kind": "skip_transcoder", **more}
    (cards / "cards.json").write_text(json.dumps(manifest))


def test_the_graph_of_neurons(tiny, tmp_path, capsys):
    given = ("--coders", "neurons", "--model", "tiny", *SMALL)
    assert command("attribute", TEXT, *given, "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "50 explained of 960 active" in out and "-> neuron " in out
    graph = gs.load_graph(tmp_path / "out" / "graph.npz")
    scores = graph.scores(rest=True)
    assert f"{scores}, if unexplained neurons count as errors" in out
    assert scores.replacement < graph.scores().replacement == 1
    assert graph.selected == 50 and (graph.sources.kind[:50] == "neuron").all()
    assert (tmp_path / "out" / "graph.html").exists()
    assert command("attribute", TEXT, *given, "--plan", "--json") == 0
    assert json.loads(capsys.readouterr().out)["active"] == 960


@pytest.mark.parametrize("continued", [False, True])
def test_a_chat(monkeypatch, model, given, tmp_path, capsys, continued):
    give_tiny(monkeypatch, model, ChatLetters)
    chat = [{"role": "user", "content": "plums?"}]
    chat += [{"role": "assistant", "content": "y"}] * continued
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    asked = ("--file", tmp_path / "chat.jsonl", "--messages", "messages", "--json")
    assert command("attribute", *given, *asked) == 0
    end = "<eos>y" if continued else "<eos>m"
    assert json.loads(capsys.readouterr().out)["prompt"] == "plums?" + end


def test_what_is_known_about_features_is_shown(tiny, folder, given, tmp_path, capsys):
    """Explanations as names; label material beside the coders and, before it, cards as examples,
    which viewers find."""
    for layer in range(4):
        write_explanations(folder / f"layer_{layer}", "c", {f: entry(f"N{f}") for f in range(24)})
        labels = {"format": 1, "tokens": 9, "features": [label(f, "beside") for f in range(24)]}
        path = folder / f"layer_{layer}" / "labels.json.gz"
        path.write_bytes(gzip.compress(json.dumps(labels).encode()))
    write_card_folder(tmp_path / "cards", 2)
    write_card_folder(tmp_path / "cards", 2, name="mlp_out", kind="sae", reads="mlp_out")
    out, more = tmp_path / "out", ("--cards", tmp_path / "cards")
    assert command("attribute", TEXT, *given, *more, "--out", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert all("(N" in path["path"] for path in found["paths"])
    page, shown = (out / "graph.html").read_text(), gs.load_graph(out / "graph.json")
    assert '["x","beside"],[0,1.5]' in page and '[["a","a","a"],' in page
    n, nodes = shown.selected, shown.sources
    assert nodes.label[:n].tolist() == [f"N{f}" for f in nodes.feature[:n]]
    files = {int(path.stem): json.loads(path.read_text()) for path in out.glob("features/*.json")}
    cantor = lambda l, f: (l + f) * (l + f + 1) // 2 + f
    assert set(files) == {cantor(2, int(f)) for f in nodes.feature[:n][nodes.layer[:n] == 2]}
    assert files and all(file["examples_quantiles"] for file in files.values())
    document = json.loads((out / "graph.json").read_text())
    assert document["metadata"]["scan"] == "./data/features"


def test_other_explanations(tiny, given, tmp_path, capsys):
    for layer in range(3):
        place = tmp_path / "new" / f"layer_{layer}"
        write_explanations(place, "c", {f: entry("new") for f in range(24)})
    more = ("--explanations", tmp_path / "new", "--json")
    assert command("attribute", TEXT, *given, *more) == 0
    paths = [path["path"] for path in json.loads(capsys.readouterr().out)["paths"]]
    assert any("(new)" in path for path in paths)


NO_FEATURES = "--explanations and --cards are of coders' features; neurons have none"


def wrong(folder, tmp_path):
    chat = {"messages": [{"role": "user", "content": "a"}]}
    (tmp_path / "two.jsonl").write_text(f"{json.dumps(chat)}\n" * 2)
    (tmp_path / "empty").mkdir()
    write_card_folder(tmp_path / "cards", 7)
    for layer, name in enumerate(("one", "two", "three", "four")):
        write_card_folder(tmp_path / "another", layer, name=name, kind="sae", reads="mlp_out")
        write_card_folder(tmp_path / "tuned", layer, name=name, model="acme/tiny-it")
        write_card_folder(tmp_path / "twice", 0, name=name)
    write_card_folder(tmp_path / "own", 0)
    out = tmp_path / "out"
    (out / "features").mkdir(parents=True)
    (out / "features" / "mine.txt").write_text("")
    own = ("--coders", folder / "layer_*")
    asked = ("--messages", "messages", "--file", tmp_path / "two.jsonl")
    yield (*own, *asked), "holds several chats: give a file with one"
    yield (TEXT, *own, "--cards", tmp_path / "another"), "its kind is sae, not skip_transc"
    yield (TEXT, *own, "--cards", tmp_path / "tuned"), "its model is acme/tiny-it, not acme/tiny; "
    early = ("--coders", tmp_path / "none*", *asked[:2], "--file")
    yield (*early, tmp_path / "none.jsonl"), "none.jsonl: no such file"
    both = f"{tmp_path}/twice/four/cards and {tmp_path}/twice/one/cards both hold cards of layer_0"
    yield (TEXT, *own, "--cards", tmp_path / "twice"), both
    yield (TEXT, *own, "--cards", tmp_path / "own", "--out", out), "features: is in the way"
    yield (TEXT, *own, "--explanations", "/"), "--out /layer_N`"
    yield (TEXT, *own, "--target", "b", "a", "--minus", "a"), "target 'a' - 'a' is always 0"
    yield (TEXT, *own, *asked), "--messages needs --file"
    yield (*own, *asked[:2]), "--messages needs --file"
    yield (TEXT, "--coders", "neurons", folder / "layer_0"), "stand without coders"
    yield (TEXT, *own, "--explanations", tmp_path / "empty"), "holds no layer_N/explanations.json"
    yield (TEXT, *own, "--cards", tmp_path / "empty"), "holds no feature cards"
    yield (TEXT, *own, "--cards", tmp_path / "cards"), "holds cards of layer_7, not of these"
    yield (TEXT, "--coders", "neurons", "--cards", tmp_path / "cards"), NO_FEATURES
    yield (TEXT, "--coders", "neurons", "--explanations", folder), NO_FEATURES


def test_feature_files_are_written_before_the_graph(tiny, given, tmp_path, monkeypatch):
    """Whatever goes wrong with them leaves no graph behind."""

    def fails(*_):
        raise InputError("no space")

    write_card_folder(tmp_path / "cards", 2)
    monkeypatch.setattr(KnownFeatures, "write_feature_files", fails)
    out = tmp_path / "out"
    assert command("attribute", TEXT, *given, "--cards", tmp_path / "cards", "--out", out) == 2
    assert not out.exists()


def test_the_explanations_of_one_layer(folder, tmp_path):
    """In layer_N of a folder, or in a folder or a file of their own."""
    coder = gs.load_coder(folder / "layer_2")
    for place in (tmp_path / "all" / "layer_2", tmp_path / "one"):
        write_explanations(place, "c", {3: entry("new")})
    for given in (tmp_path / "all", tmp_path / "one", tmp_path / "one" / "explanations.json"):
        assert gs.read_known([coder], explanations=given).names([(2, 3)]) == {(2, 3): "new"}
    both = [coder, gs.load_coder(folder / "layer_1")]
    for given, says in {"one": "holds no layer_N", "one/explanations.json": "for several"}.items():
        with pytest.raises(InputError, match=says):
            gs.read_known(both, explanations=tmp_path / given)


def test_what_is_wrong_is_one_line_before_the_model_loads(
    tiny, folder, tmp_path, capsys, monkeypatch
):
    def late(*args, **kwargs):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(gs, "load_model", late)
    for argv, says in wrong(folder, tmp_path):
        assert command("attribute", *argv, "--model", "tiny") == 2, argv
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("error: ") and says in err, (argv, err)
