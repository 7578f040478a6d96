"""Every writer on a disk that fails at each of its calls, one after the other; every reader, too.

What cannot be written is one line that names the folder; nothing of it stays, what was there
before does, and the same call goes on once there is room.
"""

import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import pytest

import store_writer
from card_folders import make_cards
from coders import random_coder
from faults import Faults
from gemma_scope_jax.autointerp.explanations import read_explanations, write_explanations
from gemma_scope_jax.cards.card_files import FeatureCards
from gemma_scope_jax.cards.export.anthropic import export_anthropic, export_anthropic_json
from gemma_scope_jax.cards.export.neuronpedia import export_neuronpedia
from gemma_scope_jax.cards.export.saedashboard import export_saedashboard
from gemma_scope_jax.cards.labels import write_labels
from gemma_scope_jax.cards.site import build_site
from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.coders.interop.circuit_tracer import save_circuit_tracer
from gemma_scope_jax.coders.interop.saelens import save_saelens
from gemma_scope_jax.coders.load import load_coder
from gemma_scope_jax.coders.release.files import save_coder
from gemma_scope_jax.data.activations.store import ActivationStore
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation.results import ENVELOPE, read_result, write_result
from gemma_scope_jax.extraction.export import export_store
from gemma_scope_jax.extraction.extract import extract
from gemma_scope_jax.extraction.store.store import FeatureStore
from gemma_scope_jax.model.checkpoints.huggingface import save_huggingface
from gemma_scope_jax.model.config import PRESETS, Model
from gemma_scope_jax.storage.atomic import write_text
from gemma_scope_jax.storage.paths import folder_path
from gemma_scope_jax.training.card import write_card
from gemma_scope_jax.training.recipe import CoderConfig, TrainConfig
from letters import Letters
from tiny import tiny_model

F, D = 4, 32
silent = lambda *_: None


coder = partial(
    random_coder,
    F,
    threshold=1.0,
    layer=0,
    reads="mlp_in",
    writes="mlp_out",
    info=CoderInfo(model_name="acme/tiny"),
)


def result(folder, seed):
    document = dict.fromkeys(ENVELOPE, seed) | {
        "eval_type_id": "core", "sae_lens_release_id": "a", "sae_lens_id": "b",
        "eval_config": {}, "eval_result_metrics": {"a": {"b": seed}},
    }  # fmt: skip
    write_result(folder, document)


def explanations(folder, seed):
    entry = {"text": f"text {seed}", "method": "m", "model": "j", "scores": {}}
    write_explanations(folder, "one", {0: entry})


def card(folder, seed):
    config = TrainConfig((CoderConfig(0, width=8, target_l0=2.0),))
    log = folder_path(folder) / "log.jsonl"
    write_card(folder_path(folder), config.coders[0].folder, config, log, seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    """A store of each kind, and cards."""
    folder = tmp_path_factory.mktemp("made")
    texts = ["abcdefgh" * 4, "bcd" * 9]
    settings = dict(batch_size=2, context_size=32, slots=4)
    extract(model, {"one": coder(seed=0)}, Letters(), texts, folder / "store", **settings)
    store_writer.write(folder / "activations", tokens=60)
    make_cards(folder / "cards", belongs=["0123abcd", 0, "store"])
    return folder


def exports(made):
    """Writers of (folder, seed) that read what is made."""
    cards, store = FeatureCards(made / "cards"), FeatureStore(made / "store")
    tok, one = Letters(), coder(seed=0)
    return {
        "site": lambda f, _: build_site(cards, f, tok),
        "saedashboard": lambda f, _: export_saedashboard(cards, one, tok, f),
        "neuronpedia": lambda f, _: export_neuronpedia(cards, one, tok, f),
        "anthropic": lambda f, _: export_anthropic({0: cards}, tok, f),
        "anthropic json": lambda f, _: export_anthropic_json({0: cards}, tok, f),
        "delphi": lambda f, _: export_store(store, f, "delphi", splits=2),
    }


def hf_folder(folder, seed):
    """A model of one block."""
    model = tiny_model(PRESETS["gemma-3-270m"], layers=1)
    scale = lambda x: x * (1 + seed)
    save_huggingface(Model(jax.tree.map(scale, model.params), model.config), folder)


WRITERS = {
    "model": hf_folder,
    "coder": lambda f, seed: save_coder(coder(seed=seed), f),
    "saelens": lambda f, seed: save_saelens(coder(seed=seed), f),
    "circuit-tracer": lambda f, seed: save_circuit_tracer([coder(seed=seed)], f),
    "explanations": explanations,
    "result": result,
    "text": lambda f, seed: write_text(Path(f) / "deep" / "x.html", f"{seed}"),
    "train card": card,
    "labels": lambda f, seed: write_labels({"seed": seed}, f),
}


def contents(folder):
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", WRITERS)
def test_a_tilde_is_the_home_folder(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    WRITERS[name]("~/made", 0)
    assert contents("~/made") == {} != contents(tmp_path / "made")


def test_a_name_that_begins_with_a_tilde_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text("~no such user.html", "x")
    assert (tmp_path / "~no such user.html").read_text() == "x"


def failing(write, start, check, step=1):
    """Run `write` on what `start` makes with its first, second, ... call failing, to the end."""
    for number in itertools.count(1, step):
        folder = start(number)
        with Faults(folder, number) as faults:
            try:
                write(folder)
                error = None
            except InputError as found:
                error = found
        if error is not None:
            assert "\n" not in str(error) and str(folder) in str(error)
        check(folder, error is not None)
        if not faults.happened:
            assert error is None
            assert number > 5, "nothing was tried"
            return
        assert not [name for name in contents(folder) if Path(name).name.startswith(".")]
        shutil.rmtree(folder)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_is_written_whole_or_stays_as_it_was(tmp_path, name, old):
    write = WRITERS[name]
    write(tmp_path / "wanted", 2)
    wanted, before = contents(tmp_path / "wanted"), {}
    if old:
        write(tmp_path / "before", 1)
        before = contents(tmp_path / "before")

    def start(number):
        if old:
            write(tmp_path / str(number), 1)
        return tmp_path / str(number)

    def check(folder, failed):
        if failed:
            assert contents(folder) == before
            assert folder.exists() == old
            write(folder, 2)
        assert contents(folder) == wanted

    failing(lambda folder: write(folder, 2), start, check)


@pytest.mark.parametrize("name", [
    "site", "saedashboard", "neuronpedia", "anthropic", "anthropic json", "delphi",
])  # fmt: skip
def test_an_export_is_whole_or_not_there(made, tmp_path, monkeypatch, name):
    monkeypatch.setattr("gemma_scope_jax.cards.site.SHARDS", 2)
    write = exports(made)[name]
    write(tmp_path / "wanted", 0)
    wanted = set(contents(tmp_path / "wanted"))

    def check(folder, failed):
        if failed:
            left = contents(folder)  # of a site, index.html comes last, when its data are there
            assert "index.html" not in left if name == "site" else left == {}
            write(folder, 0)
        assert set(contents(folder)) == wanted

    def once(folder):  # some take new folders alone
        if set(contents(folder)) != wanted:
            write(folder, 0)

    failing(once, lambda number: tmp_path / str(number), check)


def test_cards_that_cannot_be_written_are_not_there_and_the_others_stay(tmp_path):
    make_cards(tmp_path / "wanted", 2)
    wanted = contents(tmp_path / "wanted")

    def start(number):
        make_cards(tmp_path / str(number), 1)
        return tmp_path / str(number)

    def check(folder, failed):
        left = contents(folder)
        manifest = json.loads(left["cards.json"])
        for stage, names in manifest["arrays"].items():  # of a stage that is said to be there
            if manifest["stages"].get(stage) == 2:
                assert all(left[f"{name}.npy"] == wanted[f"{name}.npy"] for name in names)
        make_cards(folder, 2)
        assert contents(folder) == wanted

    failing(partial(make_cards, seed=2), start, check, step=9)


def test_stores_go_on_after_every_fault(model, tmp_path):
    texts, settings = ["abcdefgh" * 4], dict(batch_size=2, context_size=32, slots=4)
    writers = {
        "features": lambda f: extract(model, {"a": coder(seed=0)}, Letters(), texts, f, **settings),
        "activations": lambda f: store_writer.write(f, tokens=60),
    }
    for name, write in writers.items():
        write(tmp_path / name)
        wanted = contents(tmp_path / name)

        def check(folder, failed, write=write, wanted=wanted):
            if failed:
                write(folder)
            assert contents(folder) == wanted

        failing(write, lambda number, name=name: tmp_path / f"{name}{number}", check, step=3)


def test_what_cannot_be_read_is_one_line_that_names_the_file(made, tmp_path):
    save_coder(coder(seed=0), tmp_path / "coder")
    save_saelens(coder(seed=0), tmp_path / "saelens")
    explanations(tmp_path / "explained", 0)
    result(tmp_path / "results", 0)
    [document] = (tmp_path / "results" / "core").iterdir()
    readers = {
        tmp_path / "coder": load_coder,
        tmp_path / "saelens": load_coder,
        tmp_path / "explained": read_explanations,
        tmp_path / "results": lambda _: read_result(document),
        made / "store": lambda f: FeatureStore(f).verify(),
        made / "activations": lambda f: (ActivationStore(f).verify(), ActivationStore(f).read([0])),
        made / "cards": lambda f: FeatureCards(f)["density"],
    }
    for folder, read in readers.items():
        read(folder)
        for number in itertools.count(1):
            with Faults(folder, number, 5, reading=True) as faults:
                try:
                    read(folder)
                except InputError as error:
                    assert "\n" not in str(error) and str(folder) in str(error)
                else:
                    assert not faults.happened, (folder, number)
            if not faults.happened:
                assert number > 2, folder
                break
