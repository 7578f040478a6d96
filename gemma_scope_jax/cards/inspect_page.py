"""An `Inspection` as one self-contained web page: no request leaves it, and text in it stays text.

The data goes into inspect.html as JSON, which the page's script turns into elements through
`textContent` only; "<", ">" and "&" are escaped in the JSON, so no text can end the script element.
"""

import html
import json
from importlib import resources

from gemma_scope_jax.cards.inspect import Inspection

TITLE, DATA = "{{title}}", "{{data}}"


def inspection_page(seen: Inspection) -> str:
    """The page as HTML."""
    data = seen.as_dict()
    data["features"] = [
        [[f["feature"], f["activation"]] for f in some] for some in data["features"]
    ]
    # sparse, as most features are silent on most tokens: token, activation, token, activation, ...
    data["heat"] = [[n for pair in enumerate(row) if pair[1] for n in pair] for row in data["heat"]]
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Valid JSON still, but inert in HTML. The two separators are line ends to old JavaScript.
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    title = "".join(seen.tokens[1:])[:60].strip() or "inspection"
    template = resources.files(__package__).joinpath("inspect.html").read_text(encoding="utf-8")
    before, rest = template.split(TITLE)
    middle, after = rest.split(DATA)
    return before + html.escape(f"{title} · {seen.model}") + middle + text + after
