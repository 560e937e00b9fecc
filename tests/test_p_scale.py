"""The measurement behind the default of QuantSpec.p_scale."""

import numpy as np

import calibrate
from paro_jax import QuantSpec, TokenGrid
from paro_jax.demo import p_scale


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
