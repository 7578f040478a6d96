"""`gemma-scope export`."""

from typing import Annotated, Literal

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared
from gemma_scope_jax.progress import byte_size


def command(
    store: shared.Store,
    *,
    out: Annotated[shared.LocalPlace, tyro.conf.arg(metavar="FOLDER")],
    format: Literal["delphi"] = "delphi",
    splits: int | None = None,
    json: shared.Json = False,
) -> None:
    """Write a feature store, which itself is Parquet, as delphi's cache of latents.

    Args:
        out: A new folder for the files.
        format: The format: delphi reads safetensors files.
        splits: Split delphi's features into this many files.
    """
    found = gs.FeatureStore(store)
    folder = gs.export_store(found, out, format, splits=splits)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    facts = {"folder": str(folder), "bytes": size, "tokens": len(found)}
    shared.print_result(f"{len(found):,} tokens, {byte_size(size)}: {folder}", facts, json)
