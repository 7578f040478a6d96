"""Explaining through a chat endpoint, over real HTTP against a local server: who is right scores 1,
who guesses 0.5, whatever fails is tried again or said, and nothing is asked twice."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from chat_server import KEY, ChatServer, explained
from gemma_scope_jax.autointerp.answers import AnswerFile, request_key
from gemma_scope_jax.autointerp.examples import Sampling, open_corpus
from gemma_scope_jax.autointerp.explain import fingerprint, plan
from gemma_scope_jax.autointerp.explanations import read_explanations
from gemma_scope_jax.autointerp.judges import chat_client
from gemma_scope_jax.autointerp.judges.chat_client import ChatClient, Endpoint, retry_after
from gemma_scope_jax.autointerp.prompts import lengths, messages, parse
from gemma_scope_jax.autointerp.questions import Question, ShownText
from gemma_scope_jax.autointerp.scores import SCORES
from gemma_scope_jax.errors import InputError
from judges import guess, know
from planted_store import PLANTED, PlantedStore, Tok

ALL = tuple(SCORES)


@pytest.fixture(scope="module")
def corpus():
    return open_corpus(PlantedStore(), Tok(), Sampling())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(chat_client, "FIRST_PAUSE", 0.02)


# --- what the server says ------------------------------------------------------------------------


def test_a_perfect_judge_scores_one(corpus, tmp_path):
    """Its simulation knows where, not how strongly: planted strengths are set equal for this."""
    store = PlantedStore()
    store.values = np.where(store.values > 0, np.float32(2), np.float32(0))
    even = open_corpus(store, Tok(), Sampling())
    with ChatServer(know) as server:
        report, client = explained(even, server, tmp_path, range(5), ALL)
    assert (report.done, report.unparsed, report.few) == (5, 0, 0)
    for feature, entry in read_explanations(tmp_path, 8).items():
        assert entry["text"] == f"the letters {PLANTED[feature]}"
        assert (entry["method"], entry["model"], entry["examples"]) == ("endpoint", "judge-1", 15)
        s = entry["scores"]
        for name in ("detection", "fuzzing"):
            assert s[name]["accuracy"] == s[name]["balanced_accuracy"] == s[name]["f1"] == 1
            assert s[name]["n"] == 100
        assert s["intruder"]["accuracy"] == 1 and s["intruder"]["n"] == 20
        assert s["simulation"]["correlation"] == pytest.approx(1, abs=1e-9)
        assert s["saebench"] == {"score": 1.0, "n": 14, "unparsed": 0}
    assert client.tokens_in == 100 * client.requests == 100 * len(server.bodies)


def test_a_guessing_judge_scores_a_half(corpus, tmp_path):
    """Within 4.5 standard deviations of the binomial: one failure in 100,000 seeds."""
    rng, lock = random.Random(3), threading.Lock()

    def answer(body):
        with lock:
            return guess(body, rng)

    with ChatServer(answer) as server:
        explained(corpus, server, tmp_path, range(5), ALL, concurrency=1)
    entries = read_explanations(tmp_path, 8).values()
    for name, figure, chance in (
        ("detection", "accuracy", 0.5),
        ("fuzzing", "accuracy", 0.5),
        ("intruder", "accuracy", 0.2),
        ("saebench", "score", 0.5),
    ):
        n = sum(e["scores"][name]["n"] for e in entries)
        right = sum(e["scores"][name]["n"] * e["scores"][name][figure] for e in entries)
        assert abs(right / n - chance) < 4.5 * (chance * (1 - chance) / n) ** 0.5, name
    mean = np.mean([e["scores"]["simulation"]["correlation"] for e in entries])
    assert abs(mean) < 4.5 / (5 * 600) ** 0.5


def test_no_request_shows_bos_or_the_truth(corpus, tmp_path):
    with ChatServer(know) as server:
        explained(corpus, server, tmp_path, (0,), ALL)
    sent = json.dumps(server.bodies)
    assert "<bos>" not in sent and "truth" not in sent
    for body in server.bodies:
        assert body["model"] == "judge-1" and body["temperature"] == 0 and body["max_tokens"] > 5


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [500, 502, 503, 529, 408, "close", "garbage", "short", (200, {}, "[]"),
     (200, {}, '{"choices":[]}'), (200, {}, '{"choices":[{"message":{"content":[1]}}]}'),
     (200, {}, '{"error":"busy"}')],
)  # fmt: skip
def test_what_passes_is_tried_again(corpus, tmp_path, wrong):
    """Every third request fails once; the result is that of a server without trouble."""
    failing = lambda number, body: wrong if number % 3 == 0 else None
    with ChatServer(know, failing) as server:
        report, client = explained(corpus, server, tmp_path)
    assert (report.done, report.unparsed) == (2, 0) and client.retried > 5
    entries = read_explanations(tmp_path, 8)
    assert all(e["scores"]["detection"]["accuracy"] == 1 for e in entries.values())


def test_a_server_that_hangs_is_left(corpus, tmp_path):
    with ChatServer(know, lambda number, body: "hang" if number == 2 else None) as server:
        began = time.monotonic()
        report, client = explained(corpus, server, tmp_path, timeout=0.5)
        assert report.done == 2 and client.retried == 1 and time.monotonic() - began < 3
    assert any("no answer within 0.5 s" in n for n in client.notes)


def test_retry_after_holds_everybody(corpus, tmp_path):
    """A 429 that names 0.6 s: nobody sends in that time."""
    busy = (429, {"Retry-After": "0.6"}, '{"error": {"message": "slow down"}}')
    with ChatServer(know, lambda number, body: busy if number == 3 else None) as server:
        report, client = explained(corpus, server, tmp_path)
        t = np.sort(server.times)
    assert report.done == 2 and client.retried == 1
    assert np.diff(t).max() >= 0.55  # all were told
    assert any("429 slow down; again in 0.6 s" in n for n in client.notes)


def test_retry_after_forms():
    import email.utils

    assert retry_after("7") == 7 and retry_after("0.5") == 0.5 and retry_after("-3") == 0
    assert retry_after(None) is None and retry_after("soon") is None
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 27 < retry_after(date) <= 30


def test_pauses_grow_and_are_random(monkeypatch):
    pauses = []
    monkeypatch.setattr(chat_client, "FIRST_PAUSE", 1.0)
    with ChatServer(know, lambda number, body: 500) as server:
        client = ChatClient(Endpoint(server.url, "m", retries=7), {})
        monkeypatch.setattr(client._stop, "wait", lambda s: pauses.append(s))
        monkeypatch.setattr(client, "answers", type("A", (), {"get": lambda self, key: None})())
        with pytest.raises(InputError, match="failed: 8 times: 500 trouble 500"):
            client.ask([], 5)
    caps = [min(60, 2.0**i) for i in range(7)]
    assert all(c / 2 <= p <= c for p, c in zip(pauses, caps, strict=True))
    assert len({p / c for p, c in zip(pauses, caps)}) > 3


BAD = {
    "no list": "I think the first one is active.",
    "too few": "[1, 0]",
    "too many": "[1, 0, 1, 0, 1, 0, 1]",
    "not 0 or 1": "[1, 2, 0, 0, 0]",
    "half": "[0.5, 0.5, 0.5, 0.5, 0.5]",
    "broken": "[1, 0, 1, 0,",
    "words": '["yes", "no", "no", "no", "no"]',
    "nothing": "",
}


@pytest.mark.parametrize("said", BAD.values(), ids=BAD)
def test_answers_without_the_form_are_asked_again(corpus, tmp_path, said):
    """The first answer to a question has the wrong form; told so, the server mends it."""
    with ChatServer(lambda body: said if len(body["messages"]) == 2 and "judge" in
                    body["messages"][0]["content"] else know(body)) as server:  # fmt: skip
        report, _ = explained(corpus, server, tmp_path, (0,))
    assert report.unparsed == 0
    assert read_explanations(tmp_path, 8)[0]["scores"]["detection"]["accuracy"] == 1
    again = [b for b in server.bodies if len(b["messages"]) == 4]
    assert len(again) == 20
    assert again[0]["messages"][2]["content"] == (said or "(nothing)")
    assert "5 numbers, each 0 or 1" in again[0]["messages"][3]["content"]


def test_what_is_never_understood_is_counted_not_scored(corpus, tmp_path):
    """Every fourth classification never has the form: it is in no figure, and said."""
    import hashlib

    def answer(body):
        first = json.dumps(body["messages"][:2])
        bad = int(hashlib.sha256(first.encode()).hexdigest(), 16) % 4 == 0
        return "dunno" if bad and "judge" in body["messages"][0]["content"] else know(body)

    with ChatServer(answer) as server:
        report, _ = explained(corpus, server, tmp_path, (0, 1), ("detection", "fuzzing"))
    scores = [s for e in read_explanations(tmp_path, 8).values() for s in e["scores"].values()]
    assert report.unparsed == sum(s["unparsed"] for s in scores) > 0
    assert all(s["n"] + s["unparsed"] == 100 and s["accuracy"] == 1 for s in scores)
    asked = [json.dumps(b["messages"][:2]) for b in server.bodies]
    assert max(asked.count(a) for a in set(asked)) == 3


def test_an_explanation_that_never_comes(corpus, tmp_path):
    with ChatServer(lambda body: "  \n ") as server:
        report, _ = explained(corpus, server, tmp_path, (0,))
    assert (report.done, report.unexplained) == (0, 1) and len(server.bodies) == 3
    assert read_explanations(tmp_path, 8) == {}


def test_single_requests_that_are_refused(corpus, tmp_path):
    """A content filter's 400 costs that question, not the run."""
    filtered = lambda number, body: 400 if number % 10 == 5 else None
    with ChatServer(know, filtered) as server:
        report, client = explained(corpus, server, tmp_path)
    assert report.done == 2 and report.unparsed == 5 * client.refused > 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (400, "refuses every request .400 trouble 400"),
        (401, "401 trouble 401; is the right key in the variable"),
        (403, "403 trouble 403"),
        (404, "404 trouble 404"),
        ((429, {}, '{"error": {"message": "no money", "code": "insufficient_quota"}}'), "no money"),
        ((429, {"Retry-After": "86400"}, "{}"), "asks to wait 86400 s"),
        ((307, {"Location": "http://elsewhere.example/v1"}, ""), "moved .http://elsewhere.example"),
        ((302, {"Location": "/v2/chat/completions"}, ""), "moved ./v2/"),
        (500, "no answer after 3 tries .500 trouble 500.; what is answered is kept"),
        ((401, {}, f'{{"error": {{"message": "Incorrect API key {KEY}"}}}}'), r"API key \*\*\*"),
    ],
)
def test_what_does_not_pass_is_one_line(corpus, tmp_path, wrong, says):
    bad = ChatServer(know, lambda number, body: wrong)
    with bad as server, pytest.raises(InputError, match=says) as error:
        explained(corpus, server, tmp_path, range(8), retries=2)
    assert KEY not in str(error.value) and "\n" not in str(error.value)
    others = 4 - 1  # that are under way, of three tries each
    assert len(server.bodies) <= 3 * (chat_client.FAILURES + others)


def test_nobody_there(corpus, tmp_path):
    with ChatServer(know) as server:
        url = server.url
    server.url = url
    with pytest.raises(InputError, match="no answer after 2 tries .*refused"):
        explained(corpus, server, tmp_path, retries=1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"url": "api.openai.com/v1"}, "give a URL such as"),
        ({"url": "ftp://x/v1"}, "give a URL"),
        ({"url": "http://me:secret@host/v1"}, "no user or password"),
        ({"url": "http://host:9x/v1"}, "no such port"),
        ({"url": "http://host:99999/v1"}, "no such port"),
        ({"url": "http://[host/v1"}, "no such port or host"),
        ({"url": "http://host/v1?key=secret"}, "no . or # in the URL"),
        ({"url": "http://host/v1#secret"}, "no . or # in the URL"),
        ({"url": "http://host/\u00fc"}, "as %XX"),
        ({"url": "http://host/v 1"}, "as %XX"),
        ({"url": "http://host/v1\n"}, "as %XX"),
        ({"model": ""}, "name of a model"),
        ({"key": "two words"}, "letters that no key has"),
        ({"key": "line\nbreak"}, "letters that no key has"),
        ({"concurrency": 0}, "above 0"),
        ({"retries": -1}, "at least 0"),
        ({"price_in": -1.0}, "negative"),
    ],
)
def test_endpoints_that_cannot_be(change, says):
    with pytest.raises(InputError, match=says) as error:
        Endpoint(**{"url": "http://localhost:1/v1", "model": "m", **change})
    assert "secret" not in str(error.value) and change.get("key", "??") not in str(error.value)


# --- limits, files, resuming ---------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3, 6])
def test_no_more_requests_than_allowed_are_under_way(corpus, tmp_path, limit):
    with ChatServer(know, pause=0.02) as server:
        explained(corpus, server, tmp_path, range(4), concurrency=limit)
    assert min(limit, 2) <= server.most <= limit


def test_the_key_goes_into_the_header_and_nowhere_else(corpus, tmp_path, capsys):
    """Not even when the server sends it back."""
    with ChatServer(lambda body: f"{KEY} {know(body)}") as server:
        report, client = explained(corpus, server, tmp_path, (0,))
    assert all(h["Authorization"] == f"Bearer {KEY}" for h in server.headers)
    assert KEY not in json.dumps(server.bodies) and KEY not in repr(client.endpoint)
    for path in tmp_path.rglob("*"):
        assert KEY.encode() not in path.read_bytes()
    assert KEY not in "".join(capsys.readouterr()) and KEY not in "".join(client.notes)
    with ChatServer(know) as server:
        explained(corpus, server, tmp_path, (1,), key="")
    assert all("Authorization" not in h for h in server.headers)


def test_finished_features_are_not_asked_again(corpus, tmp_path):
    with ChatServer(know) as server:
        explained(corpus, server, tmp_path, (0, 1), ("detection",))
        before = len(server.bodies)
        report, _ = explained(corpus, server, tmp_path, (0, 1), ("detection",))
        assert len(server.bodies) == before and (report.kept, report.done) == (2, 0)
        (tmp_path / "explanations.json").unlink()  # the answers alone are enough
        again, client = explained(corpus, server, tmp_path, (0, 1), ("detection",))
        assert len(server.bodies) == before and again.done == 2 and client.requests == 0
        more, _ = explained(corpus, server, tmp_path, (0, 1, 2), ("detection", "saebench"))
        new = server.bodies[before:]
    assert more.kept == 0 and len(new) == 2 + 22  # two of the new score, and one whole feature
    entries = read_explanations(tmp_path, 8)
    assert sorted(entries) == [0, 1, 2] and set(entries[0]["scores"]) == {"detection", "saebench"}


def test_other_judges_and_other_draws_start_anew(tmp_path):
    one = open_corpus(PlantedStore(), Tok(), Sampling())
    other = open_corpus(PlantedStore(), Tok(), Sampling(seed=5))
    with ChatServer(know) as server:
        explained(one, server, tmp_path, (0,))
        first = len(server.bodies)
        report, _ = explained(other, server, tmp_path, (0,))
    assert report.kept == 0 and len(server.bodies) == 2 * first


def test_settings_that_change_scores_are_another_judges(corpus, tmp_path):
    """Scores of one are not taken for the other's, in whichever order they come."""
    names = set()
    with ChatServer(know) as server:
        for options in ({}, {"options": {"top_p": 0.5}}, {"logprobs": True},
                        {"options": {"top_p": 0.1}}):  # fmt: skip
            before = len(server.bodies)
            report, client = explained(corpus, server, tmp_path, (0,), **options)
            assert (report.kept, report.done) == (0, 1) and len(server.bodies) > before
            again, _ = explained(corpus, server, tmp_path, (0,), **options)
            assert again.kept == 1
            names.add(read_explanations(tmp_path, 8)[0]["model"])
            assert "0.5" not in client.endpoint.name  # options may be secret
    assert len(names) == 4 and "judge-1" in names


def test_neighbours_count_only_where_they_are_drawn_from():
    draw = lambda **change: fingerprint(open_corpus(PlantedStore(), Tok(), Sampling(**change)))
    assert draw() == draw(neighbours="cooccurring")
    assert draw(hard=5) != draw(hard=5, neighbours="cooccurring")


def test_progress_says_how_far_it_is(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gemma_scope_jax.autointerp.explain.SAY_EVERY", 0.0)
    with ChatServer(know) as server:
        explained(corpus, server, tmp_path, range(4))
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("100.0 %  4 features ") and "left" not in lines[-1]
    assert sum("100.0 %" in line for line in lines) == 1


def test_the_answer_file_survives_a_torn_line(tmp_path):
    path = tmp_path / "a.jsonl"
    first = AnswerFile(path)
    first.put("one", {"text": 'ü\n"{', "logprobs": [{"token": "["}]})
    first.put("two", [1])
    first.close()
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        found = AnswerFile(path)
        lines = whole[:cut].count(b"\n")
        complete = whole[:cut].rstrip(b"\n").count(b"\n") + (
            cut in (len(whole) - 1, whole.index(b"\n"))
        )
        assert len(found) == max(lines, complete) and found.damaged == 0
        found.put("three", 3)
        found.close()
        again = AnswerFile(path)
        assert again.get("three") == 3 and len(again) == len(found) and again.damaged == 0
        assert lines < 1 or again.get("one")["text"] == 'ü\n"{'
        again.close()
    assert (
        request_key({"a": 1, "b": [2]}) == request_key({"b": [2], "a": 1}) != request_key({"a": 1})
    )


def test_answers_are_not_held_in_memory(tmp_path):
    import tracemalloc

    file = AnswerFile(tmp_path / "a.jsonl")
    tracemalloc.start()
    for i in range(200):
        file.put(str(i), {"text": str(i) * 20_000})
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1e6 and file.get("7") == {"text": "7" * 20_000} and file.get("x") is None
    file.close()
    again = AnswerFile(tmp_path / "a.jsonl")
    assert again.get("199") == {"text": "199" * 20_000}
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(InputError, match="a.jsonl: cannot be read"):
        again.get("199")
    again.close()


def test_answer_files_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        AnswerFile(tmp_path / "folder")


def test_many_threads_write_whole_lines(tmp_path):
    file = AnswerFile(tmp_path / "a.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: file.put(str(i), "x" * (i % 50)), range(400)))
    file.close()
    again = AnswerFile(tmp_path / "a.jsonl")
    assert len(again) == 400 and again.get("49") == "x" * 49
    again.close()


RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
from pathlib import Path
from chat_server import explained
from planted_store import PlantedStore, Tok
from gemma_scope_jax.autointerp.examples import Sampling, open_corpus
import types
server = types.SimpleNamespace(url={url!r})
corpus = open_corpus(PlantedStore(), Tok(), Sampling())
explained(corpus, server, Path({folder!r}), range(5), ("detection", "fuzzing"))
"""


def start(server, folder):
    script = RUN.format(url=server.url, folder=str(folder))
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE)


def test_killed_and_resumed_it_asks_nothing_twice(corpus, tmp_path):
    """SIGKILL at two moments. Only what was under way is asked again, and the file is the same."""
    with ChatServer(know, pause=0.03) as server:
        for _ in range(2):
            run, before = start(server, tmp_path), len(server.bodies)
            while len(server.bodies) < before + 25 and run.poll() is None:
                time.sleep(0.005)
            assert run.poll() is None, run.stderr.read().decode()
            run.kill()
            run.communicate()
            time.sleep(0.1)
        last = start(server, tmp_path)
        error = last.communicate(timeout=60)[1].decode()
        assert last.returncode == 0, error
        asked = [json.dumps(b) for b in server.bodies]
        repeated = len(asked) - len(set(asked))
        assert repeated <= 2 * 4  # those under way at a kill
        whole = tmp_path / "whole"
        explained(corpus, server, whole, range(5), ("detection", "fuzzing"))
    assert read_explanations(tmp_path, 8) == read_explanations(whole, 8)
    assert len(set(asked)) == 5 * (1 + 20 + 20)


def test_interrupted_it_keeps_what_it_has(tmp_path):
    """SIGINT: what is under way is still received, nothing else is sent, the file is whole."""
    with ChatServer(know, pause=0.2) as server:
        run = start(server, tmp_path)
        while len(server.bodies) < 20 and run.poll() is None:
            time.sleep(0.005)
        run.send_signal(signal.SIGINT)
        error = run.communicate(timeout=20)[1].decode()
        assert "KeyboardInterrupt" in error
        sent = len(server.bodies)
        assert sent < 100  # of some 200
    kept = AnswerFile(tmp_path / "answers.jsonl")
    assert len(kept) == sent
    kept.close()
    assert all(e["scores"]["fuzzing"] for e in read_explanations(tmp_path, 8).values())


# --- the estimate, and answers -------------------------------------------------------------------


def test_the_plan_is_what_is_then_asked(corpus, tmp_path):
    prices = (2.0, 8.0)
    p = plan(corpus, [0, 1, 2, 3, 4], ALL, prices)
    with ChatServer(know) as server:
        explained(corpus, server, tmp_path, range(5), ALL)
    assert p.requests == len(server.bodies)
    size = lambda b: sum(len(Tok().encode(m["content"])) for m in b["messages"])
    explanation = len("x" * 168) - len("the letters bc")  # the placeholder is longer
    real = sum(map(size, server.bodies))
    assert abs(p.tokens_in - real) < real * 0.12 + explanation * p.requests
    assert p.cost == pytest.approx((p.tokens_in * 2 + p.tokens_out * 8) / 1e6)
    assert p.tokens_out < p.tokens_out_most == sum(b["max_tokens"] for b in server.bodies)


def test_cost_so_far(corpus, tmp_path):
    with ChatServer(know) as server:
        _, client = explained(corpus, server, tmp_path, price_in=3.0, price_out=10.0)
    n = len(server.bodies)
    assert client.cost == pytest.approx((100 * n * 3 + 7 * n * 10) / 1e6)


def test_options_go_into_the_request(corpus, tmp_path):
    options = {"temperature": None, "max_tokens": None, "max_completion_tokens": 900}
    with ChatServer(know) as server:
        explained(corpus, server, tmp_path, (0,), options=options)
    assert all(set(b) == {"model", "messages", "max_completion_tokens"} for b in server.bodies)


def test_log_probabilities_make_confidences(corpus, tmp_path):
    """The server is sure of what is right to different degrees: the AUC is 1, and one bad
    threshold does not matter to it."""

    def extra(body):
        if "judge" not in body["messages"][0]["content"]:
            return {}
        content = []
        for value in json.loads(know(body)):
            p = 0.9 if value else 0.6
            tops = [("1", p), ("0", 1 - p)]
            tops = [{"token": t, "logprob": float(np.log(q))} for t, q in tops]
            content += [{"token": str(value), "logprob": 0.0, "top_logprobs": tops},
                        {"token": ",", "logprob": 0.0, "top_logprobs": []}]  # fmt: skip
        return {"logprobs": {"content": content}}

    with ChatServer(know, extra=extra) as server:
        explained(corpus, server, tmp_path, (0,), logprobs=True)
    assert all(b["logprobs"] and b["top_logprobs"] == 5 for b in server.bodies)
    assert read_explanations(tmp_path, 8)[0]["scores"]["detection"]["auc"] == 1
    kept = (tmp_path / "answers.jsonl").read_text()
    assert '"token": "1"' in kept and '"token": ","' not in kept  # what is read, and no more


def question(task, n=3):
    shown = [ShownText(("a", "\n", "b"), (False, False, True) if task != "select" else ())] * n
    return Question(task, tuple(shown), "letters")


@pytest.mark.parametrize(
    ("task", "text", "values"),
    [
        ("classify", "[1, 0, 1]", (1, 0, 1)),
        ("classify", "Text [1] fits.\n```json\n[true, false, 0]\n```", (1, 0, 0)),
        ("classify", "<think>[1,1,1]?</think> [0,0,0]", (0, 0, 0)),
        ("classify", "[1, 0]", None),
        ("classify", "[1, 0, NaN]", None),
        ("select", "1, 3", (1, 0, 1)),
        ("select", "1, 2 and 3.", (1, 1, 1)),
        ("select", "None", (0, 0, 0)),
        ("select", "none.", (0, 0, 0)),
        ("select", "[2]", (0, 1, 0)),
        ("select", "4", None),
        ("select", "The second one", None),
        ("select", "", None),
        ("intruder", "[2]", (1,)),
        ("intruder", "Not [1] but [3]", (2,)),
        ("intruder", "2", (1,)),
        ("intruder", "[0]", None),
        ("intruder", "[4]", None),
        ("intruder", "the second", None),
        ("simulate", "[0, 10, 3]", (0, 10, 3)),
        ("simulate", "[0, 11, 3]", None),
        ("simulate", "[0, -1, 3]", None),
        ("explain", 'Explanation: "the letter b".', ()),
        ("explain", "  ", None),
    ],
)
def test_answers_are_read(task, text, values):
    answer = parse(question(task), text)
    assert (None if answer is None else answer.values) == values
    if task == "explain" and answer:
        assert answer.text == "the letter b"


@pytest.mark.parametrize("task", ["explain", "classify", "select", "intruder", "simulate"])
def test_messages_are_one_line_a_text(task):
    system, user = messages(question(task))
    assert (system["role"], user["role"]) == ("system", "user")
    lines = user["content"].splitlines()
    if task == "simulate":
        assert json.loads(lines[-1]) == ["a", "\n", "b"]
    else:
        assert [line for line in lines if re.match(r"\d\. ", line)][0].startswith("1. a↵")
    assert ("<<" in user["content"]) == (task not in ("select", "simulate"))
    usual, most = lengths(question(task))
    assert usual < most
