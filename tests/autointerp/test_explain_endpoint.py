"""Explaining through a chat endpoint, over real HTTP against a local server: who is right scores 1,
who guesses 0.5, and whatever fails is tried again or said."""

import json
import random
import threading
import time

import numpy as np
import pytest

from chat_server import KEY, ChatServer, explained
from gemma_scope_jax.autointerp.examples import Sampling, open_corpus
from gemma_scope_jax.autointerp.explanations import read_explanations
from gemma_scope_jax.autointerp.judges import chat_client
from gemma_scope_jax.autointerp.judges.chat_client import ChatClient, retry_after
from gemma_scope_jax.autointerp.judges.endpoint import Endpoint
from gemma_scope_jax.errors import InputError
from judges import ALL, guess, know
from planted_store import PLANTED, PlantedStore, Tok

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
    with ChatServer(
        lambda body: (
            said
            if len(body["messages"]) == 2 and "judge" in body["messages"][0]["content"]
            else know(body)
        )
    ) as server:
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
        ({"url": "http://me:secret@host/v1"}, "leave user and password out"),
        ({"url": "http://host:9x/v1"}, "invalid port"),
        ({"url": "http://host:99999/v1"}, "invalid port"),
        ({"url": "http://[host/v1"}, "invalid port or host"),
        ({"url": "http://host/v1?key=secret"}, "no # and no ."),
        ({"url": "http://host/v1#secret"}, "no # and no ."),
        ({"url": "http://host/\u00fc"}, "as %XX"),
        ({"url": "http://host/v 1"}, "as %XX"),
        ({"url": "http://host/v1\n"}, "as %XX"),
        ({"model": ""}, "name of a model"),
        ({"key": "two words"}, "invalid characters"),
        ({"key": "line\nbreak"}, "invalid characters"),
        ({"concurrency": 0}, "above 0"),
        ({"retries": -1}, "at least 0"),
        ({"price_in": -1.0}, "negative"),
    ],
)
def test_endpoints_that_cannot_be(change, says):
    with pytest.raises(InputError, match=says) as error:
        Endpoint(**{"url": "http://localhost:1/v1", "model": "m", **change})
    assert "secret" not in str(error.value) and change.get("key", "??") not in str(error.value)
