"""Samples in, plan and report out."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import BLOCK, GRID, assert_same, keep, make, sample, samples

import calibrate
import paro_jax
from calibrate import Sample, _choose, bench
from paro_jax import AttentionPlan, QuantSpec, TokenGrid, metrics


def planted(grid, rates, seed=1, strength=9.0):
    """A head that sees far along the axis of the last rate and near along that of the first: rates {"F": ..., ...}."""
    q, k = bench.local_head(grid, tuple(rates[axis] for axis in "FHW"), 64, np.random.default_rng(seed), strength)
    return Sample(0, 0.0, q, k)


# Orders


@pytest.mark.parametrize(
    ("grid", "block"), [(TokenGrid((8, 8, 8)), (32, 32)), (TokenGrid((7, 9, 8), text=5), (32, 16))]
)
def test_a_planted_head_gets_its_order(grid, block):
    heads = [planted(grid, dict(zip(order, (1.5, 0.3, 0.03), strict=True))) for order in grid.orders]
    q, k = (np.concatenate([getattr(head, role) for head in heads], axis=2) for role in "qk")
    plan, report = make([Sample(0, 0.0, q, k)], grid, density=0.35, block=block)
    assert plan.order_list() == [list(grid.orders)]
    for row in report.rows:
        assert row["error"] <= row["model_error"]
    assert sum(row["model_error"] - row["error"] > 0.05 for row in report.rows) >= 4


def test_an_image_head_gets_its_order():
    grid = TokenGrid((13, 11), text=6)
    rng = np.random.default_rng(0)
    rows, columns = (bench.local_head(grid, rates, 32, rng, 9.0) for rates in ((2.0, 0.05), (0.05, 2.0)))
    q, k = (np.concatenate(pair, 2) for pair in zip(rows, columns, strict=True))
    plan, _ = make([Sample(0, 0.0, q, k)], grid, density=0.4, block=(16, 16))
    assert plan.order_list() == [["HW", "WH"]]


def test_a_tie_goes_to_model_order():
    """With one frame FHW and HFW, HWF are the same order, and at full density all orders retain everything."""
    flat = TokenGrid((1, 8, 8), text=3)
    assert_tied = [planted(flat, {"F": 1.0, "H": 2.0, "W": 0.05}), planted(flat, {"F": 1.0, "H": 0.05, "W": 2.0})]
    for given, first in zip(assert_tied, ("FHW", "FWH"), strict=True):
        plan, _ = make([given], flat, density=0.5)
        assert plan.order_list() == [[first]]
    plan, _ = make(density=1.0)
    assert plan.order_list() == [["FHW", "FHW"]] * 2 and keep(plan).all()
    uniform = Sample(0, 0.0, *np.zeros((2, 1, GRID.tokens, 2, 8), np.float32))
    assert make([uniform])[0].order_list() == [["FHW", "FHW"]]
    # The sequence of the names given does not matter, that of the grid does.
    assert make([uniform], orders=["WFH", "HWF", "FWH"])[0].order_list() == [["FWH", "FWH"]]


def random_heads(grid, heads, seed):
    rng = np.random.default_rng(seed)
    pairs = [
        bench.local_head(grid, tuple(10 ** rng.uniform(-1.7, 0.3, 3)), 64, rng, rng.uniform(5, 10))
        for _ in range(heads)
    ]
    return Sample(0, 0.0, *(np.concatenate(parts, 2) for parts in zip(*pairs, strict=True)))


def retained_of(given, grid, block, density):
    """[orders, heads]"""
    mass = [np.asarray(calibrate.block_mass(given.q, given.k, grid, name, block)) for name in grid.orders]
    return _choose.retained(np.stack(mass), grid.always_keep(block), density)


def test_the_mass_objective_has_no_regret():
    grid, block = TokenGrid((7, 9, 8), text=5), (32, 16)
    given = random_heads(grid, 8, seed=3)
    retained = retained_of(given, grid, block, 0.3)
    plan, report = make([given], grid, density=0.3, block=block)
    chosen = retained[np.asarray(plan.order)[0], np.arange(8)]
    assert (chosen >= retained.max(0) - 1e-6).all()
    np.testing.assert_allclose([1 - row["error"] for row in report.rows], chosen, atol=1e-7)
    np.testing.assert_allclose([1 - row["model_error"] for row in report.rows], retained[0], atol=1e-7)


def test_the_direction_problem_of_the_papers_metric():
    """Which sign of M_sparse finds good orders depends on eps N, so no fixed sign is right; mass needs none."""
    grid, block, density = TokenGrid((8, 16, 16)), (64, 64), 0.2
    given = random_heads(grid, 8, seed=0)
    retained = retained_of(given, grid, block, density)

    def regret(**options):
        plan, _ = make([given], grid, density=density, block=block, **options)
        return (retained.max(0) - retained[np.asarray(plan.order)[0], np.arange(8)]).mean()

    def paro(c, sign):
        return regret(objective=calibrate.ParoMetric(eps=c / grid.tokens, sign=sign))

    assert regret() <= 1e-6
    literal, turned = paro(1, +1), paro(1, -1)
    assert literal > 0.1 and turned < 0.02  # as printed: worse than never reordering
    assert retained.max(0).mean() - retained[0].mean() < literal
    literal, turned = paro(17.5, +1), paro(17.5, -1)
    assert literal < 0.02 and turned > 0.02


def test_the_paro_objective_is_its_formula():
    grid = TokenGrid((3, 4, 5), text=4)
    given = sample(batch=2, grid=grid)
    metric = calibrate.ParoMetric(eps=0.01, sigma=0.5, alpha=0.3)
    q, k = (np.float64(x).transpose(2, 0, 1, 3) for x in (given.q, given.k))
    p = np.asarray(jax.nn.softmax(jnp.asarray(q @ k.swapaxes(-1, -2) / 8**0.5), -1))
    sparse, quant = [], []
    for order in grid.orders:
        slots = grid.index(order)[:60]
        part = p[..., slots, :][..., slots]  # [heads, B, 60, 60]
        tiles = [part[..., i : i + 16, j : j + 16] for i in range(0, 60, 16) for j in range(0, 60, 16)]
        sparse.append(np.mean([(t < 0.01).mean((-2, -1)) >= 0.5 for t in tiles], (0, 2)))
        quant.append(np.mean([t.max((-2, -1)) / t.mean((-2, -1)) for t in tiles], (0, 2)))
    sparse, quant = np.array(sparse), np.array(quant)
    expected = 0.3 * sparse / sparse.sum(0) + 0.7 * quant / quant.sum(0)
    _, report = make([given], grid, objective=metric)
    names = list(grid.orders)
    for row in report.rows:
        assert row["error"] == pytest.approx(expected[names.index(row["order"]), row["head"]], rel=1e-5)
        assert row["error"] == pytest.approx(expected[:, row["head"]].min(), rel=1e-5)


def test_the_paro_objective_without_a_sparse_block():
    """M_sparse is 0 for every order: 0 / 0 must not decide."""
    plan, report = make(objective=calibrate.ParoMetric(eps=1e-30))
    assert all(np.isfinite(row["error"]) for row in report.rows)


@pytest.mark.parametrize("quant", [QuantSpec(), QuantSpec(qk="int8", pv="int8")])
def test_the_error_objective_measures_the_output(quant):
    given = sample(heads=3)
    _, report = make([given], objective="error", quant=quant)
    dense = jax.nn.dot_product_attention(*map(jnp.asarray, given[2:]))
    errors = []
    for order in GRID.orders:
        mass = np.asarray(calibrate.block_mass(given.q, given.k, GRID, order, BLOCK))
        kept, _ = _choose.mask(mass / 16, GRID.always_keep(BLOCK), 0.6, "head")
        plan = AttentionPlan.build(GRID, order=order, mask=paro_jax.BlockMask(jnp.asarray(kept), BLOCK), quant=quant)
        out = paro_jax.attention(*map(jnp.asarray, given[2:]), plan=plan, implementation="reference")
        errors.append([float(metrics.relative_l1(dense[:, :, h], out[:, :, h])) for h in range(3)])
    for row in report.rows:
        assert row["error"] == pytest.approx(np.min(errors, 0)[row["head"]], rel=1e-3)


def test_quantisation_changes_the_order_that_is_chosen():
    """V's size alternates along W. Without rounding every order is the same at full density; in four bits by block,
    only an order with W slowest lets the small tokens have a scale of their own."""
    grid = TokenGrid((4, 4, 8))
    rng = np.random.default_rng(0)
    x = 4 * rng.normal(size=(1, grid.tokens, 1, 16)).astype(np.float32)  # q = k: each token attends to itself
    size = np.broadcast_to(np.where(np.arange(8) % 2, 1.0, 8.0), grid.shape).reshape(1, -1, 1, 1)
    given = Sample(0, 0.0, x, x, (size * rng.normal(size=x.shape)).astype(np.float32))

    def chosen(**options):
        return make([given], grid, density=1.0, block=(16, 16), **options)[0].order_list()[0][0]

    quant = QuantSpec(pv="int4", v_group="block")
    assert chosen(objective="error") == chosen(quant=quant) == "FHW"
    assert chosen(objective="error", quant=quant)[0] == "W"
    # One scale for a channel whatever the order: nothing to gain, and "FHW" is free.
    by_channel = {name: float(_score_of(given, grid, name, QuantSpec(pv="int4"))) for name in ("FHW", "WFH")}
    by_block = {name: float(_score_of(given, grid, name, quant)) for name in ("FHW", "WFH")}
    assert by_block["WFH"] < 0.8 * by_block["FHW"] and by_channel["WFH"] > 0.9 * by_channel["FHW"]


def _score_of(given, grid, order, quant):
    plan = AttentionPlan.dense(grid, heads=1, order=order, block=(16, 16), quant=quant)
    dense = jax.nn.dot_product_attention(*map(jnp.asarray, given[2:]))
    return metrics.relative_l1(dense, paro_jax.attention(*map(jnp.asarray, given[2:]), plan=plan))


def test_brick_orders_are_candidates():
    """A head that sees a cube around it: bricks retain more than any axis order."""
    plain, bricks = TokenGrid((8, 8, 8)), TokenGrid((8, 8, 8), bricks=((4, 4, 4), (2, 2, 2)))
    given = planted(plain, {"F": 0.5, "H": 0.5, "W": 0.5})
    axis, with_bricks = (make([given], g, density=0.25, block=(64, 64)) for g in (plain, bricks))
    assert with_bricks[0].order_list() == [["brick4x4x4"]]
    assert with_bricks[1].rows[0]["error"] < axis[1].rows[0]["error"] - 0.02
    switched_off = make([given], bricks, density=0.25, block=(64, 64), orders=plain.orders)
    assert switched_off[0].order_list() == axis[0].order_list()


# Masks


ODD_GRIDS = [TokenGrid((5, 6, 7), text=9), TokenGrid((4, 9, 5)), TokenGrid((300,))]


@pytest.mark.parametrize("grid", [*ODD_GRIDS, TokenGrid((7, 31), text=40, text_position="last")])
@pytest.mark.parametrize("rule", ["global", "head", "row"])
def test_density_on_odd_grids(grid, rule):
    given = [sample(s, grid=grid, heads=3) for s in range(2)]
    plan, report = make(given, grid, density=0.55, block=(32, 16), rule=rule)
    kept, always = keep(plan), grid.always_keep((32, 16))
    assert kept.shape == (2, 3, *grid.blocks((32, 16)))
    assert kept.mean() <= 0.55
    if rule == "global":
        assert kept.sum() > 0.55 * kept.size - 2  # no two blocks of random data are equal
    if rule == "head":
        assert (kept.mean((-2, -1)) <= 0.55).all() and (kept.sum((-2, -1)) > 0.55 * kept[0, 0].size - 2).all()
    if rule == "row":
        rows = kept[..., ~always.all(1), :].sum(-1)
        assert np.ptp(rows) <= 1 and (kept.sum((-2, -1)) > 0.55 * kept[0, 0].size - 1).all()
    assert kept[..., always].all() and kept.any(-1).all()
    assert report.summary["density"] == pytest.approx(kept.mean())


def test_the_error_rule_gives_nothing_to_a_head_that_cannot_lose():
    """All values of head 0 are alike: its output is the same whatever it attends to. The others have the budget."""
    grid, always = ODD_GRIDS[0], ODD_GRIDS[0].always_keep((32, 16))
    given = [sample(s, step, grid=grid, heads=3) for s in range(2) for step in (0.1, 0.6)]
    for one in given:
        one.v[:, :, 0] = 1
    plan, report = make(given, grid, density=0.55, block=(32, 16), rule="error", bucket_edges=(0, 0.5, 1))
    kept = keep(plan)
    assert kept[..., always].all() and (kept[:, :, 0, ~always.all(1)].sum(-1) == 2).all()  # text and one block more
    assert (kept[:, :, 1:].sum(-1) > 2).all()
    assert 0.55 * kept.size - 2 < kept.sum() <= 0.55 * kept.size  # no two blocks of random data are equal
    assert report.summary["threshold"] == report.rows[0]["threshold"] > 0
    with pytest.raises(ValueError, match=r'rule "error" needs v in every sample; site 0, step 0\.1 .* has none'):
        make(samples(v=False), rule="error")


def test_text_columns_compete_like_others():
    """Image queries that never look at the text: their budget goes to the image, and the density can be lower."""
    grid, block = TokenGrid((8, 16), text=64), (16, 16)
    given = sample(grid=grid, heads=1)
    given.q[..., 0], given.k[..., 0] = 8, 0
    given.k[:, :64, :, 0] = -20  # text is first in model order
    plan, report = make([given], grid, density=0.42, block=block, text_columns="sparse")
    kept = keep(plan)[0, 0]
    assert kept[8:].all() and not kept[:8, 8:].any() and kept[:8].any(1).all()
    assert report.summary["density_floor"] == (4 * 12 + 8) / 144
    with pytest.raises(ValueError, match=r"at least 0\.5556 here: 80 .*text rows and columns.*text_columns=.sparse"):
        make([given], grid, density=0.42, block=block)
    with pytest.raises(
        ValueError, match=r"at least 0\.3889 here: 56 .*\(text rows, one block a row\).*smaller blocks\.$"
    ):
        make([given], grid, density=0.3, block=block, text_columns="sparse")
    with pytest.raises(ValueError, match="text_columns must be one of 'keep', 'sparse'; got 'drop'"):
        make([given], grid, block=block, text_columns="drop")


def test_the_mask_is_that_of_the_mean_mass():
    """Two prompts, two buckets: mean of block mass in the chosen order, one threshold for all."""
    given = samples(prompts=2)
    plan, _ = make(given, bucket_edges=(0.0, 0.5, 1.0), orders=["HWF"])
    mass = np.zeros((2, 2, 2, 4, 4))
    for one in given:
        mass[int(one.step >= 0.5), one.site] += np.asarray(calibrate.block_mass(one.q, one.k, GRID, "HWF", BLOCK)) / 2
    expected, _ = _choose.mask((mass / 16).astype(np.float32), GRID.always_keep(BLOCK), 0.6)
    np.testing.assert_array_equal(keep(plan), expected)


def test_a_batch_counts_like_samples():
    one, two = sample(seed=1), sample(seed=2)
    both = Sample(0, 0.0, *(np.concatenate(pair) for pair in zip(one[2:], two[2:], strict=True)))
    apart, together = make([one, two], orders=["WFH"])[0], make([both], orders=["WFH"])[0]
    np.testing.assert_array_equal(keep(apart), keep(together))
    np.testing.assert_allclose(apart.k_mean, together.k_mean, rtol=1e-6)


def test_leading_axes_and_buckets():
    given = samples(sites=3, steps=(0.0, 0.3, 0.8), prompts=2)
    one, _ = make(given)
    assert one.lead == (3,) and one.heads == 2 and one.bucket_edges == (0.0, 1.0)
    plan, report = make(given, bucket_edges=(0, 0.3, 1))
    assert plan.lead == (2, 3) and plan.bucket_edges == (0.0, 0.3, 1.0)
    assert (keep(plan)[0] != keep(plan)[1]).any()
    np.testing.assert_array_equal(plan.order[0], plan.order[1])  # an order is for all steps
    np.testing.assert_array_equal(plan.k_mean[0], plan.k_mean[1])
    # Step 0.3 is in the second bucket, as at_step has it.
    np.testing.assert_array_equal(keep(plan.at_step(3, 10)), keep(plan)[1])
    alone, _ = make([s for s in given if s.step >= 0.3], orders=["FHW"], rule="head")
    np.testing.assert_array_equal(
        keep(make(given, bucket_edges=(0, 0.3, 1), orders=["FHW"], rule="head")[0])[1], keep(alone)
    )
    assert [(r["bucket"], r["site"], r["head"]) for r in report.rows] == list(np.ndindex(2, 3, 2))


def test_k_mean_is_over_prompts_steps_and_tokens():
    given = samples(prompts=2)
    plan, _ = make(given)
    for site in range(2):
        expected = np.mean([s.k.mean((0, 1)) for s in given if s.site == site], 0)
        np.testing.assert_allclose(plan.k_mean[site], expected, rtol=1e-5)


def test_a_bucket_with_more_samples_does_not_count_for_more():
    late, early = sample(step=0.8), [sample(step=0.1, seed=i) for i in range(3)]
    plan, report = make([*early, late], bucket_edges=(0, 0.5, 1))
    means = [np.mean([s.k.mean((0, 1)) for s in early], 0), late.k.mean((0, 1))]
    np.testing.assert_allclose(plan.k_mean[0, 0], np.mean(means, 0), rtol=1e-5)
    alone = [make(part)[1].rows for part in (early, [late])]
    for head, row in enumerate(report.rows[:2]):
        expected = np.mean([rows[head]["model_error"] for rows in alone])
        assert row["model_error"] == pytest.approx(expected, rel=1e-9) and row["error"] <= row["model_error"]


def test_a_batch_of_two_widths_is_compared_in_float32():
    """A model with its RoPE in float32 and its values in bfloat16."""
    given = sample()._replace(v=jnp.asarray(sample().v, jnp.bfloat16))
    wide = given._replace(v=np.asarray(given.v, np.float32))
    for one, other_ in zip(*(make([s], objective="error", heldout=[s])[1].rows for s in (given, wide)), strict=True):
        assert one == other_


def test_orders_and_densities_of_a_generator():
    assert_same(make(orders=(name for name in ("WFH", "FHW")))[0], make(orders=["FHW", "WFH"])[0])
    made = calibrate.make_plans(samples(), GRID, densities=iter((0.9, 0.6)), block=BLOCK, progress=False)
    assert_same(made[1][0], make()[0])


def test_the_plan_runs():
    given = sample()
    plan, _ = make([given], density=1.0, quant=QuantSpec(qk="int8", pv="int8"))
    out = paro_jax.attention(*map(jnp.asarray, given[2:]), plan=plan[0])
    dense = jax.nn.dot_product_attention(*map(jnp.asarray, given[2:]))
    assert metrics.relative_l1(dense, out) < 0.03
    assert plan.quant == QuantSpec(qk="int8", pv="int8") and plan.block == BLOCK and plan.grid == GRID


def test_several_densities_are_the_same_as_one_by_one():
    given, held = samples(), samples(prompts=2)
    together = calibrate.make_plans(given, GRID, densities=(0.9, 0.6, 0.5), block=BLOCK, heldout=held, progress=False)
    assert [report.summary["density_asked"] for _, report in together] == [0.9, 0.6, 0.5]
    for (plan, report), density in zip(together, (0.9, 0.6, 0.5), strict=True):
        alone, alone_report = make(given, density=density, heldout=held)
        assert_same(plan, alone)
        assert report.rows == alone_report.rows
    with pytest.raises(ValueError, match=r"densities must be a sequence of at least one density, .*got 0\.5"):
        calibrate.make_plans(given, GRID, densities=0.5)


def test_twice_the_same_bits():
    first, again = (make(objective=objective)[0] for objective in ("mass", "mass"))
    assert_same(first, again)


# The report


def test_held_out_samples():
    given, held = samples(), [*samples(prompts=2)[4:], sample(0, 0.7, seed=9, v=False)]
    plan, report = make(given, heldout=held, bucket_edges=(0, 0.5, 1), quant=QuantSpec(qk="int8", pv="int8"))
    for row in report.rows:
        bucket, site, head = row["bucket"], row["site"], row["head"]
        local = plan[bucket][site]
        mine = [s for s in held if s.site == site and (s.step >= 0.5) == bucket]
        mass = [np.asarray(calibrate.block_mass(s.q, s.k, GRID, local.order_list(), BLOCK)) for s in mine]
        expected = np.mean([metrics.retained_mass(m, local.mask().keep)[head] for m in mass])
        assert row["heldout_mass"] == pytest.approx(expected, rel=1e-5)
        for name, order in (("incoherence", local.order_list()), ("model_incoherence", "FHW")):
            psi = [calibrate.incoherence(s.q, s.k, GRID, order, BLOCK)["block"][head] for s in mine]
            assert row[f"heldout_{name}"] == pytest.approx(np.mean(psi), rel=1e-5)
        outs = []
        for s in mine:
            if s.v is not None:
                dense = jax.nn.dot_product_attention(*map(jnp.asarray, s[2:]))
                outs.append((dense[:, :, head], paro_jax.attention(*map(jnp.asarray, s[2:]), plan=local)[:, :, head]))
        assert row["heldout_l1"] == pytest.approx(np.mean([metrics.relative_l1(a, b) for a, b in outs]), rel=1e-3)
        assert row["heldout_cosine"] == pytest.approx(np.mean([metrics.cosine(a, b) for a, b in outs]), rel=1e-4)
    assert report.summary["heldout_samples"] == 5
    # Held-out samples decide nothing.
    assert_same(plan, make(given, bucket_edges=(0, 0.5, 1), quant=QuantSpec(qk="int8", pv="int8"))[0])


def test_rows_say_what_the_plan_has():
    plan, report = make(bucket_edges=(0, 0.5, 1))
    kept, orders = keep(plan), np.array(plan.order_list())
    for row in report.rows:
        index = row["bucket"], row["site"], row["head"]
        assert row["density"] == kept[index].mean() and row["order"] == orders[index]
        assert 0 < row["retained_mass"] <= 1 and row["heldout_mass"] is None
    assert report.summary["density"] == kept.mean()
    assert report.summary["density_floor"] == 7 / 16


def test_what_matched_nothing_is_named():
    _, report = make(heldout=[sample(1, 0.1, seed=5, v=False)], orders=["FHW", "WHF"], density=1.0)
    assert "order WHF: no head chose it" in report.unmatched
    assert "heldout: no sample for (0, 0) (bucket, site)" in report.unmatched
    _, report = make(heldout=samples(v=False))
    assert "heldout: no sample with v, so no output error for anything" in report.unmatched
    sharp = sample(heads=1)._replace(site=1)
    sharp = sharp._replace(
        q=sharp.q * 0 + np.eye(8)[0] * 50, k=np.where(np.arange(64)[:, None, None] < 4, np.eye(8)[0], 0.0)
    )
    _, report = make([sample(heads=1), sharp._replace(k=np.float32(sharp.k)[None], q=np.float32(sharp.q))])
    assert any(
        "nothing beyond what is always kept, in (bucket, site, head) (0, 1, 0)" in line for line in report.unmatched
    )
    for line in report.unmatched:
        assert line in report.table()


def test_the_table():
    plan, report = make(heldout=samples(), bucket_edges=(0, 0.5, 1))
    text = report.table()
    assert str(report) == text
    header = next(line for line in text.splitlines() if line.startswith("bucket "))
    for name in ("site", "orders", "density", "retained mass", "held-out mass", "held-out l1", "held-out cosine"):
        assert name in header
    lines = text.splitlines()[text.splitlines().index(header) + 1 :][:4]
    assert [line.split()[:2] for line in lines] == [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"]]
    for line, (bucket, site) in zip(lines, np.ndindex(2, 2), strict=True):
        assert f"{keep(plan)[bucket, site].mean():.4g}" in line
    assert re.search(r"^density asked +0\.6$", text, re.M)


def test_the_report_is_saved(tmp_path, monkeypatch):
    import matplotlib.image

    monkeypatch.setattr(calibrate._report, "_DRAWN", 5)  # of 8 heads
    plan, report = make(bucket_edges=(0, 0.5, 1))
    paths = report.save(tmp_path / "new" / "report")
    assert [p.name for p in paths] == ["report.json", "orders.png", "density.png", "blocks.png"]
    assert sorted(os.listdir(tmp_path / "new" / "report")) == sorted(p.name for p in paths)
    value = json.loads(paths[0].read_text())
    assert value == json.loads(report.to_json())
    assert value["rows"] == report.rows and value["summary"]["density"] == keep(plan).mean()
    for path in paths[1:]:
        pixels = matplotlib.image.imread(path)
        assert min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > 0.02
    # Nothing is cut off: no picture has ink on its edge.
    for path in paths[1:]:
        pixels = matplotlib.image.imread(path)[..., :3]
        for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
            assert (edge == 1).all(), path
    # The grid of orders shows the colour of each head's order.
    pixels = matplotlib.image.imread(paths[1])[..., :3]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > len({row["order"] for row in report.rows})


def test_a_report_that_cannot_be_saved_leaves_no_trace(tmp_path, monkeypatch):
    _, report = make()
    (tmp_path / "report.json").mkdir()  # in the way
    with pytest.raises(OSError):
        report.save(tmp_path)
    assert os.listdir(tmp_path) == ["report.json"]
    (tmp_path / "report.json").rmdir()
    (tmp_path / "other").write_text("")
    for path in report.save(tmp_path):
        assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_report_has_no_number_that_json_lacks():
    _, report = make([sample()._replace(v=np.zeros((1, 64, 2, 8), np.float32))], heldout=[sample()])
    report.rows[0]["heldout_l1"] = float("inf")
    assert json.loads(report.to_json())["rows"][0]["heldout_l1"] is None


def test_matplotlib_is_imported_late():
    code = "import sys, calibrate; assert 'matplotlib' not in sys.modules and 'paro_jax.demo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_progress_bar(capsys, monkeypatch):
    make(progress=True)
    assert capsys.readouterr().err == ""  # nobody looks
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    make(progress=True)
    err = capsys.readouterr().err
    for word in ("scoring orders", "block mass", "100%", "left"):
        assert word in err
    make(progress=False)
    assert capsys.readouterr().err == ""


# The bench


def test_the_bench_runs():
    found = bench.one_head(TokenGrid((7, 12, 13), text=9), dim=16)
    assert found["orders"] == 6 and found["tokens"] == 1101 and found["seconds"] > 0
