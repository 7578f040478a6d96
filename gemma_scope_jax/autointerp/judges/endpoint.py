"""Where and how to ask a chat endpoint, checked before anything is sent."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from gemma_scope_jax.autointerp.answers import request_key
from gemma_scope_jax.errors import InputError, reason, shown

LONGEST_TIMEOUT = 86400.0  # seconds
OURS = ("messages", "model", "stream", "n")  # keys of a request that no option may replace


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where and how to ask a chat endpoint."""

    url: str
    """The base URL of an OpenAI-compatible API, such as https://api.openai.com/v1; for Azure, the
    deployment's URL with its ?api-version=."""
    model: str
    """The name of the model that the endpoint is asked for."""
    key: str = dataclasses.field(default="", repr=False)
    """The API key; it goes into one header and nowhere else."""
    concurrency: int = 8
    """Requests under way at once."""
    timeout: float = 120.0
    """Seconds that a request may take."""
    retries: int = 6
    """Retries of a request after a transient error."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """More keys for every request; None removes a key: {"temperature": None}."""
    logprobs: bool = False
    """Ask for log-probabilities, which give detection and fuzzing an AUC."""
    price_in: float = 0.0
    """Dollars per million tokens of prompts."""
    price_out: float = 0.0
    """Dollars per million tokens of answers."""

    def __post_init__(self):
        _check_url(self.url)
        if not self.model or shown(self.model) != self.model:
            raise InputError("an endpoint needs the name of a model, without control characters")
        if self.key and not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise InputError("the API key has invalid characters (spaces, line breaks?)")
        if self.concurrency < 1 or self.retries < 0 or not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise InputError(
                "concurrency and timeout must be above 0 (at most a day), retries at least 0"
            )
        if not all(0 <= price < math.inf for price in (self.price_in, self.price_out)):
            raise InputError("prices must be numbers, and not negative")
        theirs = [key for key in OURS if self.options.get(key) not in (None, False)]
        if theirs or "messages" in self.options:
            raise InputError(f"request options: {(theirs or OURS)[0]} cannot be set")
        try:
            json.dumps(dict(self.options), allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"request options: not JSON ({reason(error)})") from None

    @property
    def name(self) -> str:
        """The name in explanations.json: the model and a checksum of what changes its answers."""
        more = {"options": dict(self.options), "logprobs": self.logprobs}
        more = {key: value for key, value in more.items() if value}
        return f"{self.model} (options {request_key(more)[:8]})" if more else self.model

    @property
    def address(self) -> str:
        """The URL of requests."""
        url, mark, version = self.url.partition("?")
        url = url.rstrip("/")
        url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        return url + mark + version

    @property
    def headers(self) -> dict[str, str]:
        """The header with the key. Azure, which has a version in the URL, has its own."""
        if not self.key:
            return {}
        return {"api-key": self.key} if "?" in self.url else {"Authorization": f"Bearer {self.key}"}


def _check_url(url: str) -> None:
    """Raise `InputError` for an invalid base URL, without repeating what may be secret in it."""
    try:
        parts = urlsplit(url)
        where, _ = parts.hostname, parts.port  # reading the port checks it
        (where or "").encode("idna")
    except ValueError:  # a port that is not a number, an unbalanced [...], two dots
        raise InputError("endpoint: the URL has an invalid port or host") from None
    if parts.scheme not in ("http", "https") or not where:
        raise InputError("endpoint: give a URL such as https://api.openai.com/v1")
    if parts.username or parts.password:
        raise InputError(
            "endpoint: leave user and password out of the URL; the API key comes from an "
            "environment variable (--key-variable)"
        )
    version = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    if "#" in url or ("?" in url and version != ["api-version"]):
        raise InputError("endpoint: the URL may hold no # and no ?, except Azure's ?api-version=")
    if not (url.isascii() and url.isprintable()) or " " in url:
        raise InputError(f"endpoint {ascii(url)}: write characters that a URL cannot hold as %XX")
