"""The tables of benchmarks/circuits.py: one for each part, a row a kind of prompt.

Figures are means over prompts with their 95 % bootstrap intervals, where nothing else is said.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from table import table

ORDERS = ("total", "direct", "largest", "place", "random")
SHOWN = 20  # features ablated together, in the table with a row a kind
FEWEST = 5  # prompts that have an interval
MOST_OF = 0.95  # the share of prompts that a number of features needs to have a row
HEADINGS = {"direct": "direct", "attention": "attention frozen", "nothing": "nothing frozen"}
MARKED = re.compile(r"(<!-- circuits: ([^>]+) -->\n).*?(<!-- end -->)", re.S)
START = re.compile(r'"(.*?)" at \d+ ->')  # of a path that starts at a token


def interval(values: Iterable[Any], statistic: Callable[..., Any] = np.mean) -> str:
    """A statistic over prompts with its 95 % bootstrap interval; None is left out."""
    x = np.array([v for v in values if v is not None], float)
    if not len(x):
        return ""
    if len(x) < FEWEST:
        return figure(float(statistic(x)))
    drawn = np.random.default_rng(0).integers(0, len(x), (2000, len(x)))
    found, whole = statistic(x[drawn], axis=1), statistic(x)
    if np.isnan(whole):
        return ""
    spread = np.quantile(found[~np.isnan(found)], (0.025, 0.975), method="nearest")
    middle, low, high = (figure(v) for v in (whole, *spread))
    return f"{middle} [{low}, {high}]"


def figure(value: float) -> str:
    if not math.isfinite(value):
        return "more"  # than the cap
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def changes(line: dict, freeze: str, order: str) -> np.ndarray:
    """Changes of the difference [orders, counts]: several for "random", else one."""
    found = line["ablation"][freeze]
    return np.array([found[name] for name in found if name.startswith(order)], float)


def flips(line: dict, freeze: str, order: str) -> list[float]:
    """Of each order the least number of features that turn the preference; inf beyond the cap."""
    counts = line["ablation"]["counts"]
    return [fewest(line, counts, row) for row in changes(line, freeze, order)]


def fewest(line: dict, counts: Sequence[int], changes: Iterable[float]) -> float:
    """The least of the counts at which the preference has turned; inf if at none."""
    turned = line["behaviour"]["difference"] + np.array(changes) < 0
    return float(counts[turned.argmax()]) if turned.any() else math.inf


def share_lost(line: dict, freeze: str, order: str, count: int) -> float | None:
    """The change as a share of the difference, after `count` features; None beyond the cap."""
    if count not in line["ablation"]["counts"]:
        return None
    at = line["ablation"]["counts"].index(count)
    before = line["behaviour"]["difference"]
    if order == "predicted":
        return -line["ablation"]["predicted"][at] / before
    return -float(changes(line, freeze, order)[:, at].mean()) / before


def right(lines: list[dict]) -> list[dict]:
    """The prompts whose answer the model prefers to the foil."""
    return [line for line in lines if line["behaviour"]["difference"] > 0]


def graph_row(lines: list[dict]) -> dict:
    part = lambda name, i: interval(line["scores"][name][i] for line in lines)
    return {
        "prompts": str(len(lines)),
        "answer > foil": str(len(right(lines))),
        "answer first": str(sum(line["behaviour"]["before"] == 0 for line in lines)),
        "features": round(np.mean([line["scores"]["features"] for line in lines])),
        "replacement": part("whole", 0),
        "completeness": part("whole", 1),
        "nodes, pruned": round(np.mean([line["scores"]["nodes"] for line in lines])),
        "replacement, pruned": part("pruned", 0),
        "completeness, pruned": part("pruned", 1),
    }


def path_row(lines: list[dict]) -> dict:
    starts = [line["path"]["token"] for line in lines]
    counted = {
        "from a token": [start is not None for start in starts],
        "from the deciding token": [
            start is not None and line["key"].strip() in start for start, line in zip(starts, lines)
        ],
        "raises the answer": [line["path"]["raises"] for line in lines],
    }
    share = interval(line["path"]["share"] for line in lines)
    return {name: interval(map(float, of)) for name, of in counted.items()} | {"share": share}


def validation_row(lines: list[dict], of: str = "validation") -> dict:
    given = [line[of] for line in lines]

    def part(mode, a, i, statistic=np.mean):
        return interval((found[mode][a][i] for found in given if mode in found), statistic)

    others = {mode for found in given for mode in found} - set(HEADINGS)
    return {
        **{heading: part(mode, 0, 0) for mode, heading in HEADINGS.items()},
        **{mode: part(mode, 0, 0) for mode in sorted(others)},
        "random": part("nothing", 1, 0),
        "same sign": part("nothing", 0, 2),
        "random, same sign": part("nothing", 1, 2),
        "slope (median)": part("nothing", 0, 3, np.median),
        "R2 (median)": part("nothing", 0, 1, np.median),
        "downstream": part("nothing", 2, 0),
    }


def neuron_row(lines: list[dict]) -> dict:
    """`validation_row` of the graph of neurons, over the prompts that have one."""
    some = [line for line in lines if "neurons" in line]
    return {"prompts": str(len(some)), **validation_row(some, "neurons")}


def supernode_row(lines: list[dict]) -> dict:
    """How much of the answer the pruned graph's features of most influence carry alone."""
    some = [line["supernodes"] for line in lines if "supernodes" in line]
    row = {"prompts": str(len(some))}
    for most in some[0] if some else ():
        replacement, completeness, count = zip(*(found[most] for found in some))
        row |= {
            f"{most}: supernodes": f"{np.mean(count):.0f}",
            f"{most}: replacement": interval(replacement),
            f"{most}: completeness": interval(completeness),
        }
    return row


def flip_row(lines: list[dict]) -> dict:
    lines = right(lines)
    turned = lambda freeze, order: interval(
        float(np.mean(np.isfinite(flips(line, freeze, order)))) for line in lines
    )
    least = (flips(line, "nothing", "total")[0] for line in lines)
    return {
        "prompts": str(len(lines)),
        "predicted": interval(
            float(line["behaviour"]["difference"] + min(line["ablation"]["predicted"]) < 0)
            for line in lines
        ),
        **{order: turned("nothing", order) for order in ORDERS},
        "attention frozen: total": turned("attention", "total"),
        "attention frozen: place": turned("attention", "place"),
        "features (median)": interval(least, median),
    }


def reversal_row(lines: list[dict]) -> dict:
    """The share of prompts whose preference turns when features are set to their opposites."""
    lines = [line for line in right(lines) if "reversal" in line]

    least = lambda line, what: fewest(line, line["reversal"]["counts"], line["reversal"][what])
    turned = lambda what: interval(float(math.isfinite(least(line, what))) for line in lines)
    return {
        "prompts": str(len(lines)),
        **{what: turned(what) for what in ("predicted", "total", "place")},
        "features predicted (median)": interval((least(x, "predicted") for x in lines), median),
        "features (median)": interval((least(x, "total") for x in lines), median),
    }


def median(x: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The upper of the middle two, so that it is one of the values: some are infinite."""
    return np.sort(x, axis=-1)[..., x.shape[-1] // 2]


def change_row(lines: list[dict], count: int = SHOWN) -> dict:
    lines = right(lines)
    share = lambda freeze, order: [share_lost(line, freeze, order, count) for line in lines]
    predicted, found = share("nothing", "predicted"), share("nothing", "total")
    both = [(a, b) for a, b in zip(predicted, found) if a is not None]
    return {
        "predicted": interval(predicted),
        "total": interval(found),
        "attention frozen: total": interval(share("attention", "total")),
        "direct": interval(share("nothing", "direct")),
        "largest": interval(share("nothing", "largest")),
        "place": interval(share("nothing", "place")),
        "random": interval(share("nothing", "random")),
        "correlation": interval(both, correlation),
    }


def correlation(pairs: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Spearman's of predicted and measured over prompts: pairs [..., prompts, 2]."""
    ranks = np.argsort(np.argsort(pairs, axis=-2), axis=-2).astype(float)
    ranks -= ranks.mean(-2, keepdims=True)
    one, two = ranks[..., 0], ranks[..., 1]
    with np.errstate(invalid="ignore"):  # one prompt has no correlation
        return (one * two).sum(-1) / np.sqrt((one**2).sum(-1) * (two**2).sum(-1))


def ladder_rows(lines: list[dict]) -> list[dict]:
    """A row a number of features, over the prompts of every kind that have so many."""
    rows = []
    for count in sorted({k for line in lines for k in line["ablation"]["counts"]}):
        some = [line for line in right(lines) if count in line["ablation"]["counts"]]
        if len(some) >= MOST_OF * len(right(lines)):
            rows.append(
                {"features": str(count), "prompts": str(len(some)), **change_row(some, count)}
            )
    return rows


PARTS: dict[str, Callable[[list[dict]], dict]] = {
    "Graphs": graph_row,
    "Strongest path": path_row,
    "Supernodes": supernode_row,
    "One feature at a time": validation_row,
    "One neuron at a time": neuron_row,
    f"{SHOWN} features together": change_row,
    "Preference turned": flip_row,
    "Features reversed": reversal_row,
}


def summary(lines: list[dict]) -> tuple[dict[str, str], dict[str, Any]]:
    """A Markdown table for each part by its heading, and the figures of all prompts."""
    kinds: dict[str, list[dict]] = {}
    for line in lines:
        kinds.setdefault(line["kind"], []).append(line)
    tables = {}
    for heading, row in PARTS.items():
        rows = [{"kind": kind.replace("_", " "), **row(some)} for kind, some in kinds.items()]
        tables[heading] = table([*rows, {"kind": "all", **row(lines)}])
    tables["More and more features together"] = table(ladder_rows(lines))
    mean = lambda values: float(np.mean([v for v in values if v is not None] or [np.nan]))
    real = lambda line: line.get("validation", {}).get("nothing", [[None], [None]])
    whole = [line["neurons"] for line in lines if "neurons" in line]
    turned = lambda order: mean(
        np.isfinite(flips(line, "nothing", order)).mean() for line in right(lines)
    )
    return tables, {
        "prompts": len(lines),
        "right": len(right(lines)),
        "replacement": mean(line["scores"]["whole"][0] for line in lines),
        "completeness": mean(line["scores"]["whole"][1] for line in lines),
        "spearman": mean(real(line)[0][0] for line in lines),
        "spearman_neurons": mean(real({"validation": found})[0][0] for found in whole),
        "spearman_random": mean(real(line)[1][0] for line in lines),
        **{f"turned_{order}": turned(order) for order in ORDERS},
        "seconds": float(np.median([sum(line["seconds"].values()) for line in lines])),
    }


def renewed(page: str, tables: Mapping[str, str]) -> str:
    """A page with its tables, which stand between `<!-- circuits: HEADING -->` and `<!-- end -->`,
    made anew."""
    return MARKED.sub(lambda m: f"{m[1]}{tables[m[2]]}{m[3]}", page)
