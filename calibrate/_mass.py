"""Statistics of an attention map that is never held, in any order: passes over strips of a few query blocks.

P = softmax(QK^T / sqrt(D)) in model order; an order permutes rows and columns of P alike, so the log-sum-exp of a row
is computed once and shared by all orders. Working memory is strip x tokens, never tokens x tokens. Everything is
float32 with float32 sums, one head after the other in a fixed sequence: the same inputs give the same bits.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paro_jax import TokenGrid

_STRIP_ROWS = 256  # query rows at a time; on CPUs 128 to 256 measured fastest (2 MiB L2), 64 and 512 a fifth slower


def block_mass(
    q: jax.Array, k: jax.Array, grid: TokenGrid, order: str | Sequence[str], block: tuple[int, int] = (64, 64)
) -> jax.Array:
    """Attention mass of every block, in an order: float32 [heads, nq, nk], the sum of P over the block.

    q, k: [B, N, heads, D] after norm and RoPE, model order; the batch is averaged. `order`: one name, or one per head.
    A row of P sums to 1, so `mass[h].sum()` is N and `mass[h, i].sum()` the number of tokens in query block i.

    Raises ValueError for shapes that do not fit each other or the grid, and for an order the grid does not have.
    """
    q, k, slots = checked(q, k, grid, order, block)
    return block_sums(q, k, row_lse(q, k), slots, block=tuple(block))


def checked(
    q: Any, k: Any, grid: TokenGrid, order: str | Sequence[str], block: tuple[int, int]
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """q, k and the slots of every head; ValueError for what does not fit."""
    q, k = jnp.asarray(q), jnp.asarray(k)
    if q.ndim != 4 or q.shape != k.shape or q.shape[1] != grid.tokens:
        raise ValueError(
            f"q and k must both be [B, {grid.tokens}, heads, D] for {grid.tokens} tokens (grid {grid.shape}, text "
            f"{grid.text}); got q {q.shape} and k {k.shape}."
        )
    names = [order] * q.shape[2] if isinstance(order, str) else list(order)
    if len(names) != q.shape[2]:
        raise ValueError(f"order must be one name, or one per head of q, {q.shape[2]}; got {len(names)}: {names}.")
    grid.blocks(block)  # validates block
    return q, k, head_slots(grid, names)


def attention_map(
    q: jax.Array, k: jax.Array, grid: TokenGrid, order: str | Sequence[str], size: int = 256
) -> jax.Array:
    """A picture of P in an order: float32 [heads, n, n], n <= size; a pixel is the mean over ceil(N / size)^2 tokens.

    Arguments and errors as `block_mass`. The last row and column of pixels may cover fewer tokens.
    """
    if size < 1:
        raise ValueError(f"size must be a positive number of pixels; got {size}.")
    pixel = -(-grid.tokens // size)
    tokens = grid.block_tokens(pixel).astype(np.float32)
    return block_mass(q, k, grid, order, (pixel, pixel)) / np.multiply.outer(tokens, tokens)[None]


def head_slots(grid: TokenGrid, names: Sequence[str]) -> np.ndarray:
    """int32 [heads, N]: kernel slot -> model token, one order per head."""
    return np.stack([grid.index(name) for name in names])


@jax.jit
def row_lse(q: jax.Array, k: jax.Array) -> jax.Array:
    """Log-sum-exp of every row of scores, in log2 units: float32 [heads, B, N]. q, k: [B, N, heads, D]."""

    def head(q, k):
        def strip(rows):
            scores = _dot(rows, k)
            top = scores.max(-1)
            return top + jnp.log2(jnp.exp2(scores - top[:, None]).sum(-1))

        return jax.lax.map(strip, _cut(q, _STRIP_ROWS)).reshape(-1)[: len(q)]

    return _each(lambda q, k: _each(head, q, k), _queries(q), _by_head(k))


@jax.jit
def row_top(q: jax.Array, k: jax.Array) -> jax.Array:
    """The largest score of every row, in log2 units: float32 [heads, B, N]."""

    def head(q, k):
        return jax.lax.map(lambda rows: _dot(rows, k).max(-1), _cut(q, _STRIP_ROWS)).reshape(-1)[: len(q)]

    return _each(lambda q, k: _each(head, q, k), _queries(q), _by_head(k))


@functools.partial(jax.jit, static_argnames="block")
def block_sums(q: jax.Array, k: jax.Array, lse: jax.Array, slots: jax.Array, *, block: tuple[int, int]) -> jax.Array:
    """Sum of P over every block, averaged over the batch: float32 [heads, nq, nk].

    q, k: [B, N, heads, D]; lse: of `row_lse`; slots: int32 [heads, N] or, to see part of the map, its first few.
    """
    (total,) = _block_statistics(q, k, lse, slots, block, lambda p: (_sum(p),))
    return jnp.mean(total, 1)


@functools.partial(jax.jit, static_argnames="block")
def block_shapes(
    q: jax.Array, k: jax.Array, lse: jax.Array, slots: jax.Array, eps: float, *, block: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """What the paper's metric sees of every block (its eq. 1-3), arguments as `block_sums`.

    Returns float32 [heads, B, nq, nk] twice: the share of the block's elements under `eps`, and max P / mean P (1 where
    the block is all zeros).
    """
    (total, peak, large) = _block_statistics(
        q, k, lse, slots, block, lambda p: (_sum(p), p.max((1, 3)), _sum((p >= eps).astype(jnp.float32)))
    )
    size = np.multiply.outer(*(_block_tokens(slots.shape[-1], b) for b in block)).astype(np.float32)[None, None]
    # P is 0 where the scores are beyond float32; a block of zeros is perfectly even.
    return (size - large) / size, jnp.where(total > 0, peak * size / jnp.where(total > 0, total, 1), 1)


@functools.partial(jax.jit, static_argnames="block")
def block_peaks(
    q: jax.Array, k: jax.Array, lse: jax.Array, slots: jax.Array, *, block: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """max P / mean P, averaged over batch and groups: float32 [heads] for blocks, and for each row of a block.

    A group of zeros counts as even, 1. Arguments as `block_sums`.
    """
    rows, keys = (_block_tokens(slots.shape[-1], b) for b in block)

    def reduce(p):
        total = p.sum(-1)  # [query blocks, bq, nk]
        width = jnp.asarray(keys, jnp.float32)[None, None]
        even = jnp.where(total > 0, p.max(-1) * width / jnp.where(total > 0, total, 1), 1)
        return _sum(p), p.max((1, 3)), even.sum(1)

    total, peak, even = _block_statistics(q, k, lse, slots, block, reduce)
    size = np.multiply.outer(rows, keys).astype(np.float32)[None, None]
    blocks = jnp.where(total > 0, peak * size / jnp.where(total > 0, total, 1), 1)
    # A row past the end was counted as an even one.
    even = (even - (block[0] - rows).astype(np.float32)[None, None, :, None]).sum(2) / slots.shape[-1]
    return jnp.mean(blocks, (1, 2, 3)), jnp.mean(even, (1, 2))


@functools.partial(jax.jit, static_argnames="block")
def block_errors(
    q: jax.Array, k: jax.Array, v: jax.Array, lse: jax.Array, slots: jax.Array, *, block: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """What skipping a block does to the output: float32 [heads, nq, nk], averaged over the batch.

    E_ij = sum over the queries r of block i of |sum_c P_rc (v_c - o_r)|^2, c the keys of block j and o_r the dense
    output: the squared error of the output when block j alone is skipped, but for the renormalisation. Arguments as
    `block_sums`, v like q. Also the squared norm of the output, float32 [heads], averaged over the batch.
    """
    bq, bk = block
    tokens = slots.shape[-1]
    nq, nk = -(-tokens // bq), -(-tokens // bk)
    rows = bq * min(max(1, _STRIP_ROWS // bq), nq)

    def head(q, k, v, lse, slots):
        q, k, v, lse = (jnp.take(x, slots, axis=0, unique_indices=True, mode="clip") for x in (q, k, v, lse))
        k, v = (jnp.pad(x, ((0, nk * bk - tokens), (0, 0))) for x in (k, v))
        v = v.reshape(nk, bk, -1)
        real = jnp.arange(nk * bk) < tokens

        def strip(args):
            rows, lse = args
            p = jnp.where(real[None], jnp.exp2(_dot(rows, k) - lse[:, None]), 0).reshape(-1, nk, bk)
            parts = jnp.einsum("rjc,jcd->rjd", p, v, precision=jax.lax.Precision.HIGHEST)
            output = parts.sum(1)
            lost = parts - p.sum(-1)[..., None] * output[:, None]
            return (lost * lost).sum(-1).reshape(-1, bq, nk).sum(1), (output * output).sum()

        errors, size = jax.lax.map(strip, (_cut(q, rows), _cut(lse, rows, jnp.inf)))
        return errors.reshape(-1, nk)[:nq], size.sum()

    def batch(q, k, v, lse, slots):
        return _each(lambda q, k, v, lse: head(q, k, v, lse, slots), q, k, v, lse)

    errors, size = _each(batch, _queries(q), _by_head(k), _by_head(v), lse, jnp.asarray(slots))
    return jnp.mean(errors, 1), jnp.mean(size, 1)


@jax.jit
def finite(x: jax.Array) -> jax.Array:
    """True when no element is NaN or infinite."""
    return jnp.isfinite(x).all()


@jax.jit
def token_mean(x: jax.Array) -> jax.Array:
    """Mean over batch and tokens: float32 [heads, D] of [B, N, heads, D]."""
    return jnp.mean(x.astype(jnp.float32), (0, 1))


def _block_statistics(q, k, lse, slots, block: tuple[int, int], reduce: Callable[[jax.Array], tuple[jax.Array, ...]]):
    """[heads, B, nq, nk] each: `reduce` of every block of P. It gets [query blocks, bq, nk, bk], 0 past the end."""
    bq, bk = block
    tokens = slots.shape[-1]
    nq, nk = -(-tokens // bq), -(-tokens // bk)
    rows = bq * min(max(1, _STRIP_ROWS // bq), nq)

    def head(q, k, lse, slots):
        q, k, lse = (jnp.take(x, slots, axis=0, unique_indices=True, mode="clip") for x in (q, k, lse))
        k = jnp.pad(k, ((0, nk * bk - tokens), (0, 0)))
        real = jnp.arange(nk * bk) < tokens

        def strip(args):
            rows, lse = args
            p = jnp.where(real[None], jnp.exp2(_dot(rows, k) - lse[:, None]), 0)
            return reduce(p.reshape(-1, bq, nk, bk))

        maps = jax.lax.map(strip, (_cut(q, rows), _cut(lse, rows, jnp.inf)))  # exp2(-inf): a row past the end weighs 0
        return tuple(x.reshape(-1, nk)[:nq] for x in maps)

    def batch(q, k, lse, slots):
        return _each(lambda q, k, lse: head(q, k, lse, slots), q, k, lse)

    return _each(batch, _queries(q), _by_head(k), lse, jnp.asarray(slots))


def _each(f: Callable[..., Any], *xs: Any) -> Any:
    """`f` over the leading axis, one after the other: heads in parallel would multiply the strips in memory."""
    return jax.lax.map(lambda args: f(*args), xs)


def _by_head(x: jax.Array) -> jax.Array:
    """float32 [heads, B, N, D]"""
    return x.transpose(2, 0, 1, 3).astype(jnp.float32)


def _queries(q: jax.Array) -> jax.Array:
    return _by_head(q) * (math.log2(math.e) / math.sqrt(q.shape[-1]))


def _dot(rows: jax.Array, k: jax.Array) -> jax.Array:
    # Accelerators would round float32 operands to bfloat16 or TF32.
    return jnp.dot(rows, k.T, precision=jax.lax.Precision.HIGHEST)


def _cut(x: jax.Array, rows: int, fill: float = 0.0) -> jax.Array:
    """[strips, rows, ...], the last strip filled up."""
    strips = -(-len(x) // rows)
    padding = [(0, strips * rows - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding, constant_values=fill).reshape(strips, rows, *x.shape[1:])


def _sum(p: jax.Array) -> jax.Array:
    # Rows first: that sum runs along whole vectors.
    return p.sum(1).sum(-1)


def _block_tokens(tokens: int, size: int) -> np.ndarray:
    return np.minimum(size, tokens - np.arange(0, tokens, size))
