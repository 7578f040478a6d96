"""Measuring coders: `evaluate`."""

import os
import sys
from pathlib import Path
from typing import Any

from gemma_scope_jax.cli.shared import (
    Coders,
    Dtype,
    Files,
    Folder,
    Name,
    NameOrPlace,
    Roles,
    load_all,
    print_json,
)
from gemma_scope_jax.errors import InputError


def evaluate(
    coders: Coders,
    *,
    model: NameOrPlace = "",
    text: Files = (),
    tfds: Name = "",
    field: Name = "text",
    messages: Name = "",
    roles: Roles = ("system", "user", "model"),
    skip_bad: bool = False,
    tokens: int = 100_000,
    loss_tokens: int = 16_000,
    length: int = 256,
    rows: int = 4,
    seed: int = 0,
    replacement: bool = False,
    skip_geometry: bool = False,
    out: Folder = "",
    json: bool = False,
    dtype: Dtype = "auto",
) -> None:
    """How sparse and faithful coders are, and what they cost the model: the core figures.

    L0, FVU and its relatives, cosine, L2 ratio, delta loss, CE and KL scores with mean ablation and
    zero ablation (SAELens' zeros stand at <bos>, too), densities, geometry; by position in the
    row's piece of a document, source file and role. Several coders share one pass of the model and
    are compared.

    Args:
        coders: Addresses of the release, folders, packaged coders, or globs of them.
        model: A name, a folder or a file; default: the coders' model.
        text: Text files (.txt, .jsonl, ...) or globs of them; default: a bundled sample of 2,600
            tokens.
        tfds: Instead: a TensorFlow Datasets name.
        field: The key that holds the text in JSON records.
        messages: The key that holds a chat, instead of text.
        roles: Whose tokens count in chats, and are compared; training and extraction count the
            model's alone.
        skip_bad: Leave out records that cannot be used.
        tokens: Read about so many, <bos> included, in whole batches, to measure how they fit.
        loss_tokens: Run the whole model, changed and unchanged, on the first so many of them.
        length: Tokens a row of a batch.
        rows: Rows a batch.
        seed: Of the documents' order.
        replacement: Also measure the model with all the coders in place at once.
        skip_geometry: Leave out norms and cosines of features, whose time grows with width squared.
        out: Write a JSON document (SAEBench's core schema) and plots for each coder here, local or
            gs://; the same command goes on where it was killed, and computes nothing twice.
        json: Print the documents as a JSON list, without their records of single features.
        dtype: Of the model; auto is float32 on a CPU and bfloat16 elsewhere.
    """
    if not coders:
        raise InputError("name at least one CODER (see `gemma-scope list`)")
    if tokens < 1 or loss_tokens < 0:
        raise InputError(f"--tokens {tokens} or --loss-tokens {loss_tokens}: too few")
    if replacement and not loss_tokens:
        raise InputError("--replacement measures losses: give --loss-tokens")
    source, dataset = _text(
        text, tfds=tfds, field=field, messages=messages, roles=roles, skip_bad=skip_bad
    )
    loaded_model, loaded, tok = load_all(model, list(coders), dtype)
    if length > (context := loaded_model.config.context):
        raise InputError(f"--length {length} is more than the model's context of {context}")
    from gemma_scope_jax.evaluation.core import core_config
    from gemma_scope_jax.evaluation.core_run import evaluate_core
    from gemma_scope_jax.evaluation.evaluate import EvaluationPlan
    from gemma_scope_jax.evaluation.figures import ABLATIONS
    from gemma_scope_jax.evaluation.report import print_core, say_doubts
    from gemma_scope_jax.evaluation.texts import EvaluationText

    data = EvaluationText(source, tok, tokens=tokens, rows=rows, length=length, seed=seed)
    plan = EvaluationPlan(
        loss_tokens=loss_tokens, ablations=ABLATIONS, positions=True, groups=data.groups
    )
    config = core_config(data, plan, loaded_model, dataset, not skip_geometry)
    results = evaluate_core(loaded_model, loaded, data, plan, config, out, replacement)
    if json:
        shown = [{**r, "eval_result_details": []} for r in results]
        print_json(shown)
        say_doubts(results)
    else:
        print_core(results)


def _text(files: tuple[str, ...], *, tfds: str, messages: str, **settings: Any) -> tuple[Any, str]:
    """What to read, and its name. Files that are not there show before anything is loaded."""
    from gemma_scope_jax.data.document_files import SEPARATOR, text_files
    from gemma_scope_jax.data.documents import TextData

    if files or tfds:
        text_files(files)
        data = TextData(files=files, tfds=tfds, messages=messages, **settings)
        return data, " ".join(map(os.path.basename, files)) or tfds
    if messages:
        raise InputError("--messages needs --text FILE or --tfds NAME that holds chats")
    print(
        "warning: no --text, so on the bundled sample of 2,600 tokens: too short for small "
        "differences and for rare features",
        file=sys.stderr,
    )
    sample = Path(__file__).parent.parent / "packaged" / "sample.txt"
    return sample.read_text(encoding="utf-8").split(SEPARATOR), "the bundled sample"
