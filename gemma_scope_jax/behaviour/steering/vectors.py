"""Directions to steer with or to read, and how each was made.

A vector comes from a contrast of two sets of texts (the difference of means, the first principal
component of the differences, a probe), from training (rank 1: the text's own loss), from answers
written for it (`persona.py`), or from elsewhere. It is kept as one safetensors file whose metadata
say how it was made.

Sources: difference of means and PCA: Marks and Tegmark 2023, Zou et al. 2023 (representation
engineering); persona vectors: Chen et al. 2025 (2507.21509); rank-1 vectors: Wu et al. 2025
(AxBench, ReFT-r1), Cao et al. 2024.
"""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma_scope_jax.behaviour.steering.spec import Reading
from gemma_scope_jax.coders.coder import float32
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.batch import TokenBatch, padded
from gemma_scope_jax.model.buckets import bucket
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import forward, site_width
from gemma_scope_jax.model.intercept import LAYER_SITES, Context, token_mask, tokenwise, write
from gemma_scope_jax.probing.logistic import fit_logistic
from gemma_scope_jax.probing.pooling import pool, typical_scale
from gemma_scope_jax.progress import Progress
from gemma_scope_jax.storage.atomic import write_file
from gemma_scope_jax.storage.paths import expanded
from gemma_scope_jax.storage.safetensors_files import (
    StreamedTensor,
    open_safetensors,
    write_safetensors,
)
from gemma_scope_jax.storage.strict_json import field, parse_json

Method = Literal["mean", "pca", "probe"]
MARK = "gemma_scope_jax steering vector"


@dataclasses.dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction float32 [D] at a site and layer, and how it was made.

    norm  the median norm of the activations there, so that strengths can be compared; 0: unknown
    made  JSON: the method, the model, numbers of texts, figures
    """

    vector: np.ndarray
    site: str
    layer: int
    norm: float = 0.0
    made: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file. Raises `InputError` if it cannot be written."""
        facts = {"site": self.site, "layer": self.layer, "norm": self.norm, "made": self.made}
        metadata = {"format": MARK, "facts": json.dumps(facts, allow_nan=False)}
        tensors = {"vector": StreamedTensor.whole(np.asarray(self.vector, np.float32))}
        write_file(expanded(path), lambda file: write_safetensors(file, tensors, metadata))

    def reading(self) -> Reading:
        """The direction as the target of a step or what an effect reads."""
        return Reading(vector=self.vector, site=self.site, layer=self.layer)

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read a file that `save` wrote. Raises `InputError` for any other."""
        path = expanded(path)
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != MARK or list(file.keys()) != ["vector"]:
                raise InputError(f"{path}: not a steering vector; SteeringVector.save writes them")
            vector = file.get_tensor("vector")
        facts = parse_json(metadata.get("facts", ""), path)
        site = field(facts, "site", str, path)
        if site not in LAYER_SITES or vector.ndim != 1 or not np.isfinite(vector).all():
            raise InputError(f"{path}: not a usable steering vector ({site}, {vector.shape})")
        layer = field(facts, "layer", int, path, least=0)
        norm = field(facts, "norm", float, path, default=0.0, least=0.0)
        made = field(facts, "made", dict, path, default={})
        return cls(np.asarray(vector, np.float32), site, layer, norm, made)

    def __repr__(self) -> str:
        """One line without the array."""
        how = f", by {self.made['method']}" if "method" in self.made else ""
        return f"SteeringVector({self.site} of layer {self.layer}, {len(self.vector)} values{how})"


def contrast_vector(
    model: Model,
    positive: Sequence[np.ndarray],
    negative: Sequence[np.ndarray],
    site: str,
    layer: int,
    *,
    method: Method = "mean",
    first: int = 1,
    how: Literal["mean"] | int = "mean",
    where: tuple[Sequence[np.ndarray], Sequence[np.ndarray]] | None = None,
) -> SteeringVector:
    """The direction from the `negative` to the `positive` texts, int ids [n] each with <bos>.

    method  "mean": the difference of the means. "pca": the first principal component of the
            differences of pairs (text n of both sets), pointing to the positives. "probe": the
            weights of a logistic probe, scaled so that a step of the vector moves its score by as
            much as the difference of means does
    how     which activation stands for a text: the mean over its tokens from `first` on, or that of
            one token, such as -1 for the last
    where   for each positive and each negative text bool [n]: the tokens that stand for it
    Raises `InputError` for too few texts, for pca without pairs, and for an unknown site or layer.
    """
    check_place(model, site, layer)
    if method not in ("mean", "pca", "probe"):
        raise InputError(f"method is {method!r}, expected mean, pca or probe")
    if min(len(positive), len(negative)) < 2:
        raise InputError("a contrast needs at least two texts on each side")
    if method == "pca" and len(positive) != len(negative):
        raise InputError(f"pca takes pairs: {len(positive)} and {len(negative)} texts are none")
    texts = [*positive, *negative]
    masks = None if where is None else [*where[0], *where[1]]
    read = {"how": how, "first": first, "where": masks, "places": ((site, layer),)}
    x = pool(model, (), texts, **read).raw[site, layer]  # type: ignore[arg-type]
    a, b = np.split(x.astype(np.float64), [len(positive)])
    mean = a.mean(0) - b.mean(0)
    vector = mean
    if method == "pca":
        moves = a - b
        component = np.linalg.svd(moves, full_matrices=False)[2][0]
        along = moves @ component
        vector = component * np.sign(along.mean() or 1.0) * np.abs(along).mean()
    if method == "probe":
        scale, y = typical_scale(x), np.r_[np.ones(len(a)), np.zeros(len(b))]
        w = fit_logistic((x * scale)[None], y[None], 1.0).w[0, 0]
        vector = w * (mean @ w) / (w @ w)
    if not np.any(vector):
        raise InputError("both sides have the same activations here: there is no direction")
    made = {
        "method": {"mean": "difference of means"}.get(method, method),
        "model": model.config.name,
        "positive": len(positive),
        "negative": len(negative),
        "read": ("mean" if how == "mean" else f"token {how}") + " of some" * (where is not None),
    }
    norm = float(np.median(np.linalg.norm(x, axis=1)))
    return SteeringVector(vector.astype(np.float32), site, layer, norm, made)


def check_place(model: Model, site: str, layer: int) -> None:
    """Raise `InputError` unless the model has this site inside this layer."""
    site_width(model.config, site)
    if not 0 <= layer < model.config.layers:
        raise InputError(f"layer {layer}: {model.config.name} has 0 to {model.config.layers - 1}")


def train_vector(
    model: Model,
    positive: Sequence[np.ndarray],
    negative: Sequence[np.ndarray],
    site: str,
    layer: int,
    *,
    strength: float = 0.3,
    steps: int = 40,
    batch: int = 8,
    context: int = 48,
    learning_rate: float = 0.05,
    seed: int = 0,
) -> SteeringVector:
    """A trained direction of rank 1: added to every token but `<bos>`, it makes the `positive`
    texts (int ids [n], `<bos>` first) likelier and the `negative` ones less likely.

    strength  the length of what is added, in norms of each token's activation, as in "add" with
              in_norms: the direction alone is trained
    context   tokens of a text that are used
    The loss is -log sigmoid(a - b), where a and b are how much the mean log-probability of a token
    rises on a positive and on a negative text (the preference objective of RePS, Wu et al. 2025,
    2505.20809, without its suppression half). Adam on a unit vector, starting at the difference of
    means. Raises `InputError` as `contrast_vector` does.
    """
    start = contrast_vector(model, positive, negative, site, layer)
    rng = np.random.default_rng(whole_number("seed", seed, 0))
    cut = lambda texts: [np.asarray(ids)[:context] for ids in texts if len(ids) > 1]
    sides = cut(positive), cut(negative)
    if not all(sides):
        raise InputError("training a vector needs texts of at least two tokens on both sides")
    width = bucket(max(len(ids) for side in sides for ids in side), context)
    place, optimizer = (site, layer), optax.adam(learning_rate)
    vector = jnp.asarray(start.vector / np.linalg.norm(start.vector))
    state, value = optimizer.init(vector), 0.0
    progress = Progress(whole_number("steps", steps, 1), "steps", what="training a vector")
    for n in range(steps):
        some = ([side[i] for i in rng.integers(len(side), size=batch)] for side in sides)
        pair = tuple(padded(rows, batch, width) for rows in some)
        slope, value = _slope(vector, model, pair, np.float32(strength), place=place)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            change, state = optimizer.update(slope, state, vector)
        vector = optax.apply_updates(vector, change)
        vector = vector / jnp.linalg.norm(vector)
        progress.at(n + 1)
    made = {**start.made, "method": "rank-1, trained", "steps": steps, "loss": float(value)}
    return SteeringVector(np.asarray(vector, np.float32), site, layer, start.norm, made)


@tokenwise
def add_in_norms(x, ctx: Context, direction: jax.Array, strength: jax.Array):
    """x + strength |x| direction, at every token but `<bos>`."""
    norm = jnp.linalg.norm(float32(x), axis=-1, keepdims=True)
    moved = float32(x) + strength * norm * direction[None, None, :]
    return jnp.where(token_mask(ctx, x, 1), moved.astype(x.dtype), x)


@partial(jax.jit, static_argnames="place")
def _slope(vector, model: Model, pair, strength, *, place):
    """The gradient and the value of the preference loss of a batch of positives and negatives."""

    def rise(vector, batch):
        direction = vector / jnp.linalg.norm(vector)
        steered = write(*place, add_in_norms, direction, strength)
        return _mean_log_p(model, batch, (steered,)) - _mean_log_p(model, batch, ())

    def loss(vector):
        return -jax.nn.log_sigmoid(rise(vector, pair[0]) - rise(vector, pair[1])).mean()

    value, slope = jax.value_and_grad(loss)(vector)
    return slope, value


def _mean_log_p(model: Model, batch: TokenBatch, items) -> jax.Array:
    """The mean log-probability of the tokens after the first of each row: [B]."""
    logits = forward(model, batch, items).logits[:, :-1]
    following = batch.tokens[:, 1:, None]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), following, -1)[..., 0]
    used = float32(batch.segments[:, 1:] > 0)
    return (chosen * used).sum(1) / jnp.maximum(used.sum(1), 1.0)
