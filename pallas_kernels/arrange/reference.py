"""arrange, the oracle: one plain step after another, in f32, one head at a time.

Method: PAROAttention (arXiv 2506.16054), section 3.1 (reorder), and SageAttention (arXiv 2410.02367), section 4.2
(smooth K, then round). Runs on anything; unusual only in that it is never chosen by default.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import _fp4, _hadamard, _packed, _registers
from pallas_kernels._check import FLOATS, WIDTHS
from pallas_kernels._choose import ALL_WIDTHS, Request, widths_served
from pallas_kernels.block_attention import ampere
from pallas_kernels.block_attention.hopper import padded_dim

FEATURES = ("thread-groups", "rotation", "q-mean", "v-mean")


def why_not(request: Request) -> str | None:
    """The oracle serves every width and feature at float32, bfloat16 and float16."""
    if request.dtype not in FLOATS:
        return f"dtype {request.dtype} is not served; it serves {', '.join(FLOATS)}"
    return widths_served(request, ALL_WIDTHS, FEATURES)


def normed(x: jax.Array, norm) -> jax.Array:
    """x f32 [B, N, H, D] after a per-head norm."""
    if norm.kind == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + norm.eps)
    if norm.scale is not None:
        x = x * _per_head(norm.scale, x)
    return x if norm.bias is None else x + _per_head(norm.bias, x)


def _per_head(weight: jax.Array, x: jax.Array) -> jax.Array:
    """[D] or [H, D] as f32 [1, 1, 1 or H, D]."""
    return weight.astype(jnp.float32).reshape(1, 1, -1, x.shape[-1])


def rotated(x: jax.Array, rope) -> jax.Array:
    """x f32 [B, N, H, D] with each pair (x[2i], x[2i + 1]) rotated by its token's angle."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = (table.astype(jnp.float32)[None, :, None, :] for table in (rope.cos, rope.sin))
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def block_means(x: jax.Array, block: int) -> jax.Array:
    """Mean of each block's tokens: [B, H, N, D] -> [B, H, n, D]; the last block may be smaller."""
    batch, heads, tokens, head_dim = x.shape
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, -tokens % block), (0, 0))).reshape(batch, heads, -1, block, head_dim)
    size = jnp.minimum(block, tokens - block * jnp.arange(padded.shape[2]))
    return padded.sum(axis=3) / size[None, None, :, None]


def quantised(x: jax.Array, role: str, width: str, group: str, block: int) -> tuple[jax.Array, jax.Array | None]:
    """x f32 [B, H, N, D] -> (values at `width`, scales); see arrange for the shapes of scales."""
    batch, heads, tokens, head_dim = x.shape
    if width == "fp4":
        if role != "v":
            return _fp4.micro_scaled(x, 3).astype(WIDTHS[width].store), None
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, -tokens % block), (0, 0))).reshape(batch, heads, -1, block, head_dim)
        values = _fp4.micro_scaled(padded, 3).reshape(batch, heads, -1, head_dim)[:, :, :tokens]
        return values.astype(WIDTHS[width].store), None
    if group == "row":
        amax = _amax(x, 3)
    elif group == "thread":
        amax = _thread_amax(_amax(x, 3), role, block)
    elif group == "channel":
        amax = _amax(x, 2)[:, :, None]
    else:  # over a block's tokens; of q and k over their channels too
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, -tokens % block), (0, 0)))
        amax = _amax(padded.reshape(batch, heads, -1, block, head_dim), 3 if role == "v" else (3, 4))
    scales = jnp.maximum(amax, 1e-7) / WIDTHS[width].qmax
    return round_to(x, spread(scales, tokens, block), width), scales


def _amax(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """max |x|, NaN where there is one: XLA's own max loses it on a CPU (4096 elements and more, jax 0.11 and 0.12)."""
    return jnp.where(jnp.isnan(x).any(axis=axis), jnp.nan, jnp.abs(x).max(axis=axis))


def _thread_amax(amax: jax.Array, role: str, block: int) -> jax.Array:
    """The largest [B, H, N] of each token's group, where a group is what one thread of a tensor core instruction holds.

    SageAttention2 (arXiv 2411.10958): of 32 queries those that are equal modulo 8; of a block of keys 2t and 2t + 1
    modulo 8, for t = 0..3.
    """
    batch, heads, tokens = amax.shape
    span, threads, pair = (32, 8, 1) if role == "q" else (block, 4, 2)
    padded = jnp.pad(amax, ((0, 0), (0, 0), (0, -tokens % span)))
    grouped = padded.reshape(batch, heads, -1, span // (threads * pair), threads, pair)
    largest = jnp.broadcast_to(_amax(grouped, (3, 5))[:, :, :, None, :, None], grouped.shape)
    return largest.reshape(batch, heads, -1)[:, :, :tokens]


def spread(scales: jax.Array, tokens: int, block: int) -> jax.Array:
    """Scales of any group as something that divides x [B, H, N, D]."""
    if scales.ndim == 4:
        return scales if scales.shape[2] == 1 else jnp.repeat(scales, block, axis=2)[:, :, :tokens]
    per_token = scales if scales.shape[2] == tokens else jnp.repeat(scales, block, axis=2)[:, :, :tokens]
    return per_token[..., None]


def round_to(x: jax.Array, scales: jax.Array, width: str) -> jax.Array:
    """x / scales at the stored dtype, rounded half to even."""
    facts = WIDTHS[width]
    ratio = jnp.clip(x / scales, -facts.qmax, facts.qmax)
    return (ratio if width == "fp8" else jnp.round(ratio)).astype(facts.store)


def laid_out(values: jax.Array, role: str, width: str, block: int, layout: str) -> jax.Array:
    """values [B, H, N, D] as `layout` stores them; see arrange."""
    if layout == "rows":
        return values
    if layout == "ampere":
        return ampere.laid_out(values, role, width, block)
    head_dim = values.shape[3]
    dim = padded_dim(head_dim)
    values = jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, dim - head_dim)))
    if role == "v" and width != "bf16":
        values = _registers.key_major(values, block)
    if width != "int4":
        return values
    if layout == "hopper" or role == "q":
        return _packed.upper(values)
    if role == "v":
        return _packed.pack(values, dim // 2)
    tail = -values.shape[2] % (2 * _packed.KEYS)
    return _packed.pack(jnp.pad(values, ((0, 0), (0, 0), (0, tail), (0, 0))), _packed.KEYS)


_STATIC = ("role", "width", "group", "block", "compute_mean", "layout", "rotate", "block_mean")


@partial(jax.jit, static_argnames=_STATIC)
def run(
    x, slots, norm, rope, mean, *, role, width, group, block, compute_mean, layout="rows", rotate=False,
    block_mean=False,
):  # fmt: skip
    """See arrange; arguments are checked there."""
    batch, _, heads, head_dim = x.shape
    y = x.astype(jnp.float32)
    y = y if norm is None else normed(y, norm)
    y = y if rope is None else rotated(y, rope)
    if compute_mean:
        mean = y.mean(axis=1)
    if mean is not None:
        mean = jnp.broadcast_to(mean.astype(jnp.float32).reshape(-1, heads, head_dim), (batch, heads, head_dim))
        y = y - mean[:, None]
    y = _hadamard.rotate(y) if rotate else y
    by_head = [y[:, :, h] if slots is None else y[:, slots[h], h] for h in range(heads)]
    y = jnp.stack(by_head, axis=1)
    if block_mean:
        mean = block_means(y, block)
        y = y - jnp.repeat(mean, block, axis=2)[:, :, : y.shape[2]]
    values, scales = (y.astype(x.dtype), None) if width == "bf16" else quantised(y, role, width, group, block)
    return laid_out(values, role, width, block, layout), scales, mean
