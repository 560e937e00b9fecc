"""block_attention: the oracle against numpy, XLA against the oracle, and each promise of the docstring once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from problems import (
    AXES,
    MASKS,
    ROUNDING,
    WIDTHS,
    Problem,
    assert_close,
    assert_covered,
    covering,
    covering_rows,
    dense_softmax,
    emulated,
    keep_blocks,
    problem_of,
    problems,
    schedule,
)

from pallas_kernels import arrange, block_attention
from pallas_kernels.block_attention import BACKENDS
from pallas_kernels.workloads import WORKLOADS

# Those that run anywhere; test_hopper.py has the rest.
IMPLEMENTATIONS = [b.name for b in BACKENDS if b.why_not(WORKLOADS["tiny_video"]) is None]
GROUPS = [("row", "block", "channel"), ("block", "row", "block")]  # of q, k, v
few = settings(max_examples=6, deadline=None, derandomize=True)


def check_exact(problem: Problem, implementation: str) -> None:
    o, lse = problem.solve(implementation)
    expected_o, expected_lse = problem.exact()
    assert o.dtype == problem.dtype and lse.dtype == jnp.float32
    largest = float(np.abs(np.asarray(problem.qkv[2], np.float32)).max())
    assert_close(o, expected_o, ROUNDING[problem.dtype] * largest)
    assert_close(lse, expected_lse, 2e-5 if problem.dtype == "float32" else ROUNDING[problem.dtype])


def check_same(problem: Problem) -> None:
    """XLA against the reference. The same integers leave float32's own rounding, far below the contract's 2e-3."""
    largest = float(np.abs(np.asarray(problem.qkv[2], np.float32)).max())
    for found, expected in zip(problem.solve("xla"), problem.solve("reference"), strict=True):
        assert_close(found, expected, max(1e-5, ROUNDING[problem.dtype]) * largest)


# ---- right numbers --------------------------------------------------------------------------------------------------


@given(problems(dtypes=("float32", "bfloat16", "float16")))
@few
def test_reference_is_the_textbook(problem):
    check_exact(problem, "reference")


@given(problems())
@few
def test_xla_is_the_textbook(problem):
    check_exact(problem, "xla")


@given(problems(widths=WIDTHS))
@few
def test_xla_is_the_reference(problem):
    check_same(problem)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_planted_masks(implementation, mask):
    check_exact(Problem(q_tokens=450, kv_tokens=450, heads=3, mask=mask), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_long_skip_run(implementation):
    keep = np.zeros((2, 2, 12), bool)
    keep[:, :, [0, 11]] = True
    keep[1, 1] = np.arange(12) == 7
    problem = Problem(q_tokens=128, kv_tokens=12 * 64 - 5)
    vars(problem)["keep"] = keep
    check_exact(problem, implementation)


@pytest.mark.parametrize(("groups", "p_scale"), [(GROUPS[0], "block"), (GROUPS[1], "running")])
@pytest.mark.parametrize("width", ["int8", "int4"])
def test_reference_multiplies_real_integers(width, groups, p_scale):
    q_group, k_group, v_group = groups
    problem = Problem(
        q_tokens=130, kv_tokens=200, mask="empty rows", qk=width, pv=width, p_scale=p_scale,
        q_group=q_group, k_group=k_group, v_group=v_group,
    )  # fmt: skip
    largest = float(jnp.abs(problem.qkv[2]).max())
    assert_close(problem.solve("reference")[0], problem.to_model(emulated(problem)[0]), 2e-3 * largest)


def test_the_rows_below_pair_everything_with_everything():
    rows = covering(**AXES)
    assert_covered(rows, AXES)
    with pytest.raises(AssertionError):
        assert_covered(rows[1:], AXES)


@pytest.mark.parametrize("row", covering_rows())
def test_reference_is_its_arithmetic_at_any_widths(row):
    """Against float64 and numpy: each pair of widths, head_dim, lengths, block, mask, groups and rule beside each."""
    problem = problem_of(**row)
    largest = float(np.abs(np.asarray(problem.qkv[2], np.float32)).max())
    bounds = (max(ROUNDING[problem.dtype], 1e-5) * largest, 1e-5 if problem.dtype == "float32" else 2.0**-8)
    expected = (problem.to_model(x) for x in emulated(problem))
    for found, exact, bound in zip(problem.solve("reference"), expected, bounds, strict=True):
        assert_close(found, exact, bound)


@pytest.mark.parametrize(
    ("widths", "groups", "p_scale"),
    [
        (widths, groups, p_scale)
        for widths in WIDTHS
        for groups, p_scale in ((GROUPS[0], "block"), (GROUPS[1], "block"), (GROUPS[0], "running"))
        # Without a rounded P the rule says nothing, without a rounded value the groups do not.
        if (p_scale == "block" or widths[1] != "bf16") and (groups == GROUPS[0] or widths != ("bf16", "bf16"))
    ],
)
def test_xla_is_the_reference_at_every_width(widths, groups, p_scale):
    q_group, k_group, v_group = groups
    check_same(
        Problem(
            q_tokens=330,
            kv_tokens=330,
            mask="ragged",
            qk=widths[0],
            pv=widths[1],
            p_scale=p_scale,
            q_group=q_group,
            k_group=k_group,
            v_group=v_group,
        )  # fmt: skip
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("widths", [("bf16", "bf16"), ("int8", "bf16"), ("bf16", "int8")])
def test_xla_is_the_reference_at_short_dtypes(widths, dtype):
    check_same(Problem(dtype=dtype, qk=widths[0], pv=widths[1], mask="empty rows"))


# Pinned: measured error / max |v| of the quantised output, doubled. A lower width must not pass for a higher one.
@pytest.mark.parametrize(
    ("widths", "bound"), [(("int8", "int8"), 0.02), (("fp8", "fp8"), 0.06), (("int4", "int4"), 0.3)]
)
def test_quantised_output_is_near_the_exact_one(widths, bound):
    problem = Problem(q_tokens=330, kv_tokens=330, mask="random", qk=widths[0], pv=widths[1])
    error = np.abs(np.asarray(problem.solve("xla")[0]) - problem.exact()[0]).max()
    assert bound / 20 < error / float(jnp.abs(problem.qkv[2]).max()) < bound


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_ones_is_dense_attention(implementation):
    problem = Problem(batch=2, mask="ones", permuted=False)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in problem.qkv)
    assert_close(problem.solve(implementation)[0], jax.nn.dot_product_attention(q, k, v), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_without_a_block_give_zero_and_minus_infinity(implementation):
    problem = Problem(mask="empty rows", permuted=False)
    o, lse = problem.solve(implementation)
    rows = np.s_[0, :64, 0]  # head 0, first query block
    assert (np.asarray(o)[rows] == 0).all() and np.isneginf(np.asarray(lse)[rows]).all()
    nothing = np.zeros_like(problem.keep)
    count, index = schedule(nothing)
    o, lse = problem.solve(implementation, count=count, index=index)
    assert (np.asarray(o) == 0).all() and np.isneginf(np.asarray(lse)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("widths", [("bf16", "bf16"), ("int8", "int8")])
def test_two_halves_merge_into_the_whole(widths, implementation):
    # P's rounding is the same in a half as in the whole only when it is relative to the block.
    problem = Problem(q_tokens=330, kv_tokens=330, mask="ones", qk=widths[0], pv=widths[1])
    left = keep_blocks("random", *problem.keep.shape, seed=3)
    whole, whole_lse = problem.solve(implementation)
    parts = []
    for keep in (left, ~left):
        count, index = schedule(keep)
        parts.append(problem.solve(implementation, count=count, index=index))
    weights = [jnp.exp(lse - whole_lse)[..., None] for _, lse in parts]
    assert_close(sum(w * o for w, (o, _) in zip(weights, parts, strict=True)), whole, 2e-5)
    assert_close(jnp.logaddexp(parts[0][1], parts[1][1]), whole_lse, 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_skipped_blocks_do_not_reach_the_output(poison, implementation):
    problem = Problem(q_tokens=450, kv_tokens=450, mask="random")
    keep = problem.keep.copy()
    keep[:, :, [0, 3]] = False
    keep[:, :, 5] |= ~keep.any(axis=-1)
    count, index = schedule(keep)
    clean = problem.solve(implementation, count=count, index=index)
    skipped = np.isin(np.arange(450) // 64, [0, 3])[None, None, :, None]
    q, k, v = problem.qkv
    dirty = problem.solve(
        implementation, count=count, index=index, k=jnp.where(skipped, poison, k), v=jnp.where(skipped, poison, v)
    )
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nan_in_a_kept_block_is_not_hidden():
    problem = Problem(mask="ones")
    v = problem.qkv[2].at[:, :, 70].set(jnp.nan)
    for implementation in IMPLEMENTATIONS:
        assert np.isnan(problem.solve(implementation, v=v)[0]).all()
        q = problem.qkv[0].at[:, :, 70].set(jnp.nan)
        o, lse = problem.solve(implementation, q=q, slots=None)
        for result in (np.isnan(o).all(axis=-1), np.isnan(lse)):
            np.testing.assert_array_equal(result, np.arange(200)[None, :, None].repeat(2, 2) == 70)


# ---- the hazards of quantisation ------------------------------------------------------------------------------------


def test_small_tail_survives_under_the_block_rule():
    """One key at p = 1, 17549 at 0.0039 that own 98.6 % of the row: below 1/254, so a static scale drops them."""
    tokens, dim = 17550, 32
    q = jnp.zeros((1, 1, 1, dim)).at[..., 0].set(1.0)
    k = jnp.zeros((1, 1, tokens, dim)).at[..., 0].set(math.log(0.0039)).at[:, :, 0, 0].set(0.0)
    v = jnp.ones((1, 1, tokens, dim)).at[:, :, 0].set(-1.0)
    stored = {}
    for x, role, group in ((q, "q", "row"), (k, "k", "block"), (v, "v", "channel")):
        values, scales, _ = arrange(jnp.swapaxes(x, 1, 2), None, role=role, width="int8", group=group, block=64)
        stored |= {role: values, f"{role}_scale": scales}
    count, index = schedule(np.ones((1, 1, -(-tokens // 64)), bool))
    exact = float(dense_softmax(q, k, v, np.bool_(True), 1.0)[0].mean())
    assert exact == pytest.approx(0.971, abs=2e-3)
    errors = {}
    for p_scale in ("block", "running"):
        for implementation in IMPLEMENTATIONS:
            o = block_attention(
                **stored, count=count, index=index, block=(64, 64), scale=1.0, qk="int8", pv="int8", p_scale=p_scale,
                implementation=implementation,
            )  # fmt: skip
            errors[p_scale, implementation] = abs(float(o.mean()) - exact)
    for implementation in IMPLEMENTATIONS:
        assert errors["block", implementation] < 0.02
        assert errors["running", implementation] > 1.5  # the tail is gone: the row is its first key, -1


def test_zero_channel_of_v_is_zero():
    problem = Problem(qk="int8", pv="int8", mask="ones")
    v = jnp.swapaxes(problem.qkv[2], 1, 2).at[..., 3].set(0.0)
    for implementation in IMPLEMENTATIONS:
        values, scales, _ = arrange(v, None, role="v", width="int8", group="channel", block=64)
        o, _ = problem.solve(implementation, v=values, v_scale=scales)
        assert (np.asarray(o)[..., 3] == 0).all() and np.isfinite(o).all()


def test_a_large_common_bias_in_k_costs_nothing_when_smoothed():
    problem = Problem(q_tokens=330, kv_tokens=330, mask="random", qk="int8", pv="bf16", permuted=False)
    exact = problem.exact()[0]
    bias = 50.0 * np.random.default_rng(9).normal(size=(1, 1, problem.heads, problem.head_dim))

    def error(bias, mean):
        k = jnp.swapaxes(problem.qkv[1], 1, 2) + jnp.asarray(bias, jnp.float32)
        values, scales, _ = arrange(k, None, role="k", width="int8", group="block", block=64, mean=mean)
        return float(np.abs(np.asarray(problem.solve("xla", k=values, k_scale=scales)[0]) - exact).max())

    assert error(bias, "compute") < 1.1 * error(0 * bias, "compute")
    assert error(bias, None) > 5 * error(bias, "compute")  # what smoothing is for


# ---- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_head_returns_to_model_order_by_its_own_slots(implementation):
    """v names its slot; every query attends to one key block only, so the answer says where it was stored."""
    heads, tokens, dim = 3, 130, 32
    slots = jnp.asarray([np.random.default_rng(h).permutation(tokens) for h in range(heads)], jnp.int32)
    q = k = jnp.zeros((1, heads, tokens, dim))
    names = 10.0 * np.arange(heads)[:, None] + np.arange(tokens) // 64
    v = jnp.broadcast_to(jnp.asarray(names, jnp.float32)[None, :, :, None], (1, heads, tokens, dim))
    count, index = schedule(np.broadcast_to(np.eye(3, dtype=bool), (heads, 3, 3)))
    o = block_attention(q, k, v, count, index, block=(64, 64), scale=1.0, slots=slots, implementation=implementation)
    for head in range(heads):
        for slot in (0, 63, 64, 129):
            np.testing.assert_allclose(o[0, int(slots[head, slot]), head], slot // 64 + 10.0 * head, rtol=1e-6)
