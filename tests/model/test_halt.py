"""A read stops a row: exactly where a plain forward pass over the text says so."""

import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from tiny import tiny_model

PROMPTS = [[2, 17, 250, 9, 31, 77, 140, 5, 60, 61], [2, 44, 7], [2, 90, 91, 8, 205]]
NEW = 14


@pytest.fixture(scope="module", params=["gemma-3-270m", "gemma-3-4b"])
def small(request):
    return tiny_model(gs.PRESETS[request.param], layers=3, seed=7)


def above(x, ctx, w, threshold):
    return (jnp.einsum("btd,d->bt", x, w) > threshold) & ctx.valid


def alarm(threshold, seed=0, layer=1):
    w = np.random.default_rng(seed).standard_normal(32).astype(np.float32)
    return gs.read("resid_post", layer, above, w, np.float32(threshold), name="alarm")


def along(x, ctx, w):
    return jnp.einsum("btd,d->bt", x, w)


def recomputed(model, generation, seed=0):
    """The score in one plain pass a row, float [T] each."""
    w = np.random.default_rng(seed).standard_normal(32).astype(np.float32)
    item = gs.read("resid_post", 1, along, w, name="score")
    return [
        np.asarray(gs.run(model, row[None], item).reads["score"])[0] for row in generation.sequences
    ]


@pytest.mark.law
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_a_row_ends_where_a_teacher_forced_run_says(small, share):
    free = gs.generate(small, PROMPTS, NEW, alarm(1e9), stop_tokens=())
    scores = recomputed(small, free)
    new = [s[start:] for s, start in zip(scores, free.prompt_lengths)]
    values = np.sort(np.concatenate(new))
    at = int(share * len(values))
    threshold = float(values[at - 1 : at + 1].mean())
    wanted = [int(np.argmax(s > threshold)) + 1 if (s > threshold).any() else NEW for s in new]
    assert min(wanted) < NEW
    halted = gs.generate(small, PROMPTS, NEW, alarm(threshold), halt="alarm", stop_tokens=())
    np.testing.assert_array_equal(halted.lengths, wanted)
    for n, end in enumerate(wanted):
        np.testing.assert_array_equal(halted.tokens[n, :end], free.tokens[n, :end])
        assert not np.any(halted.tokens[n, end:])
        length, fires = len(PROMPTS[n]) + end, np.asarray(halted.reads["alarm"])[n]
        np.testing.assert_array_equal(fires[:length], scores[n][:length] > threshold)
        assert not fires[length:].any()


def test_prompts_do_not_count_and_stop_tokens_still_stop(small):
    always = gs.generate(small, PROMPTS, NEW, alarm(-1e9), halt="alarm", stop_tokens=())
    assert always.lengths.tolist() == [1, 1, 1]
    free = gs.generate(small, PROMPTS, NEW, stop_tokens=())
    stop = int(free.tokens[0, 3])
    both = gs.generate(small, PROMPTS, NEW, alarm(1e9), halt="alarm", stop_tokens=(stop,))
    assert both.lengths[0] == free.tokens[0].tolist().index(stop) + 1


def test_another_threshold_compiles_nothing(compiled):
    model = tiny_model(gs.PRESETS["gemma-3-270m"], layers=3)
    go = lambda t, layer, seed: gs.generate(model, PROMPTS, 5, alarm(t, seed, layer), halt="alarm")
    go(1.0, 1, 0)
    before = len(compiled)
    assert before
    go(3.0, 2, 1)
    assert len(compiled) == before


def score(x, ctx):
    return x[..., 0]


@pytest.mark.parametrize(
    "items, message",
    [
        ([], "halt is 'alarm', but the reads are none"),
        ([gs.read("resid_post", 1, score, name="score")], "the reads are score"),
        ([gs.read("resid_post", 1, score, name="alarm")], "is float32[3, 1] for 3 x 1 tokens"),
        (
            [gs.read("resid_post", None, above, np.ones(32, "f4"), 0.0, name="alarm")],
            "bool[3, 3, 1]",
        ),
    ],
)
def test_what_is_no_alarm_is_one_line(items, message):
    model = tiny_model(gs.PRESETS["gemma-3-270m"], layers=3)
    with pytest.raises(gs.InputError) as error:
        gs.generate(model, PROMPTS, 5, items, halt="alarm")
    assert message in str(error.value) and "\n" not in str(error.value)
