"""What other programs read of cards, against their own fields' names and types."""

import gzip
import json
import shutil
import struct
import zlib

import numpy as np
import pytest

from card_folders import EXPLAINED, F, card_coder, data_of, publish_examples
from commands import command
from gemma_scope_jax.cards.card_files import FILE, FeatureCards
from gemma_scope_jax.cards.export.anthropic import cantor
from gemma_scope_jax.cards.export.neuronpedia import _about as neuronpedia_rows
from gemma_scope_jax.coders.load import load_coder
from gemma_scope_jax.coders.release.files import save_coder
from letters import Letters

# -------------------------------------------------------------------------------------------------
# Other programs' files. Fields: sae-dashboard 0.8 and its neuronpedia_export, circuit-tracer 0.5


NUMBER, NUMBERS, TEXTS = (int, float), [(int, float)], [str]
DASHBOARD = {
    "feature_index": int, "neuron_alignment_indices": [int], "neuron_alignment_values": NUMBERS,
    "neuron_alignment_l1": NUMBERS, "correlated_neurons_indices": [int],
    "correlated_neurons_pearson": NUMBERS, "correlated_neurons_l1": NUMBERS,
    "correlated_features_indices": [int], "correlated_features_pearson": NUMBERS,
    "correlated_features_l1": NUMBERS, "neg_str": TEXTS, "neg_values": NUMBERS, "pos_str": TEXTS,
    "pos_values": NUMBERS, "frac_nonzero": NUMBER, "freq_hist_data_bar_values": NUMBERS,
    "freq_hist_data_bar_heights": NUMBERS, "logits_hist_data_bar_heights": NUMBERS,
    "logits_hist_data_bar_values": NUMBERS, "n_prompts_total": int, "n_tokens_in_prompt": int,
    "dataset": str, "decoder_weights_dist": NUMBERS, "vector": NUMBERS,
    "activations": [{
        "bin_min": NUMBER, "bin_max": NUMBER, "bin_contains": NUMBER, "tokens": TEXTS,
        "values": NUMBERS, "qualifying_token_index": int,
    }],
}  # fmt: skip
OPTIONAL = (str, int, float, type(None))
FEATURE = {
    **{k: v for k, v in DASHBOARD.items() if k not in (
        "feature_index", "n_prompts_total", "n_tokens_in_prompt", "dataset", "activations")},
    "modelId": str, "layer": str, "index": str, "creatorId": str, "createdAt": str,
    "maxActApprox": NUMBER, "hasVector": bool, "vectorLabel": OPTIONAL, "hookName": str,
    "vectorDefaultSteerStrength": NUMBER, "topkCosSimIndices": [int], "topkCosSimValues": NUMBERS,
    "sourceSetName": str,
}  # fmt: skip
ACTIVATION = {
    "id": str, "tokens": TEXTS, "index": str, "layer": str, "modelId": str, "maxValue": NUMBER,
    "maxValueTokenIndex": int, "minValue": NUMBER, "values": NUMBERS, "creatorId": str,
    "dataSource": OPTIONAL, "dataIndex": OPTIONAL, "dfaValues": NUMBERS, "dfaTargetIndex": OPTIONAL,
    "dfaMaxValue": OPTIONAL, "createdAt": str, "lossValues": NUMBERS, "binMin": NUMBER,
    "logitContributions": OPTIONAL, "binMax": NUMBER, "binContains": NUMBER,
    "qualifyingTokenIndex": int, "zIndices": OPTIONAL, "zValues": OPTIONAL,
}  # fmt: skip
ANTHROPIC = {
    "transcoder_id": str, "index": int, "top_logits": TEXTS, "bottom_logits": TEXTS,
    "act_min": NUMBER, "act_max": NUMBER, "quantile_values": NUMBERS, "histogram": NUMBERS,
    "activation_frequency": NUMBER,
    "examples_quantiles": [{"quantile_name": str, "examples": [{
        "tokens_acts_list": NUMBERS, "train_token_ind": int, "is_repeated_datapoint": bool,
        "tokens": TEXTS,
    }]}],
}  # fmt: skip


def check(value, schema, where=""):
    """Exactly these keys and types; a list's elements are all of one schema."""
    if isinstance(schema, dict):
        assert isinstance(value, dict) and value.keys() == schema.keys(), where
        for key, inner in schema.items():
            check(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for i, element in enumerate(value):
            check(element, schema[0], f"{where}[{i}]")
    else:
        assert isinstance(value, schema), where
        assert bool in np.atleast_1d(schema) or not isinstance(value, bool), where


def test_the_check_finds_faults():
    good = {"a": 1, "b": [0.5]}
    check(good, {"a": int, "b": NUMBERS})
    for bad in ({"a": 1}, {**good, "c": 1}, {"a": True, "b": []}, {"a": 1, "b": ["x"]}, []):
        with pytest.raises(AssertionError):
            check(bad, {"a": int, "b": NUMBERS})


def test_saedashboard(made, cards):
    folder, tok = made / "one" / "saedashboard", Letters()
    batches = [json.loads(p.read_text()) for p in sorted(folder.glob("batch-*.json"))]
    assert len(batches) == 1
    for batch in batches:
        check(
            batch,
            {
                "model_id": str,
                "layer": int,
                "sae_set": str,
                "sae_id_suffix": OPTIONAL,
                "features": [DASHBOARD],
            },
        )
    features = {f["feature_index"]: f for b in batches for f in b["features"]}
    skipped = json.loads((folder / "skipped_indexes.json").read_text())
    assert skipped["skipped_indexes"] == [5] and skipped["layer"] == "1"
    assert sorted([*features, 5]) == list(range(F))
    settings = json.loads((folder / "run_settings.json").read_text())
    assert (settings["n_quantiles"], settings["top_acts_group_size"]) == (5, 9)
    w = np.asarray(load_coder(made.parent / "one").w_dec, np.float64)
    for f, dashboard in features.items():
        groups = cards.groups(f)
        shown = [e for g in groups for e in g.examples]
        assert len(dashboard["activations"]) == len(shown)
        for activation, example in zip(dashboard["activations"], shown):
            assert activation["tokens"] == tok.decode_tokens(example.ids)
            np.testing.assert_allclose(activation["values"], example.values, atol=1e-5)
            assert activation["qualifying_token_index"] == example.at
        top = dashboard["activations"][: len(groups[0].examples)]
        assert {(a["bin_min"], a["bin_contains"]) for a in top} == {(-1, -1)}
        rest = dashboard["activations"][len(top) :]
        for a in rest:
            peak = a["values"][a["qualifying_token_index"]]
            assert a["bin_min"] - 1e-5 < peak <= a["bin_max"] + 1e-5 and 0 < a["bin_contains"] <= 1
        shares = {(a["bin_min"], a["bin_contains"]) for a in rest}
        assert sum(share for _, share in shares) == pytest.approx(1, abs=1e-4)
        aligned = np.argsort(-w[f])[:3]
        assert dashboard["neuron_alignment_indices"] == aligned.tolist()
        np.testing.assert_allclose(
            dashboard["neuron_alignment_l1"], np.abs(w[f][aligned]) / np.abs(w[f]).sum(), atol=1e-5
        )
        assert sum(dashboard["freq_hist_data_bar_heights"]) == groups[0].count
        assert dashboard["frac_nonzero"] == pytest.approx(float(cards["density"][f]))


def rows_of(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_neuronpedia(made):
    (source,) = (made / "one" / "neuronpedia" / "tiny").glob("1-one-????????")
    features, activations = (
        rows_of(source / n / "batch-0.jsonl.gz") for n in ("features", "activations")
    )
    for rows, schema in ((features, FEATURE), (activations, ACTIVATION)):
        for row in rows:
            check(row, schema)
    assert len({a["id"] for a in activations}) == len(activations)
    assert all(len(a["id"]) == 25 for a in activations)
    most = {}
    for a in activations:
        assert a["values"][a["maxValueTokenIndex"]] == a["maxValue"] == max(a["values"])
        most[a["index"]] = max(most.get(a["index"], 0), a["values"][a["qualifyingTokenIndex"]])
    for row in features:
        assert row["maxActApprox"] == pytest.approx(most[row["index"]], abs=1e-4)
        assert row["layer"] == source.name and row["hookName"] == "blocks.1.resid_post"
    (said,) = rows_of(source / "explanations" / "batch-0.jsonl.gz")
    assert said["index"] == "3" and said["description"] == EXPLAINED[3]["text"]
    assert said["scoreV1"] == 0.875
    for name, keys in {
        "release": {"name", "description", "creatorId", "urls", "createdAt"},
        "model": {"id", "instruct", "creatorId", "updatedAt"},
        "sourceset": {"modelId", "name", "releaseName", "visibility"},
        "source": {"id", "modelId", "setName", "hfRepoId", "num_prompts", "dataset"},
    }.items():  # fmt: skip
        row = json.loads((source / f"{name}.jsonl").read_text())
        assert keys <= row.keys()
    assert row["id"] == source.name and row["num_tokens_in_prompt"] == 64


@pytest.mark.parametrize("name, instruct", [
    ("gemma-3-1b-it", True), ("acme/tiny-IT", True), ("acme/tiny_it", True),
    ("gemma-3-4b-it-qat-q4_0", True), ("gemma-3-1b-pt", False), ("acme/kit", False),
])  # fmt: skip
def test_neuronpedia_is_told_of_instruction_tuned_models(made, tmp_path, name, instruct):
    shutil.copytree(made / "one" / "cards", tmp_path / "one")
    manifest = json.loads((tmp_path / "one" / FILE).read_text()) | {"model": name}
    (tmp_path / "one" / FILE).write_text(json.dumps(manifest))
    rows = neuronpedia_rows(FeatureCards(tmp_path / "one"), "source", "now")
    assert rows["model"]["instruct"] is instruct


def test_graph_viewers(made, cards):
    """As a viewer does it: the index, a range of bytes, its length, zlib, JSON."""
    folder, tok = made / "anthropic" / "features", Letters()
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    assert index.keys() == {"1", "2"}  # both coders, in one index
    data = (folder / index["1"]["filename"]).read_bytes()
    offsets = index["1"]["offsets"]
    assert len(offsets) == F + 1 and offsets[-1] == len(data)
    for f in range(F):
        part = data[offsets[f] : offsets[f + 1]]
        (length,) = struct.unpack("<I", part[:4])
        card = json.loads(zlib.decompress(part[4 : 4 + length]))
        check(card, ANTHROPIC)
        assert card["index"] == cantor(1, f) and len(card["quantile_values"]) == 99
        assert card["act_max"] == pytest.approx(float(cards["largest"][f]), abs=1e-5)
        assert card["histogram"] == cards["histogram"][f].tolist()
        shown = [e for g in cards.groups(f) for e in g.examples]
        listed = [e for q in card["examples_quantiles"] for e in q["examples"]]
        assert [e["tokens"] for e in listed] == [tok.decode_tokens(e.ids) for e in shown]
        assert [e["train_token_ind"] for e in listed] == [e.at for e in shown]
        places = [(e.document, e.position) for e in shown]
        repeated = [place in places[:i] for i, place in enumerate(places)]
        assert [e["is_repeated_datapoint"] for e in listed] == repeated
        alone = made / "anthropic-json" / f"{cantor(1, f)}.json"
        assert alone.exists() == (f != 5) and (f == 5 or json.loads(alone.read_bytes()) == card)


def test_cantor():
    """Every pair has a number of its own, along the diagonals."""
    pairs = [(layer, total - layer) for total in range(40) for layer in range(total, -1, -1)]
    assert [cantor(*pair) for pair in pairs] == list(range(len(pairs)))
    assert cantor(25, 9999) == 50_255_299


# -------------------------------------------------------------------------------------------------
# Published examples


def test_the_command_on_published_examples(tiny, tmp_path):
    """Neither model nor text is needed."""
    save_coder(card_coder(), tmp_path / "sae", config_extra={"model_name": "acme/tiny"})
    publish_examples(tmp_path / "sae", np.random.default_rng(1))
    options = ("--out", tmp_path / "out", "--model", "tiny", "--export", "saedashboard")
    assert command("cards", tmp_path / "sae", *options) == 0
    assert "published examples" in data_of(tmp_path / "out" / "sae" / "data" / "list.js")["about"]
    batch = json.loads((tmp_path / "out" / "sae" / "saedashboard" / "batch-0.json").read_text())
    check(batch["features"], [DASHBOARD])
