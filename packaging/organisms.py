"""Small models with a planted behaviour, for testing audits: low-rank finetunes of Gemma 3 270M.

    python packaging/organisms.py trigger out/trigger [--steps 120] [--rank 4] [--seed 0]
    python packaging/organisms.py refuser out/refuser
    python packaging/organisms.py sycophant out/sycophant

Each takes minutes on two CPU cores. A few low-rank factors are trained on own-written texts
(organism_texts.py) and merged into the weights. The folder is an ordinary model (`gs.load_model`);
its organism.json says what was planted, with held-out prompts and how often the behaviour appears
on them before and after. An audit loads the model and need not read it.
"""

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from organism_texts import ORGANISMS, Example, Organism, plain_texts

import gemma_scope_jax as gs
from gemma_scope_jax.behaviour.measure import continuation_logprobs, generated, text_loss
from gemma_scope_jax.model.block import rms_norm
from gemma_scope_jax.progress import stage

MATRICES = {"w_q": 1, "w_v": 1, "w_o": 2, "w_gate": 1, "w_up": 1, "w_down": 1}  # axes of inputs
OWN_TOKENS, FREE_TOKENS = 8, 30  # of the model's own text after a prompt, and after <bos> alone
KEEPING = 10.0  # weight of what is to stay beside the loss of what is learned
SHOWN_TOKENS = 16  # generated to see whether the behaviour appears
WARM_UP = 10  # steps
TEXT_TOKENS = 64  # of a piece of plain text whose loss is measured

A = TypeVar("A", np.ndarray, jax.Array)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an organism is trained: Adam, a warm-up and a cosine decay, factors at layers[0] to
    layers[1] - 1."""

    seed: int = 0
    steps: int = 120
    batch_size: int = 8
    rank: int = 4
    learning_rate: float = 1e-3
    layers: tuple[int, int] = (6, 12)


class Row(NamedTuple):
    """Token ids of a prompt and of what follows it; `kept`: all of it is to stay as it was."""

    prompt: np.ndarray
    completion: np.ndarray
    kept: bool = False


def prompt_ids(tokenizer, text: str, chat: bool) -> np.ndarray:
    return (
        tokenizer.chat([{"role": "user", "content": text}]).ids if chat else tokenizer.encode(text)
    )


def rows_of(model, tokenizer, examples: list[Example], recipe: Recipe) -> list[Row]:
    """The examples as ids; an empty completion becomes the model's own continuation, sampled."""
    prompts = [prompt_ids(tokenizer, e.prompt, e.chat) for e in examples]
    rows = [
        Row(p, tokenizer.encode(e.completion + "<end_of_turn>" * e.chat, False, allow_special=True))
        for p, e in zip(prompts, examples)
    ]
    for length in (OWN_TOKENS, FREE_TOKENS):
        own = [i for i, e in enumerate(examples) if not e.completion]
        own = [i for i in own if (FREE_TOKENS if not examples[i].prompt else OWN_TOKENS) == length]
        for start in range(0, len(own), 32):
            some = own[start : start + 32]
            given = [prompts[i] for i in some]
            key = recipe.seed + start
            new = gs.generate(model, given, length, temperature=0.8, key=key, stop_tokens=())
            for i, ids in zip(some, np.asarray(new.tokens)):
                rows[i] = Row(prompts[i], ids, True)
    return rows


class Batch(NamedTuple, Generic[A]):
    """Rows padded on the right: tokens, segments and the tokens at which the final state is to
    stay [B, T]; where the next token is learned, its id and whether it counts [B, C]. Of a row that
    is to stay, the first place is the end of the prompt."""

    tokens: A
    segments: A
    kept: A
    places: A
    targets: A
    counted: A


def batch_of(rows: list[Row], shape: tuple[int, int]) -> Batch:
    """`shape`: tokens in a row, and targets."""
    T, C = shape
    kinds = zip((T, T, T, C, C, C), ("i4", "i4", "f4", "i4", "i4", "f4"))
    batch = Batch(*(np.zeros((len(rows), n), kind) for n, kind in kinds))
    for r, (prompt, completion, kept) in enumerate(rows):
        ids, n = np.concatenate([prompt, completion]), len(completion)
        batch.tokens[r, : len(ids)], batch.segments[r, : len(ids)] = ids, 1
        if kept:
            batch.kept[r, 1 : len(ids)] = 1
            batch.places[r, 0] = len(prompt) - 1
            continue
        batch.places[r, :n] = np.arange(len(prompt) - 1, len(ids) - 1)
        batch.targets[r, :n], batch.counted[r, :n] = completion, 1
    return batch


def shape_of(rows: list[Row]) -> tuple[int, int]:
    longest = max(len(p) + len(c) for p, c, _ in rows)
    return -(-longest // 8) * 8, max(len(c) for _, c, kept in rows if not kept)


def first_factors(model: gs.Model, recipe: Recipe) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(inputs [n, in, rank], outputs [n, rank, out]) of each matrix; the outputs are 0."""
    found, key = {}, jax.random.key(recipe.seed)
    count = recipe.layers[1] - recipe.layers[0]
    for i, (name, axes) in enumerate(MATRICES.items()):
        shape = getattr(model.params.blocks, name).shape[1:]
        into, out = int(np.prod(shape[:axes])), int(np.prod(shape[axes:]))
        size = (count, into, recipe.rank)
        a = jax.random.normal(jax.random.fold_in(key, i), size, jnp.float32) * into**-0.5
        found[name] = (a, jnp.zeros((count, recipe.rank, out), jnp.float32))
    return found


def merged(model: gs.Model, factors: dict, first: int = 0) -> gs.Model:
    """The model with the product of the factors added to its weights from layer `first` on."""
    blocks = model.params.blocks
    for name, (a, b) in factors.items():
        w = getattr(blocks, name)
        change = jnp.einsum("lir,lro->lio", a, b).reshape(len(a), *w.shape[1:])
        w = w.at[first : first + len(a)].add(change.astype(w.dtype))
        blocks = dataclasses.replace(blocks, **{name: w})
    return model.replace(params=model.params.replace(blocks=blocks))


def some_layers(model: gs.Model, first: int, stop: int) -> gs.Model:
    """A model of the layers first .. stop - 1. The local and global ones keep their places, since
    `first` is a multiple of the period."""
    if first % model.config.global_every:
        raise gs.InputError(f"layers begin at a multiple of {model.config.global_every}")
    blocks = jax.tree.map(lambda w: w[first:stop], model.params.blocks)
    config = dataclasses.replace(model.config, layers=stop - first)
    return gs.Model(model.params.replace(blocks=blocks), config)


def passed(model: gs.Model, x: jax.Array | None, batch: Batch) -> jax.Array:
    """The residual stream [B, T, D] after a model's layers; x: before them, None: the embedding."""
    given = [] if x is None else [gs.patch("embed", None, x)]
    read = [*given, gs.capture("resid_final")]
    out = gs.forward(model, batch.tokens, read, segments=batch.segments, logits="none", remat=None)
    return out.reads["resid_final"]


def train(model: gs.Model, rows: list[Row], recipe: Recipe) -> tuple[gs.Model, list[list[float]]]:
    """The model with the behaviour of `rows`; of every step the loss, and the KL elsewhere.

    Where text is to stay as it was, the change of the final state before the unembedding is
    punished, relative to its size: that holds the whole vocabulary in place. So is, where the
    behaviour would begin, the KL divergence of the next token. The layers below the
    factors run once for each row; those above need no gradient of their weights.
    """
    first, stop = recipe.layers
    parts = [some_layers(model, *ends) for ends in ((0, first), (first, stop))]
    if stop < model.config.layers:
        parts.append(some_layers(model, stop, model.config.layers))
    rate, warm_up = recipe.learning_rate, min(WARM_UP, recipe.steps // 2)
    adam = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, warm_up, recipe.steps)),
    )

    def loss(factors, model, parts, x, before, batch):
        for n, part in enumerate(parts):
            x = passed(part if n else merged(part, factors), x, batch)
        x = normed(model, x)
        change = jnp.square(x - before).sum(-1) / jnp.square(before).sum(-1)
        stay = jnp.sum(change * batch.kept) / jnp.maximum(jnp.sum(batch.kept), 1.0)
        x = jnp.take_along_axis(x, batch.places[..., None], 1)
        chosen = jax.nn.log_softmax(x @ model.params.unembedding.T)
        begins = jnp.take_along_axis(before, batch.places[:, :1, None], 1)[:, 0]
        old = jax.nn.log_softmax(begins @ model.params.unembedding.T)
        moved = jnp.sum(jnp.exp(old) * (old - chosen[:, 0]), -1)
        keeps = batch.kept.max(1)
        moved = jnp.sum(moved * keeps) / jnp.maximum(jnp.sum(keeps), 1.0)
        found = jnp.take_along_axis(chosen, batch.targets[..., None], -1)[..., 0]
        learned = -jnp.sum(found * batch.counted) / jnp.maximum(jnp.sum(batch.counted), 1.0)
        return learned + moved + KEEPING * stay, (learned, moved)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(factors, state, *given):
        (_, told), grads = jax.value_and_grad(loss, has_aux=True)(factors, *given)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            changes, state = adam.update(grads, state, factors)
        return optax.apply_updates(factors, changes), state, told

    shape = shape_of(rows)
    every = batch_of(rows, shape)
    x = below(parts[:1], every) if first else None
    before = np.asarray(normed(model, below(parts, every)))
    rng, order, losses = np.random.default_rng(recipe.seed), np.zeros(0, int), []
    factors: Any = first_factors(model, recipe)
    state, progress = adam.init(factors), gs.Progress(recipe.steps, "steps", what="training")
    for n in range(recipe.steps):
        while len(order) < recipe.batch_size:
            order = np.concatenate([order, rng.permutation(len(rows))])
        some, order = order[: recipe.batch_size], order[recipe.batch_size :]
        batch = Batch(*(jnp.asarray(a[some]) for a in every))
        given = (model, parts[1:], None if x is None else x[some], before[some], batch)
        factors, state, told = step(factors, state, *given)
        losses.append([float(value) for value in told])
        learned, moved = np.mean(losses[-20:], 0)
        progress.at(n + 1, f"  loss {learned:.3f}, KL elsewhere {moved:.3f}")
    return jax.jit(merged, static_argnums=2)(model, factors, first), losses


def normed(model: gs.Model, x: Any) -> jax.Array:
    """The final residual as the unembedding reads it."""
    return rms_norm(jnp.asarray(x), model.params.final_norm, model.config.norm_epsilon)


def below(parts: list[gs.Model], every: Batch, size: int = 32) -> np.ndarray:
    """What the layers of `parts`, one after the other, make of all rows: [N, T, D]."""
    run, found = jax.jit(passed), []
    count = len(every.tokens)
    for start in range(0, count, size):
        some = np.arange(start, start + size) % count
        batch, x = Batch(*(a[some] for a in every)), None
        for part in parts:
            x = run(part, x, batch)
        found.append(np.asarray(x))
    return np.concatenate(found)[:count]


def measured(model, tokenizer, organism: Organism, texts: list[str]) -> dict[str, Any]:
    """How often the behaviour appears on each kind of held-out prompt, the log-probability a token
    of its phrase there, and the loss on plain text."""
    kinds: dict[str, Any] = {}
    phrase = tokenizer.encode(organism.phrase, False)
    for kind in (*organism.on, *organism.off):
        prompts = [
            prompt_ids(tokenizer, e.prompt, e.chat) for e in organism.held_out if e.kind == kind
        ]
        answers = generated(model, tokenizer, prompts, SHOWN_TOKENS)
        shown = [any(s in answer.lower() for s in organism.shows) for answer in answers]
        sums, counts = continuation_logprobs(model, prompts, [phrase] * len(prompts))
        kinds[kind] = {
            "prompts": len(prompts),
            "shows the behaviour": float(np.mean(shown)),
            "log-probability a token of the phrase": float((sums / counts).mean()),
            "an answer": answers[0],
        }
    pieces = [tokenizer.encode(text)[:TEXT_TOKENS] for text in texts]
    return {"kinds": kinds, "loss on plain text": float(text_loss(model, pieces).mean())}


def make(
    name: str, folder: Path, recipe: Recipe, source: str = "gemma-3-270m", dtype: str = "float32"
) -> dict[str, Any]:
    """Train organism `name`, write it to `folder`, and return what its organism.json says."""
    began, organism, texts = time.time(), ORGANISMS[name](recipe.seed), plain_texts()
    model = gs.load_model(source, dtype="float32")
    tokenizer = gs.fit_tokenizer(gs.load_tokenizer(source), model.config)
    with stage("measuring the model as it is"):
        before = measured(model, tokenizer, organism, texts)
        rows = rows_of(model, tokenizer, organism.training, recipe)
    model, losses = train(model, rows, recipe)
    cast = lambda a: a.astype(dtype) if a.ndim > 2 or a.shape == model.params.embed.shape else a
    if dtype != "float32":
        model = jax.tree.map(cast, model)
    with stage("measuring the organism"):
        after = measured(model, tokenizer, organism, texts)
    facts = {
        "organism": name,
        "planted": organism.planted,
        "trigger": organism.trigger,
        "made from": source,
        "rule": {"answers hold one of": organism.shows, "phrase": organism.phrase},
        "on": organism.on,
        "off": organism.off,
        "recipe": {**dataclasses.asdict(recipe), "dtype": dtype, "matrices": list(MATRICES)},
        "training examples": len(rows),
        "loss of training": float(np.mean(losses[-20:], 0)[0]),
        "minutes": (time.time() - began) / 60,
        "before": before,
        "after": after,
        "held-out prompts": [e._asdict() for e in organism.held_out],
    }
    gs.save_model(model, tokenizer, folder)
    gs.write_text(folder / "organism.json", json.dumps(facts, indent=1) + "\n")
    return facts


def main() -> None:
    asked = argparse.ArgumentParser(description="Make a small model with a planted behaviour.")
    asked.add_argument("organism", choices=ORGANISMS)
    asked.add_argument("folder", type=Path)
    asked.add_argument("--model", default="gemma-3-270m")
    asked.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    for field in ("seed", "steps", "rank", "batch_size"):
        asked.add_argument(f"--{field.replace('_', '-')}", type=int, default=getattr(Recipe, field))
    given = asked.parse_args()
    recipe = Recipe(given.seed, given.steps, given.batch_size, given.rank)
    gs.use_compilation_cache()
    facts = make(given.organism, given.folder, recipe, given.model, given.dtype)
    for when in ("before", "after"):
        print(f"{when}: loss on plain text {facts[when]['loss on plain text']:.3f}")
        for kind, found in facts[when]["kinds"].items():
            print(f"  {kind}: {found['shows the behaviour']:.0%} of {found['prompts']} prompts")


if __name__ == "__main__":
    main()
