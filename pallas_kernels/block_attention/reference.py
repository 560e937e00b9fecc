"""Block-sparse attention, the oracle: quadratic, f32, every quantity written out.

Method: PAROAttention (arXiv 2506.16054) with the numerics of SageAttention (arXiv 2410.02367): scores in log2 units, P
rounded to nearest, the row sum taken from the rounded P. Runs on anything; unusual only in that it is never chosen by
default. Integers are emulated exactly: products of at most 127 * 127 summed over at most 1040 terms stay below 2^24, so
a float32 matmul of integer values gives the int32 result.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import _fp4
from pallas_kernels._check import FLOATS, WIDTHS
from pallas_kernels._choose import ALL_WIDTHS, Request, widths_served

FEATURES = ("delta",)


def why_not(request: Request) -> str | None:
    """The oracle serves every width at float32, bfloat16 and float16, wherever integers stay exact in float32."""
    if request.dtype not in FLOATS:
        return f"dtype {request.dtype} is not served; it serves {', '.join(FLOATS)}"
    return widths_served(request, ALL_WIDTHS, FEATURES) or inexact(request)


def inexact(request: Request) -> str | None:
    """A reason when an integer product could exceed what float32 holds exactly."""
    if request.qk != "bf16" and request.head_dim > 1040:
        return f"head_dim {request.head_dim} > 1040: an int8 product would not be exact in float32"
    if request.pv != "bf16" and request.block[1] > 1040:
        return f"block of {request.block[1]} key tokens > 1040: an int8 product would not be exact in float32"
    return None


def quantise_p(p: jax.Array, width: str, dtype: jnp.dtype) -> jax.Array:
    """P in [0, 1] at the width it is multiplied at, as float32 levels. `dtype`: that of V, for width "bf16".

    The last axis is the keys of one block: fp4 scales 16 of them at a time, and because P is given relative to its
    row first and fills the range of those scales, this is SageAttention3's two-level P.
    """
    levels = WIDTHS[width].p_levels
    if width == "bf16":
        return p.astype(dtype).astype(jnp.float32)
    if width == "fp8":
        return (levels * p).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    if width == "fp4":
        return _fp4.micro_scaled(levels * p, -1)
    return jnp.round(levels * p)


def token_scales(scales: jax.Array, tokens: int, group: int) -> jax.Array:
    """One scale per token from scales [B, H, tokens] or [B, H, blocks of `group` tokens]."""
    return scales if scales.shape[-1] == tokens else jnp.repeat(scales, group, axis=-1)[..., :tokens]


@partial(jax.jit, static_argnames=("block", "scale", "qk", "pv", "p_scale", "out_dtype"))
def run(
    q, k, v, count, index, slots, q_scale, k_scale, v_scale, delta=None, *, block, scale, qk, pv, p_scale, out_dtype
):  # fmt: skip
    """See block_attention; arguments are checked there. Returns (o [B, Nq, H, D], lse f32 [B, Nq, H])."""
    bq, bk = block
    (batch, heads, nq_tokens, head_dim), nk_tokens = q.shape, k.shape[2]
    nq, nk = index.shape[1:]
    f32 = jnp.float32

    # keep[h, i, j]: block (i, j) is among the first count[h, i] entries of the index.
    listed = jnp.clip(index, 0, nk - 1)[..., None] == jnp.arange(nk)[None, None, None]
    keep = (listed & (jnp.arange(nk)[None, None] < count[..., None])[..., None]).any(axis=2)
    keep_rows = jnp.repeat(keep, bq, axis=1)[None, :, :nq_tokens]  # [1, H, Nq, nk]

    # Scores in log2 units, [B, H, Nq, nk, bk]; keys past the end and skipped blocks are -inf.
    product = jnp.einsum("bhqd,bhkd->bhqk", q.astype(f32), k.astype(f32), precision="highest")
    to_log2 = scale * math.log2(math.e)
    q_scale = jnp.ones((batch, heads, nq_tokens), f32) if q_scale is None else token_scales(q_scale, nq_tokens, bq)
    k_scale = jnp.ones((batch, heads, nk_tokens), f32) if k_scale is None else token_scales(k_scale, nk_tokens, bk)
    scores = jax.lax.optimization_barrier(product * ((q_scale * f32(to_log2))[..., :, None] * k_scale[..., None, :]))
    if delta is not None:
        scores = scores + jax.lax.optimization_barrier(jnp.repeat(delta * f32(to_log2), bq, axis=2)[:, :, :nq_tokens])
    tail = nk * bk - nk_tokens
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (0, tail)), constant_values=-jnp.inf)
    scores = scores.reshape(batch, heads, nq_tokens, nk, bk)
    scores = jnp.where(keep_rows[..., None], scores, -jnp.inf)

    # The reference maximum of each key block: its own, or the running one over the blocks walked so far.
    block_max = jnp.where(keep_rows, scores.max(axis=-1), -jnp.inf)
    row_max = jax.lax.stop_gradient(block_max.max(axis=-1, keepdims=True))
    row_max = jnp.where(row_max == -jnp.inf, 0.0, row_max)
    if pv == "bf16":
        reference_max = jnp.broadcast_to(row_max, block_max.shape)
    else:
        reference_max = block_max if p_scale == "block" else running_max(block_max, jnp.clip(index, 0, nk - 1), bq)
        reference_max = jnp.where(keep_rows, reference_max, 0.0)
    weight = jnp.where(keep_rows, jnp.exp2(reference_max - row_max), 0.0)  # re-weights a block to the row's maximum

    kept = scores != -jnp.inf  # NaN stays NaN
    p = jnp.where(kept, jnp.exp2(jnp.where(kept, scores, 0.0) - reference_max[..., None]), 0.0)
    p = quantise_p(p, pv, v.dtype)

    values = jnp.pad(v.astype(f32), ((0, 0), (0, 0), (0, tail), (0, 0))).reshape(batch, heads, nk, bk, head_dim)
    partial_sums = jnp.einsum("bhqjk,bhjkd->bhqjd", p, values, precision="highest")
    if v_scale is not None:
        partial_sums = partial_sums * v_scale[:, :, None]
    # where, not a product: a skipped block's values may be NaN.
    total = jnp.where(keep_rows[..., None], weight[..., None] * partial_sums, 0.0).sum(axis=3)
    row_sum = (weight * p.sum(axis=-1)).sum(axis=-1)

    some = row_sum != 0
    safe_sum = jnp.where(some, row_sum, 1.0)
    o = jnp.where(some[..., None], total / safe_sum[..., None], 0.0)
    levels = WIDTHS[pv].p_levels
    lse = jnp.where(some, math.log(2) * (row_max[..., 0] + jnp.log2(safe_sum / levels)), -jnp.inf)
    return to_model_order(o, slots).astype(out_dtype), to_model_order(lse[..., None], slots)[..., 0]


def running_max(block_max: jax.Array, index: jax.Array, bq: int) -> jax.Array:
    """Of f32 [B, H, Nq, nk], for each key block the largest so far where a row's blocks are walked as `index` has them.

    Entries past a row's count may be any blocks: they come last, and of a block that is skipped nothing is read.
    """
    walk = jnp.broadcast_to(jnp.repeat(index, bq, axis=1)[None, :, : block_max.shape[2]], block_max.shape)
    walked = jax.lax.cummax(jnp.take_along_axis(block_max, walk, axis=3), axis=3)
    place = jnp.argmax(index[..., None, :] == jnp.arange(index.shape[2])[None, None, :, None], axis=-1)
    place = jnp.broadcast_to(jnp.repeat(place, bq, axis=1)[None, :, : block_max.shape[2]], block_max.shape)
    return jnp.take_along_axis(walked, place, axis=3)


def to_model_order(x: jax.Array, slots: jax.Array | None) -> jax.Array:
    """[B, H, N, D] in kernel order -> [B, N, H, D] in model order: out[b, slots[h, n], h] = x[b, h, n]."""
    out = jnp.swapaxes(x, 1, 2)
    if slots is None:
        return out
    heads = jnp.arange(x.shape[1])[:, None]
    return out.at[:, slots, heads].set(x)
