"""Planted differences are found, on texts that had no say; what is not there raises no alarm."""

import dataclasses
import json

import numpy as np
import pytest

import gemma_scope_jax as gs
from coders import random_coder
from gemma_scope_jax.behaviour.contrasts.arms import Arms, arms, role_arms
from gemma_scope_jax.behaviour.contrasts.contrast import contrast
from gemma_scope_jax.behaviour.contrasts.structural import structural_features
from gemma_scope_jax.data.ranks import auc
from gemma_scope_jax.errors import InputError
from planted_behaviour import (
    CAUSE,
    FORMAT,
    SIGN,
    behaviour_arms,
    behaviour_coder,
    behaviour_model,
    paired_arms,
    texts,
)


@pytest.fixture(scope="module")
def planted():
    model = behaviour_model()
    return model, behaviour_coder(model)


@pytest.fixture(scope="module")
def found(planted):
    """With texts from elsewhere, where C no longer accompanies A."""
    rng = np.random.default_rng(9)
    elsewhere = Arms(texts(rng, 30, 0.9, sign=0.5), texts(rng, 30, 0.1, sign=0.5))
    return contrast(*planted, behaviour_arms(name="planted"), elsewhere=elsewhere, k=2)


def test_planted_features_rank_first(found):
    assert sorted(found.features(2)) == [CAUSE, SIGN] == sorted(found.chosen)
    assert found.alarm and found.family_p == pytest.approx(1 / 1001)
    for row in found.rows[:2]:
        assert row.effect > 1 and row.q < 0.05 and row.auc > 0.75 and row.stability == 1.0
        assert row.mean_a > row.mean_b and row.fires_a > row.fires_b
    assert found.counts == {"discovery": (15, 15), "reported": (15, 15), "elsewhere": (30, 30)}


def test_a_mere_sign_fails_elsewhere_and_the_cause_does_not(found):
    far = {row.feature: row.elsewhere for row in found.rows}
    assert far[CAUSE] > 0.8 and far[SIGN] < 0.7
    assert found.aucs["raw probe"].value > 0.75
    assert set(found.aucs) == set(found.elsewhere)


def test_random_features_and_early_layers_tell_nothing(planted, found):
    near = found.aucs["2 random features"]
    assert 0.3 < near.value < 0.7 and near.low < 0.6 and near.n == 20
    other = contrast(*planted, behaviour_arms(), other_layer=0)
    assert "raw probe, layer 0" in other.aucs and other.elsewhere is None


def test_figures_are_those_of_the_texts_alone(planted):
    """Everything again, a text at a time."""
    model, coder = planted
    pairs, held_out = paired_arms(1), paired_arms(2, 20)
    found = contrast(model, coder, pairs, held_out=held_out)
    alone = lambda ids: np.asarray(
        gs.run(model, ids[None], [gs.features(coder)]).reads["features"]
    )[0, 1:].mean(0, dtype=np.float64)
    a, b = (np.array([alone(x) for x in some]) for some in (held_out.a, held_out.b))
    assert found.counts == {"discovery": (30, 30), "reported": (20, 20)}
    for row in found.rows[:6]:
        mine, other = a[:, row.feature], b[:, row.feature]
        difference = mine - other
        spread = difference.std(ddof=1)
        assert row.mean_a == pytest.approx(mine.mean(), abs=1e-4)
        assert row.mean_b == pytest.approx(other.mean(), abs=1e-4)
        if spread > 1e-3 * abs(difference.mean()):  # else bounded
            assert row.effect == pytest.approx(difference.mean() / spread, rel=1e-2, abs=1e-4)
        y = np.arange(40) < 20
        area = auc(y, np.round(np.append(mine, other), 5))
        assert row.auc == pytest.approx(max(area, 1 - area), abs=0.02)


@pytest.mark.parametrize("how", ["mean", "max", "last"])
def test_without_a_difference_there_is_no_alarm(planted, how):
    """Both arms are drawn alike; `found` would alarm."""
    rng = np.random.default_rng(4)
    same = Arms(texts(rng, 30, 0.5), texts(rng, 30, 0.5))
    found = contrast(*planted, same, how=how)
    assert not found.alarm and "No feature tells" in found.verdict()
    assert found.below == 0


def test_the_alarm_is_raised_by_chance_in_five_of_a_hundred(planted):
    """The 60 texts dealt to arms 100 times; pooled once, as `contrast` does."""
    from gemma_scope_jax.behaviour.contrasts.arms import pool_arms
    from gemma_scope_jax.behaviour.contrasts.ranking import tests_of

    model, coder = planted
    rng = np.random.default_rng(5)
    one = Arms(texts(rng, 30, 0.5), texts(rng, 30, 0.5))
    pooled = pool_arms((model, model), coder, [one], "mean", [("resid_post", 2)])[0]
    alarms = 0
    for seed in range(100):
        dealt = dataclasses.replace(pooled, values=pooled.values[rng.permutation(60)])
        alarms += tests_of(dealt, 199, seed).family_p < 0.05
    assert alarms <= 12


def test_features_of_the_format_are_flagged_and_left_out(planted):
    """Arm b is longer, so the mean of a feature on the first token differs; so does the share of
    the template."""
    rng = np.random.default_rng(6)
    short = lambda: [ids[:6] for ids in texts(rng, 30, 0.5)]
    both = Arms(short(), texts(rng, 30, 0.5))
    found = contrast(*planted, both, k=1)
    first = found.rows[0]
    assert first.feature == FORMAT and first.structural and first.effect > 1
    assert FORMAT not in found.chosen and FORMAT not in found.features() and not found.alarm
    assert "structural" in str(found) and found.features(1, structural=True) == [FORMAT]
    kept = contrast(*planted, both, k=1, structural=True)
    assert kept.chosen == (FORMAT,) and kept.alarm


def test_a_feature_on_template_tokens_is_structural_wherever_they_are(planted):
    """FORMAT's token moved about: only the template's mask tells."""
    rng = np.random.default_rng(7)
    moved, masks = [], []
    for ids in texts(rng, 20):
        at = int(rng.integers(1, len(ids)))
        ids[[1, at]] = ids[[at, 1]]
        moved.append(ids)
        masks.append(np.arange(len(ids)) == at)
    some = [FORMAT, 5]
    plain = structural_features(*planted, Arms(moved[:10], moved[10:]), some)
    masked = Arms(moved[:10], moved[10:], template_a=masks[:10], template_b=masks[10:])
    marked = structural_features(*planted, masked, some)
    assert plain.flagged.tolist() == [False, False] and plain.fires[0] == 1
    assert marked.flagged.tolist() == [True, False] and marked.template[0] == pytest.approx(1)


def test_features_that_compete_are_read_as_the_coder_has_them(planted):
    """TopK: a feature's activation depends on all others."""
    model, coder = planted
    both = behaviour_arms(2)
    few = coder.replace(k=2, threshold=coder.threshold * 0)
    plain = structural_features(model, coder, both, [FORMAT, CAUSE])
    found = structural_features(model, few, both, [FORMAT, CAUSE])
    assert plain.fires[0] == 1 and plain.place[0] == 1
    alone = [np.asarray(gs.run(model, x[None], [gs.features(few)]).reads["features"])[0]
             for x in both.a]  # fmt: skip
    fires = np.mean([f[:, [FORMAT, CAUSE]].any(0) for f in alone], 0)
    assert (found.fires <= fires + 1e-9).all()


def test_two_models_on_the_same_texts(planted):
    """Of the second, A says nothing: its message is what differs."""
    model, coder = planted
    quiet = model.params.embed.at[40, 1].set(0.0)
    other = model.replace(params=model.params.replace(embed=quiet))
    rng = np.random.default_rng(8)
    some = texts(rng, 24, 0.9, sign=0.5)
    both = Arms(some, some, paired=True)
    found = contrast(model, coder, both, model_b=other)
    assert found.alarm and found.features(1) == [CAUSE]
    assert [row.feature for row in found.rows] == [CAUSE]  # in nothing else
    with pytest.raises(InputError, match="the same texts, paired"):
        contrast(model, coder, paired_arms(), model_b=other)


def test_a_model_beside_itself_differs_in_nothing(planted):
    model, coder = planted
    some = texts(np.random.default_rng(3), 12, 0.5)
    found = contrast(model, coder, Arms(some, some, paired=True), model_b=model.replace())
    assert (found.family_p, found.below, found.rows, found.chosen) == (1.0, 0, (), ())
    assert found.aucs["raw probe"].value == 0.5 and "no feature differs" in repr(found)
    assert json.dumps(found.as_dict()) and "best feature" not in str(found)


def test_what_it_returns_is_json_and_one_line(found):
    content = json.loads(json.dumps(found.as_dict()))
    assert content["alarm"] is True and content["features"][0]["feature"] in (CAUSE, SIGN)
    assert content["aucs"]["raw probe"].keys() == {"value", "low", "high", "n"}
    assert "\n" not in repr(found) and "planted" in repr(found)
    for rows in found.tables().values():
        assert len({len(row) for row in rows}) == 1
    assert "none given" not in str(found)
    named = found.tables(2, {CAUSE: "the message"})["Features"]
    assert [row[-1] for row in named if row[0] == CAUSE] == ["the message"] and len(named) == 3


def test_texts_from_elsewhere_are_missed_in_print(planted):
    said = str(contrast(*planted, paired_arms()))
    assert "none given" in said and "nothing is known of texts from elsewhere" in said


def test_halves_keep_pairs_together_and_repeats_on_one_side():
    pairs = paired_arms(3, 20)
    double = pairs.some([*range(20), *range(20)], [*range(20), *range(20)])
    one, two = double.halves(0)
    keys = lambda some: {(x.tobytes(), y.tobytes()) for x, y in zip(some.a, some.b)}
    assert not keys(one) & keys(two) and len(one.a) == len(two.a) == 20
    assert keys(one) | keys(two) == keys(pairs)
    free = Arms(double.a, double.b).halves(1)
    assert not {x.tobytes() for x in free[0].a} & {x.tobytes() for x in free[1].a}


class Chatty:
    """A tokenizer whose every turn is a template token, the words, and a template token."""

    end_of_turn_id = 9

    def encode(self, text):
        return np.array([2, *map(len, text.split())], np.int32)

    def chat(self, messages, add_generation_prompt=True):
        from gemma_scope_jax.model.tokenizer import Chat

        ids, roles = [2], [0]
        for message in messages:
            said = [len(w) for w in message["content"].split()]
            ids += [8, *said, 9]
            roles += [0, *(1 for _ in said), 0]
        more = [8] * add_generation_prompt
        return Chat(np.array(ids + more, np.int32), np.array(roles + [0] * len(more), np.int32))


def test_arms_of_texts_and_chats_know_their_template():
    ask = lambda said: [{"role": "user", "content": said}]
    made = arms(Chatty(), [ask("a bb ccc")] * 5, ["a bb"] * 5, paired=False, name="both")
    assert made.a[0].tolist() == [2, 8, 1, 2, 3, 9, 8]
    assert made.template_a[0].tolist() == [True, True, False, False, False, True, True]
    assert made.template_b is None and made.b[0].tolist() == [2, 1, 2]
    assert repr(made) == "Arms(both, 5 and 5 texts)"
    begun = [*ask("a"), {"role": "model", "content": "bb"}]
    made = arms(Chatty(), [begun] * 5, [[2, 3]] * 5, paired=True)
    assert made.a[0].tolist() == [2, 8, 1, 9, 8, 2] and len(made.template_a[0]) == 6


def test_roles_of_a_chat_are_read_at_their_own_tokens(planted):
    model, coder = planted
    rng = np.random.default_rng(4)

    class Turns(Chatty):
        """A turn is its role's number, the words as letters, and a mark."""

        def chat(self, messages, add_generation_prompt=True):
            from gemma_scope_jax.model.tokenizer import SPAN_ROLES, Chat

            ids, roles = [2], [SPAN_ROLES.index("turn")]
            for message in messages:
                said = [ord(c) - 60 for c in message["content"]]
                ids += [8, *said, 9]
                turn, own = (SPAN_ROLES.index(r) for r in ("turn", message["role"]))
                roles += [turn, *[own] * len(said), turn]
            return Chat(np.array(ids, np.int32), np.array(roles, np.int32))

    word = lambda: "".join(chr(c) for c in rng.integers(97, 122, rng.integers(2, 5)))
    chats = [[{"role": r, "content": word()} for r in ("user", "model")] for _ in range(24)]
    made = role_arms(Turns(), chats, "user", "model")
    assert made.paired and made.name == "user and model"
    found = contrast(model, coder, made.some(range(12), range(12)),
                     held_out=made.some(range(12, 24), range(12, 24)))  # fmt: skip
    f = lambda ids: np.asarray(
        gs.run(model, ids[None], [gs.features(coder)]).reads["features"][0], np.float64
    )
    for row in found.rows[:4]:
        means = [[f(ids)[mask, row.feature].mean() for ids, mask in zip(made.a[12:], some[12:])]
                 for some in (made.where_a, made.where_b)]  # fmt: skip
        assert [row.mean_a, row.mean_b] == pytest.approx(np.mean(means, 1), abs=1e-5)
    with pytest.raises(InputError, match="chat 0 has no message of the role 'system'"):
        role_arms(Turns(), chats, "user", "system")


@pytest.mark.parametrize("paired", [True, False])
def test_texts_of_one_unit_are_one_observation(planted, paired):
    """Each text thrice: as units the tests are those of the texts once, and halves part units."""
    one = paired_arms(5, 20) if paired else behaviour_arms(5, 20)
    many = [i for i in range(20) for _ in range(3)]
    names = [f"{arm} {i:02}" for arm in "ab" for i in range(20)]
    unit_a, unit_b = (names[:20], names[:20]) if paired else (names[:20], names[20:])
    named = dataclasses.replace(one, unit_a=unit_a, unit_b=unit_b)
    thrice = named.some(many, many)
    figures = []
    for some in (one, thrice):
        found = contrast(*planted, some, held_out=some)
        rows = {r.feature: (r.effect, r.p, r.q, r.stability) for r in found.rows}
        figures.append((found.family_p, found.below, rows))
    assert figures[0][:2] == figures[1][:2]
    for feature, values in figures[0][2].items():
        assert figures[1][2][feature] == pytest.approx(values, rel=1e-6, abs=1e-12)
    plain = dataclasses.replace(thrice, unit_a=None, unit_b=None)
    assert contrast(*planted, plain, held_out=plain).rows[-1].p < found.rows[-1].p
    first, second = thrice.halves(1)
    units = lambda some: {*some.unit_a, *some.unit_b}
    assert not units(first) & units(second) and units(first) | units(second) == {*unit_a, *unit_b}
    wide, narrow = (contrast(*planted, some, held_out=some).aucs["raw probe"]
                    for some in (thrice, plain))  # fmt: skip
    assert wide.high - wide.low >= narrow.high - narrow.low


FEW = [np.array([2, 5], np.int32)] * 4

LONG = Arms([np.full(5 + n, 5) for n in range(12)], [np.full(70 - n, 5) for n in range(12)])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, c: Arms(FEW, FEW), "4 texts in arm a: give at least 5"),
        (lambda m, c: Arms(FEW * 2, FEW * 3, paired=True), "8 and 12 texts are not pairs"),
        (lambda m, c: Arms([*FEW, FEW[0][:0]], FEW * 2), "text 4 of arm a is empty"),
        (lambda m, c: Arms(FEW * 2, FEW * 2, template_a=[np.ones(3)] * 8), "does not fit"),
        (lambda m, c: Arms(FEW * 2, FEW * 2, where_b=[np.ones(3, bool)] * 8), "choice of tokens"),
        (lambda m, c: Arms(FEW * 2, FEW * 2, unit_a=["u"] * 8), "for both arms or none"),
        (lambda m, c: Arms(FEW * 2, FEW * 2, unit_a=["u"] * 7, unit_b=["u"] * 8), "7 units for 8"),
        (
            lambda m, c: Arms(FEW * 2, FEW * 2, True, unit_a=["u"] * 8, unit_b=["v"] * 8),
            "of a pair are of one unit",
        ),
        (lambda m, c: arms(Chatty(), "text", "text", paired=True), "must be a list of texts"),
        (lambda m, c: arms(Chatty(), [3.5] * 5, ["a"] * 5, paired=True), "text 0 of arm a is"),
        (lambda m, c: contrast(m, c, Arms(FEW * 2, FEW * 2)), "a half needs 5 texts"),
        (lambda m, c: contrast(m, c, paired_arms(), how="min"), "known are mean, last, max"),
        (lambda m, c: contrast(m, c, paired_arms(), k=0), "k must be at least 1"),
        (lambda m, c: contrast(m, c, paired_arms(), other_layer=2), "not the coder's, 2"),
        (lambda m, c: contrast(m, c, paired_arms(), other_layer=9), "from 0 to 3"),
        (lambda m, c: contrast(m, random_coder(layers=(0, 1)), paired_arms()), "of one layer"),
        (lambda m, c: contrast(m, c, LONG), "text 0 of arm b has 70 tokens; the model's context"),
        (lambda m, c: contrast(m, random_coder(layer=7), paired_arms()), "layers 0 to 3"),
        (
            lambda m, c: contrast(m, c.replace(threshold=c.threshold + 1e9), paired_arms()),
            "no feature of the coder is active",
        ),
    ],
)
def test_bad_input_is_refused(planted, call, said):
    with pytest.raises(InputError) as error:
        call(*planted)
    assert said in str(error.value) and "\n" not in str(error.value)
