"""Strict JAX for every test: no silent dtype or rank promotion, eight CPU devices."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute: less optimised code halves their time.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILE}".strip()

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)
