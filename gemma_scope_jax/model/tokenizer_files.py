"""Gemma's tokenizer out of the files people have: tokenizer.model, tokenizer.json, or a .gguf.

All Gemma 3 models share one SentencePiece BPE model of 262,144 pieces. Each kind of file is read
into the same three lists (pieces, scores, types) and rebuilt into the same SentencePiece model,
with one deliberate change: every piece that steers the model (<bos>, <start_of_turn>, <unused5>,
...) is CONTROL, which SentencePiece never matches in text. Text thus cannot inject a control token;
only `Tokenizer` places them. Runs of whitespace and HTML tags stay USER_DEFINED, which
SentencePiece does match, as in the published tokenizer.
"""

import contextlib
import math
import os
import re
from typing import Any

import numpy as np
from etils import epath

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.gguf import open_gguf
from gemma_scope_jax.model.checkpoints.gguf_gemma import IMAGE, named_tokens
from gemma_scope_jax.model.checkpoints.huggingface_config import declared_tokens
from gemma_scope_jax.model.checkpoints.packaged import is_packaged_model_installed, packaged_model
from gemma_scope_jax.model.config import preset
from gemma_scope_jax.storage.strict_json import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece's piece types
SPACE = "\u2581"  # how SentencePiece writes a space
REQUIRED = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

# Control tokens are these names, whatever type a file gives them, and the user-defined pieces that
# look like markup, except HTML tags. Words that a fine-tune added are text.
_CONTROL_PIECE = re.compile(
    r"<(pad|eos|bos|unk|mask|unused\d+|(start|end)_of_(turn|image)|image_soft_token)>|\[multimodal\]"
)
_TEXT_PIECE = re.compile(
    rf"[\n\t\r{SPACE}]+|</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i"
    r"|u|s|sub|sup|code|a|html|body|img|span|bbox|ul|li|div|iframe|footer)>"
)
_MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_FILES = ("tokenizer.model", "tokenizer.json")
SIBLINGS = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def find_tokenizer(source: str | os.PathLike) -> epath.Path:
    """The tokenizer file behind a model's name, a folder, or a file's own path.

    All Gemma 3 sizes share one tokenizer: any of their names uses the packaged model (extra `demo`)
    if it is installed, and otherwise the tokenizer.model on Hugging Face's hub, as does any
    "owner/repository". Raises `InputError` if nothing is found.
    """
    text = os.fspath(source)
    is_file_name = text.endswith((".model", ".json", ".gguf"))
    if is_file_name and not epath.Path(text).expanduser().exists():
        raise InputError(f"{text}: no such file")
    is_gemma = False
    if isinstance(source, str) and not os.path.exists(text):
        with contextlib.suppress(InputError):
            is_gemma = bool(preset(text))
    if is_gemma and is_packaged_model_installed():
        return epath.Path(packaged_model())
    # imported here: loading a model needs meshes and batches, which need a tokenizer
    from gemma_scope_jax.model.checkpoints.load import find_checkpoint

    everything = (*_FILES, *SIBLINGS[1:], *TEMPLATES[:2])
    path = find_checkpoint(source, files=_FILES[:1] if is_gemma else everything)
    if path.is_file():
        return path
    for candidate in [*(path / name for name in _FILES), *sorted(path.glob("*.gguf"))]:
        if candidate.is_file():
            return candidate
    raise InputError(
        f"{path}: holds no tokenizer.model, tokenizer.json or .gguf file; all Gemma 3 models share "
        "one tokenizer, so a model's name such as gemma-3-270m works too"
    )


def read_tokenizer(path: epath.Path) -> tuple[bytes, str]:
    """The serialised SentencePiece model for a tokenizer.model, tokenizer.json or .gguf file, and
    the file that holds a chat template of a format other than Gemma's, or "".

    The content decides the kind. Tokens added later come from the file itself and from those beside
    it, which must agree (`added_tokens`). Raises `InputError` for a file that is broken or not a
    Gemma tokenizer.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(16)
        if magic[:4] == b"GGUF":
            metadata = open_gguf(path).metadata
            templates = [(path, metadata.get("tokenizer.chat_template"))]
            return _rebuild(path, *_from_gguf(path, metadata)), _foreign(templates)
        is_json = magic.lstrip()[:1] == b"{"
        pieces = _from_json(path) if is_json else _from_model(path)
        _add(path, pieces, added_tokens(path))
        templates = [(path.parent / name, _template(path.parent / name)) for name in TEMPLATES]
        return _rebuild(path, *pieces), _foreign(templates)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


Pieces = tuple[list[str], list[float], list[int]]  # text, score, type of every piece, by id


def _from_gguf(path: epath.Path, metadata: dict[str, Any]) -> Pieces:
    """llama.cpp writes runs of spaces as real spaces and all control tokens as CONTROL."""
    key = "tokenizer.ggml."
    if metadata.get(f"{key}model", "none") != "llama":
        raise InputError(f"{path}: holds no SentencePiece tokenizer")
    pieces = metadata.get(f"{key}tokens")
    scores: Any = metadata.get(f"{key}scores")
    types: Any = metadata.get(f"{key}token_type")
    if not (isinstance(pieces, list) and hasattr(scores, "tolist") and hasattr(types, "tolist")):
        raise InputError(f"{path}: its tokenizer lists are missing or malformed")
    scores, types = scores.tolist(), types.tolist()
    n = len(pieces)
    if not n == len(scores) == len(types):
        raise InputError(f"{path}: {n} tokens, {len(scores)} scores, {len(types)} types")
    for name in ("add_space_prefix", "remove_extra_whitespaces", "precompiled_charsmap"):
        value = metadata.get(key + name, False)
        if np.any(value):
            raise InputError(f"{path}: {key}{name} is on; Gemma's tokenizer leaves text unchanged")
    n = named_tokens(metadata)  # the rest is beyond the text model's vocabulary
    return [p.replace(" ", SPACE) for p in pieces[:n]], scores[:n], types[:n]


def _from_json(path: epath.Path) -> Pieces:
    """Hugging Face lists merges in the order of the merged piece's score: the score is the rank.

    Merges that make an added (user-defined) piece never apply: SentencePiece matches those whole.
    """
    data = read_json(path)
    try:
        _check_pipeline(path, data)
        model, added = data["model"], {token["content"] for token in data["added_tokens"]}
        vocab, merges = model["vocab"], model["merges"]
        pieces = sorted(vocab, key=vocab.__getitem__)
        ids = [vocab[p] for p in pieces]
        if ids != [*range(len(ids))] or not added >= {*REQUIRED}:
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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a complete tokenizer.json ({error!r:.80})") from error
    kind = lambda p: USER_DEFINED if p in added else BYTE if _BYTE_PIECE.fullmatch(p) else NORMAL
    return pieces, [-float(rank.get(p, len(rank))) for p in pieces], [kind(p) for p in pieces]


# The keys of a tokenizer.json beside its vocabulary, with the values that mean what Gemma does.
# `encode` places <bos> itself, and neither truncates nor pads.
_SPACES = {"pattern": {"String": " "}}
_PIPELINE: dict[str, tuple] = {
    "normalizer": (_SPACES | {"type": "Replace", "content": SPACE},),
    # after the normalizer, no space is left to split at
    "pre_tokenizer": (
        None,
        _SPACES | {"type": "Split", "behavior": "MergedWithPrevious", "invert": False},
    ),
}
_MODEL: dict[str, tuple] = {
    "type": ("BPE",),
    "byte_fallback": (True,),
    "dropout": (None, 0.0),
    "ignore_merges": (None, False),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "unk_token": (None, "<unk>"),
}
_DECODERS = {"Replace", "ByteFallback", "Fuse"}
_READ = {"version", "truncation", "padding", "post_processor", "added_tokens", "model", "decoder"}
_READ_OF_MODEL = {"vocab", "merges", "fuse_unk"}  # bytes leave no unknown piece to fuse


def _check_pipeline(path: epath.Path, data: dict[str, Any]) -> None:
    """Refuse steps that produce other tokens, or other text, than Gemma's do."""
    for holder, table, read in ((data, _PIPELINE, _READ), (data["model"], _MODEL, _READ_OF_MODEL)):
        for key, values in table.items():
            if holder.get(key) not in values:
                said = f"{key} is {holder.get(key)!r:.60}"
                raise InputError(f"{path}: not a Gemma tokenizer ({said})")
        for key in holder.keys() - table.keys() - read:
            if holder[key] not in (None, False):
                raise InputError(f"{path}: {key[:60]} is not known and may change the tokens")
    decoder = data.get("decoder") or {"type": "Sequence", "decoders": []}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if others := {step["type"] for step in steps} - _DECODERS:
        raise InputError(f"{path}: not a Gemma tokenizer (it decodes by {min(others)!r:.60})")


def added_tokens(path: epath.Path) -> dict[int, tuple[str, bool]]:
    """id -> (text, whether it is special) of the tokens that the files around `path` add.

    Reads tokenizer.json (also if it is `path` itself), tokenizer_config.json and added_tokens.json.
    Raises `InputError` if two of them disagree, and for tokens that absorb the spaces around them
    or match only whole words.
    """
    found: dict[int, tuple[str, bool]] = {}
    for where in dict.fromkeys((path, *(path.parent / name for name in SIBLINGS))):
        if where.suffix != ".json" or not where.exists():
            continue
        for number, text, token in declared_tokens(where):
            if not isinstance(text, str) or not text or not 0 <= number < 2**31:
                raise InputError(f"{where}: added token {number!r:.40} is {text!r:.40}")
            if flags := [x for x in ("lstrip", "rstrip", "single_word") if token.get(x)]:
                raise InputError(f"{where}: added token {text!r:.40} has {flags[0]}: not supported")
            said, _ = found.setdefault(number, (text, bool(token.get("special"))))
            if said != text:
                raise InputError(f"{where}: token {number} is {text!r:.40}, elsewhere {said!r:.40}")
    return found


def _add(path: epath.Path, pieces: Pieces, added: dict[int, tuple[str, bool]]) -> None:
    """Append the tokens with ids beyond the vocabulary; those within it must match the vocabulary.

    The placeholder for images is left out if it is the last: a text model has no row for it.
    """
    texts, scores, types = pieces
    for number in sorted(added):
        text, special = added[number]
        text, kind = text.replace(" ", SPACE), CONTROL if special else USER_DEFINED
        if number < len(texts):
            if texts[number] != text:
                raise InputError(
                    f"{path}: token {number} is {texts[number]!r:.40}, but {text!r:.40} was added "
                    "there; the tokenizer's files belong to different models"
                )
            if types[number] == NORMAL:
                types[number] = kind
        elif number > len(texts):
            end = f"the vocabulary ends at {len(texts) - 1}"
            raise InputError(f"{path}: added token {text!r:.40} has the id {number}, but {end}")
        elif text != IMAGE or number != max(added):
            texts.append(text)
            scores.append(0.0)
            types.append(kind)


def _foreign(templates: list[tuple[epath.Path, Any]]) -> str:
    """The file of the chat template, if its format is not Gemma's, or "".

    Many fine-tunes edit the published template: its turns are what makes it Gemma's.
    """
    for where, text in templates:
        if isinstance(text, str) and text:  # transformers uses the first
            return "" if "<start_of_turn>" in text and "<end_of_turn>" in text else str(where)
    return ""


def _template(path: epath.Path) -> Any:
    if not path.exists():
        return None
    if path.suffix == ".jinja":
        return path.read_bytes().decode(errors="replace")
    content = read_json(path)
    said = content.get("chat_template") if isinstance(content, dict) else None
    if isinstance(said, list):  # several by name
        named = [x for x in said if isinstance(x, dict) and x.get("name") == "default"]
        said = named[0].get("template") if named else None
    return said


def _schema() -> Any:
    """SentencePiece's protobuf classes, which are created at import, unseen by type checkers."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2


def _from_model(path: epath.Path) -> Pieces:
    from google.protobuf.message import DecodeError

    pb = _schema()
    try:
        model = pb.ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        advice = "download it again (a file of some 130 bytes is a Git LFS pointer)"
        raise InputError(f"{path}: not a complete tokenizer.model; {advice}") from error
    training, spec = model.trainer_spec, model.normalizer_spec
    is_gemma = training.model_type == pb.TrainerSpec.BPE and training.byte_fallback
    changes_text = spec.add_dummy_prefix or spec.remove_extra_whitespaces
    changes_text = changes_text or spec.precompiled_charsmap or not spec.escape_whitespaces
    if not is_gemma or changes_text or training.treat_whitespace_as_suffix:
        raise InputError(f"{path}: a SentencePiece model, but not Gemma's")
    pieces = model.pieces
    return [p.piece for p in pieces], [p.score for p in pieces], [p.type for p in pieces]


def _rebuild(path: epath.Path, pieces: list[str], scores: list[float], types: list[int]) -> bytes:
    """A SentencePiece BPE model in which only text pieces can match text."""
    pb = _schema()
    if missing := [p for p in REQUIRED if p not in pieces]:
        raise InputError(f"{path}: not a Gemma tokenizer (it has no {', '.join(missing)})")
    if len(set(pieces)) != len(pieces) or "" in pieces or not all(map(math.isfinite, scores)):
        raise InputError(f"{path}: has empty or repeated pieces, or scores that are not finite")
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
                is_word = kind == USER_DEFINED and not _MARKUP.fullmatch(piece)
                kind = USER_DEFINED if is_word or _TEXT_PIECE.fullmatch(piece) else CONTROL
                if piece == "<unk>":
                    kind = UNKNOWN
            model.pieces.add(piece=piece, score=score, type=kind)
    except (UnicodeError, TypeError) as error:  # protobuf returns invalid UTF-8 as bytes
        raise InputError(f"{path}: has pieces that are not valid Unicode") from error
    return model.SerializeToString()
