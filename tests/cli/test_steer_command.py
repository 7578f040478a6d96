"""`gemma-scope steer`: what it prints and writes, and what is wrong is known at once."""

import json
import re

import numpy as np
import pytest

import gemma_scope_jax as gs
from chat_server import ChatServer
from commands import command

WIDTH, D = 12, 32


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    r = np.random.default_rng(0)
    normal = lambda *shape: r.normal(size=shape).astype(np.float32)
    made = gs.SparseCoder(
        w_enc=normal(D, WIDTH), b_enc=np.zeros(WIDTH, np.float32),
        threshold=np.full(WIDTH, 0.5, np.float32), w_dec=normal(WIDTH, D),
        b_dec=np.zeros(D, np.float32), layer=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("coders") / "layer_2"
    gs.save_coder(made, path, config_extra={"model_name": "acme/tiny"})
    return path


@pytest.fixture
def given(coder, tmp_path):
    (tmp_path / "prompts.txt").write_text("abc\nde\n\nfghi\njk\n")
    return ("--coder", coder, "--model", "tiny", "--prompts", tmp_path / "prompts.txt",
            "--new-tokens", 3, "--strengths", 0.2, 1.5)  # fmt: skip


def test_prints_the_feature_beside_its_baselines_and_writes_a_page(tiny, given, tmp_path, capsys):
    out = tmp_path / "new"
    assert command("steer", 4, *given, "--about", "plums", "--words", "a*", "--out", out) == 0
    said = capsys.readouterr().out
    for group in ("unsteered", "feature 4", "random feature", "other layer", "prompt"):
        assert group in said
    assert "2 prompts, the strength chosen on 2 others" in said
    kept = json.loads((out / "steer.json").read_text())
    names = [arm["name"] for arm in kept["sweep"]["arms"]]
    assert names[0] == "unsteered" and "feature 4 x 0.2" in names and "prompt" in names
    spec = next(a["spec"] for a in kept["sweep"]["arms"] if a["name"] == "feature 4 x 1.5")
    assert gs.steer_spec(spec).steps[0].strength == 1.5
    page = (out / "steer.html").read_text()
    assert "<title>Steering with feature 4: plums" in page
    assert not re.search(r"(src|href)=.?http", page) and "{{" not in page


def test_texts_of_both_kinds_add_two_vectors(tiny, given, tmp_path, capsys):
    for name, letters in (("yes", "abcd"), ("no", "wxyz")):
        lines = ["".join(np.random.default_rng(n).choice(list(letters), 6)) for n in range(6)]
        (tmp_path / name).write_text("\n".join(lines))
    more = ("--positive", tmp_path / "yes", "--negative", tmp_path / "no", "--json")
    assert command("steer", 4, *given, *more) == 0
    found = json.loads(capsys.readouterr().out)
    groups = {group["group"] for group in found["calibration"]["groups"]}
    assert {"difference of means", "rank-1, trained"} <= groups


def test_a_file_of_steps_shows_what_it_does(tiny, given, tmp_path, capsys):
    step = {"op": "clamp", "strength": 40.0, "feature": 3, "where": "generated"}
    (tmp_path / "spec.json").write_text(json.dumps([step]))
    assert command("steer", *given, "--spec", tmp_path / "spec.json", "--temperature", 0) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4 and lines[1].split() == ["prompt", "unsteered", "steered"]


def test_ranks_features_by_what_they_write(tiny, given, capsys):
    assert command("steer", *given, "--rank", 5, "--json") == 0
    head, *rows = json.loads(capsys.readouterr().out)
    assert head[:3] == ["feature", "output score", "confidence"] and len(rows) == 5
    scores = [float(row[1]) for row in rows]
    assert scores == sorted(scores, reverse=True)


def test_a_probe_and_a_judge_are_effects(tiny, given, tmp_path, capsys):
    weights, tok = gs.load_model("tiny", "float32", None), gs.load_tokenizer("tiny")
    ids = [[tok.encode(w * n) for n in range(2, 8)] for w in ("ab", "yz")]
    vector = gs.contrast_vector(weights, *ids, "resid_post", 1)
    vector.save(tmp_path / "v.safetensors")
    assert command("steer", 4, *given, "--probe", tmp_path / "v.safetensors", "--json") == 0
    kept = json.loads(capsys.readouterr().out)
    arm = kept["sweep"]["arms"][0]
    text = np.concatenate([tok.encode("abc"), tok.encode(arm["texts"][0], bos=False)])
    x = gs.run(weights, text[None], gs.capture("resid_post", 1)).reads["resid_post"][0]
    score = (np.asarray(x, np.float64) @ vector.vector)[4:].mean()
    assert arm["effects"]["score of v.safetensors"][0] == pytest.approx(score, rel=1e-4)
    with ChatServer(lambda body: "Yes") as server:
        ask = ("--ask", "Is it short?", "--endpoint", server.url, "--judge-model", "m")
        assert command("steer", 4, *given, *ask, "--out", tmp_path / "new", "--json") == 0
        asked = [body["messages"][-1]["content"] for body in server.bodies]  # in any order
    kept = json.loads(capsys.readouterr().out)
    assert kept["sweep"]["arms"][0]["effects"]["Is it short?"] == [1.0] * 4
    for prompt in ("abc", "de", "fghi", "jk"):
        assert any(f"Request: {prompt}\n" in question for question in asked)
    assert all(q.endswith("Is it short? Reply with Yes or No.") for q in asked)


BAD = {
    "nothing": ([], "give one of these: a FEATURE, --spec FILE, or --rank N"),
    "two things": ([4, "--rank", 3], "give one of these"),
    "an unknown feature": ([12], "feature 12: the coder has features 0 to 11"),
    "a page of a rank": (["--rank", 3, "--out", "new"], "are for a FEATURE"),
    "a negative rank": (["--rank", -1], "--rank is a number of features"),
    "one kind of text": ([4, "--positive", "FILE"], "--positive and --negative belong together"),
    "a missing file": ([4, "--prompts", "nowhere.txt"], "nowhere.txt: No such file"),
    "an empty file": ([4, "--prompts", "EMPTY"], "no lines of text"),
    "too few prompts": ([4, "--prompts", "FILE"], "needs at least 4 prompts, not"),
    "strengths twice": ([4, "--strengths", 1, 1], "strengths must be different numbers"),
    "a missing spec": (["--spec", "nowhere.json"], "nowhere.json: no such file"),
    "a spec that is none": (["--spec", "FILE"], "not usable as JSON"),
    "a bound below 1": ([4, "--bound", 0.5], "at least 1"),
    "no new tokens": ([4, "--new-tokens", 0], "max_new_tokens must be at least 1"),
    "a negative temperature": ([4, "--temperature", -1], "temperature must be 0"),
    "no rows": ([4, "--rows", 0], "rows must be at least 1"),
    "two effects": ([4, "--words", "a", "--ask", "b?"], "one effect at a time"),
    "no endpoint": ([4, "--ask", "b?"], "--ask needs --endpoint URL and --judge-model"),
    "an endpoint alone": ([4, "--endpoint", "http://x/v1"], "--endpoint goes with --ask"),
    "nowhere for answers": (
        [4, "--ask", "b?", "--endpoint", "http://x/v1", "--judge-model", "m"],
        "needs --out FOLDER",
    ),
    "no probe": ([4, "--probe", "FILE"], "FILE"),
    "another model's probe": ([4, "--probe", "WIDE"], "of 7 values at layer 1 does not fit"),
    "a file in the way": ([4, "--out", "FILE/x"], "FILE"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_in_one_line(tiny, given, tmp_path, capsys, name):
    (tmp_path / "file").write_text("words")
    (tmp_path / "empty").write_text("\n \n")
    gs.SteeringVector(np.ones(7), "resid_post", 1).save(tmp_path / "wide")
    argv, line = BAD[name]
    places = {"FILE": tmp_path / "file", "EMPTY": tmp_path / "empty",
              "WIDE": tmp_path / "wide", "FILE/x": tmp_path / "file/x"}  # fmt: skip
    argv = [places.get(str(a), a) for a in argv]
    line = line.replace("FILE", str(tmp_path)) if line.startswith("FILE") else line
    feature = [a for a in argv[:1] if isinstance(a, int)]  # before options that take several
    assert command("steer", *feature, *given, *argv[len(feature) :]) == 2
    captured = capsys.readouterr()
    errors = [one for one in captured.err.splitlines() if one.startswith("error: ")]
    assert len(errors) == 1 and line in errors[0]
    assert captured.out == ""
