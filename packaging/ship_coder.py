"""Turn a finished training run into a coder that ships: bfloat16 weights, label material, figures.

    python packaging/ship_coder.py RUN gemma-3-270m-resid-post-12-width-4k-l0-50 [--tokens 200000]

Writes gemma_scope_jax/packaged/NAME/: the published layout (params.safetensors, config.json), the
recipe that made it (train_config.json), figures on the held-out text (figures.json), and label
material (labels.json.gz). Snippets come only from texts whose licence lets them be shipped: Jane
Austen's novels (public domain), Wikipedia leads (CC BY-SA), the Python manual and library (PSF).
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import gemma_scope_jax as gs
from gemma_scope_jax.cards.labels import build_labels, write_labels
from gemma_scope_jax.data.text import read_documents
from gemma_scope_jax.evaluation.evaluate import text_batches

CORPUS = Path(os.environ.get("CORPUS", "~/.cache/gemma-scope-corpus")).expanduser()
SOURCES = {
    "Jane Austen": "austen.txt",
    "Wikipedia": "wiki_vital.txt",
    "Python manual": "python_docs.txt",
    "Python library": "python_code.txt",
}


def some_texts(tokens: int):
    """(source, text) pairs, an equal share of each source, about four letters a token."""
    for source, file in SOURCES.items():
        documents = read_documents([str(CORPUS / "train" / file)])
        left = 4 * tokens // len(SOURCES)
        for i in np.random.default_rng(0).permutation(len(documents)):
            if left <= 0:
                break
            yield source, documents[i][:4000]
            left -= len(documents[i][:4000])


def figures(model, coder, tok, tokens: int, loss_tokens: int) -> dict:
    """Held-out figures: how it fits on `tokens`, what it costs on the first `loss_tokens`."""
    documents = read_documents([str(CORPUS / "eval" / "heldout_mix.txt")])
    documents = [documents[i][:4000] for i in np.random.default_rng(0).permutation(len(documents))]
    batches = list(text_batches(tok, documents, length=512))
    per_batch = batches[0][0].size
    fit = gs.evaluate(model, coder, batches[: -(-tokens // per_batch)], delta_loss=False)
    cost = gs.evaluate(model, coder, batches[: -(-loss_tokens // per_batch)], ablation=True)
    costs = {name: cost.as_dict()[name] for name in ("loss", "delta_loss", "loss_recovered")}
    return fit.as_dict() | costs | {"text": "eval/heldout_mix.txt of the corpus"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--loss-tokens", type=int, default=16_000)
    args = parser.parse_args()
    folder = Path(gs.__file__).parent / "packaged" / args.name
    coder = gs.load_coder(args.run / "coder")
    coder = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), coder)
    gs.save_coder(coder, folder)
    shutil.copy(args.run / "config.json", folder / "train_config.json")
    coder = gs.load_coder(folder)
    tok = gs.load_tokenizer("gemma-3-270m")
    model = gs.load_model("gemma-3-270m", dtype="bfloat16")
    found = figures(model, coder, tok, args.tokens, args.loss_tokens)
    (folder / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    write_labels(build_labels(model, coder, tok, some_texts(args.tokens)), folder)
    print(folder)


if __name__ == "__main__":
    main()
