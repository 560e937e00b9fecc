"""Skipped blocks that stand in as their means, against the definition written one block at a time in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paro_jax
from paro_jax import AttentionPlan, BlockMask, QuantSpec, TokenGrid
from paro_jax.policies import _compensate, compensated_attention, masked_attention

GRID = TokenGrid((4, 4, 6), text=5)  # 101 tokens: partial blocks in queries and keys
BLOCK = (16, 8)
BATCH, HEADS, DIM = 2, 2, 8


def qkv(seed=0):
    x = np.random.default_rng(seed).standard_normal((3, BATCH, GRID.tokens + 6, HEADS, DIM))
    smooth = np.mean([x[:, :, i : i + GRID.tokens] for i in range(7)], axis=0) * 7**0.5  # neighbours are alike
    return list((1.5 * smooth).astype(np.float32))


def plan_of(density=0.4, seed=0, **options):
    nq, nk = GRID.blocks(BLOCK)
    keep = (np.random.default_rng(seed).random((HEADS, nq, nk)) < density) | GRID.always_keep(BLOCK)
    keep[0, 0] = True  # a row that skips nothing
    mask = BlockMask(jnp.asarray(keep), BLOCK)
    return AttentionPlan.build(GRID, order=["FHW", "WHF"], mask=mask, **options)


def by_definition(q, k, v, plan, scale):
    """One softmax over the tokens of kept blocks and, with the weight of its tokens, the mean of each skipped one."""
    out = np.zeros(q.shape)
    keep, (bq, bk) = np.asarray(plan.mask().keep), plan.block
    for b, h in itertools.product(range(len(q)), range(plan.heads)):
        slots = GRID.index(plan.order_list()[h])
        rows, keys, values = (x[b, slots, h].astype(np.float64) for x in (q, k, v))
        for r, slot in enumerate(slots):
            i = r // bq
            pooled = rows[i * bq : (i + 1) * bq].mean(0)
            scores, said = [], []
            for j in range(keep.shape[-1]):
                mine = slice(j * bk, (j + 1) * bk)
                if keep[h, i, j]:
                    scores += list(scale * keys[mine] @ rows[r])
                    said += list(values[mine])
                else:
                    scores.append(scale * pooled @ keys[mine].mean(0) + np.log(len(keys[mine])))
                    said.append(values[mine].mean(0))
            p = np.exp(np.array(scores) - np.max(scores))
            out[b, slot, h] = p @ np.array(said) / p.sum()
    return out


def test_it_is_its_definition():
    q, k, v = qkv()
    plan = plan_of()
    expected = by_definition(q, k, v, plan, 0.7)
    np.testing.assert_allclose(compensated_attention(q, k, v, plan=plan, scale=0.7), expected, atol=2e-5)


def test_no_walk_changes_it_nor_attention_under_a_policys_mask():
    x, (nq, nk) = qkv(), GRID.blocks(BLOCK)
    plans = plan_of(first=np.random.default_rng(0).integers(0, nk, (HEADS, nq, 2))), plan_of()
    assert (plans[0].schedule()[1] != plans[1].schedule()[1]).any()
    found, expected = (compensated_attention(*x, plan=plan) for plan in plans)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    mask = BlockMask(np.random.default_rng(1).random((BATCH, HEADS, nq, nk)) < 0.5, BLOCK)
    found, expected = (masked_attention(*x, mask, plan=plan) for plan in plans)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_what_is_alike_is_not_missed():
    """Queries of a block and keys of a block alike: three of four blocks are skipped, and nothing is lost."""
    grid, rng = TokenGrid((128,)), np.random.default_rng(0)
    q, k = (np.repeat(rng.normal(size=(1, 8, 1, 16)), 16, axis=1).astype(np.float32) for _ in "qk")
    v = rng.normal(size=q.shape).astype(np.float32)
    mask = BlockMask(jnp.asarray(np.eye(8, dtype=bool)[None]), (16, 16))
    plan = AttentionPlan.build(grid, order=["N"], mask=mask)
    dense = jax.nn.dot_product_attention(*map(jnp.asarray, (q, k, v)))
    np.testing.assert_allclose(compensated_attention(q, k, v, plan=plan), dense, atol=1e-5)
    assert np.abs(paro_jax.attention(q, k, v, plan=plan) - dense).max() > 0.1


def test_quantised_it_is_nearer_to_dense_attention_too():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv())
    dense = jax.nn.dot_product_attention(q, k, v)
    plan = plan_of(quant=QuantSpec(qk="int8", pv="int8"))
    alone, together = (f(q, k, v, plan=plan) for f in (paro_jax.attention, compensated_attention))
    assert together.dtype == jnp.bfloat16
    assert jnp.abs(together - dense).sum() < 0.9 * jnp.abs(alone - dense).sum()


def test_a_mask_that_skips_nothing_or_everything():
    q, k, v = qkv()
    dense = AttentionPlan.dense(GRID, heads=HEADS, block=BLOCK)
    np.testing.assert_array_equal(compensated_attention(q, k, v, plan=dense), paro_jax.attention(q, k, v, plan=dense))
    bare = dense.with_mask(BlockMask(jnp.zeros((HEADS, *GRID.blocks(BLOCK)), bool), BLOCK))
    np.testing.assert_allclose(
        compensated_attention(q, k, v, plan=bare), by_definition(q, k, v, bare, DIM**-0.5), atol=2e-5
    )


def test_gradients_are_finite_where_rows_skip_all_or_nothing():
    q, k, v = qkv()
    plan, lse = plan_of(), np.zeros(q.shape[:3], np.float32)
    lse[:, 40:45] = -np.inf  # nothing kept

    def loss(q, k, v, output, lse):
        return jnp.sum(_compensate._compensated(q, k, v, output, lse, plan, 0.5) ** 2)

    grads = jax.grad(loss, range(5))(q, k, v, q, lse)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in grads)


def test_it_needs_the_plan_of_one_site():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="plan must be the AttentionPlan of one site"):
        compensated_attention(q, k, v, plan=None)  # pyright: ignore[reportArgumentType]
