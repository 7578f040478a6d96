"""Feature cards against plain loops over a small store, in float64."""

import numpy as np
import pytest

from card_folders import publish_examples
from coders import random_coder
from gemma_scope_jax.autointerp.examples import Sampling, open_corpus
from gemma_scope_jax.cards.build import build_cards
from gemma_scope_jax.cards.card_files import CardFiles
from gemma_scope_jax.cards.correlations import LEAST, correlate
from gemma_scope_jax.cards.examples import OUTLIER, CardSettings, chance
from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.coders.directions import extreme_logits
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.extract import extract
from gemma_scope_jax.extraction.store.store import FeatureStore
from gemma_scope_jax.model.config import PRESETS
from letters import Letters
from planted_store import Tok
from tiny import tiny_model

tok = Letters()
F, HUGE = 48, "Z"
SETTINGS = CardSettings(top=4, groups=5, each=2, before=3, after=2, bins=20, seed=3, listed=6)


def similar_coder(seed=1, width=F, **place):
    """One feature is never active, and another has the decoder row of a third."""
    coder = random_coder(
        width, seed=seed, threshold=1.0, dead=(5,), info=CoderInfo(model_name="acme/tiny"), **place
    )
    return coder.replace(w_dec=coder.w_dec.at[7].set(0.0).at[9].set(1.0).at[11].set(2.0))


@pytest.fixture(scope="module")
def model():
    """Every feature is enormous on the letter Z."""
    model = tiny_model(PRESETS["gemma-3-270m"], layers=4)
    embed = model.params.embed.at[tok.encode(HUGE, bos=False)[0]].multiply(60.0)
    return model.replace(params=model.params.replace(embed=embed))


@pytest.fixture(scope="module")
def coder():
    return similar_coder()


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    word = lambda n: "".join(map(chr, rng.integers(65, 120, n)))
    texts = [word(n) for n in (90, 40, 7, 150, 30, 61, 61)]
    return [t[:20] + HUGE + t[20:] if i % 3 == 0 else t for i, t in enumerate(texts)]


@pytest.fixture(scope="module")
def store(model, coder, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return extract(
        model,
        {"sae": coder},
        tok,
        texts,
        folder,
        batch_size=2,
        context_size=48,
        values="float32",
        shard_tokens=200,
    )


@pytest.fixture(scope="module")
def cards(store, coder, model, tmp_path_factory):
    return build_cards(
        store, coder, tmp_path_factory.mktemp("c"), model=model, tokenizer=tok, settings=SETTINGS
    )


@pytest.fixture(scope="module")
def seen(store):
    """What a plain loop sees: {(token row, feature): value} of everything and of typical tokens;
    of each row its token, piece, document, position; which rows are typical."""
    everything, usual, place, typical = {}, {}, {}, set()
    for number, segment in enumerate(store.segments()):
        offsets, features, values = segment.by_token("sae")
        sums = []
        for t in range(len(segment.tokens)):
            here = range(offsets[t], offsets[t + 1])
            sums.append(sum(float(values[e]) for e in here))
            row = segment.start + t
            place[row] = (
                int(segment.tokens[t]),
                (number, int(segment.pieces[t])),
                int(segment.documents[t]),
                int(segment.positions[t]),
            )
            for e in here:
                everything[row, int(features[e])] = float(values[e])
        middle = np.median([s for s, c in zip(sums, segment.counted) if c and s > 0])
        for t, total in enumerate(sums):
            if segment.counted[t] and total <= OUTLIER * middle:
                typical.add(segment.start + t)
    usual = {(row, f): v for (row, f), v in everything.items() if row in typical}
    return everything, usual, place, typical


def test_the_store_is_worth_looking_at(store, seen, texts):
    """Several segments, documents and enormous tokens, which the tests below need."""
    everything, usual, place, typical = seen
    assert store.segment_count > 2 and len({p[2] for p in place.values()}) == 7
    left_out = {row for row, _ in everything} - typical
    assert {place[row][0] for row in left_out} == {tok.encode(HUGE, bos=False)[0]}
    assert len(left_out) == sum(text.count(HUGE) for text in texts)
    assert len(usual) < len(everything)


def test_counts(cards, store, seen):
    everything, usual, _, _ = seen
    for f in range(F):
        values = [v for (_, g), v in usual.items() if g == f]
        active = sum(g == f for _, g in everything)
        assert cards["density"][f] == active / store.counted
        assert cards["largest"][f] == pytest.approx(max(values, default=0.0), rel=1e-6)
        assert cards["mean"][f] == pytest.approx(np.mean(values) if values else 0, rel=1e-5)
        counts = np.zeros(20, int)
        for v in values:
            for b in range(20):
                if (
                    max(values) * b / 20
                    < v * (1 + 1e-12)
                    <= max(values) * (b + 1) / 20 * (1 + 1e-9)
                ):
                    counts[b] += 1
                    break
        assert cards["histogram"][f].tolist() == counts.tolist()
    assert cards["largest"][5] == 0 and cards.groups(5)[0].examples == []


def window_of(row, f, everything, place):
    """Ids and values around a row, within its piece."""
    around = [r for r in range(row - 3, row + 3) if r in place and place[r][1] == place[row][1]]
    return [place[r][0] for r in around], [everything.get((r, f), 0.0) for r in around], around


def test_top_examples(cards, seen):
    """The strongest token of each piece, the four strongest of those, with what is around."""
    everything, usual, place, _ = seen
    for f in range(F):
        best = {}
        for (row, g), v in sorted(usual.items()):
            if g == f and v > best.get(place[row][1], (0.0, 0))[0]:
                best[place[row][1]] = (v, row)
        wanted = sorted(best.values(), key=lambda pair: (-pair[0], pair[1]))[:4]
        found = cards.groups(f)[0].examples
        assert cards["example_rows"][f][: len(wanted)].tolist() == [row for _, row in wanted]
        assert len(found) == len(wanted)
        for example, (value, row) in zip(found, wanted):
            ids, values, around = window_of(row, f, everything, place)
            assert example.ids == ids and example.at == around.index(row)
            np.testing.assert_allclose(example.values, values, rtol=1e-6)
            assert example.values[example.at] == pytest.approx(value, rel=1e-6)
            assert (example.document, example.position) == place[row][2:]


def test_quantile_examples(cards, seen):
    """Of each fifth of the range, the two pieces whose luckiest token drew the largest numbers."""
    everything, usual, place, _ = seen
    seldom = 0
    for f in range(F):
        of = {row: v for (row, g), v in usual.items() if g == f}
        if not of:
            continue
        largest = max(of.values())
        for g, group in zip(reversed(range(5)), cards.groups(f)[1:]):
            inside = [r for r, v in of.items() if g < 5 * v / largest <= g + 1 + 1e-9]
            assert group.count == len(inside) and group.high == pytest.approx(largest * (g + 1) / 5)
            luck = {r: float(chance(np.array([f]), np.array([r]), 3)[0]) for r in inside}
            best = {}
            for r in inside:
                best[place[r][1]] = max(best.get(place[r][1], (0.0, -1)), (luck[r], r))
            wanted = [r for _, r in sorted(best.values(), reverse=True)[:2]]
            slot = 4 + 2 * (4 - g)
            rows = [r for r in cards["example_rows"][f][slot : slot + 2].tolist() if r >= 0]
            assert rows == wanted and len(group.examples) == len(wanted)
            seldom += len(wanted) == 1
            for example, row in zip(group.examples, wanted):
                assert example.ids == window_of(row, f, everything, place)[0]
    assert seldom  # some parts of the range have fewer than were asked for


def dense(seen):
    _, usual, _, typical = seen
    order = {row: i for i, row in enumerate(sorted(typical))}
    matrix = np.zeros((len(order), F))
    for (row, f), v in usual.items():
        matrix[order[row], f] = v
    return matrix


def test_correlations(cards, seen):
    x = dense(seen)
    for f in range(F):
        wanted = []
        for g in range(F):
            if g != f and x[:, f].std() > 0 and x[:, g].std() > 0:
                r = ((x[:, f] - x[:, f].mean()) * (x[:, g] - x[:, g].mean())).mean()
                r /= x[:, f].std() * x[:, g].std()
                cosine = x[:, f] @ x[:, g] / np.linalg.norm(x[:, f]) / np.linalg.norm(x[:, g])
                wanted += [(r, cosine, g)] * int(r >= LEAST)
        wanted.sort(reverse=True)
        found = cards.listed("correlated", f, "pearson", "cosine")
        assert [g for g, _, _ in found] == [g for _, _, g in wanted[:6]]
        np.testing.assert_allclose(
            [r for _, r, _ in found], [r for r, _, _ in wanted[:6]], rtol=1e-5
        )
        np.testing.assert_allclose([c for *_, c in found], [c for _, c, _ in wanted[:6]], rtol=1e-5)
    assert cards.manifest["correlated_tokens"] == len(x)


def test_a_later_first_beside_another_coder_changes_nothing(model, coder, texts, tmp_path):
    """A store counts tokens from its coders' smallest `first` on, a card from its own coder's."""
    late, made = coder.replace(first=6), []
    for i, coders in enumerate(({"late": late}, {"sae": coder, "late": late})):
        found = extract(
            model,
            coders,
            tok,
            texts,
            tmp_path / f"{i}",
            batch_size=2,
            context_size=48,
            values="float32",
            shard_tokens=200,
        )
        pool = open_corpus(found, Tok(), Sampling(length=8), "late", 1).pool
        assert found.places(pool)[1].min() >= 6
        made += [build_cards(found, late, tmp_path / f"cards{i}", settings=SETTINGS), pool]
    with pytest.raises(InputError, match="from position 6 on, and the coder begins at 1; ex"):
        build_cards(FeatureStore(tmp_path / "0"), coder, tmp_path / "c")
    alone, pool, beside, same = made
    assert alone.tokens == beside.tokens == found.counted_by("late") < found.counted
    assert (pool == same).all()
    for name in ("density", "mean", "example_rows", "correlated_ids", "correlated_pearson"):
        np.testing.assert_array_equal(alone[name], beside[name])
    assert alone.manifest["correlated_tokens"] == beside.manifest["correlated_tokens"]


def test_a_large_store_is_sampled_for_correlations(store, tmp_path):
    files = CardFiles(tmp_path)
    half = int(store.fired().sum()) // 2
    files.make("correlations", 0, lambda new: correlate(store, "sae", 1, 6, new, entries=half))
    assert 0 < files.manifest["correlated_tokens"] < store.counted * 0.8


def test_percentiles_are_right_to_a_bin(cards, seen):
    _, usual, _, _ = seen
    found = cards.percentiles(slice(0, F))
    assert found.shape == (F, 99)
    for f in range(F):
        values = [v for (_, g), v in usual.items() if g == f]
        if values:
            wanted = np.quantile(values, np.arange(1, 100) / 100, method="inverted_cdf")
            assert np.abs(found[f] - wanted).max() <= max(values) / 20 * (1 + 1e-6)
        else:
            assert not found[f].any()


# -------------------------------------------------------------------------------------------------
# From the weights


def test_another_model_is_told_by_its_weights(model, coder, store, cards, tmp_path):
    """Of two that share a name, as -pt and -it do: no store of the one, no logits of the other."""
    other = model.replace(params=model.params.replace(final_norm=model.params.final_norm + 0.5))
    with pytest.raises(InputError, match="features of another model .tiny-gemma-3-270m"):
        build_cards(store, coder, tmp_path / "a", model=other, tokenizer=tok, settings=SETTINGS)
    assert not (tmp_path / "a" / "density.npy").exists()
    publish_examples(tmp_path, np.random.default_rng(0))
    examples = tmp_path / "examples.safetensors"
    build = lambda m: build_cards(examples, coder, tmp_path / "b", model=m, tokenizer=tok)
    before = np.array(build(model)["top_logits"])
    after = np.array(build(other)["top_logits"])
    assert np.abs(after - before).max() > 1e-3
    wanted = next(iter(extreme_logits(other, coder, tok, range(F), k=4, gain="exact", bins=8)))[1]
    np.testing.assert_allclose(after[: len(wanted), :4], wanted, rtol=1e-5, atol=1e-5)
    strongest = np.array(build(model)["example_tokens"])
    publish_examples(tmp_path, np.random.default_rng(1))  # others, of the same size
    assert not np.array_equal(strongest, np.array(build(model)["example_tokens"]))


@pytest.mark.parametrize("gain, added", [("exact", 1.0), ("notebook", 0.0)])
def test_logits(model, coder, cards, gain, added):
    """The norm multiplies by 1 + w; the notebook by w."""
    embed = np.asarray(model.params.embed, np.float64)
    factor = np.asarray(model.params.final_norm, np.float64) + added
    logits = ((np.asarray(coder.w_dec, np.float64) * factor) @ embed.T)[:, 3:]
    chunks = extreme_logits(model, coder, tok, range(F), k=4, gain=gain, bins=8)
    top, up, bottom, down, ends, counts = map(np.concatenate, zip(*chunks))
    for f in set(range(F)) - {7}:
        order = np.argsort(-logits[f], kind="stable")
        assert (top[f] - 3).tolist() == order[:4].tolist()
        assert (bottom[f] - 3).tolist() == order[::-1][:4].tolist()
        np.testing.assert_allclose(up[f], logits[f, order[:4]], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(down[f], logits[f, order[::-1][:4]], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            ends[f], [logits[f].min(), logits[f].max()], rtol=1e-4, atol=1e-4
        )
        wanted = np.histogram(logits[f], 8, (logits[f].min(), logits[f].max()))[0]
        assert counts[f].sum() == 297 and np.abs(counts[f] - wanted).sum() <= 2  # ties of rounding
    if gain == "exact":
        np.testing.assert_array_equal(cards["top_ids"][:, :4], top)
        assert cards["logit_histogram"].shape == (F, 20)


def cosines(a, b):
    length = lambda v: np.linalg.norm(v) or 1.0
    return np.array([[u @ v / length(u) / length(v) for v in b] for u in a])


def test_decoder_neighbours(coder, cards):
    w = np.asarray(coder.w_dec, np.float64)
    wanted = cosines(w, w)
    for f in set(range(F)) - {7}:
        others = sorted(set(range(F)) - {f}, key=lambda g: -wanted[f, g])[:6]
        found = cards.listed("neighbour", f, "cosines")
        assert [g for g, _ in found] == others
        np.testing.assert_allclose([c for _, c in found], wanted[f, others], atol=1e-5)
    assert cards.listed("neighbour", 9, "cosines")[0] == (11, pytest.approx(1.0))


def test_other_coders(store, coder, model, tmp_path):
    """PT and IT: the same numbers, other weights; and a coder of another width."""
    near = coder.replace(w_dec=coder.w_dec[:30] + 0.1, w_enc=coder.w_enc[:, :30])
    cards = build_cards(
        store,
        coder,
        tmp_path,
        settings=SETTINGS,
        compare={"near": near, "far": similar_coder(4, 60)},
    )
    assert cards.manifest["compared"] == [["near", 30], ["far", 60]]
    w = np.asarray(coder.w_dec, np.float64)
    for n, other in enumerate([near, similar_coder(4, 60)]):
        wanted = cosines(w, np.asarray(other.w_dec, np.float64))
        same = np.asarray(cards[f"compared_{n}_same"])
        both = min(F, wanted.shape[1])
        np.testing.assert_allclose(same[:both], np.diag(wanted)[:both], atol=1e-5)
        assert np.isnan(same[both:]).all()
        for f in set(range(F)) - {7}:
            found = cards.listed(f"compared_{n}", f, "cosines")
            value = [c for _, c in found]
            np.testing.assert_allclose(value, -np.sort(-wanted[f])[:6], atol=1e-5)
            np.testing.assert_allclose(value, [wanted[f, g] for g, _ in found], atol=1e-5)
    assert "top_ids" not in cards  # no model was given
    with pytest.raises(InputError, match="cannot be compared"):
        build_cards(store, coder, tmp_path, settings=SETTINGS, compare={"x": similar_coder(d=16)})
