"""Sweeps: many specs on many prompts in one compiled decode, and what came of each.

Each row of a batch has its own spec, so features x strengths x prompts is one batch after another
of the same program. What is generated is then read again by the unchanged model: how likely it
finds the text (perplexity is coherence under the clean model), and what an effect makes of it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.behaviour.measure import continuation_logprobs
from gemma_scope_jax.behaviour.steering.effects import Continuations, Effect, repetition
from gemma_scope_jax.behaviour.steering.place import steering
from gemma_scope_jax.behaviour.steering.spec import SteeringSpec
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.generate import generate
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import Progress


@dataclasses.dataclass(frozen=True, eq=False)
class SweepArm:
    """One column of a sweep: a spec, or a text put before every prompt, or neither.

    name      unique in the sweep
    spec      None: the model as it is
    before    a text that is put before each prompt: prompting as a baseline
    group     arms that differ in strength alone share it; default: the name
    strength  what is written down beside it
    """

    name: str
    spec: SteeringSpec | None = None
    before: str = ""
    group: str = ""
    strength: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """What `sweep` returns: rows are arms, columns are prompts.

    arms, prompts  as given; prompts as texts
    texts          for each arm, for each prompt: the continuation, without the prompt
    loss           float64 [A, P]: nats a token of the continuation under the unchanged model
    repetition     float64 [A, P]: share of repeated trigrams
    effects        name -> float64 [A, P]
    tokens         int [A, P]: generated
    """

    arms: tuple[SweepArm, ...]
    prompts: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    loss: np.ndarray
    repetition: np.ndarray
    effects: dict[str, np.ndarray]
    tokens: np.ndarray

    def __repr__(self) -> str:
        """One line."""
        names = ", ".join(self.effects)
        return f"Sweep({len(self.arms)} arms x {len(self.prompts)} prompts; effects: {names})"

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON data."""
        arms = []
        for a, arm in enumerate(self.arms):
            arms.append({
                "name": arm.name,
                "group": arm.group or arm.name,
                "strength": arm.strength,
                "before": arm.before,
                "spec": None if arm.spec is None else arm.spec.as_dict(),
                "loss": _rounded(self.loss[a]),
                "repetition": _rounded(self.repetition[a]),
                "tokens": self.tokens[a].tolist(),
                "effects": {name: _rounded(v[a]) for name, v in self.effects.items()},
                "texts": list(self.texts[a]),
            })  # fmt: skip
        return {"prompts": list(self.prompts), "arms": arms}


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 6) for v in values]


def sweep(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    arms: Sequence[SweepArm],
    *,
    effects: Mapping[str, Effect],
    coders: Any = None,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    top_k: int | None = 64,
    top_p: float | None = 0.9,
    seed: int = 0,
    rows: int = 64,
) -> Sweep:
    """Continue every prompt under every arm, and measure the continuations.

    prompts   texts, `<bos>` is put before each
    effects   name -> what is measured of the continuations, see `effects.py`
    coders    those that the arms' specs name, see `steering`
    rows      of a batch; memory and speed grow with it
    A prompt draws the same random numbers under every arm, so arms are compared in pairs. Raises
    `InputError` for empty prompts, arms that share a name, and what steering refuses.
    """
    prompts, arms = list(prompts), list(arms)
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise InputError("a sweep needs prompts, and none of them empty")
    names = [arm.name for arm in arms]
    if not arms or len(set(names)) != len(names):
        raise InputError("a sweep needs arms with names of their own")
    if not effects:
        raise InputError("a sweep needs an effect to measure")
    whole_number("max_new_tokens", max_new_tokens, 1)
    ids = {b: [tokenizer.encode(b + p) for p in prompts] for b in {arm.before for arm in arms}}
    plain = [tokenizer.encode(p) for p in prompts]
    # one prompt after another, so that a batch has prompts of one length or nearly
    order = sorted(range(len(prompts)), key=lambda p: len(plain[p]))
    jobs = [(a, p) for p in order for a in range(len(arms))]
    size = min(whole_number("rows", rows, 1), len(jobs))
    progress = Progress(len(jobs), "continuations", what="steering")
    found: dict[tuple[int, int], np.ndarray] = {}
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for start in range(0, len(jobs), size):
        some = jobs[start : start + size]
        filled = some + [some[0]] * (size - len(some))
        given = [ids[arms[a].before][p] for a, p in filled]
        specs = [arms[a].spec or SteeringSpec(()) for a, _ in filled]
        items = steering(model, specs, coders, given)
        # what is drawn depends on the prompt and the step alone
        draws = np.array([p for _, p in filled], np.int32)
        out = generate(model, given, max_new_tokens, items, key=seed, draws=draws, **options)
        tokens, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
        for r, job in enumerate(some):
            found[job] = tokens[r, : lengths[r]]
        progress.at(min(start + size, len(jobs)))
    every = [(a, p) for a in range(len(arms)) for p in range(len(prompts))]
    sums, counts = continuation_logprobs(
        model, [plain[p] for _, p in every], [found[job] for job in every]
    )
    shape = (len(arms), len(prompts))
    texts = [tokenizer.decode(found[job]) for job in every]
    written = Continuations(
        tuple(plain[p] for _, p in every),
        tuple(found[job] for job in every),
        tuple(texts),
        tuple(prompts[p] for _, p in every),
    )
    measured = {n: np.asarray(e(model, tokenizer, written), float) for n, e in effects.items()}
    return Sweep(
        tuple(arms),
        tuple(prompts),
        tuple(tuple(texts[a * shape[1] : (a + 1) * shape[1]]) for a in range(len(arms))),
        (-sums / np.maximum(counts, 1)).reshape(shape),
        np.array([repetition(found[job]) for job in every]).reshape(shape),
        {name: values.reshape(shape) for name, values in measured.items()},
        counts.reshape(shape),
    )
