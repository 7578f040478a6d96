"""`gemma-scope inspect`."""

from typing import Annotated

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared

Text = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]


def command(
    text: Text = "",
    *,
    model: shared.NameOrPlace = "",
    coder: shared.NameOrPlace = shared.PACKAGED_CODER,
    file: shared.File = None,
    top_k: int = 5,
    json: shared.Json = False,
    html: shared.File = None,
    explanations: shared.BucketFile = "",
    dtype: shared.Dtype = "auto",
) -> None:
    """Show what a model and a coder see in a text.

    The next tokens, the features of each token, L0, FVU and delta loss.

    Args:
        text: The text to look at; "-" reads standard input.
        model: The model: a name, a Hugging Face folder, a .gguf file or an official checkpoint. The
            default is the coder's model.
        coder: The coder: an address of the release, a folder, or a packaged coder.
        file: Read the text from this file.
        top_k: List this many features for each token.
        html: Also write one self-contained web page to this file.
        explanations: Show these explanations of the features, from `gemma-scope explain`. The
            default is explanations.json beside the coder, if it exists.
    """
    text = shared.given_text(text, file)
    if html is not None:
        gs.check_writable(html)
    opened = shared.open_coders(coder, model, one_layer=True)
    (loaded,) = opened.coders
    gs.check_text(opened.shape, loaded, opened.tokenizer, text, top_k=top_k)
    known = gs.read_explanations(explanations or gs.explained_folder(loaded.info), loaded.width)
    about = {"labels": gs.read_labels(loaded.info.folder, loaded.width), "explanations": known}
    weights = shared.load_model(opened.model, dtype)
    with shared.stage("compiling and running (programs compiled before come from the cache)"):
        seen = gs.inspect_text(weights, loaded, opened.tokenizer, text, top_k=top_k, **about)
    if html is not None:
        gs.write_text(html, gs.inspection_page(seen))
    if json:
        shared.print_json(seen.as_dict())
        return
    wide = shared.screen()
    for part in gs.inspection_tables(seen, wide.width):
        wide.print(part)
    if html is not None:
        print(f"page: {html}")
