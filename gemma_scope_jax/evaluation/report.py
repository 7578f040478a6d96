"""Core results for people: tables for one coder or several, and plots.

All of it is made from the documents of `core.py`, so that results of other days and machines can be
compared.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.errors import shown
from gemma_scope_jax.evaluation.results import LOSS_TOKENS, UNDEFINED
from gemma_scope_jax.storage.atomic import write_bytes
from gemma_scope_jax.storage.paths import folder_path

Result = Mapping[str, Any]

# categories of SAEBench's metrics
QUALITY, MISC = "reconstruction_quality", "misc_metrics"
LOSS, BEHAVIOR = "model_performance_preservation", "model_behavior_preservation"
# (heading, category, metric, format)
FIGURES = (
    ("L0", "sparsity", "l0", ".1f"),
    ("L1", "sparsity", "l1", ",.1f"),
    ("FVU", QUALITY, "fvu", ".4f"),
    ("FVU of typical tokens", QUALITY, "fvu_typical", ".4f"),
    ("explained variance", QUALITY, "explained_variance", ".4f"),
    ("  per token (legacy)", QUALITY, "explained_variance_legacy", ".4f"),
    ("  scalar mean (SAEBench)", QUALITY, "explained_variance_scalar_mean", ".4f"),
    ("  about zero", QUALITY, "explained_variance_about_zero", ".4f"),
    ("  mean error forgiven", QUALITY, "explained_variance_of_the_rest", ".4f"),
    ("MSE, summed over D", QUALITY, "mse", ",.4g"),
    ("MSE per element", QUALITY, "mse_per_element", ",.4g"),
    ("cosine", QUALITY, "cossim", ".4f"),
    ("L2 ratio", "shrinkage", "l2_ratio", ".4f"),
    ("relative bias", "shrinkage", "relative_reconstruction_bias", ".4f"),
    ("delta loss, nats", LOSS, "delta_loss", "+.4f"),
    ("loss of the model", LOSS, "ce_loss_without_sae", ".4f"),
    ("  with the coder", LOSS, "ce_loss_with_sae", ".4f"),
    ("  with zeros", LOSS, "ce_loss_with_ablation", ".4f"),
    ("  with zeros, <bos> too", LOSS, "ce_loss_with_ablation_saelens", ".4f"),
    ("  with the mean", LOSS, "ce_loss_with_mean_ablation", ".4f"),
    ("CE score, zeros", LOSS, "ce_loss_score", ".4f"),
    ("CE score, SAELens", LOSS, "ce_loss_score_saelens", ".4f"),
    ("CE score, mean", LOSS, "ce_loss_score_mean_ablation", ".4f"),
    ("KL, nats", BEHAVIOR, "kl_div_with_sae", ".4f"),
    ("KL score, zeros", BEHAVIOR, "kl_div_score", ".4f"),
    ("KL score, SAELens", BEHAVIOR, "kl_div_score_saelens", ".4f"),
    ("KL score, mean", BEHAVIOR, "kl_div_score_mean_ablation", ".4f"),
    ("top-1 agreement", BEHAVIOR, "top1_agreement", ".4f"),
    ("never fired", MISC, "dead", ",d"),
    ("on over 10 % of tokens", MISC, "dense", ",d"),
    ("share of activity over 10 %", MISC, "normalized_freq_over_10_percent", ".4f"),
    ("features", MISC, "features", ",d"),
    ("max encoder cosine", MISC, "average_max_encoder_cosine_sim", ".4f"),
    ("max decoder cosine", MISC, "average_max_decoder_cosine_sim", ".4f"),
    ("tokens", "token_stats", "total_tokens_eval_sparsity_variance", ",d"),
    ("tokens of the losses", "token_stats", LOSS_TOKENS, ",d"),
)
COMPARED = ("L0", "FVU", "FVU of typical tokens", "cosine", "delta loss, nats", "CE score, zeros")
COMPARED += ("CE score, SAELens", "CE score, mean", "KL, nats", "top-1 agreement", "never fired")
COMPARED += ("on over 10 % of tokens",)
GROUP_COLUMNS = ("tokens", "l0", "fvu", "cosine", "loss_tokens", "loss", "delta_loss", "kl")
GROUP_COLUMNS += ("agreement",)
GROUP_FORMS = {"tokens": ",d", "loss_tokens": ",d", "l0": ".1f", "delta_loss": "+.4f"}  # else .4f
WIDE = 300  # characters of a line from which names of coders are not folded
PANELS = (
    (QUALITY, "fvu", "FVU", False),
    (LOSS, "delta_loss", "delta loss, nats", False),
    (LOSS, "ce_loss_score", "CE score (zero ablation)", True),
)


def figure(result: Result, category: str, metric: str) -> float | None:
    """A number of a document; None if it is missing or undefined."""
    metrics = result["eval_result_metrics"]
    value = metrics.get(category, {}).get(metric)
    signed = metric in ("delta_loss", "explained_variance_scalar_mean")  # may well be -1
    if category.startswith("model_") and not metrics["token_stats"][LOSS_TOKENS]:
        return None
    return None if value is None or (value == UNDEFINED and not signed) else value


def core_tables(results: Sequence[Result], width: int) -> list[Any]:
    """Tables for rich to print on lines of `width` characters: one coder's figures, or those of
    several coders side by side, then those of replacement models."""
    from rich.text import Text

    core = [r for r in results if r["eval_type_id"] == "core"]
    parts: list[Any] = []
    if len(core) == 1:
        parts += [Text(shown(short_name(core[0])), "bold"), *_figures(core[0])]
    elif core:
        chosen = [row for name in COMPARED for row in FIGURES if row[0] == name]
        rows = [
            [shown(short_name(result)), *(_cell(result, *row[1:]) for row in chosen)]
            for result in core
        ]
        longest = max(len(name) for name, *_ in rows)
        least = longest if width >= WIDE else min(longest, 48)
        headings = ["coder", *(row[0] for row in chosen)]
        parts.append(_table(headings, rows, 0, overflow="fold", min_width=least))
    for result in results:
        if result["eval_type_id"] == "replacement":
            members = result["eval_result_unstructured"]["coders"]
            parts += [Text(f"\nall {len(members)} in place at once", "bold"), *_figures(result)]
    return parts


def _figures(result: Result) -> Iterator[Any]:
    """All figures of a document, then those by position, source, role and layer."""
    from rich.text import Text

    for heading, *where in FIGURES:
        if cell := _cell(result, *where):
            yield Text(f"  {heading:30s} {cell:>14s}")
    more = result["eval_result_unstructured"]
    tables = {f"by {kind}": rows for kind, rows in more["groups"].items()}
    if layers := more.get("layers"):
        tables["by layer"] = [{"name": f"layer {row['layer']}", **row} for row in layers]
    for title, rows in tables.items():
        names = [n for n in GROUP_COLUMNS if any(row.get(n) is not None for row in rows)]
        form = lambda row, n: (
            "" if row.get(n) is None else format(row[n], GROUP_FORMS.get(n, ".4f"))
        )
        cells = [[_brief(shown(str(r["name"]))), *(form(r, n) for n in names)] for r in rows]
        yield Text("")
        yield _table([title, *(n.replace("_", " ") for n in names)], cells, 7, no_wrap=True)


def _table(headings: list[str], rows: list[list[str]], least: int, **first: Any) -> Any:
    """A table that never cuts its numbers: in a narrow terminal its lines are too long instead.

    least: the minimal width of a column of numbers; first: options of the first column.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column(headings[0], **first)
    for n, heading in enumerate(headings[1:], 1):
        wide = max([least, *(len(row[n]) for row in rows)])
        table.add_column(heading, justify="right", min_width=wide)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def core_doubts(results: Sequence[Result]) -> list[str]:
    """What is wrong with coders, a line for each fault."""
    found = ((r, r["eval_result_unstructured"].get("warnings") or ()) for r in results)
    return [shown(f"{short_name(r)}: {warning}") for r, warnings in found for warning in warnings]


def short_name(result: Result) -> str:
    """A coder's name without its release."""
    return str(result["sae_lens_id"])


def _cell(result: Result, category: str, metric: str, form: str) -> str:
    value = figure(result, category, metric)
    return "" if value is None else format(int(value) if form == ",d" else value, form)


def plot_core(result: Result, path: str | os.PathLike) -> None:
    """Plot one result's density histogram, and its figures by position; needs matplotlib."""
    more = result["eval_result_unstructured"]
    rows = more["groups"].get("position", [])
    known = lambda n: any(row.get(n) is not None for row in rows)
    labels = {"fvu": "FVU", "delta_loss": "delta loss, nats", "kl": "KL, nats"}
    panels = [[n for n in some if known(n)] for some in (("fvu",), ("delta_loss", "kl"))]
    panels = [some for some in panels if some]
    fig, (first, *others) = _figure(1 + len(panels), 4.5, 3.6)
    histogram = more["density_histogram"]
    edges, counts = histogram["log10_edges"], histogram["counts"]
    first.bar(edges[:-1], counts, width=edges[1] - edges[0], align="edge")
    used = [edge for edge, count in zip(edges, counts) if count]
    first.set_xlim(min(used, default=-4) - 0.5, 0.1)
    first.set(xlabel="log10 density", ylabel="features")
    first.set_title(f"{histogram['never']:,} never fired", fontsize=9)
    for axis, some in zip(others, panels):
        for n in some:
            given = [row for row in rows if row.get(n) is not None]
            axis.plot([r["name"] for r in given], [r[n] for r in given], "o-", label=labels[n])
        axis.set(xlabel="position in the piece of a document")
        axis.tick_params(axis="x", rotation=45)
        axis.legend(fontsize=8)
    fig.suptitle(short_name(result), fontsize=10)
    _save(fig, path)


def plot_pareto(results: Sequence[Result], path: str | os.PathLike) -> None:
    """Plot L0 against FVU, delta loss and CE score; a line joins the Pareto frontier."""
    fig, axes = _figure(len(PANELS), 5, 4)
    beside = {"fontsize": 6, "xytext": (3, 3), "textcoords": "offset points"}
    for axis, (category, metric, label, higher) in zip(axes, PANELS):
        points = []
        for r in results:
            x, y = figure(r, "sparsity", "l0"), figure(r, category, metric)
            if x is not None and y is not None:
                points.append((x, y))
                axis.plot(x, y, "o")
                axis.annotate(_brief(short_name(r)), (x, y), **beside)
        best = np.reshape(frontier(points, higher), (-1, 2)).T
        axis.plot(*best, "-", color="0.6", zorder=0)
        axis.set(xlabel="L0", ylabel=label, xscale="log")
    _save(fig, path)


def frontier(points: Sequence[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """The points that no other beats: as sparse and better, or sparser and as good."""
    sign = -1.0 if higher else 1.0
    best: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda p: (p[0], sign * p[1])):
        if not best or sign * y < sign * best[-1][1]:
            best.append((x, y))
    return best


def _brief(name: str) -> str:
    return name if len(name) <= 28 else "..." + name[-25:]


def _figure(panels: int, width: float, height: float) -> tuple[Any, Any]:
    """(figure, axes): panels side by side; without pyplot, which would keep the figure."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width * panels, height), layout="tight")
    return fig, fig.subplots(1, panels, squeeze=False)[0]


def _save(fig: Any, path: str | os.PathLike) -> None:
    image = io.BytesIO()
    fig.savefig(image, dpi=120, format="png")
    write_bytes(folder_path(path), image.getvalue())
