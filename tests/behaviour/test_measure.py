"""Log-probabilities of continuations against a plain, unbatched pass in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import gemma_scope_jax as gs
from gemma_scope_jax.behaviour import measure
from gemma_scope_jax.behaviour.measure import continuation_logprobs, generated, text_loss
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model import run as run_module
from letters import Letters

LENGTHS = [(1, 1), (5, 3), (30, 1), (7, 0), (12, 20), (40, 15), (3, 4), (5, 3), (31, 1)]


class Readable(Letters):
    def decode(self, ids):
        return "".join(self.decode_tokens(ids))


def drawn(seed=0, lengths=LENGTHS):
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(3, 300, n).astype(np.int32)
    heads = [np.append(2, ids(n - 1)).astype(np.int32) for n, _ in lengths]
    return heads, [ids(m) for _, m in lengths]


def plainly(model, prompt, continuation, intercepts=()):
    """One item alone: all logits, float64."""
    ids = np.concatenate([prompt, continuation]).astype(np.int32)
    logits = np.asarray(gs.run(model, ids[None], intercepts).logits[0], np.float64)
    log_p = log_softmax(logits, -1)
    return sum(log_p[len(prompt) + i - 1, token] for i, token in enumerate(continuation))


def steered(model, seed=1):
    vector = np.random.default_rng(seed).standard_normal(model.config.d_model).astype(np.float32)
    return [gs.steer("resid_post", 1, vector)]


@pytest.mark.parametrize("tokens", [70, 2048])
@pytest.mark.parametrize("changed", [False, True])
def test_log_probabilities_are_those_of_each_item_alone(model, tokens, changed):
    heads, tails = drawn()
    intercepts = steered(model) if changed else ()
    sums, counts = continuation_logprobs(model, heads, tails, intercepts, tokens=tokens)
    expected = [plainly(model, *pair, intercepts) for pair in zip(heads, tails)]
    np.testing.assert_allclose(sums, expected, atol=1e-4)
    assert counts.tolist() == [m for _, m in LENGTHS]
    assert sums.dtype == np.float64 and sums[3] == 0.0


@pytest.mark.parametrize("tokens", [70, 2048])
@pytest.mark.parametrize("changed", ["", "steered", "spec"])
def test_continuations_of_one_prompt_go_on_from_it(model, monkeypatch, tokens, changed):
    """Prompts of several lengths, with one to five continuations of 0 to 9 tokens each."""
    rng = np.random.default_rng(8)
    lengths = [(n, int(rng.integers(0, 10))) for n in (33, 12, 40, 9) for _ in range(n % 5 + 1)]
    lengths += [(58, 6), (58, 3), (58, 6)]  # up to the end of the context
    heads, tails = drawn(7, lengths)
    heads = [next(h for h in heads if len(h) == len(head)) for head in heads]
    order = rng.permutation(len(heads))
    heads, tails = [heads[i] for i in order], [tails[i] for i in order]
    vector = np.random.default_rng(1).normal(size=model.config.d_model).tolist()
    step = {"op": "add", "strength": 2.0, "vector": vector, "layer": 1, "where": {"from": 3}}
    when = {"vector": vector, "site": "resid_post", "layer": 0, "above": 0.0}
    spec = gs.steering(model, gs.steer_spec([{**step, "when": when}]))
    intercepts = {"": (), "steered": steered(model), "spec": spec}[changed]
    monkeypatch.setattr(measure, "_whole_items", None)
    sums, counts = continuation_logprobs(model, heads, tails, intercepts, tokens=tokens)
    expected = [plainly(model, *pair, intercepts) for pair in zip(heads, tails)]
    np.testing.assert_allclose(sums, expected, atol=1e-4)
    assert counts.tolist() == [len(t) for t in tails]


def test_single_tokens_need_the_prompts_alone(model, monkeypatch):
    heads, _ = drawn(9, [(20, 0), (25, 0), (11, 0)])
    heads, tails = [h for h in heads for _ in range(4)], [np.array([5 + n % 4]) for n in range(12)]
    runs, real = [], measure.run
    monkeypatch.setattr(measure, "run", lambda *a, **k: runs.append(a) or real(*a, **k))
    sums, _ = continuation_logprobs(model, heads, tails)
    assert len(runs) == 1
    np.testing.assert_allclose(
        sums, [plainly(model, *pair) for pair in zip(heads, tails)], atol=1e-4
    )


def test_many_wanted_tokens_take_several_chunks(model):
    heads, tails = drawn(2, [(1, 50)] * 7)  # 350 tokens, more than two chunks
    sums, _ = continuation_logprobs(model, heads, tails)
    np.testing.assert_allclose(sums, [plainly(model, *p) for p in zip(heads, tails)], atol=1e-3)


def test_a_mesh_gives_what_one_device_gives(model):
    heads, tails = drawn()
    alone, _ = continuation_logprobs(model, heads, tails, steered(model))
    mesh = gs.make_mesh(4, 2)
    spread = model.replace(
        params=jax.device_put(model.params, gs.param_shardings(model.config, mesh))
    )
    found, _ = continuation_logprobs(spread, heads, tails, steered(model))
    np.testing.assert_allclose(found, alone, atol=1e-4)


def test_the_loss_of_a_text_is_the_mean_over_its_tokens(model):
    heads, tails = drawn(3, [(1, 9), (1, 33)])
    texts = [np.concatenate(pair) for pair in zip(heads, tails)]
    expected = [-plainly(model, h, t) / len(t) for h, t in zip(heads, tails)]
    np.testing.assert_allclose(text_loss(model, texts), expected, atol=1e-4)


def test_new_items_and_vectors_compile_nothing(model):
    programs = lambda: (measure._log_p._cache_size(), run_module._run._cache_size())
    continuation_logprobs(model, *drawn(4), steered(model, 4))
    before = programs()
    continuation_logprobs(model, *drawn(5), steered(model, 5))
    assert programs() == before


def test_answers_are_those_of_each_prompt_alone(model):
    letters, (prompts, _) = Readable(), drawn(6, [(4, 0), (19, 0), (2, 0)])
    seen = []
    found = generated(model, letters, prompts, 4, rows=2, report=lambda *at: seen.append(at))
    for prompt, text in zip(prompts, found):
        out = gs.generate(model, [prompt] * 2, 4)
        assert text == letters.decode(np.asarray(out.tokens)[0, : int(out.lengths[0])])
    assert seen == [(2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("heads", "tails", "says"),
    [
        ([[2]], [], "each prompt needs one continuation"),
        ([[]], [[3]], "prompt 0 is empty"),
        ([[2], [2]], [[3], [999]], "continuation 1: token id 999"),
        ([[2.0]], [[3]], "prompt 0 must be token ids"),
        ([[2]], [[3] * 80], "item 0 has 81 tokens; the model's context is 64"),
    ],
)
def test_items_that_cannot_be_scored_are_refused(model, heads, tails, says):
    with pytest.raises(InputError, match=says):
        continuation_logprobs(model, heads, tails)


def test_a_text_of_one_token_has_no_loss(model):
    with pytest.raises(InputError, match="text 1 has 1 tokens"):
        text_loss(model, [jnp.asarray([2, 3]), jnp.asarray([2])])
