"""Gemma's tokenizer out of the files people have: tokenizer.model, tokenizer.json, or a .gguf.

All Gemma 3 models share one SentencePiece BPE model of 262,144 pieces. Each file kind is read into
the same three lists (pieces, scores, types) and rebuilt into the same SentencePiece model, with one
deliberate change: every piece that steers the model (<bos>, <start_of_turn>, <unused5>, ...) is
CONTROL, which SentencePiece never matches in text. So text cannot inject a control token; only
`Tokenizer` itself places them. Runs of whitespace and HTML tags stay USER_DEFINED, which it does
match, as they do in the published tokenizer.
"""

import json
import math
import os
import re
from typing import Any

from etils import epath

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.gguf import open_gguf
from gemma_scope_jax.model.checkpoints.load import find_checkpoint
from gemma_scope_jax.model.checkpoints.packaged import is_packaged_model_installed, packaged_model
from gemma_scope_jax.model.config import preset

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece's piece types
SPACE = "\u2581"  # how SentencePiece writes a space
REQUIRED = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

# The user-defined pieces that are mere text: whatever else is user-defined is a control token,
# and so are these names, whatever type a file gives them.
_CONTROL_PIECE = re.compile(
    r"<(pad|eos|bos|unk|mask|unused\d+|(start|end)_of_(turn|image)|image_soft_token)>|\[multimodal\]"
)
_TEXT_PIECE = re.compile(
    rf"[\n\t\r{SPACE}]+|</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i"
    r"|u|s|sub|sup|code|a|html|body|img|span|bbox|ul|li|div|iframe|footer)>"
)
_FILES = ("tokenizer.model", "tokenizer.json")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def find_tokenizer(source: str | os.PathLike) -> epath.Path:
    """The tokenizer file behind a model's name, a folder, or a file's own path.

    The name of any Gemma 3 takes the packaged model (extra `demo`) if that is installed, since all
    sizes share one tokenizer; else its tokenizer.model comes from Hugging Face's hub, as does that
    of any "owner/repository". Raises `InputError` if there is nothing to be found.
    """
    text = os.fspath(source)
    is_file_name = text.endswith((".model", ".json", ".gguf"))
    if is_file_name and not epath.Path(text).expanduser().exists():
        raise InputError(f"{text}: no such file")
    is_gemma = isinstance(source, str) and not os.path.exists(text) and _is_published(text)
    if is_gemma and is_packaged_model_installed():
        return epath.Path(packaged_model())
    path = find_checkpoint(source, files=_FILES[:1] if is_gemma else _FILES)
    if path.is_file():
        return path
    for candidate in [*(path / name for name in _FILES), *sorted(path.glob("*.gguf"))]:
        if candidate.is_file():
            return candidate
    raise InputError(
        f"{path}: holds no tokenizer.model, tokenizer.json or .gguf file; all Gemma 3 models share "
        "one tokenizer, so a model's name such as gemma-3-270m serves as well"
    )


def _is_published(name: str) -> bool:
    try:
        preset(name)
    except InputError:
        return False
    return True


def read_tokenizer(path: epath.Path) -> bytes:
    """The serialised SentencePiece model for a tokenizer.model, tokenizer.json or .gguf file.

    The kind is told by the content. Raises `InputError` for a file that is broken, or that is not a
    Gemma tokenizer.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(16)
        if magic[:4] == b"GGUF":
            return _rebuild(path, *_from_gguf(path))
        if magic.lstrip()[:1] == b"{":
            return _rebuild(path, *_from_json(path))
        return _rebuild(path, *_from_model(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


Pieces = tuple[list[str], list[float], list[int]]  # text, score, type of every piece, by id


def _from_gguf(path: epath.Path) -> Pieces:
    """llama.cpp writes the runs of spaces as real spaces and all control tokens as CONTROL."""
    metadata = open_gguf(path).metadata
    if metadata.get("tokenizer.ggml.model", "none") != "llama":
        raise InputError(f"{path}: holds no SentencePiece tokenizer")
    pieces = metadata.get("tokenizer.ggml.tokens")
    scores: Any = metadata.get("tokenizer.ggml.scores")
    types: Any = metadata.get("tokenizer.ggml.token_type")
    if not (isinstance(pieces, list) and hasattr(scores, "tolist") and hasattr(types, "tolist")):
        raise InputError(f"{path}: its tokenizer lists are missing or malformed")
    scores, types = scores.tolist(), types.tolist()
    n = len(pieces)
    if not n == len(scores) == len(types):
        raise InputError(f"{path}: {n} tokens, {len(scores)} scores, {len(types)} types")
    while n and (types[n - 1] == UNUSED or pieces[n - 1] == "<image_soft_token>"):
        n -= 1  # padding and the image placeholder, beyond the text model's vocabulary
    return [p.replace(" ", SPACE) for p in pieces[:n]], scores[:n], types[:n]


def _from_json(path: epath.Path) -> Pieces:
    """Hugging Face lists merges in the order of the merged piece's score: the score is the rank.

    Merges that make an added (user-defined) piece never apply: SentencePiece matches those whole.
    """
    try:
        data = json.loads(path.read_bytes())
        model, added = data["model"], {token["content"] for token in data["added_tokens"]}
        vocab, merges = model["vocab"], model["merges"]
        kind = (model["type"], model["byte_fallback"], data["normalizer"]["content"])
        pieces = sorted(vocab, key=vocab.__getitem__)
        ids = [vocab[p] for p in pieces]
        if kind != ("BPE", True, SPACE) or ids != [*range(len(ids))] or not added >= {*REQUIRED}:
            raise InputError(f"{path}: not a Gemma tokenizer")
        rank: dict[str, int] = {}
        previous = ""
        for pair in merges:
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            if (merged := left + right) != previous and merged not in added:
                if merged in rank or merged not in vocab:
                    raise InputError(f"{path}: its merges are not in SentencePiece's order")
                previous = merged
                rank[merged] = len(rank)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a complete tokenizer.json ({error!r:.80})") from error
    types = [
        USER_DEFINED if p in added else BYTE if _BYTE_PIECE.fullmatch(p) else NORMAL for p in pieces
    ]
    return pieces, [-float(rank.get(p, len(rank))) for p in pieces], types


def _schema() -> Any:
    """SentencePiece's protobuf classes; made at import, so type checkers cannot see them."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2


def _from_model(path: epath.Path) -> Pieces:
    from google.protobuf.message import DecodeError

    pb = _schema()
    try:
        model = pb.ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise InputError(
            f"{path}: not a complete tokenizer.model; download it again (a file of about 130 bytes "
            "is a Git LFS pointer)"
        ) from error
    spec = model.normalizer_spec
    if (
        model.trainer_spec.model_type != pb.TrainerSpec.BPE
        or not model.trainer_spec.byte_fallback
        or spec.add_dummy_prefix
        or spec.remove_extra_whitespaces
        or spec.precompiled_charsmap
    ):
        raise InputError(f"{path}: a SentencePiece model, but not Gemma's")
    pieces = model.pieces
    return [p.piece for p in pieces], [p.score for p in pieces], [p.type for p in pieces]


def _rebuild(path: epath.Path, pieces: list[str], scores: list[float], types: list[int]) -> bytes:
    """A SentencePiece BPE model in which only text pieces can match text."""
    pb = _schema()
    if missing := [p for p in REQUIRED if p not in pieces]:
        raise InputError(f"{path}: not a Gemma tokenizer (it has no {', '.join(missing)})")
    if len(set(pieces)) != len(pieces) or "" in pieces or not all(map(math.isfinite, scores)):
        raise InputError(f"{path}: has empty or repeated pieces, or scores that are no numbers")
    model = pb.ModelProto()
    model.trainer_spec.model_type = pb.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    try:
        for piece, score, kind in zip(pieces, scores, types):
            if kind not in (NORMAL, BYTE) or _CONTROL_PIECE.fullmatch(piece):
                score = 0.0
                kind = USER_DEFINED if _TEXT_PIECE.fullmatch(piece) else CONTROL
                if piece == "<unk>":
                    kind = UNKNOWN
            model.pieces.add(piece=piece, score=score, type=kind)
    except (UnicodeError, TypeError) as error:  # protobuf hands out what is no UTF-8 as bytes
        raise InputError(f"{path}: has pieces that are not valid Unicode") from error
    return model.SerializeToString()
