"""What an endpoint's reply says: an answer, or why there is none.

Servers that speak OpenAI's chat completions differ most where they have no answer: a filter leaves
`choices` out, or the message, or sends an error with status 200; a model that thought too long
leaves `content` empty. Whatever has no answer is one of the reasons below, and is never taken for
an answer.
"""

import dataclasses
import json
import re
from typing import Any

from gemma_scope_jax.autointerp.prompts import Messages, digits_only, without_thoughts
from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.storage.strict_json import legible

# Why a question has no answer: what runs count.
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
    """One question is not answered, whatever one does: `why` is one of the reasons above, `words`
    the server's own."""

    def __init__(self, why: str, words: str):
        super().__init__(f"{why}: {words}")
        self.why, self.words = why, words


class BadReply(Exception):
    """A reply of status 200 that is no chat completion, and may be one when asked for again."""


class Failure(Exception):
    """A reply of status 200 that is an error: its `code`, None if it has none, and its message."""

    def __init__(self, code: int | None, message: str):
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a model said, without its thoughts. is_cut: and would have gone on."""

    text: str
    logprobs: list[Any] | None = None
    is_cut: bool = False


def parsed(body: bytes) -> Any:
    """The JSON of a reply. Of what it holds beside the answer (seeds of 64 bits without a sign,
    infinite log-probabilities, keys that come twice) nothing is asked. Raises `BadReply`.
    """
    try:
        return legible(json.loads(body.decode("utf-8-sig")))
    except (ValueError, RecursionError) as error:
        raise BadReply(f"not usable as JSON ({reason(error)})") from None


def read_reply(reply: Any) -> Reply:
    """The answer in a chat completion (parsed JSON).

    Raises `NoAnswer` if there will be none, `Failure` for an error, and `BadReply`.
    """
    choices = reply.get("choices") if isinstance(reply, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    choice = choice if isinstance(choice, dict) else {}
    for holder in (choice, reply):
        if isinstance(holder, dict) and (holder.get("error") or holder.get("object") == "error"):
            raise Failure(*error_of(holder))
    ended = str(choice.get("finish_reason") or "").lower()
    message = choice.get("message")
    message = message if isinstance(message, dict) else None
    refusal = message.get("refusal") if message else None
    text = _text(message.get("content")) if message else ""
    if ended in _FILTER:
        raise NoAnswer(FILTERED, str(refusal or f"finish_reason {ended}"))
    if ended in _BROKEN or message is None:
        raise BadReply(f"finish_reason {ended}" if ended in _BROKEN else "it holds no message")
    if refusal and not text:
        raise NoAnswer(DECLINED, str(refusal))
    logprobs = choice.get("logprobs")
    logprobs = logprobs.get("content") if isinstance(logprobs, dict) else None
    kept = digits_only(logprobs) if isinstance(logprobs, list) else None
    return Reply(without_thoughts(text), kept, ended in _CUT_OFF)


def _text(content: Any) -> str:
    """The content of a message: a text, null, or parts, of which thoughts are no part of it."""
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
    """Tokens of the prompt and of the answer, None if the reply does not count them."""
    usage = reply.get("usage") if isinstance(reply, dict) else None
    if not isinstance(usage, dict):
        return None
    counts = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
    if not all(type(n) is int and 0 <= n < MOST_TOKENS for n in counts if n):
        return None
    return counts[0] or 0, counts[1] or 0


def error_of(content: Any) -> tuple[int | None, str]:
    """Code and message of an error's JSON, which has several forms."""
    if isinstance(content, list) and content:  # Google's
        content = content[0]
    error = content
    for key in ("error", "detail", "message"):
        if isinstance(error, dict) and isinstance(error.get(key), (dict, str)) and error[key]:
            error = error[key]
    code = None
    for holder in (content, content.get("error") if isinstance(content, dict) else None):
        said = holder.get("code") if isinstance(holder, dict) else None
        if re.fullmatch(r"[45]\d\d", str(said)):
            code = int(str(said))
    return code, error if isinstance(error, str) else str(error)


def is_filtered(status: int, said: str) -> bool:
    """Whether an error (all that is said about it) is one question's: moderation, a filter."""
    return status in (400, 403, 422, 451) and _FILTERS.search(said) is not None


def takes_no_system(said: str) -> bool:
    """Whether an error says that the model knows no system role (Gemma's own template)."""
    return _NO_SYSTEM.search(said) is not None


def without_system(messages: Messages) -> Messages:
    """The same conversation, its system text at the beginning of the user's."""
    if [m["role"] for m in messages[:2]] != ["system", "user"]:
        return messages
    system, user, *rest = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
