"""A client for chat-completions endpoints: OpenAI's, Azure's, vLLM's, Ollama's and many others.

At most `concurrency` requests are under way. Transient failures (429, 5xx, time-outs, broken
connections, malformed replies) are retried after a growing, random pause, or after the one the
server names. A question that cannot be answered costs only that question. What no retry can mend
is an `InputError`; so are `FAILURES` failed questions in a row, but not a single one. Only answers
that fit their question are kept. The API key goes into one header and nowhere else: not to other
hosts and not into messages, files or logs, even if the server repeats it.
"""

import email.utils
import http.client
import json
import logging
import math
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from gemma_scope_jax.autointerp.answers import AnswerFile, request_key
from gemma_scope_jax.autointerp.judges import replies
from gemma_scope_jax.autointerp.judges.endpoint import Endpoint
from gemma_scope_jax.autointerp.judges.http_post import Response, post
from gemma_scope_jax.autointerp.prompts import Messages
from gemma_scope_jax.errors import InputError, shown
from gemma_scope_jax.storage.strict_json import parse_json

LOG = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds
LONGEST_WAIT = 600.0  # seconds: the longest pause that a server may name
LARGEST_REPLY = 1 << 24  # bytes
REFUSALS = 5  # unanswered questions, if none was ever answered, before giving up
FAILURES = 3  # different questions in a row that the server fails at, before giving up
SECRET = 8  # a key has at least this many characters; shorter ones ("EMPTY") are not secret
SAID = 5  # unanswered questions that are reported as they come
HEADERS = {
    "Content-Type": "application/json",
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "User-Agent": "gemma-scope-jax",
}
_NOBODY = (ConnectionRefusedError, socket.gaierror)  # no server is there, whatever is asked


class Stopped(Exception):
    """The client was stopped before this request was sent."""


class _Again(Exception):
    """A transient failure.

    wait: seconds that the server named. general: it does not depend on the question, as when the
    server is busy or absent. unusable: the reply has status 200 but is malformed.
    """

    def __init__(self, message: str, wait: float | None = None, *, general=False, unusable=False):
        super().__init__(message)
        self.wait, self.general, self.unusable = wait, general, unusable


class ChatClient:
    """Sends messages, from any number of threads; counts requests and tokens."""

    def __init__(
        self, endpoint: Endpoint, answers: AnswerFile, notify: Callable[[str], None] = LOG.info
    ):
        self.endpoint, self.answers, self.notify = endpoint, answers, notify
        self.requests = self.retried = self.refused = 0
        self.tokens_in = self.tokens_out = 0
        self.uncounted = 0  # replies that did not state how many tokens they took
        self.answered = False  # whether any answer ever fitted
        self._slots = threading.Semaphore(endpoint.concurrency)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._failing: set[str] = set()  # keys of questions that failed since the last answer
        self._hold = 0.0  # nobody sends before this time (monotonic)
        self._no_system = False  # whether the model's template turned out to lack a system role
        key = endpoint.key  # as it is, as in URLs, and as JSON may escape it
        forms = (key, quote(key, safe=""), key.replace("/", "\\/"))
        self._secrets = tuple(dict.fromkeys(forms)) if len(key) >= SECRET else ()

    @property
    def cost(self) -> float:
        """Dollars so far."""
        e = self.endpoint
        return (self.tokens_in * e.price_in + self.tokens_out * e.price_out) / 1e6

    def stop(self) -> None:
        """Send nothing more; replies under way are still received and kept."""
        self._stop.set()

    def body(self, messages: Messages, max_tokens: int) -> dict[str, Any]:
        """The JSON of a request. Its answer is kept under the hash of it."""
        e = self.endpoint
        body = {"model": e.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        if e.logprobs:
            body |= {"logprobs": True, "top_logprobs": 5}
        body |= e.options
        return {key: value for key, value in body.items() if value is not None}

    def ask(
        self,
        messages: Messages,
        max_tokens: int,
        fits: Callable[[replies.Reply], bool] = lambda _: True,
        kept_as: Messages | None = None,
    ) -> replies.Reply:
        """The reply to a conversation, from the file of answers if it is there.

        fits: whether a reply can be used; only these are kept, and none that was cut off.
        kept_as: the messages to keep the reply under; default: `messages`.
        Raises `NoAnswer` if this question has no answer; `InputError` for what no retry can mend
        (a wrong key, URL or model, no money left), after `retries` failures of each of `FAILURES`
        questions in a row, and if `REFUSALS` questions have no answer and none ever had one;
        `Stopped` after `stop`.
        """
        body = self.body(messages, max_tokens)
        key = request_key([self.endpoint.address, self.body(kept_as or messages, max_tokens)])
        held = self.answers.get(key)
        if isinstance(held, dict) and isinstance(held.get("text"), str):
            logprobs = held.get("logprobs")
            kept = replies.Reply(held["text"], logprobs if isinstance(logprobs, list) else None)
            if fits(kept):
                self.answered = True
                return kept
        try:
            reply = self._send(body, key)
        except replies.NoAnswer as error:
            self.lose(error)
            raise
        if not reply.is_cut and fits(reply):
            self.answered = True
            more = {"logprobs": reply.logprobs} if reply.logprobs else {}
            self.answers.put(key, {"text": reply.text, **more})
        return reply

    def lose(self, error: replies.NoAnswer) -> None:
        """Count an unanswered question, and report the first few."""
        with self._lock:
            self.refused += 1
            count, hopeless = self.refused, not self.answered and self.refused >= REFUSALS
        if hopeless:
            is_refused = error.why in (replies.REFUSED, replies.FILTERED)
            what = f"{'refuses every request' if is_refused else error.why} ({error.words})"
            raise InputError(f"{self.endpoint.url}: {what}; none of {count} questions is answered")
        if count <= SAID:
            more = "; others like it are counted at the end" if count == SAID else ""
            self._say(f"a question has no answer: {error}{more}")

    def _say(self, line: str) -> None:
        self.notify(shown(f"endpoint: {self._clean(line)}"))

    def _send(self, body: dict[str, Any], key: str) -> replies.Reply:
        e, tries, before = self.endpoint, 0, self.requests
        while True:
            try:
                with self._slots:
                    while (wait := self._hold - time.monotonic()) > 0 and not self._stop.wait(wait):
                        pass  # everybody waits for the pause that a server named
                    if self._stop.is_set():
                        raise Stopped
                    return self._once(body)
            except _Again as error:
                tries += 1
                if tries > e.retries:
                    raise self._given_up(error, tries, before, key) from None
                wait = error.wait
                if wait is None:
                    most = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (tries - 1))
                    wait = most * random.uniform(0.5, 1.0)
                with self._lock:
                    self.retried += 1
                    if error.wait is not None:
                        self._hold = max(self._hold, time.monotonic() + wait)
                self._say(f"{error}; again in {wait:.1f} s ({tries}/{e.retries})")
                if self._stop.wait(wait):
                    raise Stopped from None

    def _given_up(self, error: _Again, tries: int, before: int, key: str) -> Exception:
        """The exception for a request that failed `tries` times: only this question is lost, unless
        others fail too. before: requests answered when it was first sent."""
        if error.unusable:
            return replies.NoAnswer(replies.UNUSABLE, str(error))
        if not error.general:
            with self._lock:
                if self.requests == before:  # else the server answers other questions
                    self._failing.add(key)
                failing = len(self._failing)
            if failing < FAILURES:
                often = "once" if tries == 1 else f"{tries} times"
                return replies.NoAnswer(replies.FAILED, f"{often}: {error}")
        return InputError(
            f"{self.endpoint.url}: no answer after {tries} tries ({error}); what is answered "
            "is kept, and the same command resumes"
        )

    def _once(self, body: dict[str, Any]) -> replies.Reply:
        """One request, and another if the model turns out to have no system role."""
        plain = {**body, "messages": replies.without_system(body["messages"])}
        if self._no_system:
            return self._posted(plain)
        try:
            return self._posted(body)
        except replies.NoAnswer as error:
            lacks_role = error.why == replies.REFUSED and replies.takes_no_system(error.words)
            if plain == body or not lacks_role:
                raise
        reply = self._posted(plain)
        with self._lock:
            first, self._no_system = not self._no_system, True
        if first:
            self._say("the model takes no system role: its text now begins the user's message")
        return reply

    def _posted(self, body: dict[str, Any]) -> replies.Reply:
        e, data = self.endpoint, json.dumps(body, allow_nan=False).encode()
        try:
            response = post(e.address, data, HEADERS | e.headers, e.timeout, LARGEST_REPLY)
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            cause = getattr(error, "reason", error)
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise InputError(f"{e.url}: {self._words(cause)}") from None
            if isinstance(cause, TimeoutError):
                raise _Again(f"no answer within {e.timeout:g} s") from None
            raise _Again(self._words(cause), general=isinstance(cause, _NOBODY)) from None
        if 200 <= response.status < 300:
            return self._read(response, body)
        raw = self._raw(response)
        try:
            message = replies.error_of(parse_json(raw, "", mend_text=True))[1]
        except InputError:
            message = raw
        said = f"{response.status} {self._words(message) or self._words(response.phrase)}"
        if response.status in (301, 302, 303, 307, 308):
            moved = self._words(response.headers.get("Location"))
            raise InputError(f"{e.url}: moved ({moved}); give that URL")
        wait = retry_after(response.headers.get("Retry-After"))
        raise self._meaning(response.status, said, raw, wait)

    def _meaning(self, code: int, said: str, raw: str, wait: float | None = None) -> Exception:
        """The exception for an error of the server. raw: its whole text."""
        where = self.endpoint.url
        if replies.is_filtered(code, raw):
            return replies.NoAnswer(replies.FILTERED, said)
        if code in (400, 413, 422, 451) or (code == 500 and replies.takes_no_system(said)):
            return replies.NoAnswer(replies.REFUSED, said)
        if code in (429, 503) and "insufficient_quota" not in raw:
            if wait is not None and wait > LONGEST_WAIT:
                return InputError(f"{where}: {said}: asks to wait {wait:.0f} s; try again then")
            return _Again(said, wait, general=code == 429)
        if code >= 500 or code in (408, 409, 425) or (code == 403 and self.requests):
            return _Again(said)  # some gateways refuse single questions with 403
        hint = "; is the right key in the variable?" if code in (401, 403) else ""
        return InputError(f"{where}: {said}{hint}")

    def _read(self, response: Response, body: Mapping[str, Any]) -> replies.Reply:
        """The answer in a reply of status 200. Raises the reason if there is none."""
        form = str(response.headers.get("Content-Encoding") or "identity")
        if form.lower() != "identity":
            raise _Again(f"a reply compressed by {self._words(form)}, unasked", unusable=True)
        try:
            reply = replies.parsed(response.body)
            spent = replies.usage_of(reply)
            with self._lock:
                self.uncounted += spent is None
                self.tokens_in += spent[0] if spent else 0
                self.tokens_out += spent[1] if spent else 0
            found = replies.read_reply(reply)
        except replies.NoAnswer as error:
            raise replies.NoAnswer(error.why, self._words(error.words)) from None
        except (InputError, replies.BadReply) as error:
            text = f"the reply is not a chat completion: {self._words(error)}"
            raise _Again(text, unusable=True) from None
        except replies.Failure as error:
            said = f"{error.code or ''} {self._words(error)}".strip()
            raw = self._raw(response)
            if error.code is not None:
                raise self._meaning(error.code, said, raw) from None
            if replies.is_filtered(400, raw):
                raise replies.NoAnswer(replies.FILTERED, said) from None
            raise _Again(said, unusable=True) from None
        if found.is_cut and not found.text.strip():
            raise replies.NoAnswer(replies.CUT, self.cut_off(body))
        with self._lock:
            self.requests += 1
            self._failing.clear()
        logprobs = found.logprobs if self.endpoint.logprobs else None
        return replies.Reply(self._clean(found.text), logprobs, found.is_cut)

    def cut_off(self, body: Mapping[str, Any]) -> str:
        """What to say of an answer that was cut off."""
        names = ("max_tokens", "max_completion_tokens")
        said = ", ".join(f"{name} of {body[name]}" for name in names if name in body)
        return f"{said or 'the length allowed'} is too short; allow more by a request option"

    def _raw(self, response: Response) -> str:
        return self._clean(response.body.decode(errors="replace"))[: 1 << 16]

    def _words(self, said: Any) -> str:
        """A server's or an error's text on one line, at most 200 characters, without the key."""
        empty = type(said).__name__ if isinstance(said, BaseException) else ""
        text = " ".join(self._clean(str(said or "")).split())[:200] or empty
        return shown(text)

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def retry_after(value: str | None) -> float | None:
    """The seconds in a Retry-After header (a number or a date); None if there are none."""
    if value is None:
        return None
    try:
        wait = float(value)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError, OSError):
            return None
    return max(0.0, wait) if math.isfinite(wait) else None
