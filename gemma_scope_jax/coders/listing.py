"""Search among the published coders, offline, with results as plain data."""

from typing import Any

from gemma_scope_jax.coders.release.catalog import Address, addresses, nearest_addresses
from gemma_scope_jax.errors import InputError


def find_addresses(pattern: str = "*", **filters: Any) -> list[Address]:
    """The published coders that match, without network access.

    pattern: part of an address, or a glob: `*-1b-it/transcoder_all/*_16k_*`.
    filters: model, kind, layer, width, l0, affine, as `addresses` takes them; None matches all.
    Raises `InputError` naming the nearest coders if nothing matches.
    """
    found = list(addresses(**filters, pattern=pattern))
    if not found:
        given = {name: value for name, value in filters.items() if value is not None}
        wanted = " ".join([pattern, *(f"{name} {value}" for name, value in given.items())])
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
