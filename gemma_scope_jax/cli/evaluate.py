"""`gemma-scope evaluate`."""

import os
import sys

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared
from gemma_scope_jax.cli.text import TextOptions
from gemma_scope_jax.errors import InputError

SAMPLE = "the bundled sample"


def command(
    coders: shared.Coders,
    *,
    model: shared.Model = "",
    data: TextOptions = TextOptions(roles=("system", "user", "model")),
    tokens: int = 100_000,
    loss_tokens: int = 16_000,
    context_size: shared.ContextSize = 256,
    batch_size: int = 4,
    seed: shared.Seed = 0,
    replacement: bool = False,
    skip_geometry: bool = False,
    out: shared.Folder = "",
    json: shared.Json = False,
    dtype: shared.Dtype = "auto",
) -> None:
    """Measure how sparse and faithful coders are, and what they cost the model.

    L0, FVU and its relatives, cosine, L2 ratio, delta loss, CE and KL scores with mean ablation and
    zero ablation (also with <bos> set to zero, as SAELens does), densities, geometry; by position
    in the piece of a document, source file and role. Several coders share one pass of the model and
    are compared.

    Args:
        data: The text. The default is a bundled sample of 2,600 tokens; in chats, the roles are
            compared.
        tokens: Measure the fit of the coders on about this many tokens, <bos> included, in whole
            batches.
        loss_tokens: Run the whole model, changed and unchanged, on about this many of these tokens,
            the first ones, in whole batches.
        batch_size: The number of sequences in a batch.
        replacement: Also measure the model with all the coders in place at once.
        skip_geometry: Leave out the norms and cosines of features, whose time grows with the width
            squared.
        out: Write a JSON document (SAEBench's core schema) and plots for each coder to this folder,
            local or gs://. The same command continues an interrupted one, and measures nothing
            twice.
        json: Print the documents as a JSON list, without their records of single features.
    """
    if out:
        gs.check_writable(out)
    has_text = bool(data.files or data.tfds)
    gs.text_files(data.files)
    if data.messages and not has_text:
        raise InputError("--messages needs --text FILE or --tfds NAME that holds chats")
    name = " ".join(map(os.path.basename, data.files)) or data.tfds or SAMPLE
    opened = shared.open_coders(coders, model)
    text = gs.EvaluationText(
        data if has_text else gs.sample_documents(),
        opened.tokenizer,
        tokens=tokens,
        batch_size=batch_size,
        context_size=context_size,
        seed=seed,
    )
    how = {"loss_tokens": loss_tokens, "replacement": replacement}
    gs.check_evaluation(opened.shape, text, **how)
    if not has_text:
        few = "2,600 tokens: too short for small differences and for rare features"
        print(f"warning: without --text, evaluating on {SAMPLE} of {few}", file=sys.stderr)
    how |= {"geometry": not skip_geometry, "out": out, "dataset": name}
    weights = shared.load_model(opened.model, dtype)
    results = gs.evaluate_coders(weights, opened.coders, text, **how)
    if json:
        shared.print_json([{**r, "eval_result_details": []} for r in results])
    else:
        for part in gs.core_tables(results, shared.screen().width):
            shared.print_whole(part)
    for doubt in gs.core_doubts(results):
        print(f"warning: {doubt}", file=sys.stderr)
