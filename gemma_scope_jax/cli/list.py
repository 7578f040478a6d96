"""`gemma-scope list`."""

import json as json_format
from typing import Annotated

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.progress import byte_size

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
    print(*gs.address_table(shown), sep="\n")
    plural = "s" if len(found) > 1 else ""
    total = f"{len(found)} coder{plural}, {byte_size(sum(a.bytes for a in found))}"
    print(total + (f"; the first {len(shown)} shown" if len(shown) < len(found) else ""))
