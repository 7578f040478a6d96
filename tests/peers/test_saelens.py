"""Single-layer coders beside SAELens: what we write it loads, what it writes we load, both agree.

Its Gemma Scope 2 loader is run as it is, catalogue, config and hook names included; only its two
ways to the hub (`hf_hub_download`, and range requests for a header) are led to a local folder.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.coders.interop.saelens import save_saelens

pytestmark = [
    pytest.mark.peers,
    # what the peers warn about on import and in their own code is not ours to mend
    pytest.mark.filterwarnings("ignore"),
]


class Published(NamedTuple):
    """A coder as SAELens' catalogue and the release name it."""

    release: str
    category: str
    name: str
    reads: str
    writes: str
    layer: int


L0S = "layer_7_width_16k_l0_small"
CODERS = {
    "resid_post": Published(
        "res", "resid_post", "layer_12_width_16k_l0_medium", "resid_post", "resid_post", 12
    ),
    "resid_post_all": Published("res-all", "resid_post_all", L0S, "resid_post", "resid_post", 7),
    "attn_out": Published("att", "attn_out", "layer_9_width_16k_l0_small", "z", "z", 9),
    "mlp_out": Published("mlp", "mlp_out", "layer_15_width_16k_l0_big", "mlp_out", "mlp_out", 15),
    "transcoder": Published("transcoders-all", "transcoder_all", L0S, "mlp_in", "mlp_out", 7),
    "affine": Published(
        "transcoders-all", "transcoder_all", f"{L0S}_affine", "mlp_in", "mlp_out", 7
    ),
}
REPO = "google/gemma-scope-2-270m-pt"
kinds = pytest.mark.parametrize("kind", CODERS)


def coder(kind: str, features: int = 96) -> gs.SparseCoder:
    """Random weights with thresholds that some pre-activations pass and some do not."""
    *_, reads, writes, layer = CODERS[kind]
    width = 1024 if reads == "z" else 640
    rng = np.random.default_rng(list(CODERS).index(kind))
    normal = lambda *shape: jax.numpy.asarray(rng.standard_normal(shape, dtype=np.float32))
    return gs.SparseCoder(
        w_enc=normal(width, features) * width**-0.5,
        b_enc=normal(features) * 0.3,
        threshold=jax.numpy.abs(normal(features)),
        w_dec=normal(features, width) * features**-0.5,
        b_dec=normal(width),
        w_skip=normal(width, width) * width**-0.5 if kind == "affine" else None,
        layer=layer,
        reads=reads,
        writes=writes,
        info=CoderInfo(model_name="google/gemma-3-270m-pt"),
    )


def assert_same(ours: gs.SparseCoder, theirs) -> None:
    """Encodings, decodings and reconstructions within 1e-5, on inputs that fire about half."""
    import torch

    x = np.random.default_rng(7).standard_normal((3, 11, ours.d_in), dtype=np.float32)
    with torch.inference_mode():
        f = theirs.encode(torch.from_numpy(x))
        y, whole = theirs.decode(f).numpy(), theirs(torch.from_numpy(x)).numpy()
        f = f.numpy()
    assert 0.02 < (f > 0).mean() < 0.9
    np.testing.assert_allclose(np.asarray(ours.encode(x)), f, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(ours.reconstruct(x)), whole, atol=1e-5, rtol=1e-5)
    if ours.w_skip is None:
        np.testing.assert_allclose(np.asarray(ours.decode(f)), y, atol=1e-5, rtol=1e-5)
    else:
        zeros = np.zeros_like(x)
        np.testing.assert_allclose(np.asarray(ours.decode(f, zeros)), y, atol=1e-5, rtol=1e-5)
        assert np.abs(whole - y).max() > 0.1


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A local folder that SAELens takes for the hub: `hub / repo / file`."""
    from huggingface_hub.errors import LocalEntryNotFoundError
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def download(repo_id, filename, subfolder=None, force_download=False):
        path = tmp_path / repo_id / (subfolder or "") / filename
        if not path.is_file():
            raise LocalEntryNotFoundError(f"{path} is not there")
        return str(path)

    def get(url, headers):
        first, last = headers["Range"].removeprefix("bytes=").split("-")
        return SimpleNamespace(content=Path(url).read_bytes()[int(first) : int(last) + 1])

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "hf_hub_url", lambda repo_id, name: str(tmp_path / repo_id / name))
    monkeypatch.setattr(loaders, "_get_with_rate_limit_retry", get)
    return tmp_path


def from_pretrained(kind: str):
    from sae_lens import SAE

    return SAE.from_pretrained(f"gemma-scope-2-270m-pt-{CODERS[kind].release}", CODERS[kind].name)


def published(kind: str, hub: Path) -> Path:
    return hub / REPO / CODERS[kind].category / CODERS[kind].name


@kinds
def test_saelens_loads_what_we_save_in_the_published_layout(kind, hub):
    gs.save_coder(coder(kind), published(kind, hub))
    theirs = from_pretrained(kind)
    assert_same(coder(kind), theirs)
    names = {"sae": "SAE", "transcoder": "Transcoder", "skip_transcoder": "SkipTranscoder"}
    assert type(theirs).__name__ == "JumpReLU" + names[coder(kind).kind]
    assert (theirs.cfg.d_in, theirs.cfg.d_sae) == coder(kind).w_enc.shape
    assert theirs.cfg.metadata.model_name == "google/gemma-3-270m"
    modules = {
        "resid_post": "output",
        "z": "self_attn.o_proj.input",
        "mlp_in": "pre_feedforward_layernorm.output",
        "mlp_out": "post_feedforward_layernorm.output",
    }
    module = f"model.layers.{CODERS[kind].layer}.{modules[CODERS[kind].reads]}"
    assert theirs.cfg.metadata.hf_hook_name == module


@pytest.mark.parametrize("kind", ["attn_out", "affine"])
def test_both_infer_the_same_from_the_path_without_config(kind, hub):
    """At the true width: the path says 16k, and ours checks it."""
    folder = published(kind, hub)
    gs.save_coder(coder(kind, 16_384), folder)
    (folder / "config.json").unlink()
    theirs, ours = from_pretrained(kind), gs.load_coder(folder)
    assert (ours.reads, ours.writes, ours.layer) == CODERS[kind][3:6]
    assert ours.kind == ("skip_transcoder" if kind == "affine" else "sae")
    assert_same(ours, theirs)


@kinds
def test_saelens_loads_its_own_folders_written_by_us(kind, tmp_path):
    from sae_lens import SAE

    save_saelens(coder(kind), tmp_path / "coder")
    assert_same(coder(kind), SAE.load_from_disk(tmp_path / "coder"))


@kinds
def test_we_load_what_saelens_saves(kind, hub):
    gs.save_coder(coder(kind), published(kind, hub))
    theirs = from_pretrained(kind)
    theirs.save_model(hub / "saved")
    shutil.rmtree(hub / REPO)
    ours = gs.load_coder(hub / "saved")
    assert (ours.reads, ours.writes, ours.layer) == CODERS[kind][3:6]
    assert_same(ours, theirs)
    assert_same(gs.load_coder(hub / "saved"), theirs)


def test_a_sae_trained_by_saelens_with_its_decoder_bias_on_the_input(tmp_path):
    """`apply_b_dec_to_input` is folded into b_enc on loading."""
    import torch
    from sae_lens import SAE
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

    config = JumpReLUSAEConfig(d_in=640, d_sae=96, apply_b_dec_to_input=True)
    config.metadata.hook_name = "blocks.5.hook_resid_post"
    config.metadata.model_name = "google/gemma-3-270m"
    theirs, rng = JumpReLUSAE(config), torch.Generator().manual_seed(0)
    for weight in theirs.parameters():
        weight.data = 0.1 * torch.randn(weight.shape, generator=rng)
    theirs.save_model(tmp_path)
    ours = gs.load_coder(tmp_path)
    assert (ours.reads, ours.layer) == ("resid_post", 5)
    assert_same(ours, SAE.load_from_disk(tmp_path))


PACKAGED = sorted(p.parent for p in Path(gs.__file__).parent.glob("packaged/*/config.json"))


@pytest.mark.parametrize("folder", PACKAGED, ids=lambda folder: folder.name)
def test_what_we_trained_encodes_the_same(folder, tmp_path):
    """Inputs as strong as the coder knows them: the activations that its features write."""
    import torch
    from sae_lens import SAE

    ours, rng = gs.load_coder(folder), np.random.default_rng(0)
    ours = jax.tree.map(lambda a: a.astype("float32"), ours)  # SAELens' folders are
    save_saelens(ours, tmp_path)
    theirs = SAE.load_from_disk(tmp_path)
    x = rng.standard_normal((256, ours.d_in)).astype(np.float32)
    x *= 2.0 * float(np.median(ours.threshold / np.linalg.norm(ours.w_enc, axis=0)))
    with torch.inference_mode():
        f = theirs.encode(torch.from_numpy(x)).numpy()
    assert (f > 0).any(-1).all()
    np.testing.assert_allclose(np.asarray(ours.encode(x)), f, rtol=1e-5, atol=1e-5 * f.max())
