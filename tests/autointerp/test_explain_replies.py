"""Endpoints as they really answer: a question without an answer costs that question, is counted by
its reason, and nothing but answers is kept; forms of answers; servers with ways of their own."""

import json

import pytest

from chat_server import KEY, ChatServer, explained
from gemma_scope_jax.autointerp.answers import AnswerFile
from gemma_scope_jax.autointerp.examples import Sampling, open_corpus
from gemma_scope_jax.autointerp.explain import ExplainReport
from gemma_scope_jax.autointerp.explanations import read_explanations
from gemma_scope_jax.autointerp.judges import chat_client
from gemma_scope_jax.autointerp.judges.chat_client import ChatClient, Endpoint
from gemma_scope_jax.autointerp.judges.endpoint_judge import EndpointJudge
from gemma_scope_jax.autointerp.judges.replies import (
    BadReply,
    Reply,
    parsed,
    read_reply,
    takes_no_system,
    usage_of,
)
from gemma_scope_jax.autointerp.prompts import LONGEST, parse
from gemma_scope_jax.autointerp.questions import Answer, Question, ShownText
from gemma_scope_jax.errors import InputError
from judges import know
from planted_store import PlantedStore, Tok


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(chat_client, "FIRST_PAUSE", 0.01)


def classify(word):
    return Question("classify", (ShownText((word,)),) * 3, "words", (1.0, 0.0, 1.0))


def poisoned(server_says, status=200):
    """A server that knows all answers but those to questions that hold "poison"."""
    content = server_says if isinstance(server_says, str) else json.dumps(server_says)
    bad = (status, {}, content)
    trouble = lambda number, body: bad if "poison" in json.dumps(body) else None
    return ChatServer(lambda body: "[1, 0, 1]", trouble)


def asked(server, folder, words=("fine", "poison", "also fine"), **options):
    """Answers to a question a word, one after the other, what was said, and how many are kept."""
    said, answers = [], AnswerFile(folder / "a.jsonl")
    options = {"concurrency": 1, "retries": 1, "timeout": 5.0, "key": KEY, **options}
    judge = EndpointJudge(
        ChatClient(Endpoint(server.url, "judge", **options), answers, said.append)
    )
    try:
        return judge.answer([classify(word) for word in words]), said, len(answers)
    finally:
        judge.close()
        answers.close()


# --- answers that are none -----------------------------------------------------------------------


def completion(content, finish="stop", **more):
    return {"choices": [{"message": {"content": content, **more}, "finish_reason": finish}]}


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


# --- forms of answers ----------------------------------------------------------------------------


PARTS = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "[0]?"}]},
    {"type": "text", "text": "[1, "},
    {"type": "text", "text": "0, 1]"},
]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[1]", "[1]"),
        (PARTS, "[1, 0, 1]"),
        (["a", "b"], "ab"),
        (None, ""),
        ([], ""),
        ("<think>x</think>[1]", "[1]"),
    ],
)
def test_contents_in_parts(content, text):
    assert read_reply(completion(content, reasoning_content="aloud")) == Reply(text)


def test_what_nobody_reads_costs_no_answer():
    """A seed of 64 bits without a sign, a key that comes twice, infinite log-probabilities."""
    head = '{"seed": 11633868395254070000, "seed": 1, "choices": [{"message": {"content": "[1]"}, '
    top = '[{"token": "1", "logprob": 0}, {"token": "0", "logprob": -Infinity}]'
    token = f'{{"token": "1", "logprob": 0, "top_logprobs": {top}}}'
    found = read_reply(parsed(f'{head}"logprobs": {{"content": [{token}]}}}}]}}'.encode()))
    assert found.text == "[1]" and json.loads(json.dumps(found.logprobs, allow_nan=False))
    question = Question("classify", (ShownText(("a",)),), "x")
    assert parse(question, "[1]", found.logprobs).confidence == (1.0,)
    for broken in (b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(BadReply):
            parsed(broken)
    assert usage_of({"usage": {"prompt_tokens": 10**400}}) is None


@pytest.mark.parametrize(
    "said",
    [
        "System role not supported",
        "Developer instruction is not enabled for gemma",
        "Unexpected role 'system' after role 'user'",
        "does not support system messages",
    ],
)
def test_errors_about_the_system_role(said):
    assert takes_no_system(said)
    assert not takes_no_system("Invalid prompt: system overloaded message")


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4}, (3, 4)),
        ({"prompt_tokens": 3}, (3, 0)),
        (None, None),
        ([1], None),
        ({"prompt_tokens": "3"}, None),
        ({"prompt_tokens": -3}, None),
        ({"prompt_tokens": True}, None),
        ({"prompt_tokens": [3]}, None),
        ({"prompt_tokens": 3.5}, None),
    ],
)
def test_counts_of_tokens(usage, counts):
    assert usage_of({"usage": usage}) == counts


@pytest.mark.parametrize(
    "logprobs",
    [
        5,
        [5],
        {"content": 5},
        {"content": [5, {"token": "1", "top_logprobs": 5}]},
        {"content": [{"token": "1", "logprob": "x"}] * 3},
        {"content": [{"token": "1", "logprob": 1e300}] * 3},
        {"content": [{"token": "1", "logprob": -9999.0}] * 3},
    ],
)
def test_log_probabilities_that_are_none_give_no_confidence(tmp_path, logprobs):
    with ChatServer(lambda body: "[1, 0, 1]", extra=lambda body: {"logprobs": logprobs}) as server:
        (answer,), _, _ = asked(server, tmp_path, ("fine",), logprobs=True)
    assert (answer.values, answer.confidence) == ((1, 0, 1), None)


def test_log_probabilities_that_nobody_asked_for_change_nothing(tmp_path):
    """Whether there are confidences is part of a judge's name."""
    top = [{"token": "1", "logprob": -0.1, "top_logprobs": []}] * 3
    extra = lambda body: {"logprobs": {"content": top}}
    with ChatServer(lambda body: "[1, 0, 1]", extra=extra) as server:
        (plain,), _, _ = asked(server, tmp_path, ("fine",))
        (sure,), _, _ = asked(server, tmp_path, ("fine",), logprobs=True)
    assert plain.confidence is None and sure.confidence == (1, 1, 1)
    assert (tmp_path / "a.jsonl").read_text().count('"logprobs"') == 1  # of one answer


def test_a_fault_of_ours_is_no_stop(tmp_path, monkeypatch):
    """A run that is closed stops; one that fails does not look like that."""

    def broken(*_, **__):
        raise RuntimeError("ours")

    monkeypatch.setattr(chat_client, "parsed", broken)
    with ChatServer(know) as server, pytest.raises(RuntimeError, match="ours"):
        asked(server, tmp_path, ("fine",))


THOUGHTS = [
    ("<think>\nverbs?\n</think>\n\nnames", "names"),
    ("<think>verbs?</think> names", "names"),
    ("verbs? Or\nnot\n</think>\nnames", "names"),  # the template wrote <think>
    ("<THINKING>a</THINKING><think>b</think>names", "names"),
    ("[THINK]verbs?[/THINK]names", "names"),
    ("◁think▷verbs?◁/think▷names", "names"),
    ("<|channel|>analysis<|message|>verbs?<|end|><|channel|>final<|message|>names", "names"),
    ("<think>\nOkay, it could be verbs, but then", None),
    ("  <think>", None),
    ("names of the <think> tag", "names of the <think> tag"),
    ("HTML <thinking> and </thinking> tags", "HTML <thinking> and </thinking> tags"),
    ("Well:\n<think>verbs?</think>\nnames", "names"),
    ('the closing tag "</think>" and others', 'the closing tag "</think>" and others'),
    ("```\nnames\n```", "names"),
    ('```json\n{"explanation": "names"}\n```', "names"),
    ('"names"', "names"),
    ("**names**", "names"),
    ("I'm sorry, but I can't assist with that request.", None),
    ("I cannot help with this.\nIt is harmful", None),
    ("apologies such as sorry, I can't", "apologies such as sorry, I can't"),
    ('"I cannot assist with this."', None),
    ("**I'm unable to help**", None),
    ('"I can\'t help" and other refusals', "I can't help\" and other refusals"),
    ("**I cannot assist** refusals", "I cannot assist** refusals"),
    ("names \ud83d", "names \ufffd"),
    ("names\x1b[2J \u202egnirts", "names\\x1b[2J \\u202egnirts"),
    ("names " * 2000, ("names " * 2000)[:LONGEST].strip()),
    ("x" * 10**6, None),
    ("[" * 10**6, None),
]


@pytest.mark.parametrize(("text", "phrase"), THOUGHTS)
def test_explanations_are_the_phrase_that_is_meant(text, phrase):
    answer = parse(Question("explain", (ShownText(("a",), (True,), (9,)),)), text)
    assert (answer and answer.text) == phrase


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nso [1, 1, 1] but wait",
        "[1, 0, 1e400]",
        f"[1, 0, {'9' * 400}]",
        "[1, 0, NaN]",
        '[{"a":' * 50_000 + "]",
        "[1, 0, Infinity]",
        "[[1], 0, 1]",
        "[1, 0, null]",
    ],
)
def test_numbers_that_are_none(text):
    assert parse(classify("a"), text) is None


def test_selections_and_lists_behind_thoughts_and_fences():
    select = Question("select", (ShownText(("a",)),) * 3, "letters")
    assert parse(select, "<think>\nhm, 2?\n</think>\n\n1, 3").values == (1, 0, 1)
    assert parse(select, "Here:\n```\n1, 3\n```").values == (1, 0, 1)
    assert parse(classify("a"), '```json\n{"answer": [1, 0, 1]}\n```').values == (1, 0, 1)


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
        with pytest.raises(InputError, match="no . or # in the URL"):
            Endpoint(f"http://host/v1{query}", "m")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"price_in": float("nan")}, "prices"),
        ({"price_out": float("inf")}, "prices"),
        ({"options": {"messages": []}}, "messages is not yours"),
        ({"options": {"messages": None}}, "messages is not yours"),
        ({"options": {"model": "other"}}, "model is not yours"),
        ({"options": {"top_p": float("nan")}}, "no JSON"),
        ({"options": {"stop": {1}}}, "no JSON"),
        ({"model": "a\x1b[2J"}, "control characters"),
        ({"url": "http://a..b/v1"}, "no such port"),
    ],
)
def test_settings_that_cannot_be_sent(change, says):
    with pytest.raises(InputError, match=says):
        Endpoint(**{"url": "http://localhost:1/v1", "model": "m", **change})
