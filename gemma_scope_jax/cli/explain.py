"""`gemma-scope explain`."""

import dataclasses
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared
from gemma_scope_jax.errors import InputError

KEY_VARIABLE = "OPENAI_API_KEY"


@dataclasses.dataclass(frozen=True)
class SamplingOptions(shared.Options, gs.Sampling):
    """What is drawn for a feature."""

    hard: Annotated[int, tyro.conf.arg(name="hard-negatives")] = 0


@dataclasses.dataclass(frozen=True)
class EndpointOptions(gs.Endpoint):
    """A chat endpoint."""

    url: Annotated[str, tyro.conf.arg(name="endpoint", metavar="URL")] = ""
    model: Annotated[shared.NameOrPlace, tyro.conf.arg(name="judge-model")] = ""
    """The model that the endpoint is asked for; or the Gemma of --judge model, else --model."""
    key: tyro.conf.Suppress[str] = ""
    options: tyro.conf.Suppress[Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    key_variable: shared.Name = KEY_VARIABLE
    """The environment variable that holds the API key."""
    request_options: Annotated[str, tyro.conf.arg(metavar="JSON")] = "{}"
    """Put these keys into every request, as JSON; null takes one out, such as '{"temperature":
    null, "max_tokens": null, "max_completion_tokens": 4000}'."""

    def __post_init__(self) -> None:
        """Nothing is checked here: there may be no endpoint at all."""

    def checked(self) -> gs.Endpoint:
        more = gs.parse_json(self.request_options, "--request-options")
        if not isinstance(more, dict):
            raise InputError("--request-options: not a JSON object")
        variable = self.key_variable
        key = os.environ.get(variable, "").strip()
        if not key and variable != KEY_VARIABLE:
            raise InputError(
                f"--key-variable {variable}: there is no such variable, or nothing in it"
            )
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(gs.Endpoint)}
        return gs.Endpoint(**fields | {"key": key, "options": more})


def command(
    coder: shared.Coder,
    *,
    store: shared.Folder,
    features: shared.Name = "",
    sample: int | None = None,
    judge: Literal["endpoint", "model", "statistics"] | None = None,
    asked: EndpointOptions = EndpointOptions(),
    scores: tuple[str, ...] = ("detection", "fuzzing"),
    out: shared.Folder = "",
    plan: bool = False,
    yes: bool = False,
    model: shared.NameOrPlace = "",
    name: shared.Name = "",
    layer: int | None = None,
    sampling: SamplingOptions = SamplingOptions(),
    answers: shared.BucketFile = "",
    dtype: shared.Dtype = "auto",
) -> None:
    """Explain features from where they fire, and score the explanations.

    By a chat endpoint (--endpoint URL --judge-model NAME), by a Gemma on this machine (--judge
    model) or by token statistics alone (the default). Writes explanations.json, which inspect and
    the cards show; the same command goes on where one was killed, and asks nothing twice.

    Args:
        store: Its feature store, from `gemma-scope extract`.
        features: Explain these features: 1,5,10-20. The default with statistics is all that fire.
        sample: Explain this many features at random, of those that fire often enough.
        judge: What explains and scores. The default is the endpoint if there is one, else
            statistics.
        asked: The endpoint that is asked.
        scores: Compute these scores: detection, fuzzing, intruder, simulation, saebench.
        out: The folder for explanations.json (for coders of several layers, its layer_N). The
            default is beside the coder.
        plan: Print what would be asked and what it would cost, and stop.
        yes: Send the requests without asking.
        model: The model whose features these are, and whose tokenizer wrote the store. The default
            is the coder's model.
        name: The name of the coder in the store, if it is there under several.
        layer: The layer to explain, of a coder of several layers.
        sampling: The examples.
        answers: Keep every answer in this file. The default is beside explanations.json.
        dtype: The dtype of the model of --judge model.
    """
    kind = judge or ("endpoint" if asked.url else "statistics")
    if kind == "endpoint" and not (asked.url and asked.model):
        raise InputError("an endpoint needs --endpoint URL and --judge-model NAME")
    if kind != "endpoint" and (asked.url or plan):
        raise InputError(f"--{'endpoint' if asked.url else 'plan'} does not go with --judge {kind}")
    endpoint = asked.checked() if kind == "endpoint" else None
    gs.check_scores(scores)
    if out:
        gs.check_writable(out)
    gs.use_compilation_cache()
    with shared.stage(f"opening {store}"):
        opened, loaded = gs.FeatureStore(store), gs.load_coder(coder)
        # the coder says which model it is for; a store's name of it tells no -pt from -it
        own = loaded.info.model_name.removeprefix("google/") or opened.manifest["model"]["name"]
        tokenizer = gs.load_tokenizer(model or own)
        job = gs.open_explanation_job(
            opened,
            loaded,
            tokenizer,
            features=features,
            sample=sample,
            thorough=kind != "statistics",
            scores=scores,
            sampling=sampling,
            name=name,
            layer=layer,
            folder=out,
            labels=gs.read_labels(loaded.info.folder, loaded.width),
        )
    path = job.answer_file(answers)
    if endpoint is not None and not _agreed(job, endpoint, plan, yes):
        return
    judged: Any = endpoint
    if kind == "model":
        judged = shared.load_model(asked.model or model or own, dtype)
    made = gs.open_judge(judged, path, tokenizer=tokenizer, name=asked.model or model or own)
    report = job.run(made)
    _print_report(report, job, made)
    if status := gs.judge_status(made):
        print(status)
    if report.unexplained and not report.done:
        raise InputError(f"nothing that was asked has an answer: {report.losses}")


def _agreed(job: Any, endpoint: gs.Endpoint, plan_only: bool, yes: bool) -> bool:
    """Show what is going to be asked; whether to send it. Nothing is sent for nothing to do."""
    if not job.todo("endpoint", endpoint.name) and not plan_only:
        return True
    p = job.estimate(endpoint)
    priced = endpoint.price_in or endpoint.price_out
    cost = f"${p.cost:.2f} to ${p.cost_most:.2f}" if priced else "no prices are given"
    lines = (
        f"{p.features:,} features, at most {p.requests:,} requests to {endpoint.url} "
        f"({endpoint.model}); what is on file is not asked again",
        f"tokens in {p.tokens_in:,}, out {p.tokens_out:,} to {p.tokens_out_most:,}: {cost}",
    )
    print("\n".join(lines), file=sys.stdout if plan_only else sys.stderr, flush=True)
    if plan_only or yes:
        return yes and not plan_only
    if not sys.stdin.isatty():
        raise InputError("nothing sent: --yes to send this, --plan to see it only")
    print("send? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _print_report(report: Any, job: Any, judge: Any) -> None:
    """How many are explained, and the scores of those that this judge explained."""
    entries, ours = job.explained(judge)
    print(f"{job.folder}/explanations.json: {len(entries):,} features explained")
    for what, count in {
        "finished before": report.kept,
        "explained now": report.done,
        "fire in too few windows to be scored": report.few,
        "of which nothing that was asked has an answer": report.unexplained,
    }.items():
        if count:
            print(f"  {count:,} {what}")
    for name in job.scores:
        _print_score(name, [e["scores"].get(name, {}) for e in ours])
    if report.lost:
        count = sum(count for count, _ in report.lost.values())
        print(f"  {count:,} questions have no answer and are in no score: {report.losses}")


def _print_score(name: str, scores: Sequence[Mapping[str, Any]]) -> None:
    figure = gs.SCORE_FIGURES[name]
    some = [s[figure] for s in scores if gs.is_number(s.get(figure))]
    if some:
        mean, spread = statistics.fmean(some), statistics.pstdev(some)
        said = figure.replace("_", " ")
        print(f"  {name}: {said} {mean:.3f} ± {spread:.3f} over {len(some):,} features")
