"""The command `explain` from end to end, on a planted store and on one that is extracted."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from coders import random_coder
from gemma_scope_jax import cli
from gemma_scope_jax.autointerp.examples import Sampling, gather, open_corpus
from gemma_scope_jax.autointerp.explain import explain_features
from gemma_scope_jax.autointerp.explanations import (
    layer_folder,
    read_explanations,
    write_explanations,
)
from gemma_scope_jax.autointerp.job import choose_features, parse_features
from gemma_scope_jax.autointerp.judges.statistics import RuleJudge
from gemma_scope_jax.autointerp.scores import SCORES
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.extract import extract
from judges import ENTRY
from letters import Letters
from planted_store import PLANTED, PlantedStore, Tok


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """A coder of 8 features whose store is the planted one."""
    import jax

    from gemma_scope_jax.coders.coder import CoderInfo
    from gemma_scope_jax.coders.load import load_coder
    from gemma_scope_jax.coders.release.files import save_coder
    from gemma_scope_jax.coders.sparse_coder import SparseCoder
    from gemma_scope_jax.extraction.manifest import describe

    w = jax.random.normal(jax.random.key(0), (32, 8))
    coder = SparseCoder(
        w, jnp.zeros(8), jnp.ones(8), w.T, jnp.zeros(32), layer=1, info=CoderInfo(l0=1.0)
    )
    save_coder(coder, tmp_path / "coder", config_extra={"model_name": "acme/tiny"})
    about = describe("planted", load_coder(tmp_path / "coder"))
    monkeypatch.setattr(gs, "FeatureStore", lambda folder: planted_store(about))
    monkeypatch.setattr(gs, "load_tokenizer", lambda name: Tok())
    monkeypatch.setattr(gs, "use_compilation_cache", lambda: None)
    return tmp_path / "coder"


def planted_store(*about):
    store = PlantedStore()
    store.manifest["coders"], store.coders = list(about), tuple(a["name"] for a in about)
    return store


def main(*args):
    return cli.main(["explain", *map(str, args)])


def test_the_command_with_statistics(planted, capsys):
    assert main(planted, "--store", "s") == 0
    out = capsys.readouterr().out
    assert "7 features explained" in out and "detection: balanced accuracy" in out
    entries = read_explanations(planted, 8)
    assert [f for f in range(8) if f not in entries] == [6]
    assert all(e["method"] == "statistics" for e in entries.values())
    assert f'"{PLANTED[2]}"' in entries[2]["text"]
    content = json.loads((planted / "explanations.json").read_text())
    assert content["coder"] == planted.name  # no path of this machine
    assert entries[2]["scores"]["detection"]["balanced_accuracy"] == 1
    assert main(planted, "--store", "s") == 0
    assert "7 finished before" in capsys.readouterr().out


def test_statistics_do_not_replace_better_ones(planted):
    write_explanations(planted, "c", {1: ENTRY})
    assert main(planted, "--store", "s", "--features", "1,2") == 0
    entries = read_explanations(planted, 8)
    assert entries[1] == ENTRY and entries[2]["method"] == "statistics"


def test_figures_are_of_one_judge(planted, capsys):
    """And of the features at hand, whatever else is in the file."""
    poor = {"detection": {"balanced_accuracy": 0.1, "unparsed": 0}}
    better = {f: ENTRY | {"scores": poor} for f in (1, 7)}
    write_explanations(planted, "c", better)
    options = ("--store", "s", "--scores", "detection", "--features")
    assert main(planted, *options, "0,1,2") == 0
    entries, out = read_explanations(planted, 8), capsys.readouterr().out
    mean = np.mean([entries[f]["scores"]["detection"]["balanced_accuracy"] for f in (0, 2)])
    assert f"balanced accuracy {mean:.3f} ± " in out and "over 2 features" in out


def test_the_command_with_an_endpoint(planted, capsys, monkeypatch):
    from chat_server import KEY, ChatServer
    from judges import know

    monkeypatch.setenv("MY_KEY", KEY)
    with ChatServer(know) as server:
        args = (planted, "--store", "s", "--features", "0-2", "--endpoint", server.url,
                "--judge-model", "j", "--key-variable", "MY_KEY", "--price-in", "1",
                "--price-out", "2", "--hard-negatives", "5")  # fmt: skip
        assert main(*args, "--plan") == 0
        out = capsys.readouterr().out
        assert "3 features, at most 123 requests" in out and "$0." in out and not server.bodies
        monkeypatch.setattr(sys, "stdin", type("S", (), {"isatty": lambda self: False})())
        assert main(*args) == 2
        assert "nothing was sent: give --yes" in capsys.readouterr().err and not server.bodies
        answers = type("S", (), {"isatty": lambda self: True, "readline": lambda self: "n\n"})
        monkeypatch.setattr(sys, "stdin", answers())
        assert main(*args) == 0 and not server.bodies
        assert main(*args, "--yes") == 0
        sent, said = len(server.bodies), capsys.readouterr()
        assert main(*args) == 0 and len(server.bodies) == sent == 123  # nothing to agree to
        assert main(*args, "--plan") == 0 and "0 features, at most 0 req" in capsys.readouterr().out
    assert all(h["Authorization"] == f"Bearer {KEY}" for h in server.headers)
    assert KEY not in "".join(said)
    assert "detection: balanced accuracy 1.000" in said.out and "123 answers" in said.out
    for path in planted.iterdir():
        assert KEY.encode() not in path.read_bytes()


def through(server, *more):
    return ("--store", "s", "--features", "0-2", "--endpoint", server.url, "--judge-model", "j",
            "--yes", "--retries", "0", *more)  # fmt: skip


def test_a_run_in_which_all_failed_says_why_and_keeps_nothing(planted, capsys):
    from chat_server import ChatServer

    spent = {"message": {"content": None, "reasoning_content": "Hm"}, "finish_reason": "length"}
    for body, says in (
        ({"choices": []}, "3 replies that are none (the reply is not a chat completion: it holds"),
        ({"choices": [spent]}, "3 cut off (max_tokens of 120 is too short; allow more by"),
        ({"choices": [{"message": {"content": ""}}]}, "3 not understood (nothing is said)"),
    ):
        with ChatServer(None, lambda *_, body=body: (200, {}, json.dumps(body))) as server:
            assert main(planted, *through(server)) == 2
        said = capsys.readouterr()
        assert f"error: nothing that was asked has an answer: {says}" in said.err.splitlines()[-1]
        assert "3 of which nothing that was asked has an answer" in said.out
        assert not (planted / "explanations.json").exists()
        assert not (planted / "explanations.answers.jsonl").exists()


def test_a_run_counts_what_has_no_answer_by_its_reason(planted, capsys):
    from chat_server import ChatServer
    from judges import know

    refuse = lambda number, body: {50: 400, 60: (200, {}, '{"choices": []}')}.get(number)
    with ChatServer(know, refuse, usage=False) as server:
        assert main(planted, *through(server, "--concurrency", "1")) == 0
        out = capsys.readouterr().out
        (planted / "explanations.json").unlink()
        path = planted / "explanations.answers.jsonl"
        path.write_text(path.read_text() + '{"key": NaN}\n')
        assert main(planted, *through(server)) == 0
    assert "  2 questions have no answer and are in no score: 1 refused by the server (400 " in out
    assert "1 replies that are none (the reply is not a chat completion" in out
    assert "122 without a count of tokens" in out
    said = capsys.readouterr()
    assert "no answer" not in said.out and "2 answers, " in said.out
    assert "answers.jsonl: 1 damaged lines, asked again" in said.err


ENDPOINT = ("--endpoint", "http://127.0.0.1:9/v1", "--judge-model", "m")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--scores", "detction"), "no score 'detction'; did you mean detection"),
        (("--features", "1,x"), "give numbers and ranges"),
        (("--features", "8"), "the coder has features 0 to 7"),
        (("--features", "5-2"), "the coder has features 0 to 7"),
        (("--features", "1", "--sample", "2"), "not both"),
        (("--sample", "0"), "sample is 0: at least 1"),
        (("--endpoint", "http://x/v1"), "needs --endpoint URL and --judge-model NAME"),
        (("--judge", "endpoint"), "needs --endpoint URL and --judge-model NAME"),
        (("--plan",), "--plan does not go with --judge statistics"),
        ((*ENDPOINT, "--judge", "model"), "--endpoint does not go with --judge model"),
        (ENDPOINT, "which features? give some, such as 1,5,10-20, or the size"),
        (("--judge", "model"), "which features? give some, such as"),
        ((*ENDPOINT, "--sample", "2", "--request-options", "{"), "--request-options: not usable"),
        ((*ENDPOINT, "--sample", "2", "--request-options", "[]"), "not a JSON object"),
        ((*ENDPOINT, "--sample", "2", "--request-options", '{"top_p": NaN}'), "NaN is not a num"),
        ((*ENDPOINT, "--sample", "2", "--request-options", '{"stream": true}'), "cannot be set"),
        ((*ENDPOINT, "--sample", "2", "--timeout", "nan"), "timeout must be above 0"),
        ((*ENDPOINT, "--sample", "2", "--key-variable", "NOT_SET"), "NOT_SET: there is no such"),
        ((*ENDPOINT, "--sample", "2", "--concurrency", "0"), "must be above 0"),
        (("--answers", "gs://b/answers.jsonl"), "so they need a local file"),
        (("--length", "2"), "length is 2"),
        (("--name", "other"), "no coder 'other'; one of planted"),
        (("--hard-negatives", "99"), "hard is 99"),
        (("--sample", "3", "--least", "50000"), "no feature fires often enough"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(planted, capsys, args, says):
    assert main(planted, "--store", "s", *args) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and says in error


def test_two_processes_do_not_write_one_file(planted, capsys):
    from gemma_scope_jax.storage.locks import only_writer

    with only_writer(planted):
        assert main(planted, "--store", "s") == 2
    assert "another process is writing here" in capsys.readouterr().err


def test_another_coders_store(planted, capsys, monkeypatch):
    """It is known by its weights, under whatever name and of whatever width."""
    from gemma_scope_jax.coders.load import load_coder
    from gemma_scope_jax.extraction.manifest import describe

    coder = load_coder(planted)
    other = describe("it", coder.replace(threshold=coder.threshold + 1))
    monkeypatch.setattr(gs, "FeatureStore", lambda folder: planted_store(other))
    for name in ((), ("--name", "it")):
        assert main(planted, "--store", "s", *name) == 2
        assert "holds no features of coder, but of it" in capsys.readouterr().err
    both = (other, describe("pt", coder))
    monkeypatch.setattr(gs, "FeatureStore", lambda folder: planted_store(*both))
    assert main(planted, "--store", "s", "--name", "it") == 2
    assert main(planted, "--store", "s") == main(planted, "--store", "s", "--name", "pt") == 0


def test_the_model_is_the_coders(planted, monkeypatch):
    """A store's name of a model has lost the -it."""
    from gemma_scope_jax.coders.load import load_coder
    from gemma_scope_jax.coders.release.files import save_coder

    asked = []
    monkeypatch.setattr(gs, "load_tokenizer", lambda name: asked.append(name) or Tok())
    about = {"config_extra": {"model_name": "google/tiny-it", "first": 1}}
    save_coder(load_coder(planted), planted.parent / "it", **about)
    for options, wanted in {(): "tiny-it", ("--model", "mine"): "mine"}.items():
        for judge in ("statistics", "model"):
            with monkeypatch.context() as patch:
                if judge == "model":
                    patch.setattr(gs, "load_model", judging(asked))
                main(planted.parent / "it", "--store", "s", *options, "--judge", judge,
                     "--features", "1")  # fmt: skip
        assert set(asked) == {wanted} and len(asked) == 3
        asked.clear()


def judging(asked):
    def judge(name, **_):
        asked.append(name)
        raise InputError("this is enough")

    return judge


def test_where_explanations_of_a_layer_lie(planted, monkeypatch):
    """In a folder of their own only where a coder has several."""
    assert main(planted, "--store", "s", "--layer", "1") == 0
    assert len(read_explanations(planted, 8)) == 7 and not (planted / "layer_1").exists()
    assert layer_folder("x/", 2, 1) == layer_folder("x", 2, 1) == "x/layer_1"


def test_features_by_name_and_by_chance():
    assert parse_features("3, 1,4-6,5", 7) == [3, 1, 4, 5, 6]
    fired = np.array([0, 100, 19, 20, 50, 1000])
    assert choose_features("", None, fired, Sampling()) == [1, 2, 3, 4, 5]
    few = choose_features("", 2, fired, Sampling())
    assert len(few) == 2 and set(few) <= {1, 3, 4, 5}
    assert few == choose_features("", 2, fired, Sampling())
    assert choose_features("", 9, fired, Sampling()) == [1, 3, 4, 5]


@pytest.fixture(scope="module")
def extracted(tmp_path_factory, model):
    """Two coders of the tiny model, one of several layers, over random letters."""

    rng = np.random.default_rng(0)
    texts = ["".join(chr(97 + i) for i in rng.integers(0, 26, 60)) for _ in range(160)]
    coders = {"a": random_coder(threshold=1.0), "x": random_coder(16, layers=(0, 2), threshold=0.8)}
    return extract(
        model,
        coders,
        Letters(),
        texts,
        tmp_path_factory.mktemp("s"),
        batch_size=8,
        context_size=64,
        slots=32,
        shard_tokens=3000,
        values="float32",
    )


@pytest.mark.parametrize(("coder", "layer"), [("a", None), ("x", 2)])
def test_windows_of_an_extracted_store(extracted, coder, layer, tmp_path):
    """Tokens and activations of every window against the store's own lists, token by token; then
    labels and their scores from end to end."""
    corpus = open_corpus(extracted, Tok(), Sampling(length=16), coder, layer)
    fired = extracted.fired(coder, layer)
    feature = int(np.argsort(fired)[len(fired) // 2])
    material = gather(corpus, feature)
    rows = np.concatenate([s.start + np.arange(len(s)) for s in extracted.segments()])
    pieces = np.cumsum(np.concatenate([s.positions for s in extracted.segments()]) == 0)
    tokens = np.concatenate([s.tokens for s in extracted.segments()])
    at = {int(r): float(v) for r, v in zip(*extracted.feature(feature, coder, layer))}
    for e in [*material.train, *material.test, *material.non_activating, *material.strong]:
        inside = [
            r
            for r in range(max(0, e.row - 8), min(len(rows), e.row + 8))
            if pieces[r] == pieces[e.row] and tokens[r] != Tok.bos_id
        ]
        assert list(e.tokens) == Tok().decode_tokens(tokens[inside])
        np.testing.assert_allclose(e.values, [at.get(r, 0.0) for r in inside], rtol=1e-6)
    assert all(e.peak == 0 for e in material.non_activating) and all(
        e.peak > 0 for e in material.test
    )

    judge = RuleJudge()
    report = explain_features(
        corpus, judge, [feature], tuple(SCORES), tmp_path, coder=coder, width=len(fired)
    )
    entry = read_explanations(tmp_path, len(fired))[feature]
    assert report.done == 1 and set(entry["scores"]) == set(SCORES)
    assert 0 <= entry["scores"]["detection"]["accuracy"] <= 1


def test_a_coder_of_several_layers_needs_one_named(extracted):
    corpus = open_corpus(extracted, Tok(), Sampling(length=16), "x", None)
    with pytest.raises(InputError, match="none of its layers"):
        gather(corpus, 0)
