"""`gemma-scope activations`."""

from typing import Annotated, Literal

import tyro

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared


def command(
    config: Annotated[shared.Place, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")],
    *,
    out: shared.Folder,
    tokens: int | None = None,
    dtype: Literal["bfloat16", "int8"] = "bfloat16",
    overrides: tyro.conf.Suppress[tuple[str, ...]] = (),
) -> None:
    """Store the activations that a training config reads, to train from with --store FOLDER.

    Any field of the config can be set here, as for `gemma-scope train`.

    Args:
        config: A Python file that sets `config`. As with `train`, it is run.
        out: The folder of the store; the same command continues an interrupted one.
        tokens: Store this many activations. The default is the config's.
        dtype: How activations are stored; int8 has a scale for each token and halves the size.
    """
    gs.check_writable(out)
    wanted = gs.override(gs.load_config(config), overrides)
    gs.use_compilation_cache()
    gs.store_activations(wanted, out, tokens, dtype)
    print(out)
