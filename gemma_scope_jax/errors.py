"""The one exception that means "the input is wrong": its message is the line the user sees.

Every loader, parser and command raises `InputError` for a file, address, name or text that cannot
be used: one line saying what, where and what to do. The command line prints it and exits with 2;
anything else that escapes is a bug of ours.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A file, address, name or text that cannot be used. The message is one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


def reason(error: BaseException) -> str:
    """What somebody else's exception says, in one line of at most 200 letters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """ "; did you mean a, b, c?" for the `known` names nearest to `name`, or "" if none is near."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)
    return f"; did you mean {', '.join(close)}?" if close else ""
