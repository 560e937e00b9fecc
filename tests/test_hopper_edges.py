"""The Hopper kernels where inputs are extreme or wrong, and what makes them the default."""

import re
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Problem, assert_close

from pallas_kernels import NoBackend, block_attention, choose, compile_report, interpret
from pallas_kernels.block_attention import BACKENDS, hopper
from pallas_kernels.workloads import WORKLOADS
from paro_jax import AttentionPlan, QuantSpec, TokenGrid, attend, attention
from paro_jax import arrange as paro_arrange

REQUEST = replace(WORKLOADS["cogvideox_5b"], device="sm_90")
LARGE = {  # what a score is multiplied by: the rounding of the largest, in halvings, passes 0.005, 2^6 and 2^20
    "bf16": (1e9, dict(dtype="bfloat16")),
    "bf16, far beyond": (1e13, dict(dtype="bfloat16")),
    "int8, scales by key": (1e5, dict(qk="int8", pv="int8", k_group="row")),
    "bf16 scores, int8 values": (1e13, dict(pv="int8", dtype="bfloat16")),
}  # fmt: skip


@pytest.mark.parametrize("case", LARGE)
def test_however_large_the_scores(case):
    """The product of a score and its scale is rounded in one place and not in another; each row is its largest keys."""
    scale, changed = LARGE[case]
    problem = Problem(**dict(heads=1, q_tokens=70, kv_tokens=130, head_dim=64, block=(128, 64)) | changed)
    with interpret():
        o, lse = problem.solve("hopper", scale=scale)
    expected, expected_lse = problem.solve("reference", scale=scale)
    assert_close(o, expected, 2e-2 * float(jnp.abs(problem.qkv[2].astype(jnp.float32)).max()))
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-2 if problem.qk == "bf16" else 1e-6)


@pytest.mark.parametrize(("qk", "kv_tokens"), [("bf16", 64), ("bf16", 1), ("int8", 1)])
def test_half_a_block_past_the_end(qk, kv_tokens):
    """At 128 channels a bf16 P walks 128 keys in halves; the second one has no key here, and counts for nothing."""
    facts = dict(q_tokens=9, kv_tokens=kv_tokens, head_dim=128, block=(128, 128), dtype="bfloat16", mask="ones")
    problem = Problem(heads=1, qk=qk, **facts)
    with interpret():
        o, lse = problem.solve("hopper")
    expected, expected_lse = problem.solve("reference")
    assert_close(o, expected, 2e-2 * float(jnp.abs(problem.qkv[2].astype(jnp.float32)).max()))
    assert_close(lse, expected_lse, 2e-2)


def test_an_output_of_another_dtype_fits_where_the_request_fits():
    """why_not sees the dtype of q, k and v alone; float32 of 256 channels left no room for a stage of K and V."""
    shapes = []
    with interpret():
        for dtype in (jnp.bfloat16, jnp.float32):
            out = jax.eval_shape(lambda dtype=dtype: call(head_dim=256, out_dtype=dtype))
            shapes.append((out.shape, out.dtype))
    assert shapes == [((1, 64, 1, 256), jnp.bfloat16), ((1, 64, 1, 256), jnp.float32)]


@pytest.fixture
def hopper_by_default(monkeypatch):
    """The one line in each op that makes the Hopper kernels the default."""
    for op in ("arrange", "block_attention"):
        module = sys.modules[f"pallas_kernels.{op}"]
        first, *others = module.BACKENDS
        assert first.name == "hopper"
        monkeypatch.setattr(module, "BACKENDS", (replace(first, default=True), *others))


@pytest.mark.usefixtures("hopper_by_default")
@pytest.mark.parametrize(("tokens", "block", "layout"), [(61, (64, 64), "hopper"), (62, (32, 64), "rows")])
def test_as_the_default_both_verbs_choose_alike(tokens, block, layout):
    """Nothing named: arrange writes the layout of the backend that attend will choose, here the interpreter's GPU."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, tokens, 1, 40)), jnp.bfloat16) for _ in range(3))
    plan = AttentionPlan.dense(TokenGrid((1, 1, tokens)), heads=1, block=block, quant=QuantSpec("int8", "int8"))
    with interpret():
        found = attention(q, k, v, plan=plan)
        blocks = [paro_arrange(x, plan=plan, role=role) for role, x in (("q", q), ("k", k), ("v", v))]
        again = attend(*blocks, plan=plan)
        rows = [
            paro_arrange(x, plan=plan, role=role, implementation="xla") for role, x in (("q", q), ("k", k), ("v", v))
        ]
        from_rows = attend(*rows, plan=plan)
    assert {x.layout for x in blocks} == {layout} and {x.layout for x in rows} == {"rows"}
    largest = float(jnp.abs(v.astype(jnp.float32)).max())
    expected = attention(q, k, v, plan=plan, implementation="reference")
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(again, np.float32))
    for o in (found, from_rows):
        assert_close(o, np.asarray(expected, np.float32), 2e-2 * largest)


@pytest.mark.parametrize("qk", ["int8", "fp8"])
def test_scales_of_zero_do_not_bring_masked_keys_back(qk):
    """Zeros that somebody else rounded may have a scale of zero: all scores are then zero, of real keys alone."""
    problem = Problem(heads=1, q_tokens=9, kv_tokens=70, head_dim=64, qk=qk, pv="int8", mask="ones")
    scales = {name: problem.operands[name] for name in ("q_scale", "k_scale")}
    scales = {"q_scale": scales["q_scale"].at[:, :, :4].set(0.0), "k_scale": scales["k_scale"].at[:, :, 1].set(0.0)}
    with interpret():
        found = problem.solve("hopper", **scales)
    for a, b, bound in zip(found, problem.solve("reference", **scales), (2e-2, 1e-2), strict=True):
        assert_close(a, b, bound)


@pytest.mark.parametrize("scale", ["q_scale", "k_scale"])
@pytest.mark.parametrize("p_scale", ["block", "running"])
def test_a_scale_of_nan_is_not_hidden(scale, p_scale):
    """Scores of NaN beside a P of integers, which know none: the rows that saw them are NaN, others are not."""
    facts = dict(q_tokens=64, kv_tokens=130, head_dim=64, mask="ones", permuted=False)
    problem = Problem(heads=1, qk="int8", pv="int8", p_scale=p_scale, **facts)
    changed = {scale: problem.operands[scale].at[0, 0, 1].set(jnp.nan)}
    with interpret():
        found = jax.block_until_ready(problem.solve("hopper", **changed))
    for a, b in zip(found, problem.solve("reference", **changed), strict=True):
        np.testing.assert_array_equal(np.isnan(np.asarray(a, np.float32)), np.isnan(np.asarray(b, np.float32)))
        assert np.isnan(np.asarray(b, np.float32)).any()


# ---- bad input ------------------------------------------------------------------------------------------------------


def call(head_dim=64, **changed):
    q, k, v = (jnp.zeros((1, 1, n, head_dim), jnp.bfloat16) for n in (64, 130, 130))
    arrays = dict(q=q, k=k, v=v, count=jnp.ones((1, 1), jnp.int32), index=jnp.zeros((1, 1, 3), jnp.int32))
    return block_attention(**arrays | dict(block=(64, 64), scale=1.0, implementation="hopper") | changed)


def test_a_device_older_or_younger_than_hopper_is_named():
    for device in ("sm_80", "sm_89", "sm_100"):
        with interpret(device), pytest.raises(NoBackend, match=f"hopper: device {device} is not sm_90.* Able: .*xla"):
            call()


def test_a_head_dim_over_256_is_named():
    with interpret(), pytest.raises(NoBackend, match="hopper: head_dim 264 > 256.* Able: .*xla"):
        call(head_dim=264)


def test_where_no_tile_fits_the_memory_is_named(monkeypatch):
    monkeypatch.setattr(hopper, "_SMEM", 30_000)
    with pytest.raises(NoBackend, match="hopper: no tile fits in 30000 bytes of shared memory.* Able: .*xla"):
        choose(REQUEST, BACKENDS, "hopper")


def test_an_array_of_another_type_or_range_never_reaches_the_kernel(says):
    wrong = dict(
        q=(jnp.zeros((1, 1, 64, 64), jnp.int16), "float32, bfloat16 or float16", "int16"),
        k=(jnp.zeros((1, 1, 130, 64), jnp.int8), "float32, bfloat16 or float16", "int8"),
        v=(jnp.zeros((1, 1, 130, 64), jnp.float16), "one dtype", "float16"),
        count=(jnp.full((1, 1), 4, jnp.int32), "0 to 3", "4"),
        index=(jnp.full((1, 1, 3), 3, jnp.int32), "0 to 2", "3"),
        slots=(jnp.full((1, 64), 64, jnp.int32), "a permutation of 0..63", "64"),
    )
    with interpret():
        for name, (array, *words) in wrong.items():
            with says(name, *words):
                call(**{name: array})


def test_an_output_that_is_none_of_three_floats_is_named(says):
    with interpret():
        for wrong in (jnp.int8, jnp.float8_e4m3fn, jnp.float64):
            with says("out_dtype", "float32, bfloat16 or float16", jnp.dtype(wrong).name):
                call(out_dtype=wrong)


def test_an_array_that_is_not_contiguous_is_what_it_shows():
    """Strided views of numpy and transposes of jax arrays: values count, not how they lie."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 1, 64, 128)).astype(jnp.bfloat16)[..., ::2].swapaxes(2, 3)[..., ::-1]
    k, v = (jnp.asarray(rng.normal(size=(1, 1, 130, 64)), jnp.bfloat16) for _ in range(2))
    assert not q.flags["C_CONTIGUOUS"]
    with interpret():
        found, expected = (call(q=x, k=k, v=v) for x in (q, np.ascontiguousarray(q)))
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


# ---- the compiler ---------------------------------------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize(("role", "width"), [("q", 16), ("v", 4)])
def test_arrange_compiles_to_one_fetch_of_each_input(role, width, tmp_path):
    """By the machine code: a program's loads of x, and of both RoPE tables, are its 64 tokens' bytes, once."""
    request = replace(REQUEST, op="arrange", role=role, qk="int8", pv="int8", layout="hopper", heads=2)
    sass, _ = compile_report.compile_ahead(request, "sm_90a", tmp_path)
    loads = re.findall(r"LDG\.E(\.128)?\.CONSTANT", sass)
    by_width = 128 * width * (loads.count(".128") if width == 16 else len(loads) - 4)  # four are of the order's slots
    tokens, channels, tables = 64, 64, role == "q"
    assert by_width == tokens * channels * (2 + 4 * tables)
