"""Explaining features: `explain`."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gemma_scope_jax.cli.shared import (
    BucketFile,
    Coder,
    Dtype,
    Folder,
    Name,
    NameOrPlace,
    bar,
    stage,
    use_compilation_cache,
)
from gemma_scope_jax.errors import InputError

ANSWERS = "explanations.answers.jsonl"
KEY_VARIABLE = "OPENAI_API_KEY"


def explain(
    coder: Coder,
    *,
    store: Folder,
    features: Name = "",
    sample: int | None = None,
    judge: Literal["endpoint", "model", "statistics"] | None = None,
    endpoint: Annotated[str, tyro.conf.arg(metavar="URL")] = "",
    judge_model: NameOrPlace = "",
    scores: tuple[str, ...] = ("detection", "fuzzing"),
    out: Folder = "",
    plan: bool = False,
    yes: bool = False,
    price_in: float = 0.0,
    price_out: float = 0.0,
    key_variable: Name = KEY_VARIABLE,
    concurrency: int = 8,
    timeout: float = 120.0,
    retries: int = 6,
    logprobs: bool = False,
    request_options: Annotated[str, tyro.conf.arg(metavar="JSON")] = "{}",
    model: NameOrPlace = "",
    name: Name = "",
    layer: int | None = None,
    length: int = 32,
    test: int = 50,
    silent: int = 50,
    hard_negatives: int = 0,
    neighbours: Literal["decoder", "cooccurring"] = "decoder",
    least: int = 10,
    seed: int = 0,
    answers: BucketFile = "",
    dtype: Dtype = "auto",
) -> None:
    """Explain features from where they fire, and score the explanations.

    By a chat endpoint (--endpoint URL --judge-model NAME), by a Gemma on this machine (--judge
    model) or by token statistics alone (the default). Writes explanations.json, which inspect and
    the cards show; the same command goes on where one was killed, and asks nothing twice.

    Args:
        coder: An address of the release, a folder, or a packaged coder.
        store: Its feature store, from `gemma-scope extract`.
        features: Which: 1,5,10-20; default with statistics: all that fire.
        sample: So many at random, of those that fire often enough.
        judge: Who explains and scores; default: the endpoint if there is one, else statistics.
        endpoint: Base URL of an OpenAI-compatible API, such as https://api.openai.com/v1; of
            Azure the deployment's, with its ?api-version=.
        judge_model: Its model; or the Gemma of --judge model (default: --model).
        scores: detection, fuzzing, intruder, simulation, saebench.
        out: Where explanations.json goes (of coders of several layers: in layer_N); default:
            beside the coder.
        plan: Print what would be asked and what it would cost, and stop.
        yes: Send without asking.
        price_in: Dollars a million tokens of prompts.
        price_out: Dollars a million tokens of answers.
        key_variable: The environment variable that holds the API key.
        concurrency: Requests under way at once.
        timeout: Seconds a request may take.
        retries: Of a request that fails in a way that passes.
        logprobs: Ask for log-probabilities: detection and fuzzing then have an AUC.
        request_options: Put into every request, as JSON; null takes one out, such as
            '{"temperature": null, "max_tokens": null, "max_completion_tokens": 4000}'.
        model: Whose features these are, and whose tokenizer wrote the store; default: the coder's.
        name: Of the coder in the store, if it is there under several.
        layer: Of a coder of several layers.
        length: Tokens of a window.
        test: Windows for scoring on which the feature fires.
        silent: And on which it is silent.
        hard_negatives: Of these, so many from where neighbours of the feature fire.
        neighbours: By decoder directions, or by firing on the same tokens.
        least: Windows for explaining, and for scoring, below which a feature is left out.
        seed: Of all drawing.
        answers: File that keeps every answer; default: beside explanations.json.
        dtype: Of the model of --judge model.
    """
    from gemma_scope_jax.autointerp.examples import Sampling, open_corpus
    from gemma_scope_jax.autointerp.explain import check_scores
    from gemma_scope_jax.autointerp.explanations import explained_folder, layer_folder
    from gemma_scope_jax.cards.build import name_in_store
    from gemma_scope_jax.coders.load import load_coder
    from gemma_scope_jax.extraction.store.store import FeatureStore
    from gemma_scope_jax.model.tokenizer import load_tokenizer

    kind = _kind(judge, endpoint, judge_model, plan)
    check_scores(scores)
    sampling = Sampling(
        length=length,
        test=test,
        silent=silent,
        hard=hard_negatives,
        neighbours=neighbours,
        least=least,
        seed=seed,
    )
    use_compilation_cache()
    with stage(f"opening {store}"):
        opened = FeatureStore(store)
        loaded = load_coder(coder)
        name = name_in_store(opened, loaded, name)
        opened.place(name, layer)  # of several layers, one must be named
        model = model or _model_of(opened, loaded)
        tok = load_tokenizer(model)
        corpus = open_corpus(opened, tok, sampling, name, layer)
    wanted = chosen_features(features, sample, opened.fired(name, layer), least, seed, kind)
    folder = out or explained_folder(loaded.info)
    folder = layer_folder(folder, len(loaded.layers), layer)
    path = _answer_file(answers, folder)
    known = _neighbours(corpus, loaded, wanted, neighbours) if hard_negatives else {}
    if kind == "endpoint":
        asked = _endpoint(endpoint, judge_model, key_variable, request_options, concurrency,
                          timeout, retries, logprobs, price_in, price_out)  # fmt: skip
        if not _agreed(corpus, wanted, scores, asked, plan, yes, folder):
            return
    else:
        asked = None
    judged = _judge(kind, asked, judge_model or model, dtype, tok, path)
    _run(corpus, judged, wanted, scores, folder, loaded, known)


def _kind(judge: str | None, endpoint: str, judge_model: str, plan: bool) -> str:
    """Who explains. Raises `InputError` for options that do not go together."""
    judge = judge or ("endpoint" if endpoint else "statistics")
    if judge == "endpoint" and not (endpoint and judge_model):
        raise InputError("an endpoint needs --endpoint URL and --judge-model NAME")
    if judge != "endpoint" and (endpoint or plan):
        raise InputError(f"--{'endpoint' if endpoint else 'plan'} does not go with --judge {judge}")
    return judge


def _run(corpus: Any, judged: tuple, wanted, scores, folder, loaded, known) -> None:
    """Explain, write and print. judged: from `_judge`; known: neighbours of the features."""
    from gemma_scope_jax.autointerp.explain import explain_features, explained_by
    from gemma_scope_jax.autointerp.explanations import read_explanations
    from gemma_scope_jax.coders.coder import public_name

    made, status, held = judged
    try:
        report = explain_features(
            corpus, made, wanted, scores, folder, coder=public_name(loaded),
            width=loaded.width, neighbours=known, raises=_raises(loaded), status=status,
        )  # fmt: skip
    finally:
        made.close()
        if held is not None:
            held.close()
    entries = read_explanations(folder, loaded.width)
    ours = explained_by(corpus, made.method, made.name, wanted, entries)
    _print_report(report, f"{folder}/explanations.json: {len(entries):,}", ours, scores)
    if status():
        print(status())
    if report.unexplained and not report.done:
        raise InputError(f"nothing that was asked has an answer: {report.losses}")


def chosen_features(
    text: str, sample: int | None, fired: Any, least: int, seed: int, judge: str
) -> list[int]:
    """The features that --features or --sample name; `fired` [F]: on how many tokens each fires."""
    import numpy as np

    if text and sample is not None:
        raise InputError("give --features or --sample, not both")
    if text:
        return parse_features(text, len(fired))
    if sample is None:
        if judge != "statistics":
            raise InputError("which features? --features 1,5,10-20 or --sample N")
        return np.flatnonzero(fired).tolist()
    live = np.flatnonzero(fired >= 2 * least)
    if sample < 1:
        raise InputError(f"--sample {sample}: at least one")
    if not len(live):
        raise InputError("no feature fires often enough in this store")
    drawn = np.random.default_rng(seed).permutation(live)[:sample]
    return np.sort(drawn).tolist()


def parse_features(text: str, width: int) -> list[int]:
    """ "1,5,10-20" as numbers, in order, each once. Raises `InputError`."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f"--features {text!r}: give numbers and ranges, such as 1,5,10-20")
        a, b = int(first), int(last or first)
        if a > b or b >= width:
            raise InputError(f"--features {part.strip()}: the coder has features 0 to {width - 1}")
        found += range(a, b + 1)
    return list(dict.fromkeys(found))


def _model_of(store: Any, coder: Any) -> str:
    """The coder says which model it is for; a store's name of it tells no -pt from -it."""
    return coder.info.model_name.removeprefix("google/") or store.manifest["model"]["name"]


def _neighbours(
    corpus: Any, coder: Any, features: Sequence[int], kind: str
) -> dict[int, list[int]]:
    from gemma_scope_jax.autointerp.neighbours import cooccurring, decoder_neighbours

    with stage("looking for neighbours of the features"):
        if kind == "cooccurring":
            return cooccurring(corpus, features)
        if coder.multi_layer:
            raise InputError("--neighbours decoder is for coders of one layer; cooccurring for all")
        return decoder_neighbours(coder.w_dec, features)


def _raises(coder: Any) -> Callable[[int], Sequence[str]]:
    """The tokens that a feature raises, from the label material beside the coder if it is there."""
    from gemma_scope_jax.cards.labels import read_labels

    labels = read_labels(coder.info.folder, coder.width)
    return lambda feature: labels[feature]["top_logits"] if labels else ()


def _endpoint(
    url, model, variable, options, concurrency, timeout, retries, logprobs, *prices
) -> Any:
    from gemma_scope_jax.autointerp.judges.endpoint import Endpoint
    from gemma_scope_jax.storage.strict_json import parse_json

    more = parse_json(options, "--request-options")
    if not isinstance(more, dict):
        raise InputError("--request-options: not a JSON object")
    key = os.environ.get(variable, "").strip()
    if not key and variable != KEY_VARIABLE:
        raise InputError(f"--key-variable {variable}: there is no such variable, or nothing in it")
    return Endpoint(url, model, key, concurrency, timeout, retries, more, logprobs, *prices)


def _agreed(
    corpus: Any, features, scores, endpoint: Any, plan_only: bool, yes: bool, folder: Any
) -> bool:
    """Show what is going to be asked; whether to send it. Nothing is sent for nothing to do."""
    from gemma_scope_jax.autointerp.explain import plan, unfinished
    from gemma_scope_jax.autointerp.explanations import read_explanations

    prices = (endpoint.price_in, endpoint.price_out)
    entries = read_explanations(folder)
    todo = unfinished(corpus, "endpoint", endpoint.name, features, scores, entries)
    if not todo and not plan_only:
        return True
    p = plan(corpus, todo, scores, prices)
    cost = f"${p.cost:.2f} to ${p.cost_most:.2f}" if any(prices) else "no prices are given"
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


def _answer_file(given: str, folder: str) -> Path:
    from gemma_scope_jax.storage.paths import cache_folder, is_remote

    if is_remote(given):
        raise InputError(f"--answers {given}: they are appended to a file of this machine")
    if given:
        return Path(given).expanduser()
    if is_remote(folder):  # nothing can be appended to there
        return cache_folder() / "explain" / ANSWERS
    return Path(folder).expanduser() / ANSWERS


def _judge(kind: str, endpoint: Any, model: str, dtype: Dtype, tok: Any, path: Path) -> Any:
    """The judge, a function that says what it has cost, and the file of answers to close."""
    if kind == "statistics":
        from gemma_scope_jax.autointerp.judges.statistics import RuleJudge

        return RuleJudge(), lambda: "", None
    if kind == "model":
        import jax

        from gemma_scope_jax.autointerp.judges.model import ModelJudge
        from gemma_scope_jax.model.checkpoints.load import load_model

        if dtype == "auto":
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        with bar(f"loading model {model} ({dtype})") as progress:
            loaded = load_model(model, dtype=dtype, progress=progress)
        held = _open_answers(path)
        return ModelJudge(loaded, tok, model, held), lambda: "", held
    from gemma_scope_jax.autointerp.judges.chat_client import ChatClient
    from gemma_scope_jax.autointerp.judges.endpoint_judge import EndpointJudge

    held = _open_answers(path)
    client = ChatClient(endpoint, held, lambda line: print(line, file=sys.stderr, flush=True))

    def status() -> str:
        cost = f"${client.cost:.3f}  " if endpoint.price_in or endpoint.price_out else ""
        return (
            f"{cost}{client.requests:,} answers, {client.tokens_in:,} tokens in, "
            f"{client.tokens_out:,} out, {client.retried:,} tried again"
            + (f", {client.uncounted:,} without a count of tokens" if client.uncounted else "")
        )

    return EndpointJudge(client), status, held


def _open_answers(path: Path) -> Any:
    from gemma_scope_jax.autointerp.answers import AnswerFile

    held = AnswerFile(path)
    if held.damaged:
        print(f"{path}: {held.damaged:,} damaged lines, asked again", file=sys.stderr, flush=True)
    return held


def _print_report(report: Any, file: str, ours: Sequence[dict], scores: Sequence[str]) -> None:
    """ours: the explanations that figures are averaged over."""
    import numpy as np

    from gemma_scope_jax.autointerp.explanations import FIGURES, is_number

    print(f"{file} features explained")
    for what, count in (("finished before", report.kept), ("explained now", report.done),
                        ("fire in too few windows to be scored", report.few),
                        ("of which nothing that was asked has an answer", report.unexplained),
                        ):  # fmt: skip
        if count:
            print(f"  {count:,} {what}")
    for name in scores:
        some = [e["scores"].get(name, {}).get(FIGURES[name]) for e in ours]
        some = [s for s in some if is_number(s)]
        if some:
            mean, spread = np.mean(some), np.std(some)
            figure = FIGURES[name].replace("_", " ")
            print(f"  {name}: {figure} {mean:.3f} ± {spread:.3f} over {len(some):,} features")
    if report.lost:
        count = sum(count for count, _ in report.lost.values())
        print(f"  {count:,} questions have no answer and are in no score: {report.losses}")
