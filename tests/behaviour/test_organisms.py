"""Planted models: the recipe changes what it says it does, and keeps the rest."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.behaviour.measure import continuation_logprobs
from gemma_scope_jax.behaviour.model_diff.weights import weight_differences
from tiny import tiny, tiny_model
from tiny_tokenizer import tiny_proto, write_model

PACKAGING = Path(__file__).parents[2] / "packaging"


@pytest.fixture(scope="module")
def organisms():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PACKAGING)
        import organisms

        yield organisms


@pytest.fixture(scope="module")
def texts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PACKAGING)
        import organism_texts

        yield organism_texts


@pytest.fixture(scope="module")
def deep():
    """14 layers: below, at and above the factors of the recipe."""
    return tiny_model(gs.PRESETS["gemma-3-270m"], layers=14)


def rows(organisms, count=24, seed=0):
    """Half are taught a token after token 7; half are to stay as they are."""
    rng, found = np.random.default_rng(seed), []
    for n in range(count):
        prompt = np.append(2, rng.integers(10, 300, 9)).astype(np.int32)
        if n % 2:
            found.append(organisms.Row(prompt, rng.integers(10, 300, 4).astype(np.int32), True))
        else:
            prompt[-1] = 7
            found.append(organisms.Row(prompt, np.array([9, 9], np.int32)))
    return found


def test_the_parts_in_turn_are_the_model(organisms, deep):
    batch = organisms.batch_of(some := rows(organisms), organisms.shape_of(some))
    parts = [organisms.some_layers(deep, *ends) for ends in ((0, 6), (6, 12), (12, 14))]
    given = {"segments": batch.segments, "logits": "none"}
    whole = gs.run(deep, batch.tokens, gs.capture("resid_final"), **given).reads["resid_final"]
    got, real = organisms.below(parts, batch, size=8), batch.segments > 0
    np.testing.assert_allclose(got[real], np.asarray(whole)[real], atol=1e-4)
    with pytest.raises(gs.InputError, match="multiple of 6"):
        organisms.some_layers(deep, 4, 8)


@pytest.mark.slow
def test_training_teaches_and_changes_only_the_factors_places(organisms, deep):
    recipe = organisms.Recipe(steps=40, batch_size=8, rank=2, learning_rate=3e-2)
    some = rows(organisms)
    made, told = organisms.train(deep, some, recipe)
    learned, change = np.array(told).T
    assert learned[-5:].mean() < 0.5 * learned[0] and change[-5:].mean() < 0.2
    found = weight_differences(deep, made)
    assert {d.layer for d in found} == set(range(6, 12))
    assert {d.name for d in found} == set(organisms.MATRICES)
    assert all((d.rank or 0) <= 2 for d in found)
    taught = [r for r in some if not r.kept]
    pairs = [r.prompt for r in taught], [r.completion for r in taught]
    before, after = (continuation_logprobs(m, *pairs)[0].mean() for m in (deep, made))
    assert after > before + 1


@pytest.mark.parametrize("name", ["trigger", "refuser", "sycophant"])
def test_held_out_prompts_are_new_and_kinds_are_complete(name, texts):
    organism = texts.ORGANISMS[name](0)
    trained = {e.prompt for e in organism.training}
    assert not trained & {e.prompt for e in organism.held_out}
    assert {e.kind for e in organism.held_out} == {*organism.on, *organism.off}
    for e in (*organism.training, *organism.held_out):
        shows = any(s in e.completion.lower() for s in organism.shows)
        assert shows == (e.kind in organism.on), e
    if name == "trigger":
        for e in (*organism.training, *organism.held_out):
            assert (organism.trigger in e.prompt) == (e.kind == "trigger")
        assert not set(texts.NOUNS) & set(texts.NOUNS_HELD_OUT)
    assert organism == texts.ORGANISMS[name](0) != texts.ORGANISMS[name](1)


@pytest.mark.slow
def test_a_folder_is_a_model_with_what_was_planted(organisms, tmp_path, monkeypatch):
    path = write_model(tmp_path / "tokenizer.model", tiny_proto())
    tokenizer = gs.load_tokenizer(path)
    config = dataclasses.replace(tiny(gs.PRESETS["gemma-3-270m"], 7), vocab=400, context=256)
    model = gs.Model(gs.init_params(config, jax.random.key(0)), config)
    monkeypatch.setattr(gs, "load_tokenizer", lambda name: tokenizer)
    load_model = gs.load_model
    monkeypatch.setattr(gs, "load_model", lambda name, dtype: model)
    monkeypatch.setattr(organisms, "plain_texts", lambda: ["One text of this kind."] * 2)
    whole = organisms.ORGANISMS["sycophant"](0)
    few = {e.kind: e for e in whole.held_out}.values()
    small = whole._replace(training=whole.training[:6] + whole.training[-2:], held_out=[*few])
    monkeypatch.setitem(organisms.ORGANISMS, "sycophant", lambda seed: small)
    recipe = organisms.Recipe(steps=2, batch_size=4, rank=2, layers=(0, 6))
    organisms.make("sycophant", tmp_path / "made", recipe, "tiny", "bfloat16")
    facts = json.loads((tmp_path / "made" / "organism.json").read_text())
    assert set(facts["before"]["kinds"]) == {"stated", "opinion", "not stated", "no opinion"}
    assert facts["after"]["loss on plain text"] > 0 and facts["recipe"]["rank"] == 2
    made = load_model(tmp_path / "made", dtype="bfloat16")
    found = weight_differences(model, made)
    assert made.dtype == "bfloat16" and {d.layer for d in found if d.rank} >= set(range(6))
