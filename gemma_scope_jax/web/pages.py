"""The parts of web pages: templates, and data that no text can break out of."""

import json
import re
from importlib import resources
from typing import Any

from gemma_scope_jax.storage.strict_json import legible


def page_template(room: str | None, name: str) -> str:
    """The page `name` beside the modules of `room` (their `__package__`), with our palette.

    `{{program.js}}` in it stands for the file of that name beside it.
    """
    assert room is not None  # a script has none
    read = lambda package, file: resources.files(package).joinpath(file).read_text(encoding="utf-8")
    page = read(room, name).replace("{{palette}}", read(__package__, "palette.css").rstrip())
    return re.sub(r"\{\{(\w+\.js)\}\}", lambda file: read(room, file[1]).rstrip(), page)


def inert_json(value: Any) -> str:
    """Compact JSON with the characters that are special in HTML escaped: still valid JSON.

    The two separators end lines in old JavaScript. NaN raises `ValueError`.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = legible(text)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
