"""What a graph explains: logits, their differences, features, directions, sums and means of these.

    Target.logit(" Austin") - Target.logit(" Dallas")
    Target.feature(12, 4510, position=7)
    sum(Target.logit(token, position=p) for p in (5, 9)) / 2
    Target.direction(probe, layer=12)

Every target is linear in the residual stream, once norms are frozen. The most likely next tokens
are chosen as circuit-tracer does (`max_n_logits`, `desired_logit_prob`).
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.circuits.neurons import neurons_of, sources_at
from gemma_scope_jax.circuits.sources import Active, Prompt, encoder_rows
from gemma_scope_jax.coders.coder import float32
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.gemma import unembed
from gemma_scope_jax.model.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """One summand of a target: a logit, a feature's pre-activation, or a direction at a token."""

    kind: str  # "logit", "feature" or "direction"
    what: Any  # a token (id or text), a feature's id, or a vector [D]
    position: int  # from the end of the prompt if negative
    layer: int = -1
    factor: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A quantity to explain: a sum of terms. Targets can be added, subtracted and scaled.

    weight: how much of the influence starts here; default: a single logit's probability, else 1.
    """

    terms: tuple[Term, ...]
    label: str
    weight: float | None = None

    @classmethod
    def logit(cls, token: int | str, position: int = -1, weight: float | None = None) -> "Target":
        """The logit of the token after `position`, less the mean logit. `token`: id or text."""
        name = repr(token) if isinstance(token, str) else str(token)
        where = "" if position == -1 else f" after {position}"
        return cls((Term("logit", token, position),), f"{name}{where}", weight)

    @classmethod
    def feature(cls, layer: int, feature: int, position: int = -1) -> "Target":
        """The pre-activation of a transcoder's feature, active or not."""
        term = Term("feature", whole_number("feature", feature, 0), position, layer)
        return cls((term,), f"feature {layer}/{feature}")

    @classmethod
    def direction(
        cls, vector: Any, layer: int, position: int = -1, label: str = "direction"
    ) -> "Target":
        """vector [D] . resid_post of a layer."""
        return cls((Term("direction", np.asarray(vector, np.float32), position, layer),), label)

    def described(self) -> list[dict[str, Any]] | None:
        """The terms as JSON data, by which they can be measured; None if one is a direction."""
        if any(term.kind == "direction" for term in self.terms):
            return None
        return [dataclasses.asdict(term) for term in self.terms]

    def __add__(self, other: "Target | int") -> "Target":
        if isinstance(other, int) and other == 0:  # the start of `sum`
            return self
        if not isinstance(other, Target):
            return NotImplemented
        return Target(self.terms + other.terms, f"{self.label} + {other.label}", 1.0)

    __radd__ = __add__

    def __sub__(self, other: "Target") -> "Target":
        if not isinstance(other, Target):
            return NotImplemented
        terms = self.terms + (-1.0 * other).terms
        name = other.label if len(other.terms) == 1 else f"({other.label})"
        return Target(terms, f"{self.label} - {name}", 1.0)

    def __mul__(self, factor: float) -> "Target":
        terms = tuple(dataclasses.replace(t, factor=t.factor * factor) for t in self.terms)
        name = self.label if len(self.terms) == 1 else f"({self.label})"
        return Target(terms, f"{factor:g} {name}", 1.0)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Target":
        return self * (1.0 / divisor)


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Targets as rows of the linear model; `stage`, `position` [n, Q], `vector` [n, Q, D]."""

    stage: np.ndarray
    position: np.ndarray
    vector: np.ndarray
    bias: np.ndarray  # [n]: what the target has besides the residual stream
    weights: np.ndarray  # [n]
    kind: list[str]
    layer: list[int]
    at: list[int]  # the position of the last term
    feature: list[int]  # vocabulary id or feature; -1
    labels: list[str]


def checked_targets(
    given: Any, config: GemmaConfig, coders: CoderSet, length: int, tokenizer: Tokenizer | None
) -> list[Target] | None:
    """What `attribute` was given, as targets of a prompt of `length` tokens: texts are ids, and no
    position is negative. None stays None. Raises `InputError`."""
    if given is None:
        return None
    if isinstance(given, Target | str) or not isinstance(given, Iterable):
        given = [given]
    made = [t if isinstance(t, Target) else Target.logit(t) for t in given]
    if not made:
        raise InputError("no targets: give at least one, or None for the likely next tokens")

    def settled(term: Term) -> Term:
        at, what = checked_position(term.position, length), term.what
        layer = whole_number("layer", term.layer, -(2**31))
        if term.kind == "logit":
            what = _checked_token(what, config, tokenizer)
        elif not 0 <= layer < config.layers:
            layers = f"layers 0 to {config.layers - 1}"
            raise InputError(f"layer {layer}: {config.name} has {layers}")
        elif term.kind == "feature" and what >= (width := coders.at(layer).width):
            raise InputError(f"feature {what} is not an id from 0 to {width - 1}")
        elif term.kind == "direction" and not _is_direction(what, config.d_model):
            size = config.d_model
            raise InputError(f"a direction must be {size} numbers, one for each channel")
        factor = float(term.factor)
        return dataclasses.replace(term, position=at, what=what, layer=layer, factor=factor)

    for target in made:
        weight = 1.0 if target.weight is None else target.weight
        if not (np.isfinite(weight) and weight > 0):
            raise InputError("the weights of targets must be positive numbers")
    found = [dataclasses.replace(t, terms=tuple(map(settled, t.terms))) for t in made]
    known = [t.described() for t in found]
    for target, terms in zip(found, known):
        if terms is not None and not any(_sums(terms)):
            raise InputError(f"target {target.label} is always 0: its terms cancel")
    twice = [t for n, t in enumerate(found) if known[n] is not None and known[n] in known[:n]]
    if twice:
        raise InputError(f"target {twice[0].label} is given twice")
    return found


def _sums(terms: list[dict[str, Any]]) -> Iterable[float]:
    """The factors of equal terms, added up."""
    sums: dict[tuple, float] = {}
    for term in terms:
        what = tuple(term[name] for name in ("kind", "what", "layer", "position"))
        sums[what] = sums.get(what, 0.0) + term["factor"]
    return sums.values()


def checked_position(given: Any, length: int) -> int:
    """A position in a prompt of `length` tokens, given from its end if negative."""
    at = whole_number("position", given, -(2**31))
    if not -length <= at < length:
        raise InputError(f"position {at}: the prompt has {length} tokens")
    return at % length


def _is_direction(vector: np.ndarray, size: int) -> bool:
    return vector.shape == (size,) and bool(np.isfinite(vector).all())


def _checked_token(given: int | str, config: GemmaConfig, tokenizer: Tokenizer | None) -> int:
    """The id of a token given as id or text."""
    if isinstance(given, str):
        if tokenizer is None:
            raise InputError(f"target {given!r}: give the tokenizer, or the token's id")
        ids = tokenizer.encode(given, bos=False).tolist()
        if len(ids) != 1:
            raise InputError(f"target {given!r} is {len(ids)} tokens, and must be one: {ids}")
        return ids[0]
    if not 0 <= (token := whole_number("token", given, -(2**31))) < config.vocab:
        raise InputError(f"target token {token} is outside the vocabulary, 0..{config.vocab - 1}")
    return token


def likely_tokens(logits: np.ndarray, most: int, probability: float) -> list[int]:
    """The fewest tokens whose probabilities reach `probability` together, at most `most`."""
    p = softmax(logits)
    order = np.argsort(-p, kind="stable")[: min(most, len(p))]
    enough = int(np.searchsorted(np.cumsum(p[order]), np.float32(probability))) + 1
    return order[:enough].tolist()


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max())
    return (e / e.sum()).astype(np.float32)


@jax.jit
def _logits_at(model: Model, resid_final, position):
    return unembed(model.config, model.params, resid_final[position][None, None])[0, 0]


@jax.jit
def _mean_unembedding(model: Model):
    return jnp.mean(model.params.unembedding, axis=0, dtype=jnp.float32)


@jax.jit
def _logit_direction(model: Model, mean, token, scale):
    """[D]: the gradient of a logit, less the mean logit, through a frozen final norm."""
    row = float32(model.params.unembedding[token]) - mean
    return row * (1.0 + float32(model.params.final_norm)) * scale


class Resolver:
    """Turns targets into rows, for one prompt."""

    def __init__(
        self, model: Model, coders: CoderSet, prompt: Prompt, tokenizer: Tokenizer | None
    ) -> None:
        self.model, self.coders, self.prompt, self.tokenizer = model, coders, prompt, tokenizer
        self.kind = "feature" if neurons_of(coders) is None else "neuron"
        self._logits: dict[int, np.ndarray] = {}

    @functools.cached_property
    def mean(self) -> jax.Array:
        """The mean unembedding [D]: what logits have in common, which no probability depends on."""
        return _mean_unembedding(self.model)

    def logits(self, position: int) -> np.ndarray:
        """The model's logits [V] after a token."""
        if position not in self._logits:
            found = _logits_at(self.model, self.prompt.resid_final, np.int32(position))
            self._logits[position] = np.asarray(found)
        return self._logits[position]

    def text(self, token: int) -> str:
        return str(token) if self.tokenizer is None else self.tokenizer.decode_tokens([token])[0]

    def likely(self, most: int, share: float) -> list[Target]:
        """The fewest next tokens that reach a share of the probability, at most `most`."""
        found = likely_tokens(self.logits(self.prompt.length - 1), most, share)
        return [Target.logit(token, self.prompt.length - 1) for token in found]

    def resolve(self, targets: Sequence[Target]) -> Resolved:
        """The rows of targets, as `checked_targets` returns them."""
        most = max(len(t.terms) for t in targets)
        D = self.model.config.d_model
        stage = np.full((len(targets), most), -1, np.int32)
        position = np.zeros((len(targets), most), np.int32)
        vector = np.zeros((len(targets), most, D), np.float32)
        bias, kinds, labels = np.zeros(len(targets), np.float32), [], []
        weights, layers, features = np.ones(len(targets), np.float32), [], []
        for n, target in enumerate(targets):
            for q, term in enumerate(target.terms):
                at = term.position
                row, own, stage[n, q], known = self._term(term, at)
                vector[n, q], position[n, q] = row * np.float32(term.factor), at
                bias[n] += own * term.factor
            single = len(target.terms) == 1 and target.terms[0].factor == 1.0
            term, at = target.terms[-1], int(position[n, len(target.terms) - 1])
            logit = single and term.kind == "logit"
            if target.weight is not None:
                weights[n] = target.weight
            elif logit:
                weights[n] = softmax(self.logits(at))[known]
            kind = self.kind if term.kind == "feature" else term.kind
            kinds.append(kind if single else "direction")
            logits = all(term.kind == "logit" for term in target.terms)
            layers.append(self.model.config.layers if logits else int(stage[n].max()) // 2)
            features.append(known if single else -1)
            labels.append(self.text(known) if logit else target.label)
        at = [int(p[s >= 0][-1]) for p, s in zip(position, stage)]
        return Resolved(stage, position, vector, bias, weights, kinds, layers, at, features, labels)

    def _term(self, term: Term, at: int) -> tuple[np.ndarray, float, int, int]:
        """(vector [D], own bias, stage, token or feature) of a term at a token."""
        frozen, c = self.prompt.frozen, self.model.config
        if term.kind == "logit":
            scale = frozen.final_scale[at]
            row = _logit_direction(self.model, self.mean, np.int32(term.what), scale)
            return np.asarray(row), 0.0, 2 * c.layers - 1, term.what
        if term.kind == "direction":
            return term.what, 0.0, 2 * term.layer + 1, -1
        active = sources_at(self.coders, self.prompt, [term.layer], [at], [term.what])
        rows, biases = encoder_rows(self.coders, active)
        row = feature_vectors(self.model, self.prompt, active, rows)[0]
        return row, float(biases[0]), 2 * term.layer, term.what


def feature_vectors(
    model: Model, prompt: Prompt, active: Active, encoder: np.ndarray
) -> np.ndarray:
    """The gradients [n, D] of features' pre-activations in resid_mid, through a frozen norm."""
    scales = np.asarray(prompt.frozen.pre_mlp_scale)[active.layer, active.position]
    gains = 1.0 + np.asarray(model.params.blocks.pre_mlp_norm, np.float32)
    return encoder * gains[active.layer] * scales[:, None]
