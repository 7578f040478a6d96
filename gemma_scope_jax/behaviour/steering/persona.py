"""A direction for a trait that can be asked for in words: the recipe of persona vectors.

    evil = gs.persona_vector(
        model, tokenizer, ["Be cruel."], ["Be kind."], questions, "resid_post", 12
    )

Instructions that evoke the trait, and others that oppose it, are put before the same questions; the
model answers, answers that do not fit their instruction are dropped where a judge says so, and the
direction is the difference of the mean activations over the answers' own tokens.

Source: Chen et al. 2025 (2507.21509), section 2. There a model writes instructions and questions,
and judges; here they are the caller's.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.behaviour.audits.judges import AnswerJudge
from gemma_scope_jax.behaviour.measure import generated_ids
from gemma_scope_jax.behaviour.statistics import FEWEST
from gemma_scope_jax.behaviour.steering.vectors import SteeringVector, check_place, contrast_vector
from gemma_scope_jax.data.chats import chat_prompt
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.generate import STOP_TOKENS
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import Progress


def persona_vector(
    model: Model,
    tokenizer: Tokenizer,
    positive: Sequence[str],
    negative: Sequence[str],
    questions: Sequence[str],
    site: str,
    layer: int,
    *,
    judge: AnswerJudge | None = None,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    seed: int = 0,
    rows: int = 16,
) -> SteeringVector:
    """The direction of a trait at a site of a layer.

    positive, negative  instructions that evoke the trait, and that oppose it; each is the system
                        message before every question
    judge      keeps the answers to `positive` with a grade above one half, and those to `negative`
               below; None: all are kept. `made` says how many were
    rows       of a batch of answers

    Raises `InputError` for empty lists, and if fewer than 5 answers of a side remain.
    """
    check_place(model, site, layer)
    given = {"positive": positive, "negative": negative, "questions": questions}
    for name, some in given.items():
        if isinstance(some, str) or not some or not all(isinstance(t, str) and t for t in some):
            raise InputError(f"{name} must be a list of texts, none of them empty")
    asked = [(said, q) for side in (positive, negative) for said in side for q in questions]
    prompts = [
        chat_prompt(
            tokenizer, [{"role": "system", "content": said}, {"role": "user", "content": q}]
        )
        for said, q in asked
    ]
    report = Progress(len(prompts), "answers", what="answering with and against the trait")
    options: dict[str, Any] = {"temperature": temperature, "seed": seed, "rows": rows}
    found = generated_ids(model, prompts, max_new_tokens, report=report, **options)
    answers = [ids[~np.isin(ids, STOP_TOKENS)] for ids in found]
    evokes = np.arange(len(asked)) < len(positive) * len(questions)
    fits = np.array([len(ids) > 0 for ids in answers])
    if judge is not None:
        grades = judge.grade([q for _, q in asked], [tokenizer.decode(ids) for ids in answers])
        fits &= np.where(evokes, np.asarray(grades) > 0.5, np.asarray(grades) < 0.5)
    sides = [np.flatnonzero(fits & (evokes == wanted)) for wanted in (True, False)]
    if min(map(len, sides)) < FEWEST:
        kept = f"{len(sides[0])} and {len(sides[1])} answers fit their instructions"
        raise InputError(f"{kept}, at least {FEWEST} of each are needed: ask more questions")
    texts = [[np.concatenate([prompts[i], answers[i]]) for i in side] for side in sides]
    where = [[np.arange(len(ids)) >= len(prompts[i]) for i, ids in zip(side, some)]
             for side, some in zip(sides, texts)]  # fmt: skip
    vector = contrast_vector(model, texts[0], texts[1], site, layer, where=(where[0], where[1]))
    made = {"method": "persona vector", "answers": len(asked)}
    made |= {"judge": None if judge is None else judge.name, **given}
    return SteeringVector(vector.vector, site, layer, vector.norm, {**vector.made, **made})
