"""What a chat server answers that knows what is planted (see `planted_store.py`), or guesses."""

import json
import re

from planted_store import PLANTED


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
