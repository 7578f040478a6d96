"""Probes and their metrics: ours against scikit-learn, which must be installed beside.

    .venv/bin/python benchmarks/trials/scikit_learn.py

Seconds are of the process's CPU time, medians of 5 in turns; the results are compared first.
"""

import statistics
import subprocess
import sys
import time
from functools import partial

import numpy as np

from gemma_scope_jax.data.ranks import auc
from gemma_scope_jax.probing.logistic import accuracy, f1, fit_logistic, weighted_f1


def seconds(works, repeats=5, calls=1):
    taken = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.process_time()
            for _ in range(calls):
                work()
            taken[name].append((time.process_time() - start) / calls)
    return {name: statistics.median(times) for name, times in taken.items()}


def import_seconds(module: str) -> float:
    clock = "time.process_time()"
    code = f"import time, numpy; t = {clock}; import {module}; print({clock} - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True) for _ in range(3)]
    return statistics.median(float(run.stdout) for run in runs)


def main() -> None:
    from sklearn import metrics
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    print("| what | ours | scikit-learn | ratio |\n| --- | --- | --- | --- |")
    for n in (1000, 100_000):
        y, scores = rng.integers(0, 2, n), rng.standard_normal(n).round(2)
        found = scores > 0
        pairs = {
            "AUC": (partial(auc, y, scores), partial(metrics.roc_auc_score, y, scores)),
            "F1": (partial(f1, y, scores), partial(metrics.f1_score, y, found)),
            "weighted F1": (
                partial(weighted_f1, y, scores),
                partial(metrics.f1_score, y, found, average="weighted"),
            ),
            "accuracy": (partial(accuracy, y, scores), partial(metrics.accuracy_score, y, found)),
        }
        for name, (ours, theirs) in pairs.items():
            assert abs(ours() - theirs()) < 1e-12
            a, b = seconds({"ours": ours, "theirs": theirs}, calls=20).values()
            print(f"| {name} of {n:,} | {1e6 * a:.0f} us | {1e6 * b:.0f} us | {b / a:.1f} |")
    for n, k in ((1000, 16), (1000, 640)):
        x = rng.standard_normal((n, k)) * rng.gamma(1, 30, k) + rng.standard_normal(k) * 100
        y = (x @ rng.standard_normal(k) / k + 30 * rng.standard_normal(n) > 0).astype(float)
        c = np.logspace(-5, 1, 4)

        def theirs(x=x, y=y, c=c):
            mean, spread = x.mean(0), x.std(0)
            found = []
            for one in c:  # the same objective: their penalty is of scaled columns
                fit = LogisticRegression(C=one, tol=1e-9, max_iter=10_000, solver="newton-cholesky")
                fit.fit((x - mean) / spread.mean(), y)
                found.append(fit.coef_[0] / spread.mean())
            return np.stack(found)

        spread = x.std(0).mean()
        ours = partial(fit_logistic, x[None], y[None], c / spread**2)
        w = ours().w[0]
        np.testing.assert_allclose(theirs(), w, atol=1e-5 * np.abs(w).max())
        a, b = seconds({"ours": ours, "theirs": theirs}, repeats=3).values()
        print(f"| 4 fits of {n:,} x {k} | {a:.2f} s | {b:.2f} s | {b / a:.2f} |")
    for module in ("scipy.stats", "sklearn.metrics, sklearn.linear_model"):
        print(f"\nimport {module}: {import_seconds(module):.2f} s")


if __name__ == "__main__":
    main()
