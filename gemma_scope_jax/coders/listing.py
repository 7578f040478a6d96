"""Search among the published coders, offline, with results as plain data."""

from collections.abc import Iterator, Sequence
from typing import Any

from gemma_scope_jax.coders.release.catalog import Address, addresses, nearest_addresses
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.progress import byte_size

COLUMNS = ("address", "kind", "layer", "sites", "features", "L0", "size")
NUMBERS = ("layer", "features", "L0", "size")  # right-aligned


def find_addresses(
    pattern: str = "*",
    *,
    model: str | None = None,
    kind: str | None = None,
    layer: int | None = None,
    width: str | None = None,
    l0: str | None = None,
    affine: bool | None = None,
) -> list[Address]:
    """The published coders that match, without network access.

    pattern: part of an address, or a glob: `*-1b-it/transcoder_all/*_16k_*`.
    For the others see `addresses`; None matches all.
    Raises `InputError` naming the nearest coders if nothing matches.
    """
    given: dict[str, Any] = {"model": model, "kind": kind, "layer": layer, "width": width}
    given |= {"l0": l0, "affine": affine}
    found = list(addresses(**given, pattern=pattern))
    if not found:
        filters = (f"{name} {value}" for name, value in given.items() if value is not None)
        wanted = " ".join([pattern, *filters])
        close = ", ".join(map(str, nearest_addresses(wanted)))
        hint = close and f"; nearest: {close}"
        raise InputError(f"no published coder matches {wanted!r}{hint}")
    return found


def describe_address(a: Address) -> dict[str, Any]:
    """A published coder as plain data for JSON; sizes in bytes."""
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


def address_table(found: Sequence[Address]) -> Iterator[str]:
    """Published coders as the lines of a table, headings first."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for a in found:
        layers = "all" if a.kind == "clt" else ",".join(map(str, a.layers))
        sites = a.reads if a.reads == a.writes else f"{a.reads} -> {a.writes}"
        l0 = "?" if a.l0 is None else str(a.l0)
        width = f"{a.width_exact:,}"
        rows.append((str(a), a.kind, layers, sites, width, l0, byte_size(a.bytes)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = [str.rjust if name in NUMBERS else str.ljust for name in COLUMNS]
    for row in rows:
        yield "  ".join(s(cell, w) for s, cell, w in zip(sides, row, widths)).rstrip()
