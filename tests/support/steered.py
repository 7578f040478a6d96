"""Tiny coders, steps and what NumPy makes of them, for the tests of steering."""

import numpy as np

import gemma_scope_jax as gs

LAYERS, D, F, LAYER = 4, 32, 24, 2
IDS = np.random.default_rng(0).integers(2, 300, (3, 9)).astype(np.int32)
RNG = np.random.default_rng(1)
VECTOR = RNG.normal(size=D).astype(np.float32)


def coder(seed=0, **place):
    r = np.random.default_rng(seed)
    normal = lambda *shape: r.normal(size=shape).astype(np.float32)
    return gs.SparseCoder(
        w_enc=normal(D, F) / D**0.5,
        b_enc=0.1 * normal(F),
        threshold=0.2 + 0.3 * r.random(F, np.float32),
        w_dec=normal(F, D),
        b_dec=0.1 * normal(D),
        **place,
    )


SAE = coder(layer=LAYER)
TRANSCODER = coder(1, layer=LAYER, reads="mlp_in", writes="mlp_out")


def clt():
    r, X = np.random.default_rng(3), 3
    normal = lambda *shape: r.normal(size=shape).astype(np.float32)
    return gs.MultiLayerCoder(
        w_enc=normal(X, D, F) / D**0.5,
        b_enc=0.1 * normal(X, F),
        threshold=np.full((X, F), 0.1, np.float32),
        w_dec=normal(X * (X + 1) // 2, F, D),
        b_dec=0.1 * normal(X, D),
        layers=(1, 2, 3),
        reads="mlp_in",
        writes="mlp_out",
    )


def target(kind):
    if kind == "vector":
        return {"vector": VECTOR.tolist(), "site": "resid_post", "layer": LAYER}
    return {"feature": ACTIVE}


ACTIVE, OTHER = 5, 7
STRENGTHS = {"add": 3.0, "rescale": -1.5, "cap": -0.2, "floor": 0.4, "scale": 2.5}
STRENGTHS |= {"clamp": 1.7, "clamp_min": 0.9, "clamp_max": 0.3}


def step(op, kind="feature", **more):
    strength = {"strength": STRENGTHS[op]} if op in STRENGTHS else {}
    other = {"other": OTHER} if op == "swap" else {}
    return {"op": op, **strength, **other, **target(kind), **more}


def activation(sae, x, feature):
    z = x @ np.asarray(sae.w_enc[:, feature], np.float64) + float(sae.b_enc[feature])
    return np.where(z > float(sae.threshold[feature]), z, 0.0)


def oracle(op, x, sae, source, kind, in_norms=False):
    """x [B, T, D] after the operation, by the table of `SteeringStep`."""
    f, g = activation(sae, source, ACTIVE), activation(sae, source, OTHER)
    v, w = np.asarray(sae.w_dec[ACTIVE], np.float64), np.asarray(sae.w_dec[OTHER], np.float64)
    v = VECTOR.astype(np.float64) if kind == "vector" else v
    u, s = v / np.linalg.norm(v), STRENGTHS.get(op, 0.0)
    p, norm = x @ u, np.linalg.norm(x, axis=-1)
    level = s * norm if in_norms else np.full(p.shape, s)
    along = lambda amount, row: amount[..., None] * row
    change = {
        "add": lambda: along(level, u if in_norms else v),
        "rescale": lambda: along((s - 1) * p, u),
        "cap": lambda: along(np.minimum(level - p, 0), u),
        "floor": lambda: along(np.maximum(level - p, 0), u),
        "project_out": lambda: along(-p, u),
        "clamp": lambda: along(s - f, v),
        "clamp_min": lambda: along(np.maximum(s - f, 0), v),
        "clamp_max": lambda: along(np.minimum(s - f, 0), v),
        "scale": lambda: along((s - 1) * f, v),
        "ablate": lambda: along(-f, v),
        "swap": lambda: along(g - f, v) + along(f - g, w),
    }[op]()
    change[:, 0] = 0.0  # <bos>
    return x + change


def after(model, spec, site="resid_post", coders=SAE, prompts=None, ids=IDS):
    items = [*gs.steering(model, spec, coders, prompts), gs.capture(site, LAYER)]
    return np.asarray(gs.run(model, ids, items).reads[site])


WHEN = {"feature": OTHER, "above": 0.35}
PROMPTS = [IDS[0], IDS[1, :5], IDS[2, :7]]
SPECS = [
    [step("add", "vector", unit="norm")],
    [step("clamp", when=WHEN), step("rescale", "vector")],
    [step("swap", where="generated")],
    [step("ablate", where="prompt"), step("floor", "vector", where={"from": 6})],
    [step("scale", where="last"), step("cap", "vector")],
]
