"""What a chat server answers that knows what is planted (see `planted_store.py`), or guesses."""

import dataclasses
import json
import re
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from chat_server import KEY, ChatServer
from gemma_scope_jax.autointerp.answers import AnswerFile
from gemma_scope_jax.autointerp.judges import model as mj
from gemma_scope_jax.autointerp.judges.chat_client import ChatClient
from gemma_scope_jax.autointerp.judges.endpoint import Endpoint
from gemma_scope_jax.autointerp.judges.endpoint_judge import EndpointJudge
from gemma_scope_jax.autointerp.questions import Question, ShownText
from gemma_scope_jax.autointerp.scores import SCORES
from gemma_scope_jax.model.config import PRESETS, Model
from gemma_scope_jax.model.tokenizer import load_tokenizer
from planted_store import PLANTED
from tiny import tiny_model
from tiny_tokenizer import tiny_proto, write_model

ALL = tuple(SCORES)
SCORED = {"detection": {"balanced_accuracy": 0.912, "n": 10}, "simulation": {"correlation": None}}
ENTRY = {"text": "negations", "method": "endpoint", "model": "m", "examples": 15, "scores": SCORED}


def texts(user):
    return re.findall(r"^\d+\. (.*)$", user, re.MULTILINE)


def marked(text):
    return "".join(re.findall(r"<<(.*?)>>", text))


def know(body, strength=None):
    """The answer of one who knows the planted truth: the explanation lists the letters."""
    system, user = body["messages"][0]["content"], body["messages"][1]["content"]
    if "Say in one phrase" in system:
        letters = set("".join(map(marked, texts(user))))
        return "the letters " + "".join(sorted(letters))
    found = re.search(r"responds to: the letters (\w+)", user)
    letters = set(found[1]) if found else set()
    if "JSON list of its tokens" in system:
        tokens = json.loads(user[user.index("[") :])
        return json.dumps([10 if t in letters else 0 for t in tokens])
    if "In all numbered texts but one" in system:
        kinds = [set(marked(t)) for t in texts(user)]
        fits = [any(k <= set(p) for p in PLANTED) for k in kinds]
        return f"It is [{fits.index(False) + 1}]"
    if "judge for each" in system and "whether the marked" in system:
        return json.dumps([int(set(marked(t)) <= letters and bool(marked(t))) for t in texts(user)])
    active = [bool(set(t) & letters) for t in texts(user)]
    if "separated by commas" in system:
        return ", ".join(str(i) for i, a in enumerate(active, 1) if a) or "None"
    return json.dumps([int(a) for a in active])


def guess(body, rng):
    system, user = body["messages"][0]["content"], body["messages"][1]["content"]
    n = len(texts(user))
    if "Say in one phrase" in system:
        return "anything at all"
    if "JSON list of its tokens" in system:
        return json.dumps([rng.randint(0, 10) for _ in json.loads(user[user.index("[") :])])
    if "In all numbered texts but one" in system:
        return f"[{rng.randint(1, n)}]"
    chosen = [rng.randint(0, 1) for _ in range(n)]
    if "separated by commas" in system:
        return ", ".join(str(i) for i, a in enumerate(chosen, 1) if a) or "None"
    return json.dumps(chosen)


def classify(word):
    return Question("classify", (ShownText((word,)),) * 3, "words", (1.0, 0.0, 1.0))


def poisoned(server_says, status=200):
    """A server that knows all answers but those to questions that hold "poison"."""
    content = server_says if isinstance(server_says, str) else json.dumps(server_says)
    bad = (status, {}, content)
    trouble = lambda number, body: bad if "poison" in json.dumps(body) else None
    return ChatServer(lambda body: "[1, 0, 1]", trouble)


def asked(server, folder, words=("fine", "poison", "also fine"), **options):
    """Answers to a question a word, one after the other, what was said, and how many are kept."""
    said, answers = [], AnswerFile(folder / "a.jsonl")
    options = {"concurrency": 1, "retries": 1, "timeout": 5.0, "key": KEY, **options}
    judge = EndpointJudge(
        ChatClient(Endpoint(server.url, "judge", **options), answers, said.append)
    )
    try:
        return judge.answer([classify(word) for word in words]), said, len(answers)
    finally:
        judge.close()
        answers.close()


def completion(content, finish="stop", **more):
    return {"choices": [{"message": {"content": content, **more}, "finish_reason": finish}]}


def judge_of(name, answers=None):
    """A tiny random model with a real, tiny tokenizer and room for long prompts."""
    with tempfile.TemporaryDirectory() as folder:
        tok = load_tokenizer(write_model(Path(folder) / "tokenizer.model", tiny_proto()))
    small = tiny_model(PRESETS["gemma-3-270m"], layers=2)
    draw = np.random.default_rng(1).standard_normal((tok.vocab_size, 32)) * 32**-0.5
    params = dataclasses.replace(small.params, embed=jnp.asarray(draw, jnp.float32))
    config = dataclasses.replace(small.config, vocab=tok.vocab_size, context=8192)
    return mj.ModelJudge(Model(params, config), tok, name, answers)
