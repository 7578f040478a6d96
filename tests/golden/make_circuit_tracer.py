"""Write what circuit-tracer computes into circuit_tracer.npz: `make golden`.

So that `make test` checks attribution against circuit-tracer's own numbers where torch is not
installed. Both sides draw the model and the dictionaries of golden/circuit_coders.py.
circuit-tracer runs with its nnsight back end in float32; it accepts so small a model as it is, only
its own loading of models from the hub is gone round (`replacement`).

For each dictionary, with `n` active features, `L` layers, `T` tokens and `k` logits; nodes are
features, errors [L, T], tokens and logits, in this order, rows are targets:

    active [n, 3]     layer, position and feature of the active features; activations [n]
    logits, probabilities [k]  of the default targets; adjacency [n + (L + 1) T + k]^2
    few               the targets that FEW_PROBABILITY leaves
    named, named_probabilities, named_rows  the same for targets given as token ids: their rows
    selected          of the active features those that a graph of a third of them has (BUDGET); its
                      adjacency is bit for bit what the whole graph has of them
    scores [2]        replacement and completeness; of prune_graph: node_mask, edge_mask (bits),
                      cumulative
    scaled/...        the same from `selected` on, of right token vectors (see below)
    feature           layer, position, feature and activation of the one that is intervened on
    intervened [2, 2, V]  the last token's logits: PINNED x (set to 0, doubled)

What circuit-tracer 0.5.0 does that one may not expect:

- The vector of a token is its row of the embedding without Gemma's factor sqrt(d_model), while the
  gradient is that of the scaled embedding: effects of tokens are too small by that factor. As the
  selection and the scores depend on them, `scaled/` has them of token vectors that were scaled.
- At position 0 (`<bos>`) there are no features and the error is zero, so what the MLPs write there
  is no node's; only what goes through the transcoders' skip reaches earlier layers.
- The error is what features, skip and b_dec leave of the MLP's output: b_dec, like b_enc, is no
  node's either. The skip is linear and gradients go through it, at position 0 too.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "support")]

from circuit_tracer.attribution.attribute import attribute  # noqa: E402
from circuit_tracer.graph import compute_graph_scores, prune_graph  # noqa: E402
from circuit_tracer.replacement_model.replacement_model_nnsight import NNSightReplacementModel  # noqa: E402
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt  # noqa: E402
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

import gemma_scope_jax as gs  # noqa: E402
from golden.circuit_coders import DICTIONARIES, TARGETS, circuit_coders, circuit_model  # noqa: E402
from golden.peer import peer_model  # noqa: E402
from golden.weights import checksum, stored  # noqa: E402

USED = {"max_n_logits": 10, "desired_logit_prob": 0.95}
FEW_PROBABILITY = 0.1
BUDGET = {"batch_size": 4, "update_interval": 2}  # and a third of the active features
PRUNE = {"node_threshold": 0.8, "edge_threshold": 0.98}
NEAR = 1e-4  # no feature may be so near its threshold that rounding decides
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
# What an intervention leaves as it was: attention, or attention, MLPs and norms. Without either,
# circuit-tracer counts the prompt's tokens by its tokenizer, and takes texts only.
PINNED = ({"constrained_layers": None}, {"constrained_layers": range(8)})


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer of made-up words: attribute() decodes ids and asks which of them are special."""
    words = ["<pad>", "<eos>", "<bos>", *(f"word{i}" for i in range(3, vocab))]
    table = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(table), **special)


def transcoders(name: str):
    """A dictionary as circuit-tracer loads it, from the folder that we write."""
    coders = circuit_coders(name)
    shared = {**HOOKS, **CPU, "scan": name, "lazy_encoder": False, "lazy_decoder": False}
    with tempfile.TemporaryDirectory() as folder:
        gs.save_circuit_tracer(coders, folder)
        if name == "clt":
            return load_clt(folder, **shared)
        files = {i: f"{folder}/layer_{i}.safetensors" for i in range(len(coders))}
        return load_transcoder_set(files, **shared)


def replacement(name: str) -> tuple[NNSightReplacementModel, torch.Tensor]:
    """circuit-tracer's model of a dictionary and the token ids [T].

    This is what its `from_config` does, but for the weights, which that draws itself, and the
    tokenizer, which that loads from the hub by the config's name.
    """
    config, params, ids = circuit_model()
    peer = peer_model(config, params)
    peer.config.architectures = ["Gemma3ForCausalLM"]
    peer.config.name_or_path = config.name
    model = NNSightReplacementModel(peer, tokenizer=tokenizer(config.vocab), dispatch=True)
    model._hf_config = peer.config
    model._configure_replacement_model(transcoders(name))
    return model, torch.from_numpy(ids[0]).long()


class Scaled:
    """`model` with the token vectors that Gemma has: times sqrt(d_model)."""

    def __init__(self, model: NNSightReplacementModel) -> None:
        self.model = model

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def setup_attribution(self, ids: torch.Tensor):
        context = self.model.setup_attribution(ids)
        context.token_vectors = context.token_vectors * self.model.cfg.d_model**0.5
        return context


def condensed(model, ids: torch.Tensor, graph) -> dict[str, np.ndarray]:
    """What a budget selects of a whole graph's features, its scores, and what pruning leaves."""
    n, nodes = len(graph.active_features), len(graph.adjacency_matrix)
    part = attribute(ids, model, **USED, **BUDGET, max_feature_nodes=n // 3)
    kept = torch.cat([part.selected_features, torch.arange(n, nodes)])
    assert torch.equal(part.adjacency_matrix, graph.adjacency_matrix[kept][:, kept])
    pruned = prune_graph(graph, **PRUNE)
    return {
        "selected": part.selected_features.numpy().astype(np.int32),
        "scores": np.array(compute_graph_scores(graph)),
        "node_mask": pruned.node_mask.numpy(),
        "edge_mask": np.packbits(pruned.edge_mask.numpy()),
        "cumulative": pruned.cumulative_scores.numpy(),
    }


def graphs(model: NNSightReplacementModel, ids: torch.Tensor) -> dict[str, np.ndarray]:
    whole = attribute(ids, model, **USED)
    few = attribute(ids, model, **{**USED, "desired_logit_prob": FEW_PROBABILITY})
    named = attribute(ids, model, attribution_targets=torch.tensor(TARGETS))
    n, logits = len(whole.active_features), len(whole.logit_targets)
    assert torch.equal(few.adjacency_matrix[:n, :n], whole.adjacency_matrix[:n, :n])
    scaled = condensed(Scaled(model), ids, attribute(ids, Scaled(model), **USED))
    return {
        "active": whole.active_features.numpy().astype(np.int32),
        "activations": whole.activation_values.numpy(),
        "logits": whole.logit_token_ids.numpy(),
        "probabilities": whole.logit_probabilities.numpy(),
        "adjacency": stored(whole.adjacency_matrix.numpy(), bits=20),
        "few": few.logit_token_ids.numpy(),
        "named": named.logit_token_ids.numpy(),
        "named_probabilities": named.logit_probabilities.numpy(),
        "named_rows": named.adjacency_matrix[-len(TARGETS) :, : -len(TARGETS)].numpy(),
        **condensed(model, ids, whole),
        **{f"scaled/{key}": array for key, array in scaled.items()},
        **interventions(model, ids, whole, whole.adjacency_matrix[-logits, :n]),
    }


def interventions(model, ids, graph, effects) -> dict[str, np.ndarray]:
    """Of the feature that does most to the first logit, of layers 2 to 4 and before the last token,
    which it reaches through attention only."""
    layers, positions, _ = graph.active_features.T
    among = (layers > 1) & (layers < 5) & (positions < len(ids) - 1)
    found = int((effects.abs() * among).argmax())
    layer, position, feature = graph.active_features[found].tolist()
    value = float(graph.activation_values[found])
    logits = [
        [
            model.feature_intervention(ids, [(layer, position, feature, factor * value)], **pinned)
            for factor in (0.0, 2.0)
        ]
        for pinned in PINNED
    ]
    return {
        "feature": np.array([layer, position, feature, value]),
        "intervened": np.array([[out[0, -1].numpy() for out, _ in pair] for pair in logits]),
    }


def check_margins(model: NNSightReplacementModel, ids: torch.Tensor) -> None:
    _, before = model.get_activations(ids, apply_activation_function=False)
    margin = float((before[:, 1:] - 0.43).abs().min())
    assert margin > NEAR, f"a feature is {margin:.1e} from its threshold: draw with another seed"


def golden(name: str) -> dict[str, np.ndarray]:
    """circuit-tracer's numbers for one dictionary; keys are prefixed with its name."""
    model, ids = replacement(name)
    check_margins(model, ids)
    arrays = graphs(model, ids)
    print(name, {key: array.shape for key, array in arrays.items()}, arrays["scores"])
    about = {"used": USED, "few": FEW_PROBABILITY, "budget": BUDGET, "prune": PRUNE}
    about["checksum"] = checksum(circuit_coders(name))
    return {
        f"{name}/about": np.array(json.dumps(about)),
        **{f"{name}/{key}": array for key, array in arrays.items()},
    }


if __name__ == "__main__":
    _, params, ids = circuit_model()
    stored = {"ids": ids, "checksum": np.array(checksum(params))}
    for dictionary in DICTIONARIES:
        stored |= golden(dictionary)
    file = HERE / "circuit_tracer.npz"
    np.savez_compressed(file, **stored)
    print(f"{file}: {file.stat().st_size:,} bytes")
