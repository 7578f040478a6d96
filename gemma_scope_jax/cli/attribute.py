"""`gemma-scope attribute`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared

GROUPS, HEADS = 6, 200  # on the page: pinned supernodes, and links whose heads are listed
PACKAGED_TRANSCODERS = "gemma-3-270m-transcoder-*"
NEURONS = "neurons"
Prompt = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT", help_behavior_hint="")
]
Names = Annotated[tuple[shared.Place, ...], tyro.conf.arg(metavar="CODER...")]
Tokens = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOKEN...", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True)
class AttributionOptions(shared.Options, gs.AttributionSettings):
    """What the graph takes in."""

    max_feature_nodes: int | None = 4096
    """Explain this many features, those of most influence; None for all."""


def command(
    prompt: Prompt = "",
    *,
    coders: Names = (PACKAGED_TRANSCODERS,),
    model: shared.Model = "",
    file: shared.File = None,
    messages: shared.Name = "",
    target: Tokens = (),
    minus: Annotated[str, tyro.conf.arg(metavar="TOKEN", help_behavior_hint="")] = "",
    settings: AttributionOptions,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    out: Annotated[shared.LocalPlace | None, tyro.conf.arg(metavar="FOLDER")] = None,
    paths: int = 10,
    validate: int = 32,
    explanations: shared.Folder = "",
    cards: shared.Folder = "",
    mesh: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="DATA MODEL")] = None,
    dtype: shared.Dtype = "auto",
    plan: bool = False,
    json: shared.Json = False,
) -> None:
    """Explain why a model continues a prompt as it does: an attribution graph.

    The strongest paths from the prompt's tokens through features to the next token, how much the
    features account for, and whether ablating them changes the model as the graph says.

    Args:
        prompt: The prompt; "-" reads standard input. `<bos>` is put before it.
        coders: A transcoder for each layer, or a CLT: addresses, folders, packaged coders, globs;
            "neurons" for the model's own MLP neurons.
        file: Read the prompt from this file.
        messages: FILE is JSON Lines with one object, and the prompt is the chat under this key of
            it. A last message of the model is continued, without its trailing blanks.
        target: Explain the logits of these next tokens. The default is the likeliest ones.
        minus: Explain instead the difference: the target's logit less the logit of this token.
        node_threshold: Show the nodes that have this share of all influence.
        edge_threshold: Show the links that have this share of the shown nodes' influence.
        out: Write graph.html (a page that opens from the disk), graph.npz, graph.json and
            graph-metadata.json here and, with --cards, features/.
        paths: Print this many paths.
        validate: Ablate this many features, and compare the changes with the graph's predictions.
        explanations: Call features by the explanations in this folder's layer_N: each coder is
            explained with `gemma-scope explain --out FOLDER/layer_N`, a CLT with `--out FOLDER`.
            The default is those beside each coder.
        cards: Show examples from this folder, made by `gemma-scope cards`, and write them for the
            viewers of graph.json. The default is the label material beside each coder.
        plan: Only print what it would take: features, bytes, products, time.
        mesh: Spread the work over this many devices. The default is one device.
    """
    said = _said(prompt, file, messages)
    if coders == (NEURONS,) and (explanations or cards):
        says = "--explanations and --cards are of coders' features; neurons have none"
        raise gs.InputError(says)
    nodes, name, shape, tok = _opened(coders, model)
    wanted = [gs.Target.logit(token) for token in target] or None
    if minus and not target:
        raise gs.InputError("--minus needs --target: it explains a difference of two logits")
    if minus:
        wanted = [t - gs.Target.logit(minus) for t in wanted or ()]
    if out is not None:
        gs.check_writable(out / "graph.html")
    ids = tok.encode(said) if isinstance(said, str) else gs.chat_prompt(tok, said)
    how = {"tokenizer": tok, **dataclasses.asdict(settings)}
    gs.check_thresholds(node_threshold, edge_threshold)
    if min(paths, validate) < 0:
        raise gs.InputError("--paths and --validate are numbers, 0 for none")
    if validate and any(coder.k for coder in nodes or ()):
        raise gs.InputError("features of TopK coders cannot be ablated one by one: --validate 0")
    gs.check_attribution(shape, nodes, ids, wanted, **how)
    known = gs.read_known(nodes or (), explanations=explanations, cards=cards)
    if out is not None:
        known.check_feature_folder(out / "features")
    if plan:
        spread = None if mesh is None else gs.make_mesh(*mesh)
        kind = shared.dtype_of(dtype)
        given = {"dtype": kind, "mesh": spread, **dataclasses.asdict(settings)}
        found = gs.plan_attribution(shape, nodes, len(ids), **given)
        shared.print_result(found, dataclasses.asdict(found), json)
        return
    weights = shared.load_model(name, dtype, mesh)
    used = gs.mlp_neurons(weights) if nodes is None else nodes
    graph = gs.attribute(weights, used, ids, wanted, **how)
    shown = graph.prune(node_threshold, edge_threshold)
    features = gs.features_of(shown)
    more = {"names": known.names(features), "examples": known.examples(features, tok)}
    details = gs.feature_details(weights, used, tok, shown, **more)
    shown = gs.label_graph(shown, details)
    groups, checked = gs.find_supernodes(shown, used), None
    if validate and graph.selected:
        with shared.stage("comparing the graph with the model"):
            checked = graph.validate(weights, used, top=validate)
    report = gs.report_graph(graph, shown, paths=paths, groups=groups, validation=checked)
    shared.print_result(report, report.as_dict(), json)
    if out is None:
        return
    files = known.write_feature_files(features, tok, out / "features")
    graph.save(out / "graph.npz")
    heads = {}
    if nodes is not None:  # neurons' links cannot be split over heads
        with shared.stage("finding the heads behind the links"):
            heads = gs.link_heads(weights, used, shown, most_links=HEADS)
    given = {"details": details, "heads": heads, "groups": groups.largest(GROUPS)}
    gs.write_text(out / "graph.html", gs.graph_page(shown, **given, notes=report.tables()))
    given = {"features": out / "features" if files else None, "supernodes": groups.node_ids()}
    gs.export_graph(shown, out, "graph", **given)
    if not json:
        print(f"page      {out / 'graph.html'}")
        print(f"graph     {out / 'graph.npz'}, for viewers {out / 'graph.json'}")


def _said(prompt: str, file: Path | None, messages: str) -> Any:
    """The prompt: a text, or a chat."""
    if not messages:
        return shared.given_text(prompt, file)
    if prompt or file is None:
        raise gs.InputError("--messages needs --file FILE, which holds the chat, and no prompt")
    return gs.read_chat(file, messages)


def _opened(coders: tuple[str, ...], model: str) -> tuple[Any, str, Any, Any]:
    """The coders, None for neurons; the model's name and architecture, and its tokenizer."""
    if coders == (NEURONS,):
        return None, *gs.open_model(model)
    if NEURONS in coders:
        raise gs.InputError(f"--coders: {NEURONS} are the whole MLPs, and stand without coders")
    # of a CLT's decoder only the rows of active features are read
    opened = shared.open_coders(coders, model, decoders=False)
    return opened.coders, opened.model, opened.shape, opened.tokenizer
