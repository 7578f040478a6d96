"""What web pages are made of: their templates, and data in them that no text can end."""

import json
from importlib import resources
from typing import Any

from gemma_scope_jax.storage.strict_json import legible


def page_template(name: str) -> str:
    """A page of this folder, with the style that all of them begin with in place."""
    read = lambda file: resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    return read(name).replace("{{palette}}", read("palette.css").rstrip())


def inert_json(value: Any) -> str:
    """Compact JSON without the signs that mean something in HTML, as escapes: still valid JSON.

    The two separators are line ends to old JavaScript. NaN raises `ValueError`.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = legible(text)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
