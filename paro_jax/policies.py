"""Who keeps which blocks: pure functions that return a `BlockMask`.

A policy has no state and no registry; one of yours has the same rank as these. `plan.with_mask(policy(...))` brings a
mask to attention, `plan.mask() & policy(...)` both.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paro_jax._grid import TokenGrid, check_block, is_int
from paro_jax._mask import BlockMask

Block = tuple[int, int]


def dense(grid: TokenGrid, *, block: Block = (64, 64), heads: int = 1) -> BlockMask:
    """Every block of every head: keep [heads, nq, nk], density 1."""
    _check_heads(heads)
    return BlockMask(jnp.ones((heads, *grid.blocks(block)), bool), check_block(block))


def window(grid: TokenGrid, *, density: float, block: Block = (64, 64), heads: int = 1) -> BlockMask:
    """A 1-D band along the diagonal of the kernel order, the same for every head: keep [heads, nq, nk].

    Text blocks are always kept and count; the blocks nearest to the diagonal fill the budget. What a model would use
    that knows nothing of the grid, and the ablation of our demo.

    Raises ValueError for a density outside (0, 1] or below what text and one block a row need.
    """
    _check_heads(heads)
    nq, nk = grid.blocks(block)
    # Distance in units of 1 / (2 nq nk), an integer, so that ties are ties and two machines agree.
    distance = np.abs((2 * np.arange(nq) + 1)[:, None] * nk - (2 * np.arange(nk) + 1)[None] * nq)
    mask = top_blocks(-distance[None], density, grid.always_keep(block), block=block)
    return BlockMask(jnp.broadcast_to(mask.keep, (heads, nq, nk)), mask.block)


def top_blocks(mass: Any, density: float, always: Any = None, *, block: Block = (64, 64)) -> BlockMask:
    """The heaviest blocks of each head, up to `density` of all its blocks.

    `mass` [*lead, heads, nq, nk], any real numbers (attention mass, a pooled score). `always` bool [nq, nk] (or None)
    is kept first, `TokenGrid.always_keep(block)` for one; then the best block of each row, so that no query is left
    without keys; then the heaviest others. All of them count. Ties go to the lower row, then the lower column. Works
    under jit.

    Raises ValueError for a density outside (0, 1], or one too small for `always` and one block a row; nothing is
    clipped in silence.
    """
    block = check_block(block)
    mass = jnp.asarray(mass)
    if mass.ndim < 2 or 0 in mass.shape:
        raise ValueError(f"mass must be [*lead, heads, nq, nk]; got shape {list(mass.shape)}.")
    nq, nk = mass.shape[-2:]
    always = np.zeros((nq, nk), bool) if always is None else np.asarray(always)
    if always.shape != (nq, nk) or always.dtype != bool:
        raise ValueError(f"always must be bool [{nq}, {nk}], as the blocks of mass; got {always.dtype} {always.shape}.")
    budget = _budget(density, always)

    # Three classes, then the mass: what is forced, the best of each row that has nothing forced, everything else.
    column = jax.lax.broadcasted_iota(jnp.int32, mass.shape, mass.ndim - 1)
    best = jnp.argmax(mass, axis=-1, keepdims=True).astype(jnp.int32) == column
    forced, has_forced = (np.broadcast_to(x, mass.shape) for x in (always, always.any(-1, keepdims=True)))
    rank = jnp.where(forced, 0, jnp.where(best & ~has_forced, 1, 2))
    flat = (*mass.shape[:-2], nq * nk)
    # Descending; the complement of an unsigned integer falls as it rises, where its negative would wrap.
    falling = ~mass if jnp.issubdtype(mass.dtype, jnp.unsignedinteger) or mass.dtype == bool else -mass
    position = jnp.lexsort((falling.reshape(flat), rank.reshape(flat)), axis=-1)
    keep = jnp.zeros(flat, bool)
    keep = jnp.put_along_axis(keep, position[..., :budget], True, axis=-1, inplace=False)
    return BlockMask(keep.reshape(mass.shape), block)


def _budget(density: Any, always: np.ndarray) -> int:
    """Blocks to keep of each head; ValueError when that is not possible."""
    real = isinstance(density, (int, float, np.integer, np.floating)) and not isinstance(density, bool)
    if not real or not 0 < density <= 1:
        raise ValueError(f"density must be a number in (0, 1], kept blocks / all blocks; got {density!r}.")
    floor = int(always.sum()) + int((~always.any(-1)).sum())
    budget = round(float(density) * always.size)
    if budget < floor:
        raise ValueError(
            f"density must be at least {floor / always.size:.4g} here: {int(always.sum())} blocks that are always kept "
            f"and one block for each row without, {floor} of {always.size}; got {density}. Use larger densities or "
            "smaller blocks."
        )
    return budget


def _check_heads(heads: Any) -> None:
    if not is_int(heads) or heads < 1:
        raise ValueError(f"heads must be a positive int; got {heads!r}.")
