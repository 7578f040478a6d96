"""Looking at a text or a coder: `inspect`, `check`, `list`."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from gemma_scope_jax.cli.shared import (
    PACKAGED_CODER,
    BucketFile,
    Coder,
    Dtype,
    File,
    Name,
    NameOrPlace,
    given_text,
    load_all,
    print_json,
    stage,
)

Text = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]


def inspect(
    text: Text = "",
    *,
    model: NameOrPlace = "",
    coder: NameOrPlace = PACKAGED_CODER,
    file: File = None,
    top_k: int = 5,
    json: bool = False,
    html: File = None,
    explanations: BucketFile = "",
    dtype: Dtype = "auto",
) -> None:
    """What a model and a coder see in a text: next tokens, features a token, L0, FVU, delta loss.

    Args:
        text: The text; "-" reads standard input.
        model: A name, a Hugging Face folder, a .gguf file or an official checkpoint; default: the
            coder's model.
        coder: An address of the release (see `gemma-scope list`), a folder, or a packaged coder.
        file: Read the text from this file instead.
        top_k: Features listed for each token.
        json: Print JSON.
        html: Also write one self-contained web page here.
        explanations: Of the features, from `gemma-scope explain`; default: explanations.json beside
            the coder, if it is there.
        dtype: Of the model; auto is float32 on a CPU and bfloat16 elsewhere.
    """
    text = given_text(text, file)
    loaded_model, (loaded_coder,), tok = load_all(model, coder, dtype, one_layer=True)
    from gemma_scope_jax.autointerp.explanations import explained_folder, read_explanations
    from gemma_scope_jax.cards.labels import read_labels
    from gemma_scope_jax.inspection.inspect_text import inspect_text
    from gemma_scope_jax.inspection.page import inspection_page
    from gemma_scope_jax.inspection.terminal import print_inspection
    from gemma_scope_jax.storage.atomic import write_text

    labels = read_labels(loaded_coder.info.folder, loaded_coder.width)
    known = read_explanations(
        explanations or explained_folder(loaded_coder.info), loaded_coder.width
    )
    with stage("compiling and running (what was compiled before is taken from the cache)"):
        seen = inspect_text(
            loaded_model, loaded_coder, tok, text, top_k=top_k, labels=labels, explanations=known
        )
    if html is not None:
        write_text(html, inspection_page(seen))
    if json:
        print_json(seen.as_dict())
    else:
        print_inspection(seen)
        if html is not None:
            print(f"page: {html}")


def check(
    coder: Coder,
    *,
    model: NameOrPlace = "",
    text: File = None,
    json: bool = False,
    dtype: Dtype = "auto",
) -> int:
    """Does a coder do what it says? Exits with 1 and says why if something looks wrong.

    L0 against its target, FVU, delta loss; and how it fits where its config says, at the
    neighbouring layers and other sites, without the (1 + w) gain, with the skip transposed.

    Args:
        coder: An address of the release, a folder, or a packaged coder.
        model: A name, a folder or a file; default: the coder's model.
        text: A text file (documents separated by a line holding a form feed); default: a bundled
            sample of 2,600 tokens.
        json: Print JSON.
        dtype: Of the model; auto is float32 on a CPU and bfloat16 elsewhere.
    """
    from gemma_scope_jax.data.document_files import SEPARATOR
    from gemma_scope_jax.data.documents import read_documents

    if text is None:
        documents = (Path(__file__).parent.parent / "packaged" / "sample.txt").read_text(
            encoding="utf-8"
        )
        documents, source = documents.split(SEPARATOR), "the bundled sample"
    else:
        documents, source = read_documents([str(text)]), str(text)
    loaded_model, (loaded_coder,), tok = load_all(model, coder, dtype)
    from gemma_scope_jax.evaluation.check import check, print_report
    from gemma_scope_jax.evaluation.evaluate import text_batches

    batches = text_batches(tok, documents, context_size=min(256, loaded_model.config.context))
    with stage("compiling and running"):
        report = check(loaded_model, loaded_coder, batches)
    if json:
        print_json(report.as_dict())
    else:
        print_report(report, loaded_coder, loaded_model.config.name, source)
    return 1 if report.warnings else 0


def list_(
    pattern: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATTERN")] = "*",
    *,
    model: Name = "",
    kind: Name = "",
    layer: int | None = None,
    width: Name = "",
    l0: Name = "",
    affine: bool | None = None,
    json: bool = False,
    limit: int | None = None,
) -> None:
    """List the published coders, offline.

    Args:
        pattern: Part of an address, or a glob: "*-1b-it/transcoder_all/*_16k_*".
        model: 270m, 1b-it, google/gemma-3-1b-pt, ...
        kind: sae, transcoder, crosscoder or clt.
        layer: Among the layers it reads.
        width: 16k, 65k, 262k, 524k or 1m.
        l0: The label of its target L0: small, medium or big.
        affine: With a skip connection, or without.
        json: Print JSON.
        limit: At most so many.
    """
    from gemma_scope_jax.coders.listing import list_coders

    names = {"model": model, "kind": kind, "width": width, "l0": l0}
    given: dict[str, Any] = {key: value or None for key, value in names.items()}
    list_coders(pattern, **given, layer=layer, affine=affine, json=json, limit=limit)
