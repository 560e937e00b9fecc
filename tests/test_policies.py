"""Policies: who keeps which blocks, and that the budget is what was asked for."""

import inspect

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paro_jax import BlockMask, TokenGrid, policies

GRID = TokenGrid((6, 10, 20), text=50)
BLOCK = (64, 32)


@given(st.integers(0, 2**32 - 1), st.sampled_from((0.3, 0.5, 0.77, 1.0)))
def test_top_blocks_keeps_the_forced_the_best_of_each_row_and_the_heaviest(seed, density):
    mass = np.random.default_rng(seed).random((2, 3, *GRID.blocks(BLOCK)))
    always = GRID.always_keep(BLOCK)
    mask = policies.top_blocks(mass, density, always, block=BLOCK)
    keep = np.asarray(mask.keep)
    assert mask.block == BLOCK and keep.shape == mass.shape
    assert (keep.sum((-2, -1)) == round(density * always.size)).all()
    assert keep[..., always].all()
    for head in np.ndindex(keep.shape[:2]):
        best = np.eye(mass.shape[-1], dtype=bool)[mass[head].argmax(-1)] & ~always.any(-1, keepdims=True)
        assert keep[head][best].all()
        free = ~always & ~best
        assert (
            not (free & keep[head]).any()
            or not (free & ~keep[head]).any()
            or (mass[head][free & keep[head]].min() >= mass[head][free & ~keep[head]].max())
        )


def test_top_blocks_breaks_ties_from_the_top_left_and_works_under_jit():
    mass = np.zeros((1, 3, 4), np.float32)
    eager = policies.top_blocks(mass, 0.5)
    np.testing.assert_array_equal(eager.keep[0], [[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]])
    jitted = jax.jit(lambda m: policies.top_blocks(m, 0.5))(mass)
    np.testing.assert_array_equal(jitted.keep, eager.keep)


def test_a_row_of_low_mass_keeps_its_best_block():
    mass = np.ones((1, 4, 4), np.float32)
    mass[0, 2] = [0.1, 0.3, 0.2, 0.1]
    assert np.asarray(policies.top_blocks(mass, 0.5).keep)[0, 2].tolist() == [False, True, False, False]


@pytest.mark.parametrize("block", [(64, 64), (128, 64), (64, 128)])
@pytest.mark.parametrize("density", [0.25, 0.5, 0.9, 1.0])
def test_window_is_a_band_of_the_density_with_text_kept(block, density):
    grid = TokenGrid((6, 20, 20), text=50, text_position="last")
    mask = policies.window(grid, density=density, block=block, heads=3)
    nq, nk = grid.blocks(block)
    keep = np.asarray(mask.keep)
    assert keep.shape == (3, nq, nk) and mask.block == block
    assert abs(mask.density - density) <= 0.5 / (nq * nk) + 1e-9
    assert (keep == keep[:1]).all() and keep[0][grid.always_keep(block)].all()
    always = grid.always_keep(block)
    video_rows, video_columns = np.flatnonzero(~always.all(1)), np.flatnonzero(~always.all(0))
    for i in video_rows:
        kept = keep[0][i, video_columns]
        distance = np.abs((video_columns + 0.5) / nk - (i + 0.5) / nq)
        assert (np.diff(np.flatnonzero(kept)) == 1).all()  # one run ...
        assert distance[kept].max(initial=0) <= distance[~kept].min(initial=1) + 1e-9  # ... of the nearest


def test_dense_keeps_all():
    mask = policies.dense(GRID, block=BLOCK, heads=2)
    assert mask.density == 1.0 and mask.keep.shape == (2, *GRID.blocks(BLOCK))


def test_every_policy_returns_a_block_mask():
    """The conformance list: a new policy joins by being in the module."""
    public = {name for name, f in vars(policies).items() if inspect.isfunction(f) and f.__module__ == policies.__name__}
    public = {name for name in public if not name.startswith("_")}
    calls = {
        "dense": lambda: policies.dense(GRID),
        "window": lambda: policies.window(GRID, density=0.5),
        "top_blocks": lambda: policies.top_blocks(np.ones((1, *GRID.blocks((64, 64)))), 0.5),
    }
    assert set(calls) == public
    for call in calls.values():
        mask, again = call(), call()
        assert isinstance(mask, BlockMask) and mask.keep.dtype == bool and mask.keep.any(-1).all()
        np.testing.assert_array_equal(mask.keep, again.keep)


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.01, float("nan"), "half", True, None])
def test_a_density_outside_0_1_is_refused(says, density):
    with says("density", "(0, 1]", repr(density)):
        policies.window(GRID, density=density)
    with says("density", "(0, 1]", repr(density)):
        policies.top_blocks(np.ones((1, 4, 4)), density)


def test_a_density_below_the_floor_is_refused_not_clipped(says):
    always = GRID.always_keep((64, 64))
    floor = (always.sum() + (~always.any(-1)).sum()) / always.size
    with says("density", f"{floor:.4g}", "0.01"):
        policies.window(GRID, density=0.01)
    assert policies.window(GRID, density=floor).density == pytest.approx(floor)


def test_other_bad_input_is_refused(says):
    with says("heads", "positive int", "0"):
        policies.window(GRID, density=0.5, heads=0)
    with says("always", "[4, 5]", "(5, 4)"):
        policies.top_blocks(np.ones((1, 4, 5)), 0.5, np.ones((5, 4), bool))
    with says("mass", "nq, nk", "[4]"):
        policies.top_blocks(np.ones(4), 0.5)
    with says("block", "(64, 0)"):
        policies.top_blocks(np.ones((1, 4, 4)), 0.5, block=(64, 0))
