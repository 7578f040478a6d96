"""What an argument says is what happens, or one line says why not: tokens, layers, values."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from coders import random_coder
from gemma_scope_jax.model.arguments import check_finite
from tiny import tiny_model

D, F, T, LAYERS = 32, 40, 10, 3
IDS = np.random.default_rng(0).integers(2, 300, (2, T)).astype(np.int32)
VECTOR = np.full(D, 5, np.float32)


@pytest.fixture(scope="module")
def model():
    return tiny_model(gs.PRESETS["gemma-3-270m"], layers=LAYERS)


sparse = partial(random_coder, F, threshold=0.0)
several = partial(random_coder, F, layers=(0, 2), threshold=0.0)


def refused(build, message):
    with pytest.raises(gs.InputError, match=message) as raised:
        build()
    assert "\n" not in str(raised.value)


# -------------------------------------------------------------------------------------------------
# Positions


def acts(positions):
    return [
        gs.steer("embed", None, VECTOR, positions=positions),
        gs.patch("embed", None, VECTOR, positions=positions),
        gs.edit(sparse(), gs.clamp, 3, 9.0, positions=positions),
    ]


@pytest.mark.parametrize(
    "positions, message",
    [
        (-1, "position -1: positions count from <bos> = 0 to T - 1"),
        ([2, -2], "position -2"),
        (jnp.array([-1]), "position -1"),
        (2**31, "beyond every text"),
        ([3.7], r"must be ints, or a boolean mask, .* got float64\[1\]"),
        (np.float32(3), "must be ints"),
        (True, "must be ints"),
        ("3", "positions must be numbers"),
        ([None], "positions must be numbers"),
        ([[1, 2]], r"got int64\[1, 2\]"),
        (np.ones((2, T), bool), "got bool"),
    ],
)
def test_what_names_no_token_is_refused(positions, message):
    place = (
        partial(gs.steer, "embed", None, VECTOR),
        partial(gs.patch, "embed", None, VECTOR),
        partial(gs.edit, sparse(), gs.clamp, 3, 9.0),
    )
    for act in place:
        refused(partial(act, positions=positions), message)


def test_a_mask_means_the_positions_where_it_is_true(model):
    mask = np.arange(T) >= 7
    place = lambda positions: [
        gs.steer("embed", None, VECTOR, positions=positions),
        gs.edit(sparse(), gs.clamp, 3, 9.0, positions=positions),
    ]
    by_mask, by_list = (gs.run(model, IDS, place(p)).logits for p in (mask, [7, 8, 9]))
    np.testing.assert_array_equal(by_mask, by_list)
    assert (np.asarray(by_mask) != gs.run(model, IDS, place([])).logits)[:, 7:].any()


def test_positions_out_of_the_text_are_refused(model):
    for positions in (T, [0, T], np.arange(T + 1) == T):
        for act in acts(positions):
            message = f"position {T}: .* positions 0 to {T - 1}"
            refused(partial(gs.run, model, IDS, [act]), message)
    short = acts(np.ones(4, bool))[0]
    refused(lambda: gs.run(model, IDS, [short]), f"a mask of 4 positions for a text of {T}")
    refused(lambda: gs.generate(model, IDS, 2, [short]), "a mask of 4 positions for a text")
    beyond = gs.steer("embed", None, VECTOR, positions=T + 2)
    refused(lambda: gs.generate(model, IDS, 2, [beyond]), f"position {T + 2}: .* 0 to {T + 1}")
    # in a text that goes on elsewhere any position may be meant
    cache = gs.init_cache(model.config, 2, 2 * T, model.dtype)
    run = lambda **options: gs.run(model, IDS, acts(T)[:1], stop_at_layer=0, **options)
    run(cache=cache), run(positions=np.tile(np.arange(T) + 5, (2, 1)))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(positions=np.tile(np.arange(T) - 1, (2, 1))), "must not be negative, got -1"),
        (dict(positions=np.tile(np.arange(T) + 60, (2, 1))), "position 69 is beyond .* of 64"),
        (dict(positions=np.full((2, T), 2**40)), "beyond 32 bits"),
        (dict(positions=np.arange(T)), r"positions must be integers \[2, 10\], got int32\[10\]"),
        (dict(segments=np.full((2, T), -1)), "segments must not be negative"),
        (dict(segments=np.ones((2, T), bool)), "segments must be integers .* got bool"),
        (dict(segments=[[1], [1, 2]]), "segments must be .* pad rows of unequal lengths"),
        (dict(stop_at_layer=1.0), "stop_at_layer must be a whole number"),
        (dict(stop_at_layer=True), "stop_at_layer must be a whole number"),
        (dict(logits="some"), "logits must be one of all, last, none, not 'some'"),
        (dict(remat=("mlp_atc",)), "remat: unknown site 'mlp_atc'"),
    ],
)
def test_options_that_name_nothing_are_refused(model, options, message):
    refused(lambda: gs.run(model, IDS, **options), message)


def test_ids_on_a_device_that_are_no_tokens_give_nan(model):
    """Not another token's logits; the other row has its own."""
    ids = IDS.copy()
    right = np.asarray(gs.run(model, IDS).logits)
    for bad in (300, -1):
        ids[1, 4] = bad
        got = np.asarray(gs.run(model, jnp.asarray(ids)).logits)
        assert np.isnan(got[1]).all()
        np.testing.assert_allclose(got[0], right[0], atol=1e-5)


# -------------------------------------------------------------------------------------------------
# Layers, features, values


FAULTS = {
    "layer": (lambda: gs.capture("z", True), "must be None, an int or several ints"),
    "name": (lambda: gs.capture("z", 1, name=3), "name must be text"),
    "first": (lambda: gs.steer("z", 1, 1.0, first=1.5), "first must be a whole number"),
    "negative first": (lambda: gs.splice(sparse(), first=-1), "first must be at least 0"),
    "k": (lambda: gs.features(sparse(), k=2.0), "k must be a whole number"),
    "nan": (lambda: gs.steer("z", 1, np.float32("nan")), "the value of steer holds NaN"),
    "inf": (lambda: gs.patch("z", 1, [1.0, float("inf")]), "the value of patch holds inf"),
    "large": (lambda: gs.patch("z", 1, 1e39), "holds 1e.39, which overflows float32"),
    "words": (lambda: gs.steer("z", 1, "much"), "the value of steer must be numbers"),
    "clamp nan": (lambda: gs.edit(sparse(), gs.clamp, 3, float("nan")), "value of clamp holds NaN"),
    "clamp large": (lambda: gs.edit(sparse(), gs.clamp, 3, 1e39), "overflows float32"),
    "clamp nothing": (lambda: gs.edit(sparse(), gs.clamp), "clamp needs a feature"),
    "no feature": (lambda: gs.edit(sparse(), gs.clamp, True, 1.0), "feature True is not an id"),
    "axes": (lambda: gs.edit(sparse(), gs.clamp, [[1, 2]], 1.0), r"ids \[n\], not \[1, 2\]"),
    "twice": (lambda: gs.edit(sparse(), gs.clamp, [1, 1], [0.0, 1.0]), "feature 1 is named twice"),
    "no layer": (lambda: gs.edit(several(), gs.clamp, 3, 1.0, 1), r"layer 1 is not among .*0, 2"),
    "layers": (lambda: gs.edit(several(), gs.clamp, [3, 4, 5], 1.0, [0, 2]), "2 layers for 3"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_arguments_that_mean_nothing_are_refused_when_they_are_given(case):
    refused(*FAULTS[case])


UNFIT = {
    "width": (lambda: gs.steer("embed", None, VECTOR[1:]), r"shape \[31\] does not fit .* 32"),
    "rank": (lambda: gs.patch("embed", None, np.ones((1, 2, T, D))), "does not fit"),
    "values": (lambda: gs.edit(sparse(), gs.clamp, [1, 2], np.ones(3)), r"\[3\] for 2 features"),
    "per layer": (
        lambda: gs.steer("z", (0, 2), gs.per_layer(np.ones((3, 64)))),
        r"per_layer at 'z' needs a first axis of 2 layers, got \[3, 64\]",
    ),
    "per layer outside": (
        lambda: gs.steer("embed", None, gs.per_layer(np.ones((3, D)))),
        "first axis of 0 layers",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_arguments_that_do_not_fit_the_pass_are_refused(model, case):
    build, message = UNFIT[case]
    refused(lambda: jax.eval_shape(lambda: gs.forward(model, jnp.asarray(IDS), [build()])), message)


def test_numbers_must_be_finite_in_the_dtype_that_runs(model):
    half = tiny_model(model.config, dtype=jnp.float16, layers=LAYERS)
    message = "at 'embed' holds 7e.04, which overflows float16"
    for large in (act("embed", None, np.float32(7e4)) for act in (gs.steer, gs.patch)):
        refused(partial(gs.run, half, IDS, [large]), message)
        refused(partial(gs.generate, half, IDS, 2, [large]), message)
    layers = gs.per_layer(np.full((LAYERS, 1), 7e4))
    refused(lambda: gs.run(half, IDS, [gs.steer("resid_post", None, layers)]), "overflows float16")
    check_finite("x", np.float32(7e4), jnp.bfloat16)
    refused(lambda: check_finite("x", np.float32(3.4e38), jnp.bfloat16), "overflows bfloat16")
    ban = np.where(np.arange(300) == 7, -np.inf, 0).astype(np.float32)  # logits may be infinite
    out = gs.run(half, IDS, [gs.steer("logits", None, ban, first=0)]).logits
    assert np.isneginf(out[..., 7]).all() and np.isfinite(np.delete(out, 7, -1)).all()


def test_an_id_may_be_clamped_in_several_layers():
    """The same feature at two layers, to two values: neither undoes the other."""
    f = jnp.ones((1, 2, F))
    context = dataclasses.make_dataclass("Context", ["layer"])
    for layer, value in ((0, 5.0), (2, 6.0), (1, 1.0)):
        got = gs.clamp(f, context(layer), [7, 7], np.array([5.0, 6.0]), np.array([0, 2]))
        assert (np.asarray(got[..., 7]) == value).all() and float(got.sum()) == 78 + 2 * value
    gs.edit(several(), gs.clamp, [7, 7], [5.0, 6.0], [0, 2])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=1e-40), "temperature must be 0 .greedy. or 1.18e-38"),
        (dict(temperature=-1.0), "temperature must be 0"),
        (dict(top_k=0), "top_k must be at least 1"),
        (dict(top_k=2.0), "top_k must be a whole number"),
        (dict(key=True), "key must be one jax.random.key or an int seed"),
    ],
)
def test_settings_of_sampling_that_do_not_compute_are_refused(model, options, message):
    refused(lambda: gs.generate(model, IDS, 2, **options), message)


def test_the_smallest_temperature_and_nucleus_are_greedy(model):
    greedy = gs.generate(model, IDS, 2, stop_tokens=()).tokens
    cold = gs.generate(model, IDS, 2, temperature=2e-38, top_p=1e-50, stop_tokens=()).tokens
    np.testing.assert_array_equal(cold, greedy)
    refused(lambda: gs.generate(model, IDS, True), "max_new_tokens must be a whole number")


def test_padding_stands_at_any_position(model):
    """As `mask.cumsum(1) - 1` has it, which is -1 left of a text."""
    segments = np.ones(IDS.shape, np.int32)
    segments[:, :3] = 0
    positions = segments.cumsum(1) - 1
    got = gs.run(model, IDS, segments=segments, positions=positions).logits
    want = gs.run(model, IDS, segments=segments).logits
    np.testing.assert_array_equal(np.asarray(got)[:, 3:], np.asarray(want)[:, 3:])
    refused(lambda: gs.run(model, IDS, positions=positions), "positions must not be negative")
