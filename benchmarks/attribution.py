"""Attribution graphs: `attribute` against circuit-tracer's, its nnsight back end, in float32.

    make peers && .venv/bin/python benchmarks/attribution.py [--features 5800] [--rounds 3]

The model is the real Gemma 3 270M, the prompt "The capital of the state containing Dallas is". The
dictionaries are affine transcoders of width 2,048 for each of the 18 layers, drawn by numpy: an
encoder of random directions, the threshold that lets some 5,800 features through on this prompt in
all, decoders and a skip in proportion to what the MLPs write. Both sides load them from one folder
in circuit-tracer's format, are given token ids, and explain every active feature: a graph of some
6,000 nodes. circuit-tracer runs with a batch of 256 and holds its weights in memory.

Before any time is taken the graphs are compared: features and logits are the same, and effects
within 1e-4 of the largest. circuit-tracer's effects of tokens are multiplied by sqrt(D) first: its
token vectors lack the embedding's scale. `first` is the first graph of a process, compilation
included; `next` the first of another prompt, longer by a token; `ours` and `peer` are medians
of later graphs of the first prompt. All are seconds, peaks are GB of resident memory.

The floor is the products that no row can go without, at the best float32 matmul rate measured on
either side: its gradient through W_o, W_v and the skip of every layer below, at the positions that
it sees, and the product with each source there.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from sides import ROOT, Side, serve

PROMPT = "The capital of the state containing Dallas is"
ANOTHER = "The capital of the state where Dallas lies is"
L, D, HEADS, KV_HEADS, HEAD, WIDTH = 18, 640, 4, 1, 256, 2048
TIE = 1e-4  # of the largest effect
KINDS = {"feature": 0, "error": 1, "token": 2, "logit": 3}
PRODUCT = (2048, D, 2048)  # its rate is the floor's


def flops(active: np.ndarray, logits: int, length: int) -> float:
    """Of the rows of all active features [n, (layer, position, feature)], and of the logits."""
    through = 2.0 * (HEADS * HEAD * D + KV_HEADS * HEAD * D + D * D)  # a layer at a position
    there = np.zeros((L + 1, length))
    np.add.at(there, (active[:, 0], active[:, 1]), 1)
    there[:L] += 1  # errors
    before = np.cumsum(np.cumsum(there, 0) - there, 1)  # sources of lower layers, [L + 1, T]
    layer = np.append(active[:, 0], [L] * logits)
    position = np.append(active[:, 1], [length - 1] * logits)
    seen = position + 1.0
    sources = before[layer, position] + seen  # tokens
    return float((layer * seen * through + 2 * D * sources).sum())


def best(product) -> float:
    """The matmul rate, flops/s, of the fastest of ten runs of a product."""
    product()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return 2 * np.prod(PRODUCT, dtype=float) / min(times)


def memory() -> float:
    """The largest resident size of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def token_ids(line: str) -> list[int]:
    return [int(token) for token in line.split(",")]


# ---- the dictionaries ------------------------------------------------------------------------


def drawn(layer: int, x: np.ndarray, y: np.ndarray, features: int) -> dict[str, Any]:
    """A transcoder's arrays, from an MLP's input and output [tokens, D]: `features` are active.

    The threshold lies in the middle between two pre-activations, so that rounding moves none over.
    """
    rng = np.random.default_rng(layer)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    w_enc = normal(D, WIDTH)
    w_enc /= np.linalg.norm(w_enc, axis=0)
    z = x @ w_enc
    ranked = np.sort(z, axis=None)[::-1]
    threshold = ranked[features - 1 : features + 1].mean()
    f = z * (z > threshold)
    size = lambda a: np.sqrt((a**2).sum(-1).mean())
    return {
        "w_enc": w_enc,
        "b_enc": np.zeros(WIDTH, np.float32),
        "threshold": np.full(WIDTH, threshold, np.float32),
        "w_dec": normal(WIDTH, D) * np.float32(size(y) / size(f) / D**0.5),
        "b_dec": y.mean(0),
        "w_skip": normal(D, D) * np.float32(0.1 * size(y) / size(x) / D**0.5),
    }


def prepare(args) -> None:
    """Write the model and the dictionaries, in a process whose memory is not counted."""
    import gemma_scope_jax as gs
    from gemma_scope_jax.coders.sparse_coder import SparseCoder
    from gemma_scope_jax.model.checkpoints.huggingface import save_huggingface

    def write() -> list[list[int]]:
        """The token ids of both prompts."""
        model = gs.load_model("gemma-3-270m", dtype="float32")
        save_huggingface(model, Path(args.folder) / "model")
        tok = gs.load_tokenizer("gemma-3-270m")
        ids = [np.asarray(tok.encode(text)).tolist() for text in (PROMPT, ANOTHER)]
        reads = gs.run(
            model, np.array(ids[:1]), [gs.capture("mlp_in"), gs.capture("mlp_out")]
        ).reads
        x, y = (np.asarray(reads[site])[:, 0, 1:] for site in ("mlp_in", "mlp_out"))
        coders = [
            SparseCoder(
                **drawn(layer, x[layer], y[layer], args.features // L),
                layer=layer,
                reads="mlp_in",
                writes="mlp_out",
            )
            for layer in range(L)
        ]
        gs.save_circuit_tracer(coders, Path(args.folder) / "coders")
        return ids

    serve({"write": write})


# ---- the sides -------------------------------------------------------------------------------


def keys(kind, layer, position, feature) -> np.ndarray:
    """One number for each node."""
    columns = np.broadcast_arrays(kind, layer, position, feature)
    kind, layer, position, feature = (np.asarray(c, np.int64) for c in columns)
    return ((kind * 100 + layer) * 10_000 + position) * 1_000_000 + feature


def ours(args) -> None:
    import jax
    import jax.numpy as jnp

    import gemma_scope_jax as gs

    model = gs.load_model("gemma-3-270m", dtype="float32")
    coders = gs.load_coders(Path(args.folder) / "coders")
    quiet = lambda done, of: None

    def attribute(ids: str, file: str = "") -> float:
        start = time.perf_counter()
        graph = gs.attribute(
            model, coders, np.array(token_ids(ids)), batch_size=args.batch_size, progress=quiet
        )
        seconds = time.perf_counter() - start
        if file:
            np.savez(
                file,
                sources=node_keys(graph.sources),
                targets=node_keys(graph.targets),
                effects=graph.effects,
            )
        return seconds

    a, w = jnp.ones(PRODUCT[:2]), jnp.ones(PRODUCT[1:])
    product = jax.jit(lambda a, w: jnp.matmul(a, w))
    rate = lambda: best(lambda: product(a, w).block_until_ready())
    serve({"attribute": attribute, "peak": memory, "matmul": rate})


def node_keys(nodes) -> np.ndarray:
    """Of our nodes; the layers of tokens and logits say nothing, nor do the tokens' own ids."""
    kind = np.array([KINDS[kind] for kind in nodes.kind.tolist()])
    layer = np.where(kind <= KINDS["error"], nodes.layer, 0)
    feature = np.where((kind == KINDS["feature"]) | (kind == KINDS["logit"]), nodes.feature, 0)
    return keys(kind, layer, nodes.position, feature)


def peer(args) -> None:
    import torch
    from circuit_tracer.attribution.attribute import attribute as attribute_peer

    model = replacement(Path(args.folder))

    def attribute(ids: str, file: str = "") -> float:
        start = time.perf_counter()
        graph = attribute_peer(torch.tensor(token_ids(ids)), model, batch_size=args.batch_size)
        seconds = time.perf_counter() - start
        if file:
            np.savez(file, **peer_arrays(graph))
        return seconds

    a, w = torch.ones(PRODUCT[:2]), torch.ones(PRODUCT[1:])
    serve({"attribute": attribute, "peak": memory, "matmul": lambda: best(lambda: a @ w)})


def replacement(folder: Path):
    """circuit-tracer's model, made as by its `from_config`; it only needs a tokenizer to decode."""
    import torch
    from circuit_tracer.replacement_model.replacement_model_nnsight import NNSightReplacementModel
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
    from tokenizers import Tokenizer, models
    from transformers import Gemma3ForCausalLM, PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    words = {word: i for i, word in enumerate(special.values())}
    table = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    transcoders = load_transcoder_set(
        {i: str(folder / "coders" / f"layer_{i}.safetensors") for i in range(L)},
        scan="",
        feature_input_hook="mlp.hook_in",
        feature_output_hook="hook_mlp_out",
        device=torch.device("cpu"),
        lazy_encoder=False,
        lazy_decoder=False,
    )
    inner = Gemma3ForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager"
    )
    model: Any = NNSightReplacementModel(
        inner.eval(),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=table, **special),
        dispatch=True,
    )
    model._hf_config = inner.config
    model._configure_replacement_model(transcoders)
    return model


def peer_arrays(graph) -> dict[str, Any]:
    """Nodes and effects as ours are: targets x sources, and tokens at the embedding's scale."""
    length = len(graph.input_tokens)
    layer, position, feature = graph.active_features.numpy().T
    places = np.arange(length)
    logits = graph.logit_token_ids.numpy()
    features = keys(KINDS["feature"], layer, position, feature)
    errors = keys(KINDS["error"], np.repeat(np.arange(L), length), np.tile(places, L), 0)
    tokens = keys(KINDS["token"], 0, places, 0)
    n, sources = len(features), len(features) + len(errors) + length
    whole = graph.adjacency_matrix.numpy()
    effects = np.concatenate([whole[:n, :sources], whole[-len(logits) :, :sources]])
    effects[:, -length:] *= np.float32(D**0.5)
    return {
        "sources": np.concatenate([features, errors, tokens]),
        "targets": np.concatenate([features, keys(KINDS["logit"], 0, length - 1, logits)]),
        "effects": effects,
        "active": graph.active_features.numpy(),
    }


# ---- the comparison --------------------------------------------------------------------------


def compare_graphs(ours_file: Path, peer_file: Path) -> tuple[float, int]:
    """(largest difference of effects, of the largest effect; nodes that only one of them has).

    A node that only one has must not count: of ours, such as errors at `<bos>`, those of no effect.
    """
    mine, theirs = np.load(ours_file), np.load(peer_file)
    index, counts = [], 0
    for axis, name in enumerate(("targets", "sources")):
        both, i, j = np.intersect1d(mine[name], theirs[name], return_indices=True)
        index.append((i, j))
        for graph in (mine, theirs):
            alone = ~np.isin(graph[name], both)
            effects = np.moveaxis(graph["effects"], axis, 0)[alone]
            counts += int(alone.sum()) if axis == 0 else int(effects.any(1).sum())
    (rows, their_rows), (columns, their_columns) = index
    a = mine["effects"][np.ix_(rows, columns)]
    b = theirs["effects"][np.ix_(their_rows, their_columns)]
    return float(np.abs(a - b).max() / np.abs(b).max()), counts


def compare(args, folder: Path) -> dict:
    given: list = ["--folder", folder, "--features", args.features]
    given += ["--batch-size", args.batch_size]
    start = lambda python, role: Side(python, __file__, role, *given, HF_HUB_OFFLINE="1")
    first = start(sys.executable, "prepare")
    prompt, another = (",".join(map(str, ids)) for ids in first.ask("write"))
    first.close()
    sides = {"ours": start(sys.executable, "ours"), "peer": start(args.peers, "peer")}
    files = {role: folder / f"{role}.npz" for role in sides}
    firsts = {role: side.ask("attribute", prompt, files[role]) for role, side in sides.items()}
    apart, alone = compare_graphs(files["ours"], files["peer"])
    active = np.load(files["peer"])["active"]
    nexts = {role: side.ask("attribute", another) for role, side in sides.items()}
    times: dict[str, list[float]] = {role: [] for role in sides}
    for _ in range(args.rounds):
        for role, side in sides.items():
            times[role].append(side.ask("attribute", prompt))
    peaks = {role: side.ask("peak") for role, side in sides.items()}
    rate = max(side.ask("matmul") for side in sides.values())
    for side in sides.values():
        side.close()
    seconds = {role: statistics.median(some) for role, some in times.items()}
    logits = len(np.load(files["peer"])["targets"]) - len(active)
    floor = flops(active, logits, prompt.count(",") + 1) / rate
    for role in sides:
        print(
            f"{role}: {seconds[role]:.2f} s, the first graph {firsts[role]:.2f} s, the first of "
            f"another prompt {nexts[role]:.2f} s; peak {peaks[role]:.2f} GB"
        )
    print(
        f"{len(active)} active features; {alone} nodes differ, effects by {apart:.1e} of the "
        f"largest; matmul {rate / 1e9:.0f} GFLOP/s, so the floor is {floor:.2f} s"
    )
    return {
        "name": "attribution-float32",
        "ours": seconds["ours"],
        "peer": seconds["peer"],
        "ratio": seconds["peer"] / seconds["ours"],
        "ratio_first": firsts["peer"] / firsts["ours"],
        "ratio_next": nexts["peer"] / nexts["ours"],
        "floor_share": floor / seconds["ours"],
        "ours_peak": peaks["ours"],
        "peer_peak": peaks["peer"],
        "features": len(active),
        "agree": alone == 0 and apart < TIE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=5800, help="active ones of the prompt")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers/bin/python")
    parser.add_argument("--role", choices=("prepare", "ours", "peer"))
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.role:
        return {"prepare": prepare, "ours": ours, "peer": peer}[args.role](args)
    if not args.peers.exists():
        raise SystemExit(f"{args.peers} is missing: run `make peers` first")
    with tempfile.TemporaryDirectory() as folder:
        row = compare(args, Path(folder))
    print(json.dumps(row))
    return None


if __name__ == "__main__":
    main()
