"""Limits, files of answers and going on: nothing is asked twice, and no key is written."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from chat_server import KEY, ChatServer, explained
from gemma_scope_jax.autointerp.answers import AnswerFile, request_key
from gemma_scope_jax.autointerp.examples import Sampling, open_corpus
from gemma_scope_jax.autointerp.explain import fingerprint
from gemma_scope_jax.autointerp.explanations import read_explanations
from gemma_scope_jax.errors import InputError
from judges import know
from memory_use import least_peak
from planted_store import PlantedStore, Tok


@pytest.mark.parametrize("limit", [1, 3, 6])
def test_no_more_requests_than_allowed_are_under_way(corpus, tmp_path, limit):
    with ChatServer(know, pause=0.02) as server:
        explained(corpus, server, tmp_path, range(4), concurrency=limit)
    assert min(limit, 2) <= server.most <= limit


def test_the_key_goes_into_the_header_and_nowhere_else(corpus, tmp_path, capsys):
    """Not even when the server sends it back."""
    with ChatServer(lambda body: f"{KEY} {know(body)}") as server:
        report, client = explained(corpus, server, tmp_path, (0,))
    assert all(h["Authorization"] == f"Bearer {KEY}" for h in server.headers)
    assert KEY not in json.dumps(server.bodies) and KEY not in repr(client.endpoint)
    for path in tmp_path.rglob("*"):
        assert KEY.encode() not in path.read_bytes()
    assert KEY not in "".join(capsys.readouterr()) and KEY not in "".join(client.notes)
    with ChatServer(know) as server:
        explained(corpus, server, tmp_path, (1,), key="")
    assert all("Authorization" not in h for h in server.headers)


def test_finished_features_are_not_asked_again(corpus, tmp_path):
    with ChatServer(know) as server:
        explained(corpus, server, tmp_path, (0, 1), ("detection",))
        before = len(server.bodies)
        report, _ = explained(corpus, server, tmp_path, (0, 1), ("detection",))
        assert len(server.bodies) == before and (report.kept, report.done) == (2, 0)
        (tmp_path / "explanations.json").unlink()  # the answers alone are enough
        again, client = explained(corpus, server, tmp_path, (0, 1), ("detection",))
        assert len(server.bodies) == before and again.done == 2 and client.requests == 0
        more, _ = explained(corpus, server, tmp_path, (0, 1, 2), ("detection", "saebench"))
        new = server.bodies[before:]
    assert more.kept == 0 and len(new) == 2 + 22  # two of the new score, and one whole feature
    entries = read_explanations(tmp_path, 8)
    assert sorted(entries) == [0, 1, 2] and set(entries[0]["scores"]) == {"detection", "saebench"}


def test_other_judges_and_other_draws_start_anew(tmp_path):
    one = open_corpus(PlantedStore(), Tok(), Sampling())
    other = open_corpus(PlantedStore(), Tok(), Sampling(seed=5))
    with ChatServer(know) as server:
        explained(one, server, tmp_path, (0,))
        first = len(server.bodies)
        report, _ = explained(other, server, tmp_path, (0,))
    assert report.kept == 0 and len(server.bodies) == 2 * first


def test_settings_that_change_scores_are_another_judges(corpus, tmp_path):
    """Scores of one are not taken for the other's, in whichever order they come."""
    names = set()
    with ChatServer(know) as server:
        for options in ({}, {"options": {"top_p": 0.5}}, {"logprobs": True},
                        {"options": {"top_p": 0.1}}):  # fmt: skip
            before = len(server.bodies)
            report, client = explained(corpus, server, tmp_path, (0,), **options)
            assert (report.kept, report.done) == (0, 1) and len(server.bodies) > before
            again, _ = explained(corpus, server, tmp_path, (0,), **options)
            assert again.kept == 1
            names.add(read_explanations(tmp_path, 8)[0]["model"])
            assert "0.5" not in client.endpoint.name  # options may be secret
    assert len(names) == 4 and "judge-1" in names


def test_neighbours_count_only_where_they_are_drawn_from():
    draw = lambda **change: fingerprint(open_corpus(PlantedStore(), Tok(), Sampling(**change)))
    assert draw() == draw(neighbours="cooccurring")
    assert draw(hard=5) != draw(hard=5, neighbours="cooccurring")


def test_progress_says_how_far_it_is(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gemma_scope_jax.autointerp.explain.SAY_EVERY", 0.0)
    with ChatServer(know) as server:
        explained(corpus, server, tmp_path, range(4))
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("100.0 %  4 features ") and "left" not in lines[-1]
    assert sum("100.0 %" in line for line in lines) == 1


def test_the_answer_file_survives_a_torn_line(tmp_path):
    path = tmp_path / "a.jsonl"
    first = AnswerFile(path)
    first.put("one", {"text": 'ü\n"{', "logprobs": [{"token": "["}]})
    first.put("two", [1])
    first.close()
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        found = AnswerFile(path)
        lines = whole[:cut].count(b"\n")
        complete = whole[:cut].rstrip(b"\n").count(b"\n") + (
            cut in (len(whole) - 1, whole.index(b"\n"))
        )
        assert len(found) == max(lines, complete) and found.damaged == 0
        found.put("three", 3)
        found.close()
        again = AnswerFile(path)
        assert again.get("three") == 3 and len(again) == len(found) and again.damaged == 0
        assert lines < 1 or again.get("one")["text"] == 'ü\n"{'
        again.close()
    assert (
        request_key({"a": 1, "b": [2]}) == request_key({"b": [2], "a": 1}) != request_key({"a": 1})
    )


def test_answers_are_not_held_in_memory(tmp_path):
    file = AnswerFile(tmp_path / "a.jsonl")

    def put():
        for i in range(200):
            file.put(str(i), {"text": str(i) * 20_000})

    assert (
        least_peak(put) < 1e6 and file.get("7") == {"text": "7" * 20_000} and file.get("x") is None
    )
    file.close()
    again = AnswerFile(tmp_path / "a.jsonl")
    assert again.get("199") == {"text": "199" * 20_000}
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(InputError, match="a.jsonl: cannot be read"):
        again.get("199")
    again.close()


def test_answer_files_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        AnswerFile(tmp_path / "folder")


def test_many_threads_write_whole_lines(tmp_path):
    file = AnswerFile(tmp_path / "a.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: file.put(str(i), "x" * (i % 50)), range(400)))
    file.close()
    again = AnswerFile(tmp_path / "a.jsonl")
    assert len(again) == 400 and again.get("49") == "x" * 49
    again.close()


RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
from pathlib import Path
from chat_server import explained
from planted_store import PlantedStore, Tok
from gemma_scope_jax.autointerp.examples import Sampling, open_corpus
import types
server = types.SimpleNamespace(url={url!r})
corpus = open_corpus(PlantedStore(), Tok(), Sampling())
explained(corpus, server, Path({folder!r}), range(5), ("detection", "fuzzing"))
"""


def start(server, folder):
    script = RUN.format(url=server.url, folder=str(folder))
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE)


def test_killed_and_resumed_it_asks_nothing_twice(corpus, tmp_path):
    """SIGKILL at two moments. Only what was under way is asked again, and the file is the same."""
    with ChatServer(know, pause=0.03) as server:
        for _ in range(2):
            run, before = start(server, tmp_path), len(server.bodies)
            while len(server.bodies) < before + 25 and run.poll() is None:
                time.sleep(0.005)
            assert run.poll() is None, run.stderr.read().decode()
            run.kill()
            run.communicate()
            time.sleep(0.1)
        last = start(server, tmp_path)
        error = last.communicate(timeout=60)[1].decode()
        assert last.returncode == 0, error
        asked = [json.dumps(b) for b in server.bodies]
        repeated = len(asked) - len(set(asked))
        assert repeated <= 2 * 4  # those under way at a kill
        whole = tmp_path / "whole"
        explained(corpus, server, whole, range(5), ("detection", "fuzzing"))
    assert read_explanations(tmp_path, 8) == read_explanations(whole, 8)
    assert len(set(asked)) == 5 * (1 + 20 + 20)


def test_interrupted_it_keeps_what_it_has(tmp_path):
    """SIGINT: what is under way is still received, nothing else is sent, the file is whole."""
    with ChatServer(know, pause=0.2) as server:
        run = start(server, tmp_path)
        while len(server.bodies) < 20 and run.poll() is None:
            time.sleep(0.005)
        run.send_signal(signal.SIGINT)
        error = run.communicate(timeout=20)[1].decode()
        assert "KeyboardInterrupt" in error
        sent = len(server.bodies)
        assert sent < 100  # of some 200
    kept = AnswerFile(tmp_path / "answers.jsonl")
    assert len(kept) == sent
    kept.close()
    assert all(e["scores"]["fuzzing"] for e in read_explanations(tmp_path, 8).values())
