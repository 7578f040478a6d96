"""A calibrated sweep as one web page: it opens from a disk and sends no requests."""

import html
from typing import Any

from gemma_scope_jax.behaviour.steering.calibrate import Calibration
from gemma_scope_jax.behaviour.steering.sweep import Sweep
from gemma_scope_jax.storage.strict_json import finite, legible
from gemma_scope_jax.web.pages import inert_json, page_template


def steer_page(sweep: Sweep, calibration: Calibration, *, title: str, about: dict[str, Any]) -> str:
    """The page as HTML: curves of effect and perplexity, the table, and every text.

    about: what stands under the title, name -> value, such as the model and the coder
    """
    data = {
        "title": title,
        "about": {str(k): str(v) for k, v in about.items()},
        "calibration": calibration.as_dict(),
        "tables": calibration.tables(),
        "sweep": {"prompts": list(sweep.prompts), "arms": _arms(sweep)},
    }
    before, rest = page_template(__package__, "steer.html").split("{{title}}")
    middle, after = rest.split("{{data}}")
    return before + html.escape(legible(title)) + middle + inert_json(finite(data)) + after


def _arms(sweep: Sweep) -> list[dict[str, Any]]:
    """Without the specs, whose vectors the page does not show."""
    return [{k: v for k, v in arm.items() if k != "spec"} for arm in sweep.as_dict()["arms"]]
