"""A client for chat-completions endpoints: OpenAI's, and the many that speak the same (vLLM,
Ollama, llama.cpp, OpenRouter, ...).

Requests are plain HTTP by the standard library. At most `concurrency` are under way; what passes
(429, 5xx, time-outs, broken connections, broken JSON) is tried again after a growing, random pause,
or the one the server names; what does not is one `InputError`. The API key goes into one header and
nowhere else: not to other hosts (redirects are refused), not into messages, files or logs.
"""

import contextlib
import dataclasses
import email.utils
import http.client
import json
import random
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from gemma_scope_jax.cards.explain.answer_file import AnswerFile, request_key
from gemma_scope_jax.cards.explain.prompts import Messages, digits_only
from gemma_scope_jax.errors import InputError, reason

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds
LONGEST_WAIT = 600.0  # the longest pause that a server may name
LARGEST_REPLY = 1 << 24  # bytes
REFUSALS = 5  # requests refused in a row, none ever answered, before giving up


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where and how to ask. Prices in dollars a million tokens; `options` go into every request as
    they are (None takes one out: {"temperature": None, "max_tokens": None, ...})."""

    url: str
    model: str
    key: str = dataclasses.field(default="", repr=False)
    concurrency: int = 8
    timeout: float = 120.0  # seconds, for one request
    retries: int = 6
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    logprobs: bool = False
    price_in: float = 0.0
    price_out: float = 0.0

    def __post_init__(self):
        _check_url(self.url)
        if not self.model:
            raise InputError("an endpoint needs the name of a model")
        if self.key and not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise InputError("the API key has letters that no key has (spaces, line breaks?)")
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0:
            raise InputError("concurrency and timeout must be above 0, retries at least 0")
        if min(self.price_in, self.price_out) < 0:
            raise InputError("prices must not be negative")

    @property
    def name(self) -> str:
        """What explanations and scores are kept under: the model and, as a checksum, what changes
        its answers."""
        more = {"options": dict(self.options)} if self.options else {}
        more |= {"logprobs": True} if self.logprobs else {}
        return f"{self.model} (options {request_key(more)[:8]})" if more else self.model

    @property
    def address(self) -> str:
        """Where requests go."""
        url = self.url.rstrip("/")
        return url if url.endswith("/chat/completions") else f"{url}/chat/completions"


def _check_url(url: str) -> None:
    """Refuse what is no base URL; what may be secret in it is not repeated."""
    try:
        parts = urlsplit(url)
        where, _ = parts.hostname, parts.port  # which is read only now
    except ValueError:  # a port that is no number, half a [...]
        raise InputError("endpoint: the URL has no such port or host") from None
    if parts.scheme not in ("http", "https") or not where:
        raise InputError("endpoint: give a URL such as https://api.openai.com/v1")
    if parts.username or parts.password:
        raise InputError("endpoint: no user or password in the URL; the key comes from a variable")
    if parts.query or parts.fragment or "?" in url or "#" in url:
        raise InputError("endpoint: no ? or # in the URL; the key comes from a variable")
    if not (url.isascii() and url.isprintable()) or " " in url:
        raise InputError(f"endpoint {ascii(url)}: write letters that no URL has as %XX")


@dataclasses.dataclass(frozen=True)
class Reply:
    text: str
    logprobs: list[Any] | None = None


class Stopped(Exception):
    """The client was told to stop before this request was sent."""


class _Again(Exception):
    """Something that passes; `wait`: seconds that the server named."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class _Refused(Exception):
    """This one request is not answered, whatever one does."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None  # the status then raises


class ChatClient:
    """Sends messages, from any number of threads; counts what it took."""

    def __init__(
        self,
        endpoint: Endpoint,
        answers: AnswerFile,
        notify: Callable[[str], None] = lambda _: None,
    ):
        self.endpoint, self.answers, self.notify = endpoint, answers, notify
        self.requests = self.retried = self.refused = 0
        self.tokens_in = self.tokens_out = 0
        self._slots = threading.Semaphore(endpoint.concurrency)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._hold = 0.0  # until then (monotonic) nobody sends
        self._opener = urllib.request.build_opener(_NoRedirect)

    @property
    def cost(self) -> float:
        """Dollars so far."""
        e = self.endpoint
        return (self.tokens_in * e.price_in + self.tokens_out * e.price_out) / 1e6

    def stop(self) -> None:
        """Send nothing more; what is under way is still received and kept."""
        self._stop.set()

    def body(self, messages: Messages, max_tokens: int) -> dict[str, Any]:
        """The JSON of a request, which is also what its answer is kept under."""
        e = self.endpoint
        body = {"model": e.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        if e.logprobs:
            body |= {"logprobs": True, "top_logprobs": 5}
        body |= e.options
        return {key: value for key, value in body.items() if value is not None}

    def ask(self, messages: Messages, max_tokens: int) -> Reply | None:
        """The reply to a conversation; None if the server refuses this one request.

        Raises `InputError` for what no repetition mends (a wrong key, URL or model, no money left)
        and after `retries` failures in a row, `Stopped` after `stop`.
        """
        body = self.body(messages, max_tokens)
        key = request_key([self.endpoint.address, body])
        if (kept := self.answers.get(key)) is None:
            try:
                kept = self._send(body)
            except _Refused as error:
                self._count_refusal(str(error))
                return None
            self.answers.put(key, kept)
        return Reply(kept["text"], kept.get("logprobs"))

    def _count_refusal(self, message: str) -> None:
        with self._lock:
            self.refused += 1
            hopeless = self.requests == 0 and self.refused >= REFUSALS
        if hopeless:
            raise InputError(f"{self.endpoint.url}: refuses every request ({message})")
        self.notify(f"endpoint: a request was refused ({message})")

    def _send(self, body: dict[str, Any]) -> dict[str, Any]:
        e = self.endpoint
        for attempt in range(e.retries + 1):
            try:
                with self._slot():
                    content = self._post(json.dumps(body).encode())
                    return self._read(content)
            except _Again as error:
                if attempt == e.retries:
                    raise InputError(
                        f"{e.url}: no answer after {attempt + 1} tries ({error}); what is answered "
                        "is kept, and the same command goes on"
                    ) from None
                wait = error.wait
                if wait is None:
                    wait = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**attempt) * random.uniform(0.5, 1.0)
                with self._lock:
                    self.retried += 1
                    if error.wait is not None:
                        self._hold = max(self._hold, time.monotonic() + wait)
                self.notify(f"endpoint: {error}; again in {wait:.1f} s ({attempt + 1}/{e.retries})")
                if self._stop.wait(wait):
                    raise Stopped from None
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        """A place among those that are sending, when nobody has been told to wait."""
        with self._slots:
            while (wait := self._hold - time.monotonic()) > 0 and not self._stop.wait(wait):
                pass
            if self._stop.is_set():
                raise Stopped
            yield

    def _post(self, data: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(self.endpoint.address, data, headers, method="POST")
        if self.endpoint.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.endpoint.key}")
        try:
            with self._opener.open(request, timeout=self.endpoint.timeout) as response:
                return response.read(LARGEST_REPLY)
        except urllib.error.HTTPError as error:
            with error:
                raise self._status(error) from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            cause = getattr(error, "reason", error)
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise InputError(f"{self.endpoint.url}: {self._clean(reason(cause))}") from None
            if isinstance(cause, TimeoutError):
                raise _Again(f"no answer within {self.endpoint.timeout:g} s") from None
            text = reason(cause) if isinstance(cause, BaseException) else str(cause)
            raise _Again(self._clean(text)) from None

    def _status(self, error: urllib.error.HTTPError) -> Exception:
        """What a status other than 200 means."""
        raw = ""
        with contextlib.suppress(OSError, http.client.HTTPException):
            raw = error.read(1 << 16).decode(errors="replace")
        said = f"{error.code} {self._clean(_message(raw)) or error.reason}"
        where = self.endpoint.url
        if error.code == 429 and "insufficient_quota" not in raw:
            return self._named_wait(error, said)
        if error.code >= 500 or error.code in (408, 409, 425):
            return self._named_wait(error, said) if error.code == 503 else _Again(said)
        if error.code in (400, 413, 422):
            return _Refused(said)
        if error.code in (301, 302, 303, 307, 308):
            return InputError(f"{where}: moved ({error.headers.get('Location')}); give that URL")
        hint = "; is the right key in the variable?" if error.code in (401, 403) else ""
        return InputError(f"{where}: {said}{hint}")

    def _named_wait(self, error: urllib.error.HTTPError, said: str) -> Exception:
        wait = retry_after(error.headers.get("Retry-After"))
        if wait is not None and wait > LONGEST_WAIT:
            return InputError(
                f"{self.endpoint.url}: {said}: asks to wait {wait:.0f} s; later, then"
            )
        return _Again(said, wait)

    def _read(self, content: bytes) -> dict[str, Any]:
        """Text, log-probabilities and counts of a reply. Raises `_Again` for what is none."""
        try:
            reply = json.loads(content)
            choice = reply["choices"][0]
            text = choice["message"].get("content") or ""
            usage = reply.get("usage") or {}
            spent = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
            if not isinstance(text, str):
                raise TypeError("the content is not a text")
            logprobs = (choice.get("logprobs") or {}).get("content")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise _Again("the reply is not a chat completion") from None
        with self._lock:
            self.requests += 1
            self.tokens_in += spent[0]
            self.tokens_out += spent[1]
        kept: dict[str, Any] = {"text": self._clean(text)}
        if self.endpoint.logprobs and isinstance(logprobs, list):
            kept["logprobs"] = digits_only(logprobs)
        return kept

    def _clean(self, text: str) -> str:
        return text.replace(self.endpoint.key, "***") if self.endpoint.key else text


def _message(raw: str) -> str:
    """The message in an error's body, which has several forms; one line."""
    try:
        content = json.loads(raw)
        error = content.get("error", content)
        raw = error.get("message") or raw if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        pass
    return " ".join(str(raw).split())[:200]


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header names: a number, or a date. None if there is none."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
