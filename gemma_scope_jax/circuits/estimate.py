"""What a graph would take, before anything runs: rows, bytes, products, time.

The bytes are the compiler's, for the program that finds the rows, on abstract inputs of the sizes
to come. How many features will be active is estimated from the coders' target L0.
"""

import dataclasses
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_scope_jax.circuits.attribute import AttributionSettings, rows_together
from gemma_scope_jax.circuits.linear import Blocks, Frozen, TargetRows, Written, effects, room_for
from gemma_scope_jax.circuits.neurons import graph_coders, neurons_of
from gemma_scope_jax.circuits.sources import BLOCK, room_of, slots_of
from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.attention import Tokens
from gemma_scope_jax.model.config import GemmaConfig, Model, abstract_params
from gemma_scope_jax.model.sharding import param_shardings
from gemma_scope_jax.progress import byte_size

UNKNOWN_L0 = 64  # active features of a token and layer, if the coders do not say
FILLED = 0.5  # of the slots that a block has, about this share is used


@dataclasses.dataclass(frozen=True)
class AttributionEstimate:
    """The result of `plan_attribution`; as text, a few lines."""

    tokens: int
    active: int  # features on the prompt, from the coders' L0
    candidates: int  # of these, considered
    rows: int  # features and targets to be explained
    memory: int  # bytes on a device: all weights, what is frozen and written, a batch of rows
    host: int  # bytes of the rows, in the memory of the host
    flops: float
    seconds: float | None  # at the rate of large products on this device

    def __str__(self) -> str:
        time = "unknown" if self.seconds is None else f"at least {self.seconds:,.0f} seconds"
        return (
            f"prompt   {self.tokens:,} tokens, about {self.active:,} active features, of which "
            f"{self.candidates:,} are considered\n"
            f"rows     {self.rows:,}, {byte_size(self.host)} in the host's memory\n"
            f"memory   {byte_size(self.memory)} on a device\n"
            f"products {self.flops / 1e12:,.2f} TFLOP\n"
            f"time     {time}"
        )


def plan_attribution(
    config: GemmaConfig,
    coders: CoderSet | Coder | Iterable[Coder] | None,
    tokens: int,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    timed: bool = True,
    **settings: Any,
) -> AttributionEstimate:
    """An `AttributionEstimate` for `attribute` on a prompt of `tokens` tokens.

    Compiles the program that finds rows, and runs nothing but, if `timed`, one product. Neither the
    model's nor the coders' weights are needed: their shapes are. Raises `InputError`.
    """
    coders, how = graph_coders(config, coders), AttributionSettings(**settings)
    if not 1 <= whole_number("tokens", tokens) <= config.context:
        raise InputError(f"{tokens} tokens: the context of {config.name} is {config.context}")
    active = active_estimate(coders, tokens)
    considered = min(active, how.max_candidates)
    rows = min(how.max_feature_nodes or considered, considered) + how.max_n_logits
    columns = considered + (config.layers + 1) * tokens
    options = {"dtype": dtype, "mesh": mesh, "rest": considered < active}
    given = abstract_inputs(config, coders, tokens, considered, **options)
    # also the weights that rows do not need are there
    whole = jax.jit(lambda *given: effects(*given), keep_unused=True)
    found: Any = whole.lower(*given).compile().memory_analysis()
    names = ("argument", "output", "temp", "generated_code")
    arrays = [] if neurons_of(coders) else jax.tree.leaves(list(coders))  # those are the model's
    # the coders, the MLPs' inputs and outputs, and what the choice of candidates holds
    layers = config.layers * room_for(tokens) * config.d_model * 4
    kept = layers * (2 + (considered < active))
    kept += sum(x.size * x.dtype.itemsize for x in arrays)
    flops = rows * row_flops(config, coders, tokens)
    devices = 1 if mesh is None else mesh.size
    return AttributionEstimate(
        tokens=tokens,
        active=active,
        candidates=considered,
        rows=rows,
        memory=int(sum(getattr(found, f"{name}_size_in_bytes") for name in names)) + kept,
        host=4 * rows * columns,
        flops=flops,
        seconds=flops / devices / product_rate() if timed else None,
    )


def active_estimate(coders: CoderSet, tokens: int) -> int:
    """Active features on a prompt: the coders' target L0, or `UNKNOWN_L0` a layer, a token."""
    each = (c.k or c.info.l0 or min(UNKNOWN_L0, c.width) * len(c.layers) for c in coders)
    return max(1, int(sum(each) * max(1, tokens - coders[0].first)))


def row_flops(config: GemmaConfig, coders: CoderSet, tokens: int) -> float:
    """Products of one row, on average: it begins half way up, at the last token."""
    c, D = config, config.d_model
    H, skip = c.head_dim, any(coder.w_skip is not None for coder in coders)
    dense = 2.0 * tokens * D * (c.heads * H + c.kv_heads * H + (D if skip else 0))

    def pairs(window: int) -> float:
        near = min(tokens, window)
        return near * (near + 1) / 2 + (tokens - near) * near

    reach = [tokens if c.is_global(layer) else c.window for layer in range(c.layers)]
    mixing = sum(2.0 * pairs(window) * c.heads * H for window in reach)
    return (c.layers * dense + mixing) / 2


def product_rate(size: int = 2048) -> float:
    """Float32 products a second that the default device reaches on large matrices."""
    x = jnp.ones((size, size), jnp.float32)
    times = jax.jit(partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    times(x, x).block_until_ready()
    begin = time.perf_counter()
    for _ in range(3):
        y = times(x, x)
    y.block_until_ready()
    return 3 * 2.0 * size**3 / (time.perf_counter() - begin)


def abstract_inputs(
    config: GemmaConfig,
    coders: CoderSet,
    tokens: int,
    considered: int,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    rest: bool = False,
) -> tuple[Model, Frozen, Written, TargetRows]:
    """The shapes that `linear.effects` is called with, placed on a mesh as `attribute` does.

    rest: whether more features are active than are considered
    """
    c, L, T, D = config, config.layers, room_for(tokens), config.d_model

    def array(*shape: int, kind: Any = jnp.float32, split: int | None = None) -> Any:
        place = None
        if mesh is not None:
            fits = split is not None and shape[split] % mesh.shape["model"] == 0
            axes = (None,) * (split or 0) + (("model",) if fits else ())
            place = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=place)

    params = abstract_params(c, dtype)
    if mesh is not None:
        put = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        params = jax.tree.map(put, params, param_shardings(c, mesh))
    whole = partial(array, kind=jnp.int32)
    frozen = Frozen(
        q=array(L, T, c.heads, c.head_dim, kind=dtype),
        k=array(L, T, c.kv_heads, c.head_dim, kind=dtype),
        pre_attn_scale=array(L, T),
        post_attn_scale=array(L, T),
        pre_mlp_scale=array(L, T),
        final_scale=array(T),
        embed=array(T, D),
        log_sums=array(L, c.heads, T),
        tokens=Tokens(whole(1, T), whole(1, T)),
    )
    results = room_of(-(-int(considered / FILLED) // BLOCK))
    cross = any(coder.multi_layer for coder in coders)
    count = room_of(results * (L + 1) // 2) if cross else results
    slots = slots_of(considered, L * tokens)
    blocks = Blocks(
        rows=array(count, BLOCK // slots, slots, D, split=2),
        positions=whole(count, BLOCK // slots),
        result=whole(count),
        start=whole(L + 1),
        results=results,
    )
    skip = next((coder.w_skip for coder in coders if coder.w_skip is not None), None)
    skips = None if skip is None else array(L, D, D, kind=skip.dtype)
    first = min(T, max([1, *(coder.first for coder in coders)]))
    written = Written(
        blocks,
        array(L, T, D),
        array(L, D),
        array(L, first, D),
        array(L, T, D) if rest else None,
        skips,
    )
    R = rows_together(mesh)
    rows = TargetRows(whole(R, 1), whole(R, 1), array(R, 1, D))
    return Model(params, c), frozen, written, rows
