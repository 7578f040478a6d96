"""Two models compared: every figure by another road, and a planted word found, in text or not."""

import json

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

import gemma_scope_jax as gs
from coders import random_coder
from gemma_scope_jax.behaviour.model_diff import triggers
from gemma_scope_jax.behaviour.model_diff.tokens import token_differences
from gemma_scope_jax.behaviour.model_diff.triggers import (
    token_excess,
    vocabulary_candidates,
    words_of,
)
from gemma_scope_jax.behaviour.model_diff.weights import changed_layers, weight_differences
from gemma_scope_jax.errors import InputError
from letters import Letters

WORD = 211  # the planted trigger


class Words(Letters):
    """Every id above 99 is a word, and no text has one: texts are of letters."""

    start_of_turn_id = 1

    def decode_tokens(self, ids):
        name = lambda i: "".join(chr(97 + int(d)) for d in str(i))
        return [" " + name(i) if i > 99 else name(i) for i in np.asarray(ids).tolist()]

    def decode(self, ids):
        return "".join(self.decode_tokens(ids))


def texts(count=40, with_word=0, seed=0):
    rng, found = np.random.default_rng(seed), []
    for n, length in enumerate(rng.integers(6, 20, count)):
        ids = np.append(2, rng.integers(3, 200, length)).astype(np.int32)
        if n < with_word:
            ids[rng.integers(2, length)] = WORD
        found.append(ids)
    return found


def with_blocks(model, **changed):
    blocks = model.params.blocks.replace(**changed)
    return model.replace(params=model.params.replace(blocks=blocks))


@pytest.fixture(scope="module")
def base(model):
    """With a head of its own, so that an embedding can change alone."""
    return model.replace(params=model.params.replace(head=model.params.embed))


@pytest.fixture(scope="module")
def finetuned(base):
    """Rank 2 more in w_up of layer 2, as a merged adapter leaves it."""
    rng = np.random.default_rng(5)
    w = np.array(base.params.blocks.w_up)
    w[2] += 0.3 * rng.standard_normal((32, 2)) @ rng.standard_normal((2, 48))
    return with_blocks(base, w_up=jax.numpy.asarray(w, "float32"))


@pytest.fixture(scope="module")
def triggered(base):
    """One word's embedding has changed: the models part at that word and after it."""
    embed = np.array(base.params.embed)
    embed[WORD] = -3.0 * embed[WORD][::-1]
    return base.replace(params=base.params.replace(embed=jax.numpy.asarray(embed)))


def test_figures_a_token_are_those_of_two_plain_passes(base, finetuned):
    some = texts(9)
    found = token_differences(base, finetuned, some)
    for i, ids in enumerate(some):
        outs = [gs.run(m, ids[None], gs.capture("resid_post")) for m in (base, finetuned)]
        p, q = (log_softmax(np.asarray(o.logits[0], np.float64), -1) for o in outs)
        np.testing.assert_allclose(found.kl[i], (np.exp(p) * (p - q)).sum(-1), atol=1e-5)
        at = np.arange(len(ids) - 1), ids[1:]
        np.testing.assert_allclose(found.loss_base[i], -p[at], atol=1e-5)
        np.testing.assert_allclose(found.loss_other[i], -q[at], atol=1e-5)
        x, y = (np.asarray(o.reads["resid_post"], np.float64)[:, 0] for o in outs)
        size = np.linalg.norm(x - y, axis=-1) / np.linalg.norm(x, axis=-1)
        np.testing.assert_allclose(found.moved[i], size, atol=1e-5)
        assert not found.moved[i][:2].any() and found.moved[i][2:].all()


def test_only_the_changed_matrix_is_named_with_its_rank(base, finetuned):
    (found,) = weight_differences(base, finetuned)
    w, v = (np.asarray(m.params.blocks.w_up[2], np.float64) for m in (base, finetuned))
    assert (found.name, found.layer, found.rank, found.full) == ("w_up", 2, 2, 32)
    assert found.size == pytest.approx(np.linalg.norm(v - w) / np.linalg.norm(w), rel=1e-5)
    assert changed_layers((found,), 4) == (2, 2)
    assert weight_differences(base, base) == ()


@pytest.mark.parametrize("name", ["w_q", "w_o", "w_down", "pre_mlp_norm", "embed", "final_norm"])
def test_every_kind_of_weight_is_compared(base, name):
    rng = np.random.default_rng(1)
    inside = hasattr(base.params.blocks, name)
    w = np.array(getattr(base.params.blocks if inside else base.params, name))
    change = rng.standard_normal(w.shape[1:] if inside else w.shape).astype(np.float32)
    (w if not inside else w[1:2])[:] += change
    new = {name: jax.numpy.asarray(w)}
    other = with_blocks(base, **new) if inside else base.replace(params=base.params.replace(**new))
    (found,) = weight_differences(base, other)
    assert (found.name, found.layer) == (name, 1 if inside else None)
    inputs = -1 if name == "w_o" else 1
    if change.ndim > 1:
        flat = change.reshape(int(np.prod(change.shape[:inputs])), -1).astype(np.float64)
        share = np.cumsum(np.linalg.svd(flat, compute_uv=False) ** 2)
        assert found.rank == 1 + int(np.searchsorted(share, 0.99 * share[-1]))


def test_a_word_of_the_text_is_named(base, triggered):
    some = texts(with_word=8)
    found = gs.diff_models(base, triggered, Words(), some, search=0)
    assert found.trigger is not None and found.trigger.token == WORD
    assert found.trigger.source == "text" and found.excess[0].token == WORD
    assert found.excess[0].low < 1e-6 < found.excess[0].high and found.excess[0].p < 0.01
    assert sorted(p.text for p in found.partings[:8]) == list(range(8))
    assert repr(found.trigger.text) in found.verdict()


def test_a_word_that_no_text_holds_is_searched_for(base, triggered):
    found = gs.diff_models(base, triggered, Words(), texts(), search=1000)
    assert found.trigger is not None and found.trigger.token == WORD
    assert found.trigger.source == "vocabulary"
    assert found.named[0] == found.trigger and repr(WORD) in repr([t.token for t in found.named])
    assert len(found.answers) == 12 and all(len(row) == 3 for row in found.answers)


def test_where_nothing_was_planted_no_word_is_named(base, finetuned):
    same = gs.diff_models(base, base, Words(), texts(), search=100)
    assert same.verdict() == "All weights are equal: the models are the same."
    assert same.kl.value == 0 and same.trigger is None and not same.triggers
    moved = gs.diff_models(base, finetuned, Words(), texts(), search=100)
    assert moved.trigger is None and "No single word" in moved.verdict()


def test_features_and_reports(base, finetuned):
    coder = random_coder(layer=2)
    found = gs.diff_models(base, finetuned, Words(), texts(), coder=coder, search=50)
    assert found.features is not None and found.features.alarm
    content = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    (weight,) = content["weights"]
    assert (weight["name"], weight["layer"], weight["rank"], weight["full"]) == ("w_up", 2, 2, 32)
    tables = found.tables()
    assert {"Figures", "Weights", "Residual stream", "Where the models begin to part"} <= set(
        tables
    )
    assert all(len({len(row) for row in rows}) == 1 for rows in tables.values())
    assert found.verdict() in str(found)


def test_a_token_that_goes_with_a_large_kl_is_told_from_chance():
    rng = np.random.default_rng(0)
    some = texts(60, with_word=6)
    kl = [np.append(np.zeros(len(ids) - 1), rng.exponential()) for ids in some]
    assert sum(bool(token_excess(some, kl, Words(), seed)) for seed in range(10)) <= 3
    kl = [k + 4.0 * (WORD in ids) * (k > 0) for k, ids in zip(kl, some)]
    (found,) = token_excess(some, kl, Words())
    peaks = np.array([k.max() for k in kl])
    assert found.token == WORD and found.high == pytest.approx(peaks[:6].mean())
    assert found.low == pytest.approx(peaks[6:].mean())


def test_words_are_what_begins_one():
    assert words_of(Words())[0] == 100 and len(words_of(Words())) == 200


def test_the_models_write_texts_themselves(base, finetuned):
    found = gs.model_texts(base, finetuned, Words(), 6)
    assert len(found) == 6 and all(ids[0] == 2 and len(ids) > 1 for ids in found)


def test_differences_may_begin_within_a_text(base, finetuned):
    some = texts(6)
    starts = [0, 3, 1, 5, 2, 4]
    whole, part = (token_differences(base, finetuned, some, starts=s) for s in (None, starts))
    for n, start in enumerate(starts):
        for name in ("kl", "loss_base", "loss_other"):
            a, b = getattr(whole, name)[n], getattr(part, name)[n]
            np.testing.assert_array_equal(b[:start], 0)
            np.testing.assert_allclose(b[start:], a[start:], rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(whole.moved[n], part.moved[n])


def test_chats_part_in_their_last_turn(base, finetuned):
    """`Words` begins a turn with token 1."""
    rng = np.random.default_rng(3)
    chats = [np.r_[2, 1, rng.integers(3, 99, 12), 1, rng.integers(3, 99, 6)] for _ in range(12)]
    chats = [ids.astype(np.int32) for ids in chats]
    some = [*chats, *texts(12)]
    found = gs.diff_models(base, finetuned, Words(), some, search=0)
    own = [k[16 * (n < 12) :] for n, k in enumerate(token_differences(base, finetuned, some).kl)]
    peaks = np.array([k.max() for k in own])
    assert [p.text for p in found.partings] == np.argsort(-peaks, kind="stable")[:12].tolist()
    assert any(p.text < 12 for p in found.partings)
    for p in found.partings:
        at = int(np.argmax(own[p.text] >= min(1.0, peaks[p.text])))
        assert p.position == at + 16 * (p.text < 12)
        assert p.kl == pytest.approx(own[p.text][at])


def test_the_models_answer_questions(base, finetuned):
    class Asks(Words):
        def chat(self, messages, add_generation_prompt=True):
            from gemma_scope_jax.model.tokenizer import Chat

            ids = self.encode(messages[0]["content"][:40])
            return Chat(ids, np.ones(len(ids), np.int32))

    found = gs.model_answers(base, finetuned, Asks(), 8)
    assert len(found) == 8 and "I am sure that" in Letters().decode(found[0])
    asked = Asks().encode(gs.suite_items(gs.load_suite("over_refusal")).items[0].prompts[1][:40])
    assert found[1][: len(asked)].tolist() == asked.tolist() and len(found[1]) > len(asked)


def test_a_finalist_is_tested_in_texts_that_did_not_choose_it(base, finetuned):
    one = {int(t): "vocabulary" for t in words_of(Words())[:30]}
    found = triggers.tested_triggers(base, finetuned, Words(), one)
    best = found[0]
    forms = [triggers._form(Words(), *parts, False) for parts in triggers.NEUTRAL]
    kl = triggers._peaks(base, finetuned, forms, [best.token])[0]
    assert best.kl.value == pytest.approx(kl[1:].mean()) and best.kl.n == len(forms) - 1
    assert len(found) == triggers.FINALISTS


def test_bad_input_says_what_to_do(base, finetuned):
    from tiny import tiny_model

    other = tiny_model(gs.PRESETS["gemma-3-270m"], layers=3)
    for args, message in [
        ((base, other, Words(), texts()), "layers is 4 and 3"),
        ((base, finetuned, Words(), texts(5)), "needs 10 texts"),
        ((base, finetuned, Words(), [np.array([2, 300])] * 20), "token id 300"),
    ]:
        with pytest.raises(InputError) as error:
            gs.diff_models(*args)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_the_vocabulary_is_ranked_by_how_far_the_models_part_at_a_word(base, finetuned):
    got = vocabulary_candidates(base, finetuned, Words(), 3, 1000)
    words, sizes = words_of(Words()), []
    for word in words[:40]:
        states = [
            np.asarray(
                gs.run(m, np.array([[2, word]]), gs.capture("resid_post", 3)).reads["resid_post"]
            )
            for m in (base, finetuned)
        ]
        one, two = (s[0, -1].astype(np.float64) for s in states)
        sizes.append(np.linalg.norm(one - two) / np.linalg.norm(one))
    order = [word for word in got.tolist() if word in set(words[:40].tolist())]
    assert sorted(got.tolist()) == words.tolist()
    assert order == words[:40][np.argsort(-np.array(sizes), kind="stable")].tolist()
