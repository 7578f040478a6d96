"""A Gemma as a judge, against plain passes over single prompts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope_jax.autointerp.answers import AnswerFile
from gemma_scope_jax.autointerp.judges import model as mj
from gemma_scope_jax.autointerp.questions import Question, ShownText
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.run import run
from judges import judge_of


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
    tok = judge.tokenizer

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
    rows = [judge.tokenizer.encode(f"{prompt} {i}").tolist() for i in (1, 2, 3)]
    logits = plain_logits(judge, np.array(rows[0][:-1], np.int32))[-1]
    assert len({tuple(r[:-1]) for r in rows}) == 1
    assert answer.values == (float(np.argmax([logits[r[-1]] for r in rows])),)


def test_simulated_strengths_are_expected_digits(judge):
    question = Question("simulate", (shown("the| start\n| of"),), "words")
    (answer,) = judge.answer([question])
    tok, head = judge.tokenizer, mj.SIMULATE.format(feature="words")
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
    ids = judge.tokenizer.encode(prompt).tolist()
    n = len(ids)
    for _ in range(mj.NEW):
        token = int(plain_logits(judge, np.array(ids, np.int32))[-1].argmax())
        if token in (*mj.STOP_TOKENS, judge.tokenizer.encode("\n", bos=False)[-1]):
            break
        ids.append(token)
    text = judge.tokenizer.decode(np.array(ids[n:], np.int32)).strip().split("\n")[0]
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
    tok = judge.tokenizer
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
    assert mj.ModelJudge(judge.model, judge.tokenizer, name).instructed is instructed


def test_a_prompt_beyond_the_context(judge):
    short = dataclasses.replace(judge.model.config, context=64)
    small = mj.ModelJudge(Model(judge.model.params, short), judge.tokenizer, "x")
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
        small = mj.ModelJudge(Model(judge.model.params, config), judge.tokenizer, "gemma-3-270m")
        if fits:
            assert small.answer(questions)[0].values == judge.answer(questions)[0].values
        else:
            assert small.answer(questions)[0].why == "longer than the context"
