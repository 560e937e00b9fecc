"""How uneven the attention map is inside what one scale covers, in any order, without ever holding the map."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from calibrate import _mass
from paro_jax import TokenGrid

GROUPS = ("row", "block", "block row")


def incoherence(
    q: jax.Array, k: jax.Array, grid: TokenGrid, order: str | Sequence[str], block: tuple[int, int] = (64, 64)
) -> dict[str, jax.Array]:
    """max P / mean P of the attention map inside a group, averaged over groups and batch: float32 [heads] by group.

    ViDiT-Q's incoherence (arXiv 2406.02540), PAROAttention's Psi (arXiv 2506.16054, eq. 1-3): 1 for an even group, its
    size for a single spike; what makes a group hard to round under one scale. Groups: "row" (1, N), the naive choice,
    which no order changes; "block" (bq, bk), the paper's; "block row" (1, bk), what `QuantSpec(p_scale="block")` scales
    by. Call it with `grid.orders[0]` and with a plan's orders for before and after. Text is part of the map; the groups
    at its end may be smaller. `metrics.incoherence` is the same of an array at hand (q, k and v, say).

    q, k: [B, N, heads, D] after norm and RoPE, model order; `order`: one name, or one per head. Raises ValueError as
    `block_mass` does.
    """
    q, k, slots = _mass.checked(q, k, grid, order, block)
    lse = _mass.row_lse(q, k)
    blocks, rows = _mass.block_peaks(q, k, lse, slots, block=tuple(block))
    return {"row": row_peaks(q, k, lse), "block": blocks, "block row": rows}


@jax.jit
def row_peaks(q: jax.Array, k: jax.Array, lse: jax.Array) -> jax.Array:
    """N times the largest P of a row, averaged over rows and batch: float32 [heads]. A row's mean is 1 / N."""
    top = _mass.row_top(q, k)
    return q.shape[1] * jnp.mean(jnp.exp2(top - lse), (1, 2))
