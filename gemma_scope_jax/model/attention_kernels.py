"""The fastest exact attention of each accelerator: a splash kernel on TPUs, cuDNN on GPUs.

Both support static masks only: the whole context or a local window. They serve passes without a
cache whose tokens are in the order of their positions; everything else, and every CPU, uses
`attend`.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from gemma_scope_jax.model.attention import Tokens, attend

BLOCK = 512  # queries and keys per tile of the splash kernel; shorter if 512 does not divide T


def attend_in_order(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    tokens: Tokens,
    packed: bool,
    window: int,
    is_global: Array | bool,
    mesh: AbstractMesh | None = None,
) -> Array:
    """z [B, T, N, H] as `attend` gives it, for tokens in the order of their positions.

    packed     whether there are several segments, or padding
    is_global  whether to see the whole context rather than the last `window` tokens
    mesh       the abstract mesh that the weights are on, or None

    A kernel is differentiable in reverse mode only: read or freeze `attn_pattern` for forward mode
    on an accelerator.
    """

    def plain(q, k, v, segments):
        reach = jnp.where(is_global, jnp.int32(2**30), jnp.int32(window))
        return attend(q, k, v, scale, tokens, tokens, reach, True)

    device = None if mesh is None else mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    kernel = kernel_for(platform, q, packed)
    if mesh is None and set(jax.typeof(q).sharding.mesh.axis_types) - {AxisType.Manual}:
        kernel = None  # another library's mesh: only the compiler can split over it
    segments = tokens.segments if packed else None
    if kernel is None:
        return plain(q, k, v, segments)

    def fast(q, k, v, segments):
        whole, local = (
            over_mesh(partial(kernel, scale=scale, window=w), mesh, q, k) for w in (None, window)
        )
        if is_global is True or window >= q.shape[1]:
            z = whole(q, k, v, segments)
        elif is_global is False:
            z = local(q, k, v, segments)
        else:
            z = jax.lax.cond(is_global, whole, local, q, k, v, segments)
        if segments is None:
            return z
        return jnp.where((segments > 0)[:, :, None, None], z, jnp.zeros((), z.dtype))

    if mesh is not None:
        return fast(q, k, v, segments)
    # Arrays may be on the CPU of a machine with accelerators: only lowering can tell.
    choices = {"cuda" if platform == "gpu" else platform: fast}
    return jax.lax.platform_dependent(q, k, v, segments, default=plain, **choices)


def kernel_for(platform: str, q: Array, packed: bool) -> Callable | None:
    """The kernel for queries of this shape and dtype on `platform`, if one exists."""
    B, T, N, H = q.shape
    if platform == "tpu" and T % 128 == 0 and H % 128 == 0:
        return splash
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if platform == "gpu" and half and not packed and H % 8 == 0 and _widest_cudnn_head() >= H:
        return flash
    return None


def _widest_cudnn_head() -> int:
    """The largest head dimension of cuDNN's flash attention on this GPU; 0 if it has none."""
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    generation = re.fullmatch(r"(\d+)\.\d+", capability)  # AMD's have another form
    if generation is None or int(generation[1]) < 8:
        return 0
    return 256 if int(generation[1]) >= 9 else 128


def over_mesh(kernel: Callable, mesh: AbstractMesh | None, q: Array, k: Array) -> Callable:
    """`kernel(q, k, v, segments)` with the batch over "data" and the heads over "model".

    The compiler cannot split a kernel itself. An axis that does not divide stays whole; if there
    are fewer kv heads than devices, they are repeated so that each device has the one that its
    queries use.
    """
    if mesh is None:
        return kernel
    B, _, N, _ = q.shape
    K, model = k.shape[2], mesh.shape["model"]
    split = N % model == 0 and (K % model == 0 or model % K == 0)
    batch = "data" if B % mesh.shape["data"] == 0 else None
    spec = PartitionSpec(batch, None, "model" if split else None, None)
    specs = (spec, spec, spec, PartitionSpec(batch, None))
    mapped = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)

    def run(q, k, v, segments):
        if split and K % model:
            k, v = (jnp.repeat(x, model // K, axis=2) for x in (k, v))
        return mapped(q, k, v, segments)

    return run


def splash(
    q: Array, k: Array, v: Array, segments, *, scale: float, window: int | None, interpret=False
) -> Array:
    """z [B, T, N, H] by the Pallas splash kernel; T must be a multiple of 128, `window` None is
    the whole context. `segments` int [B, T] or None: tokens of equal ids see each other, also
    padding (0)."""
    from jax.experimental.pallas.ops.tpu import splash_attention as sa

    T, N = q.shape[1:3]
    mask = sa.CausalMask((T, T)) if window is None else sa.LocalMask((T, T), (window - 1, 0), 0)
    b = math.gcd(T, BLOCK)
    kernel = sa.make_splash_mha(
        sa.MultiHeadMask([mask] * N),
        block_sizes=sa.BlockSizes(b, b, b, b, b, b, b, b),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def row(q, k, v, segments) -> Any:
        return kernel(q, k, v, None if segments is None else sa.SegmentIds(segments, segments))

    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    return jnp.moveaxis(jax.vmap(row)(q, k, v, segments), 1, 2)


def flash(q, k, v, segments: None, *, scale, window: int | None, implementation: Any = "cudnn"):
    """z [B, T, N, H] by cuDNN's flash attention, for one segment; `window` None is all of it."""
    reach = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=reach, implementation=implementation
    )
