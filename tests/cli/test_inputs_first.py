"""Whatever is wrong with a command line is known before a model's weights are read."""

import pytest

import gemma_scope_jax as gs
from coders import random_coder
from commands import command, give_tiny
from gemma_scope_jax.coders.release.files import save_coder
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.training import train as training
from tiny import tiny_model

ABOUT = {"model_name": "acme/tiny"}
TINY = ("--model", "tiny")


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Coders, texts and a config; loading a model fails the test."""

    def late(*args, **kwargs):
        raise AssertionError("a model is loaded before its inputs are checked")

    model = tiny_model(PRESETS["gemma-3-270m"], layers=4)
    give_tiny(monkeypatch, model, names=("tiny", "gemma-3-270m"))
    monkeypatch.setattr(gs, "load_model", late)
    monkeypatch.setattr(training, "load_model", late)
    monkeypatch.setattr(training, "model_config", lambda name: model.config)
    save_coder(random_coder(), tmp_path / "one", config_extra=ABOUT)
    save_coder(random_coder(layer=9), tmp_path / "deep", config_extra=ABOUT)
    save_coder(random_coder(d=64), tmp_path / "wide", config_extra=ABOUT)
    (tmp_path / "text.txt").write_text("a quick brown fox jumps over the lazy dog " * 6)
    (tmp_path / "table.csv").write_text("text\nno labels\n")
    (tmp_path / "config.py").write_text(
        "import gemma_scope_jax as gs\n"
        "config = gs.TrainConfig(coders=(gs.CoderConfig(2, width=64, target_l0=4),), "
        "tokens=9000, batch_size=2, context_size=32, buffer=1024, train_batch_size=64, "
        f"data=gs.TextData(files=({str(tmp_path / 'text.txt')!r},)))\n"
    )
    return tmp_path


def wrong(folder):
    """Command lines, and a part of the line that says what is wrong."""
    one, text = folder / "one", folder / "text.txt"
    new, blocked = folder / "new", text / "below"
    given = ("--text", text, *TINY)
    for coder, says in {
        folder / "deep": "layer 9",
        folder / "wide": "reads 64 values",
        folder / "none": "none",
        "gemma-scope-2-270m-pt/resid_post/layer_12_width_3k": "no coder",
    }.items():
        yield ("inspect", "words", "--coder", coder, *TINY), says
        yield ("check", coder, *TINY), says
        yield ("extract", coder, *given, "--out", new), says
        yield ("cards", coder, *given, "--out", new), says
        yield ("evaluate", coder, *given), says
        yield ("benchmark", coder, "--absorption", *TINY, "--out", new), says
    yield ("inspect", "words", "--coder", one, *TINY, "--html", blocked), "text.txt is not a folder"
    yield ("inspect", "words", "--coder", one, *TINY, "--top-k", 10**6), "top-k"
    yield ("inspect", "words" * 99, "--coder", one, *TINY), "more than the context"
    yield ("check", one, *TINY, "--text", folder / "none.txt"), "no text files match"
    for name in ("extract", "cards"):
        yield (name, one, *TINY, "--text", folder / "none.txt", "--out", new), "no text files match"
        yield (
            (name, one, *given, "--context-size", 64, "--out", blocked),
            "text.txt is not a folder",
        )
    yield ("extract", one, *given, "--out", new, "--context-size", 65), "takes 2 to 64"
    yield ("extract", one, *given, "--out", new, "--context-size", 64, "--slots", 0), "slots 0"
    yield ("extract", one, *given, "--out", new, "--roles", "nobody"), "no such role"
    yield ("cards", one, *given, "--out", new, "--top", 0), "top is 0"
    yield ("cards", one, *TINY, "--store", folder / "none", "--out", new), "none"
    yield ("evaluate", one, *given, "--out", blocked), "text.txt is not a folder"
    yield ("evaluate", one, *TINY, "--text", folder / "none.txt"), "no text files match"
    yield ("evaluate", one, *given, "--context-size", 65), "more than the model's context"
    yield ("evaluate", one, *given, "--context-size", 64, "--batch-size", 0), "batch_size"
    table = ("--tpp", folder / "table.csv")
    yield ("benchmark", one, *table, *TINY), "table.csv"
    yield ("benchmark", one, "--probing", folder / "none.csv", *TINY), "none.csv"
    yield ("benchmark", one, "--absorption", *TINY, "--out", blocked), "text.txt is not a folder"
    explain = ("explain", one, "--judge", "model", *TINY, "--store")
    yield (*explain, folder / "none", "--sample", 3), "none"
    yield (*explain, new, "--scores", "detecton"), "did you mean detection"
    yield (*explain, new, "--out", blocked), "text.txt is not a folder"
    train = ("train", folder / "config.py", "--out")
    yield ("train", folder / "config.py"), "--out FOLDER"
    yield (*train, new, "--coders.0.layers", 4), "layer 4: the model has 0..3"
    yield (*train, new, "--coders.0.reads", "resid_pots"), "resid_pots"
    yield (*train, new, "--data.files", folder / "none.txt"), "no text files match"
    yield (*train, new, "--coders.0.init_from", folder / "none"), "none"
    yield (*train, new, "--coders.0.widht", 8), "did you mean coders.0.width"
    yield (*train, new, "--tokens", "many"), "tokens takes a whole number, not many"
    yield (*train, blocked), "text.txt is not a folder"
    store = ("activations", folder / "config.py", "--out")
    yield (*store, blocked), "text.txt is not a folder"
    yield (*store, new, "--coders.0.layers", 4), "layer 4"
    yield (*store, new, "--data.files", folder / "none.txt"), "no text files match"


def test_what_is_wrong_is_one_line_before_weights_are_read(folder, capsys):
    otherwise = []
    for argv, says in wrong(folder):
        code = command(*argv)
        out, err = capsys.readouterr()
        last = err.splitlines()[-1]
        if (code, out) != (2, "") or not last.startswith("error: ") or says not in last:
            otherwise.append((argv, says, last))
        assert not (folder / "new").exists() or not any((folder / "new").iterdir()), argv
    assert otherwise == []


def test_a_right_command_line_loads_it(folder):
    with pytest.raises(AssertionError, match="before its inputs"):
        text = ("--text", folder / "text.txt", "--context-size", 64)
        command("extract", folder / "one", *TINY, *text, "--out", folder / "new")
