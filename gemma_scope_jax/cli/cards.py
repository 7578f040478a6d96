"""Feature cards: `cards`."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gemma_scope_jax.cli.shared import (
    BucketFile,
    Coders,
    Dtype,
    Files,
    Folder,
    Name,
    NameOrPlace,
    Place,
    Roles,
    load_all,
)
from gemma_scope_jax.errors import InputError

Export = Literal["saedashboard", "neuronpedia", "anthropic", "anthropic-json"]


def cards(
    coders: Coders,
    *,
    out: Folder,
    text: Files = (),
    messages: Name = "",
    roles: Roles = ("model",),
    field: Name = "text",
    skip_bad: bool = False,
    tokens: int = 1_000_000,
    length: int = 1024,
    store: Folder = "",
    model: NameOrPlace = "",
    dtype: Dtype = "auto",
    compare: Annotated[tuple[Place, ...], tyro.conf.arg(metavar="CODER...")] = (),
    export: tuple[Export, ...] = (),
    top: int = 20,
    groups: int = 5,
    each: int = 5,
    before: int = 11,
    after: int = 4,
    listed: int = 10,
    seed: int = 0,
    explanations: BucketFile = "",
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
        messages: The key under which JSON records hold a chat.
        roles: Whose tokens count in chats.
        field: The key that holds the text in JSON records.
        skip_bad: Leave out records that cannot be used.
        tokens: Read about so many of the text, <bos> included, in whole documents.
        length: Tokens of a row.
        store: Instead of text: a folder that `gemma-scope extract` has filled.
        model: A name, a folder or a file; default: the coders' model.
        dtype: Of the model; auto is the store's or, with text, float32 on a CPU and bfloat16
            elsewhere.
        compare: Other coders, whose decoders are searched for the same features.
        export: Also as files for other programs.
        top: Strongest examples a feature.
        groups: Parts of a feature's range of which random examples are shown.
        each: Random examples for each of them.
        before: Tokens of an example before the one it was chosen for.
        after: Tokens after it.
        listed: Logit tokens, correlated features and neighbours listed.
        seed: Of the random examples.
        explanations: Folder or file of those of one coder, from `gemma-scope explain`; default:
            beside each coder.
        logits: With the final norm's gain 1 + w, or w as in the official notebook.
    """
    if not coders:
        raise InputError("name at least one coder")
    if text and store:
        raise InputError("give --text or --store, not both")
    from gemma_scope_jax.cards.examples import CardSettings
    from gemma_scope_jax.data.document_files import text_files
    from gemma_scope_jax.data.documents import TextData
    from gemma_scope_jax.storage.locks import only_writer
    from gemma_scope_jax.storage.paths import is_remote

    if is_remote(out):
        raise InputError(f"{out}: cards are written to a local folder; copy them from there")
    folder = Path(out).expanduser()
    settings = CardSettings(
        top=top,
        groups=groups,
        each=each,
        before=before,
        after=after,
        bins=8 * groups,
        seed=seed,
        listed=listed,
    )
    data = TextData(files=text, messages=messages, roles=roles, field=field, skip_bad=skip_bad)
    text_files(text)
    others = _load_others(compare)
    published = not (text or store)
    filled = _opened(store) if store else None
    if filled is not None and dtype == "auto":
        dtype = _dtype_of(filled)
    loaded_model, loaded, tok = load_all(model, coders, dtype, with_model=not published)
    wanted = _wanted(loaded, others, folder, explanations)
    with only_writer(folder):
        if not published and filled is None:
            from gemma_scope_jax.extraction.extract import extract

            filled = extract(
                loaded_model, loaded, tok, data, folder / "store", tokens=tokens, length=length
            )
        sources = [_examples(one.coder) if published else filled for one in wanted]
        _make(loaded_model, tok, wanted, sources, settings, logits, export, folder)
    print(f"page: {folder / 'index.html'}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Wanted:
    """A site to make: of the features of a layer of a coder."""

    coder: Any
    layer: int
    name: str  # of its folder
    compared: dict[str, Any]  # other coders by name
    sites: dict[str, str]  # where the pages of those are that get one now
    explained: dict[int, Any]


def _load_others(compare: tuple[str, ...]) -> list[Any]:
    from gemma_scope_jax.coders.load import load_coders

    return list(load_coders(compare, decoder=True)) if compare else []


def _wanted(coders: Any, others: list, out: Path, explanations: str) -> list[_Wanted]:
    """What is to be made. Raises `InputError` for what cannot be, before anything is."""
    from gemma_scope_jax.cards.build import same_layer
    from gemma_scope_jax.coders.coder import public_name
    from gemma_scope_jax.coders.directions import check_comparable

    if explanations and len(coders) > 1:
        raise InputError("--explanations is of one coder, and several are given")
    pairs = [(c, layer) for c in coders for layer in c.layers]
    names = _folders([(public_name(c), layer, len(c.layers) > 1) for c, layer in pairs])
    pages = {(c.info.path, i): f"../{name}/index.html" for (c, i), name in zip(pairs, names)}
    called, wanted = _names(others), []
    for (coder, layer), name in zip(pairs, names):
        _check_free(out / name, coder)
        compared = {n: c for n, c in called.items() if c.info.path != coder.info.path}
        sites = {}
        for n, other in compared.items():
            theirs = same_layer(other, layer)
            check_comparable(coder, layer, other, theirs)
            place = (other.info.path, other.layers[other.source(theirs)])
            sites |= {n: pages[place]} if place in pages else {}
        explained = _explained(coder, layer, explanations)
        wanted.append(_Wanted(coder, layer, name, compared, sites, explained))
    if explanations and not any(one.explained for one in wanted):
        raise InputError(f"--explanations {explanations}: there are none of this coder's features")
    return wanted


def _check_free(folder: Path, coder: Any) -> None:
    """Refuse a folder for the cards of a coder that holds anything else."""
    from gemma_scope_jax.cards.card_files import FILE

    if coder.info.folder and folder.resolve() == Path(coder.info.folder).resolve():
        raise InputError(f"{folder}: is the coder itself; choose another --out")
    made = folder / "cards"
    ours = lambda path: path.parent == made and path.name[0] == "."  # of a run killed at once
    inside = (path for path in folder.rglob("*") if not path.is_dir() and not ours(path))
    if not (made / FILE).is_file() and next(inside, None) is not None:
        raise InputError(f"{folder}: holds something else than cards; choose another --out")


def _explained(coder: Any, layer: int, given: str) -> dict[int, Any]:
    """The explanations of a layer's features, beside the coder or where they are `given`."""
    from gemma_scope_jax.autointerp.explanations import (
        explained_folder,
        layer_folder,
        read_explanations,
    )

    layers = len(coder.layers)
    if layers > 1 and given.endswith(".json"):
        raise InputError("--explanations: of a coder of several layers, give the folder of all")
    folder = given or explained_folder(coder.info)
    return read_explanations(layer_folder(folder, layers, layer), coder.width) if folder else {}


def _examples(coder: Any) -> Path:
    from gemma_scope_jax.cards.published import find_examples
    from gemma_scope_jax.coders.coder import public_name

    if (found := find_examples(coder)) is None:
        raise InputError(
            f"{public_name(coder)}: no examples are published beside it: give --text FILES or "
            "--store FOLDER"
        )
    return found


def _opened(store: str) -> Any:
    from gemma_scope_jax.extraction.store.store import FeatureStore

    given = FeatureStore(store)
    if not given.complete:
        print(f"{store}: not finished; the cards are of {len(given):,} tokens", file=sys.stderr)
    return given


def _dtype_of(filled: Any) -> Any:
    """The dtype of the model that filled a store."""
    from gemma_scope_jax.storage.strict_json import field

    where = f"{filled.folder}, of its model"
    dtype = field(field(filled.manifest, "model", dict, f"{filled.folder}"), "dtype", str, where)
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"{where}: dtype is {dtype!r}, not float32 or bfloat16; extract again")
    return dtype


def _make(model, tok, wanted: list[_Wanted], sources, settings, logits, export, out: Path) -> None:
    """Cards, site and exports of each coder, and of each layer of those of several."""
    from gemma_scope_jax.cards.build import build_cards
    from gemma_scope_jax.cards.site import build_site, write_index

    progress = _progress()
    heads = model.config.heads if model is not None else None
    made = {}
    for one, source in zip(wanted, sources):
        name, folder = one.name, out / one.name
        print(f"cards of {name}", file=sys.stderr)
        made[name] = build_cards(
            source,
            one.coder,
            folder / "cards",
            layer=one.layer,
            model=model,
            tok=tok,
            settings=settings,
            gain=logits,
            compare=one.compared,
            progress=progress,
        )
        build_site(
            made[name], folder, tok, explanations=one.explained, sites=one.sites, progress=progress
        )
        _export(made[name], one.coder, tok, folder, export, heads, one.explained, progress)
    _export_layers(made, tok, out, export, progress)
    write_index(out, list(made))


def _names(coders: list[Any]) -> dict[str, Any]:
    """Coders by name; those of one name with their folder's parent in front."""
    from gemma_scope_jax.coders.coder import public_name

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
    sets = (
        {out: layers}
        if len(layers) == len(made)
        else {out / name: {cards.manifest["layer"]: cards} for name, cards in made.items()}
    )
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
