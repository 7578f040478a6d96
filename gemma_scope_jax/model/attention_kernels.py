"""The fastest exact attention of each accelerator: a splash kernel on TPUs, cuDNN on GPUs.

Both know static masks only, a whole context or a local window. So they serve passes without a cache
whose tokens stand in the order of their positions; all else, and every CPU, takes `attend`.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from gemma_scope_jax.model.attention import Tokens, attend

BLOCK = 512  # queries and keys a tile of the splash kernel; shorter where it does not divide T


def attend_in_order(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    tokens: Tokens,
    packed: bool,
    window: int,
    is_global: jax.Array | bool,
    mesh: Any = None,
) -> jax.Array:
    """z [B, T, N, H] as `attend` gives it, of tokens that stand in order of position.

    packed     whether there are other segments than a single one without padding
    is_global  whether to see the whole context rather than the last `window` tokens
    mesh       the abstract mesh the weights live on, or None

    Differentiable in reverse mode only where a kernel serves: read or freeze `attn_pattern` for
    forward mode on an accelerator.
    """

    def plain(q, k, v, segments):
        reach = jnp.where(is_global, jnp.int32(2**30), jnp.int32(window))
        return attend(q, k, v, scale, tokens, tokens, reach, True)

    device = None if mesh is None else mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    kernel = kernel_for(platform, q, packed)
    if mesh is None and set(jax.typeof(q).sharding.mesh.axis_types) - {AxisType.Manual}:
        kernel = None  # somebody else's mesh: only the compiler knows how to split over it
    segments = tokens.segments if packed else None
    if kernel is None:
        return plain(q, k, v, segments)

    def fast(q, k, v, segments):
        whole, local = (partial(kernel, scale=scale, window=w) for w in (None, window))
        whole, local = over_mesh(whole, mesh, q, k), over_mesh(local, mesh, q, k)
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
    # Arrays may have been put on the CPU of a machine with accelerators: only lowering knows.
    choices = {"cuda" if platform == "gpu" else platform: fast}
    return jax.lax.platform_dependent(q, k, v, segments, default=plain, **choices)


def kernel_for(platform: str, q: jax.Array, packed: bool) -> Callable | None:
    """The kernel that takes queries of this shape and dtype on `platform`, if there is one."""
    B, T, N, H = q.shape
    if platform == "tpu" and T % 128 == 0 and H % 128 == 0:
        return splash
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if platform == "gpu" and half and not packed and H % 8 == 0 and _widest_cudnn_head() >= H:
        return flash
    return None


def _widest_cudnn_head() -> int:
    """The largest head dimension of cuDNN's flash attention on the GPU found here; 0 for none."""
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    generation = re.fullmatch(r"(\d+)\.\d+", capability)  # AMD's look otherwise
    if generation is None or int(generation[1]) < 8:
        return 0
    return 256 if int(generation[1]) >= 9 else 128


def over_mesh(kernel: Callable, mesh: Any, q: jax.Array, k: jax.Array) -> Callable:
    """`kernel(q, k, v, segments)` with the batch over "data" and the heads over "model".

    The compiler cannot split a kernel itself. An axis that does not divide stays whole; fewer kv
    heads than devices are repeated, each device keeping the one that its queries use.
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
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """z [B, T, N, H] by the Pallas splash kernel, T a multiple of 128; `window=None` for all.

    `segments` int [B, T] or None: equal ids, side by side, see each other, padding (0) too.
    """
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


def flash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: None,
    *,
    scale: float,
    window: int | None,
    implementation: Any = "cudnn",
) -> jax.Array:
    """z [B, T, N, H] by cuDNN's flash attention, of one segment; `window=None` for all."""
    reach = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=reach, implementation=implementation
    )
