"""Coders of other libraries: SAELens' folders and circuit-tracer's, read and written."""

from gemma_scope_jax.coders.interop_circuit_tracer import (
    is_circuit_tracer_folder,
    load_circuit_tracer,
    save_circuit_tracer,
)
from gemma_scope_jax.coders.interop_saelens import (
    is_saelens_folder,
    load_saelens,
    save_saelens,
)

__all__ = [
    "is_circuit_tracer_folder",
    "is_saelens_folder",
    "load_circuit_tracer",
    "load_saelens",
    "save_circuit_tracer",
    "save_saelens",
]
