"""`gemma-scope list`: the release as a table to read or as JSON to work with, offline."""

import json as json_format
from collections.abc import Iterable
from typing import Any

from gemma_scope_jax.coders.release.catalog import Address, addresses, nearest_addresses
from gemma_scope_jax.errors import InputError

COLUMNS = ("address", "kind", "layer", "sites", "features", "L0", "size")
NUMBERS = ("layer", "features", "L0", "size")  # right-aligned


def list_coders(
    pattern: str = "*",
    *,
    model: str | None = None,
    kind: str | None = None,
    layer: int | None = None,
    width: str | None = None,
    l0: str | None = None,
    affine: bool | None = None,
    json: bool = False,
    limit: int | None = None,
) -> None:
    """Print the published coders that match, without asking the network.

    pattern: part of an address, or a glob: `*-1b-it/transcoder_all/*_16k_*`.
    model: `270m`, `1b-it`, `google/gemma-3-1b-pt`; kind: sae, transcoder, crosscoder or clt.
    width: 16k, 65k, 262k, 524k or 1m; l0: small, medium or big, the label of the target L0.
    json: one JSON array of objects instead of a table; limit: at most that many rows.
    Raises `InputError` naming the nearest coders if nothing matches.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: expected 1 or more")
    filters: dict[str, Any] = dict(
        model=model, kind=kind, layer=layer, width=width, l0=l0, affine=affine
    )
    found = list(addresses(**filters, pattern=pattern))
    if not found:
        given = {name: value for name, value in filters.items() if value is not None}
        wanted = " ".join([pattern, *(f"{name} {value}" for name, value in given.items())])
        close = ", ".join(str(a) for a in nearest_addresses(wanted))
        raise InputError(
            f"no published coder matches {wanted!r}" + (close and f"; nearest: {close}")
        )
    shown = found[:limit]
    if json:
        print("[", ",\n ".join(json_format.dumps(_record(a)) for a in shown), "]", sep="")
        return
    _print_table(shown)
    total = (
        f"{len(found)} coder{'s' if len(found) > 1 else ''}, {_size(sum(a.bytes for a in found))}"
    )
    print(total + (f"; the first {len(shown)} shown" if len(shown) < len(found) else ""))


def _record(a: Address) -> dict:
    return {
        "address": str(a),
        "kind": a.kind,
        "layers": list(a.layers),
        "reads": a.reads,
        "writes": a.writes,
        "d_in": a.d_in,
        "width": a.width_exact,
        "l0": a.l0,
        "affine": a.affine,
        "base_model": a.base_model,
        "bytes": a.bytes,
    }


def _row(a: Address) -> tuple[str, ...]:
    layers = "all" if a.kind == "clt" else ",".join(map(str, a.layers))
    sites = a.reads if a.reads == a.writes else f"{a.reads} -> {a.writes}"
    l0 = "?" if a.l0 is None else str(a.l0)
    return (str(a), a.kind, layers, sites, f"{a.width_exact:,}", l0, _size(a.bytes))


def _print_table(shown: Iterable[Address]) -> None:
    rows = [COLUMNS, *map(_row, shown)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = (
            cell.rjust(width) if name in NUMBERS else cell.ljust(width)
            for name, cell, width in zip(COLUMNS, row, widths)
        )
        print("  ".join(cells).rstrip())


def _size(count: int) -> str:
    """Bytes in decimal units, as disks and the hub count: 335.7 MB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.1f} {unit}"
