"""The Hopper kernel on four rungs: reference, interpreter with race detection, ahead-of-time compile, a GPU itself."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import hopper_numbers, integers
from problems import (
    AXES,
    MASKS,
    PAIRS,
    Problem,
    assert_close,
    assert_covered,
    bounds,
    check,
    check_where_exponentials_differ,
    covering,
    covering_rows,
    problem_of,
    row_id,
    schedule,
)

from pallas_kernels import NoBackend, _registers, block_attention, choose, compile_report, device_name, interpret
from pallas_kernels.block_attention import BACKENDS, hopper
from pallas_kernels.workloads import WORKLOADS

REQUEST = replace(WORKLOADS["cogvideox_5b"], device="sm_90")


# ---- rungs 1 and 2: the reference, in the interpreter, races detected -----------------------------------------------

TINY = dict(heads=2, q_tokens=70, kv_tokens=130, head_dim=64)


@pytest.mark.parametrize("row", covering_rows())
def test_interpreted_is_the_reference(row):
    problem = problem_of(**row)
    with interpret():
        if problem.qk == "fp8" and problem.pv != "bf16":  # float scores, summed in another order, beside a rounded P
            check_where_exponentials_differ(problem, "hopper")
        else:
            check(problem, "hopper", hopper_numbers(problem))


def test_two_runs_give_equal_bits():
    for widths in (dict(qk="int8", pv="int8"), dict(dtype="bfloat16")):
        problem = Problem(**TINY | widths, mask="empty rows")
        with interpret():
            first, second = problem.solve("hopper"), problem.solve("hopper")
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_however_large_the_factor_of_integer_scores():
    """One step of an integer score is a million halvings: each row is its largest score's keys."""
    problem = Problem(**TINY, qk="int8", pv="int8", mask="ones", block=(128, 64))
    large = dict(q_scale=1e9 * problem.operands["q_scale"])
    with interpret():
        for p_scale in ("block", "running"):
            found, expected = (problem.solve(name, p_scale=p_scale, **large)[0] for name in ("hopper", "reference"))
            assert_close(found, expected, bounds(problem)[0])


def test_an_output_summed_across_blocks_is_rounded_by_rises_alone():
    """Every block's maximum is above the one before, so the int32 sums of P @ V are rounded as often as can be."""
    problem = Problem(**TINY | dict(kv_tokens=320, heads=1), qk="int8", pv="int8", mask="ones", p_scale="running")
    with interpret():
        found = problem.solve("hopper")[0]
    largest = float(np.abs(np.asarray(problem.qkv[2])).max())
    assert_close(found, integers(problem, 0)[0], (0.5 / 127**2 + 1e-6) * largest)


@pytest.mark.parametrize(
    ("changed", "cubics", "bound"),
    [
        (dict(qk="int8", pv="int8", block=(128, 128)), 4, 1e-4),
        (dict(qk="int8", pv="int8", block=(128, 128), p_scale="running"), 8, 1e-4),
        (dict(qk="int8", pv="int8", block=(64, 64), head_dim=128), 0, 1e-4),
        (dict(qk="int4", pv="int4", block=(128, 128), head_dim=96), 2, 1e-4),
        (dict(qk="int4", pv="int8", block=(128, 64), p_scale="running"), 0, 1e-4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("factor", [1.0, 300.0])
def test_the_same_integers(changed, cubics, bound, factor):
    """Those of an emulation that knows the kernel's roundings, number by number: each P is the same integer.

    bound: of max |v|; what rounding the sum of P @ V beside MAGIC costs, most where a row sums few levels. Factor 300:
    scores so large that differences are taken first.
    """
    problem = Problem(**TINY | dict(heads=1, kv_tokens=300, mask="random") | changed)
    large = dict(q_scale=factor * problem.operands["q_scale"])
    with interpret():
        o, lse = jax.block_until_ready(problem.solve("hopper", **large))
    same = integers(problem, cubics, **large)
    assert_close(o, same[0], bound * float(np.abs(np.asarray(problem.qkv[2])).max()))
    assert_close(lse, same[1], 1e-5 * factor)


@pytest.mark.parametrize("tiles", [hopper.Tiles(64, 2, 0, 2), hopper.Tiles(64, 1, 0, 1)], ids=["ahead", "one by one"])
def test_a_program_does_one_item_after_another(tiles, monkeypatch):
    """Five items on two programs: queries, stages and barriers come round again, the last item has one list, and a
    list has no step at all."""
    monkeypatch.setattr(hopper, "candidates", lambda request: (tiles,))
    tokens = 520 + tiles.stages  # traced for these tiles alone
    problem = Problem(
        heads=1, q_tokens=tokens, kv_tokens=150, head_dim=64, qk="int8", pv="int8", mask="empty rows", block=(64, 64)
    )
    with interpret():
        found = jax.block_until_ready(problem.solve("hopper"))
    largest = float(np.abs(np.asarray(problem.qkv[2])).max())
    for a, b, bound in zip(found, integers(problem, 0), (1e-4 * largest, 1e-5), strict=True):
        assert_close(a, b, bound)


@pytest.mark.parametrize("p_scale", ["block", "running"])
def test_those_integers_are_the_reference_s_but_for_ties(p_scale):
    """The emulation against the oracle: one P in a hundred lies so near a half that its row's rounding decides."""
    for widths in (dict(qk="int8", pv="int8"), dict(qk="int4", pv="int4")):
        problem = Problem(**TINY | widths, mask="random", block=(128, 128), p_scale=p_scale)
        (o, lse), (wanted, wanted_lse) = integers(problem, 4), problem.solve("reference")
        largest, step = float(np.abs(np.asarray(problem.qkv[2])).max()), {"int8": 1 / 127, "int4": 1 / 15}[problem.pv]
        assert np.abs(o - wanted).max() <= step * largest  # one level of P, of a sum that is at least one
        assert np.abs(o - wanted).mean() <= step / 100 * largest
        assert np.abs(lse - wanted_lse).max() <= step


def test_a_small_float16_is_a_whole_number():
    """What `pack` does by one instruction for two scores, here by NumPy's float16: rounded to nearest, half to even."""
    levels = np.concatenate([np.arange(0, 127.5, 0.25), np.random.default_rng(0).uniform(0, 127, 1000)])
    small = (levels * _registers.LEVEL).astype(np.float32).astype(np.float16)
    np.testing.assert_array_equal(small.view(np.uint16), np.rint(levels))


def test_the_cubic():
    """Relative error 7.5e-5, a hundredth of a level of P; and no number so small that a compiler may flush it."""
    x = np.linspace(-100, 7, 100_001, dtype=np.float32)
    np.testing.assert_allclose(_registers.exp2_cubic(jnp.asarray(x)), np.exp2(x.astype(np.float64)), rtol=7.6e-5)
    nothing = _registers.exp2_cubic(jnp.asarray([-126.5, -1e6, -1e38, -np.inf], jnp.float32))
    assert (np.round(np.asarray(nothing) / _registers.LEVEL) == 0).all() and (np.asarray(nothing) > 2.0**-126).all()


@pytest.mark.parametrize("shared", [0, 2, 4, 8])
def test_exponentials_are_shared_evenly(shared):
    x = jnp.asarray(np.random.default_rng(0).uniform(-20, 0, (64, 128)), jnp.float32)
    found = np.asarray(_registers.exp2(x, shared, interpreted=True))
    by_cubic = (found == np.asarray(_registers.exp2_cubic(x))).all(axis=0)
    assert by_cubic.sum() == 2 * shared  # of 128 columns; a thread has 2 of each 8, in two rows
    np.testing.assert_allclose(found, np.exp2(np.asarray(x, np.float64)), rtol=7.6e-5)


def test_the_rest_of_a_rounded_product():
    """Against float64, which holds the product of two float32 exactly."""
    rng = np.random.default_rng(0)
    a = (_registers.MAGIC + rng.integers(-(2**21), 2**21, 1000)).astype(np.float32)
    b = np.exp2(rng.uniform(-30, 6, 1000)).astype(np.float32)
    rest = jax.jit(_registers.product_error)(a, b, -(a * b))
    np.testing.assert_array_equal(rest, a.astype(np.float64) * b - (a * b))


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
    small, large = (replace(REQUEST, batch=1, heads=2, q_tokens=n, kv_tokens=n) for n in (130, 4096))
    monkeypatch.delenv("NPROC")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert hopper.why_not(large) is None
    with interpret():
        assert hopper.why_not(small) is None
        refused = str(hopper.why_not(large))
        assert "needs 4 threads for arrays of 98304 bytes and more, XLA has 2 here; set NPROC=8" in refused
        monkeypatch.setenv("NPROC", "8")
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

MADE_OF = {"bf16": "HGMMA", "fp8": "QGMMA", "int8": "IGMMA"}  # the tensor instruction of a width's products
# Every pair of widths at 128 channels and the largest block, where registers are shortest; each pair at each other
# head_dim, with blocks and a tail of keys in turn. int4 is the code of int8, other head dims that of the next.
PAIRS_AHEAD = [pair for pair in PAIRS if "int4" not in pair]
AHEAD = covering(widths=PAIRS_AHEAD, head_dim=(64, 96, 256), block=hopper.BLOCKS, tokens=(1001, 1024))
AHEAD += covering(widths=PAIRS_AHEAD, head_dim=(128,), block=((128, 128),), tokens=(1001,))
AHEAD += covering(widths=PAIRS_AHEAD[::4], head_dim=(128,), block=((64, 64), (128, 64)), tokens=(1024,))


def ahead(tokens=1001, **changed) -> compile_report.Row:
    """The report's row; of 1001 tokens, no multiple of anything, the last keys are masked."""
    request = replace(REQUEST, q_tokens=tokens, kv_tokens=tokens, heads=2, **changed)
    return compile_report.measure(str(request), request, "sm_90a")


def test_what_is_compiled_meets_in_pairs():
    at = {"widths": PAIRS_AHEAD, "head_dim": (64, 96, 128, 256), "block": hopper.BLOCKS}
    assert_covered(AHEAD, at)


@pytest.mark.compile
@pytest.mark.parametrize("row", AHEAD, ids=row_id)
def test_compiles_to_the_intended_instruction(row):
    """Without spills up to 128 channels; at 256 the accumulator alone is more registers than a thread has left."""
    (qk, pv), dim = row["widths"], row["head_dim"]
    made = ahead(qk=qk, pv=pv, head_dim=dim, block=row["block"], tokens=row["tokens"])
    assert made["spills"] == 0 or dim == 256
    assert {op.split(".")[0] for op in made["tensor_instructions"]} == {MADE_OF[qk], MADE_OF[pv]}


@pytest.mark.compile
@pytest.mark.parametrize("p_scale", ["block", "running"])
@pytest.mark.parametrize(("head_dim", "bound"), [(128, 1.15), (64, 1.95)])
def test_the_integer_loop_keeps_its_bound(head_dim, bound, p_scale):
    """Issue slots, exponentials and the rest against the tensor unit: what a step needs where no maximum rises."""
    row = ahead(qk="int8", pv="int8", head_dim=head_dim, block=(128, 128), p_scale=p_scale)
    assert row["spills"] == 0
    assert row["instructions"]["conversion"] == 0
    # Two scores an instruction round and pack P; the output of a block becomes floats, 128 rows of it.
    output = 0 if p_scale == "running" else 128 * head_dim
    assert row["instructions"]["pack"] == (128 * 128 / 2 + output) / 32
    assert row["bound_ratio"] <= bound


# ---- rung 4: the GPU ------------------------------------------------------------------------------------------------


# The classes of TOKENS, long enough for a ring of stages to come round many times.
LONG = ((1024, 512), (777, 777), (1030, 770), (64, 64), (1, 1))
FOUR = {name: AXES[name] for name in ("widths", "head_dim", "block")} | {"tokens": LONG}
EVERY = [dict(zip(FOUR, row, strict=True)) for row in itertools.product(*FOUR.values())]


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper_here")
@pytest.mark.parametrize("row", EVERY, ids=row_id)
def test_gpu_is_the_reference(row):
    problem = problem_of(**row, heads=2)
    check_where_exponentials_differ(problem, "hopper", hopper_numbers(problem))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper_here")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("widths", PAIRS, ids="-".join)
def test_gpu_masks_groups_and_repeats(widths, mask):
    qk, pv = widths
    problem = Problem(
        batch=2, q_tokens=450, kv_tokens=450, mask=mask, qk=qk, pv=pv, q_group="block", k_group="row", v_group="block",
        p_scale="running", head_dim=128, dtype="bfloat16" if "bf16" in widths else "float32",
    )  # fmt: skip
    check_where_exponentials_differ(problem, "hopper")
    for a, b in zip(problem.solve("hopper"), problem.solve("hopper"), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
