"""The model card of a finished coder: what it is, what made it, its curves and last figures."""

import io
import json
from typing import Any

from etils import epath

from gemma_scope_jax.buckets import write_bytes, write_text
from gemma_scope_jax.errors import in_markdown
from gemma_scope_jax.training.recipe import TrainConfig, as_json

CURVES = (("fvu", "FVU of the batch"), ("l0", "L0"), ("dead", "share of dead features"))


def write_card(
    folder: epath.Path, name: str, config: TrainConfig, log: epath.Path, tokens: int,
    times: tuple[int, int] = (1, 1),
) -> None:  # fmt: skip
    """README.md, train_config.json and, with matplotlib, curves.png in the coder's folder.

    `tokens`: how many were read in the end. `times`: how often the data were begun, and how often a
    store of activations held its text.
    """
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    rows = [(row["tokens"], row["coders"][name]) for row in rows if name in row["coders"]]
    write_text(folder / "train_config.json", json.dumps(as_json(config), indent=1) + "\n")
    picture = _plot(rows)
    if picture:
        write_bytes(folder / "curves.png", picture)
    write_text(folder / "README.md", _text(name, config, rows, tokens, times, bool(picture)))


def _text(name: str, config: TrainConfig, rows: list, tokens: int, times, picture: bool) -> str:
    coder = next(c for c in config.coders if c.folder == name)
    where = ", ".join(map(str, coder.layer_tuple))
    data = config.store or config.data.tfds or " ".join(config.data.files) or "a Python iterable"
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
        f"Positions before {config.first} of a text were not trained on.",
    ]
    if rows:
        tokens, last = rows[-1]  # of the last line of the log
        lines += ["", f"Of the last training batches, at {tokens:,} tokens:", ""]
        lines += ["| " + " | ".join(last) + " |", "|" + " --- |" * len(last)]
        lines += ["| " + " | ".join(f"{v:.4g}" for v in last.values()) + " |"]
    if picture:
        lines += ["", "![curves](curves.png)"]
    return "\n".join(lines) + "\n"


def _again(read: int, held: int) -> str:
    """How often the same text came, if it did more than once."""
    said = f", read {read} times over" if read > 1 else ""
    return said + (f" (the store holds its text {held} times over)" if held > 1 else "")


def _plot(rows: list) -> bytes | None:
    if len(rows) < 2:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curves.png: it needs matplotlib, pip install 'gemma-scope-jax[track]'")
        return None
    figure: Any = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(CURVES)), CURVES):
        values = [parts[key] for _, parts in rows]
        axes.plot([t / 1e6 for t, _ in rows], values, lw=1)
        axes.set(title=title, xlabel="million tokens")
        settled = max(values[len(values) // 50 :])  # the first few can be ten times the rest
        axes.set_ylim(0, 1.1 * settled if settled > 0 else None)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110)
    return stream.getvalue()
