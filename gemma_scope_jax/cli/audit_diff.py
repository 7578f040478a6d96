"""`gemma-scope audit diff`."""

import json as json_module
from typing import Annotated

from tyro.conf import Positional, arg

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared
from gemma_scope_jax.cli.text import TextOptions

Base = Annotated[shared.Place, Positional, arg(metavar="BASE", help="The model to compare with.")]
Other = Annotated[shared.Place, Positional, arg(metavar="OTHER", help="The model to be looked at.")]


def command(
    base: Base,
    other: Other,
    *,
    data: TextOptions = TextOptions(roles=("system", "user", "model")),
    texts: int = 256,
    coder: shared.NameOrPlace = "",
    search: int = 32_768,
    seed: int = 0,
    out: shared.Folder = "",
    json: shared.Json = False,
    dtype: shared.Dtype = "auto",
) -> None:
    """Compare two models: where they part, in which weights, and after which words.

    Both models, of one architecture, run on text. Shown are the KL divergence of their next tokens,
    the change of the loss, the places where they part most, the weights that differ with the rank
    of the change, and candidates for a trigger, each tested in neutral texts beside random words. A
    trigger that no text holds is searched for among the words of the vocabulary.

    Args:
        data: The text. Without any, the models write some themselves and answer some questions.
        texts: The number of texts, of which the first 128 tokens are used.
        coder: Also compare the features of this coder: an address, a folder or a packaged coder.
        search: The number of frequent words in which a trigger is searched for; 0: only the texts.
        out: Write diff.json and diff.txt to this folder, local or gs://.
        json: Print the result as JSON.
    """
    if out:
        gs.check_writable(out)
    gs.text_files(data.files)
    name, config, tokenizer = gs.open_model(base)
    opened = shared.open_coders(coder, name) if coder else None
    models = [shared.load_model(m, dtype) for m in (name, other)]
    if data.files or data.tfds:
        rows = gs.text_pieces(data, tokenizer, texts, seed=seed)
    else:
        rows = gs.model_texts(*models, tokenizer, min(texts, 64), seed=seed)
        rows += gs.model_answers(*models, tokenizer, min(texts, 48), seed=seed)
    one = None if opened is None else opened.coders[0]
    found = gs.diff_models(*models, tokenizer, rows, coder=one, search=search, seed=seed)
    if out:
        folder = gs.folder_path(out)
        gs.write_text(folder / "diff.json", json_module.dumps(found.as_dict()) + "\n")
        gs.write_text(folder / "diff.txt", f"{found}\n")
    shared.print_result(found, found.as_dict(), json)
