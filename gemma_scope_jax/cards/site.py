"""The cards of a coder as a web site that needs no server: open index.html from a disk.

    index.html            the program
    data/list.js          density, largest and mean activation, and label of every feature
    data/cards-N.js       the cards of `CHUNK` features
    data/words-N.js       word -> features, for words whose first two letters hash to N

A page opened from a disk may load scripts but not fetch files, so the data are scripts, loaded when
they are needed. Text goes into elements through `textContent` only.
"""

import html
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gemma_scope_jax.autointerp.explanations import Explanation, explanation_note
from gemma_scope_jax.cards.card_files import Example, FeatureCards
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import tracked
from gemma_scope_jax.storage.atomic import new_folder, write_text
from gemma_scope_jax.web.pages import inert_json, page_template

CHUNK = 32  # features per file
SHARDS = 128  # files of words
RAISED = 6  # tokens shown for a feature in the list
LABEL, LOGIT, PEAK, NEAR, MOST = 30, 6, 3, 1, 99  # a word's score by its place
COMMON = 0.2  # words of more features than this share are found in their better places only
WORD = re.compile(r"\w+")


def build_site(
    cards: FeatureCards,
    folder: Path,
    tokenizer: Tokenizer,
    *,
    explanations: Mapping[int, Explanation] | None = None,
    sites: Mapping[str, str] | None = None,
) -> None:
    """Write the site of `cards` into `folder`; index.html comes last.

    explanations: of features, from `read_explanations`.
    sites: the paths of the compared coders' sites, relative to this one's page.
    """
    explanations, name = explanations or {}, str(cards.manifest["coder"])
    with new_folder(folder / "data", "list.js") as data:
        postings = _Postings(data)
        for start in tracked(range(0, len(cards), CHUNK), "site"):
            features = range(start, min(start + CHUNK, len(cards)))
            here = slice(features.start, features.stop)
            lists = [cards[n][here].ravel() for n in ("top_ids", "bottom_ids") if n in cards]
            ids = np.unique(np.concatenate([cards["example_tokens"][here].ravel(), *lists]))
            ids = ids[ids >= 0]
            words = tokenizer.decode_tokens(ids)
            place = partial(np.searchsorted, ids)
            made = [_card(cards, f, place) for f in features]
            _write(data, f"cards-{start // CHUNK}", {"words": words, "cards": made})
            text_of = dict(zip(ids.tolist(), words))
            for f in features:
                postings.add(f, _scores(cards, f, text_of, explanations.get(f)))
        postings.finish(len(cards))
        _write(data, "list", _overview(cards, name, tokenizer, explanations, sites or {}))
    text = page_template(__package__, "site.html").replace("{{title}}", html.escape(name))
    write_text(folder / "index.html", text)  # type: ignore[arg-type]


def _write(data: Path, name: str, value: Any) -> None:
    (data / f"{name}.js").write_text(f'cards("{name}",{inert_json(value)})\n', encoding="utf-8")


Locate = Callable[[Any], np.ndarray]  # ids -> their indices in the vocabulary of a file


def _card(cards: FeatureCards, f: int, place: Locate) -> dict[str, Any]:
    """A card: h histogram, g groups of examples, l logits and their histogram, t logits without
    one, c correlated features, n neighbours, x those in compared coders."""
    largest = max(float(cards["largest"][f]), 1e-30)
    card: dict[str, Any] = {"h": cards["histogram"][f].tolist(), "l": None, "t": None}
    examples = lambda g: [_example(e, largest, place) for e in g.examples]
    facts = lambda g: [g.name, _short(g.low), _short(g.high), g.count, examples(g)]
    card["g"] = list(map(facts, cards.groups(f)))
    if "top_ids" in cards:
        both = []
        for end in ("top", "bottom"):
            ids, values = place(cards[f"{end}_ids"][f]), cards[f"{end}_logits"][f]
            both.append([[i, _short(v)] for i, v in zip(ids.tolist(), values.tolist())])
        if "logit_histogram" in cards:
            ends = list(map(_short, cards["logit_range"][f].tolist()))
            card["l"] = [*both, cards["logit_histogram"][f].tolist(), ends]
        else:
            card["t"] = both
    near = lambda name, fact: [[i, round(v, 3)] for i, v in cards.listed(name, f, fact)]
    card |= {"c": near("correlated", "pearson"), "n": near("neighbour", "cosines"), "x": []}
    for n in range(len(cards.manifest.get("compared", []))):
        same = float(cards[f"compared_{n}_same"][f])
        others = near(f"compared_{n}", "cosines")
        card["x"].append([others, None if np.isnan(same) else round(same, 3)])
    return card


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _example(example: Example, largest: float, place: Locate) -> list[Any]:
    """Its source, the index of the token, words, and activations in thousandths of the largest:
    sparse, [index, value, index, value, ...]."""
    strength = np.round(1000 * np.asarray(example.values) / largest).astype(int)
    at = np.flatnonzero(strength)
    pairs = np.stack([at, strength[at]], -1).ravel().tolist()
    file = f"{example.source}, " * bool(example.source)
    where = f"{file}document {example.document}, token {example.position}"
    return [where, example.at, place(example.ids).tolist(), pairs]


def _about(manifest: Mapping[str, Any]) -> str:
    """The model, site and width of a coder, in a line."""
    m = manifest
    read = m["reads"] if m["reads"] == m["writes"] else f"{m['reads']} \u2192 {m['writes']}"
    return f"{m['model']} \u00b7 {read} of layer {m['layer']} \u00b7 {m['width']:,} features"


def _overview(
    cards: FeatureCards,
    name: str,
    tokenizer: Tokenizer,
    explanations: Mapping[int, Explanation],
    sites: Mapping[str, str],
) -> dict[str, Any]:
    m, width = cards.manifest, len(cards)
    some = np.asarray(cards["top_ids"][:, :RAISED]) if "top_ids" in cards else np.zeros((0, 0), int)
    ids = np.unique(some)
    text = f"{cards.tokens:,} tokens" if cards.tokens else "the published examples"
    about = f"{_about(m)} \u00b7 {text}"
    logits = {"notebook": "as in the official notebook", "as published": "as published"}
    if m["gain"] in logits and "top_ids" in cards:
        about += f" \u00b7 logits {logits[m['gain']]}"
    labels, notes = [""] * width, [""] * width
    for f, explanation in explanations.items():
        labels[f], notes[f] = explanation["text"], explanation_note(dict(explanation))
    return {
        "name": name,
        "about": about,
        "chunk": CHUNK,
        "shards": SHARDS,
        "density": [float(f"{v:.6g}") for v in cards["density"].tolist()],
        "largest": [_short(v) for v in cards["largest"].tolist()],
        "mean": [_short(v) for v in cards["mean"].tolist()],
        "words": tokenizer.decode_tokens(ids),
        "raises": np.searchsorted(ids, some).tolist(),
        "labels": labels,
        "notes": notes,
        "explained": any(labels),
        "compared": [[other, sites.get(other, ""), n] for other, n in m.get("compared", [])],
    }


def _scores(
    cards: FeatureCards, f: int, text_of: Mapping[int, str], explanation: Explanation | None
) -> dict[str, int]:
    """The score of each word in a feature's label, logit tokens and strongest examples."""
    scores: dict[str, int] = defaultdict(int)
    for word in WORD.findall(explanation["text"].lower()) if explanation else ():
        scores[word] += LABEL
    for name in ("top_ids", "bottom_ids"):
        for i in cards[name][f].tolist() if name in cards else ():
            for word in WORD.findall(text_of[i].lower()) if i >= 0 else ():
                scores[word] += LOGIT if name == "top_ids" else NEAR
    for example in cards.groups(f)[0].examples:
        tokens = [text_of[i] for i in example.ids]
        start = sum(map(len, tokens[: example.at]))
        stop = start + len(tokens[example.at])
        best: dict[str, int] = {}
        for match in WORD.finditer("".join(tokens)):
            on = match.start() < stop and match.end() > start
            word = match[0].lower()
            best[word] = max(best.get(word, 0), PEAK if on else NEAR)
        for word, score in best.items():
            scores[word] += score
    return scores


def shard_of(word: str) -> int:
    """The number of a word's file; the page computes the same from its UTF-16 code units."""
    units = word[:2].encode("utf-16-le")[:4]
    first, second = (int.from_bytes(units[i : i + 2], "little") for i in (0, 2))
    return (first * 31 + second) % SHARDS


class _Postings:
    """word -> [step to the next feature, score, ...]; on disk until all features are added."""

    def __init__(self, data: Path):
        self._data = data
        self._held: dict[int, list[str]] = defaultdict(list)
        self._lines = 0

    def add(self, feature: int, scores: Mapping[str, int]) -> None:
        for word, score in scores.items():
            self._held[shard_of(word)].append(f"{word} {feature} {min(score, MOST)}\n")
        self._lines += len(scores)
        if self._lines > 1_000_000:
            self._spill()

    def _spill(self) -> None:
        for shard, lines in self._held.items():
            with open(self._data / f"words-{shard}.tmp", "a", encoding="utf-8") as file:
                file.writelines(lines)
        self._held.clear()
        self._lines = 0

    def finish(self, width: int) -> None:
        self._spill()
        for shard in range(SHARDS):
            path, found = self._data / f"words-{shard}.tmp", defaultdict(list)
            if path.exists():
                with open(path, encoding="utf-8") as file:
                    for line in file:
                        word, feature, score = line.split()
                        found[word].append((int(feature), int(score)))
                path.unlink()
            words = {word: _steps(some, COMMON * width) for word, some in sorted(found.items())}
            _write(self._data, f"words-{shard}", words)


def _steps(some: Sequence[tuple[int, int]], common: float) -> list[int]:
    if len(some) > max(common, 64):
        some = [(f, score) for f, score in some if score >= PEAK]
    flat, last = [], 0
    for feature, score in some:
        flat += [feature - last, score]
        last = feature
    return flat


def write_index(folder: Path, sites: Mapping[str, FeatureCards]) -> None:
    """Write index.html, which links to the sites: the cards of each, by the name of its folder."""
    items = []
    for name, cards in sites.items():
        m = cards.manifest
        items.append(
            f'<li><a href="{html.escape(name)}/index.html">{html.escape(str(m["coder"]))}</a>'
            f"<br><small>{html.escape(_about(m))}</small></li>"
        )
    text = page_template(__package__, "sites.html").replace("{{coders}}", "\n".join(items))
    write_text(folder / "index.html", text)  # type: ignore[arg-type]
