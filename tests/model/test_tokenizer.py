"""The tokenizer: exact against the published one, and closed to control tokens in text.

The known-good ids (tests/golden/tokenizer_ids.json.gz, written by make_tokenizer.py) come from
Hugging Face's `tokenizers`. Tests without the real model train a tiny SentencePiece model of the
same kind.
"""

import dataclasses
import gzip
import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.packaged import packaged_model
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.model.tokenizer import (
    SPAN_ROLES,
    Chat,
    Tokenizer,
    fit_tokenizer,
    load_tokenizer,
)
from tiny_tokenizer import RESERVED, SAMPLES, SPECIAL, TEXT_PIECES, write_all

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer_ids.json.gz"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def tok(files) -> Tokenizer:
    return load_tokenizer(files["model"])


# --- encoding ------------------------------------------------------------------------------------


def test_special_ids(tok):
    ids = [tok.pad_id, tok.eos_id, tok.bos_id, tok.unk_id, tok.start_of_turn_id, tok.end_of_turn_id]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    assert tok.pieces(ids) == names
    assert tok.encode("").tolist() == [tok.bos_id]
    assert tok.encode("", bos=False).shape == (0,)


@pytest.mark.parametrize("piece", SPECIAL + RESERVED)
def test_text_cannot_inject_a_control_token(tok, piece):
    for text in (
        piece,
        f"a {piece} b",
        piece * 3,
        f"<{piece}>",
        f"<b>{piece}\n\n{piece}",
        piece[1:],
    ):
        ids = tok.encode(text, bos=False)
        assert not tok.special[ids].any()
        assert tok.decode(ids) == text
        chat = tok.chat([{"role": "system", "content": text}, {"role": "user", "content": text}])
        said = chat.ids[chat.mask("system", "user")]
        assert len(said) and not tok.special[said].any()
        turn = tok.decode(chat.ids[chat.mask("turn")], special=True)
        assert turn == "<bos><start_of_turn>user\n\n\n<end_of_turn>\n<start_of_turn>model\n"


@given(st.lists(st.sampled_from([*SPECIAL, *RESERVED, "<", ">", "\n", " ", "of", "un", "é"])))
@settings(max_examples=200, deadline=None)
def test_no_mixture_of_fragments_injects_a_control_token(tok, fragments):
    text = "".join(fragments)
    ids = tok.encode(text, bos=False)
    assert not tok.special[ids].any()
    assert tok.decode(ids) == text


def test_trusted_text_may_hold_control_tokens(tok):
    for piece in SPECIAL + RESERVED:
        (single,) = tok.encode(piece, bos=False, allow_special=True)
        assert tok.pieces([single]) == [piece]
    text = "<start_of_turn>user\nthe turn <b><unused99999><unused5><end_of_turn>\n"
    ids = tok.encode(text, allow_special=True)
    assert tok.pieces(ids[tok.special[ids]]) == [
        "<bos>",
        "<start_of_turn>",
        "<unused5>",
        "<end_of_turn>",
    ]
    assert tok.decode(ids, special=True) == "<bos>" + text
    # What is not a control token is encoded as it is without them around it.
    middle = ids[2 : np.flatnonzero(tok.special[ids])[2]]
    assert middle.tolist() == tok.encode("user\nthe turn <b><unused99999>", bos=False).tolist()


def test_runs_of_whitespace_and_html_stay_single_tokens(tok):
    for piece in TEXT_PIECES:
        assert tok.pieces(tok.encode(piece.replace("\u2581", " "), bos=False)) == [piece]


@pytest.mark.parametrize("text", [None, b"bytes", 7, ["a"]])
def test_encode_wants_a_str(tok, text):
    with pytest.raises(InputError, match="text must be a str"):
        tok.encode(text)


def test_lone_surrogates_are_refused(tok):
    for call in (tok.encode, lambda t: tok.encode(t, allow_special=True)):
        with pytest.raises(InputError, match=r"lone surrogate \(U\+D83D\) at character 2"):
            call("ab\ud83d")


# --- decoding ------------------------------------------------------------------------------------


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_decode_inverts_encode(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text.replace("\u2581", " ")
    assert len(tok.decode_tokens(ids)) == len(tok.pieces(ids)) == len(ids)


def test_decode_leaves_control_tokens_out_unless_asked(tok):
    ids = [tok.bos_id, *tok.encode("the turn", bos=False), tok.end_of_turn_id]
    assert tok.decode(ids) == "the turn"
    assert tok.decode(np.array(ids), special=True) == "<bos>the turn<end_of_turn>"
    assert tok.decode([]) == tok.decode(np.zeros(0, np.int32)) == ""


def test_tokens_for_display(tok):
    ids = tok.encode("the  turn\n😀")
    shown = tok.decode_tokens(ids)
    assert shown[0] == "<bos>" and "  " in shown and "\n" in shown
    assert shown[-4:] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert "\u2581\u2581" in tok.pieces(ids)
    assert tok.decode(ids[:-1]) == "the  turn\n\ufffd"  # a character cut in the middle


@pytest.mark.parametrize("ids", [[-1], [10**6], [0, 2**40], [1.0], [[1]], 3, ["a"], [None]])
def test_ids_must_be_in_the_vocabulary(tok, ids):
    for call in (tok.decode, tok.decode_tokens, tok.pieces):
        with pytest.raises(InputError, match="not in the vocabulary|must be integers"):
            call(ids)


def test_a_tokenizer_survives_pickling(tok):
    copy = pickle.loads(pickle.dumps(tok))
    for text in SAMPLES:
        assert copy.encode(text).tolist() == tok.encode(text).tolist()


def test_a_tokenizer_for_an_embedding_with_more_rows_shows_them_by_number(tok):
    config = lambda vocab: dataclasses.replace(PRESETS["gemma-3-270m"], vocab=vocab)
    V = tok.vocab_size
    fitted = pickle.loads(pickle.dumps(fit_tokenizer(tok, config(V + 2))))
    assert fitted.vocab_size == len(fitted.special) == V + 2 and fitted.special[V:].all()
    assert fitted.decode_tokens([V, V + 1]) == [f"<no token {V}>", f"<no token {V + 1}>"]
    assert fitted.decode([V, *tok.encode("one", bos=False)]) == "one"
    text = f"<no token {V}> one"
    for allow in (False, True):  # no text encodes to them
        ids = fitted.encode(text, allow_special=allow)
        assert ids.tolist() == tok.encode(text, allow_special=allow).tolist() and ids.max() < V
    with pytest.raises(InputError, match="not in the vocabulary"):
        fitted.decode([V + 2])
    assert fit_tokenizer(tok, config(V)) is tok
    with pytest.raises(InputError, match=f"{V} tokens, but gemma-3-270m has {V - 1}: .* another"):
        fit_tokenizer(tok, config(V - 1))


# --- chat ----------------------------------------------------------------------------------------


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def test_chat_renders_the_template_and_its_spans(tok):
    chat = tok.chat(
        [
            {"role": "system", "content": "of\n"},
            user("  one 😀 two\n"),
            {"role": "assistant", "content": "the turn"},
            user("end"),
        ]
    )
    assert isinstance(chat, Chat) and chat.ids.dtype == np.int32
    assert tok.decode(chat.ids, special=True) == (
        "<bos><start_of_turn>user\nof\n\n\none 😀 two<end_of_turn>\n"
        "<start_of_turn>model\nthe turn<end_of_turn>\n"
        "<start_of_turn>user\nend<end_of_turn>\n<start_of_turn>model\n"
    )
    edges = np.flatnonzero(np.diff(chat.roles, prepend=-1, append=-1)).tolist()
    spans = [(SPAN_ROLES[chat.roles[a]], chat.ids[a:b]) for a, b in zip(edges, edges[1:])]
    # The system's newline and the template's two are one token: it belongs to where it starts.
    assert [(role, tok.decode(ids)) for role, ids in spans if role != "turn"] == [
        ("system", "of\n\n\n"),
        ("user", "one 😀 two"),
        ("model", "the turn"),
        ("user", "end"),
    ]
    assert chat.roles.shape == chat.ids.shape and chat.roles.dtype == np.int32
    assert tok.decode(chat.ids[chat.mask("model")]) == "the turn"
    assert (chat.mask("turn") ^ chat.mask("system", "user", "model")).all()
    with pytest.raises(InputError, match="no such role"):
        chat.mask("assistant")


def test_chat_without_a_generation_prompt(tok):
    with_prompt, without = (tok.chat([user("one")], p) for p in (True, False))
    assert tok.decode(without.ids, special=True).endswith("one<end_of_turn>\n")
    assert with_prompt.ids[: len(without.ids)].tolist() == without.ids.tolist()
    assert with_prompt.roles[: len(without.ids)].tolist() == without.roles.tolist()
    assert with_prompt.mask("turn")[len(without.ids) :].all()


def test_a_literal_space_symbol_keeps_the_spans_right(tok):
    messages = [{"role": "system", "content": "a\u2581\u2581b"}, user("\u2581one")]
    chat = tok.chat(messages, False)
    assert tok.decode(chat.ids[chat.mask("user")]) == " one"
    assert tok.decode(chat.ids[chat.mask("system")]) == "a  b"


def part(text: str) -> dict:
    return {"type": "text", "text": text}


def test_contents_in_parts_render_as_the_published_template_does(tok):
    def contents(system, first, answer, last):
        roles = ("system", "user", "model", "user")
        return [{"role": r, "content": c} for r, c in zip(roles, (system, first, answer, last))]

    parts = contents(
        [part(" of\n")], [part(" one "), part("two\n")], [part("the turn")], (part("end"),)
    )
    plain = contents(" of\n", "onetwo", "the turn", "end")  # the system's text is not stripped
    got, want = tok.chat(parts), tok.chat(plain)
    assert got.ids.tolist() == want.ids.tolist()
    assert got.roles.tolist() == want.roles.tolist()


MODEL = {"role": "model", "content": "one"}
SYSTEM = {"role": "system", "content": "one"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list"),
        ("Hello", "messages must be a list"),
        (user("Hello"), "messages must be a list"),
        (["Hello"], "message 0 is not"),
        ([{"role": "user"}], "message 0 is not"),
        ([user("a"), {"role": "tool", "content": "x"}], "message 1 has role 'tool'; known are"),
        ([{"role": ["user"], "content": "x"}], "message 0 has role"),
        ([user("")], "message 0 .* is empty"),
        ([user(" \n\t")], "message 0 .* is empty"),
        ([user(None)], r"message 0 \(user\): content is None"),
        ([user({"type": "text", "text": "a"})], "give a text or a list of text parts"),
        ([user([{"type": "image", "url": "x.png"}])], "part 0 is 'image'; only text parts"),
        ([user([part("a"), "b"])], "part 1 is 'b'; only text parts"),
        ([user([{"type": "text"}])], "part 0 has no text"),
        ([user([])], "message 0 .* is empty"),
        ([user([part(" ")])], "message 0 .* is empty"),
        ([user([part("a\udc00")])], "lone surrogate"),
        ([{"role": "system", "content": [part("a"), part("b")]}, user("x")], "join them into one"),
        ([user("a\udc00")], "lone surrogate"),
        ([MODEL], "message 0 is from 'model', but must be from 'user'"),
        ([user("a"), user("b")], "message 1 is from 'user', but must be from 'model'"),
        ([user("a"), SYSTEM], "message 1 is from 'system', but must be from 'model'"),
        ([SYSTEM, MODEL], "message 1 is from 'model', but must be from 'user'"),
        ([SYSTEM], "needs a user's message"),
    ],
)
def test_conversations_the_template_has_no_place_for(tok, messages, message):
    with pytest.raises(InputError, match=message):
        tok.chat(messages)


# --- the real tokenizer --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    return load_tokenizer(packaged_model())


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(gzip.decompress(GOLDEN.read_bytes()))


@pytest.mark.real
def test_the_real_ids_are_the_published_tokenizers(real, golden):
    assert len(golden["texts"]) > 200
    for text, ids in golden["texts"]:
        assert real.encode(text).tolist() == [2, *ids], text
        assert real.decode(ids) == text.replace("\u2581", " ")
    assert real.vocab_size == 262_144
    assert [real.pad_id, real.eos_id, real.bos_id, real.unk_id] == [0, 1, 2, 3]
    assert [real.start_of_turn_id, real.end_of_turn_id] == [105, 106]


@pytest.mark.real
def test_the_real_chats_are_the_published_templates(real, golden):
    for messages, prompt, rendered, ids in golden["chats"]:
        assert real.chat(messages, prompt).ids.tolist() == ids
        assert real.encode(rendered, bos=False, allow_special=True).tolist() == ids


@pytest.mark.real
def test_no_real_control_token_can_be_written_in_text(real):
    pieces = real.pieces(np.flatnonzero(real.special))
    assert len(pieces) == 6252 and {"<mask>", "<unused6241>", "<start_of_image>"} <= set(pieces)
    for i, piece in zip(np.flatnonzero(real.special), pieces):
        ids = real.encode(f"{piece} x{piece}", bos=False)
        assert not real.special[ids].any()
        assert real.encode(piece, bos=False, allow_special=True).tolist() == [i]
    ordinary = [i for i in (*range(107, 238), *range(255_968, 255_999)) if not real.special[i]]
    assert len(ordinary) == 162
    for i in ordinary:
        assert real.encode(real.decode([i]), bos=False).tolist() == [i]


@pytest.mark.real
def test_the_real_tokenizer_loads_quickly_and_pieces_are_its_text(real):
    start = time.process_time()
    tok = load_tokenizer("gemma-3-27b-it")  # one tokenizer for all sizes: the packaged one serves
    assert time.process_time() - start < 5  # 1 s on a quiet core
    shown = tok.decode_tokens(tok.encode("The capital of France is Paris ᚠ"))
    assert shown == [
        "<bos>",
        "The",
        " capital",
        " of",
        " France",
        " is",
        " Paris",
        " ",
        "<0xE1>",
        "<0x9A>",
        "<0xA0>",
    ]
