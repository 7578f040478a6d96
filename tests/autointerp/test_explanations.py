"""The file of explanations, and what shows it."""

import json

import pytest

from gemma_scope_jax.autointerp.explanations import (
    explanation_note,
    read_explanations,
    write_explanations,
)
from gemma_scope_jax.errors import InputError
from judges import ENTRY


def test_explanations_are_written_and_read(tmp_path):
    write_explanations(tmp_path, "some/coder", {12: ENTRY, 3: ENTRY | {"text": "ü\n"}})
    content = json.loads((tmp_path / "explanations.json").read_text())
    assert content["format"] == 1 and content["coder"] == "some/coder"
    assert list(content["explanations"]) == ["3", "12"]
    assert read_explanations(tmp_path, 13) == {12: ENTRY, 3: ENTRY | {"text": "ü\n"}}
    assert read_explanations(tmp_path / "explanations.json") == read_explanations(tmp_path)
    assert read_explanations(tmp_path / "nothing") == {}
    assert explanation_note(ENTRY) == "m, detection 0.91"
    assert [p.name for p in tmp_path.iterdir()] == ["explanations.json"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not usable as JSON"),
        ("[]", "not explanations of features"),
        ('{"format": 1, "explanations": {"x": {}}}', "'x' is not the number of a feature"),
        ('{"format": 1, "explanations": {"01": {}}}', "'01' is not the number of a feature"),
        (
            '{"format": 1, "explanations": {"%s": {}}}' % ("9" * 400),
            "is not the number of a feature",
        ),
        ('{"format": 1, "explanations": [1]}', "explanations is .1., not an object"),
        ('{"format": true, "explanations": {}}', "format is True"),
        ('{"format": 1, "explanations": {"3": {"scores": {"x": {"n": NaN}}}}}', "NaN"),
        ('{"format": 1, "explanations": {"3": {"examples": 1e400}}}', "too large"),
        ('{"format": 1, "explanations": {"3": {"examples": %s}}}' % ("9" * 400), "too large"),
        ('{"format": 1, "explanations": ' + "[" * 100_000, "nested too deeply"),
        ('{"format": 1, "explanations": {"3": {"text": "\\ud83d"}}}', "half of a surrogate pair"),
        ('{"format": 2, "explanations": {}}', "format is 2, not 1"),
        ('{"format": 1, "explanations": {"3": {"text": 5}}}', "feature 3 has no valid explanation"),
        ('{"format": 1, "explanations": {"0": {}}}', "feature 0 has no valid explanation"),
        (json.dumps({"format": 1, "explanations": {"99": ENTRY}}), "explains feature 99"),
        (
            json.dumps({"format": 1, "explanations": {"3": ENTRY | {"scores": {"x": 0.9}}}}),
            "feature 3 has no valid explanation",
        ),
        ("\xff", "not UTF-8"),
    ],
)
def test_files_that_are_no_explanations(tmp_path, text, says):
    (tmp_path / "explanations.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=says):
        read_explanations(tmp_path, 50)


def test_a_named_file_that_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"other\.json: no such file"):
        read_explanations(tmp_path / "other.json")
