"""An audit end to end on the tiny model: figures, folder, and how it ends when it was killed."""

import json

import jax
import numpy as np
import pytest

import gemma_scope_jax as gs
from audits import HOSTILE, Readable, answers_suite, coder_of, pairs_suite, run_audit
from gemma_scope_jax.behaviour.audits import asking
from gemma_scope_jax.behaviour.audits import audit as audit_module
from gemma_scope_jax.behaviour.audits.item_arms import halves
from gemma_scope_jax.behaviour.audits.judges import AnswerJudge
from gemma_scope_jax.behaviour.suites.items import Item
from gemma_scope_jax.errors import InputError
from tiny import tiny_model


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return pairs_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def done(model, suite, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit") / "out"
    return run_audit(model, suite, folder), folder


def result(folder):
    return (folder / "audit.json").read_bytes()


def test_figures_are_those_of_each_text_alone(done, model, suite):
    """The sums of log-probabilities, by a plain pass for each text."""
    letters = Readable()

    def logp(text):
        ids = letters.encode(text)
        logits = gs.run(model, ids[None]).logits[0]
        own = np.asarray(jax.nn.log_softmax(logits, -1))
        return sum(own[t, ids[t + 1]] for t in range(len(ids) - 1))

    items = gs.suite_items(gs.load_suite(suite)).items
    gaps = [logp(item.choices[0]) - logp(item.choices[1]) for item in items]
    share, mean = done[0].figures
    assert share["value"] == pytest.approx(100 * np.mean(np.array(gaps) > 0))
    assert mean["value"] == pytest.approx(np.mean(gaps), abs=1e-4)
    assert list(done[0].groups) == ["even", "odd"]


def test_the_json_is_compact_and_complete(done):
    audit, folder = done
    content = json.loads(result(folder))
    assert content == json.loads(json.dumps(audit.as_dict()))
    assert content["format"] == "gemma-scope-jax audit result"
    assert content["repeat"]["coder"]["weights"] and content["data"]["sources"][0]["digest"]
    assert "tables" not in content["contrast"] and content["contrast"]["family_p"] > 0
    assert len(content["mediation"]["controls"]) == 3
    assert [one["feature"] for one in content["evidence"]] == content["contrast"]["chosen"]
    assert any("Letters mean nothing" in line for line in content["not_shown"])
    assert len(result(folder)) < 30_000


def test_halves_keep_what_belongs_together():
    items = [Item(("x",), unit=f"u{n // 3}") for n in range(30)]
    first = halves(items, 0)
    assert 0 < first.sum() < 30
    assert all(len(set(first[n : n + 3].tolist())) == 1 for n in range(0, 30, 3))
    assert halves(items, 1).tolist() != first.tolist()


def test_a_finished_audit_is_read_not_made(done, model, suite, monkeypatch):
    audit, folder = done
    before = result(folder)
    for name in ("contrast", "mediate", "evidence"):
        monkeypatch.setattr(audit_module, name, None)
    monkeypatch.setattr(asking, "continuation_logprobs", None)
    assert run_audit(model, suite, folder).as_dict() == audit.as_dict()
    assert result(folder) == before


@pytest.mark.parametrize("stage", ["second chunk", "contrast", "mediate", "evidence"])
def test_a_killed_audit_resumes_to_the_same_result(
    done, model, suite, tmp_path, monkeypatch, stage
):
    monkeypatch.setattr(asking, "SCORED", 16)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_audit(model, suite, whole)
    place, name = (asking, "continuation_logprobs") if stage == "second chunk" else (
        audit_module, stage,
    )  # fmt: skip
    real, calls = getattr(place, name), []

    def dies(*args, **options):
        calls.append(1)
        if len(calls) == (2 if stage == "second chunk" else 1):
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(place, name, dies)
        with pytest.raises(KeyboardInterrupt):
            run_audit(model, suite, killed)
    assert not (killed / "audit.json").exists()
    run_audit(model, suite, killed)
    assert result(killed) == result(whole)
    assert (killed / "report.html").read_text() == (whole / "report.html").read_text()


@pytest.mark.parametrize("what", ["model", "coder", "suite", "settings"])
def test_another_audit_in_the_folder_is_refused(done, model, suite, tmp_path, what):
    folder, before = done[1], result(done[1])
    given = {"model": model, "suite": suite, "coder": coder_of(), "settings": {}}
    other = {
        "model": tiny_model(gs.PRESETS["gemma-3-270m"], seed=9, layers=4),
        "suite": pairs_suite(tmp_path, seed=3),
        "coder": coder_of(5),
        "settings": {"seed": 4},
    }
    given |= {what: other[what]}
    said = f"holds an audit with {'other' if what == 'settings' else 'another'} {what}"
    with pytest.raises(InputError, match=said):
        run_audit(given["model"], given["suite"], folder, coder=given["coder"], **given["settings"])
    assert result(folder) == before


def test_it_is_said_which_settings_differ(done, model, suite):
    with pytest.raises(InputError, match=r'other settings \(\{"seed": 0\}, not \{"seed": 4\}\)'):
        run_audit(model, suite, done[1], coder=coder_of(), seed=4)


def test_a_folder_of_something_else_is_left_alone(model, suite, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="is in the way"):
        run_audit(model, suite, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["precious.txt"]


def test_the_report_acts_on_nothing(done):
    """Hostile texts of suites are text: no script, no request, no element of theirs."""
    page = (done[1] / "report.html").read_text()
    assert HOSTILE not in page and "<img" not in page and "<script" not in page
    assert "default-src 'none'" in page and "http" not in page.split("<body>")[0].replace(
        "http-equiv", ""
    )
    assert "\u202e" not in page and "&lt;/script&gt;" in page
    for heading in ("Figures", "Method", "Data and licences", "Mediation and controls",
                    "What was not shown", "To repeat it"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<svg") > 5


@pytest.mark.slow
def test_a_mesh_gives_the_same_figures(done, model, suite, tmp_path):
    mesh = gs.make_mesh(4, 2)
    params = jax.device_put(model.params, gs.param_shardings(model.config, mesh))
    found = run_audit(model.replace(params=params), suite, tmp_path / "mesh")
    for one, two in zip(found.figures, done[0].figures):
        assert one["value"] == pytest.approx(two["value"], abs=1e-3)
    change = lambda a: a.mediation["behaviour"]["change"]["value"]
    assert change(found) == pytest.approx(change(done[0]), abs=1e-3)


def judge(threshold=0, what="refused"):
    grade = lambda prompts, answers: np.array([float(len(a) > threshold) for a in answers])
    return AnswerJudge("length", what, "its length", grade, checked=False)


def test_written_answers_are_judged_and_mediated(model, tmp_path):
    found = run_audit(model, answers_suite(tmp_path), tmp_path / "out", judge=judge())
    assert [f["name"] for f in found.figures] == ["refused: even", "refused: odd"]
    assert "length" in found.judge["name"] and found.judge["agreement"] is None
    assert any("not checked against labelled answers" in line for line in found.not_shown)
    assert "opens as a refusal" in found.mediation["about"]


def test_what_only_a_written_answer_shows_is_not_mediated_by_refusals(model, tmp_path):
    written = judge(what="long")
    found = run_audit(model, answers_suite(tmp_path), tmp_path / "out", judge=written)
    assert "how nearly an answer is long is not measured" in found.mediation["why"]


def test_too_few_texts_for_arms_is_said_not_hidden(model, tmp_path):
    suite = answers_suite(tmp_path, arms={"by": "outcome"})
    found = run_audit(model, suite, tmp_path / "out", judge=judge(100))
    assert "features were not contrasted: 0 and" in found.contrast["why"]
    assert any("0 and" in line for line in found.not_shown)
    assert "no features were found" in found.mediation["why"] and found.evidence == []
    assert "features were not contrasted" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"arms": {"a": "first", "b": "b"}}, "arms: items have no text 'first'"),
        ({"arms": {"by": "group", "a": "odd", "b": "none"}}, "no item of the group 'none'"),
    ],
)
def test_arms_that_items_lack_are_refused(model, tmp_path, changed, says):
    with pytest.raises(InputError, match=says):
        run_audit(model, pairs_suite(tmp_path, **changed), tmp_path / "out")


def test_a_judge_and_a_suite_must_fit(model, suite, tmp_path):
    with pytest.raises(InputError, match="takes no judge"):
        run_audit(model, suite, tmp_path / "out", judge=judge())
    with pytest.raises(InputError, match="needs a judge="):
        run_audit(model, answers_suite(tmp_path), tmp_path / "out")
