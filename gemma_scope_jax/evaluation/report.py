"""Core results for people: the cells of tables, of one coder or of several, and plots.

All of it is made from the documents of `core.py`, so that results of other days and machines can
stand beside each other.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemma_scope_jax.errors import shown
from gemma_scope_jax.evaluation.results import UNDEFINED
from gemma_scope_jax.storage.atomic import write_bytes
from gemma_scope_jax.storage.paths import folder_path

Result = Mapping[str, Any]

LOSS_TOKENS = "total_tokens_eval_reconstruction"
# (heading, category, metric, format)
FIGURES = (
    ("L0", "sparsity", "l0", ".1f"),
    ("L1", "sparsity", "l1", ",.1f"),
    ("FVU", "reconstruction_quality", "fvu", ".4f"),
    ("FVU of typical tokens", "reconstruction_quality", "fvu_typical", ".4f"),
    ("explained variance", "reconstruction_quality", "explained_variance", ".4f"),
    ("  per token (legacy)", "reconstruction_quality", "explained_variance_legacy", ".4f"),
    ("  scalar mean (SAEBench)", "reconstruction_quality", "explained_variance_scalar_mean", ".4f"),
    ("  about zero", "reconstruction_quality", "explained_variance_about_zero", ".4f"),
    ("  mean error forgiven", "reconstruction_quality", "explained_variance_of_the_rest", ".4f"),
    ("MSE, summed over D", "reconstruction_quality", "mse", ",.4g"),
    ("MSE per element", "reconstruction_quality", "mse_per_element", ",.4g"),
    ("cosine", "reconstruction_quality", "cossim", ".4f"),
    ("L2 ratio", "shrinkage", "l2_ratio", ".4f"),
    ("relative bias", "shrinkage", "relative_reconstruction_bias", ".4f"),
    ("delta loss, nats", "model_performance_preservation", "delta_loss", "+.4f"),
    ("loss of the model", "model_performance_preservation", "ce_loss_without_sae", ".4f"),
    ("  with the coder", "model_performance_preservation", "ce_loss_with_sae", ".4f"),
    ("  with zeros", "model_performance_preservation", "ce_loss_with_ablation", ".4f"),
    (
        "  with zeros, <bos> too",
        "model_performance_preservation",
        "ce_loss_with_ablation_saelens",
        ".4f",
    ),
    ("  with the mean", "model_performance_preservation", "ce_loss_with_mean_ablation", ".4f"),
    ("CE score, zeros", "model_performance_preservation", "ce_loss_score", ".4f"),
    ("CE score, SAELens", "model_performance_preservation", "ce_loss_score_saelens", ".4f"),
    ("CE score, mean", "model_performance_preservation", "ce_loss_score_mean_ablation", ".4f"),
    ("KL, nats", "model_behavior_preservation", "kl_div_with_sae", ".4f"),
    ("KL score, zeros", "model_behavior_preservation", "kl_div_score", ".4f"),
    ("KL score, SAELens", "model_behavior_preservation", "kl_div_score_saelens", ".4f"),
    ("KL score, mean", "model_behavior_preservation", "kl_div_score_mean_ablation", ".4f"),
    ("top-1 agreement", "model_behavior_preservation", "top1_agreement", ".4f"),
    ("never fired", "misc_metrics", "dead", ",d"),
    ("on over 10 % of tokens", "misc_metrics", "dense", ",d"),
    ("share of activity over 10 %", "misc_metrics", "normalized_freq_over_10_percent", ".4f"),
    ("features", "misc_metrics", "features", ",d"),
    ("max encoder cosine", "misc_metrics", "average_max_encoder_cosine_sim", ".4f"),
    ("max decoder cosine", "misc_metrics", "average_max_decoder_cosine_sim", ".4f"),
    ("tokens", "token_stats", "total_tokens_eval_sparsity_variance", ",d"),
    ("tokens of the losses", "token_stats", LOSS_TOKENS, ",d"),
)
COMPARED = (
    "L0",
    "FVU",
    "FVU of typical tokens",
    "cosine",
    "delta loss, nats",
    "CE score, zeros",
    "CE score, SAELens",
    "CE score, mean",
    "KL, nats",
    "top-1 agreement",
    "never fired",
    "on over 10 % of tokens",
)
GROUP_FORMS = {
    "tokens": ",d",
    "l0": ".1f",
    "fvu": ".4f",
    "cosine": ".4f",
    "loss_tokens": ",d",
    "loss": ".4f",
    "delta_loss": "+.4f",
    "kl": ".4f",
    "agreement": ".4f",
}
WIDE = 300  # characters of a line from which nothing need be folded
PANELS = (
    ("reconstruction_quality", "fvu", "FVU", False),
    ("model_performance_preservation", "delta_loss", "delta loss, nats", False),
    ("model_performance_preservation", "ce_loss_score", "CE score (zero ablation)", True),
)


def figure(result: Result, category: str, metric: str) -> float | None:
    """A number of a document; None if it has none."""
    metrics = result["eval_result_metrics"]
    value = metrics.get(category, {}).get(metric)
    signed = metric in ("delta_loss", "explained_variance_scalar_mean")  # may well be -1
    if category.startswith("model_") and not metrics["token_stats"][LOSS_TOKENS]:
        return None
    return None if value is None or (value == UNDEFINED and not signed) else value


def core_tables(results: Sequence[Result], width: int) -> list[Any]:
    """The figures of one coder's document, or of several side by side, and those of replacement
    models below, for rich to print on lines of `width` characters."""
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
    """All that a document has, then its figures by position, source, role and layer."""
    from rich.text import Text

    for heading, *where in FIGURES:
        if cell := _cell(result, *where):
            yield Text(f"  {heading:30s} {cell:>14s}")
    more = result["eval_result_unstructured"]
    tables = {f"by {kind}": rows for kind, rows in more["groups"].items()}
    if layers := more.get("layers"):
        tables["by layer"] = [{"name": f"layer {row['layer']}", **row} for row in layers]
    for title, rows in tables.items():
        names = [name for name in GROUP_FORMS if any(row.get(name) is not None for row in rows)]
        form = lambda row, n: "" if row.get(n) is None else format(row[n], GROUP_FORMS[n])
        cells = [[_brief(shown(str(r["name"]))), *(form(r, n) for n in names)] for r in rows]
        yield Text("")
        yield _table([title, *(n.replace("_", " ") for n in names)], cells, 7, no_wrap=True)


def _table(headings: list[str], rows: list[list[str]], least: int, **first: Any) -> Any:
    """A table with none of its numbers cut: in a narrow terminal its lines are too long instead.

    least: characters of a column of numbers; first: options of the first column.
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
    """What is wrong with coders, a line each."""
    return [
        shown(f"{short_name(result)}: {warning}")
        for result in results
        for warning in result["eval_result_unstructured"].get("warnings") or ()
    ]


def short_name(result: Result) -> str:
    """A coder's name without its release."""
    return str(result["sae_lens_id"])


def _cell(result: Result, category: str, metric: str, form: str) -> str:
    value = figure(result, category, metric)
    return "" if value is None else format(int(value) if form == ",d" else value, form)


# -------------------------------------------------------------------------------------------------
# Plots


def plot_core(result: Result, path: str | os.PathLike) -> None:
    """Density histogram, and figures by position, of one result; needs matplotlib."""
    plt = _matplotlib()
    more = result["eval_result_unstructured"]
    rows = more["groups"].get("position", [])
    panels = [
        [(n, label) for n, label in some if any(row.get(n) is not None for row in rows)]
        for some in ([("fvu", "FVU")], [("delta_loss", "delta loss, nats"), ("kl", "KL, nats")])
    ]
    panels = [some for some in panels if some]
    fig, axes = plt.subplots(
        1, 1 + len(panels), figsize=(4.5 * (1 + len(panels)), 3.6), squeeze=False
    )
    first, *others = axes[0]
    histogram = more["density_histogram"]
    edges, counts = histogram["log10_edges"], histogram["counts"]
    first.bar(edges[:-1], counts, width=edges[1] - edges[0], align="edge")
    used = [edge for edge, count in zip(edges, counts) if count]
    first.set_xlim(min(used, default=-4) - 0.5, 0.1)
    first.set(xlabel="log10 density", ylabel="features")
    first.set_title(f"{histogram['never']:,} never fired", fontsize=9)
    for axis, some in zip(others, panels):
        for name, label in some:
            known = [row for row in rows if row.get(name) is not None]
            axis.plot([r["name"] for r in known], [r[name] for r in known], "o-", label=label)
        axis.set(xlabel="position in the piece of a document")
        axis.tick_params(axis="x", rotation=45)
        axis.legend(fontsize=8)
    fig.suptitle(short_name(result), fontsize=10)
    _save(plt, fig, path)


def plot_pareto(results: Sequence[Result], path: str | os.PathLike) -> None:
    """L0 against FVU, delta loss and CE score; a line joins what nothing else beats in both."""
    plt = _matplotlib()
    fig, axes = plt.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 4))
    for axis, (category, metric, label, higher) in zip(axes, PANELS):
        points = [
            (figure(r, "sparsity", "l0"), figure(r, category, metric), short_name(r))
            for r in results
        ]
        known = [(x, y, name) for x, y, name in points if x is not None and y is not None]
        for x, y, name in known:
            axis.plot(x, y, "o")
            axis.annotate(
                _brief(name), (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points"
            )
        best = frontier([(x, y) for x, y, _ in known], higher)
        axis.plot([x for x, _ in best], [y for _, y in best], "-", color="0.6", zorder=0)
        axis.set(xlabel="L0", ylabel=label, xscale="log")
    _save(plt, fig, path)


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


def _matplotlib() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, fig: Any, path: str | os.PathLike) -> None:
    image = io.BytesIO()
    fig.tight_layout()
    fig.savefig(image, dpi=120, format="png")
    plt.close(fig)
    path = folder_path(path)
    write_bytes(path, image.getvalue())
