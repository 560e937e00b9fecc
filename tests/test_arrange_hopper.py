"""arrange on Hopper on four rungs: reference, interpreter with race detection, ahead-of-time compile, a GPU itself."""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    NoBackend,
    Norm,
    Rope,
    arrange,
    block_attention,
    choose,
    compile_report,
    interpret,
)
from pallas_kernels._choose import KERNEL_WIDTHS
from pallas_kernels.arrange import BACKENDS, _lanes, mosaic
from pallas_kernels.block_attention.hopper import HEAD_DIMS
from pallas_kernels.workloads import WORKLOADS
from paro_jax import AttentionPlan, BlockMask, QuantSpec, TokenGrid, attend, attention
from paro_jax import arrange as paro_arrange

REQUEST = replace(WORKLOADS["cogvideox_5b"], op="arrange", device="sm_90", role="k")


@dataclass(frozen=True)
class Case:
    """One call of arrange, made from a seed."""

    role: str = "q"
    width: str = "int8"
    group: str = "row"
    layout: str = "rows"
    norm: str | None = None
    rope: bool = False
    mean: str | None = None  # None, "compute", "head" ([H, D]) or "batch" ([B, H, D])
    batch: int = 1
    tokens: int = 70
    heads: int = 2
    head_dim: int = 64
    block: int = 64
    dtype: str = "bfloat16"
    permuted: bool = True

    def __str__(self) -> str:
        changed = [f"{v}" for k, v in vars(self).items() if v != getattr(Case, k)]
        return "-".join([self.role, self.width, *(c for c in changed if c not in (self.role, self.width))])

    @cached_property
    def arrays(self) -> tuple[jax.Array, jax.Array | None, dict[str, Any]]:
        """(x, slots, options); a channel and a token of zeros, and three tokens that RoPE leaves."""
        rng = np.random.default_rng(0)
        n, h, d = self.tokens, self.heads, self.head_dim
        x = rng.normal(size=(self.batch, n, h, d)) * rng.uniform(0.1, 3.0, size=(h, d))
        x[..., 5], x[:, n // 2] = 0.0, 0.0
        angle = rng.normal(size=(n, d // 2))
        angle[:3] = 0.0
        slots = jnp.asarray([rng.permutation(n) for _ in range(h)], jnp.int32) if self.permuted else None
        scale, bias = rng.normal(size=(h, d)), rng.normal(size=d)
        shape = {"head": (h, d), "batch": (self.batch, h, d)}.get(self.mean or "")
        options = dict(
            role=self.role, width=self.width, group=self.group, block=self.block, layout=self.layout,
            norm=Norm(self.norm, jnp.asarray(scale, jnp.float32), jnp.asarray(bias, self.dtype)) if self.norm else None,
            rope=Rope(*(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))) if self.rope else None,
            mean=jnp.asarray(rng.normal(size=shape), jnp.float32) if shape else self.mean,
        )  # fmt: skip
        return jnp.asarray(x, self.dtype), slots, options

    def solve(self, implementation: str) -> tuple[Any, Any, Any]:
        x, slots, options = self.arrays
        return arrange(x, slots, **options, implementation=implementation)


def check(case: Case, found: tuple[Any, Any, Any]) -> None:
    """The reference's values, but for ratios so near to a half that float32's rounding of a division decides."""
    expected = case.solve("reference")
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
    a, b = (np.asarray(y[0], np.float32) for y in (found, expected))
    size = jnp.finfo(case.dtype).eps if case.width == "bf16" else 1 / 8
    level = 16.0 if case.width == "int4" and case.layout == "hopper" and case.role != "q" else 1.0
    apart = level if case.width in ("int8", "int4") else 2 * float(size) * np.abs(b) + 2.0**-9
    # A float32 norm or mean summed in another order moves its result in the last bits.
    summed = case.norm is not None or case.mean == "compute"
    assert (np.abs(a - b) <= (apart if case.width != "bf16" or summed or case.rope else 0)).all()
    assert (a != b).sum() <= 2 + a.size * (0.2 if case.width == "bf16" and case.dtype == "float32" else 2e-3)
    for a, b in zip(found[1:], expected[1:], strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=2e-6 if summed or case.rope else 2e-7, atol=1e-6 if summed else 0)


# ---- rungs 1 and 2: the reference, in the interpreter, races detected -----------------------------------------------


def cases() -> list[Case]:
    """Every role at every width, group and layout; norms, RoPE, means, head dims, lengths and dtypes take turns."""
    every = []
    for role, groups in (("q", ("row", "block")), ("k", ("row", "block")), ("v", ("channel", "block"))):
        for group in groups:
            for width in KERNEL_WIDTHS:
                layouts = ("rows", "hopper") if role == "v" and width != "bf16" else ("rows",)
                every += [Case(role, width, group, layout) for layout in layouts]
    turns = dict(
        norm=(None, "rms", "layer"), tokens=(70, 64, 130, 1, 33), head_dim=(64, 128, 40, 96, 64, 256, 64),
        dtype=("bfloat16", "float32", "bfloat16", "float16"), block=(64, 128), permuted=(True, True, False),
    )  # fmt: skip
    for i, case in enumerate(every):
        turn = {name: values[i % len(values)] for name, values in turns.items()}
        if case.role == "v":
            turn["norm"] = None if i % 2 else turn["norm"]
        mean = (None, "compute", "head", "batch")[i % 4] if case.role == "k" else None
        layout = "hopper" if case.role != "v" and i % 3 == 0 else case.layout
        every[i] = replace(case, **turn, rope=i % 2 == 0, mean=mean, layout=layout, batch=2 if i % 8 == 3 else 1)
    return every


@pytest.mark.parametrize("case", cases(), ids=str)
def test_interpreted_is_the_reference(case):
    with interpret():
        found = jax.block_until_ready(case.solve("hopper"))
    check(case, found)


def test_a_list_that_points_outside_reads_nothing_outside():
    """Traced, so nothing before the launch can catch it; the interpreter gives NaN for a read out of bounds."""
    x, slots, options = Case(width="bf16", tokens=70).arrays

    @jax.jit
    def call(slots):
        return arrange(x, slots, **options, implementation="hopper")[0]

    with interpret():
        wild = call(jnp.where(slots % 2 == 0, 10**6, -5))
        last = call(jnp.where(slots % 2 == 0, 69, 0))
    np.testing.assert_array_equal(np.asarray(wild, np.float32), np.asarray(last, np.float32))


def test_the_gradient_is_that_of_xla():
    case = Case("k", "bf16", norm="layer", rope=True, mean="compute", tokens=33, dtype="float32")
    x, slots, options = case.arrays

    def gradients(implementation):
        def loss(x, norm):
            values, _, mean = arrange(x, slots, **options | {"norm": norm}, implementation=implementation)
            return jnp.sin(values).sum() + (mean**2).sum()

        return jax.grad(loss, (0, 1))(x, options["norm"])

    with interpret():
        found = gradients("hopper")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradients("xla")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_nan_stays_visible_in_its_group():
    case = Case("v", "int8", "block", layout="hopper", tokens=70)
    x, slots, options = case.arrays
    x = x.at[0, 7, 1, 2].set(jnp.nan)
    with interpret():
        _, scales, _ = arrange(x, slots, **options, implementation="hopper")
    expected = np.zeros(scales.shape, bool)
    expected[0, 1, int(np.flatnonzero(np.asarray(slots[1]) == 7)[0]) // 64, 2] = True
    np.testing.assert_array_equal(np.isnan(scales), expected)


@pytest.mark.parametrize(("qk", "pv", "head_dim"), [("int8", "int4", 64), ("bf16", "fp8", 40)])
def test_attention_reads_what_arrange_wrote(qk, pv, head_dim):
    """In the layout that the two kernels share, bit for bit the output from rows."""
    q, k, v = (Case(role, width, group, tokens=130, head_dim=head_dim, heads=1)
               for role, width, group in (("q", qk, "row"), ("k", qk, "block"), ("v", pv, "channel")))  # fmt: skip
    count, index = jnp.asarray([[3, 1, 2]], jnp.int32), jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32), (1, 3, 3))

    def attend(layout, head_dim=None):
        stored = {}
        for name, case in (("q", q), ("k", k), ("v", v)):
            stored[name], scale, _ = replace(case, layout=layout).solve("hopper")
            if scale is not None:
                stored[f"{name}_scale"] = scale
        return block_attention(
            **stored, count=count, index=index, block=(64, 64), scale=0.3, qk=qk, pv=pv, layout=layout,
            head_dim=head_dim, out_dtype=jnp.bfloat16, implementation="hopper",
        )  # fmt: skip

    with interpret():
        found, expected = attend("hopper", head_dim), attend("rows")
    assert found.shape == (1, 130, 1, head_dim)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_a_layout_of_another_backend_is_refused(name):
    q = jnp.zeros((1, 1, 64, 64), jnp.bfloat16)
    count, index = jnp.ones((1, 1), jnp.int32), jnp.zeros((1, 1, 1), jnp.int32)
    call = partial(block_attention, q, q, q, count, index, block=(64, 64), scale=1.0, layout="hopper")
    with pytest.raises(NoBackend, match=f"{name}: layout 'hopper' is not served; it serves 'rows'"):
        call(implementation=name)
    with pytest.raises(ValueError, match=r"head_dim: expected None or at most the 64 channels of q.*got 65"):
        call(head_dim=65)
    with pytest.raises(ValueError, match="q: expected 64, 96, 128, 256 channels for layout 'hopper', got 32"):
        block_attention(*[x[..., :32] for x in (q, q, q)], count, index, block=(64, 64), scale=1.0, layout="hopper")


def test_a_plan_reaches_both_kernels_by_one_name():
    """attention(implementation="hopper") arranges and attends in the layout that the two kernels share."""
    rng = np.random.default_rng(0)
    grid = TokenGrid((2, 6, 5), text=7)
    q, k, v = (jnp.asarray(rng.normal(size=(1, grid.tokens, 2, 40)), jnp.bfloat16) for _ in range(3))
    mask = BlockMask(jnp.asarray(rng.random((2, 2, 2)) < 0.7).at[:, :, 0].set(True), (64, 64))
    plan = AttentionPlan.build(grid, order=["WHF", "FHW"], mask=mask, quant=QuantSpec("int8", "int8"))
    with interpret():
        found, lse = attention(q, k, v, plan=plan, implementation="hopper", return_residual=True)
        blocks = [
            paro_arrange(x, plan=plan, role=r, implementation="hopper") for r, x in (("q", q), ("k", k), ("v", v))
        ]
        again = attend(*blocks, plan=plan)
    expected, expected_lse = attention(q, k, v, plan=plan, implementation="reference", return_residual=True)
    assert {x.layout for x in blocks} == {"hopper"} and blocks[2].values.shape == (1, 2, 64, 128)
    largest = float(jnp.abs(v.astype(jnp.float32)).max())
    for o in (found, again):
        assert np.abs(np.asarray(o, np.float32) - np.asarray(expected, np.float32)).max() <= 2e-2 * largest
    level = float(jnp.abs(q).max()) / 127 * float(jnp.abs(k).max()) * 40**-0.5  # where one value of q rounds otherwise
    np.testing.assert_allclose(lse, expected_lse, atol=level)
    rows = paro_arrange(v, plan=plan, role="v")
    with pytest.raises(ValueError, match="v was arranged with layout 'rows'; attend .* expects layout 'hopper'"):
        attend(*blocks[:2], rows, plan=plan)


# ---- what is refused, and what is arithmetic ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device": "cpu"}, "device cpu is not sm_90"),
        ({"device": "sm_80"}, "device sm_80 is not sm_90"),
        ({"dtype": "float64"}, "dtype float64 is not served; it serves float32, bfloat16, float16"),
        ({"head_dim": 264}, "head_dim 264 > 256"),
        ({"head_dim": 68}, "head_dim 68 is no multiple of 8"),
        ({"block": (64, 32)}, "block of 32 key tokens is not served; it serves 64, 128"),
        ({"block": (96, 64)}, "block of 96 query tokens is not served; it serves 64, 128"),
        ({"heads": 1, "head_dim": 256, "kv_tokens": 2**20}, "1048576 tokens .* are more than 65535 programs of 16"),
        ({"batch": 64}, r"2\^31 or more are beyond an int32 address; split the batch"),
    ],
)  # fmt: skip
def test_a_refusal_names_what_is_in_the_way(changed, reason):
    assert mosaic.why_not(REQUEST) is None
    with pytest.raises(NoBackend, match=reason):
        choose(replace(REQUEST, **changed), BACKENDS, "hopper")


def test_it_serves_only_when_it_is_named():
    assert choose(REQUEST, BACKENDS).name == "xla"
    assert choose(REQUEST, BACKENDS, "hopper").name == "hopper"


def test_the_interpreter_refuses_what_would_hang_it(monkeypatch):
    monkeypatch.delenv("NPROC")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with interpret():
        assert mosaic.why_not(replace(REQUEST, batch=1, heads=2, q_tokens=130, kv_tokens=130)) is None
        assert "needs 4 threads" in str(mosaic.why_not(REQUEST))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(layout="volta"), "layout: expected 'rows' or 'hopper' or 'hopper_packed' or 'ampere', got 'volta'"),
        (dict(layout="hopper", block=24), "layout: expected head_dim at most 256 and a block of whole 16s"),
    ],
)
def test_a_layout_that_does_not_exist_is_the_callers_mistake(options, message):
    x, slots, given = Case("v", "int8", "channel").arrays
    with pytest.raises(ValueError, match=message):
        arrange(x, slots, **given | options)


@pytest.mark.parametrize("case", [case for case in cases() if case.layout == "rows"][:12], ids=str)
def test_every_input_is_read_once_and_every_output_written_once(case, monkeypatch):
    """The bytes that the documentation promises are those of the arrays that the launches get and give."""
    launches = []
    launch = mosaic._Call.launch

    def counted(call, arrays, out):
        launches.append((call, {**arrays}, out))
        return launch(call, arrays, out)

    monkeypatch.setattr(mosaic._Call, "launch", counted)
    case = replace(case, head_dim=64, tokens=128, permuted=True)
    x, slots, options = case.arrays
    names = ("role", "width", "group", "block", "layout")
    mean = None if case.mean == "compute" else options["mean"]
    call = mosaic._Options(**{name: options[name] for name in names}, compute_mean=case.mean == "compute")
    jax.eval_shape(partial(mosaic._forward, call), x, slots, options["norm"], options["rope"], mean)
    request = replace(REQUEST, batch=case.batch, heads=2, q_tokens=128, kv_tokens=128, head_dim=64, dtype=case.dtype,
                      block=(case.block, case.block), role=case.role)  # fmt: skip
    promised = mosaic.bytes_moved(
        request, width=case.width, group=case.group, rope=case.rope, compute_mean=case.mean == "compute"
    )

    def size(array):
        return int(np.prod(array.shape)) * jnp.dtype(array.dtype).itemsize

    per_head = case.batch * 2  # how often the launch reads what it shares between heads, or its lists between batches

    def read(arrays):
        times = {"x": 1, "slots": case.batch, "cos": per_head, "sin": per_head}
        return sum(times[name] * size(array) for name, array in arrays.items() if name in times)

    *first, (_, arrays, out) = launches
    assert promised["read"] == read(arrays) and promised["written"] == sum(map(size, out))
    assert promised["first"] == sum(read(arrays) + sum(map(size, out)) for _, arrays, out in first)
    assert len(first) == (case.mean == "compute") + (case.group == "channel" and case.width != "bf16")
    programs = {call.tiles.tokens * call.programs for call, _, _ in launches}
    assert all(128 <= covered < 128 + 256 for covered in programs)  # tiles cover the tokens, and once


def placed(layout: Any, shape: tuple[int, ...]) -> np.ndarray:
    """[register, warp, lane, element, (row, column)] of an array, by Mosaic's own layout."""
    layout = layout.to_mgpu()
    place = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    for tile in layout.tiling.tiles:
        lead, n = place.shape[: -len(tile) - 1], len(tile)
        split = [extent for full, t in zip(place.shape[-n - 1 : -1], tile, strict=True) for extent in (full // t, t)]
        axes = [*range(len(lead)), *(len(lead) + 2 * i for i in range(n)), *(len(lead) + 2 * i + 1 for i in range(n))]
        place = place.reshape(*lead, *split, 2).transpose(*axes, -1 % (len(lead) + 2 * n + 1))
    rank = place.ndim - 1
    warps, threads, element = ([d % rank for d in ds] for ds in (layout.warp_dims, layout.lane_dims, (-1,)))
    registers = [d for d in range(rank) if d not in (*warps, *threads, *element)]
    return place.transpose(*registers, *warps, *threads, *element, rank).reshape(-1, 4, 32, layout.vector_length, 2)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_registers_hold_what_the_inline_code_takes_them_for(dim):
    """What the interpreter cannot see: which values of which threads a gather, a rotation and a transposition join."""
    for lanes, rows in ((_lanes.rows(dim, 8), 64), (_lanes.rows(dim, 4), 64), (_lanes.columns(), 16)):
        tile, pairs = placed(lanes.tile, (rows, dim)), placed(lanes.pairs, (rows, dim // 2))
        for place in (tile, pairs):  # side by side in a thread: side by side in a row of memory
            assert (np.diff(place[..., 0], axis=3) == 0).all() and (np.diff(place[..., 1], axis=3) == 1).all()
        np.testing.assert_array_equal(tile[..., 0::2, :], pairs * [1, 2])
    lanes = _lanes.columns()
    tile = placed(lanes.tile, (16, dim)).reshape(dim // 16, 4, 32, 2, 2)
    transpose = placed(lanes.transpose, (dim, 64)).reshape(dim // 16, 2, 4, 32, 4, 2)
    for channel, part in np.ndindex(2, 4):
        row, column = (tile[..., channel, axis] for axis in (0, 1))
        np.testing.assert_array_equal(transpose[:, channel, ..., part, 0], column)
        np.testing.assert_array_equal(transpose[:, channel, ..., part, 1], 4 * row + part)


# ---- rung 3: the compiler -------------------------------------------------------------------------------------------

AHEAD = {
    "q int8, 64": dict(role="q", qk="int8"),
    "k int8, 128": dict(role="k", qk="int8", head_dim=128, block=(128, 128)),
    "k bf16, 96": dict(role="k", head_dim=96),
    "k fp8, 256": dict(role="k", qk="fp8", head_dim=256),
    "v int8, 64": dict(role="v", pv="int8", layout="hopper"),
    "v fp8, 128": dict(role="v", pv="fp8", head_dim=128, layout="hopper"),
}


@pytest.mark.compile
@pytest.mark.parametrize("case", AHEAD)
def test_compiles_without_spills_and_below_the_memory(case):
    request = replace(REQUEST, q_tokens=1001, kv_tokens=1001, heads=2, **AHEAD[case])
    row = compile_report.measure(case, request, "sm_90a")
    assert row["spills"] == 0 and 0 < row["registers"] <= 255
    assert row["bound_ratio"] == 1  # what it computes takes less than what it moves


# ---- rung 4: the GPU ------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper_here")
@pytest.mark.parametrize("tokens", [1, 64, 1030])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_gpu_is_the_reference(case, tokens):
    case = replace(case, tokens=tokens)
    check(case, case.solve("hopper"))
    for a, b in zip(case.solve("hopper"), case.solve("hopper"), strict=True):
        if a is not None:
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
