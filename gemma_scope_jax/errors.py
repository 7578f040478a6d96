"""The one exception for wrong input: its message is the line that the user sees.

Every loader, parser and command raises `InputError` for a file, address, name or text that cannot
be used: one line saying what, where and what to do. The command line prints it and exits with 2;
anything else that escapes is a bug of ours.
"""

import difflib
import errno
import os
import unicodedata
from collections.abc import Iterable


class InputError(ValueError):
    """A file, address, name or text that cannot be used.

    The message is one line without control characters, whatever names and words it quotes.
    """

    def __init__(self, message: str):
        super().__init__(shown(" ".join(str(message).split())))


def shown(text: str, keep: str = "") -> str:
    r"""A text that is safe on a terminal and in a log. Control characters, bidirectional overrides,
    line separators and lone surrogates appear as escapes (``\x1b``), except those in `keep`. Text
    from files, servers and models goes through here before it is printed."""
    if text.isprintable():
        return text
    return "".join(c if c in keep or not _is_control(c) else _escape(c) for c in text)


def in_markdown(text: str) -> str:
    r"""A name in Markdown, on one line and without markup: ``a|b <i>`` becomes ``a\|b &lt;i>``.
    Underscores stay: they mean nothing inside a word."""
    plain = shown(text).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "|`*[]" else c for c in plain)


def _is_control(c: str) -> bool:
    # Cf holds the overrides that reverse text, but also the joiners that scripts and emoji need
    kind = unicodedata.category(c)
    return kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and c not in "\u200c\u200d")


def _escape(c: str) -> str:
    return c.encode("unicode_escape", "surrogatepass").decode("ascii")


def reason(error: BaseException) -> str:
    """The message of a foreign exception, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean a, b, c?" for the `known` names nearest to `name`, or "" if none is near."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"; did you mean {', '.join(close)}?" if close else ""


def no_space(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_error(path: str | os.PathLike, error: OSError) -> InputError:
    """The error to show when the system refuses to write."""
    where = os.fspath(path)
    if no_space(error):
        advice = "free some, or choose another folder"
        return InputError(f"{where}: no space left on the disk; {advice}")
    return InputError(f"{where}: cannot be written ({error.strerror or error})")
