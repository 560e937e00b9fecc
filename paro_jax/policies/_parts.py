"""What policies are made of: tokens in kernel order, block means, the largest of a row, checks of arguments."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _permute
from pallas_kernels._check import concrete
from paro_jax._grid import TokenGrid, check_block, is_int
from paro_jax._mask import BlockMask
from paro_jax._plan import AttentionPlan

Block = tuple[int, int]


def check_grid(grid: Any) -> TokenGrid:
    """`grid`, or ValueError for anything else: a policy of the geometry cannot guess it."""
    if not isinstance(grid, TokenGrid):
        raise ValueError(f"grid must be a TokenGrid, e.g. TokenGrid((13, 30, 45), text=226); got {grid!r}.")
    return grid


def check_site(plan: Any) -> AttentionPlan:
    """`plan`, or ValueError unless it is that of one site: a policy reads its grid, block and orders."""
    if not isinstance(plan, AttentionPlan) or plan.lead:
        found = f"leading axes {plan.lead}" if isinstance(plan, AttentionPlan) else f"{type(plan).__name__}"
        raise ValueError(
            "plan must be the AttentionPlan of one site, which says grid, block and the order of each head; got "
            f"{found}. AttentionPlan.dense(grid, heads=...) is model order; peel leading axes with plan[site]."
        )
    return plan


def check_tokens(tokens: int, heads: int | None = None, **arrays: Any) -> list[jax.Array]:
    """The named arrays, or ValueError unless each is [B, tokens, heads, D] and all have one shape."""
    found = [jnp.asarray(x) for x in arrays.values()]
    for name, x in zip(arrays, found, strict=True):
        fits = x.ndim == 4 and x.shape[1] == tokens and heads in (None, x.shape[2]) and 0 not in x.shape
        if not fits or x.shape != found[0].shape or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floats [batch, tokens = {tokens}, heads = {heads or 'any'}, head_dim], "
                f"{' and '.join(arrays)} of one shape; got {x.dtype} {list(x.shape)}. Use the plan or grid of these "
                "tokens."
            )
    return found


def kernel_order(plan: AttentionPlan, **arrays: Any) -> list[jax.Array]:
    """float32 [B, heads, N, D] of each array [B, N, heads, D]: the tokens of every head in its order, text last."""
    found = check_tokens(plan.grid.tokens, plan.heads, **arrays)
    return [_permute.to_kernel(x.astype(jnp.float32), plan.slots) for x in found]


def check_number(name: str, value: Any, low: float, high: float, heads: int = 1) -> jax.Array:
    """float32 [heads] of a number or one per head in [low, high], or ValueError; under a trace the range is trusted."""
    real = hasattr(value, "dtype") or isinstance(value, (int, float, list, tuple)) and not isinstance(value, bool)
    numbers = jnp.asarray(value) if real else jnp.zeros(0, bool)
    # A plain number is known even under a trace, where jnp.asarray may hide it.
    known = concrete(value) if hasattr(value, "dtype") else np.asarray(value) if real else None
    good = numbers.shape in ((), (heads,)) and not jnp.issubdtype(numbers.dtype, jnp.bool_)
    # Not `any below or above`: NaN is neither.
    if not good or (known is not None and not ((known >= low) & (known <= high)).all()):
        raise ValueError(
            f"{name} must be in [{low:g}, {high:g}], one number or one for each of {heads} heads; got {value!r}."
        )
    return jnp.broadcast_to(numbers.astype(jnp.float32), (heads,))


def check_count(name: str, value: Any, low: int = 1, high: int | None = None) -> int:
    """`value` as an int in [low, high], or ValueError."""
    if not is_int(value) or value < low or (high is not None and value > high):
        limit = f" and <= {high}" if high is not None else ""
        raise ValueError(f"{name} must be an int >= {low}{limit}; got {value!r}.")
    return int(value)


def check_heads(heads: Any) -> int:
    """`heads` as a positive int, or ValueError."""
    if not is_int(heads) or heads < 1:
        raise ValueError(f"heads must be a positive int; got {heads!r}.")
    return int(heads)


def cut(x: jax.Array, size: int) -> jax.Array:
    """[..., N, D] -> [..., ceil(N / size), size, D], the last block filled up with zeros."""
    blocks = -(-x.shape[-2] // size)
    padding = [(0, 0)] * (x.ndim - 2) + [(0, blocks * size - x.shape[-2]), (0, 0)]
    return jnp.pad(x, padding).reshape(*x.shape[:-2], blocks, size, x.shape[-1])


def block_tokens(tokens: int, size: int) -> np.ndarray:
    """float32 [ceil(tokens / size)]: the tokens of each block, the last one perhaps fewer."""
    return np.minimum(size, tokens - np.arange(0, tokens, size)).astype(np.float32)


def largest(weights: jax.Array, count: jax.Array) -> jax.Array:
    """bool [..., n]: the `count` [...] largest of each row; ties go to the lower column. `count` broadcasts."""
    # Sorted and sorted back: the rank of every column, without a scatter.
    rank = jnp.argsort(jnp.argsort(-weights, axis=-1, stable=True), axis=-1)
    return rank < count[..., None]


def top_p(weights: jax.Array, limit: jax.Array, *, include_crossing: bool) -> jax.Array:
    """bool [..., n]: the heaviest of each row whose sum stays at `limit` [...], which broadcasts; at least one.

    Peers differ in the one that crosses the limit: SpargeAttn leaves it out, SVG2 and XAttention keep it.
    """
    total = jnp.cumsum(-jnp.sort(-weights, axis=-1), axis=-1)
    if include_crossing:
        count = 1 + jnp.sum(total[..., :-1] < limit[..., None], axis=-1)
    else:
        # The float32 sum of a whole row may be a little above 1.
        count = jnp.maximum(1, jnp.sum(total <= limit[..., None] + 1e-6, axis=-1))
    return largest(weights, count)


def with_text(keep: jax.Array, grid: TokenGrid, block: Block) -> BlockMask:
    """The mask of `keep` [..., nq, nk] and all rows and columns of blocks with text."""
    always = grid.always_keep(block)
    return BlockMask(keep | always.reshape((1,) * (keep.ndim - 2) + always.shape), check_block(block))


def same_for_all(keep: np.ndarray, grid: TokenGrid, block: Block, heads: Any) -> BlockMask:
    """The mask of one static map [nq, nk] for every head, with text."""
    heads = check_heads(heads)
    return BlockMask(
        jnp.broadcast_to(jnp.asarray(keep | grid.always_keep(block))[None], (heads, *keep.shape)), check_block(block)
    )


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [..., i, d], b [..., j, d] -> [..., i, j], float32 in full: accelerators would round the operands."""
    return jnp.einsum("...id,...jd->...ij", a, b, precision="highest")


def each(function: Any, *arrays: jax.Array) -> Any:
    """`function` of every (batch entry, head), one after the other, so that only one of them is in memory.

    arrays [B, heads, ...] -> [B, heads, ...].
    """
    lead = arrays[0].shape[:2]
    flat = [x.reshape(math.prod(lead), *x.shape[2:]) for x in arrays]
    out = jax.lax.map(lambda args: function(*args), tuple(flat))
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), out)


def spans(grid: TokenGrid, size: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last kernel slot of each block of `size` tokens, int64 [blocks] each."""
    first = np.arange(0, grid.tokens, size)
    return first, np.minimum(first + size, grid.tokens) - 1


def overlap(labels: np.ndarray, count: int, grid: TokenGrid, size: int) -> np.ndarray:
    """float32 [blocks, count]: tokens of every label in each block; labels int [grid_tokens] by kernel slot."""
    held = np.zeros((grid.blocks((size, size))[0], count), np.float32)
    np.add.at(held, (np.arange(len(labels)) // size, labels), 1)
    return held
