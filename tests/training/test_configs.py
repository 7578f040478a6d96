"""Configs: those that come with the package, fields set by name, and what the fields mean."""

import ast
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.training.config_file import field_docs, field_table, load_config, override
from gemma_scope_jax.training.recipe import CoderConfig, LossConfig, TrainConfig
from tiny import tiny

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
TWO = TrainConfig((CoderConfig(3), CoderConfig((4, 5))), tokens=200_000)


def test_there_are_the_configs_that_the_readme_names():
    assert len(CONFIGS) == 8


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_whole_in_one_file(tmp_path, path):
    """It runs from wherever it is copied, imports the package alone, and reads no environment."""
    copied = tmp_path / "my_config.py"
    shutil.copy(path, copied)
    before = list(sys.path)
    found = load_config(copied)
    assert found == load_config(path) and found.coders and found.tokens >= 100_000
    assert sys.path == before
    tree = ast.parse(path.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imports] == ["import gemma_scope_jax as gs"]


def test_any_field_is_set_by_its_name():
    line = (
        "--tokens 300_000 --coders.0.width=8192 --coders.*.loss.kl-weight 1 --mesh 2,4 "
        "--coders.1.layers 1 2 --coders.0.threshold none --coders.1.skip --optimizer.b1 0.5"
    )
    words = [*line.split(), "--data.files", "a.txt", "b c.txt"]
    found = override(TWO, words)
    loss = LossConfig(kl_weight=1.0)
    assert found == dataclasses.replace(
        TWO,
        tokens=300_000,
        coders=(
            CoderConfig(3, width=8192, threshold=None, loss=loss),
            CoderConfig((1, 2), skip=True, loss=loss),
        ),
        data=gs.TextData(files=("a.txt", "b c.txt")),
        mesh=(2, 4),
        optimizer=dataclasses.replace(TWO.optimizer, b1=0.5),
    )
    assert override(TWO, []) == TWO
    for words in ([], ["none"]):  # an empty list
        assert override(TWO, ["--coders.0.prefixes", *words]).coders[0].prefixes == ()
    assert override(TWO, ["--coders.1.layers", "7"]).coders[1].layers == 7


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--coders.0.widht 3", "no field coders.0.widht; did you mean coders.0.width"),
        ("--coders.2.width 3", "no field coders.2.width"),
        ("--tokens many", "tokens takes a whole number, not many"),
        ("--tokens 1 2", "tokens takes a whole number, not 1 2"),
        ("--tokens", "tokens takes a whole number, not nothing"),
        ("--optimizer.b1 x", "optimizer.b1 takes a number, not x"),
        ("--coders.0.skip maybe", "coders.0.skip takes true or false, not maybe"),
        ("--mesh 3", "mesh takes 2 whole numbers or None, not 3"),
        ("--coders.0.threshold low", "takes a number or None, not low"),
        ("--coders 3", "coders is a group of fields"),
        ("--optimizer adam", "optimizer is a group of fields"),
        ("tokens 3", "tokens: expected a field, such as --tokens 100000"),
        ("--buffer 10", "buffer 10 must hold a batch"),
        ("--coders.0.loss.sparsity tahn", "did you mean tanh"),
        ("--coders.1.loss.bandwidth -1", "coders.1.loss: bandwidth must be positive"),
        ("--coders.1.prefixes 9,4", "coders.1: prefixes (9, 4) must rise"),
    ],
)
def test_what_is_wrong_with_a_field_is_one_line(words, says):
    with pytest.raises(InputError) as refused:
        override(TWO, words.split())
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_fields_that_check_each_other_change_together():
    """Neither change alone is a config."""
    for words in (["--buffer", "500000"], ["--tokens", "100000"]):
        with pytest.raises(InputError, match="do not fill the buffer"):
            override(TWO, words)
    found = override(TWO, ["--buffer", "500_000", "--tokens", "600_000"])
    assert (found.buffer, found.tokens) == (500_000, 600_000)


def test_every_field_has_a_meaning_that_is_a_sentence():
    rows = {name: (kind, default, meaning) for name, kind, default, meaning in field_table()}
    assert len(rows) > 60 and rows["tokens"][:2] == ("a whole number", "4000000")
    assert rows["coders.*.loss.kl_weight"][:2] == ("a number", "0.0")
    for name, (_, _, meaning) in rows.items():
        assert meaning.endswith((".", ".)")) and len(meaning) > 10, name


@pytest.mark.parametrize(
    "kind", [gs.TextData, gs.CardSettings, gs.Sampling, gs.Endpoint, gs.Processes]
)
def test_every_option_of_a_command_has_its_help_at_its_field(kind):
    docs = field_docs(kind)
    for field in dataclasses.fields(kind):
        assert docs.get(field.name, "").endswith("."), field.name


@pytest.mark.parametrize("store", ["", "activations"])
@pytest.mark.parametrize("tokens", [100_000, 4_200_000])
def test_a_warm_up_may_be_a_share_of_the_updates(tokens, store):
    loss = LossConfig(l0_warmup=0.5)
    coders = (CoderConfig(3, loss=loss), CoderConfig(4))
    shape = dict(batch_size=4, context_size=512, buffer=65_536, train_batch_size=1024, updates=2)
    config = TrainConfig(coders, tokens=tokens, store=store, **shape)
    first, other = config.resolved.coders
    trained = tokens - (0 if store else 65_536)  # tokens from which updates are made
    assert first.loss.l0_warmup == pytest.approx(trained / 1024 / 2, abs=2)
    assert isinstance(first.loss.l0_warmup, int) and other.loss.l0_warmup == 0
    assert json.dumps(dataclasses.asdict(loss))  # as it is written beside the weights
    for bad in (-1, 1.5):
        with pytest.raises(InputError, match="l0_warmup must be"):
            LossConfig(l0_warmup=bad)


@pytest.mark.parametrize("tokens,long", [(9_999_999, False), (10_000_000, True)])
def test_defaults_are_by_the_length_of_the_run(tokens, long):
    """Those that are given stay; a resolved config is its own, and JSON."""
    config = TrainConfig(
        (CoderConfig(3), CoderConfig(4, activation="topk", loss=LossConfig(dead_after=7))),
        optimizer=gs.OptimizerConfig(b1=0.5),
        tokens=tokens,
    )
    found = config.resolved
    assert found.optimizer.learning_rate == (7e-5 if long else 6e-3) and found.optimizer.b1 == 0.5
    assert found.train_batch_size == (4096 if long else 1024) and found.updates == 1 + 3 * (
        not long
    )
    assert [c.loss.per_token for c in found.coders] == [long, long]
    assert [c.loss.dead_after for c in found.coders] == [1000 if long else 200, 7]
    assert found.coders[1].activation == "topk"
    assert found.resolved == found and found.all_updates == config.all_updates
    given = json.loads(json.dumps(dataclasses.asdict(found)))
    assert None not in given["optimizer"].values() and given["coders"][0]["loss"]["dead_after"]
    across = dataclasses.replace(config, coders=(CoderConfig(3, "mlp_in", "mlp_out"),))
    assert across.resolved.optimizer.learning_rate == (7e-5 if long else 4.5e-3)
    by_length = {n: default for n, _, default, _ in field_table()}
    assert by_length["optimizer.learning_rate"] == "0.006 or 7e-05"


@pytest.mark.parametrize(
    "options",
    [
        dict(threshold=0.001),
        dict(init_from="coder"),
        dict(init_layers=("coder",)),
        dict(loss=LossConfig(l0_start=20.0)),
        dict(loss=LossConfig(frequency_weight=0.1)),
        dict(loss=LossConfig(sparsity="tanh")),
    ],
    ids=lambda options: next(iter(options)),
)
def test_short_runs_are_of_batch_topk_unless_a_coder_needs_thresholds(options):
    def found(**options):
        return TrainConfig((CoderConfig(3, **options),), tokens=1_000_000).resolved.coders[0]

    plain = found(target_l0=7.5)  # a mean over tokens need not be whole
    assert (plain.activation, plain.folder) == ("batch_topk", CoderConfig(3, target_l0=7.5).folder)
    assert found(**options).activation == "jumprelu"
    assert found(activation="batch_topk").folder.endswith("_batch_topk")


def test_the_fields_are_listed_by_the_command():
    program = "import sys; from gemma_scope_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", program, "train", "--fields"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "coders.*.width" in done.stdout and "Features of each layer." in done.stdout


@pytest.mark.parametrize("store", [False, True])
def test_a_plan_says_what_a_run_takes(tmp_path, monkeypatch, store):
    """The state and the weights are among the memory; nothing is loaded and nothing written."""
    from gemma_scope_jax.training import estimate, train

    shape = tiny(gs.PRESETS["gemma-3-270m"], layers=4)
    for module in (estimate, train):
        monkeypatch.setattr(module, "model_config", lambda name: shape)
    (tmp_path / "a.txt").write_text("some text")
    data = gs.TextData(files=(str(tmp_path / "a.txt"),))
    loss = LossConfig(l0_warmup=50_000)
    coder = CoderConfig(2, width=64, target_l0=4, activation="jumprelu", loss=loss)
    config = TrainConfig(
        (coder,),
        data=data, tokens=4096, batch_size=2, context_size=32, buffer=1024, train_batch_size=64,
        store="activations" * store, mesh=(1, 1), optimizer=gs.OptimizerConfig(warmup=1000),
    )  # fmt: skip
    found = estimate.plan_training(config, tmp_path / "out")
    assert (found.coders, found.tokens) == (1, 4096) and not (tmp_path / "out").exists()
    assert found.updates == (64 if store else 64 - 16) and found.passes == 64
    assert found.memory > found.checkpoint > 2 * found.saved > 0 and found.free > 0
    learning, sparsity = found.doubts  # they grow over more updates than there are
    assert learning.startswith("optimizer.warmup is 1000: a run of ")
    assert sparsity.startswith("coders.0.loss.l0_warmup is 50000: a run of ")
