"""Files for other programs, read by those programs."""

import gzip
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope_jax.cards.build import build_cards
from gemma_scope_jax.cards.examples import CardSettings
from gemma_scope_jax.cards.export.anthropic import export_anthropic
from gemma_scope_jax.cards.export.saedashboard import export_saedashboard
from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.extraction.extract import extract
from gemma_scope_jax.model.config import PRESETS
from letters import Letters
from tiny import tiny_model

pytestmark = [
    pytest.mark.peers,
    # what the peers warn about on import and in their own code is not ours to mend
    pytest.mark.filterwarnings("ignore"),
]
F, tok = 140, Letters()  # more than a batch of dashboards


@pytest.fixture(scope="module")
def coder():
    keys = jax.random.split(jax.random.key(1), 2)
    normal = lambda key, *shape: jax.random.normal(key, shape) / 32**0.5
    return SparseCoder(
        normal(keys[0], 32, F),
        jnp.zeros(F),
        jnp.full(F, 1.0).at[5].set(1e9),
        normal(keys[1], F, 32),
        jnp.zeros(32),
        layer=1,
        info=CoderInfo(model_name="acme/tiny"),
    )


@pytest.fixture(scope="module")
def cards(coder, tmp_path_factory):
    model, tmp = tiny_model(PRESETS["gemma-3-270m"], layers=4), tmp_path_factory.mktemp("cards")
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(65, 120, 100))) for _ in range(6)]
    store = extract(model, {"sae": coder}, tok, texts, tmp / "store", context_size=64)
    settings = CardSettings(top=4, each=2)
    return build_cards(store, coder, tmp / "cards", model=model, tokenizer=tok, settings=settings)


def test_saedashboard_reads_its_batches(cards, coder, tmp_path):
    from sae_dashboard.neuronpedia import neuronpedia_dashboard as dashboard

    export_saedashboard(cards, coder, tok, tmp_path / "new")
    seen = []
    for n in range(2):
        raw = json.loads((tmp_path / "new" / f"batch-{n}.json").read_text())
        batch = dashboard.NeuronpediaDashboardBatch(**raw)
        assert batch.to_dict() == raw  # nothing is dropped and nothing is missing
        seen += [feature.feature_index for feature in batch.features]
    skipped = json.loads((tmp_path / "new" / "skipped_indexes.json").read_text())["skipped_indexes"]
    assert sorted(seen + skipped) == list(range(F)) and 5 in skipped


def test_graph_viewers_read_their_files(cards, tmp_path):
    from circuit_tracer.frontend import feature_models as models

    export_anthropic({1: cards}, tok, tmp_path)
    folder = tmp_path / "features"
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))["1"]
    data = (folder / index["filename"]).read_bytes()
    for f in range(F):
        part = data[index["offsets"][f] : index["offsets"][f + 1]]
        raw = json.loads(zlib.decompress(part[4:]))
        read = models.Model.model_validate(raw, strict=True)
        assert read.model_dump() == raw
