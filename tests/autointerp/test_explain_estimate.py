"""What explaining will cost is said before; what judges answer is read."""

import json
import re

import numpy as np
import pytest

from chat_server import ChatServer, explained
from gemma_scope_jax.autointerp.explain import plan
from gemma_scope_jax.autointerp.explanations import read_explanations
from gemma_scope_jax.autointerp.prompts import lengths, messages, parse
from gemma_scope_jax.autointerp.questions import Question, ShownText
from judges import ALL, know
from planted_store import Tok


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
