"""Data inside of web pages: JSON that no text in it can end, and that old JavaScript reads too."""

import json
from typing import Any


def inert_json(value: Any) -> str:
    """Compact JSON without the signs that mean something in HTML, as escapes: still valid JSON.

    The two separators are line ends to old JavaScript. NaN raises `ValueError`.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
