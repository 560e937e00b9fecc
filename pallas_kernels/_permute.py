"""One head's tokens between model order and kernel order, with gradients that gather instead of scatter.

The transpose of a gather is a scatter-add, which XLA runs one row at a time on a CPU. For a permutation it is the
gather by the inverse, so both directions say so.
"""

import jax
import jax.numpy as jnp
import numpy as np


def inverse(slots: jax.Array) -> jax.Array:
    """int32 [H, N] -> int32 [H, N]: model token -> kernel slot."""
    heads = jnp.arange(slots.shape[0])[:, None]
    return jnp.zeros_like(slots).at[heads, slots].set(jnp.arange(slots.shape[1], dtype=slots.dtype)[None], mode="drop")


def _gather(x: jax.Array, slots: jax.Array) -> jax.Array:
    return x[:, slots, jnp.arange(x.shape[2])[:, None]]


@jax.custom_vjp
def to_kernel(x: jax.Array, slots: jax.Array) -> jax.Array:
    """[B, N, H, D] in model order -> [B, H, N, D] in kernel order: out[b, h, n] = x[b, slots[h, n], h]."""
    return _gather(x, slots)


def _to_kernel_fwd(x, slots):
    return _gather(x, slots), slots


def _to_kernel_bwd(slots, cotangent):
    return to_model(cotangent, slots), np.zeros(slots.shape, jax.dtypes.float0)


to_kernel.defvjp(_to_kernel_fwd, _to_kernel_bwd)


def _gather_back(x: jax.Array, slots: jax.Array) -> jax.Array:
    place = inverse(slots).T  # [N, H]
    return x[:, jnp.arange(x.shape[1])[None], place]


@jax.custom_vjp
def to_model(x: jax.Array, slots: jax.Array) -> jax.Array:
    """[B, H, N, D] in kernel order -> [B, N, H, D] in model order: out[b, slots[h, n], h] = x[b, h, n]."""
    return _gather_back(x, slots)


def _to_model_fwd(x, slots):
    return _gather_back(x, slots), slots


def _to_model_bwd(slots, cotangent):
    return to_kernel(cotangent, slots), np.zeros(slots.shape, jax.dtypes.float0)


to_model.defvjp(_to_model_fwd, _to_model_bwd)
