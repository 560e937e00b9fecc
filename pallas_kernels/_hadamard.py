"""The random-sign Hadamard rotation of channels: orthogonal, so q k^T does not notice, and outliers are spread out.

FlashAttention-3's "incoherent processing" (arXiv 2407.08608, section 3.3; the idea is QuIP#'s, arXiv 2402.04396).
"""

import jax
import jax.numpy as jnp
import numpy as np


def size(head_dim: int) -> int:
    """Channels that one Hadamard matrix mixes: the largest power of two that divides head_dim."""
    return head_dim & -head_dim


def rotate(x: jax.Array) -> jax.Array:
    """x f32 [..., D] times diag(signs) H / sqrt(size), H Sylvester's matrix, block-diagonal where D is no power of two.

    The signs are the same for every call. Sums run in a fixed sequence: the same bits wherever it is computed.
    """
    head_dim, width = x.shape[-1], size(x.shape[-1])
    # RandomState's stream is frozen, where that of a newer generator may change.
    signs = 1.0 - 2.0 * np.random.RandomState(0).randint(0, 2, head_dim)
    y = x * jnp.asarray(signs, jnp.float32).reshape((1,) * (x.ndim - 1) + (head_dim,))
    step = 1
    while step < width:
        y = y.reshape(*x.shape[:-1], -1, 2, step)
        a, b = y[..., 0, :], y[..., 1, :]
        y = jnp.stack([a + b, a - b], axis=-2)
        step *= 2
    # The only product that rounds; behind a barrier, or a compiler may contract it with the sum that follows.
    return jax.lax.optimization_barrier(y.reshape(x.shape) * np.float32(1 / np.sqrt(width)))
