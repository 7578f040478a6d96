"""`profile` traces a few batches of an extraction."""

from feature_stores import CODERS, SETTINGS
from gemma_scope_jax.extraction.extract import extract
from letters import Letters


def test_an_extraction_leaves_a_trace_and_the_same_store(model, documents, store, tmp_path):
    places = tmp_path / "store", tmp_path / "profile"
    traced = extract(model, CODERS, Letters(), documents, places[0], profile=places[1], **SETTINGS)
    [trace] = places[1].rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
    assert len(traced) == len(store)
