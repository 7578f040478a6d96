"""`load_model`: names, dtypes, meshes, slices, memory, the packaged model, whatever the format."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoint_files import CONFIG, assert_same, edit_tensors, random_model, write_gguf
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints import load, packaged
from gemma_scope_jax.model.checkpoints.huggingface import save_huggingface
from gemma_scope_jax.model.checkpoints.load import load_model, model_config
from gemma_scope_jax.model.config import PRESETS, Model, abstract_params, normalise_model_name
from gemma_scope_jax.model.sharding import make_mesh, param_shardings


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    save_huggingface(model, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    "stored, wanted",
    [("float32", "bfloat16"), ("float16", np.dtype("float32")), ("bfloat16", jnp.bfloat16)],
)
def test_dtypes(folder, stored, wanted):
    edit_tensors(folder, lambda t: {name: x.astype(jnp.dtype(stored)) for name, x in t.items()})
    loaded = load_model(folder, dtype=wanted)
    tensors = load_file(folder / "model.safetensors")
    assert loaded.dtype == jnp.dtype(wanted)
    assert loaded.params.blocks.w_down.dtype == jnp.dtype(wanted)
    np.testing.assert_array_equal(
        loaded.params.embed, tensors["model.embed_tokens.weight"].astype(jnp.dtype(wanted))
    )
    assert loaded.params.final_norm.dtype == loaded.params.blocks.q_norm.dtype == jnp.float32
    np.testing.assert_array_equal(
        loaded.params.final_norm, tensors["model.norm.weight"].astype(np.float32)
    )


@pytest.mark.parametrize(
    "mesh, rows",  # rows of the embedding in a slice, in each part
    [(None, 7), (None, 300), ((2, 4), 7), ((1, 8), 100), ((4, 2), 149)],
)
def test_mesh_and_embedding_slices(model, folder, mesh, rows, monkeypatch):
    parts = {None: 1, (2, 4): 4, (1, 8): 1, (4, 2): 2}[mesh]  # 8 does not divide 300
    monkeypatch.setattr(load, "EMBED_SLICE", 4 * CONFIG.d_model * parts * rows)
    mesh = mesh and make_mesh(*mesh)
    loaded = load_model(folder, dtype="float32", mesh=mesh)
    assert_same(loaded, model)
    if mesh:
        shardings = param_shardings(CONFIG, mesh)
        same = jax.tree.map(
            lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), loaded.params, shardings
        )
        assert jax.tree.all(same)


def test_progress_ends_at_the_size_of_the_model(folder):
    calls = []
    loaded = load_model(folder, progress=lambda done, total: calls.append((done, total)))
    total = sum(x.nbytes for x in jax.tree.leaves(loaded.params))
    assert {t for _, t in calls} == {total} and calls[-1][0] == total
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_a_second_load_compiles_nothing(folder):
    programs = (load._allocate, load._write, load._merge)
    load_model(folder)
    before = [program._cache_size() for program in programs]
    load_model(folder)
    assert min(before) > 0 and [program._cache_size() for program in programs] == before
    load_model(folder, mesh=make_mesh(1, 2))
    assert all(program._cache_size() > count for program, count in zip(programs, before))


def test_float16_is_refused_because_the_residual_stream_outgrows_it(folder):
    for dtype in ("float16", jnp.float16, np.dtype("float16")):
        with pytest.raises(
            InputError, match="float16: .* outgrows it .*choose bfloat16 or float32"
        ):
            load_model(folder, dtype=dtype)


def test_numbers_too_large_for_the_dtype(folder):
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_tensors(folder, lambda t: t | {name: np.full_like(t[name], np.finfo(np.float32).max)})
    with pytest.raises(InputError, match="w_q of layer 1 holds numbers too large for bfloat16"):
        load_model(folder, dtype="bfloat16")
    assert load_model(folder, dtype="float32").dtype == jnp.float32
    edit_tensors(folder, lambda t: t | {name: np.full(t[name].shape, 1e300)})
    with pytest.raises(InputError, match="w_q of layer 1 holds NaN or infinity"):
        load_model(folder, dtype="float32")


def test_float64_becomes_float32(model, folder):
    edit_tensors(folder, lambda t: {name: x.astype(np.float64) for name, x in t.items()})
    assert_same(load_model(folder, dtype="float32"), model)


@pytest.mark.parametrize("mesh", [None, (2, 4)])
def test_gguf(tmp_path, mesh, monkeypatch):
    monkeypatch.setattr(load, "EMBED_SLICE", 4 * 4 * 32 * 13)
    # Norms on a grid where adding and taking away 1 is exact.
    exact = lambda x: jnp.round(x * np.float32(256)) / np.float32(256)
    model = random_model()
    model = model.replace(params=jax.tree.map(exact, model.params))
    write_gguf(tmp_path / "tiny.gguf", model)
    loaded = load_model(tmp_path / "tiny.gguf", dtype="float32", mesh=mesh and make_mesh(*mesh))
    assert_same(loaded, model)
    assert model_config(tmp_path / "tiny.gguf") == loaded.config


def test_broken_gguf(tmp_path, model):
    path = tmp_path / "tiny.gguf"
    with pytest.raises(InputError, match="no such file"):
        load_model("no/such/tiny.gguf")
    write_gguf(path, model)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(InputError, match="tiny.gguf"):
        load_model(path)
    path.write_bytes(b"hello")
    with pytest.raises(InputError, match="not a GGUF file"):
        load_model(path)


# --- names and the hub ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, repository",
    [
        ("gemma-3-270m", "google/gemma-3-270m"),
        ("gemma-3-270m-pt", "google/gemma-3-270m"),
        ("gemma-3-270m-it", "google/gemma-3-270m-it"),
        ("gemma-3-1b", "google/gemma-3-1b-pt"),
        ("google/gemma-3-4b-it", "google/gemma-3-4b-it"),
        ("gemma-v3-12b-pt", "google/gemma-3-12b-pt"),
        ("google/gemma-3-27b-pt", "google/gemma-3-27b-pt"),
    ],
)
def test_names_on_the_hub(name, repository):
    assert normalise_model_name(name) == repository
    assert model_config(name) == PRESETS["-".join(repository.split("/")[1].split("-")[:3])]


@pytest.mark.parametrize(
    "source, message",
    [
        ("gemma-3-2b", "did you mean gemma-3-27b|did you mean gemma-3-1b|did you mean"),
        ("google/gemma-2-9b", "unknown model"),
        ("", "unknown model"),
        ("./no-such-folder", "no such file or folder"),
        (Path("gemma-3-4b-folder"), "no such file or folder"),
        ("/no/such/folder", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
    ],
)
def test_unknown_sources(source, message):
    for call in (load_model, model_config):
        with pytest.raises(InputError, match=message):
            call(source)


def test_dtypes_that_are_none():
    for dtype in ("int8", "float64", "bf17", None, 3):
        with pytest.raises(InputError, match="choose bfloat16"):
            load_model("gemma-3-270m", dtype=dtype)


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(InputError, match="neither a Hugging Face folder"):
        load_model(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="pass the folder"):
        load_model(tmp_path / "x.safetensors")


def test_hub_download(model, folder, monkeypatch):
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same(load_model("gemma-3-1b-it", dtype="float32"), model)
    assert asked.pop() == ("google/gemma-3-1b-it", list(load.WEIGHTS))
    assert model_config("unsloth/gemma-3-1b-pt").layers == CONFIG.layers
    assert asked.pop() == ("unsloth/gemma-3-1b-pt", list(load.CONFIGS))


@pytest.mark.parametrize(
    "error, message",
    [
        ("GatedRepoError", "gated: accept its terms at .*google/gemma-3-1b-pt, then run `hf auth"),
        ("RepositoryNotFoundError", "neither a local folder nor a repository"),
        ("LocalEntryNotFoundError", "not on this disk, and the hub cannot be reached; check the"),
        (None, "cannot be downloaded .*boom"),
    ],
)
def test_hub_errors_say_what_to_do(error, message, monkeypatch):
    import huggingface_hub.errors as errors

    def snapshot_download(repository, allow_patterns):
        if error is None:
            raise RuntimeError("boom\nsecond line")
        kind = getattr(errors, error)
        raise kind.__new__(kind, "first line\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=message):
        load_model("gemma-3-1b")


def test_a_hub_that_is_switched_off_or_holds_other_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="nobody/x: not on this disk.* off .HF_HUB_OFFLINE.; ch"):
        load_model("nobody/x")
    part = lambda *args, **options: str(tmp_path)  # in part, or of pytorch_model.bin
    monkeypatch.setattr("huggingface_hub.snapshot_download", part)
    with pytest.raises(InputError, match="nobody/x: has no safetensors files, or the hub is sw"):
        load_model("nobody/x")


# --- the packaged model --------------------------------------------------------------------------


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """Four installed parts of a made-up distribution, and its real size and checksum."""
    name, content = "made-up-gguf", os.urandom(1000)
    for i in range(4):
        data = tmp_path / "site" / f"made_up_gguf_part{i + 1}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise RuntimeError('nobody may run this')")
        (data / f"{packaged.FILE}.part{i:02}").write_bytes(content[i * 250 : i * 250 + 250])
    info = tmp_path / "site" / "made_up_gguf-1.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "DISTRIBUTION", name)
    monkeypatch.setattr(packaged, "SIZE", len(content))
    monkeypatch.setattr(packaged, "SHA256", hashlib.sha256(content).hexdigest())
    return tmp_path, content


def test_packaged_parts_are_joined_verified_and_cached(fake_package):
    tmp_path, content = fake_package
    path = packaged.packaged_model()
    assert path.read_bytes() == content and tmp_path in path.parents
    first = path.stat().st_mtime_ns
    assert packaged.packaged_model().stat().st_mtime_ns == first
    path.write_bytes(content[::-1])  # same size, other bytes
    assert packaged.packaged_model().read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == [packaged.FILE]


def test_altered_missing_and_other_packages(fake_package, monkeypatch):
    tmp_path, _ = fake_package
    part = tmp_path / "site" / "made_up_gguf_part3" / "data" / f"{packaged.FILE}.part02"
    part.write_bytes(part.read_bytes()[::-1])
    with pytest.raises(InputError, match="do not add up"):
        packaged.packaged_model()
    assert not list((tmp_path / "cache").rglob("*.gguf*"))
    part.unlink()
    with pytest.raises(InputError, match="part3 has no"):
        packaged.packaged_model()
    monkeypatch.setattr(packaged, "VERSION", "2.0.0")
    with pytest.raises(InputError, match="1.0.0 is installed"):
        packaged.packaged_model()
    monkeypatch.setattr(packaged, "DISTRIBUTION", "not-installed-gguf")
    with pytest.raises(InputError, match="none is installed"):
        packaged.packaged_model()


def test_cache_that_cannot_be_written(fake_package, monkeypatch):
    tmp_path, _ = fake_package
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        packaged.packaged_model()


@pytest.mark.real
def test_the_real_packaged_model():
    assert model_config("gemma-3-270m") == PRESETS["gemma-3-270m"]
    loaded = load_model("gemma-3-270m")
    assert loaded.config == PRESETS["gemma-3-270m"]
    assert loaded.dtype == jnp.bfloat16 and loaded.params.embed.shape == (262_144, 640)
    # The gain 1 + w of a trained model's first norm is far from the neutral 1.
    assert 1.0 < float(jnp.abs(loaded.params.blocks.pre_attn_norm[0]).mean()) < 100.0


# --- memory --------------------------------------------------------------------------------------

PEAK = """
import re, resource, sys
import jax
from gemma_scope_jax.model.checkpoints.load import load_model

def peak():  # MiB; not ru_maxrss where it would start at the parent's
    try:
        with open("/proc/self/status") as file:
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read()).group(1)) / 2**10
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

load_model(sys.argv[1])  # what code and compiler take
before = peak()
model = jax.block_until_ready(load_model(sys.argv[2]))
size = sum(x.nbytes for x in jax.tree.leaves(model)) / 2**20
largest = max(x.nbytes for x in jax.tree.leaves(model)) / 2**20
print(size, largest, peak() - before)
"""


def test_loading_takes_little_more_than_the_model(tmp_path, folder):
    config = dataclasses.replace(
        CONFIG, layers=8, d_model=512, d_mlp=2048, head_dim=128, vocab=120_000
    )
    shapes = abstract_params(config)
    big = Model(jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), shapes), config)
    save_huggingface(big, tmp_path / "big")
    out = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "big")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    ).stdout
    size, largest, grown = map(float, out.split())
    assert size > 150 and largest > 100
    assert 0.9 * size < grown < size + largest, (size, largest, grown)
