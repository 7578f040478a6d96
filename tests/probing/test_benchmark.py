"""The command `benchmark` end to end on a tiny model: what it writes, and what it does not do
twice."""

import csv
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from coders import random_coder
from commands import give_tiny
from gemma_scope_jax import cli
from gemma_scope_jax.coders.coder import weights_identity
from gemma_scope_jax.coders.release.files import save_coder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation.results import read_result
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.probing import jobs as benchmark
from gemma_scope_jax.probing.absorption import LETTERS
from gemma_scope_jax.probing.probing import PROTOCOLS
from letters import Letters
from probing_data import Spelled
from tiny import tiny_model


def tiny_speller():
    """Its words are embedded by their first letters, which a probe can therefore find."""
    model = tiny_model(PRESETS["gemma-3-270m"], layers=3)
    tok = Spelled()
    rng = np.random.default_rng(0)
    embed = np.array(model.params.embed)
    directions = np.linalg.qr(rng.standard_normal((32, 32)))[0]
    for i, piece in enumerate(tok.pieces):
        if piece.strip().isalpha() and len(piece) == 3:
            embed[i] = directions[LETTERS.index(piece[1])] * 1.5 + 0.02 * rng.standard_normal(32)
    return model.replace(params=model.params.replace(embed=jnp.asarray(embed))), tok


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two coders and three tables of short texts."""
    path = tmp_path_factory.mktemp("benchmark")
    for seed in (0, 1):
        coder = random_coder(seed=seed, layer=2)
        save_coder(coder, path / f"sae{seed}", config_extra={"model_name": "acme/tiny"})
    rng = np.random.default_rng(0)
    text = lambda letters: "".join(rng.choice(list(letters), rng.integers(3, 9)))
    kinds = ("abcd", "efgh", "ijkl")
    write(path / "moods.csv", "prompt,target", [(text(kinds[i % 2]), i % 2) for i in range(240)])
    write(path / "topics.csv", "prompt,target", [(text(kinds[i % 3]), i % 3) for i in range(180)])
    people = [(text(kinds[i % 2] + "ab" * (i // 2 % 2)), i % 2, i // 2 % 2) for i in range(160)]
    write(path / "people.csv", "text,job,sex", people)
    write(path / "years.csv", "prompt,target", [(text("abc"), i) for i in range(120)])
    return path


def write(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])


@pytest.fixture
def tiny(monkeypatch):
    """Call it, and the model's tokenizer is the one that can spell."""
    model, tok = tiny_speller()
    vocabulary = {"tok": Letters()}
    give_tiny(monkeypatch, model, lambda: vocabulary["tok"])
    return lambda: vocabulary.update(tok=tok)


def measured(monkeypatch):
    """The names of the tasks for which the model ran, as they come."""
    names, real = [], benchmark.pooling.pool
    monkeypatch.setattr(
        benchmark.pooling,
        "pool",
        lambda m, coders, texts, **o: names.append(len(coders)) or real(m, coders, texts, **o),
    )
    return names


def test_every_benchmark_of_tables_in_one_command_and_nothing_twice(
    folder, tiny, capsys, monkeypatch, compile_once
):
    passes = measured(monkeypatch)
    out = folder / "out"
    options = ["--probing", str(folder / "[my]*s.csv"), "--tpp", str(folder / "topics.csv"),
               "--scr", str(folder / "people.csv"), "--ks", "1", "4", "--model", "tiny",
               "--out", str(out)]  # fmt: skip
    assert cli.main(["benchmark", str(folder / "sae0"), *options]) == 0
    shown = capsys.readouterr()
    assert "skipped" in shown.err and "years.csv" in shown.err
    assert "100.0 %" in shown.err and "tokens/s  scr people" in shown.err
    for title in (
        "Sparse probing, sae-probes: auc, mean over 1",
        "### TPP, topics",
        "### SCR, peo",
    ):
        assert title in shown.out
    assert passes == [1, 1, 1]

    probing = read_result(next((out / "sparse_probing_sae_probes").iterdir()))
    metrics = probing["eval_result_metrics"]
    assert set(metrics["sae"]) == {
        f"sae_top_{k}_test_{m}" for k in (1, 4) for m in ("accuracy", "auc", "f1")
    }
    assert metrics["llm"]["llm_test_auc"] == 1.0  # the last letter says it
    assert probing["eval_result_details"][0]["dataset_name"] == "moods"
    (share,) = probing["eval_result_unstructured"][  # texts of three letters occur twice
        "share_of_tested_rows_with_texts_trained_on"
    ].values()
    assert 0 < share < 1 and f"{100 * share:.0f} % of the test rows have texts" in shown.out
    tpp = read_result(next((out / "tpp").iterdir()))["eval_result_metrics"]["tpp_metrics"]
    assert tpp["tpp_threshold_2_total_metric"] == pytest.approx(
        tpp["tpp_threshold_2_intended_diff_only"] - tpp["tpp_threshold_2_unintended_diff_only"]
    )
    scr = read_result(next((out / "scr").iterdir()))["eval_result_metrics"]["scr_metrics"]
    assert scr["scr_metric_threshold_500"] in (
        scr["scr_dir1_threshold_500"],
        scr["scr_dir2_threshold_500"],
    )

    # Again with another coder: the model runs for that alone, and the table has both.
    assert cli.main(["benchmark", str(folder / "sae*"), *options]) == 0
    shown, first = capsys.readouterr(), shown
    assert passes == [1, 1, 1] + [1, 1, 1]
    assert shown.out.count("sae1") >= 3
    kept = [line for line in first.out.splitlines() if "sae0" in line or "activation" in line]
    rows = lambda text: [[c.strip() for c in line.split("|")] for line in text]
    assert all(row in rows(shown.out.splitlines()) for row in rows(kept))
    assert cli.main(["benchmark", str(folder / "sae*"), *options]) == 0
    assert len(passes) == 6 and "3 of 3 tasks are done already" in capsys.readouterr().err


def test_a_killed_run_goes_on_where_it_was(folder, tiny, capsys, monkeypatch, compile_once):
    options = [str(folder / "sae0"), "--tpp", str(folder / "topics.csv"), "--scr",
               str(folder / "people.csv"), "--model", "tiny", "--out"]  # fmt: skip
    assert cli.main(["benchmark", *options, str(folder / "whole")]) == 0
    real = benchmark.scr_tpp.scr
    killed = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    monkeypatch.setattr(benchmark.scr_tpp, "scr", killed)
    assert cli.main(["benchmark", *options, str(folder / "killed")]) == 130
    monkeypatch.setattr(benchmark.scr_tpp, "scr", real)
    passes = measured(monkeypatch)
    assert cli.main(["benchmark", *options, str(folder / "killed")]) == 0
    assert passes == [1]
    for file in (folder / "whole" / "tasks").rglob("*.json"):
        assert (
            file.read_text() == (folder / "killed" / file.relative_to(folder / "whole")).read_text()
        )


def test_absorption_of_words_that_are_embedded_by_their_letter(folder, tiny, capsys, compile_once):
    tiny()  # the vocabulary of words
    out = folder / "letters"
    assert cli.main(["benchmark", str(folder / "sae0"), "--absorption", "--words", "9",
                     "--model", "tiny", "--out", str(out)]) == 0  # fmt: skip
    assert "Feature absorption, first letter, 9 words a letter" in capsys.readouterr().out
    result = read_result(next((out / "absorption_first_letter").iterdir()))
    letters = {row["first_letter"] for row in result["eval_result_details"]}
    assert len(letters) > 20
    for row in result["eval_result_details"]:
        assert 0 <= row["mean_absorption_fraction"] <= 1
        assert 1 <= row["num_probe_true_positives"] <= 2
    mean = result["eval_result_metrics"]["mean"]
    assert mean["mean_full_absorption_score"] == pytest.approx(
        np.mean([row["full_absorption_rate"] for row in result["eval_result_details"]])
    )


def test_a_coder_that_cannot_spell_costs_others_nothing(
    folder, tiny, capsys, monkeypatch, compile_once
):
    """It writes where nothing is spelled."""
    tiny()
    real, seen = benchmark.spelling.absorption, []

    def absorption(coder, *rest):
        seen.append(coder)
        if len(seen) in silent:
            raise InputError("no letter's probe works")
        return real(coder, *rest)

    monkeypatch.setattr(benchmark.spelling, "absorption", absorption)
    command = ["benchmark", str(folder / "sae0"), str(folder / "sae1"), "--absorption", "--words",
               "9", "--model", "tiny", "--out"]  # fmt: skip
    silent = {1}
    assert cli.main([*command, str(folder / "half")]) == 0
    table = capsys.readouterr().out
    assert "0: no letter's probe works" in table and table.count("\n| ") == 4
    (document,) = (folder / "half" / "absorption_first_letter").iterdir()
    assert "sae1" in document.name
    silent = {3, 4}
    assert cli.main([*command, str(folder / "none")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: no letter's probe works"


def test_results_of_coders_that_are_not_asked_for_are_kept(folder, tiny, compile_once):
    model, _ = tiny_speller()
    coders = {n: random_coder(seed=i, layer=2) for i, n in enumerate("abc")}
    protocol, measured = PROTOCOLS["sae-probes"], []

    def run(names):
        given = {n: coders[n] for n in names}
        bench = benchmark.Bench(model, Letters(), given, epath.Path(folder / "others"))
        jobs, _ = benchmark.probing_jobs(bench, [folder / "moods.csv"], protocol, ks=(2,))
        real = jobs[0].measure
        note = lambda b, missing, report: measured.append(list(missing)) or real(b, missing, report)
        return benchmark.run_jobs(bench, [dataclasses.replace(jobs[0], measure=note)])[0]

    first = run("ab")
    run("ac")
    assert measured[1:] == [["c"]]
    assert run("ab")["b"] == first["b"] and len(measured) == 2
    assert {*run("c")} >= {"a", "b", "c"} and len(measured) == 2


def test_activations_of_words_are_kept_and_serve_other_coders(
    folder, tiny, capsys, monkeypatch, compile_once
):
    tiny()
    monkeypatch.setattr(benchmark, "CHUNK", 100)
    options = ["--absorption", "--words", "9", "--model", "tiny", "--out"]
    passes, real = measured(monkeypatch), benchmark.pooling.pool
    stopped = iter([real, real])
    monkeypatch.setattr(
        benchmark.pooling, "pool", lambda *a, **o: next(stopped, interrupt)(*a, **o)
    )
    out = str(folder / "kept")
    assert cli.main(["benchmark", str(folder / "sae0"), *options, out]) == 130
    assert len(passes) == 2
    monkeypatch.setattr(benchmark.pooling, "pool", real)
    assert cli.main(["benchmark", str(folder / "sae0"), *options, out]) == 0
    assert len(passes) == 3  # 234 words in files of 100
    whole = str(folder / "at once")
    monkeypatch.setattr(benchmark, "CHUNK", 1000)
    assert cli.main(["benchmark", str(folder / "sae0"), *options, whole]) == 0
    results = lambda path: json.loads(
        next((folder / path / "tasks" / "absorption_first_letter").glob("*.json")).read_text()
    )["results"]
    assert results("kept") == results("at once") and len(passes) == 4
    monkeypatch.setattr(benchmark, "CHUNK", 100)
    assert cli.main(["benchmark", str(folder / "sae*"), *options, out]) == 0
    assert len(passes) == 4 and len(results("kept")) == 2
    file = next((folder / "kept").rglob("*.npz"))
    file.write_bytes(file.read_bytes()[:99])
    for path in (folder / "kept" / "tasks" / "absorption_first_letter").glob("*.json"):
        path.unlink()
    assert cli.main(["benchmark", str(folder / "sae0"), *options, out]) == 2
    assert "; remove it to measure again" in capsys.readouterr().err


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_other_settings_other_weights_and_another_model_are_other_results(folder, tiny):
    model, tok = tiny_speller()
    coders = {"sae": random_coder(layer=2)}
    bench = benchmark.Bench(model, tok, coders, epath.Path(folder))
    job = lambda b, n: benchmark.concept_job(
        b, "tpp", folder / "topics.csv", limit=n, ns=(2,)
    ).path(b)
    assert job(bench, 90) != job(bench, 120)
    norm = model.params.final_norm + 1.0
    other = model.replace(params=model.params.replace(final_norm=norm))
    assert job(bench, 90) != job(benchmark.Bench(other, tok, coders, bench.folder), 90)
    changed = coders["sae"].replace(b_enc=coders["sae"].b_enc + 1.0)
    assert weights_identity(coders["sae"]) != weights_identity(changed)


def test_features_have_their_own_numbers(folder, tiny, compile_once):
    """Results are made of the active columns alone; the first half is silent here."""
    model, _ = tiny_speller()
    whole = random_coder(layer=2)
    threshold = np.where(np.arange(whole.width) < whole.width // 2, 1e9, whole.threshold)
    coder = whole.replace(threshold=jnp.asarray(threshold, jnp.float32))
    bench = benchmark.Bench(model, Letters(), {"sae": coder}, epath.Path(folder / "numbers"))
    protocol = PROTOCOLS["sae-probes"]
    jobs, _ = benchmark.probing_jobs(bench, [folder / "moods.csv"], protocol, ks=(4,))
    ((found,),) = [[r["sae"]["4"] for r in benchmark.run_jobs(bench, jobs)]]
    task = benchmark.make_task(benchmark.read_table(folder / "moods.csv"), protocol)
    ids = [np.asarray(Letters().encode(text), np.int32) for text in task.texts]
    pooled = benchmark.pooling.pool(model, [coder], ids, how=-1)
    dense = np.asarray(coder.encode(pooled.raw[coder.reads, coder.layer]))
    want = benchmark.probe_task(task, {"sae": dense}, protocol, (4,))["sae"]["4"]
    assert found["features"] == list(want["features"])
    assert min(found["features"]) >= coder.width // 2
    assert found["auc"] == pytest.approx(want["auc"])


def test_results_do_not_depend_on_what_was_measured_before(folder, tiny, compile_once):
    """A coder that begins later in a text changes which tokens count, for all coders."""
    model, _ = tiny_speller()
    coders = {"early": random_coder(layer=2), "late": random_coder(seed=1, layer=2, first=3)}

    def results(name, *calls):
        for some in calls:
            given = {c: coders[c] for c in some}
            bench = benchmark.Bench(model, Letters(), given, epath.Path(folder / name))
            path = folder / "topics.csv"
            jobs = [benchmark.concept_job(bench, "tpp", path, limit=90, ns=(2, 5))]
            found = benchmark.run_jobs(bench, jobs)
        return found

    both = ("early", "late")
    assert results("first a", ("early",), both) == results("first b", both)
    assert results("first c", ("late",), both) == results("first b", both)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure"),
        (["--absorption", "--words", "3"], "3 words a letter are too few"),
        (["--probing", "{}/moods.csv", "--limit", "0"], "limit is 0"),
        (["--probing", "{}/none*.csv"], "there is none"),
        (["--probing", "{}/moods.csv", "--without", "mo*"], "leaves no table"),
        (["--probing", "{}/years.csv"], "no table to probe; the first: .*120 different labels"),
        (["--probing", "{}/moods.csv", "--ks", "0"], "k is 0"),
        (["--tpp", "{}/moods.csv"], "at least 3 classes, not 2"),
        (["--scr", "{}/moods.csv"], "two attributes"),
        (["--scr", "{}/sae0/config.json"], "is not one"),
        (["--tpp", "{}/topics.csv", "--limit", "6"], "too small"),
        (["--tpp", "{}/topics.csv", "--limit", "2"], "limit of 2 .* too small for 3 classes"),
        (["--scr", "{}/people.csv", "--limit", "3"], "limit of 3 .* too small for 4 classes"),
        (["--scr", "{}/people.csv", "--limit", "20"], "has 5 texts among 20; SCR needs 10"),
        (
            ["--probing", "{}/moods.csv", "--protocol", "saebench", "--limit", "1"],
            "limit of 1 .* too small for 2 classes",
        ),
        (["--absorption", "--out", "ftp://x"], "ftp:// is not supported"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, tiny, capsys, arguments, message):
    arguments = [a.format(folder) for a in arguments]
    out = [] if "--out" in arguments else ["--out", str(folder / "bad")]
    assert cli.main(["benchmark", str(folder / "sae0"), "--model", "tiny", *arguments, *out]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    import re

    assert re.search(message, error), error


def test_a_broken_result_file_is_named(folder, tiny, capsys, compile_once):
    options = ["benchmark", str(folder / "sae0"), "--tpp", str(folder / "topics.csv"),
               "--model", "tiny", "--out", str(folder / "broken")]  # fmt: skip
    assert cli.main(options) == 0
    (file,) = (folder / "broken" / "tasks" / "tpp").iterdir()
    whole = json.loads(file.read_text())
    assert whole["task"] == "topics"
    name = next(iter(whole["results"]))
    assert "/" not in name.removeprefix("folder-")[9:]  # nothing of where the coder lies
    for content in (
        "{", "[" * 100_000, "[]", '{"results": []}', json.dumps(whole).replace("0.", "1e400", 1),
        json.dumps({"results": {name: {"key": 3, "result": {}}}}),
        json.dumps({"results": {name: {**whole["results"][name], "result": {"by_n": {}}}}}),
    ):  # fmt: skip
        file.write_text(content)
        assert cli.main(options) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "not a task's results; remove it" in error and len(error) < 500
