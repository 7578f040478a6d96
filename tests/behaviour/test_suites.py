"""Suite files are checked field by field, and give the same items each time."""

import numpy as np
import pytest
import yaml

import gemma_scope_jax as gs
from gemma_scope_jax.behaviour.audits.asking import questions
from gemma_scope_jax.behaviour.suites.items import Item, drawn, requests
from gemma_scope_jax.behaviour.suites.suite import load_suite, suite_items, suite_names
from gemma_scope_jax.errors import InputError
from letters import Letters

PAIRS = {
    "name": "mine",
    "question": "Which is likelier?",
    "kind": "pairs",
    "licence": "CC0",
    "source": "written for this test",
    "data": {"items": [{"choices": ["one", "two"], "group": "g"}]},
    "measure": "preference",
    "arms": {"a": "a", "b": "b", "paired": True},
}
ASKED = PAIRS | {"kind": "generate", "measure": "verdicts", "data": {"items": [{"prompt": "Hi"}]}}


def written(folder, content):
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(content) if isinstance(content, dict) else content)
    return path


def changed(**fields):
    return {k: v for k, v in (PAIRS | fields).items() if v is not None}


@pytest.mark.parametrize("name", suite_names())
def test_every_built_in_suite_is_valid(name):
    suite = load_suite(name)
    assert suite.name == name and suite.question.endswith("?") and suite.about
    assert suite.identity() == load_suite(name).identity()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- a\n- b", "expected keys and values, found a list"),
        ("name: [", "not YAML that can be used"),
        ("name: a\nname: b", "the key 'name' occurs twice"),
        (changed(question=None), "lacks 'question'"),
        (changed(name=3), "name is 3, not text"),
        (changed(kind="pair"), "kind is 'pair'; expected one of pairs, choices, generate"),
        (changed(mesure="x"), "no field 'mesure'; did you mean measure"),
        (changed(measure="bias"), "measure is 'bias'; expected one of stereoset"),
        (changed(measure="verdicts"), "measure of kind 'pairs' is one of"),
        (changed(judge="refusal"), "judge is for suites of kind 'generate'"),
        (ASKED | {"judge": "me"}, "judge is 'me'; expected one of refusal"),
        (changed(template="html"), "template is 'html'; expected one of plain, chat"),
        (changed(limit=0), "limit is 0, expected at least 1"),
        (changed(seed=-1), "seed is -1"),
        (changed(about=[1]), "about holds 1, not a text"),
        (changed(data=None), "data must be keys and values"),
        (changed(data={}), "give one of set, file and items, not none"),
        (changed(data={"set": "stereo"}), "set is 'stereo'; expected one of stereoset"),
        (changed(data={"file": "a.csv"}), "needs either a format or its fields"),
        (changed(data={"file": "a.csv", "format": "xs"}), "format is 'xs'; expected one of xstest"),
        (changed(data={"set": "bbq", "fields": {}}), "fields is for a file"),
        (changed(data={"items": [{}]}), "item 1: lacks 'prompt'"),
        (changed(data={"items": [{"prompt": "a", "answer": 0}]}), "item 1: answer is 0"),
        (changed(arms={"a": "x"}), "arms: lacks 'b'"),
        (changed(arms={"by": "group", "a": "x", "b": "y", "paired": True}), "paired is for two"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_field(tmp_path, content, says):
    path = written(tmp_path, content)
    with pytest.raises(InputError) as error:
        load_suite(path)
    assert str(error.value).startswith(str(path)) and says in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            changed(data={"items": [{"prompt": "a"}]}),
            "item 1 has 0 choices; kind 'pairs' needs two",
        ),
        (changed(measure="sycophancy"), "item 1 has 1 prompts; measure 'sycophancy' needs 3"),
        (changed(measure="stereoset"), "item 1 has 2 choices; measure 'stereoset' needs 3"),
        (changed(measure="accuracy"), "item 1 has no answer"),
        (ASKED | {"data": {"items": [{"prompt": " "}]}}, "item 1 has no prompt"),
        (changed(data={"file": "none.csv", "format": "bbq"}), "none.csv: no such file"),
    ],
)
def test_items_that_do_not_fit_are_refused(tmp_path, content, says):
    with pytest.raises(InputError, match=says):
        suite_items(load_suite(written(tmp_path, content)))


def test_an_unknown_suite_names_those_there_are():
    with pytest.raises(InputError, match="did you mean bias_bbq.*built in: bias_bbq"):
        load_suite("bias_bqq")


def test_a_file_beside_the_suite_is_found(tmp_path):
    (tmp_path / "rows.csv").write_text("first,second,topic\nA b,C d,x\nE f,G h,y\n")
    fields = {"a": "first", "b": "second", "group": "topic"}
    suite = load_suite(written(tmp_path, changed(data={"file": "rows.csv", "fields": fields})))
    items = suite_items(suite).items
    assert [item.choices for item in items] == [("A b", "C d"), ("E f", "G h")]
    assert [item.group for item in items] == ["x", "y"]
    assert items[0].texts == {"a": "A b", "b": "C d"}


def test_what_changes_a_suite_changes_its_identity(tmp_path):
    identity = lambda **fields: load_suite(written(tmp_path, changed(**fields))).identity()
    found = [identity(), identity(seed=1), identity(limit=3), identity(question="Else?")]
    found.append(identity(data={"items": [{"choices": ["one", "three"]}]}))
    assert len(set(found)) == len(found) and identity() == found[0]


def test_a_limit_keeps_the_shares_of_groups():
    items = [Item(("x",), group=f"{'a' if n % 4 else 'b'}", unit=str(n)) for n in range(400)]
    some = drawn(items, 40, 7)
    assert [i.group for i in some].count("b") == 10
    assert some == drawn(items, 40, 7) != drawn(items, 40, 8)
    assert [int(i.unit) for i in some] == sorted(int(i.unit) for i in some)
    assert drawn(items, None, 0) == drawn(items, 400, 0) == items


def test_a_choice_follows_its_prompt_after_one_space():
    letters = Letters()
    text = lambda ids: "".join(letters.decode_tokens(ids)[1 * (ids[0] == 2) :])
    asked = requests(Item(("Is it", "So:\n"), ("yes", "no")), letters, "plain")
    assert [(text(a), text(b)) for a, b in asked] == [
        ("Is it", " yes"), ("Is it", " no"), ("So:\n", "yes"), ("So:\n", "no")
    ]  # fmt: skip
    (head, tail), *_ = requests(Item(("",), ("Whole text", "b")), letters, "plain")
    assert head.tolist() == [2] and text(tail) == "Whole text"


OWN = ("over_refusal", "sycophancy", "truthfulness", "cot_faithfulness")


@pytest.mark.real
@pytest.mark.parametrize("name", OWN)
def test_our_own_items_are_whole_and_fit_their_measure(name):
    """With the real tokenizer: prompt and choice are the text, encoded as one."""
    tokenizer, suite = gs.load_tokenizer("gemma-3-270m"), load_suite(name)
    items = suite_items(suite).items
    asked = questions(items, tokenizer, suite.template, 2048, new_tokens=suite.new_tokens)
    assert len(items) >= 30 and asked.left_out == 0
    for item, pairs in zip(asked.items, asked.pairs):
        assert len(pairs) == len(item.prompts) * max(1, len(item.choices))
        for (head, tail), prompt in zip(pairs[:: max(1, len(item.choices))], item.prompts):
            if suite.template == "chat":
                assert prompt in tokenizer.decode(head) and head[-3] == tokenizer.start_of_turn_id
            else:
                whole = tokenizer.encode(f"{prompt} {item.choices[0]}")
                np.testing.assert_array_equal(np.concatenate([head, tail]), whole)
    for key in "ab":
        assert all(suite.arms[key] in item.texts for item in items)


@pytest.mark.real
def test_a_chat_is_answered_in_the_turn_of_the_model():
    tokenizer = gs.load_tokenizer("gemma-3-270m")
    (head, tail), _ = requests(Item(("Hi",), ("Hello", "No")), tokenizer, "chat")
    ids = tokenizer.chat([{"role": "user", "content": "Hi"}]).ids
    np.testing.assert_array_equal(head, ids)
    assert tokenizer.decode(tail) == "Hello"
    asked = questions([Item(("Hi",)), Item(("Hi " * 50,))], tokenizer, "chat", 40, new_tokens=8)
    assert asked.left_out == 1 and len(asked.items) == 1
    with pytest.raises(InputError, match="no item fits"):
        questions([Item(("Hi " * 50,))], tokenizer, "chat", 40)
