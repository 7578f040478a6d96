"""The model card of a finished coder: what it is, how it was trained, its curves and figures."""

import io
import json
import logging
import math
from operator import methodcaller
from typing import Any

from etils import epath

from gemma_scope_jax.errors import in_markdown
from gemma_scope_jax.storage.atomic import write_folder
from gemma_scope_jax.storage.strict_json import legible
from gemma_scope_jax.training.log import read_log
from gemma_scope_jax.training.measure import Figures, doubt
from gemma_scope_jax.training.recipe import CoderConfig, TrainConfig, as_json

LOG = logging.getLogger(__name__)
CURVES = (("fvu", "FVU of the batch"), ("l0", "L0"), ("dead", "share of dead features"))


def write_card(
    folder: epath.Path,
    name: str,
    config: TrainConfig,
    log: epath.Path,
    tokens: int,
    times: tuple[int, int] = (1, 1),
) -> None:
    """Write README.md, train_config.json and, with matplotlib, curves.png to the coder's folder.

    `tokens`: how many were read. `times`: how often the data were begun, and how often a store of
    activations holds its text.
    """
    rows = [row for _, row in read_log(log)] if log.exists() else []
    saved = rows[-1].get("saved", {}).get(name) if rows else None
    rows = [(row["tokens"], row["coders"][name]) for row in rows if name in row["coders"]]
    picture = _plot(rows)
    recipe = json.dumps(_public(as_json(config)), indent=1) + "\n"
    text = legible(_text(name, config, rows, tokens, times, saved, bool(picture)))
    files = {"train_config.json": recipe.encode(), "README.md": text.encode()}
    if picture:
        files["curves.png"] = picture
    write_folder(folder, {name: methodcaller("write", data) for name, data in files.items()})
    if not picture:  # of an earlier save
        (folder / "curves.png").unlink(missing_ok=True)


def _text(
    name: str,
    config: TrainConfig,
    rows: list[tuple[int, Figures]],
    tokens: int,
    times: tuple[int, int],
    saved: Figures | None,
    picture: bool,
) -> str:
    coder = next(c for c in config.coders if c.folder == name)
    where = ", ".join(map(str, coder.layer_tuple))
    files = _public(list(config.data.files))
    data = _public(config.store) or config.data.tfds or " ".join(files) or "a Python iterable"
    lines = [
        f"# {in_markdown(name)}",
        "",
        f"A sparse coder of `{config.model}`: reads `{coder.reads}` and writes `{coder.target}` of "
        f"layer {where}; {coder.width:,} features a layer, target L0 {coder.target_l0:g}.",
        "",
        f"Trained with gemma_scope_jax on {tokens:,} tokens of {in_markdown(data)}"
        f"{_again(*times)}; the whole recipe is in `train_config.json`. Read it with",
        "",
        "    gemma_scope_jax.load_coder(folder)",
        "",
        f"Positions before {config.first} of a text were not trained on.{_function(coder)}",
    ]
    if saved:
        lines += ["", *_as_saved(saved, config)]
    if rows:
        tokens, last = rows[-1]
        lines += ["", f"On the last training batches, at {tokens:,} tokens:", "", *_table(last)]
    if picture:
        lines += ["", "![curves](curves.png)"]
    return "\n".join(lines) + "\n"


def _public(value: Any) -> Any:
    """JSON with paths cut to their ends, "train/*.txt": a card is published with the coder, and the
    folders of this machine stay private."""
    if isinstance(value, dict):
        return {key: _public(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_public(v) for v in value]
    if isinstance(value, str) and value[:1] in ("/", "~"):
        return "/".join(value.rstrip("/").split("/")[-2:])
    return value


def _function(coder: CoderConfig) -> str:
    """The function of a coder that was not trained as a JumpReLU."""
    if coder.activation == "jumprelu":
        return ""
    if coder.k is not None:
        over = " over all layers together" if coder.is_multi_layer else ""
        return f" It keeps the {coder.k} largest features of each token{over} (`k` in config.json)."
    return (
        f" It was trained as {coder.activation} and saved as a JumpReLU coder with one threshold, "
        "another function, whose figures follow."
    )


def _as_saved(saved: Figures, config: TrainConfig) -> list[str]:
    """The figures of the coder in this folder, with a warning if they are bad."""
    what = f"not trained on (about {100 * config.held_share:.2g} % of the data are held out)"
    if not saved["held_out"]:
        what = "trained on: nothing is held out of little text, or of a text that a store repeats"
    lines = [f"As saved, loaded back and measured on {saved['tokens']:,} tokens that were {what}:"]
    lines += ["", *_table({k: v for k, v in saved.items() if k not in ("tokens", "held_out")})]
    if why := doubt(saved):
        lines += ["", f"**Warning: {why}.**"]
    return lines


def _table(figures: Figures) -> list[str]:
    said = ("not finite" if v is None else f"{v:.4g}" for v in figures.values())
    head = ["| " + " | ".join(figures) + " |", "|" + " --- |" * len(figures)]
    return [*head, "| " + " | ".join(said) + " |"]


def _again(read: int, held: int) -> str:
    """How often the same text was read, if more than once."""
    said = f", read {read} times over" if read > 1 else ""
    return said + (f" (the store holds its text {held} times over)" if held > 1 else "")


def _plot(rows: list[tuple[int, Figures]]) -> bytes | None:
    if len(rows) < 2:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        LOG.warning("no curves.png: it needs pip install 'gemma-scope-jax[track]'")
        return None
    figure: Any = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(CURVES)), CURVES):
        values = [parts[key] for _, parts in rows]
        axes.plot([t / 1e6 for t, _ in rows], values, lw=1)
        axes.set(title=title, xlabel="million tokens")
        later = values[len(values) // 50 :]  # the first few can be ten times the rest
        axes.set_ylim(0, 1.1 * max((v for v in later if math.isfinite(v)), default=0) or None)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110)
    return stream.getvalue()
