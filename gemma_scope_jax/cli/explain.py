"""`gemma-scope explain`."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared
from gemma_scope_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class SamplingOptions(shared.Options, gs.Sampling):
    """The examples that are drawn for a feature."""

    hard: Annotated[int, tyro.conf.arg(name="hard-negatives")] = 0


@dataclasses.dataclass(frozen=True)
class EndpointOptions(gs.Endpoint):
    """The chat endpoint that explains and scores."""

    url: Annotated[str, tyro.conf.arg(name="endpoint", metavar="URL")] = ""
    model: Annotated[shared.NameOrPlace, tyro.conf.arg(name="judge-model")] = ""
    """The name of the endpoint's model; or the Gemma of --judge model, by default --model."""
    key: tyro.conf.Suppress[str] = ""
    options: tyro.conf.Suppress[Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    key_variable: shared.Name = shared.KEY_VARIABLE
    """The environment variable that holds the API key."""
    request_options: Annotated[str, tyro.conf.arg(metavar="JSON")] = "{}"
    """Put these keys into every request, as JSON; null removes a key, such as '{"temperature":
    null, "max_tokens": null, "max_completion_tokens": 4000}'."""

    def __post_init__(self) -> None:
        """Checks nothing: there may be no endpoint at all."""

    def checked(self) -> gs.Endpoint:
        more = gs.parse_json(self.request_options, "--request-options")
        if not isinstance(more, dict):
            raise InputError("--request-options: not a JSON object")
        key = shared.api_key(self.key_variable)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(gs.Endpoint)}
        return gs.Endpoint(**fields | {"key": key, "options": more})


def command(
    coder: shared.Coder,
    *,
    store: shared.Folder,
    features: shared.Name = "",
    sample: int | None = None,
    judge: Literal["endpoint", "model", "statistics"] | None = None,
    asked: EndpointOptions,
    scores: tuple[str, ...] = ("detection", "fuzzing"),
    out: shared.Folder = "",
    plan: bool = False,
    yes: bool = False,
    model: shared.NameOrPlace = "",
    name: shared.Name = "",
    layer: int | None = None,
    sampling: SamplingOptions,
    answers: shared.BucketFile = "",
    dtype: shared.Dtype = "auto",
) -> None:
    """Explain features from where they fire, and score the explanations.

    A chat endpoint does it (--endpoint URL --judge-model NAME), a Gemma on this machine (--judge
    model), or token statistics alone (the default). Writes explanations.json, which inspect and the
    cards show; the same command continues an interrupted one, and asks nothing twice.

    Args:
        store: The coder's feature store, as filled by `gemma-scope extract`.
        features: Explain these features: 1,5,10-20. The default with statistics is all that fire.
        sample: Explain this many features at random, of those that fire often enough.
        judge: What explains and scores. The default is the endpoint if one is given, else
            statistics.
        scores: Compute these scores: detection, fuzzing, intruder, simulation, saebench.
        out: The folder for explanations.json (its layer_N for coders of several layers). The
            default is beside the coder.
        plan: Only print what would be asked, and what it would cost.
        yes: Send the requests without asking.
        model: The model whose features these are, and whose tokenizer wrote the store. The default
            is the coder's model.
        name: The name of the coder in the store, if the store holds it under several names.
        layer: The layer to explain, for a coder of several layers.
        answers: Keep every answer in this file. The default is beside explanations.json.
        dtype: The dtype of the model of --judge model.
    """
    kind = judge or ("endpoint" if asked.url else "statistics")
    if kind == "endpoint" and not (asked.url and asked.model):
        raise InputError("an endpoint needs --endpoint URL and --judge-model NAME")
    if kind != "endpoint" and (asked.url or plan):
        raise InputError(f"--{'endpoint' if asked.url else 'plan'} does not go with --judge {kind}")
    endpoint = asked.checked() if kind == "endpoint" else None
    thorough = kind != "statistics"
    if out:
        gs.check_writable(out)
    gs.check_explanation(scores, features, sample, thorough)
    gs.use_compilation_cache()
    with shared.stage(f"opening {store}"):
        opened, loaded = gs.FeatureStore(store), gs.load_coder(coder)
        # the coder names its model; the name in the store does not tell -pt from -it
        own = loaded.info.model_name.removeprefix("google/") or opened.manifest["model"]["name"]
        tokenizer = gs.load_tokenizer(model or own)
        job = gs.open_explanation_job(
            opened,
            loaded,
            tokenizer,
            features=features,
            sample=sample,
            thorough=thorough,
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
    own = asked.model or model or own
    judged = shared.load_model(own, dtype) if kind == "model" else endpoint
    asked_judge = gs.open_judge(judged, path, tokenizer=tokenizer, name=own)
    report = job.run(asked_judge)
    print(job.summary(report, asked_judge))
    if report.unexplained and not report.done:
        raise InputError(f"nothing that was asked has an answer: {report.losses}")


def _agreed(job: "gs.ExplanationJob", endpoint: gs.Endpoint, plan_only: bool, yes: bool) -> bool:
    """Show what is going to be asked, if anything; whether to go on and send it."""
    if not job.todo("endpoint", endpoint.name) and not plan_only:
        return True
    print(
        f"{endpoint.url} ({endpoint.model}): {job.estimate(endpoint)}",
        file=sys.stdout if plan_only else sys.stderr,
        flush=True,
    )
    if plan_only or yes:
        return not plan_only
    if not sys.stdin.isatty():
        raise InputError(
            "nothing was sent: give --yes to send it, or --plan to see only this estimate"
        )
    print("send? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
