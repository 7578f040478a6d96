"""The text of an evaluation: every token once, with its source and its role."""

import json

import numpy as np
import pytest

from core_runs import coder
from gemma_scope_jax.data.documents import TextData
from gemma_scope_jax.evaluation.evaluate import EvaluationPlan, measure
from gemma_scope_jax.evaluation.texts import EvaluationText
from gemma_scope_jax.model.tokenizer import SPAN_ROLES, Chat
from letters import Letters

pytestmark = pytest.mark.usefixtures("runs_at_once")


class ChattyLetters(Letters):
    """Chats as <turn role text end>: 4 and 5 open and close a turn."""

    def chat(self, messages, add_generation_prompt=True):
        ids, roles = [2], ["turn"]
        for message in messages:
            said = self.encode(message["content"], bos=False).tolist()
            ids += [4, *said, 5]
            roles += ["turn", *[message["role"]] * len(said), "turn"]
        return Chat(np.array(ids, np.int32), np.array([*map(SPAN_ROLES.index, roles)], np.int32))


def test_every_token_is_there_once_with_its_source(text):
    data = EvaluationText(
        TextData(files=(f"{text}/*.txt",)), Letters(), batch_size=2, context_size=32
    )
    names = data.groups["source"]
    read = {name: [] for name in names}
    for batch in data:
        positions = np.zeros_like(batch.segments)
        for t in range(1, 32):
            same = (batch.segments[:, t] == batch.segments[:, t - 1]) & (batch.segments[:, t] > 0)
            positions[:, t] = np.where(same, positions[:, t - 1] + 1, 0)
        starts = (batch.segments > 0) & (positions == 0)
        assert (batch.tokens[starts] == 2).all()
        np.testing.assert_array_equal(batch.mask, (batch.segments > 0) & ~starts)
        for name in names:
            read[name] += batch.tokens[batch.mask & batch.labels["source"].where(name)].tolist()
    for name, ids in read.items():
        documents = (text / name).read_text(encoding="utf-8").split("\n\f\n")
        assert sorted(ids) == sorted(Letters().encode("".join(documents), bos=False).tolist())


def test_the_same_text_is_the_same_batches(text):
    """Another text has another fingerprint."""
    data = EvaluationText(
        TextData(files=(f"{text}/a.txt",)), Letters(), batch_size=2, context_size=32
    )
    for one, two in zip(data, data):
        np.testing.assert_array_equal(one.tokens, two.tokens)
    other = EvaluationText(
        TextData(files=(f"{text}/b.txt",)), Letters(), batch_size=2, context_size=32
    )
    longer = EvaluationText(data.data, Letters(), batch_size=2, context_size=32, tokens=10)
    assert len({data.fingerprint(), other.fingerprint(), longer.fingerprint()}) == 3
    assert len(list(longer)) == 1 and data.groups == {}


def test_roles_of_chats(tmp_path):
    chats = [[{"role": "user", "content": "plums?"}, {"role": "model", "content": "yes, two"}]]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"m": chats[0]}) + "\n")
    data = TextData(files=(str(path),), messages="m", roles=("model",))
    some = EvaluationText(data, ChattyLetters(), batch_size=1, context_size=24)
    (batch,) = some
    said = lambda mask: "".join(Letters().decode_tokens(batch.tokens[mask]))
    role = batch.labels["role"].where
    assert some.groups == {"role": ("turn", "system", "user", "model")}
    assert said(role("user")) == "plums?" and said(role("model")) == "yes, two"
    assert said(batch.mask) == "yes, two"


def test_figures_by_role(model, tmp_path):
    """What is said counts, the template around it does not; roles that say nothing have no row."""
    chat = [{"role": "user", "content": "plums?"}, {"role": "model", "content": "yes, two"}] * 2
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"m": chat}) + "\n")
    data = TextData(files=(str(path),), messages="m", roles=("user", "model"))
    some = EvaluationText(data, ChattyLetters(), batch_size=2, context_size=32)
    plan = EvaluationPlan(loss_tokens=0, groups=some.groups)
    found = measure(model, [coder()], some, plan).tallies[0].metrics()
    rows = {row["name"]: row["tokens"] for row in found.groups["role"]}
    assert rows == {"user": 2 * len("plums?"), "model": 2 * len("yes, two")}
    assert found.all.tokens == sum(rows.values())


def test_only_the_beginning_of_a_document():
    data = EvaluationText(
        ["abcdefghij" * 3, "xyz"], Letters(), document=12, batch_size=1, context_size=64
    )
    (batch,) = data
    assert batch.mask.sum() == 12 + 3
