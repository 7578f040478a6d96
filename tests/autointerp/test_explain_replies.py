"""Endpoints as they really answer: a question without an answer costs that question, is counted by
its reason, and nothing but answers is kept; servers with ways of their own."""

import json

import pytest

from chat_server import KEY, ChatServer, explained
from gemma_scope_jax.autointerp.examples import Sampling, open_corpus
from gemma_scope_jax.autointerp.explain import ExplainReport
from gemma_scope_jax.autointerp.explanations import read_explanations
from gemma_scope_jax.autointerp.judges import chat_client
from gemma_scope_jax.autointerp.judges.endpoint import Endpoint
from gemma_scope_jax.autointerp.questions import Answer
from gemma_scope_jax.errors import InputError
from judges import asked, completion, know, poisoned
from planted_store import PlantedStore, Tok


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(chat_client, "FIRST_PAUSE", 0.01)


# --- answers that are none -----------------------------------------------------------------------


CONTENT_POLICY = {"error": {"code": "content_filter", "message": "triggers the content policy"}}
MODERATED = {"error": {"code": 403, "message": "requires moderation: your input was flagged"}}
NO_ANSWERS = {
    "choices is empty": ({"choices": [], "usage": {}}, 200, "replies that are none"),
    "no choices": ({"usage": {"prompt_tokens": 5}}, 200, "replies that are none"),
    "choices is null": ({"choices": None}, 200, "replies that are none"),
    "message is null": ({"choices": [{"message": None}]}, 200, "replies that are none"),
    "a list": ([], 200, "replies that are none"),
    "NaN": ('{"choices": NaN}', 200, "replies that are none"),
    "nested": ("[" * 100_000, 200, "replies that are none"),
    "broken": ('{"choices": [{"mess', 200, "replies that are none"),
    "an aborted answer": (completion("[1, 0, 1]", "abort"), 200, "replies that are none"),
    "an error in words": ({"error": "try later"}, 200, "replies that are none"),
    "filtered": (completion("", "content_filter"), 200, "filtered"),
    "filtered half way": (completion("[1, 0, 1]", "content_filter"), 200, "filtered"),
    "an error of a filter": ({**CONTENT_POLICY, "choices": None}, 200, "filtered"),
    "moderation": (MODERATED, 403, "filtered"),
    "moderation as success": ({**MODERATED, "choices": None}, 200, "filtered"),
    "Azure's filter": (CONTENT_POLICY, 400, "filtered"),
    "too long": ({"error": {"message": "context of 4096 exceeded"}}, 400, "refused by the server"),
    "legal": ({"detail": "not in your country"}, 451, "refused by the server"),
    "a refusal": (completion(None, refusal="I will not."), 200, "declined by the model"),
    "a refusal as a part": (
        completion([{"type": "refusal", "refusal": "No."}]),
        200,
        "declined by the model",
    ),
    "thought too long": (completion(None, "length", reasoning_content="Hm"), 200, "cut off"),
    "thought aloud too long": (completion("<think>[1, 0, 1]?", "length"), 200, "cut off"),
    "cut off": (completion("[1, 0, 1] because", "max_tokens"), 200, "cut off"),
    "gibberish": (completion("perhaps"), 200, "not understood"),
    "a thought and no more": (completion("<think>[1, 0, 1]"), 200, "not understood"),
}


@pytest.mark.parametrize(("reply", "status", "why"), NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_a_question_without_an_answer_costs_that_question(tmp_path, reply, status, why):
    with poisoned(reply, status) as server:
        answers, said, kept = asked(server, tmp_path)
        assert [a.values for a in answers] == [(1, 0, 1), None, (1, 0, 1)]
        assert answers[1].why == why and kept == 2
        assert any("a question has no answer" in line and why in line for line in said)
        before = len(server.bodies)
        asked(server, tmp_path)  # only that one is asked again
        assert all("poison" in json.dumps(body) for body in server.bodies[before:])
        assert len(server.bodies) > before


def test_one_question_that_a_server_fails_at_costs_that_question(tmp_path):
    """Of a server that answers others, meanwhile or later; if it fails at several in a row, and at
    whatever is asked, that ends the run."""
    fine = [f"fine {i}" for i in range(60)]
    with poisoned({"error": {"message": "out of memory"}}, 500) as server:
        answers, _, kept = asked(server, tmp_path, ["poison", *fine], concurrency=2, retries=2)
    assert answers[0].why == "failed" and "3 times: 500 out of memory" in answers[0].text
    assert all(a.values for a in answers[1:]) and kept == 60
    words = ["poison 1", "poison 2", "fine again", "poison 3", "poison 4", "fine at last"]
    with poisoned("{}", 500) as server:
        answers, _, kept = asked(server, tmp_path, words)
        assert [a.why for a in answers] == ["failed", "failed", "", "failed", "failed", ""]
        assert kept == 62
        with pytest.raises(InputError, match="no answer after 2 tries .500"):
            asked(server, tmp_path, ["poison 1", "poison 2", "poison 3"])


def test_a_run_without_answers_leaves_no_file_of_them(tmp_path):
    with poisoned(CONTENT_POLICY, 400) as server:
        _, _, kept = asked(server, tmp_path, ["poison"])
        assert kept == 0 and not (tmp_path / "a.jsonl").exists()
        assert asked(server, tmp_path, ["fine"])[2] == 1 and (tmp_path / "a.jsonl").exists()


def test_what_was_answered_before_is_known_to_work(tmp_path):
    """A second run, in which all that is left to ask is what is never answered, goes through."""
    poison = [f"poison {i}" for i in range(7)]
    with poisoned(CONTENT_POLICY, 400) as server:
        asked(server, tmp_path, ["fine"])
        answers, said, _ = asked(server, tmp_path, ["fine", *poison])
    assert [a.why for a in answers] == [""] + ["filtered"] * 7
    assert sum("has no answer" in line for line in said) == 5 and "at the end" in said[-1]
    with poisoned(CONTENT_POLICY, 400) as server:
        (tmp_path / "new").mkdir()
        with pytest.raises(InputError, match="refuses every request .400 triggers the content"):
            asked(server, tmp_path / "new", poison * 5)
    assert len(server.bodies) < 20


def test_cut_off_answers_are_asked_for_again_in_short(tmp_path):
    """And say which limit cut them off, where nothing helps."""
    talk = lambda number, body: (
        (200, {}, json.dumps(completion("[1, 1, 1] as I think", "length")))
        if len(body["messages"]) == 2 or "poison" in json.dumps(body)
        else None
    )
    with ChatServer(lambda body: "[1, 0, 1]", talk) as server:
        answers, said, kept = asked(server, tmp_path)
        sent = len(server.bodies)
        assert [a.values for a in answers] == [(1, 0, 1), None, (1, 0, 1)] and kept == 2
        again, _, _ = asked(server, tmp_path, ("fine", "also fine"))
        assert len(server.bodies) == sent == 2 + 3 + 2  # nothing is asked twice
    assert again == [answers[0], answers[2]]
    assert "max_tokens of 38 is too short; allow more by a request option" in said[0]


def test_kept_answers_that_are_none_are_asked_again(tmp_path):
    """As earlier versions kept them, or another program wrote them."""
    with poisoned({}) as server:
        asked(server, tmp_path, ("fine", "b", "c", "d"))
        path = tmp_path / "a.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line, answer in zip(lines, ({"text": ""}, {"text": 5}, [1])):
            line["answer"] = answer
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        answers, _, kept = asked(server, tmp_path, ("fine", "b", "c", "d"))
    assert all(a.values == (1, 0, 1) for a in answers) and kept == 4 and len(server.bodies) == 7


def test_a_score_without_answers_is_asked_for_again(tmp_path):
    """A feature keeps its explanation, and is not finished."""
    corpus = open_corpus(PlantedStore(), Tok(), Sampling())
    refuse = lambda number, body: (
        400 if "whether the feature is active somewhere" in body["messages"][0]["content"] else None
    )
    with ChatServer(know, refuse) as server:
        first, _ = explained(corpus, server, tmp_path, (0,), ("detection", "fuzzing"))
        entry = read_explanations(tmp_path, 8)[0]
        again, _ = explained(corpus, server, tmp_path, (0,), ("detection", "fuzzing"))
    assert list(entry["scores"]) == ["fuzzing"] and entry["scores"]["fuzzing"]["accuracy"] == 1
    assert first.lost == {"refused by the server": (20, "400 trouble 400")}
    assert (first.done, again.done, again.unexplained) == (1, 0, 1)
    assert read_explanations(tmp_path, 8)[0] == entry
    with ChatServer(know) as server:
        last, _ = explained(corpus, server, tmp_path, (0,), ("detection", "fuzzing"))
    assert (last.done, last.losses) == (1, "")
    assert set(read_explanations(tmp_path, 8)[0]["scores"]) == {"detection", "fuzzing"}


def test_losses_are_counted_by_their_reason():
    report = ExplainReport()
    report.lose([Answer("400 no\x1b[2J", why="filtered"), Answer("", why="cut off")])
    report.lose([Answer("400 never", why="filtered"), Answer("dunno")])
    said = "2 filtered (400 no\\x1b[2J), 1 cut off, 1 not understood (dunno)"
    assert report.losses == said


# --- other servers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "System role not supported"),
        (422, "Only user and assistant roles are supported!"),
        (400, "Unsupported value: 'messages[0].role' does not support 'system' with this model"),
        (500, "Jinja Exception: Conversation roles must alternate user/assistant/user/..."),
    ],
)
def test_models_without_a_system_role(tmp_path, status, message):
    error = (status, {}, json.dumps({"error": {"message": message}}))
    system = lambda number, body: error if body["messages"][0]["role"] == "system" else None
    with ChatServer(lambda body: "[1, 0, 1]", system) as server:
        answers, said, kept = asked(server, tmp_path, ("a", "b"))
        asked(server, tmp_path, ("a", "b"))
    assert all(a.values for a in answers) and kept == 2 and len(server.bodies) == 3
    (first, *_), ((merged,), (other,)) = (
        server.bodies[0]["messages"],
        (body["messages"] for body in server.bodies[1:]),
    )
    assert merged["role"] == other["role"] == "user" and merged["content"].startswith(
        first["content"] + "\n\nThe feature responds to: words\n\n1. a"
    )
    assert said == [
        "endpoint: the model takes no system role: its text now begins the user's message"
    ]


def test_azure_has_a_version_and_a_header_of_its_own():
    url = "https://me.openai.azure.com/openai/deployments/gpt?api-version=2024-10-21"
    endpoint = Endpoint(url, "gpt", KEY)
    where = "https://me.openai.azure.com/openai/deployments/gpt/chat/completions"
    assert endpoint.address == f"{where}?api-version=2024-10-21"
    assert endpoint.headers == {"api-key": KEY}
    assert Endpoint(f"{where}?api-version=1", "gpt").address == f"{where}?api-version=1"
    assert Endpoint("http://a/v1", "m", KEY).headers == {"Authorization": f"Bearer {KEY}"}
    for query in ("?key=secret", "?api-version=1&key=secret", "?", "?api-version=1#x"):
        with pytest.raises(InputError, match="no # and no ."):
            Endpoint(f"http://host/v1{query}", "m")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"price_in": float("nan")}, "prices"),
        ({"price_out": float("inf")}, "prices"),
        ({"options": {"messages": []}}, "messages cannot be set"),
        ({"options": {"messages": None}}, "messages cannot be set"),
        ({"options": {"model": "other"}}, "model cannot be set"),
        ({"options": {"top_p": float("nan")}}, "not JSON"),
        ({"options": {"stop": {1}}}, "not JSON"),
        ({"model": "a\x1b[2J"}, "control characters"),
        ({"url": "http://a..b/v1"}, "invalid port"),
    ],
)
def test_settings_that_cannot_be_sent(change, says):
    with pytest.raises(InputError, match=says):
        Endpoint(**{"url": "http://localhost:1/v1", "model": "m", **change})
