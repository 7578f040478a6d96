"""The feature cards of several coders as one web site, planned first and then built.

    sites = plan_card_sites([coder], "out")
    build_card_sites(sites, "out", tokenizer, store, model=model)

A coder of several layers has a site for each. Planning finds all mistakes before text is read and
the model is loaded.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_scope_jax.autointerp.explanations import Explanation
from gemma_scope_jax.cards.build import build_cards, same_layer
from gemma_scope_jax.cards.card_files import FILE, FeatureCards
from gemma_scope_jax.cards.examples import CardSettings
from gemma_scope_jax.cards.export.anthropic import export_anthropic, export_anthropic_json
from gemma_scope_jax.cards.export.neuronpedia import export_neuronpedia
from gemma_scope_jax.cards.export.saedashboard import export_saedashboard
from gemma_scope_jax.cards.known import explained_layer
from gemma_scope_jax.cards.published import find_examples
from gemma_scope_jax.cards.site import build_site, write_index
from gemma_scope_jax.coders.coder import Coder, public_name
from gemma_scope_jax.coders.directions import Gain, check_comparable
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.extraction.store.store import FeatureStore
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.storage.locks import only_writer
from gemma_scope_jax.storage.paths import expanded, is_remote

LOG = logging.getLogger(__name__)
EXPORTS = ("saedashboard", "neuronpedia", "anthropic", "anthropic-json")


@dataclasses.dataclass(frozen=True, eq=False)
class CardSite:
    """A site to make: of the features of one layer of a coder."""

    coder: Coder
    layer: int
    name: str  # of its folder
    examples: Path | None  # published beside the coder, for use without a store
    compared: Mapping[str, Coder]  # other coders by name
    sites: Mapping[str, str]  # pages of compared coders that are made, too
    explained: Mapping[int, Explanation]


def plan_card_sites(
    coders: Sequence[Coder],
    folder: str | os.PathLike,
    *,
    compare: Sequence[Coder] = (),
    explanations: str | os.PathLike = "",
    published: bool = False,
) -> tuple[CardSite, ...]:
    """Plan the sites for `build_card_sites` to make in `folder`, which is local.

    compare       other coders, whose decoders are searched for the same features
    explanations  folder or file, for one coder; default: beside each coder
    published     show the examples published beside the coders, without a store
    Raises `InputError` for coders that cannot be compared, folders with anything but cards,
    explanations of other features, and coders without published examples.
    """
    if not coders:
        raise InputError("name at least one coder")
    explanations = os.fspath(explanations)
    if explanations and len(coders) > 1:
        raise InputError(f"{explanations}: explains one coder, but several are given")
    out = _local(folder)
    pairs = [(c, layer) for c in coders for layer in c.layers]
    names = _folders(pairs)
    pages = {(c.info.path, i): f"../{name}/index.html" for (c, i), name in zip(pairs, names)}
    called, planned = [public_name(coder) for coder in compare], []
    long = lambda coder: "/".join(Path(coder.info.path).parts[-2:])  # of namesakes
    others = {n if called.count(n) == 1 else long(c): c for n, c in zip(called, compare)}
    for (coder, layer), name in zip(pairs, names):
        _check_free(out / name, coder)
        compared = {n: c for n, c in others.items() if c.info.path != coder.info.path}
        sites = {}
        for n, other in compared.items():
            theirs = same_layer(other, layer)
            check_comparable(coder, layer, other, theirs)
            place = (other.info.path, other.layers[other.source(theirs)])
            sites |= {n: pages[place]} if place in pages else {}
        explained = explained_layer(coder, layer, explanations, len(coder.layers))
        examples = find_examples(coder) if published else None
        planned.append(CardSite(coder, layer, name, examples, compared, sites, explained))
    if explanations and not any(one.explained for one in planned):
        raise InputError(f"{explanations}: holds no explanations of this coder's features")
    return tuple(planned)


def build_card_sites(
    sites: Sequence[CardSite],
    folder: str | os.PathLike,
    tokenizer: Tokenizer,
    store: FeatureStore | Callable[[], FeatureStore] | None = None,
    *,
    model: Model | None = None,
    settings: CardSettings | None = None,
    gain: Gain = "exact",
    export: Sequence[str] = (),
) -> Path:
    """Make the planned cards, sites and exports; returns the path of the page that lists them.

    store   a `FeatureStore`, or a function that fills one; None: the examples published beside
            each coder
    model   for the logit tokens; None: cards of a store have none
    gain    for the logit tokens: the final norm's 1 + w ("exact"), or w as in the official
            notebook ("notebook")
    export  formats of `EXPORTS` to write, too
    The same call resumes an interrupted one. Raises `InputError`.
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
            if source is None:
                raise InputError(f"{one.name}: give a store, or plan its site with published=True")
            place = out / one.name
            cards = made[one.name] = build_cards(
                source,
                one.coder,
                place / "cards",
                layer=one.layer,
                model=model,
                tokenizer=tokenizer,
                settings=settings,
                gain=gain,
                compare=one.compared,
            )
            build_site(cards, place, tokenizer, explanations=one.explained, sites=one.sites)
            if "saedashboard" in export:
                folder = place / "saedashboard"
                export_saedashboard(cards, one.coder, tokenizer, folder, heads=heads)
            if "neuronpedia" in export:
                more: dict[str, Any] = {"heads": heads, "explanations": one.explained}
                export_neuronpedia(cards, one.coder, tokenizer, place / "neuronpedia", **more)
        layers = {cards.manifest["layer"]: cards for cards in made.values()}
        sets = {out: layers}  # for graph viewers, all in one folder unless a layer is there twice
        if len(layers) < len(made):
            sets = {out / name: {cards.manifest["layer"]: cards} for name, cards in made.items()}
        for folder, layers in sets.items():
            if "anthropic" in export:
                export_anthropic(layers, tokenizer, folder / "anthropic")
            if "anthropic-json" in export:
                export_anthropic_json(layers, tokenizer, folder / "anthropic-json")
        write_index(out, made)
    return out / "index.html"


def _local(folder: str | os.PathLike) -> Path:
    if is_remote(folder):
        raise InputError(f"{folder}: cards are written to a local folder; copy them from there")
    return expanded(folder)


def _check_free(folder: Path, coder: Coder) -> None:
    """Raise `InputError` for a folder that holds anything but the cards of a coder."""
    if coder.info.folder and folder.resolve() == Path(coder.info.folder).resolve():
        raise InputError(f"{folder}: is the coder itself; choose another folder")
    made = folder / "cards"
    ours = lambda path: path.parent == made and path.name[0] == "."  # left by a killed run
    inside = (path for path in folder.rglob("*") if not path.is_dir() and not ours(path))
    if not (made / FILE).is_file() and next(inside, None) is not None:
        raise InputError(f"{folder}: holds something other than cards; choose another folder")


def _folders(pairs: Sequence[tuple[Coder, int]]) -> list[str]:
    """The name of a folder for each coder and layer."""
    names = []
    for coder, layer in pairs:
        short = re.sub(r"[^A-Za-z0-9._-]+", "__", public_name(coder)).strip("._") or "coder"
        names.append(f"{short}-layer-{layer}" if len(coder.layers) > 1 else short)
    if len(set(names)) < len(names):
        names = [f"{name}-{number}" for number, name in enumerate(names)]
    return names
