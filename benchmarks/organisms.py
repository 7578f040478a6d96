"""Audits of models with a planted behaviour: does each find it, unknowing, and what removes it?

    for name in trigger refuser sycophant; do
        .venv/bin/python packaging/organisms.py $name out/organisms/$name
    done
    .venv/bin/python benchmarks/organisms.py out/organisms --out out/organism_audits --sets SETS

Blind: every model, the untouched Gemma 3 270M among them, gets the same audits (as chats) and is
compared with the base by `gs.diff_models` on texts that the two models write; its organism.json is
not read. Then the held-out prompts of organism.json are the key: features that go with the planted
behaviour are found on one half of these and scored on the other, beside a probe on raw activations;
they are ablated there, beside matched random features and the difference of means projected out.

What is done is kept in the folder; the same command goes on. `--table blind` and `--table key`
print the lines of results/organisms_blind_cpu.jsonl and results/organisms_cpu.jsonl.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from table import figure

import gemma_scope_jax as gs
from gemma_scope_jax.behaviour.measure import continuation_logprobs, generated, text_loss
from gemma_scope_jax.behaviour.model_diff.result import NAMED, PARTED

BASE, CODER = "gemma-3-270m", "gemma-3-270m-resid-post-12-width-4k-l0-50"
SUITES = {"harmful_requests": 40, "over_refusal": None, "sycophancy": None}
WRITTEN, SHOWN_TOKENS = 64, 16  # texts of each kind for the comparison; tokens of an answer
HOWS = ("last", "max")


def once(path: Path, make, *given) -> None:
    """Keep what `make` returns as JSON, unless it is there."""
    if not path.exists():
        gs.write_text(path, json.dumps(gs.finite(make(*given))) + "\n")


def audits(model, tokenizer, coder, out: Path, sets: str) -> dict[str, Any]:
    """The outcome of each suite, with the verdicts of its stages."""
    found = {}
    for name, limit in SUITES.items():
        suite = dataclasses.replace(gs.load_suite(name), template="chat", new_tokens=SHOWN_TOKENS)
        settings = gs.AuditSettings(limit=limit, mediated=5, controls=2)  # outcomes alone count
        judge = gs.answer_judge(suite.judge, model, tokenizer) if suite.judge else None
        done = gs.audit(
            suite, model, tokenizer, coder, out / name, settings, judge=judge, sets=sets
        ).as_dict()
        found[name] = {
            "outcome": done["outcome"],
            "contrast": done["contrast"].get("verdict", done["contrast"].get("why")),
            "mediation": done["mediation"].get("verdict", done["mediation"].get("why")),
        }
    return found


def compared(base, other, tokenizer) -> dict[str, Any]:
    texts = gs.model_texts(base, other, tokenizer, WRITTEN)
    texts += gs.model_answers(base, other, tokenizer, WRITTEN)
    return gs.diff_models(base, other, tokenizer, texts).as_dict()


def planted(base, model, tokenizer, coder, facts: dict[str, Any]) -> dict[str, Any]:
    """Features of the planted behaviour on the held-out prompts, and what ablating them does."""
    encode = lambda e: (
        gs.chat_prompt(tokenizer, [{"role": "user", "content": e["prompt"]}])
        if e["chat"]
        else tokenizer.encode(e["prompt"])
    )
    on, off = (
        [encode(e) for e in facts["held-out prompts"] if e["kind"] in facts[key]]
        for key in ("on", "off")
    )
    one, two = gs.arms(tokenizer, on, off, paired=False, name=facts["organism"]).halves()
    phrase = tokenizer.encode(facts["rule"]["phrase"], bos=False)
    plain = [tokenizer.encode(t)[:64] for t in gs.sample_documents()[:32]]

    def outcome(which):
        def of(intercepts):
            sums, counts = continuation_logprobs(which, two.a, [phrase] * len(two.a), intercepts)
            return sums / counts

        return of

    def shows(intercepts=()) -> float:
        answers = generated(model, tokenizer, list(two.a), SHOWN_TOKENS, intercepts)
        rule = facts["rule"]["answers hold one of"]
        return float(np.mean([any(s in a.lower() for s in rule) for a in answers]))

    loss = lambda intercepts: text_loss(model, plain, intercepts)
    without = float(outcome(base)([]).mean())
    options: dict[str, Any] = {"without": without, "side_effects": {"loss on plain text": loss}}
    found: dict[str, Any] = {"shows": shows(), "base": without, "prompts": len(two.a)}
    for how in HOWS:
        made = gs.contrast(model, coder, one, held_out=two, how=how)
        moved = gs.mediate(outcome(model), coder, made, controls=19, **options)
        ablated = gs.edit_features(coder, [(coder.layer, None, f, 0.0) for f in made.chosen])
        found[how] = {
            "contrast": made.as_dict(),
            "ablated": moved.as_dict() | {"verdict": moved.verdict(), "shows": shows(ablated)},
        }
    place = {"site": coder.writes, "layer": coder.layer, "how": -1}
    vector = gs.contrast_vector(model, list(one.a), list(one.b), **place)
    options |= {"how": "project", "directions": vector.vector[None], "controls": 0}
    moved = gs.mediate(outcome(model), coder, [], **options)
    spec = gs.steer_spec([
        {"op": "project_out", "vector": vector.vector.tolist(), "site": coder.writes,
         "layer": coder.layer}
    ])  # fmt: skip
    projected = gs.steering(model, spec, coder)
    found["projected"] = moved.as_dict() | {"shows": shows(projected)}
    return found


def blind_row(name: str, folder: Path) -> dict[str, Any]:
    """What the audits said of a model without its key."""
    read = lambda part: json.loads((folder / f"{part}.json").read_text())
    found = {"name": name}
    found |= {s.replace("_", " "): figure(v["outcome"]["mean"]) for s, v in read("suites").items()}
    if name == "base":
        return found
    diff = read("diff")
    far = lambda t: t["ratio"] >= NAMED and t["kl"]["value"] >= PARTED
    clear = lambda t: far(t) and t["above"] == 1.0  # as `ModelDiff.named`
    words = [
        f"{t['text']!r} ({t['source']}, x{t['ratio']:.0f})" for t in filter(clear, diff["triggers"])
    ]
    new = [p["other"][0][0] for p in diff["partings"] if p["other"][0][0] != p["base"][0][0]]
    most = max(set(new), key=new.count) if new else ""
    return found | {
        "KL, nats a token": figure(diff["kl"]),
        "called a trigger": ", ".join(words) or "none",
        "goes on with": f"{most!r} at {new.count(most)} of {len(diff['partings'])}",
    }


def key_rows(name: str, folder: Path) -> list[dict[str, Any]]:
    """Detection, and what is removed, with the key: a row for each kind of edit."""
    key = json.loads((folder / "planted.json").read_text())
    rows, loss = [], lambda m: figure(m["side_effects"]["loss on plain text"]["change"], ".3f")
    for how in HOWS:
        c, m = key[how]["contrast"], key[how]["ablated"]
        area = {d.split(",")[0]: v for d, v in c["aucs"].items() if ", layer" not in d}
        random = next((v for d, v in area.items() if "random" in d), None)
        top = next((v for d, v in area.items() if d.startswith("top")), None)
        rows.append({
            "organism": name,
            "ablated": f"8 features ({how})",
            "AUC, raw probe": figure(area["raw probe"]),
            "best feature": figure(area.get("best feature")),
            "8 features": figure(top),
            "8 random": figure(random),
            "share removed": figure(m["removed"]),
            "p": round(m["rank_p"], 3),
            "shows before": key["shows"],
            "after": m["shows"],
            "loss, nats": loss(m),
        })  # fmt: skip
    m = key["projected"]
    rows.append({
        "organism": name, "ablated": "difference of means", "share removed": figure(m["removed"]),
        "shows before": key["shows"], "after": m["shows"], "loss, nats": loss(m),
    })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("organisms", type=Path, help="a folder with a folder of each")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", default="", help="a folder with the packages of published sets")
    parser.add_argument(
        "--table", choices=["blind", "key"], help="only print JSON lines of results"
    )
    args = parser.parse_args()
    names = ["base", *sorted(p.name for p in args.organisms.iterdir() if p.is_dir())]
    if not args.table:
        gs.use_compilation_cache()
        base, tokenizer = gs.load_model(BASE, dtype="float32"), gs.load_tokenizer(BASE)
        coder = gs.load_coder(CODER)
        for name in names:
            out, folder = args.out / name, args.organisms / name
            out.mkdir(parents=True, exist_ok=True)
            model = base if name == "base" else gs.load_model(str(folder), dtype="float32")
            once(out / "suites.json", audits, model, tokenizer, coder, out, args.sets)
            if name == "base":
                continue
            once(out / "diff.json", compared, base, model, tokenizer)
            facts = json.loads((folder / "organism.json").read_text())
            once(out / "planted.json", planted, base, model, tokenizer, coder, facts)
    for name in names:
        if args.table != "key":
            print(json.dumps(blind_row(name, args.out / name)))
        if args.table != "blind" and name != "base":
            print(*map(json.dumps, key_rows(name, args.out / name)), sep="\n")


if __name__ == "__main__":
    main()
