"""Masks that the grid alone decides: sliding tiles, radial decay, neighbours. No attention is looked at."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import jax.numpy as jnp
import numpy as np

from paro_jax._grid import TokenGrid, check_block, is_int
from paro_jax._mask import BlockMask
from paro_jax.policies._parts import Block, check_grid, check_heads, overlap, same_for_all, spans

_Sizes = tuple[int, ...]


def sliding_tile(
    grid: TokenGrid,
    *,
    tile: _Sizes,
    window: _Sizes | Sequence[_Sizes],
    block: Block = (64, 64),
    heads: int = 1,
) -> BlockMask:
    """Sliding tile attention (STA, arXiv 2502.04507) in the brick order of `tile`: keep [heads, nq, nk].

    `tile` in tokens per axis must be among `grid.bricks`; in its order, "brick6x8x8" for (6, 8, 8), a tile is
    consecutive tokens. `window` in tiles per axis, for all heads or one per head. It is centred on the query's tile,
    shifted to stay inside the grid: floor(w / 2) tiles before and w - 1 - floor(w / 2) after, so an even window is one
    tile shorter after than before. Text is dense.

    Any grid will do. Where tiles do not fill the grid the last ones are smaller (the original pads them with masked
    keys), and a block is kept when any of its queries and keys are in each other's window: exactly STA where tiles are
    whole blocks, a little more elsewhere. Raises ValueError for a tile that has no order, or a window below 1.
    """
    grid = check_grid(grid)
    tile = tuple(tile) if isinstance(tile, (tuple, list)) else tile
    if tile not in grid.bricks:
        raise ValueError(
            f"tile must be among grid.bricks = {grid.bricks}, whose order makes a tile consecutive; got {tile}. "
            f"TokenGrid(..., bricks=({tile},)) has it."
        )
    windows = _windows(window, len(tile))
    if len(windows) == 1:
        windows *= check_heads(heads)
    elif heads not in (1, len(windows)):
        raise ValueError(f"window must be one, or one for each of {heads} heads; got {len(windows)}.")
    counts = [-(-n // t) for n, t in zip(grid.shape, tile, strict=True)]
    place = np.stack(np.unravel_index(_positions(grid, "brick" + "x".join(map(str, tile))), grid.shape), -1) // tile
    labels = np.asarray(np.ravel_multi_index(tuple(place.T), counts))
    held_q, held_k = (overlap(labels, math.prod(counts), grid, size) > 0 for size in check_block(block))
    keeps = {}
    for one in set(windows):
        seen = np.ones((1, 1), bool)
        for n, w in zip(counts, one, strict=True):
            seen = np.kron(seen, _axis_window(n, w))
        keeps[one] = held_q.astype(np.float32) @ seen.astype(np.float32) @ held_k.T.astype(np.float32) > 0
    keep = np.stack([keeps[one] for one in windows]) | grid.always_keep(block)
    return BlockMask(jnp.asarray(keep), check_block(block))


def _windows(window: Any, rank: int) -> list[_Sizes]:
    """One window or one per head, each `rank` positive ints, or ValueError."""
    several = isinstance(window, (tuple, list)) and not all(is_int(w) for w in window)
    windows = []
    for one in window if several else [window]:
        if not isinstance(one, (tuple, list)) or len(one) != rank or not all(is_int(w) and w > 0 for w in one):
            raise ValueError(f"window must be {rank} positive ints, in tiles per axis; got {one!r}.")
        windows.append(tuple(int(w) for w in one))
    return windows


def _axis_window(tiles: int, window: int) -> np.ndarray:
    """bool [tiles, tiles]: which tiles of an axis a tile sees."""
    if window >= tiles:
        return np.ones((tiles, tiles), bool)
    left = window // 2
    right = left + window % 2 - 1
    place = np.arange(tiles)
    centre = np.clip(place, left, tiles - 1 - right)[:, None]
    return (centre - left <= place[None]) & (place[None] <= centre + right)


def neighbours(
    grid: TokenGrid, *, order: str | Sequence[str] = "gilbert", block: Block = (64, 64), heads: int = 1
) -> BlockMask:
    """Every block that has a query and a key side by side on the grid, at most 1 apart on each axis, in an order.

    keep [heads, nq, nk]; `order`: one name or one per head. On a Gilbert curve (`TokenGrid(..., gilbert=True)`) a block
    is a compact piece of the grid, so that this keeps a ball around it: xDiT's static backbone and a mask that needs no
    calibration. xDiT unites it with `sparge(q, k, plan=plan, cdfthr=0.92, simthr=0.3)` by `|`.
    """
    grid = check_grid(grid)
    names = [order] * check_heads(heads) if isinstance(order, str) else list(order)
    if heads not in (1, len(names)):
        raise ValueError(f"order must be one name, or one for each of {heads} heads; got {len(names)}: {names}.")
    maps = {name: _neighbour_map(grid, name, check_block(block)) for name in set(names)}
    keep = np.stack([maps[name] for name in names]) | grid.always_keep(block)
    return BlockMask(jnp.asarray(keep), check_block(block))


def _neighbour_map(grid: TokenGrid, order: str, block: Block) -> np.ndarray:
    slot = np.empty(grid.grid_tokens, np.int64)
    slot[_positions(grid, order)] = np.arange(grid.grid_tokens)
    slot = slot.reshape(grid.shape)
    keep = np.zeros(grid.blocks(block), bool)
    for step in product((-1, 0, 1), repeat=len(grid.shape)):
        here = slot[tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(step, grid.shape, strict=True))]
        there = slot[tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(step, grid.shape, strict=True))]
        keep[here // block[0], there // block[1]] = True  # the opposite step marks the opposite direction
    return keep


def radial(
    grid: TokenGrid, *, decay: float = 1.0, sink: bool = True, block: Block = (64, 64), heads: int = 1
) -> BlockMask:
    """Radial attention (arXiv 2506.19852) in model order, one mask for every head: keep [heads, nq, nk].

    Between two frames D apart a query sees the keys near its own place: all of them up to D = 1, else those within w,
    which halves as D doubles: w = max(decay 2^bit_length(P) / 2^bit_length(D), block), P tokens a frame. Where
    2^bit_length(P) / 2^bit_length(D) is below the block, only every floor(block / that)-th D is kept at all. A block is
    kept when, in one pair of frames, more than 60 % of its keys with any query seen are seen by more than a third of
    its queries. `sink`: all keys of the first frame are kept. `block` in these rules is the longer side, 128 as
    published. `decay` in (0, 1] is the knob: 0.2 to 1.

    Kept beyond the original, which drops or forgets them: the diagonal, the last partial row and column, text.
    Raises ValueError for a grid without frames and for a decay outside (0, 1].
    """
    grid = check_grid(grid)
    if len(grid.shape) != 3:
        raise ValueError(
            f"grid must be a video, (frames, height, width); got shape {grid.shape}. Images have no frames."
        )
    if isinstance(decay, bool) or not isinstance(decay, (int, float, np.floating)) or not 0 < decay <= 1:
        raise ValueError(f"decay must be a number in (0, 1]; got {decay!r}.")
    (bq, bk), frames = check_block(block), grid.shape[0]
    places = grid.grid_tokens // frames
    keep = np.zeros(grid.blocks(block), bool)
    (q0, q1), (k0, k1) = spans(grid, bq), spans(grid, bk)
    rows = np.minimum(q1 + 1, grid.grid_tokens) - q0  # queries of a block, text not counted
    for one in range(frames):
        first, last = one * places // bq, ((one + 1) * places - 1) // bq  # query blocks of this frame
        top = np.maximum(q0[first : last + 1] - one * places, 0)[:, None]
        bottom = np.minimum(q1[first : last + 1] - one * places, places - 1)[:, None]
        for other in range(frames):
            reach = _radial_reach(abs(one - other), places, decay, max(bq, bk))
            if reach is None:
                continue
            key = np.arange(places)
            seen_by = np.minimum(bottom, key + reach) - np.maximum(top, key - reach) + 1
            share = np.maximum(seen_by, 0) / rows[first : last + 1, None]
            start, end = other * places // bk, ((other + 1) * places - 1) // bk
            cuts = np.maximum(k0[start : end + 1] - other * places, 0)
            some, much = (np.add.reduceat(x, cuts, axis=1, dtype=np.int64) for x in (share > 0, share > 1 / 3))
            keep[first : last + 1, start : end + 1] |= much > 0.6 * some
    diagonal = (k0[None] <= q1[:, None]) & (q0[:, None] <= k1[None])
    keep |= diagonal
    if sink:
        keep[:, k0 < places] = True
    if grid.tokens % bq:
        keep[-1] = True
    if grid.tokens % bk:
        keep[:, -1] = True
    return same_for_all(keep, grid, block, heads)


def _radial_reach(distance: int, places: int, decay: float, block: int) -> int | None:
    """How far a query sees in a frame that far away, in tokens; None for not at all."""
    if distance <= 1:
        return places
    length = 2 ** places.bit_length() / 2 ** distance.bit_length()
    if length < block and distance % int(block / length):
        return None
    return int(max(length * decay, block))


def _positions(grid: TokenGrid, order: str) -> np.ndarray:
    """int [grid_tokens]: row-major grid position of every kernel slot."""
    return grid.index(order)[: grid.grid_tokens] - (grid.text if grid.text_position == "first" else 0)
