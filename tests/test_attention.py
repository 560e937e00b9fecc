"""The verbs: what attention, arrange, project_in and attend compute, and that JAX's transformations go through."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paro_jax
from paro_jax import AttentionPlan, BlockMask, Norm, QuantSpec, Rope, TokenGrid, arrange, attend, attention, project_in

GRID = TokenGrid((3, 5, 7), text=16, bricks=((2, 2, 2),))
BLOCK = (64, 32)
HEADS = 3
INT8 = QuantSpec(qk="int8", pv="int8")


def tokens(rng, *shape: int, dtype=np.float32) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), dtype)


def qkv(rng, grid=GRID, batch=2, heads=HEADS, head_dim=32, dtype=np.float32) -> list[jax.Array]:
    return [tokens(rng, batch, grid.tokens, heads, head_dim, dtype=dtype) for _ in range(3)]


def random_plan(rng, density=0.6, grid=GRID, block=BLOCK, heads=HEADS, lead=(), **settings) -> AttentionPlan:
    keep = rng.random((*lead, heads, *grid.blocks(block))) < density
    order = rng.choice(grid.orders, (*lead, heads)).tolist()
    return AttentionPlan.build(grid, order=order, mask=BlockMask(keep, block), **settings)


def element_mask(plan: AttentionPlan) -> np.ndarray:
    """bool [1, heads, N, N] in model order: which (query, key) pairs the plan keeps."""
    keep, n = np.asarray(plan.mask().keep), plan.grid.tokens
    by_slot = keep.repeat(plan.block[0], axis=1)[:, :n].repeat(plan.block[1], axis=2)[:, :, :n]
    inverse = [plan.grid.inverse(name) for name in plan.order_list()]
    return np.stack([one[inv][:, inv] for one, inv in zip(by_slot, inverse, strict=True)])[None]


_dense = jax.jit(partial(jax.nn.dot_product_attention, return_residual=True), static_argnames="scale")


def oracle(q, k, v, plan, scale=None):
    """Dense attention under the plan's element mask; 0 and -inf where a query keeps nothing."""
    mask = element_mask(plan)
    o, lse = _dense(q, k, v, mask=mask, scale=scale)
    alive = mask.any(-1).transpose(0, 2, 1)
    return np.where(alive[..., None], o, 0), np.where(alive, lse, -np.inf)


# --- without a plan -------------------------------------------------------------------------------------------------


def test_without_a_plan_it_is_jax_nn(rng):
    q, k, v = qkv(rng)
    bias = tokens(rng, 1, HEADS, GRID.tokens, GRID.tokens)
    mask = rng.random((2, 1, GRID.tokens, GRID.tokens)) < 0.5
    for arguments in (
        {},
        dict(bias=bias),
        dict(mask=mask),
        dict(bias=bias, mask=mask, scale=0.3, implementation="xla"),
    ):
        expected = jax.nn.dot_product_attention(q, k, v, **arguments)
        np.testing.assert_array_equal(attention(q, k, v, **arguments), expected)
        o, lse = attention(q, k, v, **arguments, return_residual=True)
        np.testing.assert_array_equal(o, expected)
        assert lse.dtype == jnp.float32
    np.testing.assert_array_equal(attention(q, k, v, bias, mask), jax.nn.dot_product_attention(q, k, v, bias, mask))
    unbatched, grouped = attention(q[0], k[0], v[0]), attention(q, k[:, :, :1], v[:, :, :1])
    np.testing.assert_array_equal(unbatched, jax.nn.dot_product_attention(q[0], k[0], v[0]))
    np.testing.assert_array_equal(grouped, jax.nn.dot_product_attention(q, k[:, :, :1], v[:, :, :1]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_without_a_plan_the_residual_is_float32_for_any_input(rng, dtype):
    q, k, v = qkv(rng, dtype=dtype)
    o, lse = attention(q, k, v, return_residual=True)
    np.testing.assert_array_equal(o, jax.nn.dot_product_attention(q, k, v))
    exact = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)), return_residual=True)[1]
    assert o.dtype == dtype and lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, exact, atol=1e-5)


# --- with a plan ----------------------------------------------------------------------------------------------------

MASKED = (
    (GRID, BLOCK, 32, None),
    (TokenGrid((4, 50), text=9, text_position="last"), (32, 64), 64, None),
    (TokenGrid((65,)), (64, 64), 32, 0.1),
    (TokenGrid((6, 5, 9), bricks=((2, 5, 3),)), (64, 64), 128, None),
)


@settings(max_examples=60)
@given(st.sampled_from(MASKED), st.sampled_from((0.0, 0.15, 0.5, 0.9)), st.integers(0, 2**32 - 1))
def test_skipped_blocks_leave_the_softmax(problem, density, seed):
    """Any mask, any order per head: dense attention with the same element mask, renormalised over what is kept."""
    grid, block, head_dim, scale = problem
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, density, grid, block)
    q, k, v = qkv(rng, grid, head_dim=head_dim)
    o, lse = attention(q, k, v, plan=plan, scale=scale, return_residual=True)
    o_expected, lse_expected = oracle(q, k, v, plan, scale)
    np.testing.assert_allclose(o, o_expected, atol=1e-5)
    np.testing.assert_allclose(lse, lse_expected, atol=1e-5)


def test_a_query_that_keeps_nothing_gets_zero_and_minus_infinity(rng):
    plan = random_plan(rng, density=0.0)
    o, lse = attention(*qkv(rng), plan=plan, return_residual=True)
    assert (np.asarray(o) == 0).all() and (np.asarray(lse) == -np.inf).all()


# The row sum is that of P as it is multiplied, so the log-sum-exp is off by half a unit of P's last place at most.
@pytest.mark.parametrize("dtype, atol, lse_atol", [(jnp.bfloat16, 2e-2, 2**-9), (jnp.float16, 3e-3, 2**-12)])
def test_half_precision_in_and_out_with_a_float32_residual(rng, dtype, atol, lse_atol):
    plan = random_plan(rng)
    q, k, v = qkv(rng, dtype=dtype)
    o, lse = attention(q, k, v, plan=plan, return_residual=True)
    o_expected, lse_expected = oracle(*(x.astype(jnp.float32) for x in (q, k, v)), plan)
    assert o.dtype == dtype and lse.dtype == jnp.float32
    np.testing.assert_allclose(o.astype(jnp.float32), o_expected, atol=atol)
    np.testing.assert_allclose(lse, lse_expected, atol=lse_atol)


def test_reference_and_xla_agree(rng):
    plan, x = random_plan(rng), qkv(rng)
    by_name = [attention(*x, plan=plan, implementation=name, return_residual=True) for name in ("xla", "reference")]
    for a, b in zip(*by_name, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_skipped_keys_and_values_cannot_reach_the_output(rng):
    """NaN in every key block that all queries skip: the output does not change by a bit."""
    q, k, v = qkv(rng)
    keep = rng.random((HEADS, *GRID.blocks(BLOCK))) < 0.7
    keep[:, :, 1] = False
    orders = ["WFH", "FHW", "brick2x2x2"]
    plan = AttentionPlan.build(GRID, order=orders, mask=BlockMask(keep, BLOCK))
    clean = attention(q, k, v, plan=plan)
    for head, name in enumerate(orders):
        skipped = GRID.index(name)[BLOCK[1] : 2 * BLOCK[1]]
        k, v = (x.at[:, skipped, head].set(jnp.nan) for x in (k, v))
    np.testing.assert_array_equal(attention(q, k, v, plan=plan), clean)


def test_two_runs_are_equal_to_the_bit(rng):
    plan, x = random_plan(rng, quant=INT8), qkv(rng)
    np.testing.assert_array_equal(attention(*x, plan=plan), attention(*x, plan=plan))


def test_each_head_and_batch_entry_stands_alone(rng):
    """A head's result does not depend on the other heads of the plan, nor a batch entry's on its neighbours."""
    q, k, v = qkv(rng)
    plan, other = random_plan(rng), random_plan(rng)
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[:1], b[1:]]), plan, other)
    a, b, c = (attention(q, k, v, plan=p) for p in (plan, other, mixed))
    np.testing.assert_allclose(c[:, :, :1], a[:, :, :1], atol=1e-6)
    np.testing.assert_allclose(c[:, :, 1:], b[:, :, 1:], atol=1e-6)
    alone = attention(q[1:], k[1:], v[1:], plan=plan)
    np.testing.assert_allclose(alone, a[1:], atol=1e-6)


# --- quantised ------------------------------------------------------------------------------------------------------

# Largest |o - dense| for standard normal q, k, v at D = 32, with head room of a third. A new width pins its own.
PINNED = {
    ("int8", "int8"): 0.034,
    ("int8", "bf16"): 0.03,
    ("bf16", "int8"): 0.026,
    ("fp8", "fp8"): 0.1,
    ("int4", "int4"): 0.5,
}


@pytest.mark.parametrize("qk, pv", PINNED)
def test_a_width_has_its_pinned_error_and_the_reference_agrees(rng, qk, pv):
    q, k, v = qkv(rng)
    plan = random_plan(rng, quant=QuantSpec(qk=qk, pv=pv))
    expected = oracle(q, k, v, plan)[0]
    found = attention(q, k, v, plan=plan)
    error = np.abs(found - expected).max()
    assert 0 < error <= PINNED[qk, pv]
    reference = attention(q, k, v, plan=plan, implementation="reference")
    assert np.abs(found - reference).max() <= 2e-3 * np.abs(v).max()


def test_quant_overrides_the_plans(rng):
    x = qkv(rng)
    plan = random_plan(rng)
    override = attention(*x, plan=plan, quant=INT8)
    as_planned = attention(*x, plan=jax.tree.unflatten(_treedef_with(plan, INT8), jax.tree.leaves(plan)))
    np.testing.assert_array_equal(override, as_planned)
    assert np.abs(override - attention(*x, plan=plan)).max() > 0


def _treedef_with(plan, quant):
    other = AttentionPlan.build(plan.grid, order=plan.order_list(), mask=plan.mask(), quant=quant)
    return jax.tree.structure(other)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_common_bias_of_k_costs_nothing_and_the_residual_is_that_of_the_original_k(rng, calibrated):
    q, k, v = qkv(rng, batch=1)
    common = tokens(rng, 1, 1, HEADS, 32)
    errors = {}
    for size in (0.0, 20.0):
        biased = k + size * common
        k_mean = biased.mean((0, 1)) + 0.01 if calibrated else None
        plan = AttentionPlan.dense(GRID, heads=HEADS, order="WHF", block=BLOCK, quant=INT8)
        plan = AttentionPlan.build(GRID, order="WHF", mask=plan.mask(), quant=INT8, k_mean=k_mean)
        o, lse = attention(q, biased, v, plan=plan, return_residual=True)
        o_expected, lse_expected = _dense(q, biased, v)
        errors[size] = np.abs(o - o_expected).max(), np.abs(lse - lse_expected).max()
    assert 0 < errors[0.0][0] < 0.034 and errors[20.0][0] <= 1.5 * errors[0.0][0]
    assert errors[20.0][1] <= 0.02
    rough = attention(q, k + 20.0 * common, v, plan=plan, quant=QuantSpec(qk="int8", pv="int8", smooth_k=False))
    assert np.abs(rough - o_expected).max() > 3 * errors[20.0][0]


# --- arrange, project_in, attend ------------------------------------------------------------------------------------


def rms(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotate(x, cos, sin):
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = cos[None, :, None], sin[None, :, None]
    return np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)


def test_arrange_norms_rotates_and_reorders(rng):
    plan = random_plan(rng)
    x, scale, angle = (np.asarray(tokens(rng, *s)) for s in ((2, GRID.tokens, HEADS, 32), (32,), (GRID.tokens, 16)))
    rope = Rope(jnp.cos(angle), jnp.sin(angle))
    blocks = arrange(x, plan=plan, role="q", norm=Norm("rms", jnp.asarray(scale), None, 1e-6), rope=rope)
    expected = rotate(rms(x, scale, 1e-6), np.cos(angle), np.sin(angle))
    for head, name in enumerate(plan.order_list()):
        np.testing.assert_allclose(blocks.values[:, head], expected[:, GRID.index(name), head], atol=1e-5)
    assert blocks.scales is None and blocks.mean is None and blocks.dtype == "float32"
    facts = (blocks.role, blocks.width, blocks.grid, blocks.block, blocks.layout)
    assert facts == ("q", "bf16", GRID, BLOCK, "rows")


@pytest.mark.parametrize(
    "quant", [QuantSpec(), INT8, QuantSpec("int8", "int8", q_group="block", k_group="row")], ids=str
)
def test_attention_is_three_arranges_and_attend(rng, quant):
    q, k, v = qkv(rng)
    plan = random_plan(rng, quant=quant)
    blocks = [arrange(x, plan=plan, role=role) for role, x in (("q", q), ("k", k), ("v", v))]
    expected = attention(q, k, v, plan=plan, return_residual=True)
    o, lse = attend(*blocks, plan=plan, return_residual=True)
    np.testing.assert_allclose(o, expected[0], atol=1e-6)
    # attend only has q as it is stored; the K mean it adds back is that much less exact.
    np.testing.assert_allclose(lse, expected[1], atol=2e-2 if quant.smooths_k else 1e-6)
    assert (blocks[1].mean is not None) == quant.smooths_k


@pytest.mark.parametrize("quant", [QuantSpec(), INT8], ids=str)
def test_project_in_is_the_projection_then_arrange(rng, quant):
    plan = random_plan(rng, quant=quant)
    x, kernel, bias = tokens(rng, 2, GRID.tokens, 24), tokens(rng, 24, HEADS, 32), tokens(rng, HEADS, 32)
    angle = tokens(rng, GRID.tokens, 16)
    extras = dict(norm=Norm("layer", tokens(rng, 32), tokens(rng, 32), 1e-6), rope=Rope(jnp.cos(angle), jnp.sin(angle)))
    for role in ("q", "k", "v"):
        fused = project_in(x, kernel, bias, plan=plan, role=role, **extras)
        steps = arrange(jnp.einsum("bnc,chd->bnhd", x, kernel) + bias[None, None], plan=plan, role=role, **extras)
        assert jax.tree.structure(fused) == jax.tree.structure(steps)
        values = [b.values.astype(jnp.float32) for b in (fused, steps)]
        assert np.abs(values[0] - values[1]).max() <= (1 if quant.quantised else 1e-5)  # one step of rounding
    unbiased = project_in(x, kernel, plan=plan, role="v")
    expected = arrange(jnp.einsum("bnc,chd->bnhd", x, kernel), plan=plan, role="v")
    assert np.abs(unbiased.values.astype(jnp.float32) - expected.values.astype(jnp.float32)).max() <= 1


def test_project_in_promotes_as_flax_does(rng):
    plan = random_plan(rng)
    x, kernel = tokens(rng, 1, GRID.tokens, 8, dtype=jnp.bfloat16), tokens(rng, 8, HEADS, 32)
    assert project_in(x, kernel, plan=plan, role="q").dtype == "float32"
    assert project_in(x, kernel.astype(jnp.bfloat16), plan=plan, role="q").values.dtype == jnp.bfloat16


# --- transformations ------------------------------------------------------------------------------------------------


def test_other_plans_of_one_shape_do_not_recompile(rng):
    traces = []

    @jax.jit
    def f(q, k, v, plan):
        traces.append(1)
        return attention(q, k, v, plan=plan)

    x = qkv(rng)
    for density in (0.2, 0.9):
        plan = random_plan(rng, density)
        np.testing.assert_allclose(f(*x, plan), oracle(*x, plan)[0], atol=1e-5)
    assert traces == [1]


def test_gradients_are_those_of_dense_attention_with_the_same_element_mask(rng):
    plan = random_plan(rng, density=0.7)
    q, k, v = qkv(rng)
    weights = tokens(rng, *q.shape)
    lse_weights = tokens(rng, *q.shape[:3])
    mask = element_mask(plan)
    assert mask.any(-1).all()

    def planned(q, k, v):
        return attention(q, k, v, plan=plan, return_residual=True)

    def masked(q, k, v):  # by hand: jax.nn's log-sum-exp carries no gradient that fits
        scores = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(32), -jnp.inf)
        o = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return o, jax.nn.logsumexp(scores, axis=-1).transpose(0, 2, 1)

    def gradient(f):
        def loss(q, k, v):
            o, lse = f(q, k, v)
            return jnp.sum(o * weights) + jnp.sum(lse * lse_weights)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for a, b, c in zip(*map(gradient, (planned, masked, jax.checkpoint(planned))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(a, c, atol=1e-6)


def test_a_query_that_keeps_nothing_has_a_zero_gradient(rng):
    keep = rng.random((HEADS, *GRID.blocks(BLOCK))) < 0.7
    keep[1, 0] = False
    plan = AttentionPlan.build(GRID, order="WFH", mask=BlockMask(keep, BLOCK))
    q, k, v = qkv(rng)
    gradients = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v, plan=plan).sum(), argnums=(0, 1, 2)))(q, k, v)
    assert all(np.isfinite(g).all() for g in gradients)
    dead = GRID.index("WFH")[: BLOCK[0]]
    assert (np.asarray(gradients[0])[:, dead, 1] == 0).all() and (np.asarray(gradients[0])[:, :, 0] != 0).any()


def test_a_quantised_width_has_no_gradient_and_says_so(rng, says):
    plan, x = random_plan(rng, quant=INT8), qkv(rng)
    with says("gradient", "unquantised", "QuantSpec()"):
        jax.grad(lambda q: attention(q, *x[1:], plan=plan).sum())(x[0])
    with says("gradient", "unquantised", "QuantSpec()"):
        jax.grad(lambda v: attend(*_blocks(*x[:2], v, plan), plan=plan).sum())(x[2])


def _blocks(q, k, v, plan):
    return [arrange(x, plan=plan, role=role) for role, x in (("q", q), ("k", k), ("v", v))]


def test_vmap_over_plans_and_over_tokens(rng):
    plan = random_plan(rng, lead=(2,))
    x = [jnp.stack(pair) for pair in zip(qkv(rng), qkv(rng), strict=True)]
    both = jax.vmap(lambda q, k, v, p: attention(q, k, v, plan=p))(*x, plan)
    plans_only = jax.vmap(lambda p: attention(*(a[0] for a in x), plan=p))(plan)
    for i, one in enumerate(plan):
        np.testing.assert_allclose(both[i], attention(*(a[i] for a in x), plan=one), atol=1e-6)
        np.testing.assert_allclose(plans_only[i], attention(*(a[0] for a in x), plan=one), atol=1e-6)


def test_a_step_and_a_site_inside_jit(rng):
    """A sampler's loop over steps with a scan over layers inside: bucket and site are traced."""
    plan = random_plan(rng, lead=(2, 3), bucket_edges=(0.0, 0.5, 1.0))
    q, k, v = qkv(rng, batch=1)

    @jax.jit
    def sample(x, plan):
        def step(i, x):
            return jax.lax.scan(lambda x, one: (attention(x, k, v, plan=one), None), x, plan.at_step(i, 3))[0]

        return jax.lax.fori_loop(0, 3, step, x)

    expected = q
    for bucket in (0, 0, 1):
        for one in plan[bucket]:
            expected = attention(expected, k, v, plan=one)
    np.testing.assert_allclose(sample(q, plan), expected, atol=1e-5)


def test_an_exported_function_takes_the_plan_as_an_argument(rng):
    plan, x = random_plan(rng, first=np.full((HEADS, *GRID.blocks(BLOCK)[:1], 1), 3)), qkv(rng)
    exported = jax.export.export(jax.jit(lambda q, k, v, p: attention(q, k, v, plan=p)))(*x, plan)
    other = random_plan(rng, density=0.3, first=np.ones((HEADS, *GRID.blocks(BLOCK)[:1], 1), int))
    np.testing.assert_allclose(exported.call(*x, other), attention(*x, plan=other), atol=1e-6)


@pytest.mark.parametrize("quant", [QuantSpec(), INT8, QuantSpec("int8", "int8", p_scale="running")], ids=str)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_what_is_first_changes_no_result(rng, implementation, quant):
    """121 tokens in blocks of 32: the last has 25, and is first where it is kept. One row keeps nothing."""
    plan, x = random_plan(rng, quant=quant), qkv(rng)
    keep = np.asarray(plan.mask().keep).copy()
    keep[0, 0] = False
    plan = plan.with_mask(BlockMask(keep, BLOCK))
    last = np.full((*keep.shape[:2], 3), keep.shape[-1] - 1)
    last[..., 1] = rng.integers(0, keep.shape[-1], keep.shape[:2])  # and the last again
    ahead = replace(plan, first=jnp.asarray(last, jnp.uint16))
    moved = (np.asarray(ahead.schedule()[1]) != np.asarray(plan.schedule()[1])).any()
    assert moved == (quant.p_scale == "block")
    options = dict(implementation=implementation, return_residual=True)
    for a, b in zip(attention(*x, plan=ahead, **options), attention(*x, plan=plan, **options), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_numpy_inputs_and_the_default_scale(rng):
    plan = random_plan(rng)
    q, k, v = map(np.asarray, qkv(rng))
    o = attention(q, k, v, plan=plan)
    assert isinstance(o, jax.Array)
    np.testing.assert_array_equal(o, attention(q, k, v, plan=plan, scale=1 / np.sqrt(32)))
    assert paro_jax.TokenBlocks is type(arrange(q, plan=plan, role="q"))
