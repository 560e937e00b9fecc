"""Packed 4-bit K and V on Hopper: two values to a byte up to shared memory, and no bit of a result knows."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import hopper_numbers
from problems import Problem, assert_close, schedule

from pallas_kernels import NoBackend, _packed, arrange, block_attention, compile_report, interpret
from pallas_kernels.block_attention import hopper
from pallas_kernels.workloads import WORKLOADS
from paro_jax import AttentionPlan, BlockMask, QuantSpec, TokenGrid, attend, attention
from paro_jax import arrange as paro_arrange

REQUEST = replace(WORKLOADS["cogvideox_5b"], device="sm_90", qk="int4", pv="int4", layout="hopper_packed")
TINY = dict(heads=1, q_tokens=70, kv_tokens=130, head_dim=64, dtype="float32", qk="int4", pv="int4", permuted=False)
CASES = {
    "the ring filled again": dict(q_tokens=64, kv_tokens=330, mask="ones"),
    "every other group": dict(q_group="block", k_group="row", v_group="block"),
    "one shared list, 128 channels, the running rule": dict(
        head_dim=128, block=(128, 64), p_scale="running", mask="empty rows"
    ),
    "96 channels": dict(head_dim=88, kv_tokens=65),
    "int4 scores, bf16 values": dict(pv="bf16", dtype="bfloat16", block=(128, 64)),
    "int8 scores, int4 values": dict(qk="int8"),
}  # fmt: skip


def solve(problem: Problem, layout: str, implementation: str = "hopper"):
    """(o, lse), and the operands and scales that `arrange` wrote in `layout`."""
    groups = dict(q=problem.q_group, k=problem.k_group, v=problem.v_group)
    stored = {}
    for role, x in zip("qkv", problem.qkv, strict=True):
        width, block = (problem.pv if role == "v" else problem.qk), problem.block[role != "q"]
        stored[role], stored[f"{role}_scale"], _ = arrange(
            jnp.swapaxes(x, 1, 2), None, role=role, width=width, group=groups[role], block=block, layout=layout,
            implementation=implementation,
        )  # fmt: skip
    padded = dict(head_dim=problem.head_dim, kv_tokens=problem.kv_tokens)
    o, lse = problem.solve("hopper", **stored, **padded, layout=layout, out_dtype=problem.dtype)
    return o, lse, stored


@pytest.mark.parametrize("case", CASES)
def test_packed_changes_no_bit_and_halves_what_is_stored(case):
    problem = Problem(**TINY | CASES[case])
    with interpret():
        *found, packed = solve(problem, "hopper_packed", "xla")
        *expected, whole = solve(problem, "hopper", "xla")
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    for role, width in (("k", problem.qk), ("v", problem.pv)):
        bytes_, expected_bytes = packed[role].nbytes, whole[role].nbytes
        if width == "int4":
            rows = whole[role].shape[2]
            expected_bytes = expected_bytes // 2 if role == "v" else expected_bytes * (-(-rows // 64) * 32) // rows
        assert bytes_ == expected_bytes
    largest = float(jnp.abs(problem.qkv[2].astype(jnp.float32)).max())
    assert_close(found[0], hopper_numbers(problem)[0], (2e-3 if problem.pv == "int4" else 2e-2) * largest)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("group", ["row", "block"])
@pytest.mark.parametrize("head_dim", [64, 88, 128, 256])
@pytest.mark.parametrize("role", ["k", "v"])
def test_the_kernel_packs_what_the_reference_packs(role, head_dim, group, block):
    group = "channel" if role == "v" and group == "row" else group
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 70, 1, head_dim)), jnp.float32)
    slots = jnp.asarray([np.random.default_rng(1).permutation(70)], jnp.int32)
    options = dict(role=role, width="int4", group=group, block=block, layout="hopper_packed")
    with interpret():
        found = arrange(x, slots, **options, implementation="hopper")
        jax.block_until_ready(found)
    expected = arrange(x, slots, **options, implementation="reference")
    np.testing.assert_allclose(found[1], expected[1], rtol=2e-7)
    low, high = ((np.asarray(y[0]) << 4 >> 4, np.asarray(y[0]) >> 4) for y in (found, expected))
    for a, b in zip(low, high, strict=True):  # one level where a ratio is within a rounding of a half
        assert np.abs(a - b).max() <= 1 and (a != b).mean() <= 2e-3


def test_pack_pairs_rows_and_upper_halves_are_values():
    values = jnp.asarray(np.random.default_rng(0).integers(-7, 8, size=(2, 128, 6)), jnp.int8)
    two = np.asarray(_packed.pack(values, 32))
    assert two.shape == (2, 64, 6) and two.dtype == np.int8
    for row in range(64):
        first = 2 * row - row % 32
        np.testing.assert_array_equal(two[:, row] & 15, np.asarray(values)[:, first] & 15)
        np.testing.assert_array_equal(two[:, row] >> 4, np.asarray(values)[:, first + 32])
    np.testing.assert_array_equal(_packed.unpacked(jnp.asarray(two), 32), _packed.upper(values))


def test_an_index_out_of_range_reads_nothing_outside():
    problem = Problem(**TINY | dict(mask="ones", block=(128, 64)))
    count, index = schedule(problem.keep)
    with interpret():
        _, _, stored = solve(problem, "hopper_packed", "xla")

        @jax.jit
        def call(count, index):
            return block_attention(
                **stored, count=count, index=index, block=problem.block, scale=problem.scale, qk="int4", pv="int4",
                layout="hopper_packed", kv_tokens=130, implementation="hopper",
            )  # fmt: skip

        wild = call(count + 1000, jnp.full_like(index, 10**6))
        last = call(count, jnp.full_like(index, index.shape[-1] - 1))
    np.testing.assert_array_equal(wild, last)


def test_a_packed_k_does_not_show_its_length(says):
    q, k, v = (jnp.zeros((1, 1, *shape), jnp.int8) for shape in ((64, 64), (96, 64), (32, 192)))
    count, index = jnp.ones((1, 1), jnp.int32), jnp.zeros((1, 1, 3), jnp.int32)
    scales = dict(q_scale=jnp.ones((1, 1, 64)), k_scale=jnp.ones((1, 1, 3)), v_scale=jnp.ones((1, 1, 1, 64)))

    def call(k=k, **options):
        return block_attention(
            q, k, v, count, index, block=(64, 64), scale=1.0, qk="int4", pv="int4", layout="hopper_packed", **scales,
            **options,
        )  # fmt: skip

    for wrong in (None, 128, 193):
        with says("kv_tokens", "129 to 192", wrong):
            call(kv_tokens=wrong)
    with says("kv_tokens", "95 rows"):
        call(k=k[:, :, :95], kv_tokens=190)
    with says("xla: layout 'hopper_packed' is not served", error=NoBackend):
        call(kv_tokens=130)


def test_a_plan_may_store_packed():
    """QuantSpec(packed=True) through the verbs: the same output, K and V at half the bytes."""
    rng = np.random.default_rng(0)
    grid = TokenGrid((2, 6, 5), text=7)
    # float32: among bfloat16 numbers are halves of others, whose rounding to 4 bits is the compiler's choice.
    q, k, v = (jnp.asarray(rng.normal(size=(1, grid.tokens, 2, 40)), jnp.float32) for _ in range(3))
    mask = BlockMask(jnp.asarray(rng.random((2, 2, 2)) < 0.7).at[:, :, 0].set(True), (64, 64))

    def build(packed):
        quant = QuantSpec("int4", "int4", packed=packed)
        return AttentionPlan.build(grid, order=["WHF", "FHW"], mask=mask, quant=quant)

    with interpret():
        expected = attention(q, k, v, plan=build(False), implementation="hopper")
        found = attention(q, k, v, plan=build(True), implementation="hopper")
        stored = {}
        for packed in (False, True):
            arranged = partial(paro_arrange, plan=build(packed), implementation="hopper")
            stored[packed] = [arranged(x, role=role) for role, x in (("q", q), ("k", k), ("v", v))]
        again = attend(*stored[True], plan=build(True))
    for o in (found, again):
        np.testing.assert_array_equal(np.asarray(o, np.float32), np.asarray(expected, np.float32))
    sizes = {packed: [blocks.values.nbytes for blocks in three] for packed, three in stored.items()}
    assert sizes[True] == [sizes[False][0], 2 * 64 * 64, sizes[False][2] // 2]
    with pytest.raises(NoBackend, match="xla: layout 'hopper_packed' is not served"):
        attention(q, k, v, plan=build(True))
    with pytest.raises(ValueError, match="packed must be False unless qk or pv is 'int4'; got qk='int8'"):
        QuantSpec("int8", "int8", packed=True)


def test_every_tile_fits_packed_too():
    for dim in (32, 64, 96, 128, 256):
        for block in hopper.BLOCKS:
            for qk, pv in (("int4", "int4"), ("int4", "bf16"), ("int4", "fp8"), ("int8", "int4"), ("fp8", "int4")):
                request = replace(REQUEST, head_dim=dim, block=block, qk=qk, pv=pv)
                assert hopper.why_not(request) is None, request
                assert hopper.shared_memory(request, hopper.candidates(request)[0]) <= 232448
                whole = replace(request, layout="hopper")
                assert hopper.candidates(request)[0].stages <= hopper.candidates(whole)[0].stages


def test_a_program_is_as_large_as_mosaic_says():
    """Which aligns arrays and wants room for reductions: 233712 bytes by its own refusal, of 232448 that there are."""
    request = replace(REQUEST, dtype="float32", head_dim=96, block=(128, 128))
    assert 233712 <= hopper.shared_memory(request, hopper.Tiles(128, 4, 2, 2)) <= 233712 + 512
    assert hopper.candidates(request)[0].stages == 3


# ---- the compiler ---------------------------------------------------------------------------------------------------

AHEAD = {
    "128 channels": (dict(head_dim=128, block=(128, 128)), 1.6),
    "64 channels": (dict(head_dim=64, block=(128, 128)), 2.6),
    "two lists": (dict(head_dim=64), 4.0),
    "int8 scores, 96 channels": (dict(qk="int8", head_dim=96, block=(128, 64)), 3.0),
}


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("case", AHEAD)
def test_compiles_without_spills_or_conversions(case):
    changed, bound = AHEAD[case]
    row = compile_report.measure(case, replace(REQUEST, q_tokens=1000, kv_tokens=1000, heads=2, **changed), "sm_90a")
    assert row["spills"] == 0
    assert {op.split(".")[0] for op in row["tensor_instructions"]} == {"IGMMA"}
    keys, dim = changed.get("block", REQUEST.block)[1], changed["head_dim"]
    output = 128 * dim * 128 // keys
    # None by score but P's rounding, two an instruction; and of a step's facts.
    assert row["instructions"]["conversion"] == 0 and row["instructions"]["pack"] <= (128 * 128 / 2 + output) / 32 + 16
    assert row["bound_ratio"] <= bound


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("role", ["k", "v"])
def test_arrange_compiles_at_the_memory(role):
    request = replace(REQUEST, op="arrange", role=role, q_tokens=1000, kv_tokens=1000, heads=2, block=(128, 128))
    row = compile_report.measure(role, request, "sm_90a")
    assert row["spills"] == 0 and row["bound_ratio"] <= 1.1  # half the bytes to write, the same work


# ---- the GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper_here")
@pytest.mark.parametrize("case", CASES)
def test_gpu_packed_changes_no_bit(case):
    changed = CASES[case] | dict(q_tokens=450, kv_tokens=1030, heads=2)
    for block in hopper.BLOCKS:
        check_gpu(Problem(**TINY | changed | dict(block=block)))


def check_gpu(problem: Problem) -> None:
    for a, b in zip(solve(problem, "hopper_packed")[:2], solve(problem, "hopper")[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
