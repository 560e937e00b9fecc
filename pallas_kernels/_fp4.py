"""NVFP4, emulated: e2m1 numbers in groups of 16 under one e4m3 scale (SageAttention3, arXiv 2505.11594, section 3.1).

Rounding is written out in float32, so that it is the same bits on every device, whatever types that device has.
"""

import jax
import jax.numpy as jnp

GROUP = 16
_E2M1_MAX, _E4M3_MAX = 6.0, 448.0


def e4m3(x: jax.Array) -> jax.Array:
    """x >= 0 rounded to float8 e4m3, half to even, as float32; above 448 it stays at 448."""
    normal = jax.lax.reduce_precision(jnp.minimum(x, _E4M3_MAX), exponent_bits=8, mantissa_bits=3)
    return jnp.where(x < 2.0**-6, jnp.round(x * 2.0**9) * 2.0**-9, normal)  # below 2^-6 the steps are even


def e2m1(x: jax.Array) -> jax.Array:
    """x rounded to one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, half to even, as float32; at most 6."""
    size = jnp.minimum(jnp.abs(x), _E2M1_MAX)
    steps = jnp.where(size < 2, 2.0, jnp.where(size < 4, 1.0, 0.5))  # per unit
    return jnp.sign(x) * jnp.round(size * steps) / steps


def micro_scaled(x: jax.Array, axis: int) -> jax.Array:
    """x f32 rounded to NVFP4 in groups of 16 along `axis`, multiplied out again: float32, exact in bfloat16.

    A group's scale is e4m3(max |x| / 6); one that rounds to 0 makes zeros. The last group may be smaller.
    """
    x = jnp.moveaxis(x, axis, -1)
    n = x.shape[-1]
    groups = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % GROUP)]).reshape(*x.shape[:-1], -1, GROUP)
    # Its own question, because XLA's max can lose a NaN on a CPU, and infinity would be clipped.
    finite = jnp.isfinite(groups).all(axis=-1, keepdims=True)
    scale = e4m3(jnp.abs(groups).max(axis=-1, keepdims=True) / _E2M1_MAX)
    rounded = e2m1(groups / jnp.where(scale == 0, 1.0, scale)) * scale
    rounded = jnp.where(finite, rounded, jnp.nan).reshape(*x.shape[:-1], -1)[..., :n]
    return jnp.moveaxis(rounded, -1, axis)
