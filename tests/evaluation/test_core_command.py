"""The command `evaluate` from end to end."""

import json

import pytest

from commands import give_tiny
from core_runs import coder
from gemma_scope_jax import cli
from gemma_scope_jax.coders.release.files import save_coder

pytestmark = pytest.mark.usefixtures("runs_at_once")


@pytest.fixture
def tiny(monkeypatch, model):
    give_tiny(monkeypatch, model)


def test_the_command(tiny, folders, text, capsys):
    options = ["--model", "tiny", "--context-size", "32", "--batch-size", "2",
               "--tokens", "200", "--loss-tokens", "60"]  # fmt: skip
    arguments = ["evaluate", f"{folders}/sae_*", *options, "--text", f"{text}/*.txt"]
    assert cli.main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    results = json.loads(out)
    assert [r["sae_lens_id"] for r in results] == ["sae_0", "sae_1"]
    for result in results:
        found = result["eval_result_metrics"]["model_performance_preservation"]
        with_bos, without = found["ce_loss_with_ablation_saelens"], found["ce_loss_with_ablation"]
        assert with_bos > 0 and without > 0 and with_bos != without
    assert (
        results[0]["eval_config"]["tokens"] == 200 and "compiled; how they fit, 200 tokens" in err
    )
    assert cli.main([*arguments, "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert "sae_1" in out and "CE score, SAELens" in " ".join(out.split())


def test_results_say_nothing_of_where_things_are_on_this_machine(
    tiny, folders, text, capsys, tmp_path
):
    """Neither their names nor what they hold: coders, text, sources, members of all together."""
    other = tmp_path / "sae_0"  # another coder of the same name
    save_coder(coder(seed=5, layer=2), other, config_extra={"model_name": "acme/tiny"})
    out = tmp_path / "out"
    arguments = ["evaluate", f"{folders}/sae_0", str(other), "--model", "tiny",
                 "--context-size", "32", "--batch-size", "2", "--tokens", "100",
                 "--loss-tokens", "60", "--replacement", "--skip-geometry",
                 "--text", f"{text}/*.txt", "--out", str(out)]  # fmt: skip
    assert cli.main(arguments) == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".json"]) == 3
    for path in files:
        said = path.name + (path.read_text() if path.suffix == ".json" else "")
        for folder in (*folders.parents, *tmp_path.parents, *text.parents)[:-1]:
            assert len(folder.name) < 5 or folder.name not in said, (folder, path)
    assert capsys.readouterr().err.count("measured before") == 0
    assert cli.main(arguments) == 0
    assert capsys.readouterr().err.count("measured before") == 3


def test_records_that_cannot_be_used(tiny, folders, tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(['{"text": "plums and pears, figs and sloes"}', '{"no": 1}'] * 9))
    arguments = ["evaluate", f"{folders}/sae_0", "--model", "tiny",
                 "--context-size", "32", "--batch-size", "2",
                 "--tokens", "60", "--loss-tokens", "0", "--text", str(path)]  # fmt: skip
    assert cli.main(arguments) == 2
    assert "set skip_bad" in capsys.readouterr().err
    assert cli.main([*arguments, "--skip-bad"]) == 0


def test_without_losses_or_text(tiny, folders, capsys):
    """On the bundled sample, with a warning; no number stands where nothing was measured."""
    options = ["--model", "tiny", "--context-size", "32", "--batch-size", "2", "--tokens", "100"]
    assert cli.main(["evaluate", f"{folders}/sae_0", *options, "--loss-tokens", "0"]) == 0
    out, err = capsys.readouterr()
    assert "warning: without --text" in err and "too short" in err
    assert "FVU" in out and "delta loss" not in out and "-1.0000" not in out


BAD = {
    "no_coder": ([], "name at least one coder"),
    "no_text": (["--text", "/nowhere/*.txt"], "no text files match /nowhere"),
    "no_tokens": (["--tokens", "0"], "at least one token"),
    "fewer_losses": (["--loss-tokens", "-1"], "loss_tokens -1: 0 or more"),
    "no_losses": (["--replacement", "--loss-tokens", "0"], "replacement measures losses"),
    "too_long": (["--context-size", "65"], "more than the model's context of 64"),
    "no_rows": (["--batch-size", "0"], "a sequence must hold"),
    "two_texts": (["--text", "TEXT", "--tfds", "news"], "either files or tfds"),
    "chats": (["--messages", "m"], "--messages needs --text"),
    "chats_in_text": (["--messages", "m", "--text", "TEXT"], "plain text holds no chats"),
    "role": (["--messages", "m", "--text", "TEXT", "--roles", "cook"], "no such role"),
    "twice": (["FOLDER"], "is named twice"),
    "two_at_one_place": (["OTHER", "--replacement"], "two coders write resid_post of layer 1"),
    "bucket": (["--out", "ftp://x/y"], "ftp:// is not supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(tiny, folders, text, capsys, case):
    more, message = BAD[case]
    named = {"FOLDER": f"{folders}/sae_0", "OTHER": f"{folders}/sae_1", "TEXT": f"{text}/a.txt"}
    more = [named.get(a, a) for a in more]
    coders = [] if case == "no_coder" else [f"{folders}/sae_0"]
    code = cli.main(["evaluate", *coders, *more, "--model", "tiny",
                     *(() if "--context-size" in more else ("--context-size", "32"))])  # fmt: skip
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and message in lines[-1] and lines[-1].startswith("error: ")
    if case in ("no_text", "two_texts", "role"):  # before anything is loaded
        assert not any("loading" in line for line in lines)
