"""Sweeps, the choice of strength and of features, and vectors, on tiny models."""

import dataclasses

import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.behaviour.audits.judges import AnswerJudge
from gemma_scope_jax.behaviour.measure import generated_ids
from gemma_scope_jax.behaviour.steering.calibrate import CLEAN, calibrate
from gemma_scope_jax.behaviour.steering.effects import ReadingMean, WordShare, repetition
from gemma_scope_jax.behaviour.steering.sweep import Sweep, SweepArm, sweep
from gemma_scope_jax.behaviour.steering.vectors import add_in_norms
from gemma_scope_jax.errors import InputError
from letters import Letters
from tiny import tiny_model

D, LAYER = 32, 2
TOK = Letters()
PROMPTS = ["abc", "de", "fghij", "kl"]


@pytest.fixture(scope="module")
def model():
    return tiny_model(gs.PRESETS["gemma-3-270m"], layers=4)


def spec(strength, seed=0, **more):
    vector = np.random.default_rng(seed).normal(size=D).tolist()
    step = {"op": "add", "strength": strength, "vector": vector, "layer": LAYER, "unit": "norm"}
    return gs.steer_spec([{**step, **more}])


@pytest.fixture(scope="module")
def swept(model):
    arms = [SweepArm("none"), SweepArm("weak", spec(0.2), group="v", strength=0.2),
            SweepArm("strong", spec(3.0), group="v", strength=3.0),
            SweepArm("zero", spec(0.0)), SweepArm("asked", before="xyz ")]  # fmt: skip
    effects = {"vowels": WordShare(("a", "e", "i", "o", "u"))}
    effects["read"] = ReadingMean(gs.Reading(vector=np.ones(D, np.float32), layer=1))
    return sweep(model, TOK, PROMPTS, arms, effects=effects, max_new_tokens=5, rows=7)


def test_an_arm_is_what_generating_alone_gives(model, swept):
    for p, prompt in enumerate(PROMPTS):
        ids = TOK.encode(prompt)
        for a, arm in enumerate(swept.arms[:3]):
            items = [] if arm.spec is None else gs.steering(model, arm.spec, None, [ids])
            out = gs.generate(
                model, [ids], 5, items, temperature=1.0, top_k=64, top_p=0.9, draws=[p]
            )
            tokens = out.sequences[0][len(ids) :]
            assert TOK.decode(tokens) == swept.texts[a][p]
            assert swept.tokens[a, p] == len(tokens)
            assert swept.repetition[a, p] == repetition(tokens)


def test_the_loss_is_that_of_the_unchanged_model_on_the_continuation(model, swept):
    p, a = 2, 2
    ids = TOK.encode(PROMPTS[p])
    out = gs.generate(model, [ids], 5, gs.steering(model, swept.arms[a].spec),
                      temperature=1.0, top_k=64, top_p=0.9, draws=[p])  # fmt: skip
    whole = out.sequences[0]
    logits = np.asarray(gs.run(model, whole[None]).logits[0], np.float64)
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logp -= logits.max(-1, keepdims=True)
    own = [-logp[t - 1, whole[t]] for t in range(len(ids), len(whole))]
    assert swept.loss[a, p] == pytest.approx(np.mean(own), abs=1e-4)
    x = gs.run(model, whole[None], gs.capture("resid_post", 1)).reads["resid_post"][0]
    read = np.asarray(x, np.float64).sum(-1)[len(ids) :].mean()
    assert swept.effects["read"][a, p] == pytest.approx(read, abs=1e-4)


def test_strength_zero_writes_the_unsteered_text(swept):
    assert swept.texts[3] == swept.texts[0]
    assert swept.texts[2] != swept.texts[0]


def test_a_sweep_compiles_one_decode_for_all_its_arms(model):
    from gemma_scope_jax.model.generate import _generate

    arms = lambda n: [SweepArm(f"{i}", spec(0.1 * i + n, seed=i)) for i in range(4)]
    run = lambda n: sweep(model, TOK, PROMPTS, arms(n), effects={"v": WordShare(("a",))},
                          max_new_tokens=3, rows=5)  # fmt: skip
    run(0)
    size = _generate._cache_size()
    run(1)
    assert _generate._cache_size() == size


def made_up(effect, loss, repeated=None):
    """A sweep of strengths 0, 1, 2, ... with given effects and losses [A, P]."""
    effect, loss = np.asarray(effect, float), np.asarray(loss, float)
    arms = [SweepArm("none"), *(SweepArm(f"{s}", spec(0.0), group="g", strength=float(s))
                                for s in range(1, len(effect)))]  # fmt: skip
    prompts = tuple("p" * (n + 1) for n in range(effect.shape[1]))
    rep = np.zeros_like(loss) if repeated is None else np.asarray(repeated, float)
    texts = tuple(("x",) * len(prompts) for _ in arms)
    return Sweep(tuple(arms), prompts, texts, loss, rep, {"e": effect}, np.ones(loss.shape, int))


def test_the_strongest_effect_within_the_bound_is_chosen_on_one_half_alone():
    rng = np.random.default_rng(0)
    level = np.array([0.0, 0.3, 0.6, 0.9, 1.0])
    effect = level[:, None] + 0.01 * rng.normal(size=(5, 12))
    loss = np.array([1.0, 1.1, 1.3, 1.5, 3.0])[:, None] + 0.01 * rng.normal(size=(5, 12))
    found = calibrate(made_up(effect, loss), bound=2.0)
    group = found["g"]
    assert group.chosen == 3.0 and group.range == (2.0, 3.0) and group.within_bound
    scored = list(found.scored_on)
    assert group.held_out.effect.value == pytest.approx(effect[3, scored].mean())
    assert group.held_out.gain.value == pytest.approx((effect[3] - effect[0])[scored].mean())
    ratio = np.exp((loss[3] - loss[0])[scored].mean())
    assert group.held_out.perplexity.value == pytest.approx(ratio)
    assert found[CLEAN].held_out.gain.value == 0.0 and not found[CLEAN].helps and group.helps
    few = calibrate(made_up(effect[:, :8], loss[:, :8]))["g"]
    assert few.chosen == 3.0 and not few.helps  # four prompts show nothing
    turned = effect.copy()
    turned[:, scored] *= -1.0
    assert "not shown" in str(calibrate(made_up(turned, loss)))
    assert "not shown" not in str(calibrate(made_up(effect, loss)))
    spoiled = effect.copy()
    spoiled[:, scored] = rng.normal(size=(5, len(scored)))
    assert calibrate(made_up(spoiled, loss), bound=2.0)["g"].chosen == 3.0


def test_a_prompt_reports_its_own_figures_whatever_they_are():
    effect, loss = np.zeros((2, 8)), np.ones((2, 8))
    loss[1] += 3.0
    one = made_up(effect, loss)
    asked = dataclasses.replace(one, arms=(one.arms[0], SweepArm("prompt", before="about ")))
    found = calibrate(asked)["prompt"]
    assert found.held_out.perplexity.value == pytest.approx(np.exp(3.0))
    assert found.within_bound is False and found.chosen is None
    assert "beyond the bound" in str(calibrate(asked))


def test_nothing_is_recommended_where_nothing_helps_or_all_falls_apart():
    flat, loss = np.zeros((3, 8)), np.ones((3, 8))
    assert calibrate(made_up(flat, loss))["g"].chosen is None
    rising = np.arange(3.0)[:, None] + np.zeros((3, 8))
    assert calibrate(made_up(rising, loss + 2.0 * rising))["g"].chosen is None
    assert calibrate(made_up(rising, loss, 0.9 * (rising > 0)))["g"].chosen is None


def test_a_judge_is_an_effect(model):
    judge = AnswerJudge(
        "even",
        "of even length",
        "counting",
        lambda prompts, answers: np.array([len(a) % 2 == 0 for a in answers]),
    )
    one = sweep(model, TOK, PROMPTS, [SweepArm("none")], effects={"even": judge}, max_new_tokens=3)
    assert one.effects["even"].tolist() == [[len(t) % 2 == 0 for t in one.texts[0]]]
    silent = dataclasses.replace(judge, grade=lambda p, a: np.where(np.arange(len(p)), 1.0, np.nan))
    with pytest.raises(InputError, match=r"did not judge 1 of 4 texts"):
        sweep(model, TOK, PROMPTS, [SweepArm("none")], effects={"e": silent}, max_new_tokens=3)


def test_words_are_counted_without_case_and_by_their_beginnings():
    share = WordShare(("cook*", "Tea"))
    assert share.of_text("Cooking tea, teapots and cooks.") == pytest.approx(3 / 5)
    assert share.of_text("...") == 0.0
    assert repetition(np.array([1, 2, 3, 1, 2, 3, 1, 2])) == pytest.approx(0.5)
    assert repetition(np.array([1, 2])) == 0.0


# --- Features and vectors ------------------------------------------------------------------------


def planted_coder(model):
    """Feature n writes the embedding of token 40 + n; the last ones write noise."""
    r = np.random.default_rng(0)
    table = np.asarray(model.params.embed)[40:48].astype(np.float32)
    rows = np.concatenate([table, r.normal(size=(8, D)).astype(np.float32)])
    return gs.SparseCoder(
        w_enc=r.normal(size=(D, 16)).astype(np.float32), b_enc=np.zeros(16, np.float32),
        threshold=np.full(16, 0.1, np.float32), w_dec=rows, b_dec=np.zeros(D, np.float32), layer=3,
    )  # fmt: skip


def test_output_scores_equal_a_plain_computation(model):
    coder = planted_coder(model)
    found = gs.output_scores(model, coder, TOK, range(16), prompt="ab", tokens=4)
    text = TOK.encode("ab")[None]

    def state(items):
        logits = np.asarray(gs.run(model, text, items).logits[0, -1], np.float64)
        p = np.exp(logits - logits.max())
        return logits, p / p.sum()

    for f in (0, 5, 12):
        u = np.asarray(coder.w_dec[f] / np.linalg.norm(coder.w_dec[f]))
        steered = gs.write("resid_post", 3, add_in_norms, u, np.float32(0.5))
        score = 0.0
        for sign, items in ((1, steered), (-1, ())):
            logits, p = state(items)
            for token in found.top_tokens[f]:
                rank = (logits > logits[token]).sum()
                score += sign * p[token] * (1 - rank / len(p)) / 4
        assert found.output_score[f] == pytest.approx(score, abs=1e-5)
        sure = [-np.sort(np.log(state(items)[1]))[-4:].mean() for items in (steered, ())]
        assert found.confidence[f] == pytest.approx(sure[0] - sure[1], abs=1e-4)
    assert found.best(1)[0] == int(np.argmax(found.output_score))


def texts_of(letters, count=12, seed=0):
    rng = np.random.default_rng(seed)
    return [TOK.encode("".join(rng.choice(list(letters), 8))) for _ in range(count)]


@pytest.mark.parametrize("method", ["mean", "pca", "probe"])
def test_vectors_point_from_the_negative_to_the_positive_texts(model, method):
    a, b = texts_of("abcd"), texts_of("wxyz")
    made = gs.contrast_vector(model, a, b, "resid_post", LAYER, method=method)
    read = lambda ids: gs.run(model, ids[None], gs.capture("resid_post", LAYER)).reads
    x = lambda texts: np.stack([np.asarray(read(i)["resid_post"])[0, 1:].mean(0) for i in texts])
    xa, xb = x(a), x(b)
    if method == "mean":
        np.testing.assert_allclose(made.vector, xa.mean(0) - xb.mean(0), atol=1e-4)
    assert (xa @ made.vector).min() > (xb @ made.vector).max()
    away = np.linalg.norm(xa.mean(0) - xb.mean(0))
    assert 0.3 * away < np.linalg.norm(made.vector) < 1.5 * away


def test_a_vector_is_kept_with_how_it_was_made(model, tmp_path):
    made = gs.contrast_vector(model, texts_of("ab"), texts_of("yz"), "mlp_out", 1)
    made.save(tmp_path / "v.safetensors")
    again = gs.SteeringVector.load(tmp_path / "v.safetensors")
    np.testing.assert_array_equal(again.vector, made.vector)
    assert (again.site, again.layer, again.norm, again.made) == ("mlp_out", 1, made.norm, made.made)
    step = {"op": "add", "strength": 2.0, "vector": str(tmp_path / "v.safetensors")}
    given = gs.steer_spec([step]).steps[0].target
    np.testing.assert_array_equal(given.vector, made.vector)
    assert (given.site, given.layer) == ("mlp_out", 1)
    with pytest.raises(gs.InputError, match="not a steering vector"):
        from safetensors.numpy import save_file

        save_file({"vector": made.vector}, tmp_path / "other.safetensors")
        gs.SteeringVector.load(tmp_path / "other.safetensors")


def test_training_makes_the_positive_texts_likelier(model):
    a, b = texts_of("abcd", 16), texts_of("wxyz", 16)
    made = gs.train_vector(model, a, b, "resid_post", LAYER, steps=25, batch=8)
    assert np.linalg.norm(made.vector) == pytest.approx(1.0, abs=1e-5)

    def preference(vector):
        item = gs.write("resid_post", LAYER, add_in_norms, vector, np.float32(0.3))
        held = texts_of("abcd", 12, 5), texts_of("wxyz", 12, 5)
        rise = [text_rise(model, side, item) for side in held]
        return rise[0] - rise[1]

    mean = gs.contrast_vector(model, a, b, "resid_post", LAYER).vector
    trained = preference(made.vector)
    assert trained > preference(mean / np.linalg.norm(mean)) and trained > 0


def text_rise(model, texts, item):
    from gemma_scope_jax.behaviour.measure import text_loss

    return float((text_loss(model, texts) - text_loss(model, texts, item)).mean())


BAD = {
    "no prompts": (dict(prompts=[]), "needs prompts"),
    "an empty prompt": (dict(prompts=["a", " "]), "none of them empty"),
    "two arms of one name": (dict(arms=[SweepArm("a"), SweepArm("a")]), "names of their own"),
    "no effects": (dict(effects={}), "needs an effect"),
    "no rows": (dict(rows=0), "rows must be at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_sweep_that_cannot_be_meant_is_refused(model, name):
    change, line = BAD[name]
    given = dict(prompts=PROMPTS, arms=[SweepArm("a")], effects={"v": WordShare(("a",))}) | change
    with pytest.raises(gs.InputError, match=line):
        sweep(model, TOK, given.pop("prompts"), given.pop("arms"), max_new_tokens=2, **given)


def test_a_calibration_that_cannot_be_meant_is_refused():
    one = made_up(np.zeros((2, 8)), np.ones((2, 8)))
    for change, line in ((dict(effect="x"), "no effect 'x'"), (dict(bound=0.5), "at least 1")):
        with pytest.raises(gs.InputError, match=line):
            calibrate(one, **change)
    with pytest.raises(gs.InputError, match="at least 4 prompts"):
        calibrate(made_up(np.zeros((2, 3)), np.ones((2, 3))))
    steered = dataclasses.replace(one, arms=tuple(SweepArm(a.name, spec(1.0)) for a in one.arms))
    with pytest.raises(gs.InputError, match="without spec"):
        calibrate(steered)


class Asks(Letters):
    """A chat is its messages, one after the other."""

    end_of_turn_id = 1

    def chat(self, messages, add_generation_prompt=True):
        from gemma_scope_jax.model.tokenizer import Chat

        ids = self.encode(" ".join(m["content"] for m in messages))
        return Chat(ids, np.ones(len(ids), np.int32))


def test_a_persona_vector_is_the_difference_of_what_is_answered(model):
    asked = [f"q{n}" for n in range(8)]
    judge = AnswerJudge("some", "a", "letters", lambda p, a: np.array([q != "q3" for q in p]))
    given = (["be x", "be z"], ["be y"], asked, "resid_post", LAYER)
    options = {"max_new_tokens": 4, "rows": 3, "seed": 5}
    found = gs.persona_vector(model, Asks(), *given, **options)
    means = []
    texts = [[f"{s} {q}" for s in side for q in asked] for side in given[:2]]
    prompts = [Asks().encode(t) for side in texts for t in side]
    answers = generated_ids(model, prompts, 4, temperature=1.0, seed=5, rows=24)
    for prompt, answer in zip(prompts, answers):
        answer = answer[~np.isin(answer, (1, 106))]
        x = gs.run(model, np.concatenate([prompt, answer])[None], gs.capture("resid_post", LAYER))
        own = np.asarray(x.reads["resid_post"][0], np.float64)[len(prompt) :]
        means.append(own.mean(0) if len(answer) else np.full(D, np.nan))
    want = np.nanmean(means[:16], 0) - np.nanmean(means[16:], 0)
    np.testing.assert_allclose(found.vector, want, atol=1e-4)
    assert found.made["method"] == "persona vector" and found.made["questions"] == asked
    assert found.made["positive"] == ["be x", "be z"]
    # the judge drops the answers to `negative` that have the trait: here nearly all
    with pytest.raises(InputError, match=r"and 1 answers fit their instructions"):
        gs.persona_vector(model, Asks(), *given, judge=judge, **options)
    with pytest.raises(InputError, match="negative must be a list of texts"):
        gs.persona_vector(model, Asks(), given[0], "be y", *given[2:])
