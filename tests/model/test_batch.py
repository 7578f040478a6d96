"""Batches of tokens: made from texts, taken by whatever takes tokens, and which tokens they use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.data.batches import TokenBatches
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.batch import TokenBatch, TokenLabels, as_batch, padded
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.model.tokenizer import load_tokenizer
from letters import Letters
from tiny import tiny_model
from tiny_tokenizer import tiny_proto, write_model

TEXTS = ["abc", "a longer text of many letters", "", "middle one"]
CHAT = [
    {"role": "system", "content": "one two"},
    {"role": "user", "content": "the start of turn"},
    {"role": "assistant", "content": "end of turn"},
]


@pytest.fixture(scope="module")
def model():
    return tiny_model(PRESETS["gemma-3-270m"], layers=2)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", tiny_proto())


def packed_batch(seed=0, B=4, T=24):
    """Rows of documents of random lengths, padding between and after them."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((B, T), np.int32)
    for row in segments:
        at, number = 0, 1
        while at < T:
            size = int(rng.integers(1, 9))
            row[at : at + size] = number * rng.integers(0, 2)
            at, number = at + size, number + 1
    tokens = rng.integers(3, 300, (B, T)).astype(np.int32) * (segments > 0)
    return TokenBatch(tokens, segments, rng.random((B, T)) < 0.7)


# -------------------------------------------------------------------------------------------------
# Which tokens


@pytest.mark.parametrize("first", [0, 1, 4])
def test_counted_is_the_mask_of_what_counts(first):
    """Without padding and the first of each document."""
    batch = packed_batch()
    whole, masked = (np.zeros(batch.tokens.shape, bool) for _ in range(2))
    positions = np.asarray(batch.positions)
    for b, row in enumerate(batch.segments):
        position = 0
        for t, number in enumerate(row):
            position = position + 1 if t and number == row[t - 1] else 0
            whole[b, t] = number > 0 and position >= first
            masked[b, t] = whole[b, t] and batch.mask[b, t]
            assert positions[b, t] == position
    np.testing.assert_array_equal(batch.counted(first), masked)
    np.testing.assert_array_equal(batch.plain.counted(first), whole)


def test_documents_are_the_runs_of_equal_segment_ids():
    batch = packed_batch(1)
    seen = np.zeros_like(batch.segments)
    for row, place in batch.document_slices():
        ids = batch.segments[row, place]
        assert (ids == ids[0]).all() and ids[0] > 0
        before, after = batch.segments[row, : place.start], batch.segments[row, place.stop :]
        assert ids[0] not in (*before[-1:], *after[:1])
        seen[row, place] += 1
    np.testing.assert_array_equal(seen, batch.segments > 0)
    assert batch.size == (batch.segments > 0).sum() and len(batch.document_slices()) > 6


def test_labels_name_groups_and_their_names_are_static():
    numbers = np.array([[0, 2, 1, -1]], np.int32)
    batch = TokenBatch(numbers, numbers, labels={"role": TokenLabels(numbers, ("a", "b", "c"))})
    where = lambda *names: batch.labels["role"].where(*names).tolist()
    assert where("a") == [[True, False, False, False]]
    assert where("c", "b") == [[False, True, True, False]] and where() == [[False] * 4]
    moved = jax.jit(lambda b: b.labels["role"].where("b"))(batch)
    assert moved.tolist() == where("b")
    with pytest.raises(InputError, match="no group 'd'; there are a, b, c"):
        where("d")


# -------------------------------------------------------------------------------------------------
# From texts


def test_texts_of_any_lengths_are_rows_padded_on_the_right():
    tok = Letters()
    batch = gs.tokens(TEXTS, tok)
    assert batch.tokens.shape == (4, 1 + len(TEXTS[1])) and batch.labels == {}
    for row, text in enumerate(TEXTS):
        ids = tok.encode(text)
        assert ids[0] == tok.bos_id
        np.testing.assert_array_equal(batch.tokens[row, : len(ids)], ids)
        assert batch.segments[row].sum() == len(ids) == batch.segments[row, : len(ids)].sum()
        assert batch.mask[row].tolist() == [0 < t < len(ids) for t in range(batch.tokens.shape[1])]
    np.testing.assert_array_equal(gs.tokens(TEXTS[1], tok).tokens, batch.tokens[1:2])


def test_chats_have_their_roles_and_a_mask_of_what_is_said(tokenizer_file):
    tok = load_tokenizer(tokenizer_file)
    batch = gs.tokens([CHAT, "two"], str(tokenizer_file))
    chat = tok.chat(CHAT)
    np.testing.assert_array_equal(batch.tokens[0], chat.ids)
    said = lambda mask: tok.decode(batch.tokens[0][mask[0]])
    role = batch.labels["role"].where
    assert [said(role(name)) for name in ("system", "user", "model")] == [
        "one two",
        "the start of turn",
        "end of turn",
    ]
    assert said(batch.mask) == "one twothe start of turnend of turn"
    assert not role("system", "user", "model", "turn")[1].any()
    assert tok.decode(batch.tokens[1][batch.mask[1]]) == "two"
    only = gs.tokens(CHAT, tok, roles=("assistant",), add_generation_prompt=False)
    assert tok.decode(only.tokens[only.mask]) == "end of turn"
    assert only.tokens.shape[1] < batch.tokens.shape[1]  # the model's turn is not opened
    np.testing.assert_array_equal(only.tokens[0], tok.chat(CHAT, add_generation_prompt=False).ids)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no texts"),
        (3, "must be strings or chats, not int"),
        (b"abc", "must be strings or chats, not bytes"),
        ([["abc"]], "text must be a str, not list"),
        ([[{"role": "user"}]], "message 0 is not"),
    ],
)
def test_what_is_no_text_is_one_line(tokenizer_file, texts, message):
    with pytest.raises(InputError, match=message):
        gs.tokens(texts, load_tokenizer(tokenizer_file))


# -------------------------------------------------------------------------------------------------
# Who takes them


def test_a_batch_runs_as_each_text_alone(model):
    out = gs.run(model, gs.tokens(TEXTS, Letters()))
    inside = jax.jit(lambda batch: gs.forward(model, batch).logits)
    for row in (1, 3):
        ids = Letters().encode(TEXTS[row])
        alone = inside(padded([ids], context_size=len(TEXTS[1]) + 1))[0]
        np.testing.assert_allclose(out.logits[row, : len(ids)], alone[: len(ids)], atol=1e-5)
    plain = gs.run(model, ids[None]).logits[0]
    np.testing.assert_allclose(out.logits[row, : len(ids)], plain, atol=1e-5)


def test_generation_takes_a_batch_and_continues_each_text(model):
    batch = gs.tokens(TEXTS, Letters())
    rows = [Letters().encode(text) for text in TEXTS]
    one, two = (gs.generate(model, prompts, 3) for prompts in (batch, rows))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    for a, b in zip(one.prompts, rows, strict=True):
        np.testing.assert_array_equal(a, b)
    for bad in (packed_batch(), padded([rows[0], rows[0][:0]])):
        with pytest.raises(InputError, match="one document per row"):
            gs.generate(model, bad, 3)


@pytest.mark.parametrize("text", ["abc", ["abc"], ("abc", "de"), CHAT, [CHAT]])
def test_text_where_tokens_are_wanted_says_what_makes_a_batch(model, text):
    for function in (gs.run, gs.forward, lambda *a: gs.generate(*a, 3)):
        with pytest.raises(InputError, match=r"not text: encode it with gs\.tokens"):
            function(model, text)


def test_a_batch_is_spread_over_a_mesh():
    batch = padded([np.arange(2, 9)] * 8)
    batch = batch.replace(mask=batch.segments > 0)
    there = gs.shard_batch(gs.make_mesh(4, 2), batch)
    for one, other in zip(jax.tree.leaves(there), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(one, other)
        assert {shard.data.shape for shard in one.addressable_shards} == {(2, 7)}


@pytest.mark.parametrize("mask", [np.ones((4, 3), bool), np.ones((4, 30))])
def test_a_mask_that_does_not_fit_is_one_line(mask):
    batch = gs.tokens(TEXTS, Letters())
    with pytest.raises(InputError, match=r"mask must be bool \[4, 30\], got (bool|float64)\[4, "):
        as_batch(batch.replace(mask=mask))


def test_a_batch_brings_its_own_segments(model):
    batch = gs.tokens(TEXTS, Letters())
    with pytest.raises(InputError, match="has its own segments"):
        gs.run(model, batch, segments=batch.segments)


def test_the_documents_of_a_batch_are_a_source_of_text():
    """Packed anew they are the same tokens, with the same of them in use."""
    given = gs.tokens(TEXTS, Letters())
    given = given.replace(mask=given.mask & (given.tokens % 2 == 0))
    batches = list(TokenBatches(given, Letters(), 2, 16, epochs=1))
    used = np.concatenate([b.tokens[b.mask] for b in batches])
    np.testing.assert_array_equal(np.sort(used), np.sort(given.tokens[given.mask]))
    letters = np.concatenate([b.tokens[b.tokens > 2] for b in batches])
    np.testing.assert_array_equal(np.sort(letters), np.sort(given.tokens[given.tokens > 2]))
    make = lambda batch: TokenBatches(batch, Letters(), 2, 16).fingerprint
    other = given.replace(mask=given.segments > 0)
    assert make(given) == make(jax.tree.map(jnp.asarray, given)) != make(other)
    with pytest.raises(InputError, match=r"document 0 begins with token 5, not <bos> \(2\)"):
        next(TokenBatches(padded([np.array([5, 6])]), Letters(), 1, 8))
    with pytest.raises(InputError, match="only padding"):
        TokenBatches(given.replace(segments=0 * given.segments), Letters(), 1, 8)
