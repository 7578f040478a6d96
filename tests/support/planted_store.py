"""A feature store in memory whose features are planted: they fire on given letters.

Text is letters a token (see `letters.py`); feature i fires on the letters `PLANTED[i]`, with a
strength that differs from place to place. Feature 5 fires after an "x", feature 6 nowhere,
feature 7 everywhere.
"""

import types

import numpy as np

from letters import Letters

PLANTED = ["a", "bc", "d", "ef", "gh"]
AFTER_X, DEAD, DENSE, WIDTH = 5, 6, 7, 8


class Tok(Letters):
    vocab_size = 300


class PlantedStore:
    """The interface of `extraction.store.FeatureStore`, of one coder called "planted"."""

    coders = ("planted",)

    def __init__(self, pieces=300, length=100, seed=0, segments=3):
        rng, tok = np.random.default_rng(seed), Letters()
        letters = "abcdefghijklmnopqrstuvwxyz    \n"
        # the planted letters are rare, so that many windows have none of them
        weight = np.array([0.15 if c in "abcdefghx" else 1.0 for c in letters])
        self.folder = "planted"
        self.manifest = {"model": {"name": "tiny"}, "coders": [{"name": "planted", "width": WIDTH}]}
        text = [
            "".join(rng.choice(list(letters), length, p=weight / weight.sum()))
            for _ in range(pieces)
        ]
        self.tokens = np.concatenate([tok.encode(t) for t in text])
        self.positions = np.tile(np.arange(length + 1, dtype=np.int32), pieces)
        self.piece = np.repeat(np.arange(pieces), length + 1)
        self.is_counted = self.positions > 0
        self.strength = rng.uniform(1, 5, (WIDTH, len(self.tokens))).astype(np.float32)
        before = np.r_[0, self.tokens[:-1]]
        fires = [np.isin(self.tokens, tok.encode(p, bos=False)) for p in PLANTED]
        fires += [before == tok.encode("x", bos=False)[0], self.tokens < 0, self.tokens >= 0]
        self.values = np.where(np.array(fires) & self.is_counted[None], self.strength, 0.0)
        self.values = self.values.astype(np.float32)
        cuts = np.linspace(0, pieces, segments + 1).astype(int) * (length + 1)
        self.cuts = list(zip(cuts[:-1], cuts[1:]))

    def __len__(self):
        return len(self.tokens)

    def place(self, coder, layer):
        return 0

    def width(self, coder=None):
        return WIDTH

    def segments(self):
        for a, b in self.cuts:
            yield types.SimpleNamespace(
                start=int(a),
                tokens=self.tokens[a:b],
                positions=self.positions[a:b],
                counted_by=lambda coder, a=a, b=b: self.is_counted[a:b],
                by_token=lambda coder, layer, a=a, b=b: self._rows(a, b),
            )

    def _rows(self, a, b):
        rows, features = np.nonzero(self.values[:, a:b].T)
        offsets = np.searchsorted(rows, np.arange(b - a + 1))
        return offsets, features.astype(np.int32), self.values[features, a + rows]

    def feature(self, feature, coder=None, layer=None):
        rows = np.flatnonzero(self.values[feature])
        return rows.astype(np.int64), self.values[feature, rows]

    def features(self, start, stop, coder=None, layer=None):
        parts = [self.feature(f) for f in range(start, stop)]
        offsets = np.cumsum([0, *(len(rows) for rows, _ in parts)])
        return offsets, *(np.concatenate(some) for some in zip(*parts))

    def fired(self, coder=None, layer=None):
        return (self.values > 0).sum(1)

    def windows(self, rows, before, after):
        at = np.asarray(rows)[:, None] + np.arange(-before, after + 1)[None]
        inside = (at >= 0) & (at < len(self))
        at = np.clip(at, 0, len(self) - 1)
        inside &= self.piece[at] == self.piece[np.asarray(rows)][:, None]
        return np.where(inside, self.tokens[at], -1).astype(np.int32)
