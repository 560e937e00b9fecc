"""Masks from a geometry or a budget alone: everything, a band, the heaviest blocks; and the knob for a density."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paro_jax._grid import TokenGrid, check_block
from paro_jax._mask import BlockMask
from paro_jax.policies._parts import Block, check_count, check_grid, check_heads, same_for_all, spans


def dense(grid: TokenGrid, *, block: Block = (64, 64), heads: int = 1) -> BlockMask:
    """Every block of every head: keep [heads, nq, nk], density 1."""
    check_heads(heads)
    return BlockMask(jnp.ones((heads, *check_grid(grid).blocks(block)), bool), check_block(block))


def window(
    grid: TokenGrid,
    *,
    density: float | None = None,
    width: int | None = None,
    block: Block = (64, 64),
    heads: int = 1,
) -> BlockMask:
    """A 1-D band along the diagonal of the kernel order, the same for every head: keep [heads, nq, nk].

    With `density`, the blocks nearest to the diagonal fill the budget; text blocks are always kept and count. With
    `width` in tokens, every block is kept that has a query and a key at most that far apart, and text: the window of
    DiTFastAttn (arXiv 2406.08552, its width is 64 to 512) and the diagonal pattern of Sparse-vDiT.

    Raises ValueError for a density outside (0, 1] or below what text and one block a row need, for a negative width,
    and unless exactly one of the two is given.
    """
    check_heads(heads)
    if (density is None) == (width is None):
        raise ValueError(
            f"density in (0, 1] or width in tokens must be given, and not both; got density={density!r} and "
            f"width={width!r}."
        )
    if width is not None:
        check_count("width", width, low=0)
        return same_for_all(_gap(check_grid(grid), block) <= width, grid, block, heads)
    mask = band(grid, density, check_grid(grid).always_keep(block), block)
    return BlockMask(jnp.broadcast_to(mask.keep, (heads, *mask.keep.shape[1:])), mask.block)


def band(grid: TokenGrid, density: Any, always: np.ndarray, block: Block) -> BlockMask:
    """The blocks nearest to the diagonal after those of `always`, up to a density: keep [1, nq, nk]."""
    nq, nk = grid.blocks(block)
    # Distance in units of 1 / (2 nq nk), an integer, so that ties are ties and two machines agree.
    distance = np.abs((2 * np.arange(nq) + 1)[:, None] * nk - (2 * np.arange(nk) + 1)[None] * nq)
    return top_blocks(-distance[None], density, always, block=block)


def _gap(grid: TokenGrid, block: Block) -> np.ndarray:
    """int64 [nq, nk]: the smallest distance in slots between a query and a key of the two blocks."""
    (q0, q1), (k0, k1) = (spans(grid, size) for size in check_block(block))
    return np.maximum(0, np.maximum(k0[None] - q1[:, None], q0[:, None] - k1[None]))


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


def at_density(policy: Callable[[float], BlockMask], density: float, *, low: float, high: float) -> float:
    """The knob at which a policy comes closest to a density from below, by bisection; offline, not under jit.

    `policy(knob)` returns a mask whose density rises, or falls, with the knob from `low` to `high`; 20 masks are made:

        topk = at_density(lambda topk: sparge(q, k, plan=plan, topk=topk), 0.3, low=0, high=1)

    Read the density that was reached from the mask: knobs of whole blocks have steps. Raises ValueError for a density
    that lies outside those of `low` and `high`.
    """
    reached = {knob: _density_of(policy, knob) for knob in (low, high)}
    below, above = (low, high) if reached[low] <= reached[high] else (high, low)
    if not reached[below] <= density <= reached[above]:
        raise ValueError(
            f"density must be in [{reached[below]:.4g}, {reached[above]:.4g}], what this policy has at {below} and "
            f"{above}; got {density!r}. Widen low and high, or ask for a density it can reach."
        )
    if reached[above] <= density:
        return above
    for _ in range(18):
        middle = (below + above) / 2
        if _density_of(policy, middle) <= density:
            below = middle
        else:
            above = middle
    return below


def _density_of(policy: Callable[[float], BlockMask], knob: float) -> float:
    return float(policy(knob).density)
