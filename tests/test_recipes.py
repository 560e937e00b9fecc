"""Recipes: each preset against its method written out in numpy, and what each of its parts promises."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.linalg import hadamard

import calibrate
from calibrate import bench
from pallas_kernels import _fp4, _hadamard, arrange
from pallas_kernels.arrange import xla as arrange_xla
from paro_jax import AttentionPlan, BlockMask, QuantSpec, TokenGrid, attend, attention, metrics, project_in, recipes
from paro_jax import arrange as arrange_for

GRID = TokenGrid((5, 5, 5), text=6)
BLOCK = (64, 32)
HEADS, DIM = 2, 32


def qkv(seed=0, grid=GRID, heads=HEADS, dim=DIM, batch=1, dtype=jnp.float32):
    """q and k with a bias that is common to many tokens, as real ones have; a V of its own mean."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(3, batch, grid.tokens, heads, dim))
    q, k = q + rng.normal(size=dim), 1.5 * k + 3 * rng.normal(size=dim)
    return [jnp.asarray(x, dtype) for x in (q, k, v + 1)]


def sparse_plan(seed=0, grid=GRID, heads=HEADS, block=BLOCK, **settings):
    rng = np.random.default_rng(seed)
    keep = rng.random((heads, *grid.blocks(block))) < 0.7
    keep[:, :, 0] |= ~keep.any(-1)
    order = rng.choice(grid.orders, heads).tolist()
    return AttentionPlan.build(grid, order=order, mask=BlockMask(jnp.asarray(keep), block), **settings)


# --- the methods, one head at a time, q, k, v [N, D] in kernel order ------------------------------------------------


def by_group(x, group, qmax, rounded=np.rint):
    """Rounded and multiplied out again, one scale for the tokens of equal `group`."""
    out = np.zeros_like(x)
    for g in np.unique(group):
        scale = max(np.abs(x[group == g]).max(), 1e-7) / qmax
        out[group == g] = rounded(x[group == g] / scale) * scale
    return out


def e4m3(x):
    return np.clip(x, -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def e2m1(x):
    return np.clip(x, -6, 6).astype(np.float32).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)


def nvfp4(x):
    """Along the last axis, 16 at a time."""
    out = np.zeros_like(x)
    for start in range(0, x.shape[-1], 16):
        part = x[..., start : start + 16]
        scale = e4m3(np.abs(part).max(-1, keepdims=True) / 6)
        out[..., start : start + 16] = e2m1(part / np.where(scale == 0, 1, scale)) * scale
    return out


def token(n):
    return np.arange(n)


def channels(v, qmax, rounded=np.rint):
    return by_group(v.T.copy(), token(v.shape[1]), qmax, rounded).T


def blocks_of(v, block, qmax, rounded=np.rint):
    return np.concatenate([channels(v[i : i + block], qmax, rounded) for i in range(0, len(v), block)])


def less_block_mean(q, block):
    mean = np.concatenate(
        [np.tile(q[i : i + block].mean(0), (len(q[i : i + block]), 1)) for i in range(0, len(q), block)]
    )
    return q - mean, mean


def sage(q, k, v, bq, bk):
    n = token(len(q))
    s = by_group(q, n // bq, 127) @ by_group(k - k.mean(0), n // bk, 127).T
    return s, v, lambda p: p, 1, "any"


def sage_2(q, k, v, bq, bk):
    n, k = token(len(q)), k - k.mean(0)
    q, mean = less_block_mean(q, bq)
    s = by_group(q, n // 32 * 8 + n % 8, 7) @ by_group(k, n // bk * 4 + n % 8 // 2, 7).T + mean @ k.T
    return s, channels(v, 448, e4m3), lambda p: e4m3(448 * p), 448, "running"


def sage_3(q, k, v, bq, bk):
    k = k - k.mean(0)
    q, mean = less_block_mean(q, bq)
    s = nvfp4(q) @ nvfp4(k).T + mean @ k.T
    v = np.concatenate([nvfp4(v[i : i + bk].T.copy()).T for i in range(0, len(v), bk)])

    def two_levels(p):
        first = p.max(-1, keepdims=True) / (448 * 6)
        return nvfp4(p / first) * first

    return s, v, two_levels, 1, "running"


def fa3(q, k, v, bq, bk):
    n, d = token(len(q)), q.shape[1]
    turn = (1 - 2 * np.random.RandomState(0).randint(0, 2, d))[:, None] * hadamard(d) / math.sqrt(d)
    s = by_group(q @ turn, n // bq, 448, e4m3) @ by_group(k @ turn, n // bk, 448, e4m3).T
    return s, blocks_of(v, bk, 448, e4m3), lambda p: e4m3(448 * p), 448, "running"


def naive(qmax, levels):
    def method(q, k, v, bq, bk):
        s = by_group(q, token(len(q)), qmax) @ by_group(k, token(len(k)), qmax).T
        return s, channels(v, qmax), lambda p: np.rint(levels * p), levels, "running"

    return method


def paro(qmax, levels):
    def method(q, k, v, bq, bk):
        n = token(len(q))
        s = by_group(q, n // bq, qmax) @ by_group(k - k.mean(0), n // bk, qmax).T
        return s, blocks_of(v, bk, qmax), lambda p: np.rint(levels * p), levels, "block"

    return method


def smooth_int4(q, k, v, bq, bk):
    n, d, k = token(len(q)), q.shape[1], k - k.mean(0)
    turn = (1 - 2 * np.random.RandomState(0).randint(0, 2, d))[:, None] * hadamard(d) / math.sqrt(d)
    q, mean = less_block_mean(q, bq)
    s = by_group(q @ turn, n, 7) @ by_group(k @ turn, n, 7).T + mean @ k.T
    return s, blocks_of(v, bk, 7), lambda p: np.rint(15 * p), 15, "block"


METHODS = {
    "SageAttention": sage,
    "SageAttention2": sage_2,
    "SageAttention3": sage_3,
    "FA3 FP8": fa3,
    "naive INT8": naive(127, 127),
    "naive INT4": naive(7, 15),
    "PARO INT8": paro(127, 127),
    "PARO INT4": paro(7, 15),
    "smooth INT4": smooth_int4,
}


def by_hand(method, q, k, v, plan):
    """[B, N, heads, D]: a method under a plan, in float64, one query block and one kept key block after the other."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    keep, (bq, bk) = np.asarray(plan.mask().keep), plan.block
    out = np.zeros_like(q)
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        slots = plan.grid.index(plan.order_list()[h])
        s, values, rounded, levels, rule = method(*(x[b, slots, h] for x in (q, k, v)), bq, bk)
        s = s / math.sqrt(q.shape[-1])
        for i in range(keep.shape[1]):
            rows = slice(i * bq, (i + 1) * bq)
            n = len(s[rows])
            top, total, acc = np.full((n, 1), -np.inf), np.zeros((n, 1)), np.zeros((n, q.shape[-1]))
            for j in np.flatnonzero(keep[h, i]):
                keys = slice(j * bk, (j + 1) * bk)
                part = s[rows, keys]
                own = part.max(1, keepdims=True)
                new = np.maximum(top, own)
                relative = own if rule == "block" else new
                p = rounded(np.exp(part - relative)) / levels * np.exp(relative - new)
                fade = np.exp(top - new)
                total, acc, top = total * fade + p.sum(1, keepdims=True), acc * fade + p @ values[keys], new
            out[b, slots[rows], h] = acc / np.where(total == 0, 1, total)
    return out


def assert_same_integers(found, expected, v):
    """The kernels' contract, 2e-3 max |v|, but for a few rows: where a number lies within float32's rounding of a tie
    it may fall the other way, which moves one row by a level."""
    row = np.abs(np.asarray(found) - np.asarray(expected)).max(-1) / float(jnp.abs(v).max())
    assert (row <= 2e-3).mean() >= 0.98 and row.max() <= 0.05, (np.sort(row.ravel())[-6:], row.mean())


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", recipes.ALL)
def test_a_recipe_is_its_method(name, implementation):
    q, k, v = qkv()
    plan = sparse_plan(quant=recipes.ALL[name])
    found = attention(q, k, v, plan=plan, implementation=implementation)
    expected = by_hand(METHODS[name], q, k, v, plan)
    assert_same_integers(found, expected, v)
    exact = attention(q, k, v, plan=plan, quant=QuantSpec())
    assert np.abs(expected - exact).max() > 1e-4  # it does round


@pytest.mark.parametrize("name", ["SageAttention2", "FA3 FP8"])
def test_short_dtypes_and_longer_heads(name):
    """bfloat16 in and out; a head dimension that is no power of two."""
    q, k, v = qkv(dim=48, dtype=jnp.bfloat16)
    plan = sparse_plan(quant=recipes.ALL[name])
    found, reference = (
        np.asarray(attention(q, k, v, plan=plan, implementation=i), np.float32) for i in ("xla", "reference")
    )
    largest = float(jnp.abs(v).max())
    assert np.abs(found - reference).max() <= 2e-2 * largest  # a rounding of the output
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)), plan=plan, quant=QuantSpec())
    assert metrics.relative_l1(exact, found) < 0.25


def test_which_recipe_is_nearer():
    """Measured relative L1 on inputs with common biases; a recipe of more bits must not be worse than one of fewer."""
    q, k, v = qkv()
    plan = sparse_plan()
    exact = attention(q, k, v, plan=plan)
    error = {
        n: float(metrics.relative_l1(exact, attention(q, k, v, plan=plan, quant=r, implementation="xla")))
        for n, r in recipes.ALL.items()
    }
    assert error["SageAttention"] < error["PARO INT8"] < error["PARO INT4"] < error["naive INT4"]
    assert error["smooth INT4"] < error["PARO INT4"]
    assert error["naive INT8"] < error["naive INT4"] / 4 and error["SageAttention2"] < error["naive INT4"]
    assert error["PARO INT8"] < error["FA3 FP8"] and error["SageAttention3"] < error["naive INT4"]


# --- the parts ------------------------------------------------------------------------------------------------------


def test_e2m1_and_e4m3_round_as_their_types_do():
    x = np.concatenate([np.linspace(-7, 7, 2801), [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0]])
    np.testing.assert_array_equal(_fp4.e2m1(jnp.asarray(x, jnp.float32)), e2m1(x))
    grid = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    between = (grid[1:] + grid[:-1]) / 2  # every tie
    x = np.concatenate([grid, between, between * (1 + 1e-5), between * (1 - 1e-5), [449.0, 1e9]])
    np.testing.assert_array_equal(_fp4.e4m3(jnp.asarray(x, jnp.float32)), e4m3(x))


def test_fp4_is_exact_in_bfloat16_and_keeps_nan_and_infinity_visible():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 40, 2, 32)) * 50, jnp.float32)
    for role in "qkv":
        values, scales, _ = arrange(x, None, role=role, width="fp4", group="block" if role == "v" else "row", block=16)
        assert values.dtype == jnp.bfloat16 and scales is None
        same, _, _ = arrange_xla.run(
            x, None, None, None, None, role=role, width="fp4", group="block", block=16, compute_mean=False
        )
        np.testing.assert_array_equal(np.asarray(values, np.float32), np.asarray(same, np.float32))
    expected = nvfp4(np.asarray(x, np.float64).swapaxes(1, 2))
    values, _, _ = arrange(x, None, role="q", width="fp4", group="row", block=16)
    np.testing.assert_array_equal(np.asarray(values, np.float64), expected)
    for poison in (jnp.nan, jnp.inf):
        values, _, _ = arrange(x.at[0, 3, 1, 20].set(poison), None, role="q", width="fp4", group="row", block=16)
        bad = np.zeros((1, 2, 40, 32), bool)
        bad[0, 1, 3, 16:] = True
        np.testing.assert_array_equal(np.isnan(np.asarray(values, np.float32)), bad)


@pytest.mark.parametrize("role", ["q", "k"])
@pytest.mark.parametrize("width", ["bf16", "int8", "fp4"])
def test_both_backends_turn_and_smooth_to_the_same_bits(role, width):
    q, k, _ = qkv(dim=48)
    slots = jnp.asarray([GRID.index("HWF"), GRID.index("WFH")], jnp.int32)
    mean = "block" if role == "q" else jnp.ones((HEADS, 48))
    options = dict(role=role, width=width, group="thread", block=32, rotate=True, mean=mean)
    found, expected = (
        arrange(q if role == "q" else k, slots, implementation=i, **options) for i in ("xla", "reference")
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("dim", [2, 64, 72, 96, 128])
def test_the_rotation_is_orthogonal(dim):
    turn = np.asarray(_hadamard.rotate(jnp.eye(dim)), np.float64)
    np.testing.assert_allclose(turn @ turn.T, np.eye(dim), atol=1e-6)
    assert np.allclose(np.abs(turn[turn != 0]), 1 / math.sqrt(_hadamard.size(dim)))
    np.testing.assert_array_equal(turn, np.asarray(_hadamard.rotate(jnp.eye(dim))))  # the same signs each time


def test_a_rotation_spreads_an_outlier_channel():
    """One channel a hundred times the others: eight bits by block keep nothing of the others unless it is spread."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.normal(size=(1, GRID.tokens, HEADS, DIM)).astype(np.float32) for _ in range(3))
    q[..., 7] *= 100
    k[..., 7] *= 0.01
    plan = sparse_plan()
    exact = attention(q, k, v, plan=plan)
    plain = QuantSpec(qk="int8", q_group="block", smooth_k=False)

    def error(turned):
        quant = dataclasses.replace(plain, qk_rotate=turned)
        return float(metrics.relative_l1(exact, attention(q, k, v, plan=plan, quant=quant)))

    assert error(True) < error(False) / 3


def test_query_means_rescue_int4():
    """A bias common to a block's queries takes all of int4's levels; its scores added back exactly, it takes none."""
    q, k, v = qkv()
    q = q + 20 * jnp.asarray(np.random.default_rng(5).normal(size=(1, 1, 1, DIM)), jnp.float32) / math.sqrt(DIM)
    plan = sparse_plan()
    exact = attention(q, k, v, plan=plan)

    def error(**change):
        quant = dataclasses.replace(recipes.SAGE_2, pv="bf16", **change)
        return float(metrics.relative_l1(exact, attention(q, k, v, plan=plan, quant=quant)))

    assert error() < error(smooth_q=False) / 2


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_large_common_bias_of_v_costs_nothing_when_smoothed(implementation):
    q, k, v = qkv()
    plan = sparse_plan()
    keep = plan.mask().keep.at[0, 1].set(False)  # a row without a block stays zero, whatever the mean
    plan = plan.with_mask(BlockMask(keep, BLOCK))

    def error(bias, smooth):
        quant = QuantSpec(pv="int8", smooth_v=smooth)
        exact = attention(q, k, v + bias, plan=plan, implementation=implementation)
        found = attention(q, k, v + bias, plan=plan, quant=quant, implementation=implementation)
        rows = GRID.index(plan.order_list()[0])[64:128]
        assert (np.asarray(found)[:, rows, 0] == 0).all()
        return np.abs(found - exact).max()

    assert error(100.0, True) < 1.5 * error(0.0, True)
    # V's steps are twenty times as long without; the rounding of P, which both share, is not.
    assert error(100.0, False) > 5 * error(100.0, True)


@pytest.mark.parametrize("name", ["FA3 FP8", "SageAttention3"])
def test_the_residual_is_that_of_what_came_in(name):
    """Smoothed, turned or shifted by a mean: attention's log-sum-exp knows nothing of it, attend's little."""
    q, k, v = qkv()
    plan = sparse_plan(quant=recipes.ALL[name])
    exact = attention(q, k, v, plan=plan, quant=QuantSpec(), return_residual=True)[1]
    found = attention(q, k, v, plan=plan, return_residual=True)[1]
    blocks = [arrange_for(x, plan=plan, role=role) for x, role in ((q, "q"), (k, "k"), (v, "v"))]
    stored = attend(*blocks, plan=plan, return_residual=True)[1]
    assert np.abs(found - exact).max() < 1.0 and np.abs(found - exact).mean() < 0.15
    assert np.abs(stored - found).mean() < 0.4 and np.isfinite(stored).all()


def test_blocks_of_another_recipe_are_refused(says):
    q, k, v = qkv()
    plan = sparse_plan(quant=recipes.FA3_FP8)
    other = dataclasses.replace(plan, quant=dataclasses.replace(recipes.FA3_FP8, qk_rotate=False))
    blocks = [arrange_for(x, plan=other, role=role) for x, role in ((q, "q"), (k, "k"), (v, "v"))]
    with says("q", "qk_rotate False", "expects qk_rotate True"):
        attend(*blocks, plan=plan)
    plan = sparse_plan(quant=recipes.SAGE_2)
    other = dataclasses.replace(plan, quant=dataclasses.replace(recipes.SAGE_2, smooth_q=False))
    blocks = [arrange_for(x, plan=other, role=role) for x, role in ((q, "q"), (k, "k"), (v, "v"))]
    with says("smooth_q False", "expects smooth_q True"):
        attend(*blocks, plan=plan)


@pytest.mark.parametrize(
    ("quant", "shape", "words"),
    [
        (QuantSpec(qk="fp4"), (131, 24), ("multiples of 16", "head_dim 24")),
        (QuantSpec(qk="int8", qk_rotate=True), (131, 15), ("rotate", "odd head_dim")),
        (recipes.SAGE_2, (131, 32), ("multiple of 8 keys", "20")),
        (recipes.SAGE_3, (131, 32), ("multiples of 16", "block 20")),
    ],
)
def test_a_recipe_that_does_not_fit_says_so(says, quant, shape, words):
    block = (64, 20) if words[-1] in ("20", "block 20") else (64, 32)
    x = jnp.zeros((1, shape[0], 1, shape[1]))
    with says(*words):
        attention(x, x, x, plan=AttentionPlan.dense(GRID, heads=1, block=block, quant=quant))


def test_int4_by_block_in_paro_order_beats_naive_int4():
    """Heads that are local along another axis than the last: what the paper's table 1 says of INT4, on planted ones."""
    grid, block = TokenGrid((8, 8, 8)), (64, 64)
    rng = np.random.default_rng(0)
    rates = [(1.5, 0.3, 0.03), (0.03, 0.3, 1.5), (0.3, 1.5, 0.03), (1.5, 0.03, 0.3)]  # of F, H, W: near to far
    heads = [bench.local_head(grid, rate, 64, rng, 9.0) for rate in rates]
    q, k = (np.concatenate(pair, 2) for pair in zip(*heads, strict=True))
    v = rng.normal(size=q.shape).astype(np.float32)
    plan, _ = calibrate.make_plan([calibrate.Sample(0, 0.0, q, k)], grid, density=0.35, block=block, progress=False)
    orders = plan.order_list()[0]
    exact = attention(q, k, v, plan=AttentionPlan.dense(grid, heads=4, block=block))

    def errors(order, quant):
        found = attention(q, k, v, plan=AttentionPlan.dense(grid, heads=4, order=order, block=block, quant=quant))
        return np.array([metrics.relative_l1(exact[:, :, h], found[:, :, h]) for h in range(4)])

    ours, unordered = errors(orders, recipes.PARO_INT4), errors(None, recipes.PARO_INT4)
    theirs = errors(None, recipes.NAIVE_INT4)
    assert (ours < theirs).all() and ours.mean() < 0.8 * theirs.mean()
    assert (ours <= unordered + 1e-6).mean() >= 0.75


# --- mixed widths ---------------------------------------------------------------------------------------------------

NARROW, WIDE = recipes.PARO_INT4, recipes.SAGE


def stacked(lead, **settings):
    rng = np.random.default_rng(1)
    keep = rng.random((*lead, HEADS, *GRID.blocks(BLOCK))) < 0.7
    keep[..., 0] = True
    return AttentionPlan.build(
        GRID,
        order=rng.choice(GRID.orders, (*lead, HEADS)).tolist(),
        mask=BlockMask(jnp.asarray(keep), BLOCK),
        **settings,
    )


def test_chosen_sites_run_wider_under_a_scan_and_choosing_others_compiles_nothing():
    q, k, v = qkv()
    plan = stacked((3,), quant=NARROW)
    traces = []

    @jax.jit
    def layers(x, plan):
        traces.append(1)

        def layer(x, plan):
            return attention(x, k, v, plan=plan), None

        return jax.lax.scan(layer, x, plan)[0]

    for where in ([True, False, False], [False, True, True]):
        expected = q
        for site, wide in enumerate(where):
            expected = attention(expected, k, v, plan=plan[site], quant=WIDE if wide else NARROW)
        found = layers(q, plan.with_wide(WIDE, jnp.asarray(where)))
        assert_same_integers(found, expected, v)
    assert len(traces) == 1
    both = [layers(q, plan.with_wide(WIDE, jnp.asarray(where))) for where in ([True] * 3, [False] * 3)]
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_a_model_that_projects_and_attends_knows_nothing_of_it():
    """Rounding waits for `attend`, so `project_in` and the reorder stay as they are."""
    x = qkv()[0][:, :, 0]
    kernel = jnp.asarray(np.random.default_rng(2).normal(size=(DIM, HEADS, DIM)) / 4, jnp.float32)
    plan = stacked((2,), quant=NARROW)
    for wide in (False, True):
        mixed = plan.with_wide(WIDE, jnp.asarray([wide, not wide]))[0]
        blocks = [project_in(x, kernel, plan=mixed, role=role) for role in ("q", "k", "v")]
        assert {b.width for b in blocks} == {"bf16"}
        found = attend(*blocks, plan=mixed, return_residual=True)
        one = dataclasses.replace(plan[0], quant=WIDE if wide else NARROW)
        blocks = [project_in(x, kernel, plan=one, role=role) for role in ("q", "k", "v")]
        expected = attend(*blocks, plan=one, return_residual=True)
        assert_same_integers(found[0], expected[0], expected[0])
        np.testing.assert_allclose(found[1], expected[1], atol=1e-3)


def test_chosen_steps_run_wider():
    q, k, v = qkv()
    plan = stacked((2, 2), quant=NARROW, bucket_edges=(0.0, 0.5, 1.0))
    mixed = plan.with_wide(WIDE, jnp.asarray([True, False])[:, None])  # the first half of the schedule
    run = jax.jit(lambda step: attention(q, k, v, plan=mixed.at_step(step, 10)[1]))
    for step, quant in ((0, WIDE), (4, WIDE), (5, NARROW), (9, NARROW)):
        expected = attention(q, k, v, plan=plan.at_step(step, 10)[1], quant=quant)
        assert_same_integers(run(jnp.int32(step)), expected, v)
    # An override is an override: of all sites.
    one = mixed.at_step(0, 10)[0]
    exact = attention(q, k, v, plan=one, quant=QuantSpec())
    np.testing.assert_array_equal(exact, attention(q, k, v, plan=plan.at_step(0, 10)[0], quant=QuantSpec()))


@pytest.mark.parametrize("where", [np.ones(2, bool), np.ones((3, 1), bool), np.ones(3)], ids=["2", "3x1", "float"])
def test_a_where_that_does_not_fit_is_refused(says, where):
    with says("where", "[3]", "float32" if where.dtype.kind == "f" else "bool"):
        stacked((3,)).with_wide(WIDE, where)
    with says("quant", "QuantSpec", "'int8'"):
        stacked((3,)).with_wide("int8", np.ones(3, bool))
