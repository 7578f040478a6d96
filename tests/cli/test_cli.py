"""The command line: what it prints, what it writes, and one clear line for whatever is wrong."""

import dataclasses
import importlib
import inspect
import io
import json
import subprocess
import sys

import numpy as np
import pytest

import gemma_scope_jax as gs
from coders import random_coder
from gemma_scope_jax import cli
from gemma_scope_jax.cli import shared
from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.coders.release.files import save_coder

TEXT = "plums & <b>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("coders") / "sae"
    save_coder(
        random_coder(info=CoderInfo(l0=10.0), threshold=1.0),
        path,
        config_extra={"model_name": "acme/tiny"},
    )
    return path


def command(*argv):
    return cli.main([str(a) for a in argv])


def test_inspect_prints_the_same_for_text_file_and_stdin(
    tiny, folder, tmp_path, capsys, monkeypatch
):
    options = ("--model", "tiny", "--coder", folder, "--top-k", 2)
    assert command("inspect", TEXT, *options) == 0
    first = capsys.readouterr()
    assert "resid_post of layer 1" in first.out and "delta loss" in first.out
    assert "loading model tiny" in first.err and "compiling" in first.err

    (tmp_path / "text.txt").write_text(TEXT + "\n")  # the line break at the end is not the text's
    assert command("inspect", "--file", tmp_path / "text.txt", *options) == 0
    assert capsys.readouterr().out == first.out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode() + b"\n")))
    assert command("inspect", "-", *options) == 0
    assert capsys.readouterr().out == first.out


def test_inspect_as_json_and_page(tiny, folder, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    options = ("--model", "tiny", "--coder", folder, "--json", "--html", page)
    assert command("inspect", TEXT, *options) == 0
    seen = json.loads(capsys.readouterr().out)
    assert "".join(seen["tokens"][1:]) == TEXT and seen["layer"] == 1 and seen["width"] == 48
    assert len(seen["next"]) == 10 and seen["coder"] == folder.name
    assert "<title>plums &amp; &lt;b&gt; · " in page.read_text()


def test_check_says_so_by_its_exit_code(tiny, folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a quick brown fox\n\f\njumps over the lazy dog")
    assert command("check", folder, "--model", "tiny", "--text", text) == 1
    out = capsys.readouterr().out
    assert "warning: the coder hardly explains anything here" in out and "(target 10)" in out
    assert "resid_post of layer 2" in out and "looks right" not in out
    assert command("check", folder, "--model", "tiny", "--text", text, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["warnings"] and report["target_l0"] == 10 and report["tokens"] == 40
    assert {"name", "fvu", "l0"} == report["alternatives"][0].keys()


def bad(folder, tmp):
    """Command lines that cannot work, and a part of the line that says why."""
    (tmp / "latin.txt").write_bytes(b"caf\xe9")
    (tmp / "blank.txt").write_text(" \n\n")
    (tmp / "empty").mkdir()
    for name, change in {
        "deep": dict(layer=40),
        "wide": dict(d=64),
        "head": dict(reads="z", writes="z"),
    }.items():
        save_coder(random_coder(**change), tmp / name, config_extra={"model_name": "acme/tiny"})
    save_coder(random_coder(layers=(0, 1)), tmp / "cross", config_extra={"model_name": "acme/tiny"})
    inspect = ("inspect", TEXT, "--model", "tiny", "--coder")
    check = ("check", folder, "--model", "tiny", "--text")
    yield ("inspect", ""), "the text is empty"
    yield ("inspect", " \n "), "the text is empty"
    yield ("inspect",), "the text is empty"
    yield ("inspect", TEXT, "--file", tmp / "latin.txt"), "not both"
    yield ("inspect", "--file", tmp / "none.txt"), "none.txt: No such file"
    yield ("inspect", "--file", tmp), "Is a directory"
    yield ("inspect", "--file", tmp / "latin.txt"), "not UTF-8"
    yield ("inspect", "--file", tmp / "blank.txt"), "the text is empty"
    yield ("inspect", TEXT, "--coder", tmp / "none"), "none"
    yield ("inspect", TEXT, "--coder", tmp / "empty"), "empty"
    yield ("inspect", TEXT, "--coder", "gemma-scope-2-270m-pt/resid_post/layer_3"), "no coder"
    yield ("inspect", TEXT, "--coder", folder, "--model", "gemma-3-9b"), "unknown model"
    yield ("inspect", TEXT, "--coder", folder, "--model", "./none"), "none"
    yield ("inspect", TEXT, "--coder", folder, "--model", "gemma-3-1b"), "has 1152"
    yield (*inspect, tmp / "deep"), "layer 40, but tiny"
    yield (*inspect, tmp / "wide"), "reads 64 values at resid_post"
    yield (*inspect, tmp / "head"), "reads 32 values at z"
    yield (*inspect, tmp / "cross"), "several layers"
    yield (*inspect, folder, "--top-k", 0), "top-k 0"
    yield (*inspect, folder, "--top-k", 49), "48 features"
    yield (*inspect, folder, "--html", tmp / "latin.txt" / "page.html"), "latin.txt"
    yield ("inspect", "x" * 64, *inspect[2:], folder), "more than the context"
    yield (*check, tmp / "none.txt"), "none.txt"
    yield (*check, tmp / "latin.txt"), "latin.txt"
    yield (*check, tmp / "blank.txt"), "no text"
    yield ("check", tmp / "deep", "--model", "tiny"), "layer 40"
    yield ("list", "no-such-coder"), "no published coder"
    yield ("list", "--layer", 99), "layer 99"
    yield ("train", tmp / "none.py", "--out", tmp / "run"), "none.py"


def test_what_is_wrong_is_one_line_and_exit_code_2(tiny, folder, tmp_path, capsys):
    for argv, said in bad(folder, tmp_path):
        code = command(*argv)
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if not line.endswith(" ...")]
        assert (code, len(errors), captured.out) == (2, 1, ""), (argv, captured)
        assert errors[0].startswith("error: ") and said in errors[0], (argv, errors)


def test_unknown_options_and_commands_exit_with_2(capsys):
    for argv in (["inspect", "--bogus"], ["explode"], [], ["inspect", "x", "--top-k", "many"]):
        with pytest.raises(SystemExit) as left:
            cli.main(argv)
        assert left.value.code == 2
        capsys.readouterr()


def test_interrupts_and_full_disks(monkeypatch, capsys):
    def raises(error):
        def run(*_, **__):
            raise error

        return run

    for error, code, said in (
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "page.html"), 2, "error: page.html: No space left"),
    ):
        monkeypatch.setattr(shared, "stage", raises(error))
        assert cli.main(["inspect", "x"]) == code
        assert capsys.readouterr().err.startswith(said)


def test_text_is_read_alike_by_all_commands():
    """What counts in chats, and where text is, as in a training config."""
    for name in ("extract", "evaluate", "cards"):
        command = importlib.import_module(f"gemma_scope_jax.cli.{name}").command
        data = inspect.signature(command).parameters["data"]
        own = data.annotation() if data.default is data.empty else data.default
        roles = ("system", "user", "model") if name == "evaluate" else gs.TextData().roles
        assert dataclasses.asdict(own) == dataclasses.asdict(gs.TextData(roles=roles)), name
        assert "about this many tokens" in command.__doc__


def test_help_version_and_list_need_no_jax():
    """They answer at once: jax alone takes a second to import."""
    for argv in (["--help"], ["inspect", "--help"], ["--version"], ["list", "--limit", "3"]):
        program = (
            "import sys; from gemma_scope_jax.cli import main\n"
            f"try: main({argv!r})\nexcept SystemExit as e: assert not e.code\n"
            "assert not {'jax', 'numpy', 'sentencepiece'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("width", (100, 200))
def test_help_wraps_at_the_width_of_the_terminal(width, capsys, monkeypatch):
    """Not where the lines of the docstring end."""
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        command("inspect", "--help")
    assert "The default is the coder's model. (default: '')" in capsys.readouterr().out


def test_a_closed_pipe_is_quiet():
    """`gemma-scope list | head -1` ends without a traceback."""
    program = "import sys; from gemma_scope_jax.cli import main; sys.exit(main(['list']))"
    running = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    running.stdout.readline()
    running.stdout.close()
    errors = running.stderr.read()
    running.stderr.close()
    assert (running.wait(), errors) == (0, b"")


@pytest.mark.real
def test_the_capital_of_france(tmp_path, capsys, monkeypatch):
    """The real model and the packaged coder, as `make demo` runs them."""
    monkeypatch.setattr(gs, "use_compilation_cache", lambda: None)
    page = tmp_path / "page.html"
    options = ("--json", "--html", page, "--dtype", "float32")
    assert command("inspect", "The capital of France is", *options) == 0
    seen = json.loads(capsys.readouterr().out)
    assert [n["token"] for n in seen["next"][:5]] == [" the", " a", " Paris", " one", " known"]
    logits = [n["logit"] for n in seen["next"][:5]]
    np.testing.assert_allclose(logits, [19.09, 18.55, 18.27, 18.11, 17.78], atol=0.01)
    assert seen["tokens"] == ["<bos>", "The", " capital", " of", " France", " is"]
    assert seen["features"][0] == [] and all(len(f) == 5 for f in seen["features"][1:])
    assert seen["figures"]["fvu"] < 1 and all(seen["labels"][f]["examples"] for f in seen["labels"])
    assert "The capital of France is" in page.read_text()
