"""The feature cards of any coders as one web site: what is to be made, checked, and then made.

    sites = plan_card_sites([coder], "out")
    build_card_sites(sites, "out", tokenizer, store, model=model)

A coder of several layers has a site for each. Planning reads no text and no weights of the model,
so that whatever cannot be made is known before they are loaded.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gemma_scope_jax.autointerp.explanations import (
    Explanation,
    explained_folder,
    layer_folder,
    read_explanations,
)
from gemma_scope_jax.cards.build import build_cards, same_layer
from gemma_scope_jax.cards.card_files import FILE, FeatureCards
from gemma_scope_jax.cards.examples import CardSettings
from gemma_scope_jax.cards.export.anthropic import export_anthropic, export_anthropic_json
from gemma_scope_jax.cards.export.neuronpedia import export_neuronpedia
from gemma_scope_jax.cards.export.saedashboard import export_saedashboard
from gemma_scope_jax.cards.published import find_examples
from gemma_scope_jax.cards.site import build_site, write_index
from gemma_scope_jax.coders.coder import Coder, public_name
from gemma_scope_jax.coders.directions import Gain, check_comparable
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.storage.locks import only_writer
from gemma_scope_jax.storage.paths import is_remote

LOG = logging.getLogger(__name__)
CardExport = Literal["saedashboard", "neuronpedia", "anthropic", "anthropic-json"]
EXPORTS = ("saedashboard", "neuronpedia", "anthropic", "anthropic-json")


@dataclasses.dataclass(frozen=True, eq=False)
class CardSite:
    """A site to make: of the features of one layer of a coder."""

    coder: Coder
    layer: int
    name: str  # of its folder
    examples: Path | None  # those published beside the coder, where there is no store
    compared: Mapping[str, Coder]  # other coders by name
    sites: Mapping[str, str]  # where the pages of those are that get one now
    explained: Mapping[int, Explanation]


def plan_card_sites(
    coders: Sequence[Coder],
    folder: str | os.PathLike,
    *,
    compare: Sequence[Coder] = (),
    explanations: str | os.PathLike = "",
    published: bool = False,
) -> tuple[CardSite, ...]:
    """What `build_card_sites` is to make in `folder`, which is local.

    compare       other coders, whose decoders are searched for the same features
    explanations  folder or file of those of one coder; default: beside each coder
    published     show the examples published beside the coders, so that no store is needed
    Raises `InputError` for coders that cannot be compared, folders that hold something else than
    cards, explanations of nothing, and coders beside which no examples are published.
    """
    if not coders:
        raise InputError("name at least one coder")
    explanations = os.fspath(explanations)
    if explanations and len(coders) > 1:
        raise InputError("--explanations is of one coder, and several are given")
    out = _local(folder)
    pairs = [(c, layer) for c in coders for layer in c.layers]
    names = _folders([(public_name(c), layer, len(c.layers) > 1) for c, layer in pairs])
    pages = {(c.info.path, i): f"../{name}/index.html" for (c, i), name in zip(pairs, names)}
    called, planned = _names(compare), []
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
        examples = _examples(coder) if published else None
        planned.append(CardSite(coder, layer, name, examples, compared, sites, explained))
    if explanations and not any(one.explained for one in planned):
        raise InputError(f"--explanations {explanations}: there are none of this coder's features")
    return tuple(planned)


def build_card_sites(
    sites: Sequence[CardSite],
    folder: str | os.PathLike,
    tokenizer: Tokenizer,
    store: Any = None,
    *,
    model: Model | None = None,
    settings: CardSettings | None = None,
    gain: Gain = "exact",
    export: Sequence[str] = (),
) -> Path:
    """Make cards, sites and exports of what was planned; the path of the page that lists them.

    store   a `FeatureStore`, or a function that fills one; None: the examples published beside
            each coder
    model   for the logit tokens; None: cards of a store have none
    gain    how they are computed: with the final norm's gain 1 + w ("exact"), or w as in the
            official notebook ("notebook")
    export  of `EXPORTS`: also as files for other programs
    The same call goes on where an interrupted one was. Raises `InputError`.
    """
    for name in export:
        if name not in EXPORTS:
            raise InputError(f"no export {name!r}{nearest(name, EXPORTS)}")
    out, heads = _local(folder), None if model is None else model.config.heads
    made: dict[str, FeatureCards] = {}
    with only_writer(out):
        store = store() if callable(store) else store
        for one in sites:
            LOG.info("cards of %s", one.name)
            source = store if one.examples is None else one.examples
            cards = made[one.name] = build_cards(
                source,
                one.coder,
                out / one.name / "cards",
                layer=one.layer,
                model=model,
                tokenizer=tokenizer,
                settings=settings,
                gain=gain,
                compare=one.compared,
            )
            build_site(
                cards, out / one.name, tokenizer, explanations=one.explained, sites=one.sites
            )
            _export(cards, one, tokenizer, out / one.name, export, heads)
        _export_layers(made, tokenizer, out, export)
        write_index(out, list(made))
    return out / "index.html"


def _local(folder: str | os.PathLike) -> Path:
    if is_remote(folder):
        raise InputError(f"{folder}: cards are written to a local folder; copy them from there")
    return Path(folder).expanduser()


def _check_free(folder: Path, coder: Coder) -> None:
    """Refuse a folder for the cards of a coder that holds anything else."""
    if coder.info.folder and folder.resolve() == Path(coder.info.folder).resolve():
        raise InputError(f"{folder}: is the coder itself; choose another --out")
    made = folder / "cards"
    ours = lambda path: path.parent == made and path.name[0] == "."  # of a run killed at once
    inside = (path for path in folder.rglob("*") if not path.is_dir() and not ours(path))
    if not (made / FILE).is_file() and next(inside, None) is not None:
        raise InputError(f"{folder}: holds something else than cards; choose another --out")


def _explained(coder: Coder, layer: int, given: str) -> dict[int, Explanation]:
    """The explanations of a layer's features, beside the coder or where they are `given`."""
    layers = len(coder.layers)
    if layers > 1 and given.endswith(".json"):
        raise InputError("--explanations: of a coder of several layers, give the folder of all")
    folder = given or explained_folder(coder.info)
    return read_explanations(layer_folder(folder, layers, layer), coder.width) if folder else {}


def _examples(coder: Coder) -> Path:
    if (found := find_examples(coder)) is None:
        raise InputError(
            f"{public_name(coder)}: no examples are published beside it: give --text FILES or "
            "--store FOLDER"
        )
    return found


def _names(coders: Sequence[Coder]) -> dict[str, Coder]:
    """Coders by name; those of one name with their folder's parent in front."""
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


def _export(
    cards: FeatureCards,
    one: CardSite,
    tokenizer: Tokenizer,
    folder: Path,
    export: Sequence[str],
    heads: Any,
) -> None:
    """The files that hold the features of one coder's layer."""
    if "saedashboard" in export:
        export_saedashboard(cards, one.coder, tokenizer, folder / "saedashboard", heads=heads)
    if "neuronpedia" in export:
        more = {"heads": heads, "explanations": one.explained}
        export_neuronpedia(cards, one.coder, tokenizer, folder / "neuronpedia", **more)


def _export_layers(
    made: Mapping[str, FeatureCards], tokenizer: Tokenizer, out: Path, export: Sequence[str]
) -> None:
    """Files for graph viewers: of all layers together where each is there once."""
    layers = {cards.manifest["layer"]: cards for cards in made.values()}
    sets = (
        {out: layers}
        if len(layers) == len(made)
        else {out / name: {cards.manifest["layer"]: cards} for name, cards in made.items()}
    )
    for folder, some in sets.items():
        if "anthropic" in export:
            export_anthropic(some, tokenizer, folder / "anthropic")
        if "anthropic-json" in export:
            export_anthropic_json(some, tokenizer, folder / "anthropic-json")
