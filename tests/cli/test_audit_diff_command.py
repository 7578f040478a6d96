"""`gemma-scope audit diff`: two words, two models, one page of findings."""

import json

import numpy as np
import pytest

import gemma_scope_jax as gs
from commands import command, give_tiny
from gemma_scope_jax import cli
from gemma_scope_jax.model.tokenizer import Chat
from letters import Letters


class Words(Letters):
    start_of_turn_id, end_of_turn_id = 1, 0

    def chat(self, messages, add_generation_prompt=True):
        ids = self.encode(messages[-1]["content"][:40])
        return Chat(ids, np.ones(len(ids), np.int32))

    def decode(self, ids):
        return "".join(self.decode_tokens(ids))


@pytest.fixture
def two(monkeypatch, model):
    """The name "tiny" is the tiny model, "changed" the same with another matrix in layer 1."""
    w = np.array(model.params.blocks.w_down)
    w[1] += np.random.default_rng(0).standard_normal(w[1].shape)
    blocks = model.params.blocks.replace(w_down=np.asarray(w, np.float32))
    changed = model.replace(params=model.params.replace(blocks=blocks))
    give_tiny(monkeypatch, model, Words)
    models = {"tiny": model, "changed": changed}
    monkeypatch.setattr(gs, "load_model", lambda name, dtype, progress: models[name])


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps({"text": f"text number {n} " + "abc " * (n % 3)}) + "\n" for n in range(20)
        )
    )
    return tmp_path / "a.jsonl"


def test_what_differs_is_printed_and_written(two, text, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--text", text, "--search", 10, "--out", out)
    assert command("audit", "diff", "tiny", "changed", *options) == 0
    printed = capsys.readouterr().out
    content = json.loads((out / "diff.json").read_text())
    assert [(w["name"], w["layer"]) for w in content["weights"]] == [("w_down", 1)]
    assert content["texts"] == 20 and content["kl"]["value"] > 0
    assert content["verdict"] in printed and (out / "diff.txt").read_text() == printed
    assert command("audit", "diff", "tiny", "changed", "--text", text, "--search", 0, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kl"] == content["kl"]


def test_without_text_the_models_write_it(two, capsys):
    assert command("audit", "diff", "tiny", "tiny", "--texts", 12, "--search", 0) == 0
    assert "the models are the same" in capsys.readouterr().out


def test_the_command_has_two_words(capsys):
    assert "audit_diff" in cli.COMMANDS
    with pytest.raises(SystemExit):
        command("audit", "diff", "--help")
    assert "gemma-scope audit diff" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (("tiny", "changed", "--text", "none.txt"), "none.txt"),
        (("nowhere", "changed"), "nowhere"),
        (("tiny", "changed", "--texts", "4"), "needs 10 texts"),
    ],
)
def test_bad_input_is_one_line(two, argv, message, capsys):
    assert command("audit", "diff", *argv) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and message in said
