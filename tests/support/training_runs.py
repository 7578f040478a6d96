"""Recipes of small runs, the words they train on, and what a run of every kind of coder left."""

import dataclasses

import jax
import numpy as np

from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.training.recipe import CoderConfig, LossConfig, OptimizerConfig, TrainConfig

MODEL = PRESETS["gemma-3-270m"]


LOSS = LossConfig(l0_warmup=20, per_token=False, dead_after=3, dead_below=0.5)


TRANSCODER = dict(reads="mlp_in", writes="mlp_out")


WORDS = ("one", "two", "three", "four", "five", "six", "seven")


def documents(count=80):
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 60))) for _ in range(count)]


def coder(layers=3, **options):
    """A coder that a few dozen updates can train."""
    common = dict(width=64, target_l0=8, activation="jumprelu", loss=LOSS)
    return CoderConfig(layers, **common | options)


def recipe(*coders, **options):
    """A run of 30 passes: those that fill the buffer, then some with three updates each."""
    common = dict(
        coders=coders,
        tokens=128 * 30,
        batch_size=4,
        context_size=32,
        buffer=512,
        train_batch_size=128,
        updates=3,
        optimizer=OptimizerConfig(3e-3, 10, 0.0),
        checkpoint_every=1e9,
        model="tiny",
        sparse=0.0,
    )
    return TrainConfig(**common | options)


def run_by_hand(w, n, config, x):
    """Features [X, B, F] and reconstructions [X, B, E] of x in training units, float64."""
    a = jax.tree.map(lambda v: np.asarray(v, np.float64)[n], w)
    f, y = [], []
    for i in range(len(x)):
        rows = x[i] - a.b_dec[i] if config.apply_b_dec_to_input else x[i]
        z = rows @ a.w_enc[i].T + a.b_enc[i]
        f.append(z * (z > a.threshold[i]))
        y.append(sum(f[k] @ a.w_dec[i][k] for k in range(i + 1)) + a.b_dec[i])
        if a.w_skip is not None:
            y[i] = y[i] + x[i] @ a.w_skip[i]
    return np.stack(f), np.stack(y)


EVERY_KIND = (
    coder(3),
    coder(4),
    coder(2, skip=True, **TRANSCODER),
    coder((3, 4), activation="batch_topk", prefixes=(8, 32), name="nested"),
    coder((0, 1), skip=True, **TRANSCODER),
    coder(3, reads="z", activation="topk"),
)


NAMES = {
    "resid_post/layer_3_width_64_l0_8": "sae",
    "resid_post/layer_4_width_64_l0_8": "sae",
    "transcoder/layer_2_width_64_l0_8_affine": "skip_transcoder",
    "nested": "crosscoder",
    "clt/layer_0_1_width_64_l0_8_affine": "clt",
    "attn_out/layer_3_width_64_l0_8_topk": "sae",
}


@dataclasses.dataclass
class Finished:
    config: TrainConfig
    folder: object
    coders: dict
    log: list
    compiled: list  # names of the programs


def reconstruction(coder, config, activations):
    """(FVU, mean L0) over all layers, each layer's activations at unit mean squared norm."""

    def rows(site):
        return np.stack([activations[site, i] for i in config.layer_tuple])

    x, y = rows(config.reads), rows(config.target)
    out = coder.reconstruct(x if config.is_multi_layer else x[0])
    f = np.asarray(coder.encode(x if config.is_multi_layer else x[0]))
    l0 = (f > 0).sum((0, 2)).mean() if config.is_multi_layer else (f > 0).sum(-1).mean()
    scale = np.sum(y**2, -1).mean(-1)
    error = (np.sum((y - np.asarray(out).reshape(y.shape)) ** 2, -1).mean(-1) / scale).sum()
    variance = (np.sum((y - y.mean(1, keepdims=True)) ** 2, -1).mean(-1) / scale).sum()
    return error / variance, l0
