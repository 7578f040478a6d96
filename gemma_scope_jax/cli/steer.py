"""`gemma-scope steer`."""

import json as json_module
from pathlib import Path
from typing import Annotated

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared

ANSWERS = "judge_answers.jsonl"
Words = Annotated[tuple[str, ...], tyro.conf.arg(metavar="WORD...", help_behavior_hint="")]
Feature = Annotated[
    int | None, tyro.conf.Positional, tyro.conf.arg(metavar="FEATURE", help_behavior_hint="")
]


def command(
    feature: Feature = None,
    *,
    coder: Annotated[shared.Place, tyro.conf.arg(metavar="CODER")] = shared.PACKAGED_CODER,
    model: shared.Model = "",
    rank: int = 0,
    spec: shared.File = None,
    prompts: shared.File = None,
    words: Words = (),
    probe: shared.File = None,
    ask: str = "",
    endpoint: shared.Url = "",
    judge_model: shared.NameOrPlace = "",
    key_variable: shared.Name = shared.KEY_VARIABLE,
    about: str = "",
    positive: shared.File = None,
    negative: shared.File = None,
    strengths: tuple[float, ...] = gs.STRENGTHS,
    bound: float = 2.0,
    new_tokens: int = 40,
    temperature: float = 1.0,
    seed: int = 0,
    rows: int = 64,
    out: Annotated[shared.LocalPlace | None, tyro.conf.arg(metavar="FOLDER")] = None,
    dtype: shared.Dtype = "auto",
    json: shared.Json = False,
) -> None:
    """Steer with a feature: how strong the effect is, what it costs, and what baselines reach.

    The feature's direction is added at several strengths while prompts are continued. Beside it
    stand the unsteered text, a random feature, another layer and, with --about, --positive and
    --negative, a prompt, the difference of means and a trained vector. The strength of each is
    chosen on one half of the prompts and scored on the other.

    Args:
        feature: The feature's number in the coder.
        coder: The coder: an address of the release, a folder, or a packaged coder.
        rank: Instead of steering, print this many of the coder's features that write most, by the
            output score and the change of token confidence.
        spec: Instead of a feature, a JSON file of steering (`gs.steer_spec`): prints what it does
            to each prompt.
        prompts: A file with a prompt in each line, at least 4 for a FEATURE. The default is ten
            beginnings of sentences.
        words: The effect is the share of these words in what is written; "cook*" matches all that
            begin so. The default effect is the feature's own activation on the text, which says
            little about meaning.
        probe: Another effect: a file of a monitor (`gs.save_monitor`) or a direction
            (`SteeringVector.save`), read on what is written.
        ask: Another effect: the share of texts to which a chat endpoint answers this question with
            yes, such as "Is the text about cooking?".
        endpoint: The base URL of the OpenAI-compatible API for --ask.
        judge_model: The name of the endpoint's model.
        key_variable: The environment variable that holds the API key.
        about: The concept in words, for prompting as a baseline.
        positive: A file with a text in each line that has the concept.
        negative: A file with a text in each line that lacks it.
        strengths: In norms of each token's own activation.
        bound: Recommend no strength at which perplexity is more than this multiple of the unsteered
            text's.
        new_tokens: The number of tokens to write after each prompt.
        temperature: 0 writes the likeliest token each time.
        rows: The number of texts written at once.
        out: Write steer.html (opens from the disk) and steer.json here.
    """
    if (feature is None) + (spec is None) + (rank == 0) != 2:
        raise gs.InputError("give one of these: a FEATURE, --spec FILE, or --rank N")
    if (positive is None) != (negative is None):
        raise gs.InputError("--positive and --negative belong together: texts of both kinds")
    gs.check_strengths(strengths)
    gs.check_bound(bound)
    if feature is None and (out or words or about or positive or probe or ask):
        raise gs.InputError(
            "--out, --words, --probe, --ask, --about and --positive are for a FEATURE"
        )
    if rank < 0:
        raise gs.InputError("--rank is a number of features")
    if bool(words) + (probe is not None) + bool(ask.strip()) > 1:
        raise gs.InputError("one effect at a time: --words, --probe or --ask")
    api = shared.chat_endpoint(endpoint, judge_model, key_variable, bool(ask.strip()), "--ask")
    if api is not None and out is None:
        raise gs.InputError("--ask needs --out FOLDER, where the answers are kept")
    plan = None if spec is None else gs.steer_spec(spec)
    lines = list(gs.NEUTRAL_PROMPTS) if prompts is None else _lines(prompts)
    if feature is not None:
        gs.check_prompts(lines)
    sides = [[] if path is None else _lines(path) for path in (positive, negative)]
    if out is not None:
        gs.check_writable(out / "steer.html")
    opened = shared.open_coders(coder, model, one_layer=True)
    one, tok = opened.coders[0], opened.tokenizer
    if feature is not None and not 0 <= feature < one.width:
        raise gs.InputError(f"feature {feature}: the coder has features 0 to {one.width - 1}")
    weights = shared.load_model(opened.model, dtype)
    how = {"temperature": temperature, "seed": seed}
    if rank:
        scores = gs.output_scores(weights, one, tok, range(one.width))
        rows_shown = scores.table(tok, rank)
        shared.print_result(gs.text_tables({"what features write": rows_shown}), rows_shown, json)
        return
    if plan is not None:
        texts = _steered(weights, tok, one, plan, lines, new_tokens, temperature, seed)
        shared.print_result(gs.text_tables({"": texts}), texts, json)
        return
    effects = {f"feature {feature}": gs.ReadingMean(gs.Reading(feature=feature), one)}
    if words:
        effects = {"share of words": gs.WordShare(words)}
    elif probe is not None:
        effects = {f"score of {probe.name}": gs.ReadingMean(gs.load_reading(probe, weights))}
    elif api is not None and out is not None:
        kept_in = {"endpoint": api, "answers": out / ANSWERS, "question": ask.strip()}
        effects = {ask.strip(): gs.answer_judge("endpoint", weights, tok, **kept_in)}
    ids = [[tok.encode(text) for text in side] for side in sides]
    with shared.stage("making the baselines"):
        given = {"strengths": strengths, "about": about, "seed": seed}
        arms = gs.steering_arms(weights, one, feature, positive=ids[0], negative=ids[1], **given)
    how |= {"max_new_tokens": new_tokens, "rows": rows, "coders": one}
    swept = gs.sweep(weights, tok, lines, arms, effects=effects, **how)
    found = gs.calibrate(swept, bound=bound, seed=seed)
    facts = {"model": opened.model, "coder": gs.public_name(one), "feature": feature}
    kept = {**facts, "calibration": found.as_dict(), "sweep": swept.as_dict()}
    shared.print_result(found, kept, json)
    if out is None:
        return
    title = f"Steering with feature {feature}" + (f": {about}" if about else "")
    gs.write_text(out / "steer.html", gs.steer_page(swept, found, title=title, about=facts))
    gs.write_text(out / "steer.json", json_module.dumps(gs.finite(kept)) + "\n")
    if not json:
        print(f"page      {out / 'steer.html'}")


def _lines(path: Path) -> list[str]:
    """The lines of a file that are not empty."""
    found = [line.strip() for line in gs.read_text(path).splitlines() if line.strip()]
    if not found:
        raise gs.InputError(f"{path}: no lines of text")
    return found


def _steered(model, tok, coder, spec, prompts, count, temperature, seed) -> list[list[str]]:
    """Each prompt with its continuation, unsteered and steered; the first row names the columns."""
    ids = [tok.encode(prompt) for prompt in prompts]
    how = {"temperature": temperature, "key": seed}
    columns = []
    for items in ([], gs.steering(model, spec, coder, ids)):
        out = gs.generate(model, ids, count, items, **how)
        columns.append([tok.decode(row[len(i) :]) for row, i in zip(out.sequences, ids)])
    return [["prompt", "unsteered", "steered"], *map(list, zip(prompts, *columns))]
