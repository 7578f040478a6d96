"""What trained SAEs are worth: ours beside the best of SAELens, sparsify and dictionary_learning.

    make peers && .venv/bin/python benchmarks/train_quality.py [--width 2048] [--tokens 400000]

Everyone trains once through the same stored activations of the real Gemma 3 270M, resid_post of
layer 12, in the same order, in batches of 1,024, by its own trainer with its own losses
(train_quality_peers.py). Each method has three learning rates; while the best is the lowest or the
highest, another follows. The rate is chosen by the FVU on half of the activations held out from the
training text, for seed 0 and an L0 of 50; it then serves another seed and L0s of 20 and 100.

What is measured is the coder as its library saves and loads it. L0s are matched: all thresholds are
multiplied by the factor that gives the target L0 on the same half (TopK has the target as it is).
FVU, with and without the rare tokens of enormous norm, and firing are those on the other half and
on text of another kind. Times an update are those of the trainer's step, on the same cores.

Each finished run is a JSON line in --results, which the same command goes on from while the text is
the same (some of it is the code of installed packages), and the best of each method a row of the
table beside it (table_*.jsonl); stores and coders are under --folder. Text comes from $CORPUS, a
folder with train/*.txt and eval/*.txt.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import table

ROOT = Path(__file__).resolve().parent.parent
LAYER, BATCH, L0, MORE_L0S, SEEDS = 12, 1024, 50, (20, 100), (0, 1)
HELD_OUT = 1 / 16
OTHER_TOKENS = 40_000  # of the other text
OFTEN, SELDOM = 0.12, 1e-4  # shares of tokens
PEERS = (
    "saelens_jumprelu_quadratic",
    "saelens_jumprelu_tanh",
    "saelens_topk",
    "saelens_batch_topk",
    "saelens_matryoshka",
    "sparsify",
    "dictionary_learning_topk",
    "dictionary_learning_batch_topk",
    "dictionary_learning_matryoshka",
)
OURS = (
    "ours_batch_topk",
    "ours_matryoshka",
    "ours_topk",
    "ours_jumprelu",
    "ours_jumprelu_without_momentum",  # the settings of long runs, but for rate and batch
)
# The middle one of three learning rates; that of the others is 6e-3.
MIDDLE = {
    "sparsify": 2e-3,
    "saelens_jumprelu_quadratic": 1.5e-3,
    "saelens_jumprelu_tanh": 1.5e-3,
    "ours_jumprelu_without_momentum": 1.5e-3,
}
METHODS = (*OURS, *PEERS)
ARRAYS = ("w_enc", "b_enc", "threshold", "w_dec", "b_dec")
KEY = ("method", "width", "tokens", "l0", "rate", "seed")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run."""

    method: str
    width: int
    tokens: int
    l0: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return "_".join(f"{getattr(self, k):g}" if k != "method" else self.method for k in KEY)


# ---- activations -----------------------------------------------------------------------------


def activations(folder: Path, tokens: int) -> dict[str, Any]:
    """The stores, written if they are not there: "train", in `tokens` rows, and "other"."""
    import gemma_scope_jax as gs
    from gemma_scope_jax.data.activations.store import ActivationStore
    from gemma_scope_jax.training.train import store_activations

    corpus, found = os.environ.get("CORPUS", "~/.cache/gemma-scope-corpus"), {}
    for name, text, count in (
        ("other", "eval/heldout_mix.txt", OTHER_TOKENS),
        (f"train_{tokens}", "train/*.txt", tokens * 15 // 14),
    ):
        path = folder / name
        if not (path / "manifest.json").exists() or len(ActivationStore(path)) < count:
            config = gs.TrainConfig(
                (gs.CoderConfig(LAYER),),
                data=gs.TextData(files=(f"{corpus}/{text}",)),
                tokens=count,
                context_size=512,
                buffer=8192,
            )
            store_activations(config, path, count)
        found[name.split("_")[0]] = ActivationStore(path)
    return found


def rows_of(store: Any, begin: int, end: int) -> np.ndarray:
    """Activations [n, D] float32 of a store."""
    return store.read(np.arange(begin, end))["resid_post"][0].astype(np.float32)


def scale_of(x: np.ndarray) -> float:
    """The root-mean-square norm of activations, outliers cut at three median norms."""
    squares = (x.astype(np.float64) ** 2).sum(1)
    return float(np.minimum(squares, 9 * np.median(squares)).mean() ** 0.5)


# ---- training --------------------------------------------------------------------------------


def ours(cell: Cell, store: Path, out: Path) -> dict[str, float]:
    """Train ours in this process: the defaults of `TrainConfig`, but for the rate and the order."""
    import gemma_scope_jax as gs
    from gemma_scope_jax.training.train import train

    kind = cell.method.removeprefix("ours_")
    prefixes = (cell.width // 16, cell.width // 4) if kind == "matryoshka" else ()
    kind, plain = kind.removesuffix("_without_momentum"), "without" in kind
    long = {"b1": 0.0, "clip": 1.2, "threshold_rate": 1.0} if plain else {}
    config = gs.TrainConfig(
        (
            gs.CoderConfig(
                LAYER,
                width=cell.width,
                target_l0=cell.l0,
                activation="batch_topk" if kind == "matryoshka" else kind,
                prefixes=prefixes,
                seed=cell.seed,
            ),
        ),
        store=str(store),
        tokens=cell.tokens,
        train_batch_size=BATCH,
        held_out=HELD_OUT,
        seed=cell.seed,
        optimizer=gs.OptimizerConfig(learning_rate=cell.rate, **long),
    )
    before = time.perf_counter(), time.process_time()
    ((_, coder),) = train(config, out / "run").items()
    lines = [json.loads(line) for line in (out / "run/log.jsonl").read_text().splitlines()]
    wall, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
    seconds = BATCH / lines[-1]["tokens_per_s"]
    arrays = {n: np.asarray(getattr(coder, n), np.float64) for n in ARRAYS}
    if coder.k is not None:
        arrays["k"] = np.asarray(coder.k)
    np.savez(out / "weights.npz", **arrays)  # pyright: ignore[reportArgumentType]
    return {"seconds": seconds, "cpu_seconds": cpu / wall * seconds}


def trained(cell: Cell, args: argparse.Namespace, stores: dict[str, Any]) -> dict[str, float]:
    """Train a cell; its folder has `weights.npz` then. Seconds an update."""
    out = args.folder / cell.name
    out.mkdir(parents=True, exist_ok=True)
    store = args.folder / f"train_{cell.tokens}"
    given = dataclasses.asdict(cell) | {
        "store": str(store),
        "rows": training_rows(stores["train"]),
        "folder": str(out),
        "threads": args.threads,
        "batch": BATCH,
        "scale": stores["scale"],
        "D": stores["train"].width("resid_post"),
    }
    mine = cell.method.startswith("ours")
    python, script = (sys.executable, __file__) if mine else (args.peers, PEER_SCRIPT)
    quiet = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    command = [str(python), str(script), *(["--train"] if mine else []), json.dumps(given)]
    done = subprocess.run(command, check=True, env=os.environ | quiet, stdout=subprocess.PIPE)
    return json.loads(done.stdout.decode().splitlines()[-1])


PEER_SCRIPT = ROOT / "benchmarks/train_quality_peers.py"


def training_rows(store: Any) -> int:
    """How many rows of a store are trained on."""
    from gemma_scope_jax.training.held_out import held_rows

    return len(store) - held_rows(len(store), HELD_OUT)


# ---- figures ---------------------------------------------------------------------------------


def codes(w: dict[str, np.ndarray], x: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Pre-activations, relu'd, of x [n, D] some rows at a time."""
    for a in range(0, len(x), 4096):
        yield slice(a, a + 4096), np.maximum(x[a : a + 4096] @ w["w_enc"] + w["b_enc"], 0)


def kept(w: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
    """The feature activations of pre-activations z."""
    if "k" in w:
        k = int(w["k"])
        edge = np.partition(z, -k, axis=1)[:, -k, None]
        return np.where((z >= edge) & (z > 0), z, 0)
    return np.where(z > w["threshold"], z, 0)


def matched(w: dict[str, np.ndarray], x: np.ndarray, l0: float) -> tuple[dict, float]:
    """The coder with all thresholds times the factor that gives it the L0 on x, and the factor."""
    if "k" in w:
        return w, 1.0
    threshold = np.maximum(w["threshold"], 1e-6 * np.abs(w["threshold"]).max() + 1e-12)
    ratios = np.concatenate([(z / threshold).ravel()[(z > 0).ravel()] for _, z in codes(w, x)])
    count = min(int(l0 * len(x)), len(ratios) - 1)
    factor = float(np.partition(ratios, -count - 1)[-count - 1])
    return w | {"threshold": (threshold * factor).astype(np.float32)}, factor


def figures(w: dict[str, np.ndarray], x: np.ndarray) -> dict[str, float]:
    """L0, FVU and firing of a coder in the published form on activations x [n, D]."""
    x64 = x.astype(np.float64)
    norm = np.linalg.norm(x64, axis=1)
    typical = norm < 3 * np.median(norm)
    spread = ((x64 - x64.mean(0)) ** 2).sum()
    typical_spread = ((x64[typical] - x64[typical].mean(0)) ** 2).sum()
    error, l0, fired = np.zeros(len(x)), np.zeros(len(x)), np.zeros(w["w_enc"].shape[1])
    for at, z in codes(w, x):
        f = kept(w, z)
        error[at] = ((x64[at] - (f @ w["w_dec"] + w["b_dec"])) ** 2).sum(1)
        l0[at], fired = (f > 0).sum(1), fired + (f > 0).sum(0)
    return {
        "l0": float(l0.mean()),
        "fvu": float(error.sum() / spread),
        "typical": float(error[typical].sum() / typical_spread),
        "silent": float((fired == 0).mean()),
        "seldom": float((fired < SELDOM * len(x)).mean()),
        "dense": float((fired > OFTEN * len(x)).mean()),
    }


def scores(file: Path, l0: float, stores: dict[str, Any]) -> dict[str, Any]:
    """All figures of a trained coder: on validation, on held-out training text, on other text."""
    with np.load(file) as found:
        w = {k: found[k] if k == "k" else found[k].astype(np.float32) for k in found.files}
    raw = figures(w, stores["validation"])["l0"]
    w, factor = matched(w, stores["validation"], l0)
    names = ("validation", "test", "other")
    return {"own_l0": raw, "factor": factor} | {n: figures(w, stores[n]) for n in names}


# ---- the ring --------------------------------------------------------------------------------


class Ring:
    """The results so far, and the runs that are missing."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        lines = table.read(args.results) if args.results.exists() else []
        self.lines, self.text = lines, ""
        self.done = {(*(line[k] for k in KEY), line.get("text", "")): line for line in lines}

    def result(self, cell: Cell) -> dict[str, Any]:
        """The line of a cell, trained now if need be."""
        key = (*dataclasses.astuple(cell), self.text)
        if found := self.done.get(key):
            return found
        took = trained(cell, self.args, self.stores)
        file = self.args.folder / cell.name / "weights.npz"
        line = dataclasses.asdict(cell) | {"text": self.text} | took
        line |= scores(file, cell.l0, self.stores)
        line = json.loads(json.dumps(line), parse_float=lambda v: float(f"{float(v):.5g}"))
        self.done[key] = line
        self.lines.append(line)
        self.args.results.parent.mkdir(parents=True, exist_ok=True)
        with self.args.results.open("a") as out:
            out.write(json.dumps(line) + "\n")
        test, other = line["test"], line["other"]
        print(
            f"{cell.name:55s} own L0 {line['own_l0']:6.1f}  FVU {line['validation']['fvu']:.4f} "
            f"{test['fvu']:.4f} {other['fvu']:.4f}  silent {100 * other['silent']:.1f} %  "
            f"{1e3 * line['seconds']:.0f} ms",
            flush=True,
        )
        return line

    def run(self, width: int, tokens: int) -> None:
        """All runs of a width and a number of activations."""
        stores = activations(self.args.folder, tokens)
        self.text = "-".join(stores[name].manifest["data"]["text"] for name in ("train", "other"))
        begin = training_rows(stores["train"])
        half = (begin + len(stores["train"])) // 2
        stores["validation"] = rows_of(stores["train"], begin, half)
        stores["test"] = rows_of(stores["train"], half, len(stores["train"]))
        stores["other"] = rows_of(stores["other"], 0, OTHER_TOKENS)
        sample = np.linspace(0, begin - 1, 16_384, dtype=np.int64)
        stores["scale"] = scale_of(stores["train"].read(sample)["resid_post"][0].astype(np.float32))
        self.stores = stores
        for method in self.args.methods:
            rate = self.best_rate(method, width, tokens)
            for l0 in (L0, *MORE_L0S) if self.args.more else (L0,):
                for seed in SEEDS if l0 == L0 else (0,):
                    self.result(Cell(method, width, tokens, l0, rate, seed))

    def best_rate(self, method: str, width: int, tokens: int) -> float:
        """The rate with the lowest FVU on validation, of three or more, a factor of two apart."""
        score = lambda rate: self.result(Cell(method, width, tokens, L0, rate, 0))["validation"][
            "fvu"
        ]
        middle = MIDDLE.get(method, 6e-3)
        found = {rate: score(rate) for rate in (middle / 2, middle, 2 * middle)}
        while True:
            best = min(found, key=found.__getitem__)
            if best not in (least := min(found), most := max(found)):
                return best
            new = least / 2 if best == least else 2 * most
            found[new] = score(new)


def comparable(lines: list[dict[str, Any]], width: int, tokens: int) -> list[dict[str, Any]]:
    """The lines of a width and a number of activations, of the text that most of them are on."""
    some = [r for r in lines if (r["width"], r["tokens"]) == (width, tokens)]
    texts = [r.get("text", "") for r in some]
    return [r for r in some if r.get("text", "") == max(texts, key=texts.count)]


def best_rate(lines: list[dict[str, Any]], method: str) -> float:
    """The rate that validation chose for a method, of `comparable` lines."""
    mine = [r for r in lines if (r["method"], r["l0"], r["seed"]) == (method, L0, 0)]
    return min(mine, key=lambda r: r["validation"]["fvu"])["rate"]


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each width, number of activations, L0 and method: means over seeds at the rate that
    validation chose; the spread is the largest less the smallest FVU."""
    rows, known = [], {tuple(line[k] for k in ("width", "tokens")) for line in lines}
    for width, tokens in sorted(known):
        some = comparable(lines, width, tokens)
        for l0 in sorted({r["l0"] for r in some}):
            found = []
            for method in (m for m in METHODS if any(r["method"] == m for r in some)):
                mine = [r for r in some if r["method"] == method]
                rate = best_rate(some, method)
                seeds = [r for r in mine if r["rate"] == rate and r["l0"] == l0]
                mean = lambda text, key, seeds=seeds: float(np.mean([r[text][key] for r in seeds]))
                if not seeds:
                    continue
                spread = np.ptp([r["other"]["fvu"] for r in seeds]) if len(seeds) > 1 else None
                found.append(
                    {
                        "width": f"{width:,}",
                        "activations": f"{tokens / 1e6:g} M",
                        "L0": l0,
                        "method": method.replace("_", " "),
                        "rate": f"{rate:g}",
                        "FVU": f"{mean('test', 'fvu'):.3f}",
                        "other text": f"{mean('other', 'fvu'):.3f}",
                        "spread": None if spread is None else f"{spread:.3f}",
                        "typical tokens": f"{mean('other', 'typical'):.3f}",
                        "silent": f"{100 * mean('other', 'silent'):.1f} %",
                        "dense": f"{100 * mean('other', 'dense'):.1f} %",
                        "ms": round(1e3 * min(r["seconds"] for r in seeds)),
                        "CPU ms": round(1e3 * min(r["cpu_seconds"] for r in seeds)),
                    }
                )
            rows += sorted(found, key=lambda row: row["other text"])
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--train"]:
        given = json.loads(sys.argv[2])
        cell = Cell(**{k: given[k] for k in KEY})
        print(json.dumps(ours(cell, Path(given["store"]), Path(given["folder"]))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, nargs="+", default=[2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[400_000])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--more", action="store_true", help=f"also L0s of {MORE_L0S}")
    parser.add_argument("--folder", type=Path, default=ROOT / "out/train_quality")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks/results/train_quality_cpu.jsonl"
    )
    parser.add_argument("--threads", type=int, default=2, help="of the peers")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers/bin/python")
    args = parser.parse_args()
    if not args.peers.exists() and any(m in PEERS for m in args.methods):
        raise SystemExit(f"{args.peers} is missing: run `make peers` first")
    args.folder.mkdir(parents=True, exist_ok=True)
    ring = Ring(args)
    for tokens in args.tokens:
        for width in args.width:
            ring.run(width, tokens)
    lines = [json.dumps(row) + "\n" for row in summary(ring.lines)]
    args.results.with_name(f"table_{args.results.name}").write_text("".join(lines))


if __name__ == "__main__":
    main()
