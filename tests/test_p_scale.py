"""The measurement behind the default of QuantSpec.p_scale."""

import numpy as np

import calibrate
from paro_jax import AttentionPlan, QuantSpec, TokenGrid
from paro_jax.demo import int4, p_scale


def test_a_tail_behind_an_early_maximum_needs_the_rule_by_block():
    """Each query's best key is the first of all; the second block is 64 keys of probability 0.003 of its."""
    grid, rng = TokenGrid((3, 8, 8)), np.random.default_rng(0)
    q = np.zeros((1, grid.tokens, 2, 16), np.float32)
    k, v = np.zeros_like(q), rng.normal(size=q.shape).astype(np.float32)
    q[..., 0] = 4.0
    k[:, 1:, :, 0], k[:, 128:, :, 0] = np.log(1e-6), np.log(0.003)  # the scale 1 / sqrt(16) takes the 4 back
    v[:, 128:] += 3.0
    (row, only_p) = p_scale.measure([calibrate.Sample(0, 0.0, q, k, v)], grid, densities=(1.0,), widths=("int8",))
    assert (row["qk"], only_p["qk"], row["heads"]) == ("int8", "bf16", 2)
    for found in (row, only_p):
        assert found["running_mean"] > 0.1 > 0.02 > found["block_mean"] and found["block_better"] == 2
    assert p_scale.table([row]).count("\n") == 2
    assert QuantSpec().p_scale == "block"


def test_four_bits_want_a_smooth_k_and_all_levels_for_p():
    """A bias that all keys share is most of K's range until it is taken away; P has no sign to spend levels on."""
    grid, rng = TokenGrid((3, 8, 8)), np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, grid.tokens, 2, 16)).astype(np.float32)
    sample = calibrate.Sample(0, 0.0, q + 2.0, k + 10.0 * rng.normal(size=16), v)
    rows = int4.measure([sample], {"model": AttentionPlan.dense(grid, heads=2)}, 1)
    error = {row["name"]: row["mean"] for row in rows}
    assert len(error) == len(int4.VARIANTS) and all(row["heads"] == 2 for row in rows)
    assert error["Q K int4, K less its mean"] < error["Q K int4, nothing smoothed"] / 2
    assert error["Q K int4, K and Q less their means"] < error["Q K int4, K less its mean"]
    assert error["P V int4, P on [0, 15]"] < error["P V int4, P on [0, 7]"]
    assert int4.table(rows).count("\n") == len(rows) + 1
