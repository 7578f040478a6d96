"""Training runs stopped, killed, corrupted and out of disk: they end with the same bits."""

import contextlib
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import optax
import pytest
from etils import epath

import training_runner
from gemma_scope_jax.coders.load import load_coder
from gemma_scope_jax.data.activations.store import write_activations
from gemma_scope_jax.data.batches import TokenBatches
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.storage.locks import only_writer
from gemma_scope_jax.training import checkpoints, feeds, optimizer, state, train
from gemma_scope_jax.training import log as progress
from letters import Letters
from tiny import tiny_model
from training_runner import PASSES, documents, run, same_bits, stopped

RARELY = dict(checkpoint_every=1e9)  # only when it stops or ends


pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compile_once):
    """The coder of a run that nobody disturbed."""
    return run(tmp_path_factory.mktemp("whole") / "run", **RARELY)


def steps(folder):
    """The passes of the checkpoints that lie under their final names."""
    return sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit())


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory, compile_once):
    """The folder of a run with a checkpoint after every pass, stopped in the ninth."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch, stopped(patch, feeds.TextFeed, 9):
        run(folder)
    assert steps(folder) == [8, 9] and not (folder / "coders").exists()
    return folder


@pytest.fixture
def cut(stopped_run, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped_run, tmp_path / "cut")


def test_a_run_stopped_while_training_resumes_to_the_same_bits(whole, cut):
    same_bits(run(cut), whole)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert steps(cut)[-1] == PASSES
    rows = [json.loads(x) for x in (cut / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["update"] == max(row["update"] for row in rows) > 0
    assert any(c["dead"] > 0 for row in rows for c in row["coders"].values())


def test_nothing_is_logged_twice(cut, monkeypatch):
    """What a killed run logged beyond its checkpoint is logged anew, once."""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with (cut / "log.jsonl").open("a") as log:
        log.write('{"tokens": 1280, "update": 0, "coders": {}}\n{"tokens": 1408, "upd')
    run(cut)
    tokens = [json.loads(x)["tokens"] for x in (cut / "log.jsonl").read_text().splitlines()]
    assert tokens == sorted(set(tokens)) and tokens[-1] == 128 * PASSES


def test_a_run_stopped_while_its_buffer_fills_resumes_to_the_same_bits(
    whole, tmp_path, monkeypatch
):
    with stopped(monkeypatch, feeds.TextFeed, 2):
        run(tmp_path, **RARELY)
    assert steps(tmp_path) == [2]
    same_bits(run(tmp_path, **RARELY), whole)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The folder of 1,500 stored activations."""
    folder = tmp_path_factory.mktemp("activations") / "store"
    model = tiny_model(PRESETS["gemma-3-270m"], layers=4)
    batches = TokenBatches(documents(), Letters(), 8, 32)
    write_activations(model, batches, {"resid_post": (2,)}, folder, 1500)
    return str(folder)


def test_a_run_on_a_store_stopped_by_ctrl_c_resumes_to_the_same_bits(store, tmp_path, monkeypatch):
    options = dict(RARELY, store=store, tokens=128 * 3 * 12)
    expected = run(tmp_path / "whole", **options)
    with stopped(monkeypatch, feeds.StoreFeed, 5, signal.SIGINT):
        run(tmp_path / "cut", **options)
    same_bits(run(tmp_path / "cut", **options), expected)


def test_a_store_that_was_moved_is_the_same_store(store, tmp_path, monkeypatch):
    options = dict(RARELY, tokens=128 * 3 * 6)
    expected = run(tmp_path / "whole", store=store, **options)
    with stopped(monkeypatch, feeds.StoreFeed, 3):
        run(tmp_path / "cut", store=store, **options)
    shutil.copytree(store, tmp_path / "elsewhere")
    same_bits(run(tmp_path / "cut", store=str(tmp_path / "elsewhere"), **options), expected)
    with pytest.raises(InputError, match="another config .store"):
        run(tmp_path / "cut", **options)


# -------------------------------------------------------------------------------------------------
# By another model, another process, another clock


def test_a_run_goes_on_with_the_weights_that_it_began_with(whole, cut, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training_runner, "tiny_model", partial(tiny_model, seed=1))
        with pytest.raises(InputError, match="run began with another model") as refused:
            run(cut)
        assert "\n" not in str(refused.value) and steps(cut) == [8, 9]
    same_bits(run(cut, model="moved/tiny"), whole)  # wherever they lie


def test_older_checkpoints_tell_the_model_by_its_name(cut, monkeypatch):
    real = checkpoints.Checkpoints.restore
    older = lambda self, like: (*real(self, like)[:3], None)
    monkeypatch.setattr(checkpoints.Checkpoints, "restore", older)
    with pytest.raises(InputError, match="another model .tiny; this is other"):
        run(cut, model="other")


def test_a_second_run_in_the_folder_is_refused(cut):
    with only_writer(cut), pytest.raises(InputError, match="cut: another process is writing"):
        run(cut)
    assert steps(cut) == [8, 9]


def test_intervals_are_those_of_a_clock_that_only_goes_forward(cut, monkeypatch):
    """Twenty seconds pass between two looks at it: time for a checkpoint after every pass."""
    clock = SimpleNamespace(monotonic=partial(next, itertools.count(0, 20)))
    monkeypatch.setattr(train, "time", clock)  # and no other clock
    monkeypatch.setattr(progress, "time", clock)
    run(cut, checkpoint_every=19.0, keep=99)
    assert steps(cut) == list(range(8, PASSES + 1))


def test_a_loss_that_is_no_number_is_logged_and_read_again(cut):
    row = '{"tokens": 128, "update": 1, "coders": {"a": {"loss": %s}}}\n'
    log = epath.Path(cut / "log.jsonl")
    log.write_text(row % "NaN" + row % "-Infinity" + row % "null" + row % "1.5" + '{"tokens": 2')
    losses = [row["coders"]["a"]["loss"] for _, row in progress.read_log(log)]
    assert [math.isnan(x) for x in losses] == [True] * 3 + [False] and losses[3] == 1.5
    log.write_text("[]\n" + row % '"a"' + row % "1e400")
    with pytest.raises(InputError, match="log.jsonl, line 2"):  # the first is no line of ours
        progress.read_log(log)
    assert progress.finite({"a": {"b": math.inf, "c": 1}}) == {"a": {"b": None, "c": 1}}


# -------------------------------------------------------------------------------------------------
# Killed


def kill_and_resume(folder, whole, options, kills, compile_once, errors):
    """Kill a run `kills` times at random moments of its steps and checkpoints; then let it end."""
    rng, killed, ended = random.Random(0), 0, None
    script = Path(training_runner.__file__)
    program = [sys.executable, script, folder, json.dumps(options)]
    environment = os.environ | {name.upper(): str(v) for name, v in compile_once.items()}
    runner = subprocess.Popen(
        program,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=environment,
    )
    with runner:
        while ended != 0:
            print(file=runner.stdin, flush=True)
            child = int(runner.stdout.readline())
            if killed < kills:
                begun, patience = steps(folder), time.monotonic() + 100
                while steps(folder) == begun and time.monotonic() < patience:
                    time.sleep(0.002)
                time.sleep(rng.random() * 0.3)  # within the next pass or its checkpoint
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(child, signal.SIGKILL)
            ended = int(line) if (line := child_end(runner)) else -1
            killed += ended == signal.SIGKILL
            assert ended in (0, signal.SIGKILL)
            if (folder / "config.json").exists():
                json.loads((folder / "config.json").read_text())
            for path in folder.glob("coders/**/params.safetensors"):
                same_bits(load_coder(path.parent), whole)  # complete, or not there
        runner.stdin.close()
    return killed


def child_end(runner):
    """The line that the runner prints when its child has ended, past what the child printed."""
    while (line := runner.stdout.readline()) and not line.strip().isdigit():
        pass
    return line


@pytest.mark.parametrize(
    ("passes", "kills"), [(PASSES, 2), pytest.param(120, 20, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("source", ["text", "store"])
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    whole, store, tmp_path, source, passes, kills, compile_once
):
    errors, folder, options = tmp_path / "errors", tmp_path / "run", dict(tokens=128 * passes)
    if source == "store":
        options = dict(store=store, tokens=128 * 3 * passes)
    if source == "store" or passes != PASSES:
        whole = run(tmp_path / "whole", **options, **RARELY)
    with errors.open("w") as file:
        killed = kill_and_resume(folder, whole, options, kills, compile_once, file)
    assert killed == kills
    assert "damaged" not in errors.read_text()  # a checkpoint with its final name is complete
    same_bits(load_coder(next(folder.glob("coders/*/*"))), whole)
    assert steps(folder)[-1] == passes


# -------------------------------------------------------------------------------------------------
# Damaged checkpoints


def damage(checkpoint, how):
    """Cut all files of a checkpoint to half, or change one byte in each of its arrays' files."""
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size]
    if how == "changed":
        files = [p for p in files if p.parent.name == "d"]  # where OCDBT keeps data
    assert files
    for path in files:
        data, at = path.read_bytes(), path.stat().st_size // 2
        changed = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
        path.write_bytes(data[:at] if how == "cut" else changed)


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(whole, cut, caplog, how):
    damage(cut / "checkpoints" / "9", how)
    same_bits(run(cut), whole)
    lines = [x for x in caplog.messages if "damaged, set aside" in x]
    assert len(lines) == 1 and str(cut / "damaged-checkpoint-9") in lines[0]


def test_trouble_that_is_not_the_files_sets_no_checkpoint_aside(whole, cut, monkeypatch):
    import orbax.checkpoint as ocp

    def out_of_memory(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "restore", out_of_memory)
        with pytest.raises(InputError, match="cannot be read now.*nothing was lost") as refused:
            run(cut)
    assert "\n" not in str(refused.value) and steps(cut) == [8, 9]
    same_bits(run(cut), whole)


def test_a_checkpoint_of_another_version_is_not_set_aside(cut, monkeypatch):
    """Its state has other fields: there, no first moments of the optimizer."""
    with monkeypatch.context() as patch:
        for module in (state, optimizer):
            patch.setattr(module, "adam", lambda config: optax.scale_by_rms(0.9))
        with pytest.raises(InputError, match="another version of gemma_scope_jax") as refused:
            run(cut)
    assert "\n" not in str(refused.value) and steps(cut) == [8, 9]


def test_a_second_damaged_checkpoint_of_a_number_gets_another_name(whole, cut, caplog):
    (cut / "damaged-checkpoint-9").mkdir()
    damage(cut / "checkpoints" / "9", "cut")
    same_bits(run(cut), whole)
    assert str(cut / "damaged-checkpoint-9-2") in caplog.text


def test_if_all_checkpoints_are_damaged_it_says_so(cut):
    for number in steps(cut):
        damage(cut / "checkpoints" / str(number), "cut")
    with pytest.raises(InputError, match="none of its 2 checkpoints can be read") as refused:
        run(cut)
    assert "\n" not in str(refused.value)


@contextlib.contextmanager
def no_space(limit=4096):
    """No file can grow beyond `limit` bytes, for anything in this process: a disk nearly full."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


# Orbax's threads end with exceptions of their own then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_checkpoint_that_cannot_be_written_is_said(whole, cut):
    """The one before it is whole."""
    message = "could not be written.*run the same command"
    with pytest.raises(InputError, match=message) as refused, no_space():
        run(cut)
    assert "\n" not in str(refused.value)
    assert steps(cut)[-1] == 9
    same_bits(run(cut), whole)
