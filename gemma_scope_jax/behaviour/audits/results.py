"""What an audit says: figures with intervals, what was not shown, and how to repeat it."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gemma_scope_jax.behaviour.audits.asking import Questions
from gemma_scope_jax.behaviour.suites.scores import Figure
from gemma_scope_jax.behaviour.suites.suite import Suite, SuiteItems
from gemma_scope_jax.circuits.tables import text_tables
from gemma_scope_jax.errors import shown

FORMAT, VERSION = "gemma-scope-jax audit result", 1
PROBE, SPARSE = "raw", "top"  # how the names of the detectors of a contrast begin


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `audit` returns, as JSON data; printed, its tables.

    suite, data, model, coder  what was asked, of whom: names, licences, digests
    figures     [{"name", "unit", "none", "value", "low", "high", "n"}]; none: without the behaviour
    groups      the same by group of items
    outcome     the one number an item that mediation follows, and its mean
    judge       of written answers, with its agreement on labelled ones; None for scored choices
    contrast, mediation  JSON data of these stages, or {"why": ...} where one was not made
    evidence    the features found
    not_shown   sentences
    repeat      versions, identities and settings
    """

    suite: Mapping[str, Any]
    data: Mapping[str, Any]
    model: Mapping[str, Any]
    coder: Mapping[str, Any]
    figures: Sequence[Mapping[str, Any]]
    groups: Mapping[str, Sequence[Mapping[str, Any]]]
    outcome: Mapping[str, Any]
    judge: Mapping[str, Any] | None
    contrast: Mapping[str, Any]
    mediation: Mapping[str, Any]
    evidence: Sequence[Mapping[str, Any]]
    not_shown: Sequence[str]
    repeat: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Compact JSON data: all but the tables, which repeat figures."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for stage in ("contrast", "mediation"):
            content[stage] = {k: v for k, v in content[stage].items() if k != "tables"}
        return {"format": FORMAT, "version": VERSION, **content}

    def tables(self) -> dict[str, list[list[Any]]]:
        """Heading -> rows, the first of which names them."""
        found = {"Figures": [["figure", "value", "95 % interval", "without", "n"]]}
        found["Figures"] += [_row(f) for f in self.figures]
        for group, figures in self.groups.items():
            found["Figures"] += [_row({**f, "name": f"{group}: {f['name']}"}) for f in figures]
        for stage in (self.contrast, self.mediation):
            found |= stage.get("tables", {})
        return found

    def __str__(self) -> str:
        said = self.suite
        parts = [f"{said['name']}: {said['question']}\n{self.model['name']}, {self.coder['name']}"]
        plain = lambda rows: [[shown(str(cell)) for cell in row] for row in rows]
        parts.append(text_tables({name: plain(rows) for name, rows in self.tables().items()}))
        verdicts = [stage.get("verdict") or stage.get("why", "") for stage in self.stages]
        parts.append("\n".join(v for v in verdicts if v))
        parts.append("Not shown\n" + "\n".join(f"- {line}" for line in self.not_shown))
        return shown("\n\n".join(parts), keep="\n")

    @property
    def stages(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return self.contrast, self.mediation


def figure_rows(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """Figures as JSON data."""
    return [
        {"name": f.name, "unit": f.unit, "none": f.none, **f.interval.as_dict()} for f in figures
    ]


def _row(figure: Mapping[str, Any]) -> list[Any]:
    number = lambda key: "" if figure[key] is None else f"{figure[key]:.3g}"
    between = f"{number('low')} to {number('high')}"
    value = f"{number('value')} {figure['unit']}"
    return [figure["name"], value, between, number("none"), figure["n"]]


def not_shown(
    suite: Suite,
    found: SuiteItems,
    asked: Questions,
    measured: Mapping[str, Any],
    contrasted: Mapping[str, Any],
    mediated: Mapping[str, Any],
) -> list[str]:
    """What a reader must not conclude, in sentences."""
    total = sum(origin["items"] for origin in found.origins)
    lines = list(suite.about)
    if len(asked.items) < total:
        lines.append(f"{len(asked.items):,} of {total:,} items were asked.")
    if asked.left_out:
        lines.append(f"{asked.left_out} items are longer than the model's context: left out.")
    if (judge := measured["judge"]) is not None:
        lines += _of_judge(judge)
    lines += [stage["why"] + "." for stage in (contrasted, mediated) if "why" in stage]
    if "why" not in contrasted:
        lines += _of_contrast(contrasted)
    if "why" not in mediated:
        lines += _of_mediation(mediated)
    lines.append(
        "Intervals say how figures would vary with other items of the same kind. They say nothing "
        "of other wordings, languages or uses, and are not corrected for the number of figures."
    )
    return lines


def _of_judge(judge: Mapping[str, Any]) -> list[str]:
    checked = judge["agreement"]
    if checked is None:
        return [f"The judge ({judge['about']}) was not checked against labelled answers."]
    kappa, least = checked["kappa"], checked["by_label"].get("partial")
    of_partial = "" if least is None else f", and calls {least:.0%} of partial answers refusals"
    value = "undefined" if kappa["value"] is None else f"{kappa['value']:.2f}"
    lines = [
        f"The judge ({judge['about']}) agrees with labels with kappa {value}{of_partial}: shares "
        "of answers are no better than it is."
    ]
    if judge["unjudged"]:
        lines.append(f"{judge['unjudged']} answers have no verdict and are left out.")
    return lines


def _of_contrast(contrasted: Mapping[str, Any]) -> list[str]:
    lines = []
    if not contrasted["alarm"]:
        lines.append(
            "No feature tells the arms apart: that is no proof that the model does not; this coder "
            "may lack the feature."
        )
    aucs = contrasted["aucs"]
    raw = next((aucs[n] for n in aucs if n.startswith(PROBE)), None)
    own = next((aucs[n] for n in aucs if n.startswith(SPARSE)), None)
    if raw and own and raw["value"] is not None and raw["value"] > own["value"]:
        lines.append(
            f"A probe on raw activations tells the arms apart better (AUC {raw['value']:.2f}) than "
            f"the features do ({own['value']:.2f}): the features explain, they do not detect best."
        )
    if contrasted.get("aucs_elsewhere") is None:
        lines.append("Features were not tested on texts from another source.")
    return lines


def _of_mediation(mediated: Mapping[str, Any]) -> list[str]:
    lines = []
    if not mediated["can_tell"]:
        lines.append("There are too few random sets to tell what ablation does from chance.")
    elif not mediated["mediates"]:
        lines.append(
            "It is not shown that ablating the features found moves the behaviour more than "
            "ablating matched random features does: they may be signs of it without causing it."
        )
    lines.append(
        "Ablation removes what the features write at one layer; other layers and what the coder "
        "does not reconstruct may carry the behaviour, too."
    )
    return lines


def repeat(about: Mapping[str, Any], command: str) -> dict[str, Any]:
    """All that is needed to make the audit again."""
    found = importlib.metadata.distributions(name="gemma-scope-jax")
    versions = {
        "gemma-scope-jax": next((d.version for d in found), "not installed"),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "backend": jax.default_backend(),
    }
    return {"command": command, "versions": versions, **about}
