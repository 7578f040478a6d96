"""What JSON allows and the project does not, and what a terminal is never sent."""

import json

import pytest

from gemma_scope_jax.errors import InputError, shown
from gemma_scope_jax.storage.strict_json import field, parse_json, read_json


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e400}', "too large"),
        ('{"a": %s}' % ("9" * 400), "too large"),
        ('{"a": %s}' % ("9" * 5000), "too large"),
        ("[" * 100_000, "nested"),
        ('{"a":' * 100_000, "nested"),
        ('{"a": 1, "a": 2}', "twice"),
        (r'{"a": "half \ud83d"}', "surrogate"),
        (r'{"\udc00": 1}', "surrogate"),
        (b'{"a": "\xff"}', "UTF-8"),
        ("", "JSON"),
        ('{"a": 1} trailing', "JSON"),
        ('{"a\x1b[31m": }', "JSON"),
    ],
)
def test_what_is_refused_is_said_in_one_line(text, said):
    with pytest.raises(InputError, match=said) as error:
        parse_json(text, "some/file.json")
    message = str(error.value)
    assert message.startswith("some/file.json: ") and message.isprintable() and len(message) < 400


def test_what_is_sound_is_read_as_json_reads_it():
    value = {"a": [1, -2.5, 1e300, None, True, "\U0001f600 é"], "b": {"c": 2**63 - 1}}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text, "x") == value
        assert parse_json(b"\xef\xbb\xbf" + text.encode(), "x") == value


def test_a_whole_number_beyond_64_bits_is_no_whole_number():
    """As in every tokenizer_config.json of Gemma: "model_max_length", which nobody reads."""
    content = parse_json(f'{{"model_max_length": {int(1e30)}, "a": 9223372036854775808}}', "w")
    assert content["model_max_length"] == 1e30
    for key in content:
        with pytest.raises(InputError, match="not a whole number"):
            field(content, key, int, "w")


def test_half_a_character_can_be_mended():
    assert parse_json(r'["a \ud83d b", "\ud83d\ude00"]', "x", mend_text=True) == [
        "a \ufffd b",
        "\U0001f600",
    ]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.json: not usable as JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        ([], int, "not an object"),
        ({}, int, "lacks 'a'"),
        ({"a": None}, int, "lacks 'a'"),
        ({"a": "3"}, int, "not a whole number"),
        ({"a": True}, int, "not a whole number"),
        ({"a": True}, float, "not a number"),
        ({"a": 3.5}, int, "not a whole number"),
        ({"a": [1]}, dict, "not an object"),
        ({"a": {}}, list, "not a list"),
        ({"a": 0}, int, "expected 1 to 9"),
        ({"a": 10.0}, float, "expected 1 to 9"),
        ({"a": ""}, str, "expected 1 to 9"),
    ],
)
def test_a_field_has_its_kind_and_range(content, kind, said):
    with pytest.raises(InputError, match=said):
        field(content, "a", kind, "where", least=1, most=9)


def test_a_field_that_is_as_it_should_be():
    assert field({"a": 3}, "a", int, "w", least=3, most=3) == 3
    assert field({"a": 3}, "a", float, "w") == 3.0
    assert field({"a": None}, "a", int, "w", default=7) == 7
    assert field({"a": [1]}, "a", list, "w", least=1) == [1]


def test_control_characters_are_shown_and_text_is_kept():
    assert shown("\x1b]0;title\x07\n") == r"\x1b]0;title\x07\n"
    assert shown("a\nb\tc", keep="\n\t") == "a\nb\tc"
    assert shown("right \u202e left \u2028 half \ud83d") == (
        r"right \u202e left \u2028 half \ud83d"
    )
    kept = "naïve 漢字 \U0001f468\u200d\U0001f469 fine"
    assert shown(kept) == kept
    assert str(InputError("a\x1b[2Jb\nc")) == r"a\x1b[2Jb c"
