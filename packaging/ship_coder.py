"""Turn the coders of a training run into coders that ship: int8 weights, labels, figures.

    python packaging/ship_coder.py RUN/coders/*/* [--tokens 200000] [--other news.txt] [--no-labels]
        [--notes notes.md]

Writes for each gemma_scope_jax/packaged/NAME/: the weights and config in the published layout, but
for int8 matrices (params.safetensors, config.json), and label material (labels.json.zst). Of a
single coder also the recipe and the card (train_config.json, README.md, curves.png) with figures on
the held-out text and on text of other kinds (figures.json) and notes on what the text was and how
the run went; several coders share one card, packaged/transcoders.md, and one recipe beside it, with
what all of them together cost the model. Snippets come only from texts whose licence lets them be
shipped: Jane Austen's novels (public domain), Wikipedia leads (CC BY-SA), the Python manual and
library (PSF).
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import gemma_scope_jax as gs
from gemma_scope_jax.cards.labels import build_labels, write_labels
from gemma_scope_jax.data.documents import read_documents
from gemma_scope_jax.evaluation.evaluate import EvaluationPlan, measure, text_batches
from gemma_scope_jax.evaluation.figures import Losses

CORPUS = Path(os.environ.get("CORPUS", "~/.cache/gemma-scope-corpus")).expanduser()
OTHER_TOKENS = 41_000  # of each further text
SUITE = "transcoders"  # what the coders of one run share: SUITE.md and the recipe
ROW = ("L0", "FVU", "typical", "never fired", "delta loss")
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


def name_of(coder) -> str:
    """As the published folders are named, with the model and the site before."""
    width = f"{coder.width // 1024}k" if coder.width % 1024 == 0 else coder.width
    kind = coder.reads.replace("_", "-") if coder.writes == coder.reads else "transcoder"
    skip = "" if coder.w_skip is None else "-affine"
    return f"gemma-3-270m-{kind}-{coder.layer}-width-{width}-l0-{coder.info.l0:g}{skip}"


def figures(
    model, coders, tok, path: Path, tokens: int, loss_tokens: int
) -> tuple[list[dict], Losses | None]:
    """Figures on a text: how each fits on `tokens`, what it costs on the first `loss_tokens`; and
    what several coders cost together."""
    documents = read_documents([str(path)])
    documents = [documents[i][:4000] for i in np.random.default_rng(0).permutation(len(documents))]
    batches = list(text_batches(tok, documents, context_size=512))
    some = lambda tokens: batches[: -(-tokens // batches[0].tokens.size)]
    together = len(coders) > 1  # their card has no scores against zeros
    ablations = () if together else ("zero", "zero everywhere")
    fits = measure(model, coders, some(tokens), EvaluationPlan(loss_tokens=0))
    plan = EvaluationPlan(ablations=ablations, replacement=together)
    costs = measure(model, coders, some(loss_tokens), plan)
    names = ("loss", "delta_loss", "loss_recovered", "loss_recovered_saelens")
    each = [
        fit.metrics().as_dict()
        | {name: cost.metrics().as_dict()[name] for name in names}
        | {"text": path.stem}
        for fit, cost in zip(fits.tallies, costs.tallies)
    ]
    return each, costs.replacement.losses() if costs.replacement else None


def card_section(found: list[dict]) -> str:
    """A coder's figures on several texts, as a section of its card."""
    number = lambda value, form: "" if value is None else format(value, form)
    rows = [
        "| text | tokens | L0 | FVU | typical tokens | never fired | delta loss | CE score | "
        "SAELens' |",
        "| --- " * 9 + "|",
    ]
    for f in found:
        tokens = "" if f["loss"] is None else f" on {f['loss']['tokens']:,}"
        cells = [
            f["text"],
            f"{f['tokens']:,}",
            f"{f['l0']:.1f}",
            f"{f['fvu']:.3f}",
            f"{f['typical']['fvu']:.3f}",
            f"{f['dead']:,} of {f['features']:,}",
            number(f["delta_loss"], "+.2f") + tokens,
            number(f.get("loss_recovered"), ".3f"),
            number(f.get("loss_recovered_saelens"), ".3f"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return (
        "## On text it was not trained on\n\n" + "\n".join(rows) + "\n\nFVU with and without "
        "(typical tokens) the rare tokens of enormous norm; delta loss in nats; CE score against "
        "zeros that leave `<bos>` alone, and against SAELens' zeros, which stand there, too.\n"
    )


def copy_card(source: Path, folder: Path) -> None:
    """Copy the card of a trained coder, with its curves and its recipe."""
    for name in ("README.md", "curves.png", "train_config.json"):
        if (source / name).exists():
            shutil.copy(source / name, folder)
    compact(folder / "train_config.json")


def compact(recipe: Path) -> None:
    """Write a recipe anew without white space."""
    if recipe.exists():
        whole = json.loads(recipe.read_text(encoding="utf-8"))
        recipe.write_text(json.dumps(whole, separators=(",", ":")) + "\n", encoding="utf-8")


def suite_card(coders, found: list[list[dict]], costs: list[Losses], notes: str) -> str:
    """One card for the coders of a run, a row each, by their figures on several texts."""
    first, texts = coders[0], [figures[0]["text"] for figures in found]
    head = [
        "layer",
        *(f"{text}: {ROW[0]}" if i == 0 else name for text in texts for i, name in enumerate(ROW)),
    ]
    rows = [f"| {' | '.join(head)} |", "| ---: " * len(head) + "|"]
    for coder, *figure in zip(coders, *found):
        cells = [str(coder.layer)]
        for f in figure:
            cells += [f"{f['l0']:.1f}", f"{f['fvu']:.3f}", f"{f['typical']['fvu']:.3f}"]
            cells += [str(f["dead"]), "" if f["delta_loss"] is None else f"{f['delta_loss']:+.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    mean = lambda figure, text: np.mean([f[figure] for f in found[text]])
    whole = "\n".join(
        f"- {text}: mean L0 {mean('l0', i):.1f}, mean FVU {mean('fvu', i):.3f}; in place of all "
        f"MLPs they cost {cost.delta:+.2f} nats on {cost.tokens:,} tokens, and the model's first "
        f"choice stays on {cost.agreement:.0%}"
        for i, (text, cost) in enumerate(zip(texts, costs))
    )
    return (
        f"# {len(coders)} coders of one run\n\nEach reads `{first.reads}` and writes "
        f"`{first.writes}`; {first.width} features, target L0 {first.info.l0:g}; the whole recipe "
        f"is in [{SUITE}_train_config.json]({SUITE}_train_config.json).\n\n"
        + "\n".join(rows)
        + f"\n\nFVU with and without (typical) the rare outlier tokens; delta loss in nats, each "
        f"coder alone. All {len(coders)} at once:\n\n{whole}\n\n{notes}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN/coders/FOLDER")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--loss-tokens", type=int, default=16_000)
    parser.add_argument("--other", type=Path, nargs="*", default=[], metavar="TEXT")
    parser.add_argument("--notes", type=Path, help="Markdown that ends each card")
    parser.add_argument("--labels", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    tok = gs.load_tokenizer("gemma-3-270m")
    model = gs.load_model("gemma-3-270m", dtype="bfloat16")
    packaged = Path(gs.__file__).parent / "packaged"
    with tempfile.TemporaryDirectory(dir=packaged.parent) as temporary:
        shipped = []
        for source in args.folders:
            coder = gs.load_coder(source)
            folder = Path(temporary) / name_of(coder)
            coder = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), coder)
            gs.save_coder(coder, folder, int8=True)
            if len(args.folders) == 1:
                copy_card(source, folder)
            shipped.append((folder, gs.load_coder(folder)))
        coders = [coder for _, coder in shipped]
        texts = [(CORPUS / "eval" / "heldout_mix.txt", args.tokens)]
        texts += [(path, OTHER_TOKENS) for path in args.other]
        measured = [figures(model, coders, tok, p, n, args.loss_tokens) for p, n in texts]
        found, costs = [list(part) for part in zip(*measured)]
        notes = args.notes.read_text(encoding="utf-8") if args.notes else ""
        if len(shipped) > 1:
            card = suite_card(coders, found, costs, notes)
            (packaged / f"{SUITE}.md").write_text(card, encoding="utf-8")
            recipe = packaged / f"{SUITE}_train_config.json"
            shutil.copy(args.folders[0] / "train_config.json", recipe)
            compact(recipe)
        for (folder, coder), (figure, *others) in zip(shipped, zip(*found)):
            if len(shipped) == 1:
                content = figure | {"other_texts": others}
                (folder / "figures.json").write_text(json.dumps(content, indent=1) + "\n")
                with open(folder / "README.md", "a", encoding="utf-8") as card:
                    card.write("\n" + card_section([figure, *others]))
                    card.write("\n" + notes if notes else "")
            shown = {k: figure[k] for k in ("l0", "fvu", "dead", "delta_loss")}
            print(folder.name, json.dumps(shown), flush=True)
            if args.labels:
                write_labels(build_labels(model, coder, tok, some_texts(args.tokens)), folder)
        for folder, _ in shipped:  # what was there stays until all is made
            shutil.rmtree(packaged / folder.name, ignore_errors=True)
            shutil.move(folder, packaged)


if __name__ == "__main__":
    main()
