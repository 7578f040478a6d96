"""Cards of published examples; stages that are kept; what cannot work is one line."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from card_folders import F, card_coder, publish_examples
from commands import command
from gemma_scope_jax.cards.build import build_cards
from gemma_scope_jax.cards.card_files import FILE, FeatureCards
from gemma_scope_jax.cards.examples import CardSettings
from gemma_scope_jax.cards.published import PER_FEATURE
from gemma_scope_jax.coders.load import load_coder
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.coders.release.files import save_coder
from gemma_scope_jax.errors import InputError


def test_published_examples(tmp_path):
    tensors = publish_examples(tmp_path, np.random.default_rng(0))
    settings = CardSettings(top=3, groups=5, each=2, before=4, after=3, bins=10)
    cards = build_cards(
        tmp_path / "examples.safetensors", card_coder(), tmp_path / "cards", settings=settings
    )
    assert "correlated_ids" not in cards and cards.manifest["strongest_only"] == 12
    for f in range(F):
        known = {
            (int(s), int(p)): float(v)
            for v, s, p in zip(*(tensors[n][f] for n in PER_FEATURE))
            if v > 0
        }
        best = {}
        for (s, p), v in sorted(known.items()):
            if v > best.get(s, (0, 0))[0]:
                best[s] = (v, p)
        wanted = sorted(((v, s, p) for s, (v, p) in best.items()), key=lambda e: (-e[0], e[1:]))[:3]
        top, *parts = cards.groups(f)
        assert [(e.values[e.at], e.document, e.position) for e in top.examples] == wanted
        for e in [e for g in (top, *parts) for e in g.examples]:
            here = range(max(0, e.position - 4), min(20, e.position + 4))
            assert e.ids == [int(tensors["tokens"][e.document, t]) for t in here]
            assert e.values == [known.get((e.document, t), 0.0) for t in here]
        counts = [
            sum(g < 5 * v / max(known.values()) <= g + 1 for v in known.values())
            for g in reversed(range(5))
        ]
        assert [g.count for g in parts] == counts
        assert [len(g.examples) for g in parts] == [
            min(
                2,
                len(
                    {
                        s
                        for (s, _), v in known.items()
                        if g.low < v * (1 + 1e-9) and v <= g.high * (1 + 1e-6)
                    }
                ),
            )
            for g in parts
        ]
    np.testing.assert_array_equal(cards["top_ids"], tensors["top_tokens"])
    np.testing.assert_allclose(cards["density"], tensors["feature_frequencies"])


def test_coders_of_several_layers(tiny, tmp_path):
    """A site for each of its layers."""
    draw = lambda n, *shape: jax.random.normal(jax.random.key(n), shape) / 6
    crosscoder = MultiLayerCoder(
        draw(0, 2, 32, F),
        jnp.zeros((2, F)),
        jnp.full((2, F), 0.1),
        draw(1, 3, F, 32),
        jnp.zeros((2, 32)),
        layers=(1, 2),
    )
    save_coder(crosscoder, tmp_path / "cross", config_extra={"model_name": "acme/tiny"})
    (tmp_path / "text.txt").write_text("a quick brown fox jumps over the lazy dog " * 9)
    options = ("--text", tmp_path / "text.txt", "--out", tmp_path / "out", "--model", "tiny",
               "--context-size", 64)  # fmt: skip
    assert command("cards", tmp_path / "cross", *options) == 0
    made = [FeatureCards(tmp_path / "out" / f"cross-layer-{i}" / "cards") for i in (1, 2)]
    assert [c.manifest["layer"] for c in made] == [1, 2]
    assert made[0]["largest"].tolist() != made[1]["largest"].tolist()
    np.testing.assert_array_equal(made[0]["example_tokens"].shape[:2], (F, 45))


def test_finished_stages_are_kept(made, cards, tiny, tmp_path, monkeypatch, capsys):
    """The same command makes nothing anew but the site; other settings do."""
    made = shutil.copytree(made.parent, tmp_path / "made") / "out"
    before = {p.name: p.stat().st_mtime_ns for p in (made / "one" / "cards").glob("*.npy")}
    options = ("--store", made / "store", "--out", made, "--model", "tiny", "--top", 9, "--each", 2,
               "--before", 14, "--after", 9, "--compare", made.parent / "two")  # fmt: skip
    assert command("cards", made.parent / "one", made.parent / "two", *options) == 0
    after = {p.name: p.stat().st_mtime_ns for p in (made / "one" / "cards").glob("*.npy")}
    assert before == after
    copy = tmp_path / "cards"
    shutil.copytree(made / "one" / "cards", copy)
    from gemma_scope_jax.extraction.store.store import FeatureStore

    store, coder = FeatureStore(made / "store"), load_coder(made.parent / "one")
    with monkeypatch.context() as patch:
        fail = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        patch.setattr("gemma_scope_jax.cards.examples._windows", fail)
        with pytest.raises(KeyboardInterrupt):
            build_cards(store, coder, copy, settings=CardSettings(top=7))
    assert not list(copy.glob(".*.npy"))
    with pytest.raises(InputError, match="not finished"):
        FeatureCards(copy)
    again = build_cards(store, coder, copy, settings=CardSettings(top=7))
    assert again["example_rows"].shape == (F, 7 + 25) and "top_ids" in again
    publish_examples(tmp_path, np.random.default_rng(0))
    other = build_cards(tmp_path / "examples.safetensors", coder, copy)
    assert "correlated_ids" not in other and "logit_range" not in other  # nothing stale is left


def bad(folder, tmp):
    """Command lines that cannot work, and a part of the line that says why."""
    (tmp / "text.txt").write_text("a quick brown fox")
    other = card_coder(seed=9).replace(threshold=jnp.full(F, 0.9))
    save_coder(other, tmp / "other", config_extra={"model_name": "acme/tiny"})
    save_coder(card_coder(d=16), tmp / "small", config_extra={"model_name": "acme/tiny"})
    (tmp / "garbled").mkdir()
    shutil.copytree(folder.parent / "one", tmp / "labelled")
    (tmp / "labelled" / "explanations.json").write_text('{"format": 9, "explanations": {}}')
    (tmp / "taken" / "one" / "cards").mkdir(parents=True)
    (tmp / "taken" / "one" / "cards" / FILE).write_text("{")
    for name, change in {
        "short": lambda t: t.pop("positions"),
        "narrow": lambda t: t.update({n: t[n][:7] for n in (*PER_FEATURE, "feature_frequencies")}),
        "beyond": lambda t: t["positions"].__setitem__((0, 0), 9999),
        "flat": lambda t: t.update(tokens=t["tokens"].reshape(-1)),
        "alien": lambda t: t["tokens"].__setitem__((0, 0), 9999),
        "nowhere": lambda t: t["feature_frequencies"].__setitem__(3, np.nan),
    }.items():
        save_coder(card_coder(), tmp / name, config_extra={"model_name": "acme/tiny"})
        tensors = publish_examples(tmp / name, np.random.default_rng(0))
        change(tensors)
        save_file(tensors, tmp / name / "examples.safetensors")
    save_coder(card_coder(), tmp / "torn", config_extra={"model_name": "acme/tiny"})
    (tmp / "torn" / "examples.safetensors").write_bytes(b"\x10")
    one, store = folder.parent / "one", ("--store", folder / "store")
    yield ("cards", one, "--text", tmp / "text.txt", *store), "not both"
    yield ("cards", one), "no examples are published beside it: give text"
    yield ("cards", one, "--store", tmp / "none"), "holds no sparse features"
    yield ("cards", one, "--text", tmp / "none.txt"), "none.txt"
    yield ("cards", tmp / "none", *store), "none"
    yield ("cards", tmp / "other", *store), "holds no features of other"
    yield ("cards", one, *store, "--compare", tmp / "small"), "cannot be compared"
    yield ("cards", one, *store, "--compare", tmp / "nobody"), "nobody"
    yield ("cards", one, *store, "--out", "gs://bucket/cards"), "a local folder"
    yield ("cards", one, *store, "--top", 0), "top is 0"
    yield ("cards", one, *store, "--before", -1), "before is -1"
    yield ("cards", one, *store, "--groups", 0), "groups is 0"
    yield ("cards", tmp / "labelled", *store), "format is 9, not 1"
    yield ("cards", one, *store, "--out", tmp / "taken"), "cards.json: not usable as JSON"
    yield ("cards", tmp / "short"), "positions missing"
    yield ("cards", tmp / "narrow"), "has 7 features, the coder beside it 48"
    yield ("cards", tmp / "beyond"), "is outside the tokens"
    yield ("cards", tmp / "flat"), "expected [S, T]"
    yield ("cards", tmp / "alien"), "9999, and the tokenizer"
    yield ("cards", tmp / "nowhere"), "feature_frequencies must be numbers"
    for number, model in enumerate(({"name": "tiny", "weights": "w"}, {"dtype": 3}, [])):
        shutil.copytree(folder / "store", tmp / f"store{number}")
        manifest = json.loads((tmp / f"store{number}" / "manifest.json").read_text())
        manifest["model"] = model
        (tmp / f"store{number}" / "manifest.json").write_text(json.dumps(manifest))
        yield (
            ("cards", one, "--store", tmp / f"store{number}"),
            ("dtype", "lacks 'name'", "manifest.json")[number],
        )
    yield ("cards", tmp / "torn"), "not a complete safetensors file"


def test_what_cannot_work_is_one_line(made, tiny, tmp_path, capsys):
    for argv, said in bad(made, tmp_path):
        out = () if "--out" in argv else ("--out", tmp_path / "out")
        assert command(*argv, *out, "--model", "tiny") == 2, argv
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and said in last, (argv, last)


def test_cards_need_a_folder_of_this_machine(tmp_path):
    with pytest.raises(InputError, match="a local folder"):
        build_cards(tmp_path / "x.safetensors", card_coder(), "gs://bucket/cards")
    with pytest.raises(InputError, match="no feature cards"):
        FeatureCards(tmp_path)
    with pytest.raises(InputError, match="multiple of groups"):
        CardSettings(bins=7)
