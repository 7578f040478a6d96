"""Several coders from one name: sets of transcoders, globs, lists; one coder where one is meant."""

import json

import numpy as np
import pytest

import gemma_scope_jax as gs
from coders import random_coder
from commands import command
from gemma_scope_jax.coders.interop.circuit_tracer import save_circuit_tracer
from gemma_scope_jax.errors import InputError
from published import MULTI, publish, same_leaves

MLP = {"reads": "mlp_in", "writes": "mlp_out"}


@pytest.fixture(scope="module")
def members():
    """A transcoder for each of the tiny model's four layers."""
    return [random_coder(24, layer=i, seed=i, threshold=0.3, skip=True, **MLP) for i in range(4)]


@pytest.fixture(scope="module")
def several(tmp_path_factory, members):
    """The folder of such a set, as circuit-tracer has it."""
    folder = tmp_path_factory.mktemp("sets") / "tiny-set"
    save_circuit_tracer(members, folder)
    return folder


def test_a_set_is_loaded_whole_or_one_by_one(several, members):
    coders = gs.load_coders(several)
    assert coders.names == ("layer_0", "layer_1", "layer_2", "layer_3")
    assert coders.layers == (0, 1, 2, 3)
    for i, member in enumerate(members):
        one = gs.load_coder(f"{several}/layer_{i}")
        assert one.layers == (i,) and one.info.path == coders[i].info.path == f"{several}/layer_{i}"
        for name in ("w_enc", "b_enc", "threshold", "w_dec", "b_dec", "w_skip"):
            np.testing.assert_array_equal(getattr(one, name), getattr(member, name))
            np.testing.assert_array_equal(getattr(coders[i], name), getattr(member, name))
    assert str(gs.load_coders(several, dtype="bfloat16")[2].w_enc.dtype) == "bfloat16"


def test_a_set_is_not_one_coder(several):
    words = f"{several}: a set of 4 coders: name one of them, as {several}/layer_0"
    for load in (gs.load_coder, gs.load_decoder):
        with pytest.raises(InputError, match=words):
            load(several)
    with pytest.raises(
        InputError, match="no layer_7 in it, but layer_0, layer_1, layer_2, layer_3"
    ):
        gs.load_coder(f"{several}/layer_7")


def test_a_folder_called_layer_3_is_itself(several, tmp_path):
    """Also beside a config.yaml, and a member stays one when something is written beside it."""
    save_circuit_tracer([random_coder(8, layer=0, **MLP)], tmp_path)
    own = random_coder(16, layer=3)
    gs.save_coder(own, tmp_path / "layer_3")
    same_leaves(gs.load_coder(tmp_path / "layer_3").replace(info=own.info), own)
    (tmp_path / "layer_0").mkdir()
    assert gs.load_coder(f"{tmp_path}/layer_0").width == 8


def test_lists_globs_and_loaded_coders_make_a_set(several, tmp_path, members):
    gs.save_coder(random_coder(layer=2), tmp_path / "sae_10")
    gs.save_coder(random_coder(layer=1), tmp_path / "sae_9")
    coders = gs.load_coders([f"{tmp_path}/sae_*", several, members[1]])
    assert coders.names[:3] == ("sae_9", "sae_10", "layer_0") and coders[-1] is members[1]
    assert [c.layers[0] for c in coders] == [1, 2, 0, 1, 2, 3, 1]
    assert gs.load_coders(coders) is not coders and gs.load_coders(coders)[2] is coders[2]
    assert gs.load_coder(f"{tmp_path}/sae_1*").layers == (2,)  # a glob of one
    with pytest.raises(InputError, match="a set of 2 coders: name one of them, as .*sae_9"):
        gs.load_coder(f"{tmp_path}/sae_*")
    with pytest.raises(InputError, match="at least one"):
        gs.load_coders([])


def test_a_clt_is_a_set_of_one_whose_decoder_may_wait(tmp_path):
    folder = publish(tmp_path, MULTI[1])
    coders = gs.load_coders(folder)
    assert len(coders) == 1 and coders[0].w_dec is None and len(coders.layers) == 18
    whole = gs.load_coders(coders, decoder=True)
    same_leaves(whole[0], gs.load_coder(folder, decoder=True))
    assert coders.at(7) is coders[0]


def test_load_decoder_takes_any_coder(several):
    sae = random_coder()
    assert gs.load_decoder(sae) is sae and gs.load_decoder(f"{several}/layer_1").layers == (1,)


# -------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\f\n".join(f"the {i} quick brown foxes jump over it" for i in range(12)))
    return file


def test_commands_of_several_coders_take_a_set(tiny, several, text, tmp_path, capsys):
    options = ("--model", "tiny", "--text", text)
    places = ("--tokens", 200, "--context-size", 32)
    assert command("evaluate", several, *options, *places, "--loss-tokens", 100,
                   "--replacement", "--json") == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert [r["sae_lens_id"] for r in found[:4]] == [f"layer_{i}" for i in range(4)]
    assert len({r["sae_lens_release_id"] for r in found[:4]}) == 4 and len(found) == 5
    assert command("extract", several, *options, *places, "--out", tmp_path / "store") == 0
    store = gs.FeatureStore(tmp_path / "store")
    assert list(store.coders) == [f"layer_{i}" for i in range(4)]
    given = ("--model", "tiny", "--store", tmp_path / "store", "--out", tmp_path / "cards")
    assert command("cards", several, *given, "--compare", several) == 0
    assert {f.name for f in (tmp_path / "cards").iterdir() if f.is_dir()} >= {"layer_0", "layer_3"}


def test_benchmark_takes_a_set(tiny, several, tmp_path):
    table = tmp_path / "parity.csv"
    rows = (f"{'even' if i % 2 == 0 else 'odd'} number {i},{i % 2}" for i in range(160))
    table.write_text("prompt,target\n" + "\n".join(rows) + "\n")
    assert command("benchmark", several, "--model", "tiny", "--probing", table, "--ks", 1,
                   "--out", tmp_path / "out") == 0  # fmt: skip
    made = (tmp_path / "out" / "comparison.md").read_text()
    assert all(f"/layer_{i}" in made for i in range(4))


@pytest.mark.parametrize("name", ["check", "inspect", "explain"])
def test_commands_of_one_coder_say_how_to_name_it(tiny, several, text, tmp_path, capsys, name):
    argv = {
        "check": ("check", several, "--model", "tiny"),
        "inspect": ("inspect", "a text", "--model", "tiny", "--coder", several),
        "explain": ("explain", several, "--store", tmp_path / "store", "--judge", "statistics"),
    }[name]
    if name == "explain":
        extracted = ("--model", "tiny", "--text", text, "--tokens", 100, "--context-size", 32)
        assert command("extract", several, *extracted, "--out", tmp_path / "store") == 0
    capsys.readouterr()
    assert command(*argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {several}: a set of 4 coders: name one of them, as {several}/layer_0" in error


def test_a_member_of_a_set_is_looked_at(tiny, several, capsys):
    assert command("inspect", "a text", "--model", "tiny", "--coder", f"{several}/layer_2",
                   "--json") == 0  # fmt: skip
    seen = json.loads(capsys.readouterr().out)
    assert seen["layer"] == 2 and seen["coder"] == "layer_2"
