"""The benchmarks still run: our side of each, on small shapes, answers what the script asks of it.

Whether both sides agree, and how fast they are, is for `make bench`, which has the peers.
"""

import gzip
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma_scope_jax.circuits.validate import total_ablation
from graphs import random_graph

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def answers(script, folder, questions, *options):
    """What our side of a benchmark answers to lines on its standard input."""
    command = [sys.executable, BENCHMARKS / script, "--role", "ours", "--folder", folder, *options]
    done = subprocess.run(
        [str(part) for part in command],
        input="\n".join(questions) + "\n",
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = done.stdout.splitlines()
    return [json.loads(line) for line in found[found.index("ready") + 1 :]]


def test_train_step(tmp_path):
    asked = [f"compare {tmp_path}/gradients.npz", "update sparse 0", "update dense 0"]
    first, *updates = answers("train_step.py", tmp_path, asked, "--width", 512, "--batch", 64)
    assert first["mse"] > 0 and first["l0"] > 0
    assert (tmp_path / "gradients.npz").exists() and (tmp_path / "weights.npz").exists()
    assert all(update["seconds"] > 0 and update["l0"] > 0 for update in updates)


@pytest.mark.real
@pytest.mark.slow
def test_extract(tmp_path):
    small = ("--tokens", 300, "--batch-size", 1, "--context-size", 64, "--coders", "sae")
    bytes_a_token, rate, alone = answers(
        "extract.py", tmp_path, ["prepare", "run", "device"], *small
    )
    assert bytes_a_token > 1 and rate > 0 and alone > 0


@pytest.mark.real
@pytest.mark.slow
def test_attribution(tmp_path):
    few = ("--features", 180)
    ((ids, _),) = answers("attribution.py", tmp_path, ["write"], "--role", "prepare", *few)
    asked = [f"attribute {','.join(map(str, ids))} {tmp_path}/ours.npz", "peak"]
    seconds, peak = answers("attribution.py", tmp_path, asked)
    assert seconds > 0 and peak > 0.5
    with np.load(tmp_path / "ours.npz") as graph:
        sources, targets = 180 + 18 * len(ids) + len(ids), 180 + 10
        assert 180 < len(graph["targets"]) <= targets
        assert graph["effects"].shape == (len(graph["targets"]), sources)


# ---- circuits.py -----------------------------------------------------------------------------


@pytest.fixture
def circuits(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("circuits_script", BENCHMARKS / "circuits.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def line_of(number, difference, changes):
    """A line of results whose changes are the same in every order and mode."""
    orders = dict.fromkeys(("total", "direct", "largest", "place0", "random0"), changes)
    figures = [[0.5 + number / 10, 0.2, 1.0, 0.9], [0.0, -1.0, 0.5, 0.1], [0.3, -2.0]]
    return {
        "kind": "ab"[number % 2],
        "key": " b",
        "behaviour": {"difference": difference, "before": number},
        "scores": {"features": 9, "nodes": 5, "whole": [0.5, 0.8], "pruned": [0.4, None]},
        "path": {"token": " b", "raises": True, "share": 0.02},
        "validation": dict.fromkeys(("direct", "attention", "nothing"), figures),
        "ablation": {
            "counts": [1, 2, 20],
            "predicted": [2 * c for c in changes],
            "nothing": orders,
            "attention": {name: orders[name] for name in ("total", "place0")},
        },
        "seconds": {"attribute": 1.0},
    }


def test_every_kind_of_prompt_has_twenty(circuits):
    given = circuits.prompts()
    kinds = [prompt["kind"] for prompt in given]
    assert len(kinds) == 140 and {kinds.count(kind) for kind in kinds} == {20}
    assert kinds[:7] == kinds[7:14] and len({prompt["text"] for prompt in given}) == 140
    assert all(prompt["answer"] != prompt["foil"] and prompt["key"] for prompt in given)
    few = circuits.prompts(2, ["capital"])
    assert [prompt["kind"] for prompt in few] == ["capital"] * 2


def test_total_and_joint_effects_are_those_of_the_linear_model(circuits):
    graph = random_graph(3, features=30)
    n = graph.selected
    each, total = circuits.total_effects(graph)
    alone = total_ablation(graph, np.arange(n))[:, -3]
    assert np.allclose(-total, alone, rtol=1e-4, atol=1e-4 * np.abs(alone).max())
    assert np.allclose(circuits.joint(graph, each, np.array([7])), -total[7])
    some = np.array([2, 7, 20])
    change = np.zeros(n)
    for f in range(n):  # in the order of layers
        change[f] = -graph.sources.activation[f] if f in some else each[f] @ change
    assert np.allclose(circuits.joint(graph, each, some), each[-3] @ change)


def test_features_of_the_same_place(circuits):
    graph = random_graph(3, features=30, layers=2, tokens=3)
    some = np.random.default_rng(0).permutation(30)
    drawn = circuits.same_place(graph, some, np.random.default_rng(1))
    assert sorted(drawn) == list(range(30)) and (drawn != some).any()
    assert (graph.sources.layer[drawn] == graph.sources.layer[some]).all()
    assert (graph.sources.position[drawn] == graph.sources.position[some]).all()


def test_a_summary_counts_what_turns_the_preference(circuits):
    lines = [line_of(0, 4.0, [-1.0, -5.0, -6.0]), line_of(1, 4.0, [-1.0, -2.0, -2.0])]
    lines.append(line_of(2, -1.0, [1.0, 1.0, 1.0]))  # the model prefers the foil to begin with
    tables, figures = circuits.summary(lines)
    assert figures["prompts"] == 3 and figures["right"] == 2
    assert figures["turned_total"] == figures["turned_random"] == 0.5
    module = sys.modules["circuits_summary"]
    assert [module.flips(line, "nothing", "total") for line in lines[:2]] == [[2.0], [math.inf]]
    rows = [
        line for line in tables["20 features together"].splitlines() if line.startswith("| all |")
    ]
    lost, predicted = (6 / 4 + 2 / 4) / 2, 6 / 4 + 2 / 4
    assert rows[0].split("|")[2].startswith(f" {predicted:.2f} ")
    assert rows[0].split("|")[3].startswith(f" {lost:.2f} ")


def test_a_summary_of_reversed_features(circuits):
    lines = [line_of(number, 4.0, [-1.0, -2.0, -2.0]) for number in range(6)]
    given = {"counts": [1, 2, 20], "predicted": [-5.0, -6.0, -7.0], "place": [0.0, 1.0, -1.0]}
    for number, line in enumerate(lines[:5]):
        line["reversal"] = {**given, "total": [-1.0, -5.0 if number else -3.0, -3.0]}
    tables, _ = circuits.summary(lines)
    cells = [cell.strip() for cell in tables["Features reversed"].splitlines()[-1].split("|")[1:-1]]
    assert cells[:3] == ["all", "5", "1.00 [1.00, 1.00]"] and cells[3].startswith("0.80 [")
    assert cells[4:6] == ["0.00 [0.00, 0.00]", "1.00 [1.00, 1.00]"]
    assert cells[6].startswith("2.00 [2.00, ")


def test_a_summary_of_lines_of_which_only_one_has_neurons(circuits):
    lines = [line_of(0, 4.0, [-1.0, -5.0, -6.0]), line_of(1, 4.0, [-1.0, -2.0, -2.0])]
    lines[0] |= {"neurons": lines[1]["validation"], "supernodes": {"25": [0.5, 0.8, 9]}}
    tables, figures = circuits.summary(lines)
    assert (figures["spearman"], figures["spearman_neurons"]) == (0.55, 0.6)
    cells = [cell.strip() for cell in tables["Supernodes"].splitlines()[-1].split("|")[1:-1]]
    assert cells[:3] == ["all", "1", "9"] and cells[3] == "0.50"
    assert tables["One neuron at a time"].splitlines()[-1].startswith("| all | 1 | 0.60 |")


def test_results_are_written_whole_and_only_what_lacks_is_measured(circuits, tmp_path, monkeypatch):
    file, asked = tmp_path / "x.jsonl.gz", []
    assert circuits.lines_of(file) == []
    wanted, settings = circuits.prompts(1, ["capital", "bracket"]), dict(circuits.DEFAULTS)
    settings["nodes"] = "transcoders"
    old = {**wanted[1], **settings, "behaviour": 1}
    circuits.write_lines(file, [old])
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(f"gemma_scope_jax.{name}", lambda *a, **k: None)
    monkeypatch.setattr(circuits, "NODES", {"transcoders": lambda: None})

    def measure(model, tokenizer, nodes, prompt, number, line):
        asked.append((number, "behaviour" in line))
        return {**line, **dict.fromkeys(circuits.MEASURES, number)}

    monkeypatch.setattr(circuits, "measured_line", measure)
    circuits.run(file, wanted, settings)
    circuits.run(file, wanted, settings)
    assert asked == [(0, False), (1, True)]
    found = circuits.results(file, wanted, settings)
    assert [line["neurons"] for line in found] == [1, 0] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.real
@pytest.mark.slow
def test_circuits(tmp_path):
    file = tmp_path / "circuits.jsonl.gz"
    few = ("--kinds", "agreement", "--per-kind", 1, "--most", 64, "--top", 2, "--results", file)
    command = [str(a) for a in (sys.executable, BENCHMARKS / "circuits.py", *few)]
    outputs = []
    for _ in range(2):  # the second finds the prompt done
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    (found,) = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    assert found["ablation"]["counts"] == [1, 2, 3]
    for nodes in ("validation", "neurons"):
        assert found[nodes]["direct"][0][0] == 1.0  # direct effects are exact
    assert 0 < found["supernodes"]["25"][0] < found["scores"]["whole"][0] + 0.1
    figures = json.loads(outputs[0].splitlines()[-1])
    assert figures["name"] == "circuits-transcoders" and figures["right"] == 1
