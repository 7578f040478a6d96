"""The published coders that fit what is asked for, found offline, in plain data."""

from typing import Any

from gemma_scope_jax.coders.release.catalog import Address, addresses, nearest_addresses
from gemma_scope_jax.errors import InputError


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
    """The published coders that match, without asking the network.

    pattern: part of an address, or a glob: `*-1b-it/transcoder_all/*_16k_*`.
    model: `270m`, `1b-it`, `google/gemma-3-1b-pt`; kind: sae, transcoder, crosscoder or clt.
    width: 16k, 65k, 262k, 524k or 1m; l0: small, medium or big, the label of the target L0.
    Raises `InputError` naming the nearest coders if nothing matches.
    """
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
    return found


def describe_address(a: Address) -> dict[str, Any]:
    """What is known of a published coder, as plain data for JSON; sizes in bytes."""
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
