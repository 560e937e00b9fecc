"""NaN where it must not spread, extremes that must not vanish, blocks that do not belong together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paro_jax import AttentionPlan, BlockMask, TokenGrid, arrange, attend, attention, metrics, policies


def test_nan_in_skipped_blocks_stays_out_of_gradients():
    grid = TokenGrid((512,))
    keep = np.ones((1, 32, 32), bool)
    keep[0, 3] = False  # a query block that keeps nothing, among teams that keep something
    keep[0, :, 0] = False  # a key block nobody keeps
    plan = AttentionPlan.build(grid, order="N", mask=BlockMask(keep, (16, 16)))
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 512, 1, 8)), jnp.float32)
    k, v = q.at[0, 2].set(jnp.nan), q.at[0, 3].set(jnp.nan)
    dq, dk, dv = jax.grad(lambda q, k, v: (attention(q, k, v, plan=plan) ** 2).sum(), (0, 1, 2))(q, k, v)
    for g in (dq, dk, dv):
        assert jnp.isfinite(g).all()
    np.testing.assert_array_equal(dq[0, 48:64], 0)
    np.testing.assert_array_equal(dk[0, :16], 0)
    assert float(jnp.abs(dk[0, 16:]).max()) > 0


def test_scores_far_below_zero_still_attend():
    q = jnp.full((1, 4, 1, 1), 1e16)
    v = jnp.arange(4.0)[None, :, None, None]
    plan = AttentionPlan.dense(TokenGrid((4,)), heads=1)
    np.testing.assert_allclose(attention(q, -q, v, plan=plan), 1.5)


def test_token_blocks_of_other_orders_are_refused():
    grid = TokenGrid((3, 4, 5))
    one, other = (AttentionPlan.dense(grid, heads=2, order=o) for o in ("FHW", ["WHF", "FHW"]))
    x = jax.random.normal(jax.random.key(0), (1, 60, 2, 8))
    q, k, v = (arrange(x, plan=one, role=role) for role in ("q", "k", "v"))
    attend(q, k, v, plan=one)
    with pytest.raises(ValueError, match=r"q was arranged in the orders \['FHW', 'FHW'\].*expects \['WHF', 'FHW'\]"):
        attend(q, k, v, plan=other)


def test_a_nan_among_zeros_is_not_perfect():
    x = np.zeros((128, 128), np.float32)
    x[3, 3] = np.nan
    assert np.isnan(metrics.cosine(x, x)) and np.isnan(metrics.incoherence(x)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_the_heaviest_blocks_are_kept_whatever_the_type(dtype):
    keep = policies.top_blocks(np.arange(16, dtype=dtype).reshape(1, 4, 4), 0.75).keep
    np.testing.assert_array_equal(np.asarray(keep)[0].ravel(), _heaviest())


def _heaviest():
    """Twelve blocks: the best of each row (3, 7, 11, 15), then the heaviest others (14, 13, 12, 10, 9, 8, 6, 5)."""
    keep = np.zeros(16, bool)
    keep[[3, 7, 11, 15, 14, 13, 12, 10, 9, 8, 6, 5]] = True
    return keep


def test_a_mask_of_integers_counts_blocks_not_numbers():
    mask = BlockMask(np.array([[[2, 0, 5]]]), (64, 64))
    count, _ = mask.schedule()
    assert int(count[0, 0]) == 2 and mask.density == pytest.approx(2 / 3)
