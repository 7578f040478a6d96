"""A small audit for the tiny model: a suite of pairs with hostile texts, and how to run it."""

import json

import gemma_scope_jax as gs
from coders import random_coder
from letters import Letters

HOSTILE = '</script><img src=x onerror="alert(1)">\u202e{{body}}'
SETTINGS = {"features": 2, "mediated": 10, "controls": 3}


class Readable(Letters):
    """Letters that can be decoded, too."""

    def decode(self, ids):
        return "".join(self.decode_tokens(ids))


def pairs_suite(folder, **changed):
    """A suite file of 40 pairs: the first text of each has an x where the second has a y."""
    texts = [(f"a{n} x {n % 7} end", f"a{n} y {n % 7} end") for n in range(40)]
    items = [
        {"choices": [a, b], "group": "odd" if n % 2 else "even", "unit": f"u{n // 2}",
         "texts": {"a": a, "b": b}}
        for n, (a, b) in enumerate(texts)
    ]  # fmt: skip
    content = {
        "name": "letters", "question": f"Is x likelier than y? {HOSTILE}", "kind": "pairs",
        "licence": "CC0", "source": f"here {HOSTILE}", "measure": "preference",
        "data": {"items": items}, "arms": {"a": "a", "b": "b", "paired": True},
        "about": ["Letters mean nothing."],
    }  # fmt: skip
    path = folder / "letters.json"
    path.write_text(json.dumps(content | changed))
    return path


def answers_suite(folder, **changed):
    """A suite file whose answers are judged."""
    items = [{"prompt": f"say {n}", "group": "odd" if n % 2 else "even"} for n in range(30)]
    given = {"kind": "generate", "measure": "verdicts", "new_tokens": 4, "data": {"items": items}}
    given["arms"] = {"by": "group", "a": "odd", "b": "even"}
    return pairs_suite(folder, **given | changed)


def coder_of(seed=0, layer=1):
    return random_coder(48, seed=seed, layer=layer, first=1)


def run_audit(model, suite, out, *, coder=None, judge=None, **settings):
    how = gs.AuditSettings(**SETTINGS | settings)
    coder = coder_of() if coder is None else coder
    return gs.audit(suite, model, Readable(), coder, out, how, judge=judge)
