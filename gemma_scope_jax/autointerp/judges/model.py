"""A Gemma on this machine as a judge, where no endpoint is at hand: log-probabilities, no sampling.

A choice (yes or no, a text's number, a digit) is read off the logits of its candidates after the
prompt, so answers always have the form, are deterministic and carry confidences. An
instruction-tuned model is asked in its chat template; a pretrained one continues a list of solved
cases. For yes or no the log-odds of an empty text are taken off (Zhao et al. 2021): small models
lean one way whatever the text. Simulation reads the digits at every token in one pass over a list
of tokens whose digits are left open (all at once: Bills et al. 2023). A prompt beyond the context,
logits that are no numbers and an explanation without an end are no answers.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.autointerp.answers import AnswerFile, request_key
from gemma_scope_jax.autointerp.judges.replies import CUT
from gemma_scope_jax.autointerp.prompts import explanation_in, is_marked, without_thoughts
from gemma_scope_jax.autointerp.questions import UNCLEAR, Answer, Question, ShownText
from gemma_scope_jax.coders.release.config import instruction_tuned
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.attention import Tokens
from gemma_scope_jax.model.batch import TokenBatch, padded
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import Cache, forward, init_cache, unembed
from gemma_scope_jax.model.generate import STOP_TOKENS, generate
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.tokenizer import Tokenizer, fit_tokenizer

SHORTEST, STEP, TOKENS = 32, 64, 2048  # of a prompt after the prefix; prefixes; of a batch
PLACES = 32  # positions of a prompt that are read, padded to a multiple: few programs
SNIPPETS, AROUND = 6, 6  # for explaining with a pretrained model: texts, tokens either side
NEW = 40  # tokens of an explanation
LONG, NO_NUMBERS = "longer than the context", "without finite logits"  # why there is no answer
DIGITS = tuple("0123456789")
OPEN = "?"  # where a digit is to come

# -------------------------------------------------------------------------------------------------
# Prompts of a pretrained model: solved cases, then the one at hand. Of our own making.

CLASSES = """\
Does the feature respond to something in the text?

Feature: words of negation
Text: She said that it was not her fault.
Answer: yes

Feature: names of animals
Text: The bill passed the Senate by two votes.
Answer: no

Feature: numbers, especially years
Text: The bridge was opened in 1932 and widened later.
Answer: yes

Feature: closing brackets in program code
Text: We walked home through the rain, singing.
Answer: no

Feature: {feature}
Text: {text}
Answer:"""
MARKED = """\
Does the feature respond to the words marked << >> in the text?

Feature: words of negation
Text: She said that it was<< not>> her fault.
Answer: yes

Feature: words of negation
Text: She said that it<< was>> not her fault.
Answer: no

Feature: numbers, especially years
Text: The bridge was opened in<< 1932>> and widened later.
Answer: yes

Feature: names of animals
Text: The dog chased<< the>> ball into the garden.
Answer: no

Feature: {feature}
Text: {text}
Answer:"""
INTRUDER = """\
In all texts but one the words marked << >> are of the same kind.

1. She said that it was<< not>> her fault.
2. He<< never>> came back to the village.
3. The bridge was opened<< in>> 1932.
4. I do<< not>> think so.
5. There was<< no>> answer.
The one that differs is text 3

{texts}
The one that differs is text"""
EXPLAIN = """\
What do the words marked << >> have in common?

Texts:
it was<< not>> her fault
he<< never>> came back
Answer: words of negation

Texts:
was opened in<< 1932>> and widened
the summer of<< 1994>> was hot
Answer: years

Texts:
{texts}
Answer:"""
SIMULATE = """\
How strongly does the feature respond to each token, from 0 to 9?

Feature: words of negation
She: 0
 did: 0
 not: 9
 go: 0

Feature: years
 opened: 0
 in: 1
 1932: 9
 and: 0

Feature: {feature}
"""


# -------------------------------------------------------------------------------------------------
# The model


@partial(jax.jit, static_argnames="slots")
def _prefix(model: Model, batch: TokenBatch, *, slots: int) -> Cache:
    """The keys and values of what all prompts begin with, a row, with room for more."""
    cache = init_cache(model.config, 1, slots, model.dtype)
    return forward(model, batch, cache=cache, logits="none").cache


@jax.jit
def _choice_logits(model: Model, prefix: Cache, batch: TokenBatch, places, choices) -> jax.Array:
    """float32 [B, P, C]: the logits of the tokens `choices` [C] after the positions `places` [B, P]
    of the batch, whose rows follow the prefix (a cache of one row)."""
    rows = batch.tokens.shape[0]
    wide = lambda x, axis: jnp.repeat(x, rows, axis)
    seen = Tokens(wide(prefix.tokens.positions, 0), wide(prefix.tokens.segments, 0))
    last = wide(prefix.last, 0)
    cache = Cache(wide(prefix.k, 1), wide(prefix.v, 1), seen, prefix.used, last)
    reads = [capture("resid_final")]
    out = forward(model, batch, reads, cache=cache, logits="none")
    x = jnp.take_along_axis(out.reads["resid_final"], places[..., None], axis=1)
    params = dataclasses.replace(model.params, embed=model.params.unembedding[choices], head=None)
    return unembed(model.config, params, x)


@dataclasses.dataclass(frozen=True, eq=False)
class _Prompt:
    """Ids [T], and where one of the choices (ids [C]) comes next (indices of the token before)."""

    ids: np.ndarray
    places: tuple[int, ...]
    choices: tuple[int, ...]

    @property
    def key(self) -> tuple[bytes, tuple[int, ...]]:
        return self.ids.tobytes(), self.places


class ModelJudge:
    """Answers by a model. It is instruction-tuned, and asked through its template, if its name says
    so, as the published ones' do."""

    method, parallel, answered = "model", 1, True

    def __init__(
        self, model: Model, tokenizer: Tokenizer, name: str, answers: AnswerFile | None = None
    ):
        self.model, self.tokenizer = model, fit_tokenizer(tokenizer, model.config)
        self.name, self.answers = name, answers
        self.instructed = instruction_tuned(name)

    def close(self) -> None:
        """Nothing is under way between two calls."""

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """In order."""
        found: dict[int, Answer] = {}
        for task, answer in _TASKS.items():
            some = [i for i, q in enumerate(questions) if q.task in task]
            if some:
                found |= dict(zip(some, answer(self, [questions[i] for i in some])))
        return [found[i] for i in range(len(questions))]

    # --- what is asked ---------------------------------------------------------------------------

    def _ids(self, text: str) -> np.ndarray:
        if not self.instructed:
            return self.tokenizer.encode(text)
        return self.tokenizer.chat([{"role": "user", "content": text}]).ids

    def _choice(self, text: str, choices: Sequence[str]) -> _Prompt:
        """A prompt after which one of `choices` comes. They are told apart by their first tokens
        that differ; what they share belongs to the prompt."""
        prompt = self._ids(text).tolist()
        if self.instructed:
            tails = [
                self.tokenizer.encode(c.strip().capitalize(), bos=False).tolist() for c in choices
            ]
            rows = [prompt + tail for tail in tails]
        else:
            rows = [self.tokenizer.encode(text + c).tolist() for c in choices]
        shared = 0
        while all(len(r) > shared for r in rows) and len({r[shared] for r in rows}) == 1:
            shared += 1
        nexts = tuple(r[shared] for r in rows if len(r) > shared)
        if len(set(nexts)) != len(choices):
            raise InputError(f"this tokenizer does not tell {choices} apart")
        return _Prompt(np.array(rows[0][:shared], np.int32), (shared - 1,), nexts)

    def _classes(self, questions: Sequence[Question]) -> list[Answer]:
        prompts = []
        for q in questions:
            template = MARKED if is_marked(q) else CLASSES
            if self.instructed:
                template = f"{template}\n\nAnswer the last one, with yes or no."
            for shown in (*q.examples, None):
                text = "N/A" if shown is None else shown.text().strip()
                filled = template.format(feature=q.explanation, text=text)
                prompts.append(self._choice(filled, (" no", " yes")))
        logits, answers, at = self._logits(prompts), [], 0
        for q in questions:
            some = logits[at : at + len(q.examples) + 1]
            at += len(some)
            if (lost := _lost(some)) is not None:
                answers.append(lost)
                continue
            odds = np.array([x[0, 1] - x[0, 0] for x in some], np.float64)
            here = odds[:-1] - odds[-1]
            chance = 1.0 / (1.0 + np.exp(-np.clip(here, -50, 50)))
            said = tuple(float(p > 0.5) for p in chance)
            answers.append(Answer("", said, tuple(chance.tolist())))
        return answers

    def _intruders(self, questions: Sequence[Question]) -> list[Answer]:
        prompts = []
        for q in questions:
            texts = "\n".join(f"{i}. {s.text().strip()}" for i, s in enumerate(q.examples, 1))
            text = INTRUDER.format(texts=texts)
            if self.instructed:
                text += "\n\nAnswer with its number."
            numbers = [f" {i}" for i in range(1, len(q.examples) + 1)]
            prompts.append(self._choice(text, numbers))
        read = lambda logits: Answer("", (float(logits[0].argmax()),))
        return [_lost([x]) or read(x) for x in self._logits(prompts)]

    def _simulations(self, questions: Sequence[Question]) -> list[Answer]:
        """The expected digit, times 10 / 9, at each token."""
        prompts = [self._simulation(q) for q in questions]
        return [_lost([x]) or _expected(x) for x in self._logits(prompts)]

    def _simulation(self, question: Question) -> _Prompt:
        head = self._ids(SIMULATE.format(feature=question.explanation)).tolist()
        digits = [self.tokenizer.encode(f": {d}", bos=False).tolist() for d in DIGITS]
        before = digits[0][:-1]
        if any(d[:-1] != before for d in digits) or len({d[-1] for d in digits}) != 10:
            raise InputError("this tokenizer does not write digits as single tokens")
        ids, places = head, []
        after = self.tokenizer.encode(f"{OPEN}\n", bos=False).tolist()
        for token in question.examples[0].tokens:
            ids = [
                *ids,
                *self.tokenizer.encode(token.replace("\n", "\\n"), bos=False).tolist(),
                *before,
            ]
            places.append(len(ids) - 1)
            ids += after
        return _Prompt(np.array(ids, np.int32), tuple(places), tuple(d[-1] for d in digits))

    # --- explaining ------------------------------------------------------------------------------

    def _explanations(self, questions: Sequence[Question]) -> list[Answer]:
        return [self._explanation(q) for q in questions]

    def _explanation(self, question: Question) -> Answer:
        texts = "\n".join(_snippet(s) for s in question.examples[:SNIPPETS])
        prompt = EXPLAIN.format(texts=texts)
        if self.instructed:
            prompt += "\n\nAnswer the last one in a few words."
        key = request_key(["model", str(self.model.dtype), [self.name, prompt], NEW])
        kept = None if self.answers is None else self.answers.get(key)
        if len(ids := self._ids(prompt)) + NEW > self.model.config.context:
            return Answer(why=LONG)
        text, is_cut = (kept, False) if isinstance(kept, str) else self._continued(ids)
        first = text.lstrip().partition("\n")[0]
        if is_cut and first == text.lstrip():
            return Answer(f"after {NEW} tokens", why=CUT)
        phrase = explanation_in(first)
        if not phrase:
            return Answer(text, why=UNCLEAR)
        if self.answers is not None and kept is None:
            self.answers.put(key, text)
        return Answer(phrase, ())

    def _continued(self, ids: np.ndarray) -> tuple[str, bool]:
        """What the model says, and whether it would have gone on."""
        line_ends = [int(i) for i in self.tokenizer.encode("\n", bos=False)]
        ends = {*STOP_TOKENS, *line_ends[-1:]}
        out = generate(self.model, [ids], NEW, stop_tokens=tuple(ends))
        said = np.asarray(out.tokens)[0, : int(out.lengths[0])]
        is_cut = int(said[-1]) not in ends
        return without_thoughts(self.tokenizer.decode(said if is_cut else said[:-1])), is_cut

    # --- batches ---------------------------------------------------------------------------------

    def _logits(self, prompts: Sequence[_Prompt]) -> list[np.ndarray]:
        """Of each prompt the logits [places, C], none beyond the context. Equal prompts run once;
        what all with the same choices begin with runs once; the rest in batches of like length."""
        found: dict[Any, np.ndarray] = {}
        kinds: dict[Any, dict[Any, _Prompt]] = {}
        for p in prompts:
            if len(p.ids) > self.model.config.context:
                found[p.key] = np.zeros((0, len(p.choices)))
                continue
            kinds.setdefault((p.choices, len(p.places) > 1), {})[p.key] = p
        for (choices, many), different in kinds.items():
            some = list(different.values())
            shared = _shared(some)
            ids = np.array(choices, np.int32)
            lengths = [_power(len(p.ids) - shared, SHORTEST) for p in some]
            for length in sorted(set(lengths)):
                members = [p for p, n in zip(some, lengths) if n == length]
                found |= self._run(members, shared, length, many, ids)
        return [found[p.key] for p in prompts]

    def _run(self, prompts, shared: int, length: int, many: bool, choices) -> dict[Any, np.ndarray]:
        """{key: logits} of prompts that begin with the same `shared` tokens, with up to `length`
        more."""
        room = -(-shared // STEP) * STEP
        prefix = padded([prompts[0].ids[:shared]], context_size=room)
        cache = _prefix(self.model, prefix, slots=room + length)
        size = max(1, TOKENS // length)
        most = max(len(p.places) for p in prompts) if many else 1
        width = -(-most // PLACES) * PLACES if many else 1
        found: dict[Any, np.ndarray] = {}
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            batch = padded([p.ids[shared:] for p in some], size, length)
            places = np.zeros((size, width), np.int32)
            for row, p in enumerate(some):
                places[row, : len(p.places)] = np.array(p.places) - shared
            logits = np.asarray(_choice_logits(self.model, cache, batch, places, choices))
            for row, p in enumerate(some):
                found[p.key] = logits[row, : len(p.places)].astype(np.float64)
        return found


def _lost(logits: Sequence[np.ndarray]) -> Answer | None:
    """Why a question has no answer, if the logits of its prompts are not all there."""
    if not all(x.size for x in logits):
        return Answer(why=LONG)
    if not all(np.isfinite(x).all() for x in logits):
        return Answer(why=NO_NUMBERS)
    return None


def _expected(logits: np.ndarray) -> Answer:
    chance = np.exp(logits - logits.max(-1, keepdims=True))
    chance /= chance.sum(-1, keepdims=True)
    return Answer("", tuple((chance @ np.arange(10) * 10 / 9).tolist()))


def _power(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _shared(prompts: Sequence[_Prompt]) -> int:
    """How many tokens all prompts begin with; what is read comes after them."""
    most = min(p.places[0] for p in prompts)
    in_order = sorted(p.ids[:most].tolist() for p in prompts)
    differ = np.flatnonzero(np.array(in_order[0]) != np.array(in_order[-1]))
    return int(differ[0]) if len(differ) else most


_TASKS = {
    ("explain",): ModelJudge._explanations,
    ("classify", "select"): ModelJudge._classes,
    ("intruder",): ModelJudge._intruders,
    ("simulate",): ModelJudge._simulations,
}


def _snippet(shown: ShownText) -> str:
    """The surroundings of the strongest token, marked."""
    peak = max(range(len(shown.tokens)), key=shown.strengths.__getitem__)
    a, b = max(0, peak - AROUND), peak + AROUND // 2 + 1
    return ShownText(shown.tokens[a:b], shown.marks[a:b]).text().strip()
