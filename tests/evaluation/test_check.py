"""`check` finds every silent mistake that it claims to find, and none in a coder that is right.

The coders are exact where they belong: with fewer tokens than dimensions, the directions that the
data span reconstruct it without error, and nothing else does.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.evaluation.check import _warnings, check_coder
from gemma_scope_jax.evaluation.figures import Losses
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.run import run

LAYER = 1
SITES = ("resid_mid", "mlp_in", "mlp_out", "resid_post")


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(0).integers(3, 300, (2, 12)).astype(np.int32)
    return tokens, np.ones_like(tokens)


@pytest.fixture(scope="module")
def data(model, batch):
    """What the model has at every site of layers 0 to 2, float64 [22, 32], <bos> left out."""
    reads = [capture(site, (0, 1, 2)) for site in SITES]
    reads.append(capture("post_mlp_scale", (0, 1, 2)))
    reads = run(model, batch[0], reads, segments=batch[1]).reads
    flat = {s: np.asarray(a[:, :, 1:], np.float64).reshape(3, 22, -1) for s, a in reads.items()}
    gain = lambda name: 1 + np.asarray(getattr(model.params.blocks, name)[LAYER], np.float64)
    here = {(site, layer): flat[site][layer] for site in SITES for layer in range(3)}
    here["mlp_in", "ungained"] = here["mlp_in", 1] / gain("pre_mlp_norm")
    here["mlp_out", "ungained"] = here["mlp_out", 1] / gain("post_mlp_norm")
    here["mlp_out", "unnormed"] = here["mlp_out", "ungained"] / flat["post_mlp_scale"][1]
    return here


def linear_coder(x, y, *, skip=None, reads="resid_post", writes="resid_post", **info):
    """y from x exactly, on these tokens: pairs of opposite features along x's main directions."""
    skip = np.zeros((32, 32)) if skip is None else skip
    mean = x.mean(0)
    _, _, directions = np.linalg.svd(x - mean, full_matrices=False)
    directions = directions[: len(x) - 1]
    target = y - x @ skip
    back = np.linalg.lstsq((x - mean) @ directions.T, target - target.mean(0), rcond=None)[0]
    enc = np.concatenate([directions, -directions]).T
    as_array = lambda a: jnp.asarray(a, jnp.float32)
    return SparseCoder(
        as_array(enc),
        as_array(-mean @ enc),
        jnp.zeros(enc.shape[1]),
        as_array(np.concatenate([back, -back])),
        as_array(target.mean(0)),
        None if reads == writes else as_array(skip),
        layer=LAYER,
        reads=reads,
        writes=writes,
        info=CoderInfo(l0=21.0, **info),
    )


SKIP = np.random.default_rng(1).normal(size=(32, 32)) / 32**0.5
AS_TRANSCODER = dict(skip=SKIP, reads="mlp_in", writes="mlp_out")


def sae(data, site, where):
    return linear_coder(data[site, where], data[site, where])


def transcoder(data, x=("mlp_in", 1), y=("mlp_out", 1)):
    return linear_coder(data[x], data[y], **AS_TRANSCODER)


def test_right_coders_look_right(model, batch, data):
    for coder in (sae(data, "resid_post", 1), transcoder(data)):
        report = check_coder(model, coder, [batch])
        assert report.warnings == []
        assert report.stated.fit.fvu < 1e-6 and report.metrics.fvu < 1e-6
        assert abs(report.metrics.delta_loss) < 1e-4
        assert min(a.fit.fvu for a in report.alternatives) > 1e-3
        assert str(report).endswith("looks right") and "<- its config" in str(report)


@pytest.mark.parametrize(
    "made_for, verdict, better",
    [
        (("resid_post", 0), "another layer", "resid_post of layer 0"),
        (("resid_post", 2), "another layer", "resid_post of layer 2"),
        (("resid_mid", 1), "wrong site", "resid_mid of layer 1"),
        (("mlp_in", 1), "wrong site", "mlp_in of layer 1"),
        (("mlp_out", 1), "wrong site", "mlp_out of layer 1"),
    ],
)
def test_saes_that_sit_at_the_wrong_place(model, batch, data, made_for, verdict, better):
    report = check_coder(model, sae(data, *made_for), [batch])
    assert len(report.warnings) >= 1
    assert verdict in report.warnings[0] and f"with {better}," in report.warnings[0]
    assert report.as_dict()["warnings"] == report.warnings


@pytest.mark.parametrize(
    "made_for, verdict, better",
    [
        (dict(x=("mlp_in", "ungained")), "gain is missing", "mlp_in of layer 1 without its gain"),
        (dict(x=("resid_mid", 1)), "wrong site", "resid_mid of layer 1"),
        (dict(x=("mlp_in", 2), y=("mlp_out", 2)), "another layer", "mlp_in of layer 2"),
        (dict(y=("mlp_out", "ungained")), "gain is missing", "mlp_out of layer 1 without its gain"),
        (dict(y=("mlp_out", "unnormed")), "wrong site", "mlp_out of layer 1 before its norm"),
    ],
)
def test_transcoders_made_for_something_else(model, batch, data, made_for, verdict, better):
    report = check_coder(model, transcoder(data, **made_for), [batch])
    assert verdict in report.warnings[0] and better in report.warnings[0]


def test_transposed_skip(model, batch, data):
    coder = transcoder(data)
    report = check_coder(model, coder.replace(w_skip=coder.w_skip.T), [batch])
    assert report.warnings[0].startswith("the skip connection is transposed: FVU is 0.000")


def test_target_l0_far_away_and_a_coder_of_no_use(model, batch, data):
    coder = sae(data, "resid_post", 1)
    report = check_coder(model, coder.replace(info=CoderInfo(l0=64.0)), [batch])
    assert len(report.warnings) == 1 and "L0 is 21.0, the target 64" in report.warnings[0]
    assert check_coder(model, coder.replace(info=CoderInfo(l0=60.0)), [batch]).warnings == []
    silent = coder.replace(threshold=coder.threshold + 1e9, b_dec=coder.b_dec * 0)
    report = check_coder(model, silent, [batch])
    assert "hardly explains anything" in report.warnings[0]
    assert "more than a factor 3" in report.warnings[1]


@pytest.mark.parametrize(
    "clean, spliced, ablated, warned",
    [(2.0, 5.0, 4.0, True), (2.0, 3.9, 4.0, False), (2.0, 2.06, 2.04, False)],
)
def test_harm_beyond_zeros(model, batch, data, clean, spliced, ablated, warned):
    """Worse than zeros is wrong; unless zeros do nothing either, as at many single sites."""
    report = check_coder(model, sae(data, "resid_post", 1), [batch])
    metrics = dataclasses.replace(report.metrics, losses=Losses(20, clean, spliced, ablated))
    warnings = _warnings(metrics, 21.0, report.stated, report.alternatives)
    assert [("costs the model" in w) for w in warnings] == [True] * warned


def test_several_layers(model, batch, data):
    """A crosscoder's layers move together; its target L0 is not held against it."""
    from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder

    def crosscoder(first):
        parts = [linear_coder(*[data["resid_post", first + i]] * 2) for i in range(2)]
        stack = lambda name: jnp.stack([getattr(p, name) for p in parts])
        own = stack("w_dec")
        w_dec = jnp.stack([own[0], jnp.zeros_like(own[0]), own[1]])  # 0 -> 0, 0 -> 1, 1 -> 1
        return MultiLayerCoder(
            stack("w_enc"),
            stack("b_enc"),
            stack("threshold"),
            w_dec,
            stack("b_dec"),
            layers=(0, 1),
            info=CoderInfo(l0=1.0),
        )

    assert check_coder(model, crosscoder(0), [batch]).warnings == []
    report = check_coder(model, crosscoder(1), [batch])
    assert "another layer" in report.warnings[0] and "layers 1, 2" in report.warnings[0]
    assert jax.tree.all(jax.tree.map(np.isfinite, [layer.fvu for layer in report.metrics.layers]))
