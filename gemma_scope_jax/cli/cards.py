"""Feature cards: `cards`."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gemma_scope_jax.cli.shared import Coders, Dtype, Files, Folder, Name, load_all
from gemma_scope_jax.errors import InputError

Export = Literal["saedashboard", "neuronpedia", "anthropic", "anthropic-json"]


def cards(
    coders: Coders,
    *,
    out: Folder,
    text: Files = (),
    tokens: int = 1_000_000,
    store: Name = "",
    model: Name = "",
    dtype: Dtype = "auto",
    compare: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CODER...")] = (),
    export: tuple[Export, ...] = (),
    top: int = 20,
    groups: int = 5,
    each: int = 5,
    before: int = 11,
    after: int = 4,
    listed: int = 10,
    seed: int = 0,
    logits: Literal["exact", "notebook"] = "exact",
) -> None:
    """What every feature of a coder is about, as a web site that opens from the disk.

    Text is run through the model first (into FOLDER/store), unless a store of features is given;
    without either, the examples published beside the coder are shown. The same command goes on
    after an interruption. FOLDER/index.html lists the coders.

    Args:
        coders: Addresses of the release, folders, packaged coders, or globs of them.
        out: Folder for the store, the cards, the sites and the exports.
        text: Text files: .txt, .jsonl, .jsonl.gz, .jsonl.zst, .array_record.
        tokens: Of the text, about how many.
        store: Instead of text: a folder that `gemma-scope extract` has filled.
        model: A name, a folder or a file; default: the coders' model.
        dtype: Of the model; auto is float32 on a CPU and bfloat16 elsewhere.
        compare: Other coders, whose decoders are searched for the same features.
        export: Also as files for other programs.
        top: Strongest examples a feature.
        groups: Parts of a feature's range of which random examples are shown.
        each: Random examples for each of them.
        before: Tokens of an example before the one it was chosen for.
        after: Tokens after it.
        listed: Logit tokens, correlated features and neighbours listed.
        seed: Of the random examples.
        logits: With the final norm's gain 1 + w, or w as in the official notebook.
    """
    if not coders:
        raise InputError("name at least one coder")
    if text and store:
        raise InputError("give --text or --store, not both")
    from gemma_scope_jax.buckets import is_remote
    from gemma_scope_jax.cards.examples import CardSettings

    if is_remote(out):
        raise InputError(f"{out}: cards are written to a local folder; copy them from there")
    folder = Path(out).expanduser()
    settings = CardSettings(
        top=top, groups=groups, each=each, before=before, after=after, bins=8 * groups,
        seed=seed, listed=listed,
    )  # fmt: skip
    from gemma_scope_jax.coders.gemma_scope_files import load_coder, matching

    others = [load_coder(name) for given in compare for name in matching(given)]
    published = not (text or store)
    loaded_model, loaded, tok = load_all(model, coders, dtype, with_model=not published)
    source = None if published else _store(loaded_model, loaded, tok, text, store, tokens, folder)
    _make(loaded_model, loaded, tok, source, others, settings, logits, export, folder)
    print(f"page: {folder / 'index.html'}")


def _store(model: Any, coders: list, tok: Any, text: tuple[str, ...], store: str, tokens, out):
    """The feature store to read, filled first if text is given."""
    from gemma_scope_jax.extraction.store import FeatureStore

    if store:
        given = FeatureStore(store)
        if not given.complete:
            print(f"{store}: not finished; the cards are of {len(given):,} tokens", file=sys.stderr)
        return given
    from gemma_scope_jax.data.documents import TextData
    from gemma_scope_jax.extraction.extract import extract

    length = min(1024, model.config.context)
    data, folder = TextData(files=text), out / "store"
    return extract(model, coders, tok, data, folder, tokens=tokens, length=length)


def _make(model, coders, tok, store, others, settings, logits, export, out: Path) -> None:
    """Cards, site and exports of each coder, and of each layer of those of several."""
    from gemma_scope_jax.cards.build import build_cards, public_name
    from gemma_scope_jax.cards.explanations import read_explanations
    from gemma_scope_jax.cards.published import find_examples
    from gemma_scope_jax.cards.site import build_site, write_index
    from gemma_scope_jax.coders.coder import layers_of

    progress = _progress()
    wanted = [(c, layer) for c in coders for layer in layers_of(c)]
    names = _folders([(public_name(c), layer, len(layers_of(c)) > 1) for c, layer in wanted])
    pages = {c.info.path: f"../{n}/index.html" for (c, _), n in zip(wanted, names)}
    called = _names(others)
    sites = {n: pages[c.info.path] for n, c in called.items() if c.info.path in pages}
    heads = model.config.heads if model is not None else None
    made = {}
    for (coder, layer), name in zip(wanted, names):
        print(f"cards of {name}", file=sys.stderr)
        source = find_examples(coder) if store is None else store
        if source is None:
            raise InputError(
                f"{public_name(coder)}: no examples are published beside it: give --text FILES or "
                "--store FOLDER"
            )
        compared = {n: c for n, c in called.items() if c.info.path != coder.info.path}
        made[name] = build_cards(
            source, coder, out / name / "cards", layer=layer, model=model, tok=tok,
            settings=settings, gain=logits, compare=compared, progress=progress,
        )  # fmt: skip
        beside = coder.info.folder if len(layers_of(coder)) == 1 else ""
        explained = read_explanations(beside, coder.width) if beside else {}
        build_site(
            made[name], out / name, tok, explanations=explained, sites=sites, progress=progress
        )
        _export(made[name], coder, tok, out / name, export, heads, explained, progress)
    _export_layers(made, tok, out, export, progress)
    write_index(out, list(made))


def _names(coders: list[Any]) -> dict[str, Any]:
    """Coders by name; those of one name with their folder's parent in front."""
    from gemma_scope_jax.cards.build import public_name

    names = [public_name(coder) for coder in coders]
    long = ["/".join(Path(coder.info.path).parts[-2:]) for coder in coders]
    return {
        name if names.count(name) == 1 else longer: coder
        for name, longer, coder in zip(names, long, coders)
    }


def _folders(named: list[tuple[str, int, bool]]) -> list[str]:
    """A folder's name for each (coder, layer, whether it has several)."""
    names = []
    for name, layer, several in named:
        short = re.sub(r"[^A-Za-z0-9._-]+", "__", name).strip("._") or "coder"
        names.append(f"{short}-layer-{layer}" if several else short)
    if len(set(names)) < len(names):
        names = [f"{name}-{number}" for number, name in enumerate(names)]
    return names


def _export(cards, coder, tok, folder: Path, export, heads, explained, progress) -> None:
    from gemma_scope_jax.cards.export.neuronpedia import export_neuronpedia
    from gemma_scope_jax.cards.export.saedashboard import export_saedashboard

    if "saedashboard" in export:
        export_saedashboard(cards, coder, tok, folder / "saedashboard", progress, heads=heads)
    if "neuronpedia" in export:
        export_neuronpedia(
            cards, coder, tok, folder / "neuronpedia", progress, heads=heads, explanations=explained
        )


def _export_layers(made: dict[str, Any], tok, out: Path, export, progress) -> None:
    """Files for graph viewers: of all layers together where each is there once."""
    from gemma_scope_jax.cards.export.anthropic import export_anthropic, export_anthropic_json

    layers = {cards.manifest["layer"]: cards for cards in made.values()}
    sets = {out: layers} if len(layers) == len(made) else {
        out / name: {cards.manifest["layer"]: cards} for name, cards in made.items()
    }  # fmt: skip
    for folder, some in sets.items():
        if "anthropic" in export:
            export_anthropic(some, tok, folder / "anthropic", progress)
        if "anthropic-json" in export:
            export_anthropic_json(some, tok, folder / "anthropic-json", progress)


def _progress():
    """Says on stderr what is being done, and how far it is."""
    from gemma_scope_jax.progress import Progress

    now: dict[str, Any] = {"what": None}

    def show(what: str, done: int, total: int) -> None:
        if what != now["what"]:
            print(f"{what} ...", file=sys.stderr)
            now.update(what=what, bar=Progress(total, "parts"))
        now["bar"].at(done)

    return show
