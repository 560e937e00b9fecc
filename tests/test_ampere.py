"""The Ampere kernel on four rungs: reference, interpreter with race detection, ahead-of-time compile, a GPU itself."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import ampere_numbers
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic_gpu import primitives
from problems import (
    MASKS,
    ROUNDING,
    TOKENS,
    Problem,
    assert_close,
    assert_covered,
    bounds,
    check,
    check_where_exponentials_differ,
    covering,
    keep_blocks,
    problem_of,
    row_id,
    schedule,
)

from pallas_kernels import (
    NoBackend,
    _fragments,
    arrange,
    block_attention,
    choose,
    compile_report,
    device_name,
    interpret,
)
from pallas_kernels.block_attention import BACKENDS, ampere
from pallas_kernels.workloads import WORKLOADS
from paro_jax import AttentionPlan, BlockMask, QuantSpec, TokenGrid, attend, attention
from paro_jax import arrange as paro_arrange

PAIRS = tuple((qk, pv) for qk in ampere.SERVED for pv in ampere.SERVED)
REQUEST = replace(WORKLOADS["wan_14b_720p"], device="sm_80")


@pytest.fixture(autouse=True, scope="module")
def mma_on_a_cpu():
    """The interpreter evaluates what it does not know as JAX would, and JAX knows no `mma`: here is its meaning.

    Registered for the CPU alone, so that a GPU's own rule stays what it is. In numpy, by a callback, as the
    interpreter's own products: XLA's wait for a pool of threads, in which another warpgroup may wait for this one.
    """

    def multiply(acc, a, b):
        acc, a, b = map(np.asarray, (acc, a, b))
        return acc + a.astype(acc.dtype) @ b.astype(acc.dtype)

    def product(acc, a, b):
        return jax.pure_callback(multiply, jax.ShapeDtypeStruct(acc.shape, acc.dtype), acc, a, b)

    mlir.register_lowering(primitives.mma_p, mlir.lower_fun(product, multiple_results=False), platform="cpu")


# ---- rungs 1 and 2: the reference, in the interpreter, races detected -----------------------------------------------

LENGTHS = ((1, 1), (128, 192), (70, 198))  # one token; whole blocks; ragged


def pairwise() -> list[Problem]:
    """Nine problems in which every two of three widths, head dims, blocks and lengths meet (an orthogonal array).

    Masks, groups and P's rules take turns. Two more: widths that differ, and the ring of stages filled again.
    """
    every = []
    for a, b in np.ndindex(3, 3):
        width, block, lengths = ampere.SERVED[a], ampere.BLOCKS[(a + b) % 3], LENGTHS[(a + 2 * b) % 3]
        mask, p_scale = ("empty rows", "ones", "first skipped")[b], ("block", "running")[(a + b) % 2]
        groups = (("row", "block", "channel"), ("block", "row", "block"))[b % 2]
        every.append(_problem((width, width), lengths, groups, ampere.HEAD_DIMS[b], block, mask, p_scale))
    by_row = ("row", "block", "channel")
    every.append(_problem(("int8", "int4"), (65, 330), by_row, 40, (64, 64), "ones", "running"))
    every.append(_problem(("int4", "bf16"), (130, 65), by_row, 96, (128, 128), "ones", "block"))
    return every


def _problem(widths, lengths, groups, head_dim, block, mask, p_scale) -> Problem:
    dtype = "bfloat16" if "bf16" in widths else "float32"
    q_group, k_group, v_group = groups
    return Problem(
        heads=1, qk=widths[0], pv=widths[1], q_tokens=lengths[0], kv_tokens=lengths[1], head_dim=head_dim, block=block,
        dtype=dtype, mask=mask, q_group=q_group, k_group=k_group, v_group=v_group, p_scale=p_scale,
    )  # fmt: skip


def name(problem: Problem) -> str:
    tokens = f"{problem.q_tokens}x{problem.kv_tokens}"
    block = "x".join(map(str, problem.block))
    return f"{problem.qk}-{problem.pv}-d{problem.head_dim}-{tokens}-{block}-{problem.mask}-{problem.p_scale}"


@pytest.mark.parametrize("problem", pairwise(), ids=name)
def test_interpreted_is_the_reference(problem):
    """What is skipped may be anything: where the first keys are and may hold NaN, they do."""
    changed = {}
    if problem.mask == "first skipped" and problem.qk == "bf16":
        changed = {
            name: x.at[:, :, : problem.block[1]].set(jnp.nan) for name, x in zip("kv", problem.qkv[1:], strict=True)
        }
    with interpret("sm_80"):
        check(problem, "ampere", ampere_numbers(problem), **changed)


AXES: dict[str, Sequence[Any]] = dict(
    widths=PAIRS, head_dim=(*ampere.HEAD_DIMS, 40, 72), tokens=tuple(TOKENS), block=ampere.BLOCKS,
    mask=("ones", "random", "empty rows", "last skipped"),
    groups=(("row", "block", "channel"), ("block", "row", "block")), p_scale=("block", "running"),
    permuted=(True, False),
)  # fmt: skip


@pytest.mark.covering
@pytest.mark.parametrize("row", covering(**AXES), ids=row_id)
def test_interpreted_with_every_pair_of_widths(row):
    problem = problem_of(**row)
    with interpret("sm_80"):
        if problem.k_group == "row" and problem.pv in (
            "int8",
            "int4",
        ):  # scores that are no integers beside a rounded P
            check_where_exponentials_differ(problem, "ampere")
        else:
            check(problem, "ampere", ampere_numbers(problem))


def test_these_rows_have_each_value_beside_each_other():
    assert_covered(covering(**AXES), AXES)


TINY = dict(heads=2, q_tokens=70, kv_tokens=130, head_dim=64)


def test_an_index_or_count_out_of_range_reads_nothing_outside():
    """Traced, so nothing before the launch can catch it; the interpreter raises on a read out of bounds."""
    problem = Problem(**TINY | dict(heads=1), qk="int8", pv="int4", mask="ones")
    count, index = schedule(problem.keep)
    arrays = {k: v for k, v in problem.operands.items() if v is not None}

    @jax.jit
    def call(count, index):
        return block_attention(
            **arrays, count=count, index=index, block=problem.block, scale=problem.scale, qk="int8", pv="int4",
            implementation="ampere",
        )  # fmt: skip

    with interpret("sm_89"):
        wild = call(count + 1000, jnp.full_like(index, 10**6))
        last = call(count, jnp.full_like(index, index.shape[-1] - 1))
    np.testing.assert_array_equal(wild, last)


def test_however_large_the_factor_of_integer_scores_and_whatever_its_sign():
    """One step of an integer score is a million halvings: each row is its largest score's keys."""
    problem = Problem(**TINY | dict(heads=1), qk="int4", pv="int8", mask="ones", block=(128, 64))
    changed = dict(q_scale=1e9 * problem.operands["q_scale"], scale=-problem.scale)
    with interpret("sm_86"):
        found = problem.solve("ampere", **changed)[0]
    assert_close(found, problem.solve("reference", **changed)[0], bounds(problem)[0])


def test_the_gradient_is_that_of_xla():
    problem = Problem(**TINY | dict(heads=1), dtype="bfloat16", mask="ones", block=(128, 64))
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(1, 70, 1, 64)), jnp.float32)

    def gradients(implementation):
        def loss(q, k, v):
            return (problem.solve(implementation, q=q, k=k, v=v)[0].astype(jnp.float32) * weight).sum()

        return jax.grad(loss, (0, 1, 2))(*problem.qkv)

    with interpret("sm_80"):
        found = gradients("ampere")
    for a, b in zip(found, gradients("xla"), strict=True):
        assert_close(a, b, 2e-2 * float(jnp.abs(b.astype(jnp.float32)).max()))


def test_through_a_plan_operands_are_stored_as_the_kernel_reads_them():
    """The public verbs, each head in its own order: layout "ampere" from `arrange` to the kernel, Q and K smoothed."""
    grid, heads = TokenGrid((3, 5, 6), text=7), 2
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, grid.tokens, heads, 40)), jnp.bfloat16) for _ in range(3))
    mask = BlockMask(jnp.asarray(keep_blocks("random", heads, *grid.blocks((64, 64)))), (64, 64))

    def solve(implementation):
        quant = QuantSpec("int4", "int4", smooth_q=True, packed=implementation == "ampere")
        plan = AttentionPlan.build(grid, order=["WHF", "FHW"], mask=mask, quant=quant)
        stored = [
            paro_arrange(x, plan=plan, role=role, implementation=implementation)
            for role, x in zip("qkv", (q, k, v), strict=True)
        ]
        return stored, attend(*stored, plan=plan, implementation=implementation, return_residual=True)

    with interpret("sm_80"):
        stored, found = solve("ampere")
    expected = solve("reference")[1]
    assert [x.values.shape[2:] for x in stored] == [(128, 32), (128, 32), (64, 64)]
    assert_close(found[0], expected[0], ROUNDING["bfloat16"] * float(jnp.abs(v).max()))
    assert_close(found[1], expected[1], 1e-3)


# ---- what is refused, and what is arithmetic ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device": "cpu"}, "device cpu is not served; it serves sm_80, sm_86, sm_89"),
        ({"device": "sm_75"}, "device sm_75 is not served"),
        ({"qk": "fp8"}, "qk width 'fp8' is not served; it serves bf16, int8, int4"),
        ({"pv": "fp8"}, "pv width 'fp8' is not served"),
        ({"dtype": "float64"}, "dtype float64 is not served"),
        ({"dtype": "float32"}, "float32 products are not served .*cast to bfloat16 or quantise"),
        ({"block": (64, 128)}, r"block \(64, 128\) is not served; it serves \(64, 64\), \(128, 64\), \(128, 128\)"),
        ({"head_dim": 129}, "head_dim 129 > 128"),
        ({"layout": "hopper"}, "layout 'hopper' is not served; it serves 'ampere', 'rows'"),
    ],
)  # fmt: skip
def test_a_refusal_names_what_is_in_the_way(changed, reason):
    assert ampere.why_not(REQUEST) is None
    with pytest.raises(NoBackend, match=reason):
        choose(replace(REQUEST, **changed), BACKENDS, "ampere")


def test_others_refuse_its_layout():
    for backend in BACKENDS:
        request = replace(REQUEST, layout="ampere", device="sm_90")
        assert (backend.why_not(request) is None) == (backend.name == "ampere")


def test_what_does_not_fit_its_layout_says_so(says):
    problem = Problem(**TINY, qk="int4", pv="int4", mask="ones")
    count, index = schedule(problem.keep)
    given = problem.operands | dict(count=count, index=index, block=(64, 64), scale=1.0, qk="int4", pv="int4")
    with says("head_dim", "1 to 128 real channels", "None"):
        block_attention(**given, layout="ampere", q_tokens=70, kv_tokens=130)
    with says("kv_tokens", "how many tokens are real", "None"):
        block_attention(**given, layout="ampere", head_dim=64, q_tokens=70)
    with says("q", "[1, 2, 128, 32]", "[1, 2, 70, 64]"):
        block_attention(**given, layout="ampere", head_dim=64, q_tokens=70, kv_tokens=130)
    with says("q_tokens", "None or 70", "got 69"):
        block_attention(**given, q_tokens=69)
    x = jnp.zeros((1, 70, 2, 64))
    for changed in (dict(width="fp8"), dict(block=32)):
        with says("layout", "a block of whole 64s", "bf16, int8, int4"):
            arrange(x, None, **dict(role="k", width="int8", group="row", block=64, layout="ampere") | changed)


def check_copies(request, tiles) -> None:
    """cp.async takes 16 bytes from an address that is a multiple of 16, and nothing below the GPU checks it: so is each
    row of K and V at any length, and each step's offset into it. Rows come by 32 of a warpgroup."""
    bq, bk = request.block
    for role, width, tokens in (("q", request.qk, 1), ("k", request.qk, 1001), ("v", request.pv, 1001)):
        rows, columns = ampere.stored_shape(role, width, tokens, request.head_dim, bq if role == "q" else bk)
        size = 2 if width == "bf16" else 1
        assert columns * size % 16 == 0 and rows % 32 == 0
    assert ampere.stored_bytes(tiles.keys, request.pv) % 16 == 0 and bk % tiles.keys == 0


def test_every_tile_fits_and_there_is_room_for_eight_warps():
    for device, (most, together) in ampere._SMEM.items():
        for head_dim in (1, *ampere.HEAD_DIMS):
            for block in ampere.BLOCKS:
                for qk, pv in PAIRS:
                    request = replace(REQUEST, device=device, head_dim=head_dim, block=block, qk=qk, pv=pv)
                    assert ampere.why_not(request) is None, request
                    for tiles in ampere.candidates(request):
                        assert ampere.shared_memory(request, tiles) <= most
                        check_copies(request, tiles)
                    programs = 8 // (4 * block[0] // ampere.ROWS)
                    beside = [
                        programs * (ampere.shared_memory(request, tiles) + 1024) <= together
                        for tiles in ampere.candidates(request)
                    ]
                    assert beside[0] or not any(beside), request


def held(layout, columns: int) -> dict[tuple[int, int, int], list[int]]:
    """(warp, lane, row) -> the columns of a [64, columns] array that this thread holds, by a Mosaic layout."""
    place = np.stack(np.meshgrid(np.arange(64), np.arange(columns), indexing="ij"), axis=-1)  # [64, n, (row, column)]
    for tile in layout.tiling.tiles:
        lead, n = place.shape[: -len(tile) - 1], len(tile)
        split = [extent for full, t in zip(place.shape[-n - 1 : -1], tile, strict=True) for extent in (full // t, t)]
        axes = [*range(len(lead)), *(len(lead) + 2 * i for i in range(n)), *(len(lead) + 2 * i + 1 for i in range(n))]
        place = place.reshape(*lead, *split, 2).transpose(*axes, -1 % (len(lead) + 2 * n + 1))
    rank = place.ndim - 1
    warp, lane = ([d % rank for d in dims if isinstance(d, int)] for dims in (layout.warp_dims, layout.lane_dims))
    rest = [d for d in range(rank) if d not in (*warp, *lane)]
    place = place.transpose(*warp, *lane, *rest, rank).reshape(4, 32, -1, 2)
    found: dict[tuple[int, int, int], list[int]] = {}
    for (w, t, i), row in np.ndenumerate(place[..., 0]):
        found.setdefault((w, t, int(row)), []).append(int(place[w, t, i, 1]))
    return {thread: sorted(c) for thread, c in found.items()}


@pytest.mark.parametrize("width", ampere.SERVED)
def test_the_key_order_is_that_of_the_registers(width):
    """By Mosaic's own layouts: a thread's scores, kept where they are, land at the operand's positions in key order."""
    from jax.experimental.mosaic.gpu.mma import MMALayouts

    dtype, keys = jnp.dtype(jnp.bfloat16 if width == "bf16" else jnp.int8), 64
    each = 2 if width == "int4" else 1  # positions a byte
    scores, operand = held(MMALayouts(dtype).acc, keys), held(MMALayouts(dtype).lhs, keys // each)
    assert scores.keys() == operand.keys() and len(scores) == 4 * 32 * 2
    order = (0, 1, 2, 3, 4, 5, 6, 7) if width == "bf16" else _fragments.key_order(width)
    for thread, columns in operand.items():
        positions = [each * c + i for c in columns for i in range(each)]
        assert scores[thread] == [len(order) * (p // len(order)) + order[p % len(order)] for p in positions]


def test_two_to_a_byte_and_back():
    x = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (3, 64)), jnp.int8)
    bytes_ = np.asarray(_fragments.packed(x)).astype(np.uint8)
    np.testing.assert_array_equal(
        bytes_ & 15, np.asarray(x[:, 0::2]).astype(np.uint8) & 15
    )  # the first is the low half
    np.testing.assert_array_equal(_fragments.unpacked(_fragments.packed(x)), x)
    np.testing.assert_array_equal(_fragments.unpacked(_fragments.packed(x), unsigned=True), x & 15)


@pytest.mark.parametrize("width", ["int8", "int4"])
def test_key_major_pads_transposes_permutes_and_packs(width):
    v = jnp.asarray(np.random.default_rng(0).integers(-7, 8, (1, 2, 70, 64)), jnp.int8)
    found = ampere.laid_out(v, "v", width, 64)
    assert found.shape[2:] == ampere.stored_shape("v", width, 70, 64, 64)
    found = np.asarray(_fragments.unpacked(found) if width == "int4" else found)
    order = _fragments.key_order(width)
    assert sorted(order) == list(range(len(order)))
    for position in range(128):
        key = len(order) * (position // len(order)) + order[position % len(order)]
        np.testing.assert_array_equal(found[:, :, :, position], v[:, :, key] if key < 70 else 0)


# ---- rung 3: the compiler -------------------------------------------------------------------------------------------

MADE_OF = {"bf16": {"HMMA.16816.F32.BF16"}, "int8": {"IMMA.16832.S8.S8"}}
FOURS = {"IMMA.16864.S4.S4", "IMMA.16864.U4.S4"}


def ahead(target: str, **changed) -> compile_report.Row:
    """The report's row of a length whose last keys are masked."""
    request = replace(REQUEST, q_tokens=1000, kv_tokens=1000, heads=2, device=target, **changed)
    return compile_report.measure(str(request), request, target)


AHEAD = [
    ("sm_80", "bf16", "bf16", 128, (128, 128)),
    ("sm_80", "int8", "bf16", 128, (128, 128)),
    ("sm_80", "int8", "int4", 128, (128, 128)),
    ("sm_80", "bf16", "int8", 128, (128, 128)),
    ("sm_80", "int4", "int8", 128, (128, 128)),
    ("sm_86", "int4", "int4", 96, (128, 64)),
    ("sm_89", "int8", "int8", 64, (64, 64)),
    ("sm_86", "bf16", "int4", 64, (64, 64)),
    ("sm_86", "int8", "int8", 128, (128, 128)),
    ("sm_89", "int4", "int4", 128, (128, 128)),
    ("sm_89", "bf16", "bf16", 128, (128, 128)),
]


@pytest.mark.compile
@pytest.mark.parametrize(("target", "qk", "pv", "head_dim", "block"), AHEAD, ids=str)
def test_compiles_without_spills_to_the_intended_instructions(target, qk, pv, head_dim, block):
    row = ahead(target, qk=qk, pv=pv, head_dim=head_dim, block=block)
    assert row["spills"] == 0
    assert row["shared_memory"] <= ampere._SMEM[target][0]
    assert row["instructions"]["conversion"] == 0
    kinds = {op.removesuffix(".SAT") for op in row["tensor_instructions"]}
    widths = {qk, pv}
    assert kinds <= set().union(*(MADE_OF.get(width, FOURS) for width in widths))
    assert (widths == {"int4"}) == (kinds <= FOURS)


@pytest.mark.compile
def test_delta_compiles_without_spills():
    row = ahead("sm_80", qk="int4", pv="int4", head_dim=128, block=(128, 128), features=("delta",))
    assert row["spills"] == 0 and set(row["tensor_instructions"]) <= FOURS


@pytest.mark.compile
@pytest.mark.parametrize(("width", "bound"), [("int8", 1.5), ("int4", 2.5)])
def test_the_integer_loop_keeps_its_bound(width, bound):
    """Issue slots, shared memory, exponentials and the rest against the tensor unit, 128 channels on an A100."""
    row = ahead("sm_80", qk=width, pv=width, head_dim=128, block=(128, 128))
    assert row["spills"] == 0 and row["instructions"]["conversion"] == 0
    assert set(row["tensor_instructions"]) <= (FOURS if width == "int4" else MADE_OF[width])
    assert row["bound_ratio_every"] <= bound


# ---- rung 4: the GPU ------------------------------------------------------------------------------------------------


@pytest.fixture
def ampere_here():
    if device_name() not in ampere.DEVICES:
        pytest.skip(f"needs one of {', '.join(ampere.DEVICES)}, this is {device_name()}")


@pytest.mark.gpu
@pytest.mark.usefixtures("ampere_here")
@pytest.mark.parametrize("lengths", [(1, 1), (128, 128), (200, 450), (1030, 770)], ids=str)
@pytest.mark.parametrize("block", ampere.BLOCKS, ids=str)
@pytest.mark.parametrize("head_dim", ampere.HEAD_DIMS)
@pytest.mark.parametrize("widths", PAIRS, ids="-".join)
def test_gpu_is_the_reference(widths, head_dim, block, lengths):
    qk, pv = widths
    dtype = "bfloat16" if "bf16" in widths else "float32"
    problem = Problem(
        q_tokens=lengths[0], kv_tokens=lengths[1], head_dim=head_dim, block=block, dtype=dtype, qk=qk, pv=pv
    )
    check_where_exponentials_differ(problem, "ampere")


@pytest.mark.gpu
@pytest.mark.usefixtures("ampere_here")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("widths", [("bf16", "bf16"), ("int8", "int8"), ("int4", "int4")], ids="-".join)
def test_gpu_masks_groups_and_repeats(widths, mask):
    qk, pv = widths
    problem = Problem(
        batch=2, q_tokens=450, kv_tokens=450, mask=mask, qk=qk, pv=pv, q_group="block", k_group="row", v_group="block",
        p_scale="running", head_dim=128, dtype="bfloat16" if "bf16" in widths else "float32",
    )  # fmt: skip
    check_where_exponentials_differ(problem, "ampere")
    for a, b in zip(problem.solve("ampere"), problem.solve("ampere"), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.gpu
@pytest.mark.usefixtures("ampere_here")
@pytest.mark.parametrize("smooth_q", [False, True])
def test_gpu_through_a_plan(smooth_q):
    """From model order to model order at four bits, by both of the backend's kernels and by the reference."""
    grid, heads = TokenGrid((5, 9, 11), text=7), 3
    q, k, v = (jax.random.normal(jax.random.key(i), (2, grid.tokens, heads, 64), jnp.bfloat16) for i in range(3))
    mask = BlockMask(jnp.asarray(keep_blocks("random", heads, *grid.blocks((128, 128)))), (128, 128))
    quant = QuantSpec("int4", "int4", smooth_q=smooth_q)
    plan = AttentionPlan.build(grid, order=["WHF", "FHW", "HWF"], mask=mask, quant=quant)
    found, expected = (attention(q, k, v, plan=plan, implementation=name) for name in ("ampere", "reference"))
    apart = jnp.abs(found.astype(jnp.float32) - expected.astype(jnp.float32))
    assert float(apart.mean()) < 1e-3 * float(jnp.abs(v).max())
