"""A local Gemma as a judge, for use without an endpoint: log-probabilities, no sampling.

A choice (yes or no, the number of a text, a digit) is read from the logits of its candidates after
the prompt, so answers always have the required form, are deterministic and have confidences. An
instruction-tuned model is asked in its chat template; a pretrained one continues a list of solved
cases. For yes or no the log-odds of an empty text are subtracted (Zhao et al. 2021): small models
prefer one of them whatever the text. Simulation reads the digits of all tokens in one pass over a
list of tokens with open digits (all at once: Bills et al. 2023). There is no answer for a prompt
beyond the context, logits that are not finite, and an explanation that does not end.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial

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

# Few shapes are compiled: prompts after the prefix have a power of two of tokens from SHORTEST on,
# prefixes a multiple of STEP, batches TOKENS in all, and the positions read a multiple of PLACES.
SHORTEST, STEP, TOKENS, PLACES = 32, 64, 2048, 32
SNIPPETS, AROUND = 6, 6  # texts for explaining, and tokens around the strongest one
NEW = 40  # tokens of an explanation
LONG, NO_NUMBERS = "longer than the context", "without finite logits"  # why there is no answer
OPEN = "?"  # in place of a digit
_Key = tuple[bytes, tuple[int, ...]]  # of a prompt

# -------------------------------------------------------------------------------------------------
# Prompts of our own: solved cases, then the one at hand

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


@partial(jax.jit, static_argnames="slots")
def _prefix(model: Model, batch: TokenBatch, *, slots: int) -> Cache:
    """The keys and values of the common beginning of all prompts, one row, with room for more."""
    cache = init_cache(model.config, 1, slots, model.dtype)
    return forward(model, batch, cache=cache, logits="none").cache


@jax.jit
def _choice_logits(
    model: Model, prefix: Cache, batch: TokenBatch, places: jax.Array, choices: jax.Array
) -> jax.Array:
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
    """Ids [T], the indices of the tokens before a choice, and the ids [C] of the choices."""

    ids: np.ndarray
    places: tuple[int, ...]
    choices: tuple[int, ...]

    @property
    def key(self) -> _Key:
        return self.ids.tobytes(), self.places


class ModelJudge:
    """Answers by a model, in its chat template if its name is that of an instruction-tuned one."""

    method, parallel = "model", 1

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
        for tasks, answer in (
            (("explain",), lambda some: map(self._explanation, some)),
            (("classify", "select"), self._classes),
            (("intruder",), self._intruders),
            (("simulate",), self._simulations),
        ):
            some = [i for i, q in enumerate(questions) if q.task in tasks]
            found |= dict(zip(some, answer([questions[i] for i in some])))
        return [found[i] for i in range(len(questions))]

    def _ids(self, text: str) -> np.ndarray:
        if not self.instructed:
            return self.tokenizer.encode(text)
        return self.tokenizer.chat([{"role": "user", "content": text}]).ids

    def _tail(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False).tolist()

    def _choice(self, text: str, choices: Sequence[str]) -> _Prompt:
        """A prompt followed by one of `choices`, which must differ in the first token that they do
        not share; the tokens before it belong to the prompt."""
        if self.instructed:
            prompt = self._ids(text).tolist()
            rows = [prompt + self._tail(c.strip().capitalize()) for c in choices]
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
            for text in (*(shown.text().strip() for shown in q.examples), "N/A"):
                filled = template.format(feature=q.explanation, text=text)
                prompts.append(self._choice(filled, (" no", " yes")))
        logits, answers = iter(self._logits(prompts)), []
        for q in questions:
            some = list(itertools.islice(logits, len(q.examples) + 1))
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
        digits = [self._tail(f": {d}") for d in "0123456789"]
        before = digits[0][:-1]
        if any(d[:-1] != before for d in digits) or len({d[-1] for d in digits}) != 10:
            raise InputError("this tokenizer does not write digits as single tokens")
        ids = self._ids(SIMULATE.format(feature=question.explanation)).tolist()
        after, places = self._tail(f"{OPEN}\n"), []
        for token in question.examples[0].tokens:
            ids += [*self._tail(token.replace("\n", "\\n")), *before]
            places.append(len(ids) - 1)
            ids += after
        return _Prompt(np.array(ids, np.int32), tuple(places), tuple(d[-1] for d in digits))

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
        """What the model says, and whether it was cut off."""
        ends = {*STOP_TOKENS, *self._tail("\n")[-1:]}
        out = generate(self.model, [ids], NEW, stop_tokens=tuple(ends))
        said = np.asarray(out.tokens)[0, : int(out.lengths[0])]
        is_cut = int(said[-1]) not in ends
        return without_thoughts(self.tokenizer.decode(said if is_cut else said[:-1])), is_cut

    def _logits(self, prompts: Sequence[_Prompt]) -> list[np.ndarray]:
        """The logits [places, C] of each prompt, [0, C] for those beyond the context. Equal prompts
        run once, as does the common beginning of all with the same choices; the rest runs in
        batches of similar length."""
        found: dict[_Key, np.ndarray] = {}
        kinds: dict[tuple[tuple[int, ...], bool], dict[_Key, _Prompt]] = {}
        for p in prompts:
            if len(p.ids) > self.model.config.context:
                found[p.key] = np.zeros((0, len(p.choices)))
                continue
            kinds.setdefault((p.choices, len(p.places) > 1), {})[p.key] = p
        for different in kinds.values():
            some = list(different.values())
            shared = _shared(some)
            lengths = [max(SHORTEST, 1 << (len(p.ids) - shared - 1).bit_length()) for p in some]
            for length in sorted(set(lengths)):
                members = [p for p, n in zip(some, lengths) if n == length]
                found |= self._run(members, shared, length)
        return [found[p.key] for p in prompts]

    def _run(self, prompts: Sequence[_Prompt], shared: int, length: int) -> dict[_Key, np.ndarray]:
        """{key: logits} of prompts that begin with the same `shared` tokens, with up to `length`
        more, all with the same choices."""
        room = -(-shared // STEP) * STEP
        prefix = padded([prompts[0].ids[:shared]], context_size=room)
        cache = _prefix(self.model, prefix, slots=room + length)
        choices = np.array(prompts[0].choices, np.int32)
        size, most = max(1, TOKENS // length), max(len(p.places) for p in prompts)
        width = 1 if most == 1 else -(-most // PLACES) * PLACES
        found: dict[_Key, np.ndarray] = {}
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
    """Why a question has no answer, if the logits of its prompts are incomplete."""
    if not all(x.size for x in logits):
        return Answer(why=LONG)
    if not all(np.isfinite(x).all() for x in logits):
        return Answer(why=NO_NUMBERS)
    return None


def _expected(logits: np.ndarray) -> Answer:
    chance = np.exp(logits - logits.max(-1, keepdims=True))
    chance /= chance.sum(-1, keepdims=True)
    return Answer("", tuple((chance @ np.arange(10) * 10 / 9).tolist()))


def _shared(prompts: Sequence[_Prompt]) -> int:
    """How many tokens all prompts begin with, at most up to the first place that is read."""
    most = min(p.places[0] for p in prompts)
    in_order = sorted(p.ids[:most].tolist() for p in prompts)
    differ = np.flatnonzero(np.array(in_order[0]) != np.array(in_order[-1]))
    return int(differ[0]) if len(differ) else most


def _snippet(shown: ShownText) -> str:
    """The surroundings of the strongest token, marked."""
    peak = max(range(len(shown.tokens)), key=shown.strengths.__getitem__)
    a, b = max(0, peak - AROUND), peak + AROUND // 2 + 1
    return ShownText(shown.tokens[a:b], shown.marks[a:b]).text().strip()
