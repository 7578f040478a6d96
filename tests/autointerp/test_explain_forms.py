"""Forms of answers that servers give."""

import json

import pytest

from chat_server import ChatServer
from gemma_scope_jax.autointerp.judges import chat_client
from gemma_scope_jax.autointerp.judges.replies import (
    BadReply,
    Reply,
    parsed,
    read_reply,
    takes_no_system,
    usage_of,
)
from gemma_scope_jax.autointerp.prompts import LONGEST, parse
from gemma_scope_jax.autointerp.questions import Question, ShownText
from judges import asked, classify, completion, know

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

    monkeypatch.setattr(chat_client.replies, "parsed", broken)
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
