"""The tables behind docs/better_than_the_paper.md, on a few heads of noise."""

import numpy as np
import pytest

import calibrate
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


def test_tables_change_one_thing_at_equal_density(bench, monkeypatch):
    made = bench.plans
    monkeypatch.setattr(bench, "plans", lambda **options: made(**{"orders": ["FHW"]} | options))
    rows = budgets.rules(bench)
    assert [row["rule"] for row in rows] == ["global", "head", "row", "row", "error", "error"]
    assert len({row["l1"] for row in rows}) == len(rows)
    assert all(0.49 < row["density"] <= 0.5 and 0 < row["l1"] <= row["worst l1"] for row in rows)
    assert budgets.markdown(rows).count("\n") == len(rows) + 1
