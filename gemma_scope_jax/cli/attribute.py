"""`gemma-scope attribute`."""

import dataclasses
from typing import Annotated

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared

GROUPS, HEADS = 6, 200  # on the page: pinned supernodes, and links whose heads are listed
PACKAGED_TRANSCODERS = "gemma-3-270m-transcoder-*"
Prompt = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT", help_behavior_hint="")
]
Names = Annotated[tuple[shared.Place, ...], tyro.conf.arg(metavar="CODER...")]
Tokens = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOKEN...", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True)
class AttributionOptions(shared.Options, gs.AttributionSettings):
    """What the graph takes in."""

    max_feature_nodes: int | None = 4096


def command(
    prompt: Prompt = "",
    *,
    coders: Names = (PACKAGED_TRANSCODERS,),
    model: shared.Model = "",
    file: shared.File = None,
    target: Tokens = (),
    minus: Annotated[str, tyro.conf.arg(metavar="TOKEN", help_behavior_hint="")] = "",
    settings: AttributionOptions,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    out: Annotated[shared.LocalPlace | None, tyro.conf.arg(metavar="FOLDER")] = None,
    paths: int = 10,
    validate: int = 32,
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
        coders: A transcoder for each layer, or a CLT: addresses, folders, packaged coders, globs.
        file: Read the prompt from this file.
        target: Explain the logits of these next tokens. The default is the likeliest ones.
        minus: Explain instead the difference: the target's logit less the logit of this token.
        node_threshold: Show the nodes that have this share of all influence.
        edge_threshold: Show the links that have this share of the shown nodes' influence.
        out: Write graph.html (a page that opens from the disk), graph.npz and graph.json here.
        paths: Print this many paths.
        validate: Ablate this many features, and compare the changes with the graph's predictions.
        plan: Only print what it would take: features, bytes, products, time.
        mesh: Spread the work over this many devices. The default is one device.
    """
    text = shared.given_text(prompt, file)
    # of a CLT's decoder only the rows of active features are read
    opened = shared.open_coders(coders, model, decoders=False)
    wanted = [gs.Target.logit(token) for token in target] or None
    if minus and not target:
        raise gs.InputError("--minus needs --target: it explains a difference of two logits")
    if minus:
        wanted = [t - gs.Target.logit(minus) for t in wanted or ()]
    if out is not None:
        gs.check_writable(out / "graph.html")
    tok, how = opened.tokenizer, dataclasses.asdict(settings)
    ids, how = tok.encode(text), {"tokenizer": tok, **how}
    gs.check_thresholds(node_threshold, edge_threshold)
    if min(paths, validate) < 0:
        raise gs.InputError("--paths and --validate are numbers, 0 for none")
    if validate and any(coder.k for coder in opened.coders):
        raise gs.InputError("features of TopK coders cannot be ablated one by one: --validate 0")
    gs.check_attribution(opened.shape, opened.coders, ids, wanted, **how)
    if plan:
        spread = None if mesh is None else gs.make_mesh(*mesh)
        kind = shared.dtype_of(dtype)
        given = {"dtype": kind, "mesh": spread, **dataclasses.asdict(settings)}
        found = gs.plan_attribution(opened.shape, opened.coders, len(ids), **given)
        shared.print_result(found, dataclasses.asdict(found), json)
        return
    weights = shared.load_model(opened.model, dtype, mesh)
    graph = gs.attribute(weights, opened.coders, ids, wanted, **how)
    shown = graph.prune(node_threshold, edge_threshold)
    known = gs.feature_details(weights, opened.coders, tok, shown)
    shown = gs.label_graph(shown, known)
    groups, checked = gs.find_supernodes(shown, opened.coders), None
    if validate and graph.selected:
        with shared.stage("comparing the graph with the model"):
            checked = graph.validate(weights, opened.coders, top=validate)
    report = gs.report_graph(graph, shown, paths=paths, groups=groups, validation=checked)
    shared.print_result(report, report.as_dict(), json)
    if out is None:
        return
    graph.save(out / "graph.npz")
    with shared.stage("finding the heads behind the links"):
        heads = gs.link_heads(weights, opened.coders, shown, most_links=HEADS)
    notes, pinned = report.tables(), groups.largest(GROUPS)
    page = gs.graph_page(shown, details=known, heads=heads, groups=pinned, notes=notes)
    gs.write_text(out / "graph.html", page)
    shown.save(out / "graph.json")
    if not json:
        print(f"page      {out / 'graph.html'}")
