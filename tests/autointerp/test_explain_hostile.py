"""What an endpoint and files of answers must not do to us: hold on, show the key, flood the memory,
steer a terminal, end in a traceback, or be written over."""

import contextlib
import gzip
import json
import socket
import threading
import time
from urllib.parse import quote

import numpy as np
import pytest

from chat_server import KEY, ChatServer
from gemma_scope_jax.autointerp.answers import AnswerFile
from gemma_scope_jax.autointerp.examples import Sampling, open_corpus
from gemma_scope_jax.autointerp.explanations import (
    explanation_note,
    read_explanations,
    write_explanations,
)
from gemma_scope_jax.autointerp.judges import chat_client
from gemma_scope_jax.autointerp.judges.chat_client import ChatClient, retry_after
from gemma_scope_jax.autointerp.judges.endpoint import Endpoint
from gemma_scope_jax.errors import InputError
from memory_use import least_peak
from planted_store import PlantedStore, Tok

LIMITS = {"timeout": 5.0, "retries": 0}
ODD_KEY = "sk/very+secret=0123456789"
GOOD = json.dumps({"choices": [{"message": {"content": "x" * 60}}]}).encode()


def reply(line, body=b"", *headers):
    head = b"\r\n".join([b"HTTP/1.1 " + line, b"Content-Length: %d" % len(body), *headers])
    return lambda c: c.sendall(head + b"\r\n\r\n" + body)


@contextlib.contextmanager
def served(behave):
    """A server that reads a request, or greeting, and then does what `behave` says."""

    def serve(c):
        with contextlib.suppress(OSError), c:
            got = c.recv(1 << 16)
            while got.startswith(b"POST") and b"}]" not in got:  # the end of the messages
                got += c.recv(1 << 16)
            behave(c)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}/v1"
        server.shutdown(socket.SHUT_RDWR)  # which wakes the thread that waits


def heard(behave, folder, key=KEY, scheme="http", **options):
    """All that is said, and written, when a server does this; it must be an answer or a line."""
    said, answers = [], AnswerFile(folder / "a.jsonl")
    with served(behave) as place:
        endpoint = Endpoint(f"{scheme}://{place}", "m", key, **{**LIMITS, **options})
        client = ChatClient(endpoint, answers, said.append)
        try:
            said.append(repr(client.ask([{"role": "user", "content": "hi"}], 5)))
        except InputError as error:
            said.append(str(error))
        finally:
            answers.close()
    kept = "".join(file.read_text() for file in folder.glob("a.jsonl"))
    return " ".join(said) + kept + repr(client.endpoint)


# --- one deadline --------------------------------------------------------------------------------


def drip(first, rest):
    def behave(c):
        c.sendall(first)
        for byte in rest:
            c.sendall(bytes([byte]))
            time.sleep(0.05)

    return behave


HOLD_ON = {
    "a body": drip(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(GOOD), GOOD),
    "a body without a length": drip(b"HTTP/1.1 200 OK\r\n\r\n", GOOD),
    "chunks": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 20),
    "headers": drip(b"HTTP/1.1 200 OK\r\n", b"X-A: 1\r\n" * 12),
    "a status line": drip(b"HTTP/1.1 200 ", b"O" * 100),
    "continue": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 4),
    "an error's body": drip(b"HTTP/1.1 500 no\r\nContent-Length: 100\r\n\r\n", b"x" * 100),
}


@pytest.mark.parametrize("behave", HOLD_ON.values(), ids=HOLD_ON)
def test_a_request_is_over_by_one_deadline(tmp_path, behave):
    """Bytes that drip in do not prolong it. They would take five seconds."""
    began = time.monotonic()
    said = heard(behave, tmp_path, timeout=0.4)
    assert "no answer within 0.4 s" in said and 0.35 < time.monotonic() - began < 2.5


def test_tls_that_drips_is_over_by_the_deadline(tmp_path):
    """A handshake has no headers to wait for, and takes the socket over."""
    began = time.monotonic()
    record = drip(b"\x16\x03\x03\x40\x00", b"\x02" * 100)  # of 16 KB
    said = heard(record, tmp_path, scheme="https", timeout=0.4)
    assert "no answer within 0.4 s" in said and time.monotonic() - began < 2.5


# --- the key -------------------------------------------------------------------------------------


def echoes(key):
    raw = key.encode()
    message = lambda text: json.dumps({"error": {"message": text}}).encode()
    choice = lambda **what: json.dumps({"choices": [what]}).encode()
    error = lambda text: reply(b"401 no", b'{"error": "' + text + b'"}')
    padded = " " * ((1 << 16) - 20) + key  # cut off within the key
    quoted = quote(key, "").encode()
    return {
        "Location": reply(b"302 Found", b"", b"Location: http://else/?k=" + raw),
        "a quoted Location": reply(b"307 No", b"", b"Location: http://else/" + quoted),
        "the reason": reply(b"404 no " + raw),
        "a message": reply(b"400 no", message("x" * 190 + key)),
        "JSON's own escapes": error(raw.replace(b"/", b"\\/")),
        "escapes for all": error(b"".join(b"\\u%04x" % c for c in raw)),
        "no JSON": reply(b"500 no", b"<html>" + raw),
        "far behind": reply(b"400 no", padded.encode()),
        "success": reply(b"200 OK", GOOD.replace(b"x" * 60, raw)),
        "an error as success": reply(b"200 OK", message(key)),
        "a refusal": reply(b"200 OK", choice(message={"refusal": key})),
        "a way to end": reply(b"200 OK", choice(message={}, finish_reason=key)),
        "a type": reply(b"200 OK", choice(message={"content": {"k": key}})),
        "an encoding": reply(b"200 OK", GOOD, b"Content-Encoding: " + raw),
        "a protocol": lambda c: c.sendall(b"HTTP/" + raw + b" 200 OK\r\n\r\n"),
        "no HTTP": lambda c: c.sendall(raw + b"\r\n\r\n"),
    }


@pytest.mark.parametrize("key", [KEY, ODD_KEY])
@pytest.mark.parametrize("where", echoes(KEY))
def test_the_key_is_not_shown_whoever_repeats_it(tmp_path, caplog, capsys, where, key):
    caplog.set_level(0)
    said = heard(echoes(key)[where], tmp_path, key) + caplog.text + "".join(capsys.readouterr())
    for form in (key, quote(key, safe=""), key.replace("/", "\\/"), key[:12]):
        assert form not in said
    assert "***" in said or where in ("a way to end", "a type")


def test_words_that_are_no_secret_stay(tmp_path):
    """Local servers are given keys such as "1", which answers hold too."""
    assert "[1, 0, 1]" in heard(
        reply(b"200 OK", GOOD.replace(b"x" * 60, b"[1, 0, 1]")), tmp_path, "1"
    )


# --- floods, terminals, nonsense -----------------------------------------------------------------


@pytest.mark.parametrize("status", [b"200 OK", b"400 no", b"500 no"])
def test_bombs_are_not_blown_up(tmp_path, status):
    answer = reply(status, gzip.compress(b" " * (1 << 27), 1), b"Content-Encoding: gzip")
    said = []
    assert least_peak(lambda: said.append(heard(answer, tmp_path))) < 1 << 24
    assert ("compressed by gzip, unasked" in said[0]) == (status == b"200 OK")


def test_replies_without_an_end_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_client, "LARGEST_REPLY", 1 << 16)

    def flood(c):
        c.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            c.sendall(b" " * (1 << 16))

    assert "longer than 65,536 bytes" in heard(flood, tmp_path)


def test_replies_that_are_cut_short_are_none(tmp_path):
    """However whole what came of them looks."""
    short = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(GOOD) + 9) + GOOD
    assert "failed: once: IncompleteRead" in heard(lambda c: c.sendall(short), tmp_path)


@pytest.mark.parametrize(
    "line", [b"404 no", b"400 no", b"500 no", b"302 no", b"200 OK", b"999 odd", b"100x"]
)
def test_what_a_server_says_does_not_steer_a_terminal(tmp_path, line):
    words = b'{"error": "\\u001b[2J\\u202e\\ud83d\\r\\nfake line"}'
    said = heard(reply(line, words, b"Location: \x1b[2J"), tmp_path)
    assert not any(ord(c) < 32 or c in "\u202e\ud83d" for c in said)


@pytest.mark.parametrize(
    "body",
    [GOOD[:-1] + b', "usage": {"prompt_tokens": Infinity}}', b"[" * 60_000, b'{"a":' * 60_000,
     GOOD[:-1] + b', "usage": {"prompt_tokens": 1e400}}', b"9" * 5000, b"\xff\xfe", b"", b"null",
     b'{"error": {"message": ' + b"[" * 60_000, b'{"error": [[]]}', b'{"error": {"code": 1e3}}',
     b'{"choices": {"0": 1}}', b'{"choices": [[]]}', b'{"choices": [{"message": {"content": 5}}]}'],
    ids=range(14),
)  # fmt: skip
@pytest.mark.parametrize("line", [b"200 OK", b"401 no", b"500 no"])
def test_nonsense_is_one_line(tmp_path, body, line):
    assert "127.0.0.1" in heard(reply(line, body), tmp_path)  # and no traceback


def test_waits_that_are_no_time():
    for value in ("nan", "inf", "-inf", "1e400", "", "Mon, 99 Foo 99999 99:99:99 GMT"):
        assert retry_after(value) is None


# --- files ---------------------------------------------------------------------------------------


DAMAGED = [b"", b"{", b"5", b"[1]", b'{"key": "x"}', b'{"key": 5, "answer": 1}', b"[" * 100_000,
           b'{"key": "x", "answer": NaN}', b'{"key": "x", "answer": 1e400}', b"\xff\x00",
           b'{"key": "x", "answer": ' + b"9" * 400 + b"}", b'{"key": ["x"], "answer": 1}',
           b'{"key": "x", "answer": "\\ud83d"}',
           b'{"key": "x", "key": "y", "answer": 1}']  # fmt: skip


@pytest.mark.parametrize("bad", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_costs_that_line(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    lines = [b'{"key": "one", "answer": 1}', bad, b'{"key": "two", "answer": [2]}', b'{"key": "t']
    path.write_bytes(b"\n".join(lines))
    file = AnswerFile(path)
    assert (file.get("one"), file.get("two"), file.get("x"), len(file)) == (1, [2], None, 2)
    assert file.damaged == (bad not in (b"", b"{"))  # the last as a killed process leaves one
    file.put("x", "\ud83d")
    file.close()
    assert path.read_bytes().startswith(b"\n".join(lines))


@pytest.mark.parametrize(
    "content", [b"a text\nof mine", b"\x00\x01" * 99, b'{"format": 1}\n', b"[]"]
)
def test_other_files_are_not_added_to(tmp_path, content):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="mine.txt: holds something other than answers"):
        AnswerFile(path)
    assert path.read_bytes() == content


def test_half_characters_do_not_cost_the_file(tmp_path):
    """As in the name of a coder's folder that is no UTF-8."""
    entry = {"text": "a \ud83d", "method": "endpoint", "model": "m", "scores": {}, "examples": 1}
    write_explanations(tmp_path, "coder\udcff", {3: entry})
    assert read_explanations(tmp_path)[3]["text"] == "a ?"


def test_scores_that_are_no_numbers(tmp_path):
    scores = {"detection": {"balanced_accuracy": True}, "fuzzing": {"balanced_accuracy": "0.9"},
              "intruder": {"accuracy": [1]}, "saebench": {"score": 1}}  # fmt: skip
    entry = {"text": "a", "method": "endpoint", "model": "m", "scores": scores}
    write_explanations(tmp_path, "c", {3: entry})
    assert explanation_note(read_explanations(tmp_path)[3]) == "m, saebench 1.00"
    with pytest.raises(InputError, match="feature 4: cannot be written .Out of range"):
        write_explanations(tmp_path, "c", {4: {**entry, "scores": {"x": {"n": np.inf}}}})
    assert list(read_explanations(tmp_path)) == [3]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activations_that_are_no_numbers(value):
    store = PlantedStore()
    store.values[2, np.flatnonzero(store.values[2])[5]] = value
    corpus = open_corpus(store, Tok(), Sampling())
    assert len(corpus.feature(1)[0]) > 0
    with pytest.raises(InputError, match="planted: feature 2 has activations that are infinite"):
        corpus.feature(2)


def test_hold_of_a_local_server_is_let_go(tmp_path):
    """Nothing of a request stays behind: no timer, no copy of its socket."""
    answers = AnswerFile(tmp_path / "a.jsonl")
    with ChatServer(lambda body: "yes") as server:
        client = ChatClient(Endpoint(server.url, "m", timeout=60), answers)
        for number in range(3):
            client.ask([{"role": "user", "content": str(number)}], 5)
    timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
    for timer in timers:
        timer.join(1.0)
    assert not any(t.is_alive() for t in timers)
    answers.close()
