"""Failing disks where more is at work than our own writers: files of answers, Orbax's checkpoints,
and whole commands. One line, nothing lost of what was there, and the same again goes on."""

import itertools
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from card_folders import card_coder
from commands import command, give_tiny
from faults import Faults
from gemma_scope_jax.autointerp.answers import AnswerFile
from gemma_scope_jax.coders.release.files import save_coder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.training import checkpoints
from letters import Letters

TEXT = "the quick brown fox jumps over the lazy dog and runs away again"


def test_answers_that_were_given_stay_however_writing_fails(tmp_path):
    answers = {name: {"text": name * 9, "logprobs": [{"token": "["}]} for name in "abc"}
    for number in itertools.count(1):
        path, kept, failed = tmp_path / str(number) / "a.jsonl", [], None
        with Faults(path.parent, number) as faults:
            try:
                file = AnswerFile(path)
                for name, answer in answers.items():
                    file.put(name, answer)
                    kept.append(name)
            except InputError as error:
                failed = error
                assert "\n" not in str(error) and str(path.parent) in str(error)
            else:
                file.close()
        assert (failed is not None) == faults.happened
        again = AnswerFile(path)
        assert {n: again.get(n) for n in kept} == {n: answers[n] for n in kept}
        assert again.damaged == 0 and len(again) == len(kept)
        for name, answer in answers.items():
            again.put(name, answer)
        again.close()
        last = AnswerFile(path)
        assert {n: last.get(n) for n in answers} == answers and last.damaged == 0
        last.close()
        if not faults.happened:
            assert number > 4
            return


# Orbax's threads end with exceptions of their own then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_checkpoint_that_fails_leaves_those_before(tmp_path, monkeypatch):
    """Nothing waits for it, either."""
    monkeypatch.setattr(checkpoints, "_raw", lambda state: state)
    monkeypatch.setattr(checkpoints, "_keyed", lambda state: state)
    state = lambda n: {"a": jnp.full((8,), float(n))}
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )

    def save(folder, step):
        kept = checkpoints.Checkpoints(epath.Path(folder), 2)
        try:
            kept.save(step, state(step), [step], None, wait=True)
        finally:
            kept.close()

    def newest(folder):
        kept = checkpoints.Checkpoints(epath.Path(folder), 2)
        found, step, positions, _ = kept.restore(like)
        kept.close()
        assert positions == [step] and (np.asarray(found["a"]) == step).all()
        return step

    for number in itertools.count(1, 3):
        folder = tmp_path / str(number)
        save(folder, 1)
        with Faults(folder, number) as faults:
            try:
                save(folder, 2)
                assert not faults.happened
            except InputError as error:
                assert "\n" not in str(error) and str(folder) in str(error)
        # a thread that waits for a folder that nobody makes holds the process for ten minutes
        for thread in threading.enumerate():
            if type(thread).__name__ == "_SignalingThread":
                thread.join(30)
                assert not thread.is_alive()
        assert newest(folder) in ((1, 2) if faults.happened else (2,))
        save(folder, 2)
        save(folder, 3)
        assert newest(folder) == 3
        if not faults.happened:
            assert number > 20
            return


def test_checkpoints_that_have_no_place_are_one_line(tmp_path):
    with Faults(tmp_path, 1), pytest.raises(InputError, match="run/checkpoints: no space left"):
        checkpoints.Checkpoints(epath.Path(tmp_path / "run" / "checkpoints"), 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    """A coder, a text and a store of its features."""
    folder = tmp_path_factory.mktemp("made")
    save_coder(card_coder(), folder / "one", config_extra={"model_name": "acme/tiny"})
    (folder / "text.txt").write_text("\n\f\n".join([TEXT] * 12))
    with pytest.MonkeyPatch.context() as patch:
        give_tiny(patch, model)
        text = ("--text", folder / "text.txt", "--model", "tiny", "--context-size", 64)
        assert command("extract", folder / "one", "--out", folder / "store", *text) == 0
    return folder


def commands(made, out):
    text = ("--text", made / "text.txt", "--model", "tiny", "--context-size", 64)
    return {
        "inspect": ("inspect", TEXT, "--coder", made / "one", "--model", "tiny",
                    "--html", out / "page.html"),
        "evaluate": ("evaluate", made / "one", *text, "--tokens", 200, "--loss-tokens", 0,
                     "--batch-size", 2, "--skip-geometry", "--out", out),
        "cards": ("cards", made / "one", *text, "--tokens", 500, "--out", out, "--top", 3,
                  "--each", 1),
        "explain": ("explain", made / "one", "--store", made / "store", "--model", "tiny",
                    "--out", out, "--scores", "detection"),
        "extract": ("extract", made / "one", *text, "--out", out),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["inspect", "evaluate", "cards", "explain", "extract"])
def test_a_command_on_a_failing_disk_says_one_line_and_goes_on(
    made, model, tmp_path, monkeypatch, capsys, name
):
    give_tiny(monkeypatch, model)
    monkeypatch.setattr(Letters, "vocab_size", 300, raising=False)
    files = lambda folder: {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    run = lambda out: command(*commands(made, out)[name])
    assert run(tmp_path / "wanted") == 0
    wanted, count = files(tmp_path / "wanted"), 0
    for number in (1, 4, 13, 89):
        out = tmp_path / str(number)
        capsys.readouterr()
        with Faults(out, number) as faults:
            code = run(out)
        if not faults.happened:
            assert code == 0
            break
        count += 1
        said = capsys.readouterr().err
        if code:  # else what failed can be done without, and said so
            assert code == 2 and "Traceback" not in said
            last = said.splitlines()[-1]
            assert str(out) in last and "no space left" in last.lower(), last
        assert not [p for p in Path(out).rglob("*.tmp")]
        assert run(out) == 0 and files(out) == wanted
    assert count >= 2
