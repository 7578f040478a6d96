"""The figures of a saved coder: loaded back from its folder, on tokens that were not trained on.

Training measures a coder in its own units and, with BatchTopK, as another function than the saved
one. Here the files are measured, with the definitions of `evaluate`: with y what a coder writes and
r its error, FVU = E|r|^2 / (E|y|^2 - |E y|^2), the mean over layers; "typical" leaves out tokens
above `OUTLIER` median norms. L0 is over all layers, as in the recipe.
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.coders.load import load_coder
from gemma_scope_jax.coders.release.files import save_coder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.atomic import write_text
from gemma_scope_jax.training.log import finite, read_log
from gemma_scope_jax.training.state import Sites

LOG = logging.getLogger(__name__)
OUTLIER = 3.0
TOKENS = 256  # encoded at a time
USELESS = 1.0  # FVU from which the mean activation is as good as the coder
Figures = dict[str, Any]  # numbers by name; null where they were not finite


def measure(coder: Coder, sites: Sites, layers: dict[str, tuple[int, ...]]) -> Figures:
    """L0 (mean and largest, over all layers), FVU and typical FVU on raw activations.

    sites: {site: [L, n, D]}, at the `layers` of each site. {"tokens": 0} if n is 0.
    """

    def rows(site: str) -> np.ndarray:
        at = [layers[site].index(layer) for layer in coder.layers]
        return np.asarray(sites[site])[at].astype(np.float32)

    x, y = rows(coder.reads), rows(coder.writes)
    n = x.shape[1]
    if not n:
        return {"tokens": 0}
    parts = list(_parts(coder, x))
    active = np.concatenate([a for a, _ in parts])
    wide = y.astype(np.float64)
    error = np.square(wide - np.concatenate([back for _, back in parts], 1)).sum(-1)  # [X, n]
    spread = lambda of: np.square(of - of.mean(0)).sum()
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        norms = np.linalg.norm(wide, axis=-1)
        usual = norms <= OUTLIER * np.median(norms, axis=1, keepdims=True)
        fvu = [error[i].sum() / spread(wide[i]) for i in range(len(y))]
        typical = [error[i][u].sum() / spread(wide[i][u]) for i, u in enumerate(usual)]
    figures = {
        "l0": float(active.mean()),
        "l0_largest": float(active.max()),
        "fvu": float(np.mean(fvu)),
        "fvu_typical": float(np.mean(typical)),
    }
    return {"tokens": n} | {k: float(f"{v:.6g}") for k, v in figures.items()}


def _parts(coder: Coder, x: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(active features [m], reconstructions float64 [X, m, D]) of parts of x [X, n, D]."""
    for start in range(0, x.shape[1], TOKENS):
        some = x[:, start : start + TOKENS]
        size = some.shape[1]
        rest = min(TOKENS, x.shape[1]) - size
        active, back = _run(coder, np.pad(some, ((0, 0), (0, rest), (0, 0))))
        yield np.asarray(active)[:size], np.asarray(back, np.float64)[:, :size]


@jax.jit
def _run(coder: Coder, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    f = coder.encode(x)
    return jnp.sum(f > 0, (0, -1), dtype=jnp.int32), coder.decode(f, x)


def save_measured(
    found: dict[str, Coder],
    folder: epath.Path,
    sites: Sites,
    layers: dict[str, tuple[int, ...]],
    apart: bool,
) -> tuple[dict[str, Figures], list[str]]:
    """Save coders below a folder, by name, then measure each as loaded back. That happens on the
    host: a single device may be too small for a coder.

    sites, layers: see `measure`; `apart`: whether those tokens were not trained on. Returns the
    figures by name, and a line for each coder that was not saved as its weights are NaN.
    """
    saved, refused = {}, {}
    for name, coder in found.items():
        try:
            save_coder(coder, folder / name)
        except InputError as error:
            if "NaN" not in str(error):
                raise
            refused[name] = f"{name}: {error}"
    try:
        host = jax.default_device(jax.devices("cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        host = contextlib.nullcontext()
    with host:
        for name in (name for name in found if name not in refused):
            loaded = load_coder(os.fspath(folder / name), decoder=True)
            saved[name] = measure(loaded, sites, layers) | {"held_out": apart}
            LOG.info("%s", said(name, saved[name]))
            if why := doubt(saved[name]):
                LOG.warning("%s: %s", name, why)
    return saved, list(refused.values())


def log_saved(log: epath.Path, tokens: int, saved: dict[str, Figures]) -> None:
    """Put the figures of saved coders, by name, into the last row of log.jsonl."""
    rows = read_log(log) if log.exists() else []
    row = rows[-1][1] if rows else {"tokens": tokens, "coders": {}}
    last = json.dumps(finite(row | {"saved": saved}), allow_nan=False) + "\n"
    write_text(log, "".join(line for line, _ in rows[:-1]) + last)


def said(name: str, figures: Figures) -> str:
    """The figures of a saved coder in a line for the terminal."""
    if not figures["tokens"]:
        return f"{name} as saved: not measured, for lack of tokens"
    on = "not trained on" if figures["held_out"] else "trained on"
    return (
        f"{name} as saved: FVU {figures['fvu']:.4g} ({figures['fvu_typical']:.4g} of typical "
        f"tokens), L0 {figures['l0']:.1f}, at most {figures['l0_largest']:.0f}, on "
        f"{figures['tokens']:,} tokens {on}"
    )


def doubt(figures: Figures) -> str:
    """What is wrong with a coder of these figures (they may come from the log), "" for nothing."""
    if not figures["tokens"]:
        return "it was measured on no token"
    fvu = math.inf if figures["fvu"] is None else figures["fvu"]
    if figures["l0"] == 0:
        return "no feature is active on any of the tokens it was measured on"
    if math.isfinite(fvu) and fvu < USELESS:
        return ""
    return f"its reconstruction is no better than the mean activation (FVU {fvu:.3g})"
