"""Sparse-vDiT (arXiv 2506.03065): each head has one of a few fixed patterns, found offline."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from paro_jax._attention import attention
from paro_jax._grid import TokenGrid, check_block
from paro_jax._mask import BlockMask
from paro_jax._plan import AttentionPlan
from paro_jax.policies._basic import at_density, dense, window
from paro_jax.policies._parts import (
    Block,
    check_count,
    check_grid,
    check_heads,
    check_site,
    check_tokens,
    cut,
    dot,
    each,
    kernel_order,
    same_for_all,
    spans,
    with_text,
)

Sample = tuple[Any, Any, Any]  # q, k, v of one site, [B, N, heads, D] each


def multi_diagonal(
    grid: TokenGrid, *, width: int, stride: int | None = None, block: Block = (64, 64), heads: int = 1
) -> BlockMask:
    """Bands at all multiples of `stride` slots from the diagonal, `width` slots to each side: keep [heads, nq, nk].

    `stride` None is the tokens of a frame: in model order, the same place in every frame and what is near it. A block
    is kept when any of its queries and keys are in a band. Text is dense.
    """
    grid = check_grid(grid)
    check_count("width", width, low=0)
    stride = grid.grid_tokens // grid.shape[0] if stride is None else check_count("stride", stride)
    (q0, q1), (k0, k1) = (spans(grid, size) for size in check_block(block))
    least, most = q0[:, None] - k1[None] - width, q1[:, None] - k0[None] + width
    return same_for_all(most // stride * stride >= least, grid, block, heads)


def vertical_stripe(grid: TokenGrid, columns: Any, *, block: Block = (64, 64)) -> BlockMask:
    """Fixed key blocks for all queries: columns bool [heads, nk] -> keep [heads, nq, nk]. Text is dense.

    Raises ValueError for another shape, and for a head without any column, whose queries would see nothing.
    """
    columns = jnp.asarray(columns)
    nq, nk = check_grid(grid).blocks(block)
    if columns.ndim != 2 or columns.shape[1] != nk or columns.dtype != bool:
        raise ValueError(f"columns must be bool [heads, {nk}]; got {columns.dtype} {list(columns.shape)}.")
    if not grid.text and not isinstance(columns, Tracer) and not np.asarray(columns).any(1).all():
        raise ValueError("columns must keep a key block in every head of a grid without text; got a head with none.")
    return with_text(jnp.broadcast_to(columns[:, None], (columns.shape[0], nq, nk)), grid, block)


def skip(grid: TokenGrid, *, block: Block = (64, 64), heads: int = 1) -> BlockMask:
    """A head that is not worth computing: text, and the blocks on the diagonal, as a query needs a key."""
    check_heads(heads)
    return window(grid, width=0, block=block, heads=heads)


def sparse_vdit(
    samples: Iterable[Sample],
    *,
    plan: AttentionPlan,
    density: float,
    widths: Sequence[int] | None = None,
    stripes: Sequence[float] = (0.05, 0.1, 0.2),
) -> tuple[BlockMask, list[str]]:
    """Sparse-vDiT's search (arXiv 2506.03065, section 3.3): the pattern of each head, keep [heads, nq, nk], and names.

    samples: (q, k, v) of one site. Candidates are full, skip, diagonal and multi-diagonal bands of `widths` slots
    (default: a half, one, two and four blocks), and vertical stripes of the heaviest `stripes` of the key blocks.
    Each head takes the least error + cost x density, and the cost is found that brings the site to `density`. Widths,
    cost and code of the original are unpublished; error is relative to the size of the dense output here.

    Offline. Raises ValueError when even the sparsest choice is above `density`.
    """
    plan = check_site(plan)
    samples = list(samples)
    if not samples:
        raise ValueError("samples must hold at least one (q, k, v); got none.")
    grid, block = plan.grid, plan.block
    size = max(block)
    widths = (size // 2, size, 2 * size, 4 * size) if widths is None else tuple(widths)
    masks = {"full": dense(grid, block=block), "skip": skip(grid, block=block)}
    for width in widths:
        masks[f"diagonal {width}"] = window(grid, width=width, block=block)
        masks[f"multi-diagonal {width}"] = multi_diagonal(grid, width=width, block=block)
    mass = sum(column_mass(q, k, plan=plan).mean(0) for q, k, _ in samples)
    for part in stripes:
        count = max(1, math.ceil(_share(part) * grid.blocks(block)[1]))
        heavy = np.argsort(np.argsort(-np.asarray(mass), axis=-1, kind="stable"), axis=-1) < count
        masks[f"vertical {part:g}"] = vertical_stripe(grid, heavy, block=block)
    names, candidates = list(masks), list(masks.values())
    errors = mask_errors(samples, plan=plan, masks=candidates)
    # Costs by their logarithm: errors of patterns differ by orders of magnitude.
    high = math.log10(_steepest(errors, candidates, plan.heads))
    cost = at_density(lambda c: pick_masks(errors, candidates, cost=10**c)[0], density, low=-12.0, high=high)
    mask, chosen = pick_masks(errors, candidates, cost=10**cost)
    return mask, [names[i] for i in chosen]


def _share(part: Any) -> float:
    """A share of the key blocks in (0, 1], or ValueError."""
    if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part <= 1:
        raise ValueError(f"stripes must be numbers in (0, 1], shares of the key blocks; got {part!r}.")
    return float(part)


def mask_errors(samples: Iterable[Sample], *, plan: AttentionPlan, masks: Sequence[BlockMask]) -> np.ndarray:
    """Squared error of the output of each head under each mask, over its squared size: float64 [masks, heads].

    samples: (q, k, v) of one site; masks of the plan's block, keep [heads or 1, nq, nk]; the plan gives the orders.
    """
    plan = check_site(plan)
    full = plan.with_mask(dense(plan.grid, block=plan.block, heads=plan.heads))
    error, size = np.zeros((len(masks), plan.heads)), np.zeros(plan.heads)
    for sample in samples:
        q, k, v = check_tokens(plan.grid.tokens, plan.heads, q=sample[0], k=sample[1], v=sample[2])
        reference = attention(q, k, v, plan=full)
        size += np.asarray(_squares(reference, jnp.zeros_like(reference)), np.float64)
        for i, mask in enumerate(masks):
            out = attention(q, k, v, plan=plan.with_mask(_of_heads(mask, plan.heads)))
            error[i] += np.asarray(_squares(out, reference), np.float64)
    if not size.all():
        raise ValueError("samples must hold at least one (q, k, v), whose output is not zero in any head.")
    return error / size[None]


@jax.jit
def _squares(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).sum((0, 1, 3))


def pick_masks(errors: np.ndarray, masks: Sequence[BlockMask], *, cost: float) -> tuple[BlockMask, list[int]]:
    """For each head the mask with the least error + cost x density: keep [heads, nq, nk], and which it is.

    errors [masks, heads], as of `mask_errors`; masks keep [heads or 1, nq, nk]. Ties go to the earlier mask. With
    cost 0 and windows of `sliding_tile` this is the second stage of STA's plan.
    """
    heads = errors.shape[1]
    if len(masks) != len(errors) or not cost >= 0:
        raise ValueError(
            f"errors must be [masks = {len(masks)}, heads] and cost >= 0; got {list(errors.shape)}, {cost!r}."
        )
    chosen = np.argmin(errors + cost * _densities(masks, heads), axis=0)
    keep = jnp.stack([_of_heads(masks[i], heads).keep[head] for head, i in enumerate(chosen)])
    return BlockMask(keep, masks[0].block), chosen.tolist()


def _of_heads(mask: BlockMask, heads: int) -> BlockMask:
    return BlockMask(jnp.broadcast_to(jnp.asarray(mask.keep), (heads, *mask.keep.shape[-2:])), mask.block)


def _densities(masks: Sequence[BlockMask], heads: int) -> np.ndarray:
    """float64 [masks, heads]"""
    return np.stack([np.asarray(_of_heads(mask, heads).keep).mean((1, 2)) for mask in masks])


def _steepest(errors: np.ndarray, masks: Sequence[BlockMask], heads: int) -> float:
    """A cost at which every head takes its sparsest mask: above all slopes of error over density."""
    density = _densities(masks, heads)
    gaps = np.diff(np.sort(density, axis=0), axis=0)
    return float(2 * (np.ptp(errors, axis=0).max() + 1e-12) / gaps[gaps > 0].min(initial=1.0))


def column_mass(q: Any, k: Any, *, plan: AttentionPlan) -> jax.Array:
    """Attention that each key block gets from all queries: float32 [B, heads, nk], rows sum to 1; plan's order.

    q, k [B, N, heads, D]. Offline: computes the whole map, in strips of one query block by all keys.
    """
    plan = check_site(plan)
    return _column_mass(*check_tokens(plan.grid.tokens, plan.heads, q=q, k=k), plan)


@jax.jit
def _column_mass(q, k, plan: AttentionPlan) -> jax.Array:
    q, k = kernel_order(plan, q=q, k=k)
    bq, bk = plan.block
    tokens = plan.grid.tokens
    nq, nk = plan.grid.blocks(plan.block)
    q = q / math.sqrt(q.shape[-1])
    real_q = jnp.asarray(np.arange(nq * bq).reshape(nq, bq) < tokens)
    real_k = jnp.asarray(np.arange(nk * bk) < tokens)[None]

    def head(q, k):
        def strip(total, args):
            rows, real = args
            p = jax.nn.softmax(jnp.where(real_k, dot(rows, k), -jnp.inf), axis=-1)
            return total + jnp.where(real[:, None], p, 0).sum(0), None

        total, _ = jax.lax.scan(strip, jnp.zeros(nk * bk, jnp.float32), (cut(q, bq), real_q))
        return total.reshape(nk, bk).sum(-1) / tokens

    return each(head, q, cut(k, bk).reshape(*k.shape[:2], -1, k.shape[-1]))
