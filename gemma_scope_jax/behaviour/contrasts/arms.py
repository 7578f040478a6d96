"""Two arms to compare: texts that show a behaviour and texts that do not, and their activations.

    arms = gs.arms(tokenizer, stereotypes, anti_stereotypes, paired=True)

Pairs that differ in nothing but the behaviour are the strongest evidence: everything else cancels.
Arms of different lengths, formats or topics differ in features of these, too.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gemma_scope_jax.behaviour.statistics import FEWEST
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.data.chats import chat_prompt
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.probing.pooling import Pooled, SiteLayer, pool
from gemma_scope_jax.progress import Progress

if TYPE_CHECKING:
    from gemma_scope_jax.model.tokenizer import Tokenizer

How = Literal["mean", "last", "max"]
HOWS = ("mean", "last", "max")


@dataclasses.dataclass(frozen=True, eq=False)
class Arms:
    """The texts of two arms as token ids with <bos>, int32 [n] each; made by `gs.arms`.

    paired      a[i] and b[i] differ in the behaviour alone
    template_a, template_b  for chats, bool [n] a text: the tokens of the template around messages
    where_a, where_b  bool [n] a text: the tokens that stand for it; None: all
    unit_a, unit_b  names, one a text: texts of one unit (a target, a template) are not independent,
                so they stay in one half and are one observation in tests; None: each by itself
    """

    a: Sequence[np.ndarray]
    b: Sequence[np.ndarray]
    paired: bool = False
    name: str = ""
    template_a: Sequence[np.ndarray] | None = None
    template_b: Sequence[np.ndarray] | None = None
    where_a: Sequence[np.ndarray] | None = None
    where_b: Sequence[np.ndarray] | None = None
    unit_a: Sequence[str] | None = None
    unit_b: Sequence[str] | None = None

    def __post_init__(self):
        where = f"arms {self.name}" if self.name else "arms"
        if (self.unit_a is None) != (self.unit_b is None):
            raise InputError(f"{where}: units are for both arms or none")
        for arm, texts in self._sides():
            template, some, units = (
                getattr(self, f"{name}_{arm}") for name in ("template", "where", "unit")
            )
            if len(texts) < FEWEST:
                says = f"{len(texts)} texts in arm {arm}: give at least {FEWEST}"
                raise InputError(f"{where}: {says}")
            sizes = list(map(len, texts))
            if not min(sizes):
                raise InputError(f"{where}: text {sizes.index(0)} of arm {arm} is empty")
            for masks, what in ((template, "template"), (some, "choice of tokens")):
                if masks is not None and list(map(len, masks)) != sizes:
                    raise InputError(f"{where}: the {what} of arm {arm} does not fit its texts")
            if units is not None and len(units) != len(texts):
                raise InputError(f"{where}: {len(units)} units for {len(texts)} texts of arm {arm}")
        if self.paired and len(self.a) != len(self.b):
            raise InputError(f"{where}: {len(self.a)} and {len(self.b)} texts are not pairs")
        if self.paired and self.unit_a != self.unit_b:
            raise InputError(f"{where}: the two texts of a pair are of one unit")

    def _sides(self):
        return ("a", self.a), ("b", self.b)

    def __repr__(self) -> str:
        count = f"{len(self.a)} pairs" if self.paired else f"{len(self.a)} and {len(self.b)} texts"
        return f"Arms({', '.join(filter(None, [self.name, count]))})"

    def check_length(self, context: int) -> None:
        """Raise `InputError` for a text that is longer than the model's context."""
        for arm, texts in self._sides():
            for n, ids in enumerate(texts):
                if len(ids) > context:
                    says = f"has {len(ids)} tokens; the model's context is {context}"
                    raise InputError(f"{self!r}: text {n} of arm {arm} {says}")

    def some(self, a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> "Arms":
        """The arms with these texts alone; of pairs, `a` and `b` must be the same numbers."""
        take = lambda texts, which: None if texts is None else [texts[i] for i in which]
        names = [(f"{name}_{arm}".strip("_"), which) for name in ("template", "where", "unit")
                 for arm, which in (("a", a), ("b", b))]  # fmt: skip
        parts = {name: take(getattr(self, name), which) for name, which in names}
        return dataclasses.replace(self, a=take(self.a, a), b=take(self.b, b), **parts)

    def halves(self, seed: int = 0) -> tuple["Arms", "Arms"]:
        """Two random halves; pairs and units stay together, and what repeats is on one side. Raises
        `InputError` if a half has fewer than 5 texts of an arm."""
        rng = np.random.default_rng(seed)
        if self.unit_a is not None and self.unit_b is not None:
            chosen = _half([*self.unit_a, *self.unit_b], rng)
            first_a, first_b = np.split(chosen, [len(self.a)])
        elif self.paired:
            keys = [(x.tobytes(), y.tobytes()) for x, y in zip(self.a, self.b)]
            first_a = first_b = _half(keys, rng)
        else:
            first_a, first_b = (_half([x.tobytes() for x in t], rng) for t in (self.a, self.b))
        parts = [(first_a, first_b), (~first_a, ~first_b)]
        if min(int(p.sum()) for part in parts for p in part) < FEWEST:
            least = f"a half needs {FEWEST} texts of each arm"
            raise InputError(f"{self!r}: {least}: give more, or held_out texts")
        one, two = (self.some(np.flatnonzero(x), np.flatnonzero(y)) for x, y in parts)
        return one, two


def _half(keys: Sequence[Any], rng: np.random.Generator) -> np.ndarray:
    """bool [n]: a random half, with equal keys on one side."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    chosen = rng.permutation(len(numbers)) < (len(numbers) + 1) // 2
    return chosen[[numbers[key] for key in keys]]


def arms(
    tokenizer: "Tokenizer",
    a: Sequence[Any],
    b: Sequence[Any],
    *,
    paired: bool,
    name: str = "",
    units: tuple[Sequence[str], Sequence[str]] | None = None,
) -> Arms:
    """The two arms of a comparison.

    a, b    for each text a string, a chat (a list of {"role", "content"}, as `gs.chat_prompt` has
            it: the model's turn is open at its end) or ids with <bos>
    paired  whether a[i] and b[i] belong together
    units   for each text of a and of b the name of what it shares with others, such as a template:
            see `Arms`

    Raises `InputError` for fewer than 5 texts of an arm, unequal numbers of pairs, and what the
    tokenizer refuses.
    """
    sides = []
    for arm, texts in (("a", a), ("b", b)):
        if isinstance(texts, str | Mapping):
            raise InputError(f"arm {arm} must be a list of texts, not one {type(texts).__name__}")
        sides.append(
            [_encoded(tokenizer, x, f"text {n} of arm {arm}") for n, x in enumerate(texts)]
        )
    ids_a, ids_b = ([ids for ids, _ in side] for side in sides)
    templates = [[t for _, t in side] if any(t.any() for _, t in side) else None for side in sides]
    unit_a, unit_b = (None, None) if units is None else map(list, units)
    return Arms(ids_a, ids_b, paired, name, *templates, unit_a=unit_a, unit_b=unit_b)


def role_arms(
    tokenizer: "Tokenizer", chats: Sequence[Any], a: str, b: str, *, name: str = ""
) -> Arms:
    """Two roles of the same chats, paired: the tokens of the messages of role `a` ("user", "model",
    "system") against those of role `b`. Raises `InputError` as `arms` does, and for a chat that
    lacks one of the roles."""
    ids, masks = [], ([], [])
    for n, chat in enumerate(chats):
        try:
            spans = tokenizer.chat(chat)
            found = spans.mask(a), spans.mask(b)
        except InputError as error:
            raise InputError(f"chat {n}: {error}") from None
        for role, mask, kept in zip((a, b), found, masks):
            if not mask.any():
                raise InputError(f"chat {n} has no message of the role {role!r}")
            kept.append(mask)
        ids.append(spans.ids)
    return Arms(ids, ids, True, name or f"{a} and {b}", where_a=masks[0], where_b=masks[1])


def _encoded(tokenizer: "Tokenizer", text: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """A text's ids, and which of them are of a chat's template."""
    if isinstance(text, str):
        ids = tokenizer.encode(text)
        return ids, np.zeros(len(ids), bool)
    if isinstance(text, Sequence) and text and isinstance(text[0], Mapping):
        try:
            ids = chat_prompt(tokenizer, text)
            template = tokenizer.chat(text).mask("turn")[: len(ids)]
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return ids, template
    ids = np.asarray(text)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"{where} is {type(text).__name__}: give a string, a chat or token ids")
    return ids.astype(np.int32), np.zeros(len(ids), bool)


@dataclasses.dataclass(frozen=True, eq=False)
class PooledArms:
    """N = A + B texts, arm a first: a vector each.

    raw      {place: float32 [N, D]}
    values   float32 [N, F] of the features `columns` [F], those that are active somewhere
    y        bool [N]: arm a
    item     int [N]: the number of the unit; without units of the pair, or of the text
    grouped  whether several texts of an arm may have one item: they are one observation in tests
    """

    raw: dict[SiteLayer, np.ndarray]
    values: np.ndarray
    columns: np.ndarray
    y: np.ndarray
    item: np.ndarray
    paired: bool
    grouped: bool = False

    @property
    def a(self) -> np.ndarray:
        return self.values[self.y]

    @property
    def b(self) -> np.ndarray:
        return self.values[~self.y]

    def joined(self, other: "PooledArms") -> "PooledArms":
        """The texts of both, arm a first."""
        y = np.concatenate([self.y, other.y])
        order = np.argsort(~y, kind="stable")
        both = lambda one, two: np.concatenate([one, two])[order]
        raw = {place: both(x, other.raw[place]) for place, x in self.raw.items()}
        item = both(self.item, other.item + self.item.max() + 1)
        values = both(self.values, other.values)
        parts = raw, values, self.columns, y[order], item, self.paired
        return PooledArms(*parts, self.grouped or other.grouped)


def pool_arms(
    models: tuple[Model, Model],
    coder: SparseCoder,
    sets: Sequence[Arms],
    how: How,
    places: Sequence[SiteLayer],
) -> list[PooledArms]:
    """Each of `sets` pooled, arm a by the first model and arm b by the second, which may be the
    same; all have the same columns."""
    one, two = [ids for s in sets for ids in s.a], [ids for s in sets for ids in s.b]
    where_one, where_two = ([mask for s in sets for mask in masks_of(s, arm)] for arm in "ab")
    options: dict[str, Any] = {"how": -1 if how == "last" else how, "first": coder.first}
    options |= {"places": places, "report": Progress(None, "tokens", what="features of both arms")}
    masked = any(m is not None for s in sets for m in (s.where_a, s.where_b))
    read = lambda model, texts, where: pool(
        model, [coder], texts, where=where if masked else None, **options
    )
    if models[0] is models[1]:
        whole = read(models[0], [*one, *two], [*where_one, *where_two])
        columns, values, raw = *whole.features[0][::-1], whole.raw
    else:
        parts = read(models[0], one, where_one), read(models[1], two, where_two)
        columns, values = _united(parts)
        raw = {p: np.concatenate([x, parts[1].raw[p]]) for p, x in parts[0].raw.items()}
    active = values.any(0)
    if not active.any():
        raise InputError("no feature of the coder is active on any of the texts")
    if not all(np.isfinite(x).all() for x in (values, *raw.values())):
        raise InputError("activations are not finite numbers: run the model in float32")
    columns, values = columns[active], values[:, active]
    found, at_a, at_b = [], 0, len(one)
    for s in sets:
        rows = np.r_[at_a : at_a + len(s.a), at_b : at_b + len(s.b)]
        at_a, at_b = at_a + len(s.a), at_b + len(s.b)
        y = np.arange(len(rows)) < len(s.a)
        item = np.where(y, np.arange(len(rows)), np.arange(len(rows)) - len(s.a) * s.paired)
        if s.unit_a is not None and s.unit_b is not None:
            item = np.unique([*s.unit_a, *s.unit_b], return_inverse=True)[1]
        mine = {place: x[rows] for place, x in raw.items()}
        grouped = s.unit_a is not None
        found.append(PooledArms(mine, values[rows], columns, y, item, s.paired, grouped))
    return found


def masks_of(arms: Arms, arm: str) -> Sequence[np.ndarray]:
    """The tokens that stand for each text of an arm, "a" or "b"."""
    masks = getattr(arms, f"where_{arm}")
    return [np.ones(len(ids), bool) for ids in getattr(arms, arm)] if masks is None else masks


def _united(parts: tuple[Pooled, Pooled]) -> tuple[np.ndarray, np.ndarray]:
    """The columns active in either part, and the values of all rows."""
    features = [part.features[0] for part in parts]
    columns = np.union1d(features[0].columns, features[1].columns)
    values = np.zeros((sum(len(f.values) for f in features), len(columns)), np.float32)
    start = 0
    for f in features:
        rows = slice(start, start + len(f.values))
        values[rows, np.searchsorted(columns, f.columns)] = f.values
        start = rows.stop
    return columns, values
