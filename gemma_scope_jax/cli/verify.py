"""`gemma-scope verify`."""

import gemma_scope_jax as gs
from gemma_scope_jax.cli import shared


def command(store: shared.Store) -> None:
    """Read every byte of a feature store, and name a damaged file if there is one."""
    found = gs.FeatureStore(store)
    found.verify()
    print(found.summary())
