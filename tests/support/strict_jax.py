"""Strict JAX on eight CPU devices, for tests and for the programs that they start: no silent
promotion of dtypes or ranks, and the same flags for XLA, hence the same bits."""

import os

import jax

# Tests compile far more than they compute: less optimised code halves their time.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# Read as the backend starts, and by the programs that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if FAST_COMPILE not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILE}".strip()

jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)
