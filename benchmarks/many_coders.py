"""Eight coders in one run against eight runs of one: seconds for the same tokens each.

    .venv/bin/python benchmarks/many_coders.py [--config configs/sweep_270m.py] [--rounds 5]

The coders are those of the config (SAEs of four layers with two targets each), on the real Gemma 3
270M and the bundled sample text, over and over, which does for timing. Every run is the compiled
step of training: a model pass up to the last layer that it reads, then the updates of its coders,
each from a full buffer and from where the data starts them. Steps are timed in turns. Both ways
must compute the same: a coder starts alike whatever is beside it, and the losses of the first pass
are compared.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax

import gemma_scope_jax as gs
from gemma_scope_jax.data.document_files import SEPARATOR
from gemma_scope_jax.training.config_file import load_config
from gemma_scope_jax.training.ends import start
from gemma_scope_jax.training.feeds import TextFeed
from gemma_scope_jax.training.state import first_state, make_plan

ROOT = Path(__file__).resolve().parent.parent
BUFFER = 4096


class Run:
    """A run at its first update, and its next batches."""

    def __init__(self, config, model, documents):
        self.feed = TextFeed(make_plan(config, model.config), model, documents)
        state = first_state(self.feed.plan, model.config)
        with self.feed.batches(None, 0) as data:
            while not self.feed.ready(state):
                state, _ = self.feed.step(state, next(data)[0], False)
            self.batch = next(data)[0]
        self.state = start(self.feed.plan, state, self.feed.sample(state), {})

    def step(self) -> tuple[float, list[float]]:
        """(seconds, the loss of each coder) of a pass and its updates."""
        begin = time.perf_counter()
        self.state, parts = self.feed.step(self.state, self.batch, True)
        jax.block_until_ready(self.state)
        return time.perf_counter() - begin, [float(x) for p in parts or () for x in p["loss"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/sweep_270m.py")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    config = dataclasses.replace(load_config(args.config), buffer=BUFFER)
    model = gs.load_model(config.model, dtype=config.model_dtype)
    sample = Path(gs.__file__).parent / "packaged" / "sample.txt"
    documents = sample.read_text(encoding="utf-8").split(SEPARATOR) * 40
    runs = [
        Run(dataclasses.replace(config, coders=cs), model, documents)
        for cs in (config.coders, *((c,) for c in config.coders))
    ]
    compiled, losses = zip(*(run.step() for run in runs))
    same = all(abs(one[0] / both - 1) < 1e-3 for both, one in zip(losses[0], losses[1:]))
    times = [[run.step()[0] for run in runs] for _ in range(args.rounds)]
    seconds = [statistics.median(column) for column in zip(*times)]
    tokens, ratio = config.batch_size * config.context_size, seconds[0] / sum(seconds[1:])
    print(
        f"{len(config.coders)} coders, {tokens} tokens through the model and {config.updates} "
        f"updates of {config.train_batch_size} a pass"
    )
    print(
        f"  one run {seconds[0]:.2f} s a pass; single runs "
        + ", ".join(f"{s:.2f}" for s in seconds[1:])
        + f", together {sum(seconds[1:]):.2f} s"
    )
    print(f"  first pass with compilation: {compiled[0]:.1f} s against {sum(compiled[1:]):.1f} s")
    print(
        json.dumps(
            {
                "name": "many_coders",
                "ours": tokens / seconds[0],
                "singles": tokens / sum(seconds[1:]),
                "ratio": ratio,
                "agree": same,
            }
        )
    )


if __name__ == "__main__":
    main()
