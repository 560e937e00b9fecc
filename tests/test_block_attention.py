"""block_attention: the oracle against numpy, XLA against the oracle, and each promise of the docstring once."""

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from problems import (
    MASKS,
    ROUNDING,
    WIDTHS,
    Problem,
    dense_softmax,
    emulated,
    keep_blocks,
    problems,
    schedule,
)

from pallas_kernels import arrange, block_attention
from pallas_kernels.block_attention import BACKENDS, xla
from pallas_kernels.workloads import WORKLOADS

IMPLEMENTATIONS = [backend.name for backend in BACKENDS]
GROUPS = [("row", "block", "channel"), ("block", "row", "block")]  # of q, k, v
few = settings(max_examples=6, deadline=None, derandomize=True)


def assert_close(found, expected, bound: float) -> None:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    empty = np.isneginf(expected)
    np.testing.assert_array_equal(np.isneginf(found), empty)
    found, expected = found[~empty], expected[~empty]
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max(initial=0.0) <= bound


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
    assert_close(problem.solve("reference")[0], problem.to_model(emulated(problem)), 2e-3 * largest)


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


# ---- gradient -------------------------------------------------------------------------------------------------------


def dense_oracle(q, k, v, elements, scale):
    """Masked softmax attention in plain jnp, for autodiff: (o, lse), lse 0 for an empty row."""
    s = jnp.where(elements, scale * jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest"), -jnp.inf)
    some = elements.any(axis=-1)
    s = jnp.where(some[..., None], s, 0.0)
    p = jnp.where(some[..., None], jax.nn.softmax(s, axis=-1), 0.0)
    lse = jnp.where(some, jax.nn.logsumexp(s, axis=-1), 0.0)
    return jnp.einsum("bhqk,bhkd->bhqd", p, v, precision="highest"), lse


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "problem",
    [
        Problem(batch=2, mask="empty rows"),
        Problem(q_tokens=130, kv_tokens=200, mask="runs of 2", block=(64, 128), permuted=False),
        Problem(q_tokens=450, kv_tokens=450, mask="ragged"),
    ],
    ids=lambda p: f"{p.q_tokens}x{p.kv_tokens} {p.mask}",
)
def test_gradient_is_that_of_masked_dense_attention(problem, implementation):
    rng = np.random.default_rng(0)
    w_o = jnp.asarray(rng.normal(size=(problem.batch, problem.q_tokens, problem.heads, problem.head_dim)), jnp.float32)
    w_lse = jnp.asarray(rng.normal(size=w_o.shape[:-1]), jnp.float32)
    kernel = np.s_[:, problem.slots, np.arange(problem.heads)[:, None]] if problem.slots is not None else None

    def by_blocks(q, k, v):
        o, lse = problem.solve(implementation, q=q, k=k, v=v)
        return (o * w_o).sum() + jnp.where(lse == -jnp.inf, 0.0, lse * w_lse).sum()

    def by_elements(q, k, v):
        o, lse = dense_oracle(q, k, v, problem.elements, problem.scale)
        weight_o = jnp.swapaxes(w_o, 1, 2) if kernel is None else w_o[kernel]
        weight_lse = jnp.swapaxes(w_lse, 1, 2) if kernel is None else w_lse[kernel]
        return (o * weight_o).sum() + (lse * weight_lse).sum()

    found = jax.grad(by_blocks, (0, 1, 2))(*problem.qkv)
    expected = jax.grad(by_elements, (0, 1, 2))(*problem.qkv)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 2e-5 * max(1.0, float(jnp.abs(b).max())))


def test_gradient_ignores_nan_in_skipped_blocks():
    problem = Problem(q_tokens=330, kv_tokens=330, mask="ones")
    keep = problem.keep.copy()
    keep[:, :, 2] = False
    count, index = schedule(keep)
    poison = (np.arange(330) // 64 == 2)[None, None, :, None]
    q, k, v = problem.qkv

    def loss(q, k, v):
        return problem.solve("xla", q=q, k=k, v=v, count=count, index=index)[0].sum()

    clean = jax.grad(loss, (0, 1, 2))(q, k, v)
    dirty = jax.grad(loss, (0, 1, 2))(q, jnp.where(poison, jnp.nan, k), jnp.where(poison, jnp.nan, v))
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_quantised_widths_refuse_a_gradient(implementation):
    problem = Problem(qk="int8", pv="bf16")

    def through_arrange(q):
        values, scales, _ = arrange(
            q, None, role="q", width="int8", group="row", block=64, implementation=implementation
        )
        return problem.solve(implementation, q=values, q_scale=scales)[0].sum()

    def through_v(v):
        return problem.solve(implementation, v=v)[0].sum()

    for function, argument in ((through_arrange, jnp.swapaxes(problem.qkv[0], 1, 2)), (through_v, problem.qkv[2])):
        assert np.isfinite(function(argument))
        with pytest.raises(ValueError, match=r"gradient: expected unquantised widths.*QuantSpec\(\)"):
            jax.grad(function)(argument)
        jax.grad(lambda x, f=function: f(jax.lax.stop_gradient(x)))(argument)  # what was cut off is not refused


# ---- transformations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [("bf16", "bf16"), ("int8", "int8")])
def test_two_runs_give_equal_bits(widths):
    problem = Problem(q_tokens=450, kv_tokens=450, mask="ragged", qk=widths[0], pv=widths[1])
    other = replace(problem, mask="runs of 3")
    first = problem.solve("xla")
    other.solve("xla")  # something else in between
    for a, b in zip(first, problem.solve("xla"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_new_mask_or_order_compiles_nothing():
    problem = Problem(mask="ones")
    traces = []

    @jax.jit
    def call(count, index, slots):
        traces.append(1)
        return problem.solve(None, count=count, index=index, slots=slots)

    for mask in MASKS:
        for seed in (0, 1):
            changed = replace(problem, mask=mask, seed=seed)
            o, lse = call(*schedule(changed.keep), changed.slots)
            expected = problem.solve("reference", **dict(zip(("count", "index"), schedule(changed.keep), strict=True)),
                                     slots=changed.slots)  # fmt: skip
            assert_close(o, expected[0], 1e-5)
            assert_close(lse, expected[1], 1e-5)
    assert len(traces) == 1 and call._cache_size() == 1
    xla.run.clear_cache()
    for mask in MASKS:  # nor without jit around it
        changed = replace(problem, mask=mask)
        problem.solve("xla", slots=changed.slots, **dict(zip(("count", "index"), schedule(changed.keep), strict=True)))
    assert xla.run._cache_size() == 1


def test_traced_values_out_of_range_are_clamped():
    problem = Problem(mask="random", permuted=False)
    wild = jax.jit(lambda count, index: problem.solve("xla", count=count, index=index))
    o, _ = wild(jnp.full((2, 4), 10_000, jnp.int32), jnp.full((2, 4, 4), 10_000, jnp.int32))
    last = np.zeros_like(problem.keep)
    last[..., -1] = True
    assert_close(o, problem.solve("xla", **dict(zip(("count", "index"), schedule(last), strict=True)))[0], 1e-5)
    o, lse = wild(jnp.full((2, 4), -5, jnp.int32), jnp.full((2, 4, 4), -5, jnp.int32))
    assert (np.asarray(o) == 0).all() and np.isneginf(np.asarray(lse)).all()


def stacked(kinds):
    masks = [Problem(mask=kind) for kind in kinds]
    count, index = (jnp.stack(x) for x in zip(*(schedule(m.keep) for m in masks), strict=True))
    return masks, count, index


def test_vmap_over_masks_and_inputs():
    masks, count, index = stacked(["random", "runs of 1", "empty rows"])
    q = jnp.stack([masks[0].qkv[0] * (1 + i) for i in range(3)])
    o, lse = jax.vmap(lambda c, i, q: masks[0].solve(None, count=c, index=i, q=q))(count, index, q)
    gradient = jax.vmap(jax.grad(lambda q, c, i: masks[0].solve(None, count=c, index=i, q=q)[0].sum()))(q, count, index)
    for i in range(3):
        one = masks[0].solve("xla", count=count[i], index=index[i], q=q[i])
        assert_close(o[i], one[0], 1e-5)
        assert_close(lse[i], one[1], 1e-5)
        one = jax.grad(lambda q, i=i: masks[0].solve(None, count=count[i], index=index[i], q=q)[0].sum())(q[i])
        assert_close(gradient[i], one, 1e-5)


def test_scan_over_masks_and_checkpoint():
    masks, count, index = stacked(["random", "runs of 1", "empty rows"])
    problem, traces = replace(masks[0], permuted=False), []

    def layer(q, schedule_of_layer):
        traces.append(1)
        o, _ = problem.solve(None, count=schedule_of_layer[0], index=schedule_of_layer[1], q=q)
        return q + jnp.swapaxes(o, 1, 2), None

    def loss(step):
        return lambda q: (jax.lax.scan(step, q, (count, index))[0] ** 2).sum()

    def unrolled(q):
        for i in range(3):
            q, _ = layer(q, (count[i], index[i]))
        return (q**2).sum()

    q = problem.qkv[0]
    found = jax.jit(jax.value_and_grad(loss(jax.checkpoint(layer))))(q)
    assert len(traces) <= 2  # a scan traces its body, not each layer
    expected = jax.value_and_grad(unrolled)(q)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert_close(found[1], expected[1], 1e-4 * float(jnp.abs(expected[1]).max()))


def test_export_round_trip():
    problem = Problem(mask="random")
    count, index = schedule(problem.keep)

    def call(q, count, index):
        return problem.solve(None, q=q, count=count, index=index)

    exported = jax.export.export(jax.jit(call))(problem.qkv[0], count, index)
    if importlib.util.find_spec("flatbuffers"):  # jax needs it to write an export to bytes
        exported = jax.export.deserialize(exported.serialize())
    for a, b in zip(exported.call(problem.qkv[0], count, index), problem.solve("xla"), strict=True):
        assert_close(a, b, 1e-5)


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from problems import Problem, schedule
problem = Problem(batch=2, heads=4, mask="ragged")
mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
count, index = schedule(problem.keep)
token, head = P("batch", "heads"), P("heads")

def call(q, k, v, count, index, slots):
    return problem.solve(None, q=q, k=k, v=v, count=count, index=index, slots=slots)

def loss(*arrays):
    o, lse = sharded(*arrays)
    return (o ** 2).sum() + lse.sum()

def loss_alone(*arrays):
    o, lse = call(*arrays)
    return (o ** 2).sum() + lse.sum()

in_specs = (token, token, token, head, head, head)
sharded = jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=P("batch", None, "heads"))
arrays = (*problem.qkv, count, index, problem.slots)
for a, b in zip(jax.jit(sharded)(*arrays), call(*arrays)):
    np.testing.assert_allclose(a, b, atol=1e-5)
for a, b in zip(jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays), jax.grad(loss_alone, (0, 1, 2))(*arrays)):
    np.testing.assert_allclose(a, b, atol=1e-4)
print("equal on", len(jax.devices()))
"""


def test_shard_map_over_batch_and_heads():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run([sys.executable, "-c", _SHARDED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal on 4", done.stderr[-2000:]


# ---- work and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.parametrize("kind", ["random", "tenfold"])
def test_steps_follow_the_kept_blocks_in_total(kind, density):
    """What the loops visit, padding included, is within 8 % of what is kept, also when rows differ tenfold."""
    from pallas_kernels.bench import tenfold

    rng, shape = np.random.default_rng(0), (4, 128, 128)
    keep = rng.random(shape) < density if kind == "random" else tenfold(rng, shape, density)
    sizes = xla.tiles(4 * 128, 128, 64, 64)
    teams = xla._teams(*schedule(keep), 1, sizes)
    counts = np.asarray(teams.count)
    visited = (-(-counts.max(axis=1) // sizes.step) * sizes.step * counts.shape[1]).sum()
    assert counts.sum() == keep.sum()
    assert keep.sum() <= visited <= 1.08 * keep.sum() + 2 * counts.size


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_linear_in_tokens(gradient):
    """CogVideoX's 17776 tokens, 4 heads, D 64: one score matrix would be 1.3 GB a head. Compiled, not run."""
    tokens = WORKLOADS["cogvideox_5b"].q_tokens
    x = jax.ShapeDtypeStruct((1, 4, tokens, 64), jnp.float32)
    blocks = -(-tokens // 64)
    count = jax.ShapeDtypeStruct((4, blocks), jnp.int32)
    index = jax.ShapeDtypeStruct((4, blocks, blocks), jnp.int32)

    def call(q, k, v, count, index):
        return block_attention(q, k, v, count, index, block=(64, 64), scale=0.125)

    def train(*arrays):
        return jax.grad(lambda q, k, v: call(q, k, v, *arrays[3:]).sum(), (0, 1, 2))(*arrays[:3])

    compiled = jax.jit(train if gradient else call).lower(x, x, x, count, index).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < (400e6 if gradient else 200e6)


# ---- a caller's mistakes --------------------------------------------------------------------------------------------

_FINE = Problem(mask="random", permuted=False)


def _changed(**changed):
    return lambda: _FINE.solve("xla", **changed)


def _q(shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


_INT8 = Problem(qk="int8", pv="int8", mask="random", permuted=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_changed(q=_q((2, 200, 32))), r"q: expected shape \[batch, heads, .* = \[any.*got shape \[2, 200, 32\]"),
        (_changed(k=_q((1, 3, 200, 32))), r"k: expected shape .* = \[1, 2, any, 32\], got shape \[1, 3, 200, 32\]"),
        (_changed(k=_q((1, 2, 200, 64))), r"k: expected shape .* = \[1, 2, any, 32\], got shape \[1, 2, 200, 64\]"),
        (_changed(v=_q((1, 2, 199, 32))), r"v: expected shape .* = \[1, 2, 200, 32\], got shape \[1, 2, 199, 32\]"),
        (_changed(q=_q((1, 2, 0, 32))), r"q, k: expected at least one .* token"),
        (_changed(q=_q((1, 2, 200, 32), jnp.int8)), r"q: expected float32, .* at width 'bf16', got int8"),
        (_changed(v=_q((1, 2, 200, 32), jnp.bfloat16)), r"q and k and v: expected one dtype .*, bfloat16"),
        (_changed(qk="int8"), r"q: expected int8 at width 'int8', got float32.*arrange"),
        (_changed(qk="int3"), r"qk: expected one of 'bf16', 'fp8', 'int8', 'int4', got 'int3'"),
        (_changed(p_scale="row"), r"p_scale: expected 'block' or 'running', got 'row'"),
        (_changed(scale=float("nan")), r"scale: expected a finite number, got nan"),
        (_changed(scale=float("inf")), r"scale: expected a finite number, got inf"),
        (_changed(scale="0.1x"), r"scale: expected a finite number, got '0.1x'"),
        (_changed(block=(64, 0)), r"block: expected two positive integers .*got \(64, 0\)"),
        (_changed(block=64), r"block: expected two positive integers .*got 64"),
        (_changed(count=_q((2, 3), jnp.int32)), r"count: expected shape .* = \[2, 4\], got shape \[2, 3\]"),
        (_changed(count=_q((2, 4))), r"count: expected dtype int32, got dtype float32"),
        (_changed(count=jnp.full((2, 4), 5, jnp.int32)), r"count: expected 0 to 4 kept key blocks, got 5 to 5"),
        (_changed(index=_q((2, 4, 3), jnp.int32)), r"index: expected shape .* = \[2, 4, 4\], got shape \[2, 4, 3\]"),
        (
            _changed(count=jnp.full((2, 4), 2, jnp.int32), index=jnp.full((2, 4, 4), 4, jnp.int32)),
            r"index: expected kept key blocks 0 to 3 .*got 4 to 4",
        ),
        (
            _changed(count=jnp.full((2, 4), 2, jnp.int32), index=jnp.ones((2, 4, 4), jnp.int32)),
            r"index: expected kept key blocks ascending without repeats, got a row out of order",
        ),
        (_changed(slots=_q((2, 199), jnp.int32)), r"slots: expected shape .* = \[2, 200\], got shape \[2, 199\]"),
        (_changed(slots=_q((2, 200), jnp.int32)), r"slots: expected a permutation of 0..199 in every head, got"),
        (_changed(q_scale=_q((1, 2, 4))), r"q_scale: expected None at qk='bf16', got an array of shape \[1, 2, 4\]"),
        (lambda: _INT8.solve("xla", k_scale=None), r"k_scale: expected scales at qk='int8', got None"),
        (lambda: _INT8.solve(v_scale=_q((1, 2, 2, 32))), r"v_scale: .*\[1, 2, 4, 32\], got shape \[1, 2, 2, 32\]"),
        (lambda: _INT8.solve(q_scale=_q((1, 2, 4), jnp.bfloat16)), r"q_scale: expected dtype float32, .*bfloat16"),
        (lambda: _FINE.solve("hoper"), r"implementation: expected None or one of 'xla', 'reference', got 'hoper'"),
        (lambda: jax.jit(lambda s: _FINE.solve(scale=s))(0.1), r"scale: expected a plain number .*got a traced value"),
    ],
)  # fmt: skip
def test_a_mistake_names_the_argument_the_expected_and_the_found(call, message):
    with pytest.raises(ValueError, match=message):
        call()
