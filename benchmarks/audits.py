"""Finished audits as one table: what was measured, which features were found, what they move.

    for suite in bias_stereoset bias_crows_pairs bias_winobias bias_bbq; do
        .venv/bin/gemma-scope audit $suite --limit 400 --mediated 100 --controls 19 \\
            --sets SETS --out out/audits/$suite
    done
    .venv/bin/python benchmarks/audits.py out/audits/* > benchmarks/results/audits_cpu.jsonl

A row for each figure; what was found about features stands beside the first of a suite. `family p`:
whether any feature tells texts with and without the behaviour apart. AUC: how well, on texts held
out. `moves`: the change of the outcome as the features found are ablated; p: its rank among sets of
random features as active.
"""

import argparse
import json
from pathlib import Path

from table import figure


def _between(values: list[float] | None) -> str:
    return f"{min(values):.3f} to {max(values):.3f}" if values else ""


def rows(audit: dict) -> list[dict]:
    contrast, mediation = audit["contrast"], audit["mediation"]
    areas = contrast.get("aucs", {})
    area = lambda start: figure(next((v for d, v in areas.items() if d.startswith(start)), None))
    moved = mediation.get("behaviour", {}).get("change")
    of_features = {
        "family p": f"{contrast['family_p']:.2g}" if "family_p" in contrast else "",
        "AUC, raw probe": area("raw probe"),
        "8 features": area("top 8"),
        "8 random": area("8 random"),
        "moves": figure(moved, ".3f"),
        "random sets move": _between(mediation.get("controls")),
        "p": mediation.get("rank_p", ""),
        "items ablated": moved["n"] if moved else "",
    }
    found = []
    for n, one in enumerate(audit["figures"]):
        found.append({
            "suite": "" if n else audit["suite"]["name"],
            "figure": one["name"],
            "value": figure(one, ".3g"),
            "without": one["none"],
            **({} if n else of_features),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    for folder in parser.parse_args().folders:
        audit = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
        print(*map(json.dumps, rows(audit)), sep="\n")


if __name__ == "__main__":
    main()
