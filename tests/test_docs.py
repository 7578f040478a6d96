"""What the documentation says is so: links lead somewhere, commands are understood, examples run,
tables are those of the code."""

import ast
import functools
import importlib
import importlib.util
import json
import re
import shlex

import numpy as np
import pytest
import yaml
from etils import epath

import gemma_scope_jax as gs
from feature_writer import write
from gemma_scope_jax import cli
from gemma_scope_jax.cards import card_files
from gemma_scope_jax.coders.interop import hooks
from gemma_scope_jax.coders.release import config as release_config
from gemma_scope_jax.coders.release.parameters import TENSORS
from gemma_scope_jax.data.activations import files as activation_files
from gemma_scope_jax.evaluation.results import ENVELOPE
from gemma_scope_jax.extraction import manifest
from gemma_scope_jax.kernels import cpu, triton, xla
from gemma_scope_jax.training.card import write_card
from pages import DOCS, PAGES, ROOT, anchors, blocks, command_lines, links, name_of

FORMATS = ROOT / "docs/formats"
PACKAGED = sorted((ROOT / "gemma_scope_jax/packaged").glob("gemma-*"))
pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


def script(path):
    """A Python file of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- every page ------------------------------------------------------------------------------


@pages
def test_every_local_link_leads_somewhere(page):
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pages
def test_every_command_is_understood(page, monkeypatch):
    """Options and values; of `train` also the fields of the config, where it is one of ours."""
    understood = []

    def only_understood(command):
        @functools.wraps(command)
        def stub(config="", *rest, overrides=(), **options):
            understood.append(options)
            if overrides:
                gs.override(gs.load_config(ROOT / config), overrides)

        return stub

    for name in cli.COMMANDS:
        module = importlib.import_module(f"gemma_scope_jax.cli.{name}")
        monkeypatch.setattr(module, "command", only_understood(module.command))
    lines = command_lines(page, "gemma-scope")
    for line in lines:
        assert cli.main(shlex.split(line, comments=True)[1:]) == 0, line
    assert len(understood) == len(lines)


@pages
def test_every_target_and_script_exists(page):
    makefile = (ROOT / "Makefile").read_text()
    for line in command_lines(page, "make"):
        target = line.split()[1]
        assert re.search(rf"^{target}:", makefile, re.M), line
    for line in command_lines(page, ".venv/bin/python"):
        words = shlex.split(line, comments=True)
        source = (ROOT / words[1]).read_text()
        assert all(f'"{w}"' in source for w in words if w.startswith("--")), line


@pages
def test_every_python_block_compiles(page):
    for language in ("python", "py"):
        for block in blocks(page, language):
            compile(block, page.name, "exec")


@pages
def test_files_that_are_named_exist(page):
    kept = r"`((?:gemma_scope_jax|configs|benchmarks|notebooks|tests|docs)/[\w/.]+\.\w+)`"
    for name in re.findall(kept, page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("page", [p for p in DOCS if blocks(p, "python")], ids=name_of)
def test_examples_run(page, capsys):
    """Those of blocks "python", one after the other; blocks "py" are parts of something."""
    namespace: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, name_of(page), "exec"), namespace)


# ---- the site --------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation():
    class Plain(yaml.SafeLoader):
        """YAML as it stands, tags of mkdocs included."""

    Plain.add_multi_constructor("", lambda loader, tag, node: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Plain)["nav"]

    def files(item):
        if isinstance(item, str):
            return [item]
        values = item.values() if isinstance(item, dict) else item
        return [file for value in values for file in files(value)]

    listed = files(nav)
    assert sorted(listed) == sorted(str(p.relative_to(ROOT / "docs")) for p in DOCS)


def test_the_api_page_lists_every_public_name():
    made = script(ROOT / "docs/hooks.py").public()
    named = [line.rpartition(".")[2] for line in made.splitlines() if line.startswith(":::")]
    assert sorted(named) == gs.__all__ and "<!-- public -->" in (ROOT / "docs/api.md").read_text()


def test_links_out_of_the_site_become_their_text():
    inside = script(ROOT / "docs/hooks.py").inside
    text = "[a](../../configs/x.py), [b](coders.md#c), [d](../faq.md), [e](https://x.org)"
    assert inside(text, "guides/training.md") == text.replace("[a](../../configs/x.py)", "a")


# ---- tables ----------------------------------------------------------------------------------


def test_benchmark_tables_are_those_of_the_results():
    table = script(ROOT / "benchmarks/table.py")
    pages = [path.read_text(encoding="utf-8") for path in ROOT.glob("docs/**/*.md")]
    assert sum(page.count("<!-- table: ") for page in pages) >= 5
    assert all(table.renewed(page) == page for page in pages)


def test_tables_of_circuits_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    circuits = script(ROOT / "benchmarks/circuits.py")
    page = (ROOT / "docs/methods/circuits_on_known_answers.md").read_text(encoding="utf-8")
    file = ROOT / "benchmarks" / circuits.RESULTS.format(nodes="transcoders")
    settings = {**circuits.DEFAULTS, "nodes": "transcoders"}
    tables, _ = circuits.summary(circuits.results(file, circuits.prompts(), settings))
    assert page.count("<!-- circuits: ") == len(tables)
    assert circuits.renewed(page, tables) == page


def test_a_json_line_is_a_row_with_its_numbers(tmp_path):
    table = script(ROOT / "benchmarks/table.py")
    (tmp_path / "x").write_text(
        'text\n{"name": "a", "ours": 1234.5, "agree": true}\n{"name": "b", "ratio": 0.5}\n'
    )
    assert table.table(table.read(tmp_path / "x")).splitlines() == [
        "| name | ours | agree | ratio |",
        "| --- | ---: | ---: | ---: |",
        "| a | 1,234 | yes |  |",
        "| b |  |  | 0.50 |",
    ]


def test_the_rooms_are_those_that_imports_follow():
    tree = ast.parse((ROOT / "tests/test_imports.py").read_text())
    given = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "ROOMS"
    ]
    rooms = ast.literal_eval(given[0])
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    said = {row[0].strip("`"): row[2] for row in rows if len(row) == 3 and row[0][:1] == "`"}
    there = {p.name for p in (ROOT / "gemma_scope_jax").iterdir() if (p / "__init__.py").exists()}
    assert there <= set(said) | {"errors", "progress"}
    for room in there - {"cli"}:
        assert said[room] == ", ".join(rooms[room]), room


def test_hook_names_are_those_that_are_read():
    page = (ROOT / "docs/migration.md").read_text(encoding="utf-8").split("## Hook names")[1]
    for hook, site in hooks.TRANSFORMER_LENS.items():
        row = next(
            line for line in page.splitlines() if line.startswith("|") and f"`{hook}`" in line
        )
        assert f"`{site}`" in row, hook
    assert all(f"`{hook}`" in page for hook in hooks.AMBIGUOUS)


def test_features_a_slot_are_those_of_the_kernels():
    page = (ROOT / "docs/methods/sparse_step.md").read_text(encoding="utf-8")
    found = [int(n) for n in re.findall(r"\| (\d+) features a slot \|", page)]
    assert found == [kernel.FEATURES_A_SLOT for kernel in (cpu, triton, xla)]


# ---- cards -----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", PACKAGED, ids=lambda p: p.name)
def test_packaged_cards_say_what_the_text_was(folder):
    """A coder has a card of its own; those of one run share transcoders.md, with a row each."""
    own, shared = folder / "README.md", folder.parent / "transcoders.md"
    path = own if own.exists() else shared
    card = path.read_text(encoding="utf-8")
    assert "[English text and code](" in card
    layer = re.search(r"transcoder-(\d+)-", folder.name)
    assert path == own or re.search(rf"^\| {layer[1]} \|", card, re.M)
    for file in (*folder.glob("*.json"), *folder.parent.glob("*.json"), path):
        assert not re.search(r"~/|/home/|/root/|\.cache", file.read_text(encoding="utf-8")), file


def test_a_card_names_no_folder_of_this_machine(tmp_path):
    coder = gs.CoderConfig(layers=3, init_from="/home/me/coders/sae")
    data = gs.TextData(files=("~/secret/plans/texts/*.txt", "more/*.txt"))
    config = gs.TrainConfig((coder,), data, model="gemma-3-270m")
    write_card(epath.Path(tmp_path), coder.folder, config, epath.Path(tmp_path / "none"), 1000)
    card, recipe = ((tmp_path / n).read_text() for n in ("README.md", "train_config.json"))
    assert "1,000 tokens of texts/*.txt more/*.txt" in card.replace("\\", "")
    assert "secret" not in card + recipe and "/home" not in recipe
    assert json.loads(recipe)["coders"][0]["init_from"] == "coders/sae"


# ---- formats ---------------------------------------------------------------------------------


def test_formats_name_every_key_and_array():
    said = {page.stem: page.read_text(encoding="utf-8") for page in FORMATS.glob("*.md")}

    def lacks(page, names):
        return [name for name in names if f"`{name}`" not in said[page]]

    keys = {*activation_files._KEYS, *activation_files.FORMAT}
    assert not lacks("activation_store", keys)
    assert not lacks("feature_store", {*manifest._SAME, *manifest.FORMAT})
    assert not lacks("results", ENVELOPE)
    assert not lacks("coders", {*TENSORS.values(), *release_config._TYPES})
    for module, site in release_config.SITES.items():
        assert f"| `{module}` | `{site}` |" in said["coders"]
    arrays = re.findall(r"^    (\w+(?:, \w+)*) ", card_files.__doc__, re.M)
    arrays = [name for names in arrays for name in names.split(", ") if name.islower()]
    assert len(arrays) > 20 and not lacks("cards", [a for a in arrays if a[0] != "_"])


def test_a_shard_is_read_as_its_page_says(tmp_path):
    """The reader of docs/formats/feature_store.md, which knows nothing of the package."""
    namespace: dict = {}
    exec(blocks(FORMATS / "feature_store.md", "python")[0], namespace)
    store = write(tmp_path / "store", count=60)
    tokens, features = namespace["read_store"](tmp_path / "store", "sae", 2)
    assert len(tokens) == len(store) > 500
    ours = [segment.by_token() for segment in store.segments()]
    for name, wanted in (
        ("feature", np.concatenate([o.ids for o in ours])),
        ("value", np.concatenate([o.values for o in ours])),
    ):
        np.testing.assert_array_equal(features[name].to_numpy(), wanted)
    np.testing.assert_array_equal(
        tokens["token"].to_numpy(), np.concatenate([s.tokens for s in store.segments()])
    )
    sizes = np.concatenate([np.diff(o.offsets) for o in ours])
    np.testing.assert_array_equal(
        features["row"].to_numpy(), np.repeat(tokens["row"].to_numpy(), sizes)
    )
    for shard in store.shards:
        about = namespace["check_tokens"](tmp_path / "store", shard["shard"])
        assert len(about["documents"]) == shard["documents"]
