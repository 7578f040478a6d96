"""`gemma-scope list`."""

import json as json_format
from typing import Annotated, Any

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared
from gemma_scope_jax.errors import InputError

COLUMNS = ("address", "kind", "layer", "sites", "features", "L0", "size")
NUMBERS = ("layer", "features", "L0", "size")  # right-aligned
Name = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]


def command(
    pattern: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATTERN")] = "*",
    *,
    model: Name = None,
    kind: Name = None,
    layer: int | None = None,
    width: Name = None,
    l0: Name = None,
    affine: bool | None = None,
    json: shared.Json = False,
    limit: int | None = None,
) -> None:
    """List the published coders, offline.

    Args:
        pattern: List addresses that contain this text or match this glob, such as
            "*-1b-it/transcoder_all/*_16k_*".
        model: List coders of this model: 270m, 1b-it, google/gemma-3-1b-pt, ...
        kind: List coders of this kind: sae, transcoder, crosscoder or clt.
        layer: List coders that read this layer.
        width: List coders of this width: 16k, 65k, 262k, 524k or 1m.
        l0: List coders of this target L0: small, medium or big.
        affine: List coders with, or without, a skip connection.
        limit: List at most this many.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: expected 1 or more")
    found = gs.find_addresses(
        pattern, model=model, kind=kind, layer=layer, width=width, l0=l0, affine=affine
    )
    shown = found[:limit]
    if json:
        records = [json_format.dumps(gs.describe_address(a)) for a in shown]
        print("[", ",\n ".join(records), "]", sep="")
        return
    rows = [COLUMNS, *map(_row, shown)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = [str.rjust if name in NUMBERS else str.ljust for name in COLUMNS]
    for row in rows:
        cells = (side(cell, width) for side, cell, width in zip(sides, row, widths))
        print("  ".join(cells).rstrip())
    plural = "s" if len(found) > 1 else ""
    total = f"{len(found)} coder{plural}, {shared.size(sum(a.bytes for a in found), '.1f')}"
    print(total + (f"; the first {len(shown)} shown" if len(shown) < len(found) else ""))


def _row(a: Any) -> tuple[str, ...]:
    layers = "all" if a.kind == "clt" else ",".join(map(str, a.layers))
    sites = a.reads if a.reads == a.writes else f"{a.reads} -> {a.writes}"
    l0 = "?" if a.l0 is None else str(a.l0)
    return (str(a), a.kind, layers, sites, f"{a.width_exact:,}", l0, shared.size(a.bytes, ".1f"))
