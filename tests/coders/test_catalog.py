"""The catalogue of the release: complete, exact, and helpful about slips."""

import ast
import collections
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from gemma_scope_jax import cli
from gemma_scope_jax.cli import list as cli_list
from gemma_scope_jax.coders import listing
from gemma_scope_jax.coders.release import catalog
from gemma_scope_jax.coders.release.catalog import addresses, nearest_addresses, parse_address
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.storage.safetensors_layout import file_size

LISTED = frozenset(addresses())

# Taken from the pretrained_saes.yaml of the sae-lens 6.54.12 wheel: the number of its Gemma Scope 2
# entries by repository and folder, and the sha256 of its sorted lines "{address} {l0}", joined by
# newlines. All 8,784 entries were compared with `addresses()` one by one when this was written.
YAML_SHA256 = "9d54a657b1c84fe402745fc1b985eeb3272ff4a35750ede3caea15d7bdd13bcf"
YAML_COUNTS = {  # resid_post, _all, attn_out, _all, mlp_out, _all, transcoder, _all
    "270m-pt": (52, 72, 36, 72, 36, 72, 2, 144),
    "270m-it": (52, 72, 36, 72, 36, 72, 72, 144),
    "1b-pt": (52, 104, 36, 104, 48, 104, 72, 208),
    "1b-it": (52, 104, 36, 104, 48, 104, 72, 208),
    "4b-pt": (52, 136, 36, 136, 36, 136, 72, 272),
    "4b-it": (52, 136, 36, 136, 36, 136, 72, 272),
    "12b-pt": (52, 192, 36, 192, 36, 192, 72, 384),
    "12b-it": (52, 192, 36, 192, 36, 192, 72, 384),
    "27b-pt": (52, 248, 0, 0, 0, 0, 0, 491),
    "27b-it": (52, 248, 36, 248, 36, 248, 72, 491),
}
EVERY = tuple(addresses())
SINGLE = tuple(a for a in EVERY if len(a.layers) == 1)
ROOT = "gemma-scope-2-"


def test_single_layer_entries_are_those_of_the_published_yaml():
    lines = sorted(f"{a} {a.l0}" for a in SINGLE)
    assert len(lines) == 8784
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == YAML_SHA256


def test_counts_by_repository_and_folder():
    counts = collections.Counter((f"{a.size}-{a.variant}", a.category) for a in EVERY)
    for repository, expected in YAML_COUNTS.items():
        got = tuple(counts[repository, category] for category in catalog.CATEGORIES[:8])
        assert got == expected, repository
        assert counts[repository, "crosscoder"] == 8
        small = repository.split("-")[0] in ("270m", "1b")
        assert counts[repository, "clt"] == (8 if small else 0)
    assert len(EVERY) == len(set(map(str, EVERY))) == 8784 + 80 + 32


def test_sizes_are_those_of_the_models():
    for size, (layers, d_model, heads) in catalog.SIZES.items():
        config = PRESETS[f"gemma-3-{size}"]
        assert (layers, d_model) == (config.layers, config.d_model)
        assert heads == config.heads * config.head_dim
    assert set(PRESETS) == {f"gemma-3-{size}" for size in catalog.SIZES}


def test_sweep_layers():
    assert {size: catalog.sweep_layers(size) for size in catalog.SIZES} == {
        "270m": (5, 9, 12, 15),
        "1b": (7, 13, 17, 22),
        "4b": (9, 17, 22, 29),
        "12b": (12, 24, 31, 41),
        "27b": (16, 31, 40, 53),
    }


@pytest.mark.parametrize(
    "address, l0",
    [
        ("270m-pt/resid_post/layer_5_width_16k_l0_small", 18),
        ("270m-pt/resid_post/layer_5_width_16k_l0_big", 135),
        ("1b-it/transcoder/layer_7_width_65k_l0_big_affine", 132),
        ("1b-it/transcoder_all/layer_8_width_16k_l0_big_affine", 115),
        ("12b-pt/attn_out/layer_12_width_262k_l0_medium", 52),
        ("27b-it/mlp_out_all/layer_20_width_262k_l0_big", 118),
        ("27b-it/mlp_out_all/layer_61_width_262k_l0_big", 120),
        ("270m-pt/crosscoder/layer_5_9_12_15_width_1m_l0_big", 150),
        ("270m-pt/clt/width_262k_l0_big", 150),
        ("270m-pt/clt/width_262k_l0_medium_affine", None),
    ],
)
def test_l0_targets(address, l0):
    assert parse_address(ROOT + address).l0 == l0


def test_every_address_parses_back():
    for a in EVERY:
        assert parse_address(str(a)) == a
        assert parse_address(f"google/{a}") == a
        assert a in LISTED


def test_what_an_address_knows():
    clt = parse_address(f"{ROOT}270m-pt/clt/width_262k_l0_medium_affine")
    assert (clt.kind, clt.reads, clt.writes) == ("clt", "mlp_in", "mlp_out")
    assert (clt.layers, clt.width_exact, clt.d_in) == (tuple(range(18)), 262_080, 640)
    assert clt.base_model == "google/gemma-3-270m"
    heads = parse_address(f"{ROOT}4b-it/attn_out/layer_9_width_16k_l0_big")
    assert (heads.kind, heads.reads, heads.writes, heads.d_in) == ("sae", "z", "z", 2048)
    assert heads.base_model == "google/gemma-3-4b-it"
    assert heads.repo == "google/gemma-scope-2-4b-it"
    assert heads.folder == "attn_out/layer_9_width_16k_l0_big"
    cross = parse_address(f"{ROOT}1b-pt/crosscoder/layer_7_13_17_22_width_65k_l0_big")
    assert cross.shapes["params_layer_3.safetensors"]["w_dec"] == (16384, 4, 1152)
    assert list(cross.shapes) == [f"params_layer_{i}.safetensors" for i in range(4)]
    seeded = parse_address(f"{ROOT}1b-pt/resid_post/layer_7_width_262k_l0_medium_seed_1")
    assert seeded.seed == 1 and seeded in LISTED


def test_published_file_sizes():
    one = parse_address(f"{ROOT}4b-pt/resid_post/layer_17_width_16k_l0_medium")
    assert one.bytes == 335_686_016  # of the file on the hub, header included
    clt = parse_address(f"{ROOT}1b-pt/clt/width_262k_l0_big")
    per_file = 4 * (10080 * 1152 * 27 + 2 * 10080 + 1152)  # data without the header
    assert 26 * per_file < clt.bytes < 26 * (per_file + 1000)
    megabytes = {
        "12b-it/transcoder/layer_12_width_65k_l0_big_affine": 2073,
        "27b-pt/resid_post/layer_16_width_1m_l0_small": 45106,
        "270m-it/attn_out_all/layer_0_width_262k_l0_big": 2150,
    }
    for address, size in megabytes.items():
        assert round(parse_address(ROOT + address).bytes / 1e6) == size


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_file_size_is_that_of_the_safetensors_library(shapes):
    named = {f"tensor_{i}": tuple(shape) for i, shape in enumerate(shapes)}
    arrays = {name: np.zeros(shape, np.float32) for name, shape in named.items()}
    assert file_size({name: ("float32", s) for name, s in named.items()}) == len(save(arrays))


def test_gaps_are_not_listed_but_may_be_asked_for():
    for gap in (
        "27b-it/transcoder_all/layer_5_width_16k_l0_small",
        "27b-pt/attn_out_all/layer_3_width_16k_l0_big",
        "270m-pt/transcoder/layer_5_width_16k_l0_small",
    ):
        assert parse_address(ROOT + gap) not in LISTED
    assert parse_address(f"{ROOT}27b-it/transcoder_all/layer_5_width_16k_l0_big") in LISTED
    assert parse_address(f"{ROOT}270m-pt/transcoder/layer_9_width_16k_l0_small_affine") in LISTED


@pytest.mark.parametrize(
    "text, says, first",
    [
        ("270m-pt/resid_post/layer_12_width_16k_l0_large", "big, not large", "l0_big"),
        ("1b-pt/resid_post/layer_13_width_64k_l0_medium", "65k, not 64k", "width_65k_l0_medium"),
        ("1b-pt/resid_post/layer_13_width_256k_l0_big", "262k, not 256k", "13_width_262k_l0_big"),
        ("1b-it/clt/width_512k_l0_medium", "524k, not 512k", "1b-it/clt/width_524k_l0_medium"),
        ("4b-it/resid_post_all/layer_15_width_16k_l0_medium", "small, big", "layer_15_width_16k"),
        ("27b-it/resid_post/layer_15_width_16k_l0_big", "16, 31, 40, 53", "layer_16_width_16k"),
        ("4b/resid_post/layer_9_width_16k_l0_big", "-pt or -it", "4b-pt/resid_post/layer_9_"),
        ("9b-pt/resid_post/layer_9_width_16k_l0_big", "270m, 1b, 4b", "resid_post/layer_9_"),
        ("4b-pt/resid_psot/layer_9_width_16k_l0_big", "folders are", "resid_post/layer_9_width"),
        ("4b-pt/attn_out/layer_9_width_16k_l0_big_affine", "no affine", "layer_9_width_16k_l0_big"),
        ("4b-pt/clt/width_262k_l0_big", "4b has no clt", "4b-pt/transcoder"),
        ("1b-it-res/layer_13_width_16k_l0_big", "folders are", "1b-it/resid_post/layer_13"),
        ("4b-pt/mlp_out/layer_9_width_1m_l0_big", "not 1m", "4b-pt/mlp_out/layer_9"),
        ("1b-pt/resid_post_all/layer_26_width_16k_l0_big", "0 to 25", "layer_25_width_16k_l0_big"),
        ("1b-pt/crosscoder/layer_7_13_width_65k_l0_big", "7_13_17_22", "crosscoder/layer_7_13_17"),
    ],
)
def test_slips_get_a_helpful_word(text, says, first):
    with pytest.raises(InputError) as error:
        parse_address(ROOT + text)
    message = str(error.value)
    assert says in message and "\n" not in message
    assert first in re.findall(r"nearest: (\S+?)(?:,|$)", message)[0]
    assert all(a in LISTED for a in nearest_addresses(ROOT + text))


def test_layer_15_of_27b_means_16():
    near = nearest_addresses(f"{ROOT}27b-it/resid_post/layer_15_width_65k_l0_small", 1)
    assert [str(a) for a in near] == [f"{ROOT}27b-it/resid_post/layer_16_width_65k_l0_small"]


@pytest.mark.parametrize(
    "text", ["", "hello", "google/", "gemma-3-1b", "\0", "layer_" + "9" * 9999]
)
def test_other_texts_are_refused_in_one_line(text):
    with pytest.raises(InputError) as error:
        parse_address(text)
    assert "\n" not in str(error.value)


@given(st.sampled_from(EVERY), st.integers(0, 80), st.text(max_size=3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_damaged_addresses_parse_to_an_address_or_raise_one_line(address, at, new, gone):
    text = str(address)
    text = text[:at] + new + text[at + gone :]
    try:
        assert str(parse_address(text)) in text
    except InputError as error:
        assert "\n" not in str(error)


def test_filters_agree_with_a_plain_search():
    text = [str(a) for a in EVERY]
    some = [str(a) for a in addresses(model="google/gemma-3-1b-it", width="16k", l0="small")]
    assert some == [t for t in text if "-1b-it/" in t and "_16k_l0_small" in t]
    some = [str(a) for a in addresses(model="4b", kind="transcoder", affine=True, layer=9)]
    assert some == [
        t for t in text if "-4b-" in t and "/transcoder" in t and "affine" in t and "layer_9_" in t
    ]
    some = [str(a) for a in addresses(pattern="*-12b-pt/*_all/layer_47_*")]
    assert some == [t for t in text if "-12b-pt/" in t and "_all/layer_47_" in t]
    assert [str(a) for a in addresses(pattern="12b-pt/mlp_out/")] == [
        t for t in text if "12b-pt/mlp_out/" in t
    ]
    assert {a.kind for a in addresses(model="270m-pt", layer=9)} == set(catalog.KINDS)
    assert len(list(addresses(category="resid_post_all"))) == sum(
        row[1] for row in YAML_COUNTS.values()
    )


@pytest.mark.parametrize(
    "filters, says",
    [
        (dict(model="9b"), "4b"),
        (dict(model="1b-chat"), "variant"),
        (dict(kind="saes"), "did you mean sae"),
        (dict(width="256k"), "did you mean 262k"),
        (dict(l0="large"), "did you mean big"),
        (dict(category="resid"), "did you mean resid_post"),
        (dict(model="1b", layer=26), "0 to 25"),
        (dict(layer=-1), "0 to 61"),
    ],
)
def test_filters_that_no_coder_has(filters, says):
    with pytest.raises(InputError, match=says):
        addresses(**filters)


def test_listing_table(capsys):
    args = ["*resid_post/*_16k_*", "--model", "1b-pt", "--layer", "13", "--limit", "2"]
    assert cli.main(["list", *args]) == 0
    header, *rows, total = capsys.readouterr().out.splitlines()
    assert header.split() == list(listing.COLUMNS)
    assert rows[1].split() == [
        f"{ROOT}1b-pt/resid_post/layer_13_width_16k_l0_medium",
        *("sae", "13", "resid_post", "16,384", "60", "151.1", "MB"),
    ]
    assert total == "3 coders, 453.4 MB; the first 2 shown"
    assert len({len(row) for row in rows}) == 1


def test_listing_json(capsys):
    assert cli.main(["list", "clt", "--model", "1b-it", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert len(records) == 8
    for record in records:
        a = parse_address(record["address"])
        assert record["bytes"] == a.bytes and record["layers"] == list(range(26))
        assert (record["reads"], record["writes"]) == ("mlp_in", "mlp_out")


def test_listing_of_nothing_names_the_nearest():
    with pytest.raises(InputError, match="resid_post/layer_13_width_16k"):
        listing.find_addresses(f"{ROOT}1b-pt/resid_post/layer_12_width_16k*")
    with pytest.raises(InputError, match="4b-pt/transcoder"):
        listing.find_addresses(model="4b", kind="clt")
    with pytest.raises(InputError, match="limit"):
        cli_list.command(limit=0)


@pytest.mark.parametrize("module", [catalog, listing])
def test_the_catalogue_needs_no_jax(module):
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    ours = {name for name in imported if name.startswith("gemma_scope_jax")}
    sizes = "gemma_scope_jax.storage.safetensors_layout"
    shown = {"gemma_scope_jax.errors", "gemma_scope_jax.progress"}
    assert ours <= {"gemma_scope_jax.coders.release.catalog", sizes, *shown}
    assert not {name.split(".")[0] for name in imported} & {"jax", "flax", "numpy"}


def test_rows_exported_for_neuronpedia_have_ids_of_their_own():
    """The whole release, each layer of coders of several, and folders that are called alike."""
    from gemma_scope_jax.cards.export.neuronpedia import row_id
    from gemma_scope_jax.cards.export.saedashboard import set_name

    sources = [
        (a.base_model.split("/")[1], f"{layer}-{set_name(str(a), 'weights')}")
        for a in addresses()
        for layer in a.layers
    ]
    alike = ["layer_9_width_16k_l0_20", "layer-9-width-16k-l0-20", "", "плечо", "x" * 300]
    alike += alike
    sources += [("m", f"9-{set_name(name, f'{i:08x}ffff')}") for i, name in enumerate(alike)]
    assert len(set(sources)) == len(sources) > 9000
    assert all(re.fullmatch(r"\d+-[a-z0-9-]{1,150}", source) for _, source in sources)
    rows = [
        row_id(table, {"modelId": model, "layer": source}, *place)
        for model, source in sources
        for table, place in (
            ("activations", (0, 0)),
            ("activations", (0, 1)),
            ("activations", (1, 0)),
            ("explanations", (0,)),
            ("explanations", (1,)),
        )
    ]
    assert len(set(rows)) == len(rows) and all(re.fullmatch("c[0-9a-z]{24}", row) for row in rows)


def test_results_of_the_whole_release_lie_in_files_of_their_own():
    from gemma_scope_jax.evaluation.results import result_path

    names = [result_path("out", "core", *str(a).split("/", 1)).name for a in addresses()]
    assert len(set(names)) == len(names)
