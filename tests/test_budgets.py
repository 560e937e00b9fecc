"""The tables behind docs/better_than_the_paper.md, on a few heads of noise."""

import numpy as np
import pytest

import calibrate
from paro_jax import AttentionPlan, BlockMask
from paro_jax.demo import budgets, run
from paro_jax.demo.model import CONFIG


@pytest.fixture(scope="module")
def bench():
    rng = np.random.default_rng(0)

    def samples(steps):
        shape = (3, 1, CONFIG.grid.tokens, 1, 8)
        return [
            calibrate.Sample(0, step / run.STEPS, *rng.normal(scale=2, size=shape).astype(np.float32)) for step in steps
        ]

    return budgets.Bench(samples(run.capture_steps(run.STEPS)), samples([5]), densities=(0.5,))


def test_integers_count_the_heads_that_an_order_helps(monkeypatch):
    """Head 1's queries grow along the width: with a column's side by side a block's scale fits all of its queries."""
    rng, grid = np.random.default_rng(0), CONFIG.grid
    q, k, v = rng.normal(size=(3, 1, grid.tokens, 2, 8)).astype(np.float32)
    sizes = np.broadcast_to(4.0 ** np.linspace(-1, 1, grid.shape[2]), grid.shape).reshape(-1)
    q[:, grid.text :, 1] *= sizes[None, :, None]
    sample = calibrate.Sample(0, 0.5, q, k, v)
    bench = budgets.Bench([sample], [sample], densities=())
    dense = BlockMask(np.ones((1, 1, 2, *grid.blocks(run.BLOCK)), bool), run.BLOCK)

    def plans(quant, objective=None, orders=None, **_):
        own = "WHF" if orders is None else "FHW"
        return [AttentionPlan.build(grid, order=["FHW", own], mask=dense, quant=quant)]

    monkeypatch.setattr(bench, "plans", plans)
    rows = [row for row in budgets.integers(bench) if row["recipe"] == "PARO INT4"]
    assert [row["orders by"] for row in rows] == ["mass", "error"]
    for row in rows:  # the other head's order is the same
        assert (row["density"], row["better"], row["heads"], row["of"]) == (1.0, 1, 1, 2)
        assert row["l1"] < row["l1, model order"]


def test_tables_change_one_thing_at_equal_density(bench, monkeypatch):
    made = bench.plans
    monkeypatch.setattr(bench, "plans", lambda **options: made(**{"orders": ["FHW"]} | options))
    rows = budgets.rules(bench)
    assert [row["rule"] for row in rows] == ["global", "head", "row", "row", "error", "error"]
    assert len({row["l1"] for row in rows}) == len(rows)
    assert all(0.49 < row["density"] <= 0.5 and 0 < row["l1"] <= row["worst l1"] for row in rows)
    assert budgets.markdown(rows).count("\n") == len(rows) + 1
