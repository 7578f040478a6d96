"""Recipes, runs and config files that cannot be are one line, before anything is computed."""

import json

import pytest
from etils import epath

from assertions import one_line
from gemma_scope_jax.data.documents import TextData
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.training import train as training
from gemma_scope_jax.training.config_file import load_config
from gemma_scope_jax.training.recipe import CoderConfig, LossConfig, OptimizerConfig, TrainConfig
from training_runs import coder, recipe

BAD_CODERS = {
    "width": (dict(width=0), "width must be a whole number from 1 on, not 0"),
    "target above width": (dict(width=10, target_l0=20), "must be below the width 10"),
    "negative target": (dict(target_l0=-1), "target_l0 must be positive"),
    "half a feature": (dict(width=64.5), "width must be a whole number"),
    "layers as text": (dict(layers="12"), "layers must be a tuple, not '12'"),
    "layer of another type": (dict(layers=(True, 2)), "layers must be a whole number"),
    "threshold": (dict(threshold=-1.0), "threshold must be a number that is not negative"),
    "prefixes as a number": (dict(prefixes=8), "prefixes must be a tuple, not 8"),
    "no layers": (dict(layers=()), "one layer, or several|must be below"),
    "layers falling": (dict(layers=(3, 1)), "rising order"),
    "a layer twice": (dict(layers=(3, 3)), "rising order"),
    "activation": (dict(activation="top"), "activation 'top' is none of .*topk"),
    "no thresholds to penalise": (
        dict(activation="batch_topk", loss=LossConfig(frequency_weight=0.1, l0_start=20.0)),
        "batch_topk trains no thresholds, which loss.l0_start and loss.frequency_weight would act",
    ),
    "half a k": (dict(activation="topk", target_l0=7.5), "needs a whole target_l0, not 7.5"),
    "prefixes falling": (dict(prefixes=(8, 4)), "prefixes .* must rise"),
    "prefix above width": (dict(width=64, target_l0=8, prefixes=(64,)), "stay below the width 64"),
    "prefix of nothing": (dict(prefixes=(0, 8)), "prefixes"),
    "too few to start from": (dict(layers=(1, 2), init_layers=("a",)), "not one for each layer"),
    "two starts": (dict(init_from="a", init_layers=("b",)), "exclude each other"),
}


BAD_LOSSES = {
    "sparsity": (dict(sparsity="squared"), "sparsity 'squared' is none of quadratic"),
    "bandwidth": (dict(bandwidth=0.0), "bandwidth must be positive"),
    "weight": (dict(l0_weight=-1.0), "l0_weight must be a number that is not negative"),
    "start": (dict(l0_start=-3.0), "l0_start must be positive"),
    "no limit": (dict(dead_below=0.0), "dead_below must be positive"),
    "part of an update": (dict(dead_after=1.5), "dead_after must be a whole number"),
    "nan": (dict(dead_weight=float("nan")), "dead_weight must be a number that is not negative"),
}


BAD_OPTIMIZERS = {
    "moments that never fade": (dict(b2=1.0), "b2 must be at least 0 and below 1"),
    "more decay than run": (dict(decay=2.0), "decay must be a share from 0 to 1"),
    "warmup": (dict(warmup=-1), "warmup must be a whole number from 0 on"),
}


BAD_RUNS = {
    "no coders": (dict(coders=()), "at least one coder"),
    "one name twice": (dict(coders=(coder(3), coder(3))), "two coders are called resid_post/layer"),
    "buffer too small": (dict(buffer=100), "buffer 100 must hold"),
    "buffer never full": (dict(tokens=1000), "tokens 1000 do not fill the buffer"),
    "tokens": (dict(tokens=-5), "tokens must be a whole number from 1 on"),
    "half a batch": (dict(train_batch_size=64.5), "train_batch_size must be a whole number"),
    "first": (dict(first=-1), "first must be a whole number from 0 on"),
    "mesh": (dict(mesh=(3,)), "mesh must be two numbers of devices"),
    "precision": (dict(precision="float16"), "precision 'float16' is none of default, bfloat16"),
    "two updates by effect": (
        dict(coders=(coder(3, loss=LossConfig(kl_weight=1.0)),), updates=2),
        "needs updates=1",
    ),
    "track": (dict(track=("tensorbord",)), "'tensorbord' is none of tensorboard"),
}


@pytest.mark.parametrize(
    "kind",
    [BAD_CODERS, BAD_LOSSES, BAD_OPTIMIZERS, BAD_RUNS],
    ids=["coder", "loss", "optimizer", "run"],
)
def test_bad_recipes_are_refused(kind):
    make = {
        id(BAD_CODERS): lambda c: CoderConfig(**dict(layers=3) | c),
        id(BAD_LOSSES): lambda c: LossConfig(**c),
        id(BAD_OPTIMIZERS): lambda c: OptimizerConfig(**c),
        id(BAD_RUNS): lambda c: TrainConfig(**dict(coders=(coder(3),)) | c),
    }[id(kind)]
    make({})
    for change, message in kind.values():
        with pytest.raises(InputError, match=message) as refused:
            make(change)
        one_line(refused)


def test_bad_runs_are_refused_before_anything_is_computed(model, tmp_path, monkeypatch):
    def refused(message, *coders, folder="a", data=None, **options):
        with pytest.raises(InputError, match=message) as why:
            training.train(recipe(*coders, **options), tmp_path / folder, model, data)
        one_line(why)

    refused("layer 99: the model has 0..7", coder(99))
    refused("layer 8: the model has 0..7", coder((3, 8)))
    refused("site 'resid_pots'", coder(3, reads="resid_pots"))
    refused("no.*file.*nowhere", coder(3), data=TextData(files=("nowhere/*.txt",)), folder="b")
    refused("no store|nowhere", coder(3), store=str(tmp_path / "nowhere"), folder="c")
    assert not (tmp_path / "c").exists()  # so that a corrected config may use the folder
    (tmp_path / "c").mkdir()
    for damaged in ('{"coders": [', "[3]", '{"coders": 3}'):
        (tmp_path / "c/config.json").write_text(damaged)
        refused("config.json: damaged", coder(3), folder="c")
    refused("batch_size 4 must be a multiple of the 8 devices", coder(3), mesh=(8, 1), folder="d")


def test_config_files_are_read_and_bad_ones_refused(tmp_path):
    path = tmp_path / "run.py"
    for text, message in (
        ("config = 3", "TrainConfig"),
        ("config = 1 / 0", "ZeroDivisionError"),
        ("config = (", "SyntaxError"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message) as refused:
            load_config(path)
        one_line(refused)
    with pytest.raises(InputError, match="no such config"):
        load_config(tmp_path / "none.py")
    path.write_text(
        "from gemma_scope_jax.training.recipe import CoderConfig, TrainConfig\n"
        "config = TrainConfig(coders=(CoderConfig(5), CoderConfig((1, 2), width=32, target_l0=4)))"
    )
    config = load_config(path)
    assert [c.layer_tuple for c in config.coders] == [(5,), (1, 2)] and config.tokens == 4_000_000


def test_a_config_may_spell_the_place_of_its_text_otherwise(tmp_path):
    """A checkpoint knows the text by its content."""
    at = lambda files, **more: recipe(coder(3), data=TextData(files=(files,), **more))
    training._remember_config(at("./a.txt"), epath.Path(tmp_path), fresh=True)
    training._check_folder(at("/elsewhere/b.txt"), epath.Path(tmp_path))
    with pytest.raises(InputError, match="data differ"):
        training._check_folder(at("./a.txt", field="body"), epath.Path(tmp_path))
    for fresh, name in ((False, "./a.txt"), (True, "caf\ufffd.txt")):
        training._remember_config(at("caf\udce9.txt"), epath.Path(tmp_path), fresh=fresh)
        assert json.loads((tmp_path / "config.json").read_text())["data"]["files"] == [name]
