"""A Gemma as a judge, against plain passes over single prompts; the command from end to end."""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope_jax import cli
from gemma_scope_jax.autointerp.answers import AnswerFile
from gemma_scope_jax.autointerp.examples import Sampling, gather, open_corpus
from gemma_scope_jax.autointerp.explain import explain_features
from gemma_scope_jax.autointerp.explanations import (
    explanation_note,
    layer_folder,
    read_explanations,
    write_explanations,
)
from gemma_scope_jax.autointerp.judges import model as mj
from gemma_scope_jax.autointerp.judges.statistics import RuleJudge
from gemma_scope_jax.autointerp.questions import Question, ShownText
from gemma_scope_jax.autointerp.scores import SCORES
from gemma_scope_jax.cli.explain import chosen_features, parse_features
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.extract import extract
from gemma_scope_jax.model.config import PRESETS, Model
from gemma_scope_jax.model.run import run
from gemma_scope_jax.model.tokenizer import load_tokenizer
from planted_store import PLANTED, PlantedStore, Tok
from tiny import tiny_model
from tiny_tokenizer import tiny_proto, write_model


def judge_of(name, answers=None):
    """A tiny random model with a real, tiny tokenizer and room for long prompts."""
    with tempfile.TemporaryDirectory() as folder:
        tok = load_tokenizer(write_model(Path(folder) / "tokenizer.model", tiny_proto()))
    small = tiny_model(PRESETS["gemma-3-270m"], layers=2)
    draw = np.random.default_rng(1).standard_normal((tok.vocab_size, 32)) * 32**-0.5
    params = dataclasses.replace(small.params, embed=jnp.asarray(draw, jnp.float32))
    config = dataclasses.replace(small.config, vocab=tok.vocab_size, context=8192)
    return mj.ModelJudge(Model(params, config), tok, name, answers)


@pytest.fixture(scope="module")
def judge():
    return judge_of("gemma-3-270m")


def shown(text, marks=()):
    return ShownText(tuple(text.split("|")), marks)


TEXTS = [
    shown("the| start| of| a"),
    shown("end| of| turn| and| more"),
    shown("one"),
    shown("x| y\n"),
]


def plain_logits(judge, ids):
    """Of every position, in one row of its own without a prefix."""
    tokens, segments = np.zeros((2, 1, 1024), np.int32)
    tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
    return np.asarray(run(judge.model, tokens, segments=segments).logits[0, : len(ids)], np.float64)


def test_yes_and_no_are_those_of_a_plain_pass(judge):
    question = Question("classify", tuple(TEXTS), "words of turn")
    (answer,) = judge.answer([question])
    tok = judge.tok

    def odds(text):
        prompt = mj.CLASSES.format(feature="words of turn", text=text)
        yes, no = tok.encode(prompt + " yes").tolist(), tok.encode(prompt + " no").tolist()
        n = next(i for i, (a, b) in enumerate(zip(yes, no)) if a != b)
        logits = plain_logits(judge, np.array(yes[:n], np.int32))[-1]
        return logits[yes[n]] - logits[no[n]]

    plain = np.array([odds(s.text().strip()) for s in TEXTS]) - odds("N/A")
    np.testing.assert_allclose(answer.confidence, 1 / (1 + np.exp(-plain)), atol=2e-5)
    assert answer.values == tuple((plain > 0).astype(float))


def test_intruders_are_those_of_a_plain_pass(judge):
    texts = [shown("the| start", (False, True)), shown("a| turn", (True, False)), shown("of| one")]
    (answer,) = judge.answer([Question("intruder", tuple(texts))])
    lines = "1. the<< start>>\n2. <<a>> turn\n3. of one"
    prompt = mj.INTRUDER.format(texts=lines)
    rows = [judge.tok.encode(f"{prompt} {i}").tolist() for i in (1, 2, 3)]
    logits = plain_logits(judge, np.array(rows[0][:-1], np.int32))[-1]
    assert len({tuple(r[:-1]) for r in rows}) == 1
    assert answer.values == (float(np.argmax([logits[r[-1]] for r in rows])),)


def test_simulated_strengths_are_expected_digits(judge):
    question = Question("simulate", (shown("the| start\n| of"),), "words")
    (answer,) = judge.answer([question])
    tok, head = judge.tok, mj.SIMULATE.format(feature="words")
    ids, wanted = tok.encode(head).tolist(), []
    digits = [tok.encode(f": {d}", bos=False)[-1] for d in range(10)]
    before = tok.encode(": 0", bos=False)[:-1].tolist()
    for token in ("the", " start\\n", " of"):
        ids += tok.encode(token, bos=False).tolist() + before
        wanted.append(len(ids) - 1)
        ids += tok.encode("?\n", bos=False).tolist()
    logits = plain_logits(judge, np.array(ids, np.int32))[wanted][:, digits]
    chance = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(answer.values, chance @ np.arange(10) * 10 / 9, atol=2e-4)


def test_together_or_alone_the_answers_are_the_same(judge):
    questions = [
        Question("classify", tuple(TEXTS[:2]), "one"),
        Question("simulate", (TEXTS[1],), "one"),
        Question("select", tuple(TEXTS[1:]), "two"),
        Question("classify", (shown("a| b", (True, False)),), "one"),
        Question("intruder", tuple(TEXTS[:3])),
    ]
    for question, answer in zip(questions, judge.answer(questions)):
        (alone,) = judge.answer([question])
        np.testing.assert_allclose(answer.values, alone.values, atol=1e-4)
        if alone.confidence:
            np.testing.assert_allclose(answer.confidence, alone.confidence, atol=1e-5)
        assert len(answer.values) == question.expected
    assert judge.answer(questions) == judge.answer(questions)  # to the bit


def test_other_texts_compile_nothing(judge):
    ask = lambda word: judge.answer([Question("classify", (shown(f"{word}| turn"),), "image")])
    ask("one")
    programs = mj._choice_logits._cache_size(), mj._prefix._cache_size()
    ask("two")
    assert (mj._choice_logits._cache_size(), mj._prefix._cache_size()) == programs


def test_explanations_are_greedy_and_kept(tmp_path, monkeypatch):
    answers = AnswerFile(tmp_path / "a.jsonl")
    monkeypatch.setattr(mj, "NEW", 6)
    judge = judge_of("gemma-3-270m", answers)
    texts = ShownText(("the", " start", " of"), (False, True, False), (0, 10, 1))
    (cut,) = judge.answer([Question("explain", (texts,))])
    assert (cut.values, cut.why, len(answers)) == (None, "cut off", 0)  # it says no end
    monkeypatch.setattr(mj, "STOP_TOKENS", tuple(range(0, 300, 3)))
    (answer,) = judge.answer([Question("explain", (texts,))])
    prompt = mj.EXPLAIN.format(texts="the<< start>> of")
    ids = judge.tok.encode(prompt).tolist()
    n = len(ids)
    for _ in range(mj.NEW):
        token = int(plain_logits(judge, np.array(ids, np.int32))[-1].argmax())
        if token in (*mj.STOP_TOKENS, judge.tok.encode("\n", bos=False)[-1]):
            break
        ids.append(token)
    text = judge.tok.decode(np.array(ids[n:], np.int32)).strip().split("\n")[0]
    assert answer.text == text.strip(" .\"'*`") != "" and answer.values == ()
    monkeypatch.setattr(mj, "generate", lambda *a, **k: pytest.fail("asked twice"))
    assert judge.answer([Question("explain", (texts,))]) == [answer]
    answers.close()


def test_logits_that_are_no_numbers_are_no_answers(monkeypatch):
    """As of weights that overflow: no guess is read off them."""
    judge = judge_of("gemma-3-270m")
    params = judge.model.params
    broken = dataclasses.replace(params, embed=params.embed * jnp.inf)
    judge.model = Model(broken, judge.model.config)
    asked = [Question(task, tuple(TEXTS[:2]), "x") for task in ("classify", "intruder", "simulate")]
    for answer in judge.answer(asked):
        assert (answer.values, answer.confidence) == (None, None)
        assert answer.why == "without finite logits"


def test_an_instructed_model_is_asked_in_its_template(monkeypatch):
    judge = judge_of("gemma-3-1b-it")
    assert judge.instructed
    seen = []
    monkeypatch.setattr(
        judge,
        "_logits",
        lambda prompts: (
            seen.extend(prompts) or [np.zeros((len(p.places), len(p.choices))) for p in prompts]
        ),
    )
    judge.answer(
        [
            Question("classify", (TEXTS[0],), "f"),
            Question("intruder", tuple(TEXTS[:3])),
            Question("simulate", (TEXTS[0],), "f"),
        ]
    )
    tok = judge.tok
    for prompt in seen:
        assert prompt.ids[:2].tolist() == [tok.bos_id, tok.start_of_turn_id]
        assert tok.end_of_turn_id in prompt.ids.tolist()
    yes_no = [tok.encode(w, bos=False)[0] for w in ("No", "Yes")]
    assert seen[0].choices == tuple(yes_no) and len(seen[0].places) == 1
    assert tok.decode(seen[0].ids).endswith("model\n")


@pytest.mark.parametrize(
    "name, instructed",
    [
        ("gemma-3-1b-IT", True),
        ("acme/gemma_3_1b_it", True),
        ("gemma-3-4b-it-qat-q4_0", True),
        ("gemma-3-1b-pt", False),
        ("acme/kit-1b", False),
    ],
)
def test_a_name_says_whether_a_model_is_instructed(judge, name, instructed):
    assert mj.ModelJudge(judge.model, judge.tok, name).instructed is instructed


def test_a_prompt_beyond_the_context(judge):
    short = dataclasses.replace(judge.model.config, context=64)
    small = mj.ModelJudge(Model(judge.model.params, short), judge.tok, "x")
    tasks = ("classify", "intruder", "simulate", "select")
    asked = [Question(task, (TEXTS[0], TEXTS[1]), "x") for task in tasks]
    asked.append(Question("explain", (ShownText(("a",), (True,), (9,)),)))
    for answer in small.answer(asked):
        assert (answer.values, answer.why) == (None, "longer than the context")


def test_a_prompt_may_fill_the_context(judge):
    """What prompts share is part of each of them."""
    questions = [Question("classify", (TEXTS[0], TEXTS[1]), "x")]
    lengths = [
        len(judge._choice(mj.CLASSES.format(feature="x", text=t), (" no", " yes")).ids)
        for t in (TEXTS[0].text().strip(), TEXTS[1].text().strip(), "N/A")
    ]
    for context, fits in ((max(lengths), True), (max(lengths) - 1, False)):
        config = dataclasses.replace(judge.model.config, context=context)
        small = mj.ModelJudge(Model(judge.model.params, config), judge.tok, "gemma-3-270m")
        if fits:
            assert small.answer(questions)[0].values == judge.answer(questions)[0].values
        else:
            assert small.answer(questions)[0].why == "longer than the context"


# --- the file, and what shows it -----------------------------------------------------------------

SCORED = {"detection": {"balanced_accuracy": 0.912, "n": 10}, "simulation": {"correlation": None}}
ENTRY = {"text": "negations", "method": "endpoint", "model": "m", "examples": 15, "scores": SCORED}


def test_explanations_are_written_and_read(tmp_path):
    write_explanations(tmp_path, "some/coder", {12: ENTRY, 3: ENTRY | {"text": "ü\n"}})
    content = json.loads((tmp_path / "explanations.json").read_text())
    assert content["format"] == 1 and content["coder"] == "some/coder"
    assert list(content["explanations"]) == ["3", "12"]
    assert read_explanations(tmp_path, 13) == {12: ENTRY, 3: ENTRY | {"text": "ü\n"}}
    assert read_explanations(tmp_path / "explanations.json") == read_explanations(tmp_path)
    assert read_explanations(tmp_path / "nothing") == {}
    assert explanation_note(ENTRY) == "m, detection 0.91"
    assert [p.name for p in tmp_path.iterdir()] == ["explanations.json"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not usable as JSON"),
        ("[]", "not an object"),
        ('{"format": 1, "explanations": {"x": {}}}', "'x' is no feature's number"),
        ('{"format": 1, "explanations": {"01": {}}}', "'01' is no feature's number"),
        ('{"format": 1, "explanations": {"%s": {}}}' % ("9" * 400), "is no feature's number"),
        ('{"format": 1, "explanations": [1]}', "explanations is .1., not an object"),
        ('{"format": true, "explanations": {}}', "format is True"),
        ('{"format": 1, "explanations": {"3": {"scores": {"x": {"n": NaN}}}}}', "NaN"),
        ('{"format": 1, "explanations": {"3": {"examples": 1e400}}}', "too large"),
        ('{"format": 1, "explanations": {"3": {"examples": %s}}}' % ("9" * 400), "too large"),
        ('{"format": 1, "explanations": ' + "[" * 100_000, "nested too deeply"),
        ('{"format": 1, "explanations": {"3": {"text": "\\ud83d"}}}', "half of a surrogate pair"),
        ('{"format": 2, "explanations": {}}', "format 2 is not known"),
        ('{"format": 1, "explanations": {"3": {"text": 5}}}', "feature 3 has no explanation"),
        ('{"format": 1, "explanations": {"0": {}}}', "feature 0 has no explanation"),
        (json.dumps({"format": 1, "explanations": {"99": ENTRY}}), "explains feature 99"),
        (
            json.dumps({"format": 1, "explanations": {"3": ENTRY | {"scores": {"x": 0.9}}}}),
            "feature 3 has no explanation",
        ),
        ("\xff", "not UTF-8"),
    ],
)
def test_files_that_are_no_explanations(tmp_path, text, says):
    (tmp_path / "explanations.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=says):
        read_explanations(tmp_path, 50)


def test_a_named_file_that_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"other\.json: no such file"):
        read_explanations(tmp_path / "other.json")


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """A coder of 8 features whose store is the planted one."""
    import jax

    from gemma_scope_jax.coders.release.files import load_coder, save_coder
    from gemma_scope_jax.coders.sparse_coder import CoderInfo, SparseCoder
    from gemma_scope_jax.extraction.manifest import describe
    from gemma_scope_jax.extraction.store.store import store
    from gemma_scope_jax.model import tokenizer

    w = jax.random.normal(jax.random.key(0), (32, 8))
    coder = SparseCoder(
        w, jnp.zeros(8), jnp.ones(8), w.T, jnp.zeros(32), layer=1, info=CoderInfo(l0=1.0)
    )
    save_coder(coder, tmp_path / "coder", config_extra={"model_name": "acme/tiny"})
    about = describe("planted", load_coder(tmp_path / "coder"))
    monkeypatch.setattr(store, "FeatureStore", lambda folder: planted_store(about))
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda name: Tok())
    command = sys.modules["gemma_scope_jax.cli.explain"]
    monkeypatch.setattr(command, "use_compilation_cache", lambda: None)
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
    from test_explain_endpoint import know

    from chat_server import KEY, ChatServer

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
        assert "nothing sent: --yes" in capsys.readouterr().err and not server.bodies
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
    from test_explain_endpoint import know

    from chat_server import ChatServer

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
        (("--sample", "0"), "at least one"),
        (("--endpoint", "http://x/v1"), "needs --endpoint URL and --judge-model NAME"),
        (("--judge", "endpoint"), "needs --endpoint URL and --judge-model NAME"),
        (("--plan",), "--plan does not go with --judge statistics"),
        ((*ENDPOINT, "--judge", "model"), "--endpoint does not go with --judge model"),
        (ENDPOINT, "which features? --features 1,5,10-20 or --sample N"),
        (("--judge", "model"), "which features?"),
        ((*ENDPOINT, "--sample", "2", "--request-options", "{"), "--request-options: not usable"),
        ((*ENDPOINT, "--sample", "2", "--request-options", "[]"), "not a JSON object"),
        ((*ENDPOINT, "--sample", "2", "--request-options", '{"top_p": NaN}'), "NaN is not a num"),
        ((*ENDPOINT, "--sample", "2", "--request-options", '{"stream": true}'), "not yours to set"),
        ((*ENDPOINT, "--sample", "2", "--timeout", "nan"), "timeout must be above 0"),
        ((*ENDPOINT, "--sample", "2", "--key-variable", "NOT_SET"), "NOT_SET: there is no such"),
        ((*ENDPOINT, "--sample", "2", "--concurrency", "0"), "must be above 0"),
        (("--answers", "gs://b/answers.jsonl"), "appended to a file of this machine"),
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
    from gemma_scope_jax.coders.release.files import load_coder
    from gemma_scope_jax.extraction.manifest import describe
    from gemma_scope_jax.extraction.store.store import store

    coder = load_coder(planted)
    other = describe("it", coder.replace(threshold=coder.threshold + 1))
    monkeypatch.setattr(store, "FeatureStore", lambda folder: planted_store(other))
    for name in ((), ("--name", "it")):
        assert main(planted, "--store", "s", *name) == 2
        assert "holds no features of coder, but of it" in capsys.readouterr().err
    both = (other, describe("pt", coder))
    monkeypatch.setattr(store, "FeatureStore", lambda folder: planted_store(*both))
    assert main(planted, "--store", "s", "--name", "it") == 2
    assert main(planted, "--store", "s") == main(planted, "--store", "s", "--name", "pt") == 0


def test_the_model_is_the_coders(planted, monkeypatch):
    """A store's name of a model has lost the -it."""
    from gemma_scope_jax.coders.release.files import load_coder, save_coder
    from gemma_scope_jax.model import tokenizer

    asked = []
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda name: asked.append(name) or Tok())
    about = {"config_extra": {"model_name": "google/tiny-it", "first": 1}}
    save_coder(load_coder(planted), planted.parent / "it", **about)
    for options, wanted in {(): "tiny-it", ("--model", "mine"): "mine"}.items():
        for judge in ("statistics", "model"):
            command = sys.modules["gemma_scope_jax.cli.explain"]
            with monkeypatch.context() as patch:
                if judge == "model":
                    patch.setattr(command, "_judge", judging(asked))
                main(planted.parent / "it", "--store", "s", *options, "--judge", judge,
                     "--features", "1")  # fmt: skip
        assert set(asked) == {wanted} and len(asked) == 3
        asked.clear()


def judging(asked):
    def judge(kind, endpoint, model, *_):
        asked.append(model)
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
    assert chosen_features("", None, fired, 10, 0, "statistics") == [1, 2, 3, 4, 5]
    few = chosen_features("", 2, fired, 10, 0, "endpoint")
    assert len(few) == 2 and set(few) <= {1, 3, 4, 5}
    assert few == chosen_features("", 2, fired, 10, 0, "model")
    assert chosen_features("", 9, fired, 10, 0, "model") == [1, 3, 4, 5]


# --- a store as extract writes it ----------------------------------------------------------------


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Two coders of the tiny model, one of several layers, over random letters."""
    from test_extraction import crosscoder, sae

    from letters import Letters

    rng = np.random.default_rng(0)
    texts = ["".join(chr(97 + i) for i in rng.integers(0, 26, 60)) for _ in range(160)]
    model = tiny_model(PRESETS["gemma-3-270m"], layers=4)
    return extract(
        model, {"a": sae(0, 1), "x": crosscoder(4, (0, 2))}, Letters(), texts,
        tmp_path_factory.mktemp("s"), rows=8, length=64, slots=32, shard_tokens=3000,
        values="float32",
    )  # fmt: skip


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
    for e in [*material.train, *material.test, *material.silent, *material.strong]:
        inside = [r for r in range(max(0, e.row - 8), min(len(rows), e.row + 8))
                  if pieces[r] == pieces[e.row] and tokens[r] != Tok.bos_id]  # fmt: skip
        assert list(e.tokens) == Tok().decode_tokens(tokens[inside])
        np.testing.assert_allclose(e.values, [at.get(r, 0.0) for r in inside], rtol=1e-6)
    assert all(e.peak == 0 for e in material.silent) and all(e.peak > 0 for e in material.test)

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
