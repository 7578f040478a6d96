"""`gemma-scope evaluate`."""

import os
import sys
from typing import Any

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared
from gemma_scope_jax.cli.text import TextOptions
from gemma_scope_jax.errors import InputError


def command(
    coders: shared.Coders,
    *,
    model: shared.Model = "",
    data: TextOptions = TextOptions(roles=("system", "user", "model")),
    tokens: int = 100_000,
    loss_tokens: int = 16_000,
    context_size: int = 256,
    batch_size: int = 4,
    seed: int = 0,
    replacement: bool = False,
    skip_geometry: bool = False,
    out: shared.Folder = "",
    json: shared.Json = False,
    dtype: shared.Dtype = "auto",
) -> None:
    """Measure how sparse and faithful coders are, and what they cost the model.

    L0, FVU and its relatives, cosine, L2 ratio, delta loss, CE and KL scores with mean ablation and
    zero ablation (SAELens sets <bos> to zero, too), densities, geometry; by position in the piece
    of a document, source file and role. Several coders share one pass of the model and are
    compared.

    Args:
        data: The text. The default is a bundled sample of 2,600 tokens; roles of chats are
            compared.
        tokens: Read about so many tokens, <bos> included, in whole batches, to measure how the
            coders fit.
        loss_tokens: Run the whole model, changed and unchanged, on the first so many of them.
        context_size: The tokens of a sequence.
        batch_size: The sequences of a batch.
        seed: The random seed of the documents' order.
        replacement: Also measure the model with all the coders in place at once.
        skip_geometry: Leave out norms and cosines of features, whose time grows with the width
            squared.
        out: Write a JSON document (SAEBench's core schema) and plots for each coder to this folder,
            local or gs://. The same command goes on where it was killed, and computes nothing
            twice.
        json: Print the documents as a JSON list, without their records of single features.
    """
    if tokens < 1 or loss_tokens < 0:
        raise InputError(f"--tokens {tokens} or --loss-tokens {loss_tokens}: too few")
    if replacement and not loss_tokens:
        raise InputError("--replacement measures losses: give --loss-tokens")
    if out:
        gs.check_writable(out)
    source, dataset = _text(data)
    opened = shared.open_coders(coders, model)
    if context_size > opened.shape.context:
        context = opened.shape.context
        raise InputError(
            f"--context-size {context_size} is more than the model's context of {context}"
        )
    text = gs.EvaluationText(
        source,
        opened.tokenizer,
        tokens=tokens,
        batch_size=batch_size,
        context_size=context_size,
        seed=seed,
    )
    results = gs.evaluate_coders(
        shared.load_model(opened.model, dtype),
        opened.coders,
        text,
        loss_tokens=loss_tokens,
        replacement=replacement,
        geometry=not skip_geometry,
        out=out,
        dataset=dataset,
    )
    if json:
        shared.print_json([{**r, "eval_result_details": []} for r in results])
    else:
        for part in gs.core_tables(results, shared.screen().width):
            shared.print_whole(part)
    for doubt in gs.core_doubts(results):
        print(f"warning: {doubt}", file=sys.stderr)


def _text(data: gs.TextData) -> tuple[Any, str]:
    """What to read, and its name. Files that are not there show before anything is loaded."""
    if data.files or data.tfds:
        gs.text_files(data.files)
        return data, " ".join(map(os.path.basename, data.files)) or data.tfds
    if data.messages:
        raise InputError("--messages needs --text FILE or --tfds NAME that holds chats")
    print(
        "warning: no --text, so on the bundled sample of 2,600 tokens: too short for small "
        "differences and for rare features",
        file=sys.stderr,
    )
    return gs.sample_documents(), "the bundled sample"
