"""`gemma-scope audit`."""

import dataclasses
import os
import shlex
from typing import Annotated, Literal

from tyro.conf import Positional, arg

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared
from gemma_scope_jax.errors import InputError

ANSWERS = "judge_answers.jsonl"
_SUITE = "A built-in suite (--list shows them), or a suite file (.yaml, .json)."
Suite = Annotated[shared.Place, Positional, arg(metavar="SUITE", help=_SUITE)]


@dataclasses.dataclass(frozen=True)
class AuditOptions(shared.Options, gs.AuditSettings):
    """How the audit is made."""


def command(
    suite: Suite = "",
    *,
    coder: shared.NameOrPlace = shared.PACKAGED_CODER,
    model: shared.Model = "",
    out: shared.Folder = "",
    list: bool = False,
    settings: AuditOptions = AuditOptions(),
    template: Literal["", "plain", "chat"] = "",
    sets: shared.Place = "",
    judge: Literal["", "refusal", "lexicon", "ask", "probe", "endpoint"] = "",
    endpoint: shared.Url = "",
    judge_model: shared.NameOrPlace = "",
    key_variable: shared.Name = shared.KEY_VARIABLE,
    explanations: shared.Place = "",
    cards: shared.Place = "",
    json: shared.Json = False,
    dtype: shared.Dtype = "auto",
    mesh: tuple[int, int] | None = None,
) -> None:
    """Audit a model's behaviour: measure it, find its features, and see what they do to it.

    A suite asks questions and scores them as published, with intervals. Features of the coder that
    go with the behaviour are found on half of the items, tested on the other half beside a probe on
    raw activations, and ablated beside matched random features. Writes report.html, for a person
    who must sign it, and audit.json; the same command continues an interrupted audit.

    Args:
        coder: The coder whose features are looked at.
        out: The folder of the audit.
        list: Show the built-in suites.
        template: How prompts are put, "chat" for an instruction-tuned model. The default is what
            the suite says.
        sets: Where the Python packages with published sets are: a folder of wheels, or unpacked.
            The default is the variable GEMMA_SCOPE_SETS, then what is installed.
        judge: What judges written answers. The default is what the suite says.
        endpoint: The base URL of the OpenAI-compatible API of --judge endpoint.
        judge_model: The name of the endpoint's model.
        key_variable: The environment variable that holds the API key.
        explanations: A folder with explanations of the coder's features. The default is beside it.
        cards: A folder of feature cards, for texts on which features are active.
        json: Print the audit as JSON.
        mesh: Spread model and items over so many (data, model) devices.
    """
    if list:
        _show_suites(json)
        return
    if not suite:
        raise InputError("name a suite: --list shows the built-in ones")
    if not out:
        raise InputError("an audit needs a folder: --out FOLDER")
    gs.check_writable(out)
    asked = gs.load_suite(suite)
    if template:
        asked = dataclasses.replace(asked, template=template)
    kind = judge or asked.judge
    wanted = kind == "endpoint", "--judge endpoint"
    api = shared.chat_endpoint(endpoint, judge_model, key_variable, *wanted)
    if judge and asked.kind != "generate":
        raise InputError(f"{suite}: its choices are scored, so --judge does not apply")
    opened = shared.open_coders(coder, model, one_layer=True)
    one = opened.coders[0]
    known = gs.read_known(opened.coders, explanations=explanations, cards=cards)
    gs.check_audit(asked, opened.shape, one, settings, sets=sets)
    weights = shared.load_model(opened.model, dtype, mesh)
    path = os.path.join(os.path.expanduser(out), ANSWERS)
    options = {"coder": one, "endpoint": api, "answers": path, "sets": sets}
    done = gs.audit(
        asked,
        weights,
        opened.tokenizer,
        one,
        out,
        settings,
        judge=gs.answer_judge(kind, weights, opened.tokenizer, **options) if kind else None,
        sets=sets,
        known=known,
        command=_typed(suite, coder, opened.model, settings, template, kind, api, dtype),
    )
    shared.print_result(done, done.as_dict(), json)
    if not json:
        print(f"\nreport    {os.path.join(out, 'report.html')}")


def _show_suites(as_json: bool) -> None:
    suites = [gs.load_suite(name) for name in gs.suite_names()]
    if as_json:
        names = ("name", "question", "kind", "licence", "source")
        shared.print_json([{name: getattr(s, name) for name in names} for s in suites])
        return
    for suite in suites:
        print(f"{suite.name:<22} {suite.question}\n{'':<22} {suite.source}; {suite.licence}")


def _typed(
    suite: str,
    coder: str,
    model: str,
    settings: AuditOptions,
    template: str,
    judge: str,
    api,
    dtype: str,
) -> str:
    """The command that repeats the audit, without the places of this machine and without the key
    of the endpoint `api`."""
    short = lambda place: os.path.basename(place.rstrip("/")) if os.path.isabs(place) else place
    words = ["gemma-scope", "audit", short(suite), "--coder", short(coder), "--model", short(model)]
    for field in dataclasses.fields(gs.AuditSettings):
        value = getattr(settings, field.name)
        if value is not None and value != ():
            option = f"--{field.name.replace('_', '-')}"
            words += [option, *map(str, value if isinstance(value, tuple) else [value])]
    words += ["--template", template] * bool(template)
    words += ["--judge", judge] * bool(judge)
    if api is not None:
        words += ["--endpoint", api.url, "--judge-model", api.model]
    words += ["--dtype", dtype, "--out", "FOLDER"]
    return shlex.join(words)
