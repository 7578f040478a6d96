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
    data: TextOptions = TextOptions(),
    tokens: int = 1_000_000,
    context_size: int = 1024,
    store: shared.Folder = "",
    model: shared.Model = "",
    dtype: shared.Dtype = "auto",
    compare: Compare = (),
    export: tuple[Export, ...] = (),
    settings: CardOptions = CardOptions(),
    explanations: shared.BucketFile = "",
    logits: Literal["exact", "notebook"] = "exact",
) -> None:
    """Show what every feature of a coder is about, as a web site that opens from the disk.

    Text is run through the model first (into FOLDER/store), unless a store of features is given;
    without either, the examples published beside the coder are shown. The same command goes on
    after an interruption. FOLDER/index.html lists the coders.

    Args:
        out: The folder for the store, the cards, the sites and the exports.
        data: The text.
        tokens: Read about so many tokens of the text, <bos> included, in whole documents.
        context_size: The tokens of a sequence.
        store: Show features from this folder, which `gemma-scope extract` has filled, instead of
            reading text.
        dtype: The dtype of the model; auto is the store's or, with text, float32 on a CPU and
            bfloat16 elsewhere.
        compare: Search the decoders of these coders for the same features.
        export: Also write files for these programs.
        settings: What a card holds.
        explanations: Show the explanations of one coder from this folder or file, which
            `gemma-scope explain` wrote. The default is beside each coder.
        logits: Compute logit tokens with the final norm's gain 1 + w, or w as in the official
            notebook.
    """
    has_text = bool(data.files or data.tfds)
    if has_text and store:
        raise InputError("give --text or --store, not both")
    gs.check_writable(out)
    gs.text_files(data.files)
    filled = _opened(store) if store else None
    if filled is not None and dtype == "auto":
        dtype = gs.store_dtype(filled)
    opened = shared.open_coders(coders, model)
    sites = gs.plan_card_sites(
        opened.coders,
        out,
        compare=gs.load_coders(compare, decoder=True) if compare else (),
        explanations=explanations,
        published=not (has_text or store),
    )
    weights = shared.load_model(opened.model, dtype) if has_text or store else None

    def extracted() -> gs.FeatureStore:
        folder = Path(out, "store")
        return gs.extract(
            weights,
            opened.coders,
            opened.tokenizer,
            data,
            folder,
            tokens=tokens,
            context_size=context_size,
        )

    page = gs.build_card_sites(
        sites,
        out,
        opened.tokenizer,
        extracted if has_text else filled,
        model=weights,
        settings=settings,
        gain=logits,
        export=export,
    )
    print(f"page: {page}")


def _opened(store: str) -> gs.FeatureStore:
    found = gs.FeatureStore(store)
    if not found.complete:
        print(f"{store}: not finished; the cards are of {len(found):,} tokens", file=sys.stderr)
    return found
