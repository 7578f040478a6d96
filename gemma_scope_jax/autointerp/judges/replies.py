"""Reads an endpoint's reply: an answer, or the reason why there is none.

Servers differ most when they have no answer: a filter may leave out `choices` or the message, or
send an error with status 200, and a model that thought too long leaves `content` empty.
"""

import dataclasses
import json
import re
from typing import Any

from gemma_scope_jax.autointerp.prompts import Messages, digits_only, without_thoughts
from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.storage.strict_json import legible

# Why a question has no answer; runs count them.
REFUSED = "refused by the server"
FILTERED = "filtered"
DECLINED = "declined by the model"
CUT = "cut off"
UNUSABLE = "replies that are none"
FAILED = "failed"

MOST_TOKENS = 1 << 32  # of one request
_CUT_OFF = ("length", "max_tokens", "max_length", "model_length")
_FILTER = ("content_filter", "safety", "recitation", "sensitive", "prohibited_content", "refusal")
_BROKEN = ("error", "abort", "aborted", "cancelled", "insufficient_system_resource")
_FILTERS = re.compile(r"content.{0,20}(filter|policy)|moderat|flagged|prohibited|safety", re.I)
_NO_SYSTEM = re.compile(
    r"\b(system|developer)\W{0,3}(role|message|instruction|prompt)s?\b"
    r"|\b(role|message)s?\b.{0,40}\b(system|developer)\b"
    r"|roles? (must|should) alternate|only user\b.{0,40}\broles?\b",
    re.IGNORECASE,
)


class NoAnswer(InputError):
    """A question that cannot be answered: `why` is a reason above, `words` what the server said."""

    def __init__(self, why: str, words: str):
        super().__init__(f"{why}: {words}")
        self.why, self.words = why, words


class BadReply(Exception):
    """A reply of status 200 that is not a chat completion; the next one may be."""


class Failure(Exception):
    """A reply of status 200 that is an error, with its `code` (None if it has none) and message."""

    def __init__(self, code: int | None, message: str):
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a model said, without its thoughts. is_cut: the text was cut off."""

    text: str
    logprobs: list[Any] | None = None
    is_cut: bool = False


def parsed(body: bytes) -> Any:
    """The JSON of a reply. Raises `BadReply`. Unlike `parse_json` it accepts oddities beside the
    answer: seeds beyond 64 bits, infinite log-probabilities, repeated keys."""
    try:
        return legible(json.loads(body.decode("utf-8-sig")))
    except (ValueError, RecursionError) as error:
        raise BadReply(f"not usable as JSON ({reason(error)})") from None


def _at(value: Any, *keys: str) -> Any:
    """`value[key][key]...`; None where that does not exist."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def read_reply(reply: Any) -> Reply:
    """The answer in a chat completion (parsed JSON). Raises `NoAnswer` if there will be none,
    `Failure` for an error, and `BadReply`."""
    choices = _at(reply, "choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    for holder in (choice, reply):
        if _at(holder, "error") or _at(holder, "object") == "error":
            raise Failure(*error_of(holder))
    ended = str(_at(choice, "finish_reason") or "").lower()
    message, refusal = _at(choice, "message"), _at(choice, "message", "refusal")
    text = _text(_at(message, "content"))
    if ended in _FILTER:
        raise NoAnswer(FILTERED, str(refusal or f"finish_reason {ended}"))
    if ended in _BROKEN or not isinstance(message, dict):
        raise BadReply(f"finish_reason {ended}" if ended in _BROKEN else "it holds no message")
    if refusal and not text:
        raise NoAnswer(DECLINED, str(refusal))
    logprobs = _at(choice, "logprobs", "content")
    kept = digits_only(logprobs) if isinstance(logprobs, list) else None
    return Reply(without_thoughts(text), kept, ended in _CUT_OFF)


def _text(content: Any) -> str:
    """The text in the content of a message: a string, null, or parts, some of them thoughts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise BadReply("its content is no text")
    found = []
    for part in content:
        if isinstance(part, dict) and part.get("type") == "refusal":
            raise NoAnswer(DECLINED, str(part.get("refusal")))
        said = part.get("text", "") if isinstance(part, dict) else part
        if not isinstance(said, str):
            raise BadReply("its content is no text")
        if not isinstance(part, dict) or part.get("type") in (None, "text", "output_text"):
            found.append(said)
    return "".join(found)


def usage_of(reply: Any) -> tuple[int, int] | None:
    """Tokens of the prompt and of the answer; None if the reply does not state them."""
    usage = _at(reply, "usage")
    counts = [_at(usage, key) for key in ("prompt_tokens", "completion_tokens")]
    valid = all(type(n) is int and 0 <= n < MOST_TOKENS for n in counts if n)
    return (counts[0] or 0, counts[1] or 0) if isinstance(usage, dict) and valid else None


def error_of(content: Any) -> tuple[int | None, str]:
    """Code and message of an error, which has a different form with every server."""
    if isinstance(content, list) and content:  # Google's
        content = content[0]
    error = content
    for key in ("error", "detail", "message"):
        if isinstance(said := _at(error, key), (dict, str)) and said:
            error = said
    codes = [str(_at(content, "error", "code")), str(_at(content, "code"))]
    code = next((int(c) for c in codes if re.fullmatch(r"[45]\d\d", c)), None)
    return code, error if isinstance(error, str) else str(error)


def is_filtered(status: int, said: str) -> bool:
    """Whether an error comes from a filter or moderation of the question. said: its whole text."""
    return status in (400, 403, 422, 451) and _FILTERS.search(said) is not None


def takes_no_system(said: str) -> bool:
    """Whether an error says that the model has no system role, as in Gemma's template."""
    return _NO_SYSTEM.search(said) is not None


def without_system(messages: Messages) -> Messages:
    """The conversation with the system text at the beginning of the user's."""
    if [m["role"] for m in messages[:2]] != ["system", "user"]:
        return messages
    system, user, *rest = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
