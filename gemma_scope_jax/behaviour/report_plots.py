"""Small plots of the report as inline SVG: intervals on one axis, and a change beside its controls.

Only numbers are drawn, so that nothing in them has to be escaped.
"""

from collections.abc import Mapping, Sequence
from typing import Any

WIDE, HIGH = 300, 20  # units of an interval's plot


def axis_of(figures: Sequence[Mapping[str, Any]], unit: str) -> tuple[float, float]:
    """The axis that figures of one unit share: 0 to 100 for shares, else as wide as they need."""
    if unit == "%":
        return 0.0, 100.0
    known = [f[k] for f in figures for k in ("low", "high", "value", "none") if f[k] is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room


def interval_plot(
    figure: Mapping[str, Any], low: float, high: float, none: float | None = None
) -> str:
    """A value with its interval on an axis from `low` to `high`; `none` is marked."""
    x = _scale(low, high, WIDE)
    marks = f'<line class="axis" x1="0" x2="{WIDE}" y1="{HIGH / 2}" y2="{HIGH / 2}"/>'
    if none is not None:
        marks += f'<line class="none" x1="{x(none)}" x2="{x(none)}" y1="0" y2="{HIGH}"/>'
    if figure["low"] is not None and figure["high"] is not None:
        ends = f'x1="{x(figure["low"])}" x2="{x(figure["high"])}"'
        marks += f'<line class="span" {ends} y1="{HIGH / 2}" y2="{HIGH / 2}"/>'
    if figure["value"] is not None:
        marks += f'<circle class="dot" cx="{x(figure["value"])}" cy="{HIGH / 2}" r="4"/>'
    return f'<svg viewBox="0 0 {WIDE} {HIGH}" aria-hidden="true">{marks}</svg>'


def control_plot(change: Mapping[str, Any], controls: Sequence[float]) -> str:
    """The mean change by the features found, with its interval, above the changes by random sets."""
    wide, high = 640, 74
    values = [
        *controls,
        0.0,
        *(change[k] for k in ("low", "high", "value") if change[k] is not None),
    ]
    room = 0.05 * (max(values) - min(values)) or 1.0
    x = _scale(min(values) - room, max(values) + room, wide)
    marks = f'<line class="axis" x1="0" x2="{wide}" y1="56" y2="56"/>'
    marks += f'<line class="none" x1="{x(0.0)}" x2="{x(0.0)}" y1="4" y2="56"/>'
    for value in controls:
        marks += f'<line class="control" x1="{x(value)}" x2="{x(value)}" y1="40" y2="56"/>'
    if change["low"] is not None:
        ends = f'x1="{x(change["low"])}" x2="{x(change["high"])}"'
        marks += f'<line class="span" {ends} y1="20" y2="20"/>'
    marks += f'<circle class="dot" cx="{x(change["value"])}" cy="20" r="5"/>'
    marks += '<text x="0" y="12">features found</text><text x="0" y="38">random sets</text>'
    marks += f'<text x="{x(0.0)}" y="71" text-anchor="middle">no change</text>'
    return f'<svg class="tall" viewBox="0 0 {wide} {high}" aria-hidden="true">{marks}</svg>'


def _scale(low: float, high: float, wide: int):
    """A function from values to x, within the plot, as short text."""
    share = lambda value: min(max((value - low) / (high - low), 0.0), 1.0)
    return lambda value: f"{wide * share(value):.1f}"
