"""The Hopper kernel on four rungs: reference, interpreter with race detection, ahead-of-time compile, a GPU itself."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import MASKS, ROUNDING, Problem, assert_close, schedule

from pallas_kernels import NoBackend, _registers, block_attention, choose, compile_report, device_name, interpret
from pallas_kernels.block_attention import BACKENDS, hopper
from pallas_kernels.workloads import WORKLOADS

PAIRS = (("bf16", "bf16"), ("fp8", "fp8"), ("int8", "int8"), ("int8", "bf16"), ("int4", "int4"), ("bf16", "int8"))
REQUEST = replace(WORKLOADS["cogvideox_5b"], device="sm_90")


def bound(problem: Problem) -> float:
    """Largest |difference| from the reference: the contract's 2e-3 max |v|, or the rounding of a bf16 output."""
    quantised = problem.qk != "bf16" and problem.pv != "bf16"
    largest = float(np.abs(np.asarray(problem.qkv[2], np.float32)).max())
    return (2e-3 if quantised and problem.dtype == "float32" else ROUNDING["bfloat16"]) * largest


def check(problem: Problem) -> None:
    """Hopper's output and log-sum-exp are the reference's: the same integers, so far within the contract."""
    o, lse = problem.solve("hopper")
    expected, expected_lse = problem.solve("reference")
    assert_close(o, expected, bound(problem))
    assert_close(lse, expected_lse, 2e-2 if "bf16" in (problem.qk, problem.pv) else 1e-4)


# ---- rungs 1 and 2: the reference, in the interpreter, races detected -----------------------------------------------

TINY = dict(heads=2, q_tokens=70, kv_tokens=130, head_dim=64)
CASES = {
    "bf16, a query block without a partner": dict(dtype="bfloat16", q_tokens=130, mask="empty rows"),
    "int8, one shared list": dict(qk="int8", pv="int8", block=(128, 128), mask="ones"),
    "int8, the running rule": dict(qk="int8", pv="int8", block=(128, 64), p_scale="running"),
    "fp8, head_dim padded": dict(qk="fp8", pv="fp8", head_dim=40, mask="first skipped"),
    "int4, every other group": dict(qk="int4", pv="int4", q_group="block", k_group="row", v_group="block"),
    "int8 scores, bf16 values": dict(qk="int8", dtype="bfloat16", block=(128, 64), permuted=False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_interpreted_is_the_reference(case):
    problem = Problem(**(dict(dtype="float32") | TINY | CASES[case]))
    with interpret():
        check(problem)


def test_an_index_or_count_out_of_range_reads_nothing_outside():
    """Traced, so nothing before the launch can catch it; the interpreter raises on a read out of bounds."""
    problem = Problem(**TINY, qk="int8", pv="int8", mask="ones", block=(128, 64))
    count, index = schedule(problem.keep)
    arrays = {k: v for k, v in problem.operands.items() if v is not None}

    @jax.jit
    def call(count, index):
        return block_attention(
            **arrays, count=count, index=index, block=problem.block, scale=problem.scale, qk="int8", pv="int8",
            implementation="hopper",
        )  # fmt: skip

    with interpret():
        wild = call(count + 1000, jnp.full_like(index, 10**6))
        last = call(count, jnp.full_like(index, index.shape[-1] - 1))
    np.testing.assert_array_equal(wild, last)


def test_the_gradient_is_that_of_xla():
    problem = Problem(**TINY, dtype="bfloat16", mask="empty rows", block=(128, 64))
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(1, 70, 2, 64)), jnp.float32)

    def gradients(implementation):
        def loss(q, k, v):
            return (problem.solve(implementation, q=q, k=k, v=v)[0].astype(jnp.float32) * weight).sum()

        return jax.grad(loss, (0, 1, 2))(*problem.qkv)

    with interpret():
        found = gradients("hopper")
    for a, b in zip(found, gradients("xla"), strict=True):
        assert_close(a, b, 2e-2 * float(jnp.abs(b.astype(jnp.float32)).max()))


def test_interpreting_ends_with_its_block():
    assert device_name() == "cpu"
    with interpret("sm_80"):
        assert device_name() == "sm_80"
    with pytest.raises(ZeroDivisionError), interpret():
        small = replace(REQUEST, heads=1, q_tokens=9, kv_tokens=9, device=device_name())
        assert choose(small, BACKENDS, "hopper").name == "hopper"
        raise ZeroDivisionError
    assert device_name() == "cpu"
    with pytest.raises(ValueError, match="device: expected a compute capability such as 'sm_90', got 'hopper'"):
        with interpret("hopper"):
            pass


# ---- what is refused, and what is arithmetic ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device": "cpu"}, "device cpu is not sm_90"),
        ({"device": "sm_80"}, "device sm_80 is not sm_90"),
        ({"device": "sm_100"}, "device sm_100 is not sm_90"),
        ({"dtype": "float64"}, "dtype float64 is not served"),
        ({"dtype": "float32"}, "float32 products are not served .*cast to bfloat16 or quantise"),
        ({"dtype": "float32", "qk": "int8"}, "float32 products are not served"),
        ({"block": (32, 64)}, r"block \(32, 64\) is not served; it serves \(64, 64\), \(128, 64\), \(128, 128\)"),
        ({"head_dim": 257}, "head_dim 257 > 256"),
    ],
)  # fmt: skip
def test_a_refusal_names_what_is_in_the_way(changed, reason):
    assert hopper.why_not(REQUEST) is None
    with pytest.raises(NoBackend, match=reason):
        choose(replace(REQUEST, **changed), BACKENDS, "hopper")


def test_the_interpreter_refuses_what_would_hang_it(monkeypatch):
    small, large = (replace(REQUEST, heads=2, q_tokens=n, kv_tokens=n) for n in (130, 4096))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert hopper.why_not(large) is None
    with interpret():
        assert hopper.why_not(small) is None
        assert "needs 4 cores for arrays of 102400 bytes and more, this machine has 2" in str(hopper.why_not(large))
        monkeypatch.setattr("os.cpu_count", lambda: 8)
        assert hopper.why_not(large) is None


def test_every_tile_fits():
    for dim in (1, 32, 64, 96, 128, 200, 256):
        for block in hopper.BLOCKS:
            for qk, pv in PAIRS:
                request = replace(REQUEST, head_dim=dim, block=block, qk=qk, pv=pv)
                assert hopper.why_not(request) is None, request
                for tiles in hopper.candidates(request):
                    assert hopper.shared_memory(request, tiles) <= 232448


def held(layout) -> dict[tuple[int, int, int], list[int]]:
    """(warp, lane, row) -> the columns of a [64, 32] array that this thread holds, ascending, by a Mosaic layout."""
    place = np.stack(np.meshgrid(np.arange(64), np.arange(32), indexing="ij"), axis=-1)  # [64, 32, (row, column)]
    for tile in layout.tiling.tiles:
        lead, n = place.shape[: -len(tile) - 1], len(tile)
        split = [extent for full, t in zip(place.shape[-n - 1 : -1], tile, strict=True) for extent in (full // t, t)]
        axes = [*range(len(lead)), *(len(lead) + 2 * i for i in range(n)), *(len(lead) + 2 * i + 1 for i in range(n))]
        place = place.reshape(*lead, *split, 2).transpose(*axes, -1 % (len(lead) + 2 * n + 1))
    rank = place.ndim - 1
    warp, lane = ([d % rank for d in dims] for dims in (layout.warp_dims, layout.lane_dims))
    rest = [d for d in range(rank) if d not in (*warp, *lane)]
    place = place.transpose(*warp, *lane, *rest, rank).reshape(4, 32, -1, 2)
    columns: dict[tuple[int, int, int], list[int]] = {}
    for (w, t, i), row in np.ndenumerate(place[..., 0]):
        columns.setdefault((w, t, int(row)), []).append(int(place[w, t, i, 1]))
    return {thread: sorted(c) for thread, c in columns.items()}


def test_the_key_order_is_that_of_the_registers():
    """By Mosaic's own layouts: a thread's scores, kept where they are, land at the operand's positions in KEY_ORDER."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa

    scores, operand = held(fa.WGMMA_LAYOUT), held(fa.WGMMA_LAYOUT_8BIT)
    assert scores.keys() == operand.keys() and len(scores) == 4 * 32 * 2
    for thread, positions in operand.items():
        assert scores[thread] == [16 * (p // 16) + _registers.KEY_ORDER[p % 16] for p in positions]


def test_key_major_pads_transposes_and_permutes():
    v = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 70, 8)), jnp.float32)
    plain = np.asarray(_registers.key_major(v, 64, permuted=False))
    assert plain.shape == (1, 2, 8, 128) and (plain[..., 70:] == 0).all()
    np.testing.assert_array_equal(plain[..., :70], np.swapaxes(v, 2, 3))
    order = np.concatenate([16 * n + np.asarray(_registers.KEY_ORDER) for n in range(8)])
    np.testing.assert_array_equal(_registers.key_major(v, 64, permuted=True), plain[..., order])


# ---- rung 3: the compiler -------------------------------------------------------------------------------------------

compiled = pytest.mark.skipif(compile_report.missing() is not None, reason=str(compile_report.missing()))
AHEAD = {  # request, the tensor instruction of its integer or float products
    "bf16": (dict(head_dim=128, block=(128, 128)), "HGMMA"),
    "int8 at 128": (dict(head_dim=128, block=(128, 128), qk="int8", pv="int8"), "IGMMA"),
    "int8 at 64": (dict(head_dim=64, qk="int8", pv="int8"), "IGMMA"),
    "fp8": (dict(head_dim=64, qk="fp8", pv="fp8"), "QGMMA"),
}


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("case", AHEAD)
def test_compiles_without_spills_to_the_intended_instruction(case):
    changed, instruction = AHEAD[case]
    row = compile_report.measure(case, replace(REQUEST, q_tokens=1000, kv_tokens=1000, heads=2, **changed), "sm_90a")
    assert row["spills"] == 0
    assert all(op.startswith(instruction) for op in row["tensor_instructions"])
    if instruction == "IGMMA":
        assert row["instructions"]["conversion"] == row["instructions"]["pack"] == 0


# ---- rung 4: the GPU ------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper_here():
    if device_name() != "sm_90":
        pytest.skip(f"needs an H100 or H200, this is {device_name()}")


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper_here")
@pytest.mark.parametrize("lengths", [(1, 1), (128, 128), (200, 450), (1030, 770)], ids=str)
@pytest.mark.parametrize("block", hopper.BLOCKS, ids=str)
@pytest.mark.parametrize("head_dim", hopper.HEAD_DIMS)
@pytest.mark.parametrize("widths", PAIRS, ids="-".join)
def test_gpu_is_the_reference(widths, head_dim, block, lengths):
    qk, pv = widths
    dtype = "bfloat16" if "bf16" in widths else "float32"
    check(Problem(q_tokens=lengths[0], kv_tokens=lengths[1], head_dim=head_dim, block=block, dtype=dtype, qk=qk, pv=pv))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper_here")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("widths", PAIRS[:3], ids="-".join)
def test_gpu_masks_groups_and_repeats(widths, mask):
    qk, pv = widths
    problem = Problem(
        batch=2, q_tokens=450, kv_tokens=450, mask=mask, qk=qk, pv=pv, q_group="block", k_group="row", v_group="block",
        p_scale="running", head_dim=128, dtype="bfloat16" if "bf16" in widths else "float32",
    )  # fmt: skip
    check(problem)
    for a, b in zip(problem.solve("hopper"), problem.solve("hopper"), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
