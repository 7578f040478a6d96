"""A tiny SentencePiece model with Gemma's kinds of pieces, and the files it can come in."""

import io
import itertools
import json
from functools import cache
from pathlib import Path

import gguf
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as pb

from gemma_scope_jax.model import tokenizer_files

SPECIAL = [
    "<mask>",
    "[multimodal]",
    "<unused0>",
    "<unused5>",
    "<unused17>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
]
RESERVED = ["<pad>", "<eos>", "<bos>", "<unk>"]
TEXT_PIECES = [
    *("\n" * n for n in (1, 2, 3)),
    *("\u2581" * n for n in (2, 3, 4)),
    *("\t" * n for n in (1, 2)),
    "<table>",
    "</table>",
    "<b>",
    "<h1>",
]


SAMPLES = [
    "",
    "the start of a turn",
    "One  two   three      four\n\n\n\n\tfive\t\t\tsix",
    "<table><tr> x</tr></table><b>bold</b> <h1>",
    "Ünïcödé 😀 日本語 \u2581 a\u2581\u2581b \x00 \r\n end ",
    "<unused5",
    "start_of_turn>",
    "< bos >",
    "<0x41>",
    "<unused99999>",
]


@cache
def tiny_proto() -> pb.ModelProto:
    """A SentencePiece BPE model trained as Gemma's is specified, with its kinds of pieces."""
    words = "the start of turn and end of turn user model unused mask bos eos pad image one two"
    sentences = [" ".join(p) for p in itertools.permutations(words.split()[:6], 3)] + [words] * 20
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=out,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        hard_vocab_limit=False,
        user_defined_symbols=SPECIAL + TEXT_PIECES,
        minloglevel=2,
    )
    return pb.ModelProto.FromString(out.getvalue())


def write_model(path: Path, proto: pb.ModelProto) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def write_gguf(
    path: Path, proto: pb.ModelProto, drop: str = "", added=(), template="", **metadata
) -> Path:
    """As llama.cpp's converter writes it: real spaces, control types, scores of -1000, padding.

    `added`: tokens {"content": ...} after the placeholder for images; `metadata` tokenizer.ggml.*.
    """
    control = {*SPECIAL, *RESERVED} - {"[multimodal]"}
    tokens, scores, types = [], [], []
    for p in proto.pieces:
        special = p.piece in control or p.type == tokenizer_files.USER_DEFINED
        tokens.append(p.piece.replace("\u2581", " ") if special else p.piece)
        scores.append(-1000.0 if special else p.score)
        types.append(tokenizer_files.CONTROL if p.piece in control else p.type)
    tokens += ["<image_soft_token>", *(token["content"] for token in added), "[PAD1]"]
    scores += [-1000.0] * (2 + len(added))
    types += [tokenizer_files.CONTROL, *[tokenizer_files.USER_DEFINED] * len(added)]
    types.append(tokenizer_files.UNUSED)
    writer = gguf.GGUFWriter(str(path), "gemma3")
    if drop != "model":
        writer.add_tokenizer_model("llama")
    if drop != "tokens":
        writer.add_token_list(tokens)
    writer.add_token_scores(scores[: 5 if drop == "scores" else None])
    if drop != "types":
        writer.add_token_types(types)
    if template:
        writer.add_string("tokenizer.chat_template", template)
    for key, value in metadata.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_array
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def hugging_face(proto: pb.ModelProto) -> dict:
    """tokenizer.json as transformers converts it: every split of every piece, by its score."""
    vocab = {p.piece: i for i, p in enumerate(proto.pieces)}
    user = {p.piece for p in proto.pieces if p.type not in (1, 6)}
    merges = []
    for p in sorted(proto.pieces, key=lambda p: -p.score):
        cuts = [(p.piece[:i], p.piece[i:]) for i in range(1, len(p.piece))]
        merges += [list(c) for c in cuts if c[0] in vocab and c[1] in vocab and p.type != 6]
    added = [{"id": vocab[p], "content": p} for p in user]
    added.append({"id": len(vocab), "content": "<image_soft_token>"})
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "added_tokens": added,
        "model": {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": merges},
    }


def write_json(path: Path, data: dict) -> Path:
    path.write_text(json.dumps(data))
    return path


def write_all(folder: Path) -> dict[str, Path]:
    """The tiny tokenizer as each kind of file."""
    proto = tiny_proto()
    return {
        "model": write_model(folder / "tokenizer.model", proto),
        "json": write_json(folder / "tokenizer.json", hugging_face(proto)),
        "gguf": write_gguf(folder / "tiny.gguf", proto),
    }
