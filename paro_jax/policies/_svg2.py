"""SparseVideoGen2 (arXiv 2505.18875): tokens of like content side by side, by k-means of Q and of K."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paro_jax._grid import TokenGrid, check_block
from paro_jax._mask import BlockMask
from paro_jax.policies._parts import (
    Block,
    check_count,
    check_grid,
    check_number,
    check_tokens,
    dot,
    each,
    largest,
    top_p,
    with_text,
)

_STILL = 1e-4  # k-means ends when no centroid moves further


class Centroids(NamedTuple):
    """Where a step's k-means ended, float32 [B, heads, clusters, D] each; the next step starts there."""

    q: jax.Array
    k: jax.Array


class ContentOrder(NamedTuple):
    """What `sparse_videogen2` chose, for `slot_attention`."""

    mask: BlockMask  # [B, heads, nq, nk] in the orders below
    q_slots: jax.Array  # int32 [B, heads, N], kernel slot -> model token, text last
    k_slots: jax.Array
    centroids: Centroids
    cluster_density: jax.Array  # float32 [B, heads]: query-key pairs of kept clusters, and with text, of all pairs


def sparse_videogen2(
    q: Any,
    k: Any,
    *,
    grid: TokenGrid,
    q_clusters: int,
    k_clusters: int,
    top_p: Any = 0.9,
    min_ratio: float = 0.1,
    block: Block = (64, 64),
    start: Centroids | jax.Array,
    iterations: int | None = None,
) -> ContentOrder:
    """SparseVideoGen2's orders and mask (arXiv 2505.18875), mapped to fixed blocks.

    q, k [B, N, heads, D], model order. Euclidean k-means of the grid's queries and keys, per batch entry and head;
    tokens are sorted by cluster, queries and keys each by their own. Attention between centroids, weighted by the size
    of the key cluster, is kept from the heaviest up to and with the cluster that crosses `top_p`, and at least
    floor(min_ratio k_clusters) clusters. Published: 300 query and 1000 key clusters for Wan, top_p 0.9, min_ratio 0.1.

    `start`: a PRNG key at the first step, which draws tokens as centroids (at most 50 iterations), then the
    `centroids` of the step before (2); `iterations` sets another limit. Pass the result on:

        chosen = sparse_videogen2(q, k, grid=grid, ..., start=centroids)
        out = slot_attention(q, k, v, chosen.mask, grid=grid, q_slots=chosen.q_slots, k_slots=chosen.k_slots)

    The original's blocks are the clusters, of any size. Ours are fixed, and one is kept when any of its queries and
    keys are in a kept pair of clusters, so `mask.density` is above the method's own `cluster_density`: small clusters
    inflate it. Work and memory are tokens x clusters, one head at a time.
    """
    grid = check_grid(grid)
    q, k = check_tokens(grid.tokens, q=q, k=k)
    tokens = grid.grid_tokens
    check_count("q_clusters", q_clusters, high=tokens)
    check_count("k_clusters", k_clusters, high=tokens)
    limit, _ = check_number("top_p", top_p, 0, 1)[0], check_number("min_ratio", min_ratio, 0, 1)
    warm = isinstance(start, tuple)
    iterations = check_count("iterations", (2 if warm else 50) if iterations is None else iterations, low=0)
    at_least = math.floor(min_ratio * k_clusters)

    shift = grid.text if grid.text_position == "first" else 0
    q, k = (jnp.swapaxes(x[:, shift : shift + tokens], 1, 2).astype(jnp.float32) for x in (q, k))
    if isinstance(start, tuple):
        centroids = Centroids(*(jnp.asarray(x, jnp.float32) for x in start))
    else:
        rngs = jax.random.split(start, 2)
        centroids = Centroids(_drawn(rngs[0], q, q_clusters), _drawn(rngs[1], k, k_clusters))
    for name, x, count in (("q", centroids.q, q_clusters), ("k", centroids.k, k_clusters)):
        expected = (*q.shape[:2], count, q.shape[-1])
        if x.shape != expected:
            raise ValueError(
                f"start.{name} must be [batch, heads, clusters, head_dim] = {list(expected)}; got {list(x.shape)}. "
                "Start from a PRNG key when shapes or cluster counts change."
            )

    return _content_order(q, k, centroids, limit, grid, check_block(block), at_least, iterations)


@partial(jax.jit, static_argnames=("grid", "block", "at_least", "iterations"))
def _content_order(
    q, k, start: Centroids, limit, grid: TokenGrid, block: Block, at_least: int, iterations: int
) -> ContentOrder:
    """q, k [B, heads, grid tokens, D]."""
    tokens, shift = grid.grid_tokens, grid.text if grid.text_position == "first" else 0
    q_clusters, k_clusters = start.q.shape[2], start.k.shape[2]
    kmeans = partial(_kmeans, iterations=iterations)
    (q_labels, q_centroids), (k_labels, k_centroids) = each(kmeans, q, start.q), each(kmeans, k, start.k)
    q_size, k_size = _sizes(q_labels, q_clusters), _sizes(k_labels, k_clusters)
    scores = dot(q_centroids, k_centroids) / math.sqrt(q.shape[-1])
    # Size times e^score; an empty cluster weighs nothing.
    weights = jax.nn.softmax(jnp.where(k_size > 0, jnp.log(jnp.maximum(k_size, 1)), -jnp.inf)[:, :, None] + scores, -1)
    kept = _kept_clusters(weights, limit, at_least)
    kept = kept & (q_size[..., None] > 0) & (k_size[:, :, None] > 0)

    q_slots, k_slots = (jnp.argsort(labels, axis=-1, stable=True).astype(jnp.int32) for labels in (q_labels, k_labels))
    held_q, held_k = (
        _held(jnp.take_along_axis(labels, slots, -1), count, grid, size)
        for labels, slots, count, size in (
            (q_labels, q_slots, q_clusters, block[0]),
            (k_labels, k_slots, k_clusters, block[1]),
        )
    )
    touched = jnp.einsum("bhic,bhcd,bhjd->bhij", held_q, kept.astype(jnp.float32), held_k, precision="highest")
    pairs = jnp.einsum("bhc,bhcd,bhd->bh", q_size, kept.astype(jnp.float32), k_size, precision="highest")
    text = jnp.arange(tokens, grid.tokens, dtype=jnp.int32) - (grid.tokens - grid.text if shift else 0)
    text = jnp.broadcast_to(text[None, None], (*q_slots.shape[:2], grid.text))
    return ContentOrder(
        with_text(touched > 0, grid, block),
        jnp.concatenate([q_slots + shift, text], -1),
        jnp.concatenate([k_slots + shift, text], -1),
        Centroids(q_centroids, k_centroids),
        (pairs + (grid.tokens**2 - tokens**2)) / grid.tokens**2,
    )


def _drawn(rng: jax.Array, x: jax.Array, count: int) -> jax.Array:
    """[B, heads, count, D]: tokens drawn for every batch entry and head, none twice."""
    rngs = jax.random.split(rng, x.shape[:2])
    draw = jax.vmap(jax.vmap(lambda rng, x: jax.random.choice(rng, x, (count,), replace=False)))
    return draw(rngs, x)


def _kmeans(x: jax.Array, start: jax.Array, *, iterations: int) -> tuple[jax.Array, jax.Array]:
    """Lloyd's iterations on x [n, D] from centroids [C, D]: labels int32 [n] and the centroids they belong to."""

    def nearest(centroids):
        # |x|^2 is the same for all centroids.
        return jnp.argmin(jnp.square(centroids).sum(-1)[None] - 2 * dot(x, centroids), -1).astype(jnp.int32)

    def moving(state):
        turn, _, shift = state
        return (turn < iterations) & (shift >= _STILL)

    def move(state):
        turn, centroids, _ = state
        # A matmul, not a scatter: sums in one sequence on every device.
        mine = jax.nn.one_hot(nearest(centroids), len(centroids), dtype=jnp.float32)
        size = mine.sum(0)[:, None]
        mean = jnp.einsum("nc,nd->cd", mine, x, precision="highest") / jnp.maximum(size, 1)
        new = jnp.where(size > 0, mean, centroids)  # an empty cluster stays where it is
        return turn + 1, new, jnp.linalg.norm(new - centroids, axis=-1).max()

    _, centroids, _ = jax.lax.while_loop(moving, move, (jnp.int32(0), start, jnp.float32(np.inf)))
    return nearest(centroids), centroids


def _sizes(labels: jax.Array, clusters: int) -> jax.Array:
    """float32 [B, heads, clusters]: tokens of each."""
    return each(lambda one: jnp.bincount(one, length=clusters), labels).astype(jnp.float32)


def _kept_clusters(weights: jax.Array, limit: jax.Array, at_least: int) -> jax.Array:
    by_mass = top_p(weights, limit[None, None, None], include_crossing=True)
    return by_mass | largest(weights, jnp.full((1, 1, 1), at_least))


def _held(labels: jax.Array, clusters: int, grid: TokenGrid, size: int) -> jax.Array:
    """float32 [B, heads, blocks, clusters]: 1 where a block has a token of a cluster; labels by kernel slot."""
    blocks = grid.blocks((size, size))[0]

    def one(labels):
        where = jnp.arange(len(labels)) // size
        return jnp.zeros((blocks, clusters), jnp.float32).at[where, labels].set(1.0)

    return each(one, labels)
