"""`gemma-scope benchmark`."""

from typing import Annotated, Literal

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared
from gemma_scope_jax.errors import InputError

Tables = Annotated[
    tuple[shared.Place, ...], tyro.conf.arg(metavar="TABLE...", help_behavior_hint="")
]


def command(
    coders: shared.Coders = (shared.PACKAGED_CODER,),
    *,
    probing: Tables = (),
    without: Tables = (),
    protocol: Literal["sae-probes", "saebench"] = "sae-probes",
    ks: tuple[int, ...] = (),
    absorption: bool = False,
    words: int | None = 200,
    tpp: Tables = (),
    scr: Tables = (),
    limit: int | None = None,
    out: shared.Folder = "out/benchmark",
    model: shared.Model = "",
    dtype: shared.Dtype = "auto",
) -> None:
    """Benchmark coders side by side: sparse probing, feature absorption, TPP, SCR.

    Tables are CSV files (.csv, .csv.zst, .csv.gz; globs and folders too) with a column "prompt" or
    "text" and labels beside it. The same command continues an interrupted one; what has been
    measured is not measured again.

    Args:
        probing: Probe tables with a column "target": how well k features tell its classes apart.
        without: Leave out tables with these names, or globs of names, from probing.
        protocol: How to probe: sae-probes (last token, tuned penalty, AUC) or saebench (mean,
            accuracy).
        ks: Probe with these numbers of features. The default is the protocol's.
        absorption: Measure the absorption of first letters of the vocabulary's words.
        words: Use this many words for each letter; None uses all, as SAEBench does.
        tpp: Measure TPP on tables with a column "target" of 3 classes or more.
        scr: Measure SCR on tables with two columns of two values each beside the text.
        limit: Use at most this many examples of a table.
        out: The folder of the results: comparison.md, and SAEBench's JSON for each coder and
            benchmark.
    """
    if not (probing or absorption or tpp or scr):
        raise InputError("nothing to measure: give --probing, --absorption, --tpp or --scr")
    tables = gs.benchmark_tables(probing=probing, without=without, tpp=tpp, scr=scr, limit=limit)
    gs.check_writable(out)
    opened = shared.open_coders(coders, model, one_layer=True)
    weights = shared.load_model(opened.model, dtype)
    given = (weights, opened.coders, opened.tokenizer, out, tables)
    how = {"protocol": protocol, "ks": ks, "absorption": absorption, "words": words}
    result = gs.benchmark(*given, **how, limit=limit)
    print(result.table)
    print(f"by task: {result.file}")
