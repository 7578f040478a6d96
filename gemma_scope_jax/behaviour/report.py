"""An audit as a page for a person who must sign it: one file, no script, no request.

Every text is escaped where it is written, and the page's policy allows no script, so nothing that a
model, a data set or a label says can act. It prints, and is read in light, dark and narrow windows.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma_scope_jax.behaviour.report_plots import axis_of, control_plot, interval_plot
from gemma_scope_jax.behaviour.results import Audit
from gemma_scope_jax.errors import shown
from gemma_scope_jax.web.pages import page_template

METHOD = {
    "pairs": "Both texts of each pair are read by the model; the log-probabilities of all tokens "
    "are summed. Nothing is generated.",
    "choices": "Each choice is read after its prompt; the log-probabilities of its tokens are "
    "summed, or averaged where figures say so. Nothing is generated.",
    "generate": "The model answers each prompt, always with its likeliest token, and the judge "
    "below says of each answer whether it shows the behaviour.",
}
CONTRAST = (
    "Features are chosen on one half of the items. All figures about them are of the other half; "
    "items about the same thing are in the same half. The alarm (family p) compares the largest "
    "difference among all features with those after the arms are shuffled."
)
MEDIATION = (
    "The features found are set to 0 while held-out items are measured again; so are sets of as "
    "many random features that fire as often and write as much."
)


def audit_page(done: Audit) -> str:
    """The page as HTML."""
    title = f"{done.suite['name']} · {done.model['name']}"
    before, rest = page_template(__package__, "report.html").split("{{title}}")
    middle, after = rest.split("{{body}}")
    return before + _text(title) + middle + _body(done) + after


def _text(value: Any) -> str:
    """A text that is safe in HTML; control characters and overrides of direction are visible."""
    return html.escape(shown(str(value), keep="\n\t"), quote=True)


def _tag(name: str, inside: str, **attributes: str) -> str:
    """An element; `inside` is HTML, attributes are text (`class_`: class)."""
    given = "".join(f' {k.rstrip("_")}="{_text(v)}"' for k, v in attributes.items())
    return f"<{name}{given}>{inside}</{name}>"


def _section(heading: str, *parts: str) -> str:
    return _tag("section", _tag("h2", _text(heading)) + "".join(parts))


def _paragraph(text: str, **attributes: str) -> str:
    return _tag("p", _text(text), **attributes)


def _list(lines: Iterable[str]) -> str:
    return _tag("ul", "".join(_tag("li", _text(line)) for line in lines), class_="lines")


def _body(done: Audit) -> str:
    suite = done.suite
    head = _tag("h1", _text(suite["question"]))
    place = f"{suite['name']} · {done.model['name']} ({done.model['dtype']}) · {done.coder['name']}"
    head += _paragraph(place, class_="address")
    parts = [
        _tag("header", head + _short(done)),
        _figures(done),
        _method(done),
        _data(done),
        _judge(done),
        _contrast(done),
        _evidence(done),
        _mediation(done),
        _section("What was not shown", _list(done.not_shown)),
        _repeat(done),
        _sign(),
    ]
    return parts[0] + _tag("main", "".join(parts[1:]))


def _short(done: Audit) -> str:
    lines = [
        f"{f['name']}: {_number(f['value'])} {f['unit']}, 95 % interval {_number(f['low'])} to "
        f"{_number(f['high'])}" + ("" if f["none"] is None else f"; without: {_number(f['none'])}")
        for f in done.figures[:3]
    ]
    lines += [s.get("verdict") or s.get("why", "") for s in done.stages]
    return _tag("div", _list(line for line in lines if line), class_="short")


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3g}"


def _figures(done: Audit) -> str:
    rows = _interval_rows(done.figures)
    for group, some in done.groups.items():
        name = _tag("td", _text(group or "no group"), class_="group", colspan="4")
        rows += _tag("tr", name) + _interval_rows(some)
    names = ("figure", "value and interval", "", "items")
    note = _paragraph("Dashed: the value without the behaviour, or by chance.", class_="soft")
    return _section("Figures", note, _table(names, rows))


def _interval_rows(figures: Sequence[Mapping[str, Any]]) -> str:
    rows = ""
    for f in figures:
        low, high = axis_of([g for g in figures if g["unit"] == f["unit"]], f["unit"])
        value = f"{_number(f['value'])} {f['unit']} [{_number(f['low'])}, {_number(f['high'])}]"
        cells = _tag("td", _text(f["name"]), class_="name")
        cells += _tag("td", _text(value), class_="number")
        cells += _tag("td", interval_plot(f, low, high, f["none"]), class_="plot")
        rows += _tag("tr", cells + _tag("td", _text(f["n"]), class_="number"))
    return rows


def _table(names: Sequence[str], rows: str) -> str:
    head = _tag("tr", "".join(_tag("th", _text(name)) for name in names))
    return _tag("div", _tag("table", head + rows), class_="wide")


def _cells(rows: Sequence[Sequence[Any]]) -> str:
    """A table of texts, the first row of which names the columns."""
    body = "".join(_tag("tr", "".join(_tag("td", _text(cell)) for cell in row)) for row in rows[1:])
    return _table([str(name) for name in rows[0]], body)


def _method(done: Audit) -> str:
    suite = done.suite
    lines = [METHOD[suite["kind"]], f"Followed by mediation: {done.outcome['about']}."]
    lines.append(f"Template: {suite['template']}. Measure: {suite['measure']}.")
    lines.append(
        "Intervals: bootstrap over items, those about the same thing drawn together, 95 %."
    )
    return _section("Method", *map(_paragraph, lines))


def _data(done: Audit) -> str:
    rows = [["data", "source", "licence", "items", "note", "digest"]]
    for s in done.data["sources"]:
        rows.append([s[k] for k in ("what", "source", "licence", "items", "note", "digest")])
    asked = f"{done.data['asked']:,} items were asked; {done.data['left_out']:,} did not fit."
    return _section("Data and licences", _paragraph(asked), _cells(rows))


def _judge(done: Audit) -> str:
    if done.judge is None:
        return ""
    parts = [_paragraph(f"{done.judge['name']}: {done.judge['about']}.")]
    if (checked := done.judge["agreement"]) is not None:
        figure = {"unit": "", "none": None}
        named = {"agreement with labels": checked["accuracy"], "Cohen's kappa": checked["kappa"]}
        figures = [{**figure, "name": name, **some} for name, some in named.items()]
        names = ("on labelled borderline answers", "value and interval", "", "answers")
        parts.append(_table(names, _interval_rows(figures)))
        shares = [f"{share:.0%} of {label}s" for label, share in checked["by_label"].items()]
        parts.append(_paragraph(f"Called a refusal: {', '.join(shares)}."))
    return _section("Judge", *parts)


def _contrast(done: Audit) -> str:
    found = done.contrast
    if "why" in found:
        return _section("Features", _paragraph(found["why"]))
    parts = [_paragraph(CONTRAST), _paragraph(found["verdict"])]
    rows = ""
    far = found.get("aucs_elsewhere") or {}
    for name, area in found["aucs"].items():
        cells = _tag("td", _text(name), class_="name")
        for some, kind in ((area, "plot"), (far.get(name), "plot far")):
            said = "" if some is None else f"{_number(some['value'])}"
            cells += _tag("td", _text(said), class_="number")
            plot = "" if some is None else interval_plot(some, 0.0, 1.0, 0.5)
            cells += _tag("td", plot, class_=kind)
        rows += _tag("tr", cells)
    names = ("detector (area under ROC)", "held out", "", "elsewhere", "")
    parts.append(_table(names, rows))
    return _section("Features: detection", *parts, _cells(found["tables"]["Features"]))


def _evidence(done: Audit) -> str:
    if not done.evidence:
        return ""
    cards = "".join(_tag("div", _card(one), class_="card") for one in done.evidence)
    return _section("Features: evidence", _tag("div", cards, class_="cards"))


def _card(one: Mapping[str, Any]) -> str:
    title = f"{one['feature']}" + (f" · {one['name']}" if one["name"] else "")
    parts = [_tag("h3", _text(title))]
    if (row := one["figures"]) is not None:
        said = f"d {row['effect']:+.2f}, q {row['q']:.2g}, AUC {row['auc']:.2f}"
        parts.append(_paragraph(said, class_="soft"))
    for name in ("raises", "lowers"):
        if one[name]:
            words = "".join(_tag("span", _text(word)) for word in one[name])
            parts.append(_tag("p", _tag("b", name) + words, class_="tokens"))
    for example in one["examples"]:
        most = max([abs(v) for v in example["values"]] + [1e-9])
        words = "".join(
            _tag("span", _text(t), style=f"--heat-share:{60 * max(v, 0) / most:.0f}%")
            for t, v in zip(example["tokens"], example["values"])
        )
        parts.append(_tag("p", words, class_="example"))
    if not one["examples"]:
        parts.append(_paragraph("No texts are known on which it is active.", class_="soft"))
    return "".join(parts)


def _mediation(done: Audit) -> str:
    moved = done.mediation
    if "why" in moved:
        return _section("Mediation", _paragraph(moved["why"]))
    parts = [_paragraph(MEDIATION), _paragraph(f"Measured: {moved['about']}.")]
    if moved.get("verdict"):
        parts.append(_paragraph(moved["verdict"]))
    parts.append(control_plot(moved["behaviour"]["change"], moved["controls"]))
    parts += [_tag("h2", _text(name)) + _cells(rows) for name, rows in moved["tables"].items()]
    return _section("Mediation and controls", *parts)


def _repeat(done: Audit) -> str:
    rows = [["", ""], *_flat(done.repeat)]
    body = "".join(
        _tag("tr", _tag("td", _text(key)) + _tag("td", _text(value), class_="mono"))
        for key, value in rows[1:]
        if value not in ("", None)
    )
    return _section("To repeat it", _table(("", ""), body))


def _flat(content: Mapping[str, Any], head: str = "") -> list[list[Any]]:
    found = []
    for key, value in content.items():
        name = f"{head}{key}".replace("_", " ")
        found += _flat(value, f"{name}: ") if isinstance(value, Mapping) else [[name, value]]
    return found


def _sign() -> str:
    lines = ("read and signed by", "date")
    return _tag("div", "".join(f"<div></div>" for _ in lines)
                + "".join(_tag("small", line) for line in lines), class_="sign")  # fmt: skip
