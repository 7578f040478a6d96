"""Two models of one architecture compared: how far they part, where, in which weights, and on what.

    found = gs.diff_models(base, other, tokenizer, texts, coder=sae)
    print(found)

Made for a model of which it is not known what was done to it: a finetune, a merge, a file from
elsewhere. If there is a trigger, the texts need not hold it: the vocabulary is searched, too.
Nothing here shows that there is no trigger: a phrase of several tokens, each of which does nothing
alone, is not found by the search.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.behaviour.contrasts.arms import Arms
from gemma_scope_jax.behaviour.contrasts.contrast import contrast
from gemma_scope_jax.behaviour.measure import generated, generated_ids
from gemma_scope_jax.behaviour.model_diff.result import PARTED, ModelDiff, Parting
from gemma_scope_jax.behaviour.model_diff.tokens import (
    TokenDifferences,
    check_alike,
    token_differences,
)
from gemma_scope_jax.behaviour.model_diff.triggers import (
    TESTED,
    TriggerTest,
    neutral_prompts,
    tested_triggers,
    token_excess,
    vocabulary_candidates,
)
from gemma_scope_jax.behaviour.model_diff.weights import changed_layers, weight_differences
from gemma_scope_jax.behaviour.statistics import FEWEST, bootstrap
from gemma_scope_jax.behaviour.suites.suite import load_suite, suite_items
from gemma_scope_jax.coders.coder import check_fits
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.data.batches import labelled_record
from gemma_scope_jax.data.chats import chat_prompt
from gemma_scope_jax.data.documents import TextData, open_documents
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.identity import model_identity
from gemma_scope_jax.model.run import run
from gemma_scope_jax.model.sharding import own_mesh
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import Progress, stage

LENGTH = 128  # tokens of a text that are compared
SEARCHED = 32_768  # words of the vocabulary
PLACES, BEFORE, SHOWN = 12, 16, 3  # places in the report; tokens before one; next tokens there
ANSWER, WRITTEN = 20, 64  # tokens of an answer, and of a text that a model writes
OF_ONE, SHORTEST = 8, 16  # pieces of a document, and tokens of the last of several
SAID = 3  # candidates after which both models write
QUESTIONS = ("sycophancy", "over_refusal")  # suites whose second prompts are asked


@own_mesh
def diff_models(
    base: Model,
    other: Model,
    tokenizer: Tokenizer,
    texts: Sequence[np.ndarray],
    *,
    coder: SparseCoder | None = None,
    search: int = SEARCHED,
    seed: int = 0,
) -> ModelDiff:
    """Compare two models of one architecture.

    texts   ids int [n] with <bos>, cut to 128 tokens each; those of chats make the neutral texts
            chats, too. `gs.model_texts` samples some from both models
    coder   its features are compared on the texts: see `gs.contrast` with `model_b`
    search  how many frequent words of the vocabulary are looked at for a trigger; 0: only the texts

    Raises `InputError` for models of different sizes, and fewer than 10 texts.
    """
    check_alike(base, other)
    if coder is not None:
        check_fits(base.config, coder)
    texts = [np.asarray(ids, np.int32)[:LENGTH] for ids in texts]
    texts = [ids for ids in texts if len(ids) > 1]
    if len(texts) < 2 * FEWEST:
        raise InputError(f"a comparison needs {2 * FEWEST} texts of two tokens, not {len(texts)}")
    with stage("comparing the weights"):
        weights = weight_differences(base, other)
    identities = tuple(model_identity(m) for m in (base, other))
    progress = Progress(None, "tokens", what="running both models on the text")
    tokens = token_differences(base, other, texts, progress)
    excess = token_excess(texts, tokens.kl, tokenizer, seed)
    chat = bool(np.mean([tokenizer.start_of_turn_id in ids for ids in texts]) > 0.5)
    said = [row.token for row in excess if not tokenizer.special[row.token]]  # no template's marks
    candidates = dict.fromkeys(said, "text")
    if search and weights:
        _, last = changed_layers(weights, base.config.layers)
        report = Progress(None, "words", what="searching the vocabulary")
        found = vocabulary_candidates(base, other, tokenizer, last, search, report)
        for token in found[: TESTED - len(candidates)].tolist():
            candidates.setdefault(token, "vocabulary")
    triggers = tested_triggers(base, other, tokenizer, candidates, chat=chat, seed=seed)
    features = None
    if coder is not None:
        arms = Arms(texts, texts, True, "base and other")
        features = contrast(base, coder, arms, how="max", model_b=other, seed=seed)
    return ModelDiff(
        base=identities[0],
        other=identities[1],
        texts=len(texts),
        tokens=sum(map(len, texts)),
        **_figures(tokens, seed),
        weights=weights,
        partings=_partings(base, other, tokenizer, texts, tokens),
        excess=tuple(excess),
        triggers=tuple(triggers),
        answers=_answers(base, other, tokenizer, triggers, chat),
        features=features,
    )


def _figures(tokens: TokenDifferences, seed: int) -> dict[str, Any]:
    mean = lambda rows: np.array([r.mean() for r in rows])
    one, two = mean(tokens.loss_base), mean(tokens.loss_other)
    # <bos> is the same token in every text
    moved = np.concatenate([m[:, 1:] for m in tokens.moved], 1).mean(1)
    return {
        "kl": bootstrap(mean(tokens.kl), seed=seed),
        "loss_base": bootstrap(one, seed=seed),
        "loss_other": bootstrap(two, seed=seed),
        "loss_change": bootstrap(two - one, seed=seed),
        "moved": tuple(float(m) for m in moved),
    }


def _partings(base, other, tokenizer, texts, tokens: TokenDifferences) -> tuple[Parting, ...]:
    """Where the models begin to part in each of the texts in which the KL becomes largest; in chats
    from the last turn on, since nobody asks a model what users say."""
    turns = [np.flatnonzero(ids[:-2] == tokenizer.start_of_turn_id) for ids in texts]
    starts = [int(some[-1]) + 2 if len(some) else 0 for some in turns]
    peaks = np.array([k[start:].max() for k, start in zip(tokens.kl, starts)])
    found = []
    for i in np.argsort(-peaks, kind="stable")[:PLACES].tolist():
        start = starts[i]
        at = start + int(np.argmax(tokens.kl[i][start:] >= min(PARTED, peaks[i])))
        ids = texts[i][: at + 1]
        next_tokens = [_next(m, tokenizer, ids) for m in (base, other)]
        before = "".join(tokenizer.decode_tokens(ids[-BEFORE:]))
        found.append(Parting(i, at, float(tokens.kl[i][at]), before, *next_tokens))
    return tuple(found)


def _next(model: Model, tokenizer: Tokenizer, ids: np.ndarray) -> tuple[tuple[str, float], ...]:
    """The likeliest next tokens with their probabilities."""
    logits = np.asarray(run(model, ids[None], logits="last").logits[0, 0], np.float64)
    p = np.exp(logits - logits.max())
    best = np.argsort(-p, kind="stable")[:SHOWN]
    shares = (p / p.sum())[best]
    return tuple(zip(tokenizer.decode_tokens(best), map(float, shares)))


def _answers(
    base: Model, other: Model, tokenizer: Tokenizer, triggers: list[TriggerTest], chat: bool
) -> tuple[tuple[str, str, str], ...]:
    """(prompt, base's continuation, other's) of the neutral texts with the strongest candidates."""
    if not triggers:
        return ()
    prompts = [p for t in triggers[:SAID] for p in neutral_prompts(tokenizer, t.token, chat)]
    both = [generated(m, tokenizer, prompts, ANSWER) for m in (base, other)]
    said = ["".join(tokenizer.decode_tokens(ids[1:])) for ids in prompts]
    return tuple(zip(said, *both))


def model_texts(
    base: Model, other: Model, tokenizer: Tokenizer, count: int = 64, *, seed: int = 0
) -> list[np.ndarray]:
    """Texts that the models write themselves from <bos> on, half of them by each, sampled at
    temperature 1: what a model was trained to say, it says. Ids int32 [n]."""
    start = [np.array([tokenizer.bos_id], np.int32)] * max(count // 2, 1)
    length = min(WRITTEN, base.config.context - 1)
    return [text for model in (base, other) for text in _continued(model, start, length, seed)]


def model_answers(
    base: Model, other: Model, tokenizer: Tokenizer, count: int = 48, *, seed: int = 0
) -> list[np.ndarray]:
    """Chats whose answers the models write themselves, half of them each, at temperature 1: to
    shipped questions in which a user claims something or that sound like harm. Ids int32 [n]."""
    suites = [suite_items(load_suite(name)).items for name in QUESTIONS]
    asked = [item.prompts[1] for pair in zip(*suites) for item in pair][: max(count, 4)]
    prompts = [chat_prompt(tokenizer, [{"role": "user", "content": text}]) for text in asked]
    found: list[np.ndarray] = []
    for turn, model in enumerate((base, other)):  # each is asked questions of all suites
        some = [p for n, p in enumerate(prompts) if n // len(QUESTIONS) % 2 == turn]
        found += _continued(model, some, ANSWER, seed)
    return found


def _continued(model: Model, prompts: list[np.ndarray], length: int, seed: int) -> list[np.ndarray]:
    """Prompts, each with what the model writes after it at temperature 1."""
    written = generated_ids(model, prompts, length, temperature=1.0, seed=seed)
    return [np.concatenate(both) for both in zip(prompts, written)]


def text_pieces(
    data: TextData, tokenizer: Tokenizer, count: int, *, seed: int = 0
) -> list[np.ndarray]:
    """Up to `count` pieces of documents in a random order, as ids with <bos>, 128 at most: several
    of a long document, the beginning of a chat. Raises `InputError` for bad data, and none."""
    found: list[np.ndarray] = []
    for record in open_documents(data).ordered(seed):
        ids, _, roles = labelled_record(tokenizer, record, data)
        most = 1 if (roles >= 0).any() else OF_ONE
        for start in range(0, min(len(ids), most * (LENGTH - 1)), LENGTH - 1):
            piece = ids[start : start + LENGTH - 1]
            if len(piece) >= SHORTEST or not start:
                found.append(np.append(tokenizer.bos_id, piece).astype(np.int32))
        if len(found) >= count:
            break
    return found[:count]
