"""Monitors of harmful requests on the real Gemma 3 270M: what they detect, and what they cost.

    .venv/bin/python benchmarks/monitors.py --sets SETS >> benchmarks/results/monitors_cpu.jsonl

200 requests of HarmBench and as many harmless ones (those of the suite harmful_requests,
and questions of the suites written for this package), as chats. Each line is one monitor: a
probe on raw activations, or 8 features or one of the packaged coder of layer 12. Figures are
of the quarter that had no say. `cost` is what reading it adds to the time of writing
32 tokens after each of 16 prompts, in percent, the median of pairs of runs; `floor` is its share of
the model's multiplications.
"""

import argparse
import dataclasses
import json
import time

import numpy as np

import gemma_scope_jax as gs

CODER, LAYER, NEW, ROWS = "gemma-3-270m-resid-post-12-width-4k-l0-50", 12, 32, 16
MODEL_FLOPS = 2 * (100e6 + 640 * 262_144)  # a token: the layers and the unembedding


def requests(sets: str) -> tuple[list, list]:
    """Chats of harmful and of harmless requests."""
    suite = gs.load_suite("harmful_requests")
    sources = [{**s, "limit": 200} if "set" in s else s for s in suite.sources]
    items = gs.suite_items(dataclasses.replace(suite, sources=tuple(sources)), limit=0, sets=sets)
    harmful = [i.prompts[0] for i in items.items if i.group == "harmful"]
    harmless = [i.prompts[0] for i in items.items if i.group == "harmless"]
    for name in ("over_refusal", "sycophancy", "truthfulness"):
        harmless += [i.prompts[0] for i in gs.suite_items(gs.load_suite(name)).items]
    chat = lambda some: [[{"role": "user", "content": text}] for text in some]
    return chat(harmful), chat(harmless[: len(harmful)])


def cost(model, tokenizer, monitor, chats, pairs: int) -> float:
    """The median over pairs of runs of the time with the monitor over that without, less 1."""
    prompts = [gs.chat_prompt(tokenizer, chat) for chat in chats[:ROWS]]
    quiet = monitor.at(float(np.finfo(np.float32).max))  # stops nothing: the same tokens
    sides = ((), "alone"), ([quiet.read(), quiet.alarm()], "watched")
    times: dict[str, list[float]] = {"alone": [], "watched": []}
    for n in range(pairs + 1):
        for items, name in sides:
            halt = "alarm" if items else None
            start = time.perf_counter()
            gs.generate(
                model, prompts, NEW, items, stop_tokens=(), halt=halt
            ).tokens.block_until_ready()
            if n:  # the first one compiles
                times[name].append(time.perf_counter() - start)
    return float(np.median(np.array(times["watched"]) / np.array(times["alone"]))) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", default="", help="a folder with the packages of published sets")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    gs.use_compilation_cache()
    model, tokenizer = (
        gs.load_model("gemma-3-270m", dtype="float32"),
        gs.load_tokenizer("gemma-3-270m"),
    )
    coder = gs.load_coder(CODER)
    harmful, harmless = requests(args.sets)
    kinds = {
        "probe": ({"layer": LAYER}, 640),
        "8 features": ({"coder": coder, "features": 8}, 8 * 640),
        "1 feature": ({"coder": coder, "features": 1}, 640),
    }
    for name, (given, products) in kinds.items():
        monitor = gs.fit_monitor(model, tokenizer, harmful, harmless, **given)
        q = monitor.quality
        added = cost(model, tokenizer, monitor, harmful, args.pairs)
        line = {
            "name": name,
            "AUC": str(q.auc),
            "detected": str(q.detected),
            "false alarms": str(q.false_alarms),
            "calibration error": round(q.calibration_error, 3),
            "tokens to the alarm": str(q.delay),
            "cost, %": round(100 * added, 1),
            "floor, %": round(100 * 2 * products / MODEL_FLOPS, 4),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
