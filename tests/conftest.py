"""Strict JAX for every test: no silent dtype or rank promotion, eight CPU devices."""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute: less optimised code halves their time.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILE}".strip()

# What tests share is in support/, also for the programs that they start.
SHARED = (Path(__file__).parent / name for name in ("", "support"))
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (*map(str, SHARED), os.environ.get("PYTHONPATH")))
)

import jax  # noqa: E402
import jax.experimental.compilation_cache.compilation_cache as cache  # noqa: E402
import pytest  # noqa: E402

from gemma_scope_jax.model.config import PRESETS  # noqa: E402
from tiny import tiny_model  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def model():
    """The 270M shrunk to 4 layers of width 32, float32, random."""
    return tiny_model(PRESETS["gemma-3-270m"], layers=4)


@pytest.fixture
def tiny(monkeypatch, model):
    """For commands: the name "tiny" is the tiny model with a tokenizer of letters."""
    from commands import give_tiny

    give_tiny(monkeypatch, model)


MAPS = Path("/proc/self/maps")
MANY = 15_000


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Compiled programs are let go of before they take all memory maps that Linux allows a process
    (65,530; LLVM aborts at the next program), which two thousand tests in one process do."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """For runs of one program: the first compiles it, the others find it on disk."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    cache.reset_cache()  # it may have found that there was none
    for name, value in options.items():
        jax.config.update(name, value)
    yield options
    for name, value in before.items():
        jax.config.update(name, value)
    cache.reset_cache()
