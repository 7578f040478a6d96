"""An `Inspection` as a self-contained web page that sends no requests.

inspect.html holds the data as JSON, and its script writes them through `textContent` only. "<", ">"
and "&" are escaped in the JSON, so no text can end the script element.
"""

import html

from gemma_scope_jax.inspection.inspect_text import Inspection
from gemma_scope_jax.web.pages import inert_json, page_template


def inspection_page(seen: Inspection) -> str:
    """The page as HTML."""
    data = seen.as_dict()
    data["features"] = [
        [[f["feature"], f["activation"]] for f in some] for some in data["features"]
    ]
    # sparse: token, activation, token, activation, ...
    data["heat"] = [[n for pair in enumerate(row) if pair[1] for n in pair] for row in data["heat"]]
    text = inert_json(data)
    title = "".join(seen.tokens[1:])[:60].strip() or "inspection"
    before, rest = page_template(__package__, "inspect.html").split("{{title}}")
    middle, after = rest.split("{{data}}")
    return before + html.escape(f"{title} · {seen.model}") + middle + text + after
