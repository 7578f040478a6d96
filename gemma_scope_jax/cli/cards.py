"""`gemma-scope cards`."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared
from gemma_scope_jax.cli.text import TextOptions
from gemma_scope_jax.errors import InputError

Export = Literal["saedashboard", "neuronpedia", "anthropic", "anthropic-json"]
Compare = Annotated[tuple[shared.Place, ...], tyro.conf.arg(metavar="CODER...")]


@dataclasses.dataclass(frozen=True)
class CardOptions(shared.Options, gs.CardSettings):
    """What a card holds."""


def command(
    coders: shared.Coders,
    *,
    out: shared.Folder,
    data: TextOptions,
    tokens: int = 1_000_000,
    context_size: shared.ContextSize = 1024,
    store: shared.Folder = "",
    model: shared.Model = "",
    dtype: shared.Dtype = "auto",
    compare: Compare = (),
    export: tuple[Export, ...] = (),
    settings: CardOptions,
    explanations: shared.BucketFile = "",
    logits: Literal["exact", "notebook"] = "exact",
) -> None:
    """Show what every feature of a coder is about, as a web site that opens from the disk.

    The text is first run through the model (into FOLDER/store), unless a feature store is given;
    without either, the examples published beside the coder are shown. The same command continues an
    interrupted one. FOLDER/index.html lists the coders.

    Args:
        out: The folder for the store, the cards, the sites and the exports.
        tokens: Read about this many tokens of the text, <bos> included, in whole documents.
        store: Show the features in this folder, as filled by `gemma-scope extract`, instead of
            reading text.
        dtype: The dtype of the model; auto is the store's or, with text, float32 on a CPU and
            bfloat16 elsewhere.
        compare: Search the decoders of these coders for the same features.
        export: Also write files for these programs.
        explanations: Show the explanations of one coder from this folder or file, as written by
            `gemma-scope explain`. The default is beside each coder.
        logits: Compute logit tokens with the final norm's gain 1 + w, or with w as the official
            notebook does.
    """
    has_text = bool(data.files or data.tfds)
    if has_text and store:
        raise InputError("give --text or --store, not both")
    gs.check_writable(out)
    gs.text_files(data.files)
    filled = gs.FeatureStore(store) if store else None
    if filled is not None:
        dtype = gs.store_dtype(filled) if dtype == "auto" else dtype
        if not filled.complete:
            print(f"{store}: unfinished; the cards cover {len(filled):,} tokens", file=sys.stderr)
    opened = shared.open_coders(coders, model)
    sites = gs.plan_card_sites(
        opened.coders,
        out,
        compare=gs.load_coders(compare, decoder=True) if compare else (),
        explanations=explanations,
        published=not (has_text or store),
    )
    weights = shared.load_model(opened.model, dtype) if has_text or store else None
    given = (weights, opened.coders, opened.tokenizer, data, Path(out, "store"))
    read = lambda: gs.extract(*given, tokens=tokens, context_size=context_size)
    source = read if has_text else filled
    how = {"model": weights, "settings": settings, "gain": logits, "export": export}
    print(f"page: {gs.build_card_sites(sites, out, opened.tokenizer, source, **how)}")
