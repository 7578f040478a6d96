"""A room alone: `JAX_PLATFORMS=cpu .venv/bin/python -m pytest tests/coders`; one test: `-k`.

`make quick` takes a minute, `make test` 14; tests/<room>/ follows gemma_scope_jax/<room>/.
What tests share lies in tests/support/ (imported by its bare name) and in a room's conftest.py.
`model` below is the tiny Gemma; `coders.random_coder` makes every kind of coder for it.
JAX is strict here (support/strict_jax.py), warnings are errors, and there are eight devices.
"""

import contextlib
import gc
import os
from pathlib import Path

import jax
import jax.experimental.compilation_cache.compilation_cache as cache
import pytest

import strict_jax  # noqa: F401
from durations import long_tests, name_of
from gemma_scope_jax.model.config import PRESETS
from tiny import tiny_model

# Programs that tests start find what is shared, too.
HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(HERE), str(HERE / "support"), os.environ.get("PYTHONPATH")))
)


def pytest_collection_modifyitems(items):
    """Mark as quick what `make durations` did not find to be long, and the laws."""
    long = long_tests()
    for item in items:
        kept = item.get_closest_marker("law") or name_of(item) not in long
        if kept and not any(map(item.get_closest_marker, ("slow", "official", "peers"))):
            item.add_marker("quick")


@pytest.fixture(scope="session")
def model():
    """The 270M shrunk to 4 layers of width 32, float32, random."""
    return tiny_model(PRESETS["gemma-3-270m"], layers=4)


@pytest.fixture
def tiny(monkeypatch, model):
    """For commands: the name "tiny" is the tiny model with a tokenizer of letters."""
    from commands import give_tiny

    give_tiny(monkeypatch, model)


@pytest.fixture
def compiled():
    """Grows by one with everything that XLA compiles."""
    events = []
    watch = lambda event, seconds, **_: "backend_compile" in event and events.append(event)
    jax.monitoring.register_event_duration_secs_listener(watch)
    yield events
    jax.monitoring.unregister_event_duration_listener(watch)


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


@contextlib.contextmanager
def programs_kept_in(folder: Path):
    """What is compiled is kept in a folder, and found there instead of compiled again."""
    options = {
        "jax_compilation_cache_dir": str(folder),
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


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """For runs of one program: the first compiles it, the others find it on disk."""
    with programs_kept_in(tmp_path_factory.mktemp("compiled")) as options:
        yield options


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compile_once_for_all(compiled_folder):
    """As `compile_once`, and other files of tests find it, too."""
    with programs_kept_in(compiled_folder):
        yield
