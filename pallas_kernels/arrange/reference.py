"""arrange, the oracle: one plain step after another, in f32, one head at a time.

Method: PAROAttention (arXiv 2506.16054), section 3.1 (reorder), and SageAttention (arXiv 2410.02367), section 4.2
(smooth K, then round). Runs on anything; unusual only in that it is never chosen by default.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import _registers
from pallas_kernels._check import FLOATS, WIDTHS
from pallas_kernels._choose import ALL_WIDTHS, Request, widths_served
from pallas_kernels.block_attention import ampere
from pallas_kernels.block_attention.hopper import padded_dim


def why_not(request: Request) -> str | None:
    """The oracle serves every width at float32, bfloat16 and float16."""
    if request.dtype not in FLOATS:
        return f"dtype {request.dtype} is not served; it serves {', '.join(FLOATS)}"
    return widths_served(request, ALL_WIDTHS)


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


def quantised(x: jax.Array, role: str, width: str, group: str, block: int) -> tuple[jax.Array, jax.Array]:
    """x f32 [B, H, N, D] -> (values at `width`, scales); see arrange for the shapes of scales."""
    batch, heads, tokens, head_dim = x.shape
    if group == "row":
        amax = _amax(x, 3)
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
    values = jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, padded_dim(head_dim) - head_dim)))
    if role != "v" or width == "bf16":
        return values
    return _registers.key_major(values, block, permuted=width != "fp8")


@partial(jax.jit, static_argnames=("role", "width", "group", "block", "compute_mean", "layout"))
def run(x, slots, norm, rope, mean, *, role, width, group, block, compute_mean, layout="rows"):
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
    by_head = [y[:, :, h] if slots is None else y[:, slots[h], h] for h in range(heads)]
    y = jnp.stack(by_head, axis=1)
    values, scales = (y.astype(x.dtype), None) if width == "bf16" else quantised(y, role, width, group, block)
    return laid_out(values, role, width, block, layout), scales, mean
