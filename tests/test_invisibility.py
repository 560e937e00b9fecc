"""The deepest test: an order is invisible under a full mask.

For every grid, order, text position, length, head size, block and batch, attention with a dense plan equals
`jax.nn.dot_product_attention`. Problems are generated: the shapes come from a pool, because each one compiles, and the
orders, one per head, and the data are free.
"""

from functools import partial
from itertools import product
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paro_jax
from paro_jax import AttentionPlan, TokenGrid


class Shapes(NamedTuple):
    """What compiles: the static side of a problem."""

    grid: TokenGrid
    block: tuple[int, int]
    batch: int
    heads: int
    head_dim: int
    scale: float | None = None


_GRIDS = (
    TokenGrid((1,)),
    TokenGrid((63,)),
    TokenGrid((64,)),
    TokenGrid((65,), text=1),
    TokenGrid((200,), text=30, text_position="last"),
    TokenGrid((5, 13)),
    TokenGrid((8, 16), text=7, text_position="last", bricks=((8, 8), (3, 5))),
    TokenGrid((9, 11), text=70),
    TokenGrid((1, 1, 1), text=62),
    TokenGrid((1, 7, 9)),
    TokenGrid((3, 5, 7), text=16, bricks=((4, 4, 4),), gilbert=True),
    TokenGrid((4, 6, 5), text=9, text_position="last", bricks=((2, 3, 4), (1, 1, 5))),
    TokenGrid((5, 4, 13), text=11),
)
_BLOCKS = ((64, 64), (128, 128), (64, 128), (128, 64))
_HEAD_DIMS = (32, 64, 40, 128, 80, 256)

# Every grid meets three blocks, every block and head dimension meets many grids, batches and head counts vary along.
POOL = tuple(
    Shapes(
        grid,
        _BLOCKS[(i + j) % len(_BLOCKS)],
        batch=1 + (i + 2 * j) % 3,
        heads=1 + (2 * i + j) % 4,
        head_dim=_HEAD_DIMS[(i + 2 * j) % len(_HEAD_DIMS)],
        scale=0.05 if (i + j) % 5 == 0 else None,
    )
    for (i, grid), j in product(enumerate(_GRIDS), range(3))
)


dense = jax.jit(partial(jax.nn.dot_product_attention, return_residual=True), static_argnames="scale")


@st.composite
def problems(draw):
    """(shapes, an order per head, sharpness of the scores, seed of the data)."""
    shapes = draw(st.sampled_from(POOL))
    orders = draw(st.lists(st.sampled_from(shapes.grid.orders), min_size=shapes.heads, max_size=shapes.heads))
    return shapes, orders, draw(st.sampled_from((0.1, 1.0, 2.0))), draw(st.integers(0, 2**32 - 1))


def difference(shapes: Shapes, orders: list[str], sharpness: float, seed: int, block=None) -> float:
    """Largest |attention with a dense plan - jax.nn's| over output and log-sum-exp (relative where that is above 1)."""
    size = (3, shapes.batch, shapes.grid.tokens, shapes.heads, shapes.head_dim)
    q, k, v = np.random.default_rng(seed).standard_normal(size, np.float32)
    plan = AttentionPlan.dense(shapes.grid, heads=shapes.heads, order=orders, block=block or shapes.block)
    expected = dense(sharpness * q, k, v, scale=shapes.scale)
    found = paro_jax.attention(sharpness * q, k, v, plan=plan, scale=shapes.scale, return_residual=True)
    assert [x.shape for x in found] == [x.shape for x in expected]
    # In numpy: in JAX every shape of the pool would have these few operations compiled, too.
    (o, lse), (o_expected, lse_expected) = jax.tree.map(np.asarray, (found, expected))
    unit = np.maximum(1.0, np.abs(lse_expected))
    return max(float(np.max(np.abs(o - o_expected))), float(np.max(np.abs(lse - lse_expected) / unit)))


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute or so alone; compiling shares the machine badly
@settings(max_examples=340)
@given(problems())
def test_an_order_is_invisible_under_a_full_mask(problem):
    assert difference(*problem) <= 1e-5


@pytest.mark.parametrize("grid", [grid for grid in _GRIDS if len(grid.shape) == 3], ids=str)
def test_every_order_of_every_video_grid_is_invisible(grid):
    heads = len(grid.orders)
    assert difference(Shapes(grid, (64, 64), 1, heads, 32), list(grid.orders), 1.0, seed=1) <= 1e-5


def test_the_pool_covers_what_we_promise():
    assert len(POOL) == 39
    assert {s.grid.text_position for s in POOL if s.grid.text} == {"first", "last"} and any(
        not s.grid.text for s in POOL
    )
    assert {len(s.grid.shape) for s in POOL} == {1, 2, 3}
    assert {1, 63, 65, 64} <= {s.grid.tokens for s in POOL} | {s.grid.grid_tokens for s in POOL}
    assert {s.block for s in POOL} == set(_BLOCKS) and {s.head_dim for s in POOL} == set(_HEAD_DIMS)
    assert {s.batch for s in POOL} == {1, 2, 3} and {s.heads for s in POOL} == {1, 2, 3, 4}
    assert any(s.grid.bricks for s in POOL) and {s.scale for s in POOL} == {None, 0.05}
