"""The GGUF reader against the gguf package (the reference implementation) and against bad files."""

import dataclasses
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGML

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.gguf import open_gguf
from gemma_scope_jax.model.checkpoints.gguf_gemma import gguf_config, gguf_leaf
from gemma_scope_jax.model.checkpoints.packaged import packaged_model
from gemma_scope_jax.model.config import PRESETS, GemmaConfig, abstract_params

TINY = GemmaConfig(
    "tiny",
    layers=2,
    d_model=32,
    d_mlp=64,
    heads=2,
    kv_heads=1,
    head_dim=32,
    window=8,
    query_scale=32**-0.5,
    vocab=48,
    context=64,
)

# Our leaf -> (llama.cpp's name, its shape for TINY in numpy order).
D, M, N, K, H, V = 32, 64, 2, 1, 32, 48
LAYER = {
    "pre_attn_norm": ("attn_norm", (D,)),
    "w_q": ("attn_q", (N * H, D)),
    "w_k": ("attn_k", (K * H, D)),
    "w_v": ("attn_v", (K * H, D)),
    "q_norm": ("attn_q_norm", (H,)),
    "k_norm": ("attn_k_norm", (H,)),
    "w_o": ("attn_output", (D, N * H)),
    "post_attn_norm": ("post_attention_norm", (D,)),
    "pre_mlp_norm": ("ffn_norm", (D,)),
    "w_gate": ("ffn_gate", (M, D)),
    "w_up": ("ffn_up", (M, D)),
    "w_down": ("ffn_down", (D, M)),
    "post_mlp_norm": ("post_ffw_norm", (D,)),
}
OURS = {
    "w_q": (D, N, H),
    "w_k": (D, K, H),
    "w_v": (D, K, H),
    "w_o": (N, H, D),
    "w_gate": (D, M),
    "w_up": (D, M),
    "w_down": (M, D),
}


def tiny_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    for layer in range(TINY.layers):
        shapes |= {f"blk.{layer}.{stem}.weight": shape for stem, shape in LAYER.values()}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def tiny_metadata(c: GemmaConfig = TINY) -> dict[str, object]:
    return {
        "block_count": c.layers,
        "embedding_length": c.d_model,
        "feed_forward_length": c.d_mlp,
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.kv_heads,
        "attention.key_length": c.head_dim,
        "attention.sliding_window": c.window,
        "context_length": c.context,
        "rope.freq_base": c.global_rope_base,
        "rope.scaling.factor": c.global_rope_divisor,
        "attention.layer_norm_rms_epsilon": c.norm_epsilon,
    }


def write_gguf(path: Path, tensors, metadata, quantised=None, arch: str = "gemma3"):
    """`quantised` maps a tensor's name to the GGML type it is stored as; the rest is float32."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name("tiny")
    for key, value in metadata.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{arch}.{key}", value)
    writer.add_token_list([f"t{i}" for i in range(V)])
    writer.add_token_scores([0.0] * V)
    for name, x in tensors.items():
        kind = (quantised or {}).get(name)
        if kind is None:
            writer.add_tensor(name, x)
        else:
            writer.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(tmp_path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_tensors(), tiny_metadata())


def read_everything(path: Path) -> None:
    file = open_gguf(path)
    config = gguf_config(file)
    for leaf in ("embed", "final_norm"):
        gguf_leaf(file, config, leaf, None)
    for layer in range(config.layers):
        for leaf in LAYER:
            gguf_leaf(file, config, leaf, layer)


def test_leaves_are_in_our_layout(tiny):
    tensors, file = tiny_tensors(), open_gguf(tiny)
    config = gguf_config(file)
    np.testing.assert_array_equal(
        gguf_leaf(file, config, "embed", None), tensors["token_embd.weight"]
    )
    norm = tensors["output_norm.weight"] - np.float32(1)
    np.testing.assert_array_equal(gguf_leaf(file, config, "final_norm", None), norm)
    rng = np.random.default_rng(1)
    for layer in range(2):
        for leaf, (stem, shape) in LAYER.items():
            theirs = tensors[f"blk.{layer}.{stem}.weight"]
            ours = gguf_leaf(file, config, leaf, layer)
            assert ours.dtype == np.float32
            if len(shape) == 1:
                np.testing.assert_array_equal(ours, theirs - np.float32(1))
                continue
            # The layouts agree when they are the same linear map: llama.cpp computes theirs @ x.
            assert ours.shape == OURS[leaf]
            x = rng.standard_normal(shape[1], np.float32)
            if leaf == "w_o":
                got = np.einsum("nh,nhd->d", x.reshape(N, H), ours)
            else:
                got = np.tensordot(x, ours, 1).reshape(-1)
            np.testing.assert_allclose(got, theirs @ x, rtol=1e-4, atol=1e-5)


def test_quantised_tensors_and_rows(tmp_path):
    quantised = {
        "token_embd.weight": GGML.Q8_0,
        "blk.0.ffn_up.weight": GGML.Q5_1,
        "blk.1.attn_q.weight": GGML.BF16,
        "blk.1.ffn_down.weight": GGML.F16,
    }
    path = tmp_path / "q.gguf"
    tensors = tiny_tensors()
    write_gguf(path, tensors, tiny_metadata(), quantised)
    file = open_gguf(path)
    for name, kind in quantised.items():
        expected = gguf.quants.dequantize(gguf.quants.quantize(tensors[name], kind), kind)
        assert file.tensors[name].type.name == kind.name
        np.testing.assert_array_equal(file.read(name), expected)
        np.testing.assert_array_equal(file.read(name, slice(5, 17)), expected[5:17])
        np.testing.assert_allclose(expected, tensors[name], atol=0.2)
    assert file.read("token_embd.weight", slice(4, 4)).shape == (0, D)


def test_metadata_and_tensor_table_match_the_reference(tiny):
    file, reference = open_gguf(tiny), gguf.GGUFReader(tiny)
    fields = {k: v for k, v in reference.fields.items() if not k.startswith("GGUF.")}
    assert set(file.metadata) == set(fields)
    for key, field in fields.items():
        got = file.metadata[key]
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == field.contents()
    assert {
        t.name: (tuple(reversed(t.shape.tolist())), t.data_offset) for t in reference.tensors
    } == {name: (info.shape, info.offset) for name, info in file.tensors.items()}


def test_config_of_a_size_of_ones_own(tiny):
    assert gguf_config(open_gguf(tiny)) == TINY


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_config_of_a_published_size_is_the_preset(tmp_path, name):
    c = PRESETS[name]
    tensors = {f"v.blk.{i}": np.ones(1, np.float32) for i in range(c.layers)}
    tensors["token_embd.weight"] = np.ones((c.vocab, 1), np.float32)
    metadata = tiny_metadata(c)
    file = open_gguf(write_gguf(tmp_path / "a.gguf", tensors, metadata))
    assert gguf_config(file) == c
    for key in ("attention.sliding_window", "rope.scaling.factor"):  # absent in some files
        del metadata[key]
    assert gguf_config(open_gguf(write_gguf(tmp_path / "b.gguf", tensors, metadata))) == c
    metadata["rope.freq_base"] = 5000.0
    file = open_gguf(write_gguf(tmp_path / "c.gguf", tensors, metadata))
    with pytest.raises(InputError, match=f"rope.freq_base is 5000.0, but {name} has 1000000.0"):
        gguf_config(file)


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        ("gemma2", {}, "holds a 'gemma2' model"),
        ("gemma3", {"block_count": None}, "gemma3.block_count"),
        ("gemma3", {"block_count": 4_000_000_000}, "block_count is 4000000000"),
        ("gemma3", {"block_count": 1_000_000_000}, "contradictory"),
        ("gemma3", {"attention.head_count": 0}, "head_count is 0"),
        ("gemma3", {"attention.head_count": 3, "attention.head_count_kv": 2}, "contradictory"),
        ("gemma3", {"attention.key_length": 1.5}, "key_length is 1.5"),
        ("gemma3", {"rope.freq_base": float("nan")}, "freq_base is nan"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ],
)
def test_foreign_or_contradictory_metadata(tmp_path, arch, change, message):
    metadata = tiny_metadata() | change
    metadata = {k: v for k, v in metadata.items() if v is not None}
    path = write_gguf(tmp_path / "bad.gguf", tiny_tensors(), metadata, arch=arch)
    with pytest.raises(InputError, match=message):
        gguf_config(open_gguf(path))


def test_missing_misshapen_and_infinite_tensors(tmp_path):
    tensors = tiny_tensors()
    del tensors["blk.1.ffn_up.weight"]
    tensors["blk.0.attn_q.weight"] = np.ones((5, D), np.float32)
    tensors["blk.0.ffn_gate.weight"][3, 4] = np.inf
    tensors["blk.0.ffn_norm.weight"][3] = np.nan
    tensors["token_embd.weight"] = np.ones((V + 16, D), np.float32)  # padded, as image models' are
    file = open_gguf(write_gguf(tmp_path / "bad.gguf", tensors, tiny_metadata()))
    assert gguf_config(file).vocab == V + 16
    assert gguf_leaf(file, TINY, "embed", None).shape == (V, D)
    with pytest.raises(InputError, match=r"no tensor 'blk.1.ffn_up.weight'; did you mean"):
        gguf_leaf(file, TINY, "w_up", 1)
    with pytest.raises(
        InputError, match=r"attn_q.weight has shape \[5, 32\], tiny needs \[64, 32\]"
    ):
        gguf_leaf(file, TINY, "w_q", 0)
    for leaf in ("w_gate", "pre_mlp_norm"):
        with pytest.raises(InputError, match="holds nan or inf"):
            gguf_leaf(file, TINY, leaf, 0)
    wide = gguf_config(open_gguf(write_gguf(tmp_path / "w.gguf", tiny_tensors(), tiny_metadata())))
    with pytest.raises(InputError, match=r"token_embd.weight has shape \[64, 32\], .* \[65, 32\]"):
        gguf_leaf(file, dataclasses.replace(wide, vocab=65), "embed", None)


def test_an_unsupported_quantisation_opens_but_does_not_read(tmp_path):
    path = tmp_path / "q.gguf"
    writer = gguf.GGUFWriter(str(path), "gemma3")
    writer.add_tensor("w", np.zeros((2, 40), np.uint8), raw_dtype=GGML.Q8_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert open_gguf(path).tensors["w"].shape == (2, 32)
    with pytest.raises(InputError, match="w is quantised as Q8_1, which is not supported"):
        open_gguf(path).read("w")


def test_every_truncation_is_an_input_error(tiny, tmp_path):
    data = tiny.read_bytes()
    short = tmp_path / "short.gguf"
    rng = np.random.default_rng(0)
    ends = {*range(64), len(data) - 1, *rng.integers(0, len(data) - 1, 150).tolist()}
    for end in ends:
        short.write_bytes(data[:end])
        with pytest.raises(InputError):
            read_everything(short)


def test_flipped_bytes_raise_input_error_or_nothing(tiny, tmp_path):
    data = np.frombuffer(tiny.read_bytes(), np.uint8)
    header_end = min(info.offset for info in open_gguf(tiny).tensors.values())
    broken = tmp_path / "broken.gguf"
    rng = np.random.default_rng(3)
    refused = 0
    for trial in range(600):
        flipped = data.copy()
        stop = header_end if trial % 3 else len(data)
        at = rng.integers(0, stop, rng.integers(1, 6))
        flipped[at] = rng.integers(0, 256, len(at))
        broken.write_bytes(flipped.tobytes())
        try:
            read_everything(broken)
        except InputError:
            refused += 1
    assert 100 < refused < 600  # flips in the weights' bytes usually make other weights


@pytest.mark.real
def test_the_real_file_opens_quickly():
    start = time.process_time()
    file = open_gguf(packaged_model())
    assert time.process_time() - start < 3  # 0.5 s, of which 0.2 s verify the checksum
    config = gguf_config(file)
    assert config == PRESETS["gemma-3-270m"]
    assert len(file.metadata["tokenizer.ggml.tokens"]) == config.vocab
    shapes = abstract_params(config)
    for leaf in LAYER:
        x = gguf_leaf(file, config, leaf, 17)
        assert x.shape == getattr(shapes.blocks, leaf).shape[1:]
    embed = file.read("token_embd.weight", slice(5000, 5010))
    assert embed.shape == (10, 640) and 0.01 < embed.std() < 1


@pytest.mark.real
@pytest.mark.slow  # the reference reads the token lists for 12 s
def test_every_real_tensor_against_the_reference():
    path = packaged_model()
    file = open_gguf(path)
    reference = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert set(reference) == set(file.tensors)
    seen = set()
    for name, t in reference.items():
        info, kind = file.tensors[name], t.tensor_type
        assert (info.offset, info.type.name) == (t.data_offset, kind.name)
        assert info.shape == tuple(reversed(t.shape.tolist()))
        if len(info.shape) == 1:
            np.testing.assert_array_equal(file.read(name), t.data)
            continue
        rows = min(500, info.shape[0])
        for a in (0, info.shape[0] - rows):
            expected = gguf.quants.dequantize(t.data[a : a + rows], kind)
            np.testing.assert_array_equal(file.read(name, slice(a, a + rows)), expected)
        seen.add(kind.name)
    assert seen == {"Q4_K", "Q5_0", "Q6_K", "Q8_0"}
