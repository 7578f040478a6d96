"""An `Inspection` as tables for a terminal."""

from typing import Any

from gemma_scope_jax.cards.labels import Label
from gemma_scope_jax.inspection.inspect_text import Inspection

TOKEN_WIDTH = 24  # of the column of tokens, at most
GAP = 2  # between columns


def visible(token: str) -> str:
    """A token on one line: line breaks and tabs as symbols, other control characters escaped."""
    signs = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(signs.get(c, c if c.isprintable() else repr(c)[1:-1]) for c in token)


def label_text(label: Label, width: int = 60) -> str:
    """One line of label material: the explanation, or else an example; and the logit tokens."""
    words = ", ".join(visible(t).strip() or visible(t) for t in label["top_logits"][:4])
    if "explanation" in label:
        text = visible(label["explanation"])
        return f"{text if len(text) < width else text[: width - 1] + '…'} · {words}"
    if not label["examples"]:
        return words
    example = label["examples"][0]
    peak = max(range(len(example["values"])), key=example["values"].__getitem__)
    tokens = [visible(t) for t in example["tokens"]]
    before, after = "".join(tokens[:peak]), "".join(tokens[peak + 1 :])
    room = max(10, width - len(words) - len(tokens[peak]) - 8)
    snippet = f"{before[-room * 2 // 3 :]}[{tokens[peak]}]{after[: room // 3]}".strip()
    return f"{words} · {snippet}"


def figure_lines(figures: dict) -> list[str]:
    """L0, FVU and delta loss in words; n/a if undefined, as one token has no variance."""
    number = lambda value, form: "n/a" if value is None else format(value, form)
    losses = figures["loss"] or {}
    return [
        f"L0 {number(figures['l0'], '.1f')} active features a token",
        f"FVU {number(figures['fvu'], '.3f')} of the variance unexplained "
        f"({number(figures['typical']['fvu'], '.3f')} without outlier tokens)",
        f"delta loss {number(figures['delta_loss'], '+.3f')} nats a token on reconstructions "
        f"({number(losses.get('clean'), '.3f')} -> {number(losses.get('spliced'), '.3f')})",
    ]


def inspection_tables(seen: Inspection, width: int) -> list[Any]:
    """Next tokens, features of each token and metrics, for rich; `width` in characters."""
    from rich.table import Table
    from rich.text import Text

    place = seen.reads if seen.reads == seen.writes else f"{seen.reads} -> {seen.writes}"
    following = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for column in ("left", "right", "right"):
        following.add_column(justify=column)  # type: ignore[arg-type]
    for n in seen.next[:5]:
        following.add_row(
            Text(repr(n.token)), Text(f"{100 * n.probability:.1f} %"), Text(f"logit {n.logit:.2f}")
        )
    return [
        Text(f"{seen.model} · {place} of layer {seen.layer} · {seen.width:,} features", "bold"),
        Text(seen.coder, "dim"),
        Text("\nNext token", "bold"),
        following,
        Text("\nFeatures, token by token", "bold"),
        _features_table(seen, width),
        Text(""),
        *map(Text, figure_lines(seen.figures)),
    ]


def _features_table(seen: Inspection, width: int) -> Any:
    """One row per token and feature. Labels get the remaining width: left alone, rich would shrink
    all columns of a line that is too long, numbers and tokens included."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    rows: list[tuple[str, str, str, str]] = []
    for position, (token, features) in enumerate(zip(seen.tokens, seen.features)):
        name = visible(token)
        if not features:
            reason = "not read by the coder" if position < seen.first else "no feature is active"
            rows.append((name, "", "", reason))
        for feature, activation in features:
            label = label_text(seen.labels[feature], 76)
            rows.append((name, str(feature), f"{activation:,.0f}", label))
            name = ""
    columns = ("token", "feature", "activation", "raises · strongest in")
    table = Table(box=None, padding=(0, GAP, 0, 0), header_style="dim")
    left = width - GAP
    for title, cells in zip(columns[:3], zip(*rows)):
        size = min(max(map(cell_len, (title, *cells))), TOKEN_WIDTH)
        side = "left" if title == "token" else "right"
        table.add_column(title, no_wrap=True, max_width=size, justify=side)
        left -= size + GAP
    table.add_column(columns[3], no_wrap=True, overflow="ellipsis", max_width=max(left, 8))
    for token, feature, activation, label in rows:
        table.add_row(Text(token, "bold"), feature, activation, Text(label, "dim"))
    return table
