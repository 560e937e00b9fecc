"""AttentionPlan: building, peeling, steps, and that it is an ordinary pytree."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paro_jax
from paro_jax import AttentionPlan, BlockMask, QuantSpec, TokenGrid
from paro_jax._plan import _bucket_starts, _static_from_json, _static_to_json

GRID = TokenGrid((3, 5, 7), text=16, bricks=((2, 2, 2),))
BLOCK = (64, 32)
NQ, NK = GRID.blocks(BLOCK)


def random_plan(rng, lead=(), heads=3, density=0.5, **settings) -> AttentionPlan:
    keep = rng.random((*lead, heads, NQ, NK)) < density
    order = rng.choice(GRID.orders, (*lead, heads)).tolist()
    return AttentionPlan.build(GRID, order=order, mask=BlockMask(keep, BLOCK), **settings)


def first_of(rng, lead=(), heads=3, m=2) -> np.ndarray:
    """Any blocks, skipped ones and repeats among them."""
    return rng.integers(0, NK, (*lead, heads, NQ, m))


def same(a: AttentionPlan, b: AttentionPlan) -> bool:
    """Equal statics, equal arrays of equal dtypes."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


# --- building -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (4,), (2, 4)])
def test_build_keeps_what_it_is_given(rng, lead):
    keep = rng.random((*lead, 3, NQ, NK)) < 0.5
    order = rng.choice(GRID.orders, (*lead, 3)).tolist()
    k_mean = rng.normal(size=(*lead, 3, 8))
    edges = (0.0, 0.3, 1.0) if len(lead) == 2 else (0.0, 1.0)
    quant = QuantSpec(qk="int8")
    plan = AttentionPlan.build(
        GRID, order=order, mask=BlockMask(keep, BLOCK), quant=quant, k_mean=k_mean, bucket_edges=edges
    )
    assert plan.lead == lead and plan.heads == 3 and plan.quant == quant and plan.bucket_edges == edges
    assert plan.order.dtype == jnp.int8 and plan.keep_bits.dtype == jnp.uint8 and plan.k_mean.dtype == jnp.float32
    assert plan.order_list() == order and plan.order_names == GRID.orders
    np.testing.assert_array_equal(plan.mask().keep, keep)
    np.testing.assert_allclose(plan.k_mean, k_mean, rtol=1e-6)
    assert plan.density == keep.sum() / keep.size == plan.mask().density
    assert plan.nbytes == plan.order.nbytes + plan.keep_bits.nbytes + plan.k_mean.nbytes


def test_slots_are_the_tables_of_each_heads_order(rng):
    plan = random_plan(rng, lead=(2,))
    slots = np.asarray(plan.slots)
    assert slots.shape == (2, 3, GRID.tokens) and slots.dtype == np.int32
    for site, names in enumerate(plan.order_list()):
        for head, name in enumerate(names):
            np.testing.assert_array_equal(slots[site, head], GRID.index(name))


@pytest.mark.parametrize(
    "order, expected",
    [
        ("WFH", [["WFH"] * 3] * 2),
        (["FHW", "WFH", "brick2x2x2"], [["FHW", "WFH", "brick2x2x2"]] * 2),
        ([["FHW"] * 3, ["HFW"] * 3], [["FHW"] * 3, ["HFW"] * 3]),
    ],
)
def test_orders_broadcast_over_leading_axes(order, expected):
    mask = BlockMask(np.ones((2, 3, NQ, NK), bool), BLOCK)
    assert AttentionPlan.build(GRID, order=order, mask=mask).order_list() == expected


def test_dense_keeps_everything_and_defaults_to_model_order():
    plan = AttentionPlan.dense(GRID, heads=2, sites=3, block=BLOCK)
    assert plan.lead == (3,) and plan.density == 1.0 and plan.order_list() == [["FHW", "FHW"]] * 3
    assert plan.mask().keep.all() and plan.mask().keep.shape == (3, 2, NQ, NK)
    assert AttentionPlan.dense(TokenGrid((9,)), heads=1).order_list() == ["N"]


def test_bits_are_an_eighth_of_the_blocks():
    """CogVideoX-5B, one bucket: 42 sites x 48 heads x 278 x 278 blocks are 19.6 MB, not 156."""
    plan = jax.eval_shape(lambda: AttentionPlan.dense(TokenGrid((13, 30, 45), text=226), heads=48, sites=42))
    assert plan.keep_bits.shape == (42, 48, 278, 35)


def test_with_mask_replaces_the_mask_and_nothing_else(rng):
    plan = random_plan(rng, k_mean=rng.normal(size=(3, 8)), quant=QuantSpec(qk="int8"), first=first_of(rng))
    other = BlockMask(rng.random((3, NQ, NK)) < 0.5, BLOCK)
    both = plan.with_mask(plan.mask() & other)
    np.testing.assert_array_equal(both.mask().keep, plan.mask().keep & other.keep)
    assert same(both.with_mask(plan.mask()), plan)


def test_the_schedule_puts_what_is_first_first(rng):
    """But for what the mask skips, and where P is rounded relative to the running maximum."""
    first = first_of(rng)
    plan = random_plan(rng, density=1.0, first=first)
    assert plan.first.dtype == jnp.uint16 and plan.nbytes == plan.order.nbytes + plan.keep_bits.nbytes + 2 * first.size
    for one in (plan, plan.with_mask(BlockMask(rng.random((3, NQ, NK)) < 0.8, BLOCK))):
        expected = one.mask().schedule(first)
        assert (expected[1] != one.mask().schedule()[1]).any()
        for quant, walk in (
            (QuantSpec(), expected),
            (QuantSpec("int8", "int8"), expected),
            (QuantSpec("int8", p_scale="running"), expected),
            (QuantSpec("int8", "int8", p_scale="running"), one.mask().schedule()),
        ):
            for found, wanted in zip(replace(one, quant=quant).schedule(), walk, strict=True):
                np.testing.assert_array_equal(found, wanted)


# --- peeling and steps ----------------------------------------------------------------------------------------------


def test_peeling_takes_one_leading_axis(rng):
    first = first_of(rng, (2, 4))
    plan = random_plan(rng, lead=(2, 4), bucket_edges=(0.0, 0.5, 1.0), first=first)
    for g, s in np.ndindex(2, 4):
        one = plan[g][s]
        assert one.lead == () and one.bucket_edges == (0.0, 1.0)
        assert one.order_list() == plan.order_list()[g][s]
        np.testing.assert_array_equal(one.mask().keep, plan.mask().keep[g, s])
        np.testing.assert_array_equal(one.first, first[g, s])
    assert same(plan[-1], plan[1]) and same(plan[np.int64(1)], plan[1])
    assert [p.lead for p in plan] == [(4,), (4,)]  # iteration ends


def test_peeling_takes_a_traced_index(rng):
    plan = random_plan(rng, lead=(4,))
    assert same(jax.jit(lambda p, i: p[i])(plan, 2), plan[2])


def test_buckets_are_the_exact_floor_for_every_schedule_and_count_up_to_200():
    """Official float arithmetic picks the bucket before at 5 of 30 steps for 10 buckets; ours is floor(s * n / T)."""
    for buckets in range(1, 201):
        edges = tuple(g / buckets for g in range(buckets)) + (1.0,)
        for total in range(1, 201):
            steps = np.arange(total)
            found = np.searchsorted(_bucket_starts(edges, total), steps, side="right")
            np.testing.assert_array_equal(found, steps * buckets // total)


@pytest.mark.parametrize("buckets, total", [(2, 7), (10, 30), (10, 50), (16, 30), (30, 30), (7, 3)])
def test_at_step_takes_the_bucket_of_the_exact_floor(buckets, total):
    edges = tuple(g / buckets for g in range(buckets)) + (1.0,)
    keep = np.ones((buckets, 1, 1, 1, 1), bool)
    numbers = np.arange(buckets)[:, None, None, None]  # k_mean carries the bucket's number
    plan = AttentionPlan.build(
        TokenGrid((1,)), order="N", mask=BlockMask(keep, (64, 64)), k_mean=numbers, bucket_edges=edges
    )
    found = [int(plan.at_step(step, total).k_mean[0, 0, 0]) for step in range(total)]
    assert found == [step * buckets // total for step in range(total)]


def test_at_step_takes_a_traced_step(rng):
    plan = random_plan(rng, lead=(3, 2), bucket_edges=(0.0, 0.3, 0.5, 1.0), first=first_of(rng, (3, 2)))
    pick = jax.jit(lambda p, step: p.at_step(step, 30))
    for step in range(30):
        expected = plan[(step >= 9) + (step >= 15)]
        assert same(plan.at_step(step, 30), expected)
        assert same(pick(plan, step), expected)
    assert same(pick(plan, jnp.int8(9)), plan[1])


@pytest.mark.parametrize("lead", [(), (4,), (1, 4)])
def test_with_one_bucket_every_step_is_the_plan(rng, lead):
    plan = random_plan(rng, lead=lead)
    assert same(plan.at_step(7, 9), plan[0] if len(lead) == 2 else plan)


# --- a pytree -------------------------------------------------------------------------------------------------------


def test_it_goes_through_jit_vmap_and_tree_map(rng):
    plan = random_plan(rng, lead=(4,), k_mean=rng.normal(size=(4, 3, 8)), first=first_of(rng, (4,)))
    assert same(jax.jit(lambda p: p)(plan), plan)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *plan)
    assert same(stacked, plan)
    densities = jax.vmap(lambda p: p.density)(plan)
    np.testing.assert_allclose(densities, [p.density for p in plan], rtol=1e-6)
    assert jax.tree.map(lambda _: 0, plan).order == 0  # a placeholder does not trip a check


def test_other_masks_orders_and_means_do_not_recompile_but_statics_do(rng):
    traces = []

    @jax.jit
    def f(plan):
        traces.append(plan.quant)
        return plan.slots, plan.schedule()

    for _ in range(3):
        f(random_plan(rng, first=first_of(rng)))
    assert len(traces) == 1
    f(random_plan(rng, first=first_of(rng), quant=QuantSpec(qk="int8")))
    assert len(traces) == 2


def test_scan_over_stacked_plans_traces_attention_once(rng):
    plan = random_plan(rng, lead=(4,), density=0.7, first=first_of(rng, (4,)))
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, GRID.tokens, 3, 32))
    traces = []

    @jax.jit
    def layers(x, plan):
        def layer(x, one):
            traces.append(one.lead)
            return x + paro_jax.attention(x, k, v, plan=one), None

        return jax.lax.scan(layer, x, plan)[0]

    expected = q
    for one in plan:
        expected = expected + paro_jax.attention(expected, k, v, plan=one)
    np.testing.assert_allclose(layers(q, plan), expected, atol=1e-5)
    once = len(traces)
    layers(q, random_plan(rng, lead=(4,), first=first_of(rng, (4,))))
    assert len(traces) == once and set(traces) == {()}


def test_the_static_part_survives_json_for_an_exported_function(rng):
    plan = random_plan(rng, quant=QuantSpec(qk="int8"))
    static = (plan.grid, plan.block, plan.order_names, plan.quant, plan.bucket_edges, None)
    assert _static_from_json(_static_to_json(static)) == static
    static = (*static[:-1], QuantSpec(pv="fp4"))
    assert _static_from_json(_static_to_json(static)) == static


def test_repr_is_short_and_survives_a_trace(rng):
    plan = random_plan(rng)
    assert "order=(3,)" in repr(plan) and "TokenGrid" in repr(plan) and len(repr(plan)) < 400
    assert "first=(" not in repr(plan) and f"first=(3, {NQ}, 2)" in repr(random_plan(rng, first=first_of(rng)))
    jax.jit(lambda p: repr(p) and p)(plan)


# --- bad input ------------------------------------------------------------------------------------------------------

FULL = BlockMask(np.ones((2, 3, NQ, NK), bool), BLOCK)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(grid=(3, 5, 7)), ("grid", "TokenGrid", "(3, 5, 7)")),
        (dict(mask=np.ones((3, NQ, NK), bool)), ("mask", "BlockMask")),
        (dict(mask=BlockMask(np.ones((3, NQ, NK + 1), bool), BLOCK)), ("mask.keep", f"{NQ}, {NK}]", f"{NK + 1})")),
        (dict(mask=BlockMask(np.ones((3, NQ, NK), np.float32), BLOCK)), ("mask.keep", "bool", "float32")),
        (dict(mask=BlockMask(np.ones((NQ, NK), bool), BLOCK)), ("mask.keep", "heads", f"({NQ}, {NK})")),
        (dict(mask=BlockMask(np.ones((3, NQ, NK), bool), (64, 0))), ("block", "(64, 0)")),
        (dict(quant="int8"), ("quant", "QuantSpec", "'int8'")),
        (dict(order="WHX"), ("order", "FHW", "'WHX'")),
        (dict(order=["FHW", "FWH"]), ("order", "[2, 3]", "[2]")),
        (dict(order=["FHW", "FWH", 2]), ("order", "name per head", "2")),
        (dict(order=[["FHW"] * 3] * 3), ("order", "[2, 3]", "[3, 3]")),
        (dict(k_mean=np.zeros((3, 8))), ("k_mean", "[2, 3, 'D']", "(3, 8)")),
        (dict(k_mean=np.full((2, 3, 8), np.nan)), ("k_mean", "finite", "NaN")),
        (dict(first=np.zeros((3, NQ, 1), int)), ("first", f"[2, 3, {NQ}, 'm']", f"[3, {NQ}, 1]")),
        (dict(first=np.zeros((2, 3, NQ, 1))), ("first", "integers", "float")),
        (dict(first=np.full((2, 3, NQ, 1), NK)), ("first", f"0 to {NK - 1}", f"got {NK} to {NK}")),
        (dict(first=np.full((2, 3, NQ, 1), -1)), ("first", f"0 to {NK - 1}", "got -1")),
        (dict(bucket_edges=(0.0, 0.5)), ("bucket_edges", "0.0 to 1.0", "(0.0, 0.5)")),
        (dict(bucket_edges=(0.0, 0.5, 0.5, 1.0)), ("bucket_edges", "increase", "0.5, 0.5")),
        (dict(bucket_edges=(0.0, 0.2, 0.5, 1.0)), ("bucket_edges", "(3, sites)", "(2,)")),
        (dict(bucket_edges=1.0), ("bucket_edges", "1.0")),
    ],
)
def test_build_refuses_parts_that_do_not_fit(says, change, words):
    with says(*words):
        AttentionPlan.build(**(dict(grid=GRID, order="FHW", mask=FULL) | change))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(heads=0), ("heads", "positive int", "0")),
        (dict(heads=2.0), ("heads", "positive int", "2.0")),
        (dict(sites=0), ("sites", "positive int", "0")),
        (dict(block=64), ("block", "two positive ints", "64")),
        (dict(order="HW"), ("order", "FHW", "'HW'")),
        (dict(order=["FHW"]), ("order", "[2]", "[1]")),
        (dict(grid=7), ("grid", "TokenGrid", "7")),
    ],
)
def test_dense_refuses_bad_arguments(says, change, words):
    with says(*words):
        AttentionPlan.dense(**(dict(grid=GRID, heads=2) | change))


def test_bad_peels_and_steps_are_refused(says, rng):
    plan = random_plan(rng, lead=(2, 4), bucket_edges=(0.0, 0.5, 1.0))
    with says("plan[i]", "i < 2", "got 2", error=IndexError):
        plan[2]
    with says("plan[i]", "none left"):
        plan[0][0][0]
    with says("plan[i]", "one int", "slice"):
        plan[0:2]
    with says("step", "30", "got 30"):
        plan.at_step(30, 30)
    with says("step", "-1"):
        plan.at_step(-1, 30)
    with says("total_steps", "positive int", "0"):
        plan.at_step(0, 0)
    with says("step", "one int", "0.5"):
        plan.at_step(0.5, 30)
    with says("at_step", "2 buckets", "(1, 4)"):
        jax.tree.map(lambda x: x[:1], plan).at_step(0, 30)


def test_with_mask_refuses_another_shape_or_block(says, rng):
    plan = random_plan(rng)
    with says("mask", f"(3, {NQ}, {NK})", f"(2, {NQ}, {NK})"):
        plan.with_mask(BlockMask(np.ones((2, NQ, NK), bool), BLOCK))
    with says("mask", "(64, 32)", "(64, 64)"):
        plan.with_mask(BlockMask(np.ones((3, NQ, NK), bool), (64, 64)))
