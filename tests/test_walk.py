"""The count behind the choice of a walk."""

import numpy as np
import pytest

import calibrate
from paro_jax import AttentionPlan, BlockMask, TokenGrid
from paro_jax.demo import walk


def test_rises_counted_by_hand():
    """Two warps of the first query block (rows 0 to 15, 16 to 31); one row in the second, whose other warp has none.

    Warp 0: one row with maxima 1, 3, 2, 4 and others that never rise: ascending it rises at steps 1 and 3 of 3.
    Warp 1: falling maxima, no rise, but one row has its largest in block 2: one rise. The lone row keeps 0 and 3: one.
    """
    maxima = np.full((1, 33, 4), 0.0)
    maxima[0, 5] = 1, 3, 2, 4
    maxima[0, 16:32] = 4, 3, 2, 1
    maxima[0, 20] = 4, 3, 5, 1
    maxima[0, 32] = 1, 9, 9, 2
    keep = np.ones((1, 2, 4), bool)
    keep[0, 1, 1:3] = False
    mask = BlockMask(keep, (32, 32))
    rising, steps = walk.rises(maxima, *mask.schedule(), 32)
    assert (rising, steps) == (2 + 1 + 1, 3 + 3 + 1)
    first = np.array([[[3], [3]]])  # warp 0: none; warp 1: 1 -> 4 by its rows, then 5; the lone row: none
    rising, steps = walk.rises(maxima, *mask.schedule(first), 32)
    assert (rising, steps) == (0 + 2 + 0, 3 + 3 + 1)
    # By more than 2: warp 0 not to 3 and so to 4, of 1; warp 1 from 1 to 4, and not to 5.
    assert walk.rises(maxima, *mask.schedule(), 32, lazy=2)[0] == 1 + 0 + 0
    assert walk.rises(maxima, *mask.schedule(first), 32, lazy=2)[0] == 0 + 1 + 0


def test_maxima_and_mass_of_blocks(rng):
    q, k = rng.normal(size=(2, 2, 70, 8)).astype(np.float32)
    maxima, mass = map(np.asarray, walk.block_maxima(q, k, block=(32, 16)))
    scores = np.einsum("hqd,hkd->hqk", q, k) / 8**0.5
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    assert maxima.shape == (2, 70, 5) and mass.shape == (2, 3, 5)
    for i in range(3):
        for j in range(5):
            np.testing.assert_allclose(maxima[..., j], scores[..., 16 * j : 16 * j + 16].max(-1), rtol=1e-5)
            part = p[:, 32 * i : 32 * i + 32, 16 * j : 16 * j + 16].sum((1, 2))
            np.testing.assert_allclose(mass[:, i, j], part, rtol=1e-5)


@pytest.fixture
def planted() -> tuple[calibrate.Sample, AttentionPlan]:
    """A head whose queries all have their largest score in block 2 of 3, by far; the text lies in the last block."""
    grid, rng = TokenGrid((4, 20), text=16), np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, grid.tokens, 1, 8)).astype(np.float32) for _ in range(3))
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, 16 + 32 : 16 + 64, :, 0] = 8.0  # the model has its text first, kernel order last
    return calibrate.Sample(0, 0.0, q, k, v), AttentionPlan.dense(grid, heads=1, sites=1, block=(32, 32))


def test_the_heaviest_block_first_leaves_no_rise(planted):
    sample, plan = planted
    rows = {row["walk"]: row for row in walk.measure([sample], [sample], [plan])}
    assert list(rows) == list(walk.WALKS)
    assert rows[walk.ASCENDING]["rises"] >= 0.5  # the step to block 1
    for name in (walk.HEAVIEST, "2 heaviest", walk.CALIBRATED, walk.OWN):
        assert rows[name]["rises"] == 0
    assert rows[walk.TEXT]["rises"] >= 0.5
    assert walk.table(list(rows.values())).count("\n") == 1 + len(rows)


def test_a_rounded_p_costs_the_rule_by_block_nothing(planted):
    rows = {row["walk"]: row for row in walk.measure_errors(planted[:1], planted[:1], planted[1:])}
    assert list(rows) == list(walk.ROUNDED)
    means = [row["block_mean"] for row in rows.values()]
    assert 0 < means[0] < 0.05 and max(means) - min(means) < 1e-6
    assert all(row["running_mean"] > 0 for row in rows.values())
    assert walk.table(list(rows.values())).count("\n") == 1 + len(rows)
