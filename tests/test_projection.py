"""One kernel from projection to blocks: the oracle in the interpreter, races detected; then the compiler."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_arrange_hopper import placed

from pallas_kernels import Norm, Rope, compile_report, interpret
from pallas_kernels._check import WIDTHS
from pallas_kernels.arrange import _lanes, projection, reference
from pallas_kernels.arrange.projection import Tiles
from pallas_kernels.workloads import WORKLOADS

REQUEST = replace(WORKLOADS["cogvideox_5b"], op="projection", device="sm_90", role="q", qk="int8", layout="hopper")
TOGETHER, TURNS = Tiles(256, 2, 2, turns=False), Tiles(128, 2, 2, turns=True)
ALONE = replace(TURNS, cluster=1)


@dataclass(frozen=True)
class Case:
    """One call, made from a seed."""

    width: str = "int8"
    role: str = "q"
    norm: str | None = None
    rope: bool = True
    mean: bool = False
    batch: int = 1
    tokens: int = 70
    heads: int = 2
    head_dim: int = 64
    channels: int = 128
    layout: str = "hopper"
    permuted: bool = True
    tiles: Tiles = ALONE
    programs: int = 1

    def __str__(self) -> str:
        changed = [f"{v}" for k, v in vars(self).items() if k != "tiles" and v != getattr(Case, k)]
        return "-".join([self.role, self.width, *changed, *(["together"] if not self.tiles.turns else [])])

    def solve(self, on: AbstractContextManager):
        """(found, expected): the kernel's, called inside `on`, and the reference's of the product in float32."""
        rng, (h, d, n) = np.random.default_rng(0), (self.heads, self.head_dim, self.tokens)
        x = jnp.asarray(rng.normal(size=(self.batch, n, self.channels)), jnp.bfloat16).at[:, n // 2].set(0.0)
        kernel = jnp.asarray(rng.normal(size=(self.channels, h, d)) / self.channels**0.5, jnp.bfloat16)
        bias, scale, mean = (jnp.asarray(rng.normal(size=(h, d)), jnp.float32) for _ in range(3))
        angle = rng.normal(size=(n, d // 2))
        slots = jnp.asarray([rng.permutation(n) for _ in range(h)], jnp.int32) if self.permuted else None
        norm = None if self.norm is None else Norm(self.norm, scale, bias[0] if self.norm == "layer" else None)
        rope = Rope(*(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))) if self.rope else None
        extras = norm, rope, mean if self.mean else None
        y = jnp.einsum("bnc,chd->bnhd", *(z.astype(jnp.float32) for z in (x, kernel)), precision="highest")
        options = dict(role=self.role, width=self.width, layout=self.layout)
        expected = reference.run(
            y + bias[None, None], slots, *extras, **options, group="row", block=64, compute_mean=False
        )
        weights = projection.prepared(kernel, slots, width=self.width)
        call = dict(tiles=self.tiles, programs=self.programs)
        with on:
            found = jax.block_until_ready(projection.run(x, weights, bias, *extras, **options, **call))
        return found, expected


@pytest.mark.parametrize(
    "case",
    [
        # An odd number of tokens, two heads in two orders; three tiles of three steps through a ring of two, in turns.
        Case(norm="rms", tokens=299, channels=136),
        # Tokens of two batch entries in one tile; two programs of a cluster, two tiles each.
        Case(norm="rms", batch=2, tokens=150, tiles=TURNS, programs=2, mean=True, role="k"),
        Case("bf16", norm="layer", head_dim=128, heads=1, tokens=130),
        # The last program of the cluster is past the end, and 72 channels end inside a step.
        Case(head_dim=128, tokens=300, channels=72, norm="layer", role="k", mean=True, tiles=TOGETHER, programs=2),
        Case("bf16", "v", rope=False, permuted=False, tokens=8),
        Case("int4", "k", tokens=33),
        Case("int4", "q", tokens=9),
        Case("fp8", tokens=33, rope=False),
    ],
    ids=str,
)
def test_interpreted_is_the_reference(case):
    check(case, *case.solve(interpret()))


def check(case, found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
    a, b = (np.asarray(y[0], np.float32) for y in (found, expected))
    assert found[0].shape == expected[0].shape and np.isfinite(a).all()
    if case.width in ("int8", "int4"):
        level = 16 if case.width == "int4" else 1
        assert np.abs(a - b).max() <= level and (a != b).mean() < 2e-3 and found[0].dtype == jnp.int8
    else:  # rounded once
        assert found[0].dtype == (WIDTHS[case.width].store or jnp.bfloat16)
        np.testing.assert_allclose(a, b, rtol=2.0**-3 if case.width == "fp8" else 2.0**-8, atol=2.0**-9)
        assert case.width != "fp8" or (a != b).mean() < 2e-3
    for a, b in zip(found[1:], expected[1:], strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=3e-6, atol=1e-8)


def test_a_list_that_points_outside_writes_nothing_outside():
    """The kernel stores by the inverse of the list, which drops what lies outside."""
    kernel = jnp.ones((8, 1, 64), jnp.bfloat16)
    places = projection.prepared(kernel, jnp.asarray([[7, -9, 10**6, 0]], jnp.int32), width="int8").places
    assert places is not None and ((places >= 0) & (places < 4)).all()


@pytest.mark.parametrize("vector", [8, 16])
def test_registers_hold_what_the_inline_code_takes_them_for(vector):
    """What the interpreter cannot see: that a thread's sums are the channels it is said to hold."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa

    class Wgmma:
        @staticmethod
        def to_mgpu():
            return fa.WGMMA_LAYOUT

    dim = 128
    columns = np.asarray(_lanes.for_quads(jnp.arange(dim), vector))  # the channel that each column multiplies
    lanes = _lanes.quads(vector)
    tile, pairs = placed(lanes.tile, (32, dim)), placed(lanes.pairs, (32, dim // 2))
    np.testing.assert_array_equal(tile[..., 0::2, :], pairs * [1, 2])
    sums = placed(Wgmma, (64, dim)).reshape(dim // 8, 2, 4, 32, 2, 2)  # eight, half, warp, lane, element
    for half in range(2):
        own = np.moveaxis(sums[:, half], 3, 1).reshape(-1, 4, 32, 2)  # a thread's sums in the order of its registers
        held = tile.reshape(-1, 4, 32, vector, 2).transpose(0, 3, 1, 2, 4).reshape(-1, 4, 32, 2)
        row, channel = held[..., 0], held[..., 1]
        np.testing.assert_array_equal(columns[own[..., 1]], channel)
        np.testing.assert_array_equal(own[..., 0], row // 8 * 16 + 8 * half + row % 8)


@pytest.mark.parametrize(
    ("changed", "more", "reason"),
    [
        ({"device": "cpu"}, {}, "device cpu is not sm_90"),
        ({"dtype": "float32"}, {}, "float32 is not served"),
        ({"role": "v", "pv": "int8"}, {}, "v of width int8 has scales over tokens of kernel order"),
        ({"role": "k"}, {"group": "block"}, "group 'block' is over tokens of kernel order.*use 'row'"),
        ({"head_dim": 96}, {}, "head_dim 96 is not served; it serves 64, 128"),
        ({"heads": 1}, {}, "1 heads of 64 are no multiple of 128 channels"),
        ({}, {"channels": 100}, "100 channels are no multiple of 8"),
        ({"batch": 64}, {}, r"2\^31 or more are beyond an int32 address; split the batch"),
        ({"features": ("q-mean",)}, {}, "a mean per query block is not served"),
    ],
)  # fmt: skip
def test_a_refusal_names_what_is_in_the_way(changed, more, reason):
    assert projection.why_not(REQUEST, channels=3072) is None
    assert projection.why_not(replace(REQUEST, role="v"), channels=3072) is None
    with pytest.raises(AssertionError, match=reason):
        assert projection.why_not(replace(REQUEST, **changed), **{"channels": 3072, **more}) is None


def test_project_in_does_not_know_it():
    """Until a measurement says that it is faster."""
    from pallas_kernels.arrange import BACKENDS

    assert projection.run not in [backend.run for backend in BACKENDS]


def test_bytes_are_those_of_the_arrays():
    rows, wide = 2 * 17776, 48 * 64
    moved = projection.bytes_moved(REQUEST, channels=3072, rope=True)
    assert moved["written"] == rows * wide + 4 * rows * 48 and moved["saved"] == 2 * 2 * rows * wide
    assert moved["read"] == 2 * 3072 * (rows + wide) + 4 * rows * 48 + 2 * 4 * 17776 * 32


@pytest.mark.parametrize("name", ["cogvideox_5b", "flux_1024", "wan_14b_720p"])
def test_candidates_fit_and_divide(name):
    request = replace(WORKLOADS[name], op="projection", device="sm_90", role="q", qk="int8")
    found = projection.candidates(request)
    assert {(tiles.channels, tiles.cluster, tiles.turns) for tiles in found} == {
        (256, 2, False), (256, 1, False), (128, 2, True), (128, 1, True)
    }  # fmt: skip
    assert all(projection.shared_memory(tiles) <= 232448 for tiles in found)
    assert projection.candidates(replace(request, heads=2, head_dim=64))[0].turns


AHEAD = {
    "q int8, 64": dict(),
    "k int8, 128": dict(role="k", head_dim=128, heads=24),
    "q bf16, 128": dict(qk="bf16", head_dim=128, heads=24),
    "q fp8, 64": dict(qk="fp8"),
    "k int4, 64": dict(role="k", qk="int4"),
    "v bf16, 64": dict(role="v"),
}


@pytest.mark.compile
@pytest.mark.parametrize("turns", [False, True], ids=["together", "turns"])
@pytest.mark.parametrize("case", AHEAD)
def test_compiles_and_what_follows_the_products_is_short(case, turns):
    # Enough tokens that a program has several tiles: a loop that ends at once the compiler takes apart.
    request = replace(REQUEST, q_tokens=9001, kv_tokens=9001, batch=1, **AHEAD[case])
    tiles = next(tiles for tiles in projection.candidates(request) if tiles.turns == turns)
    row = compile_report.measure(case, request, "sm_90a", tiles=tiles)
    assert row["tensor_instructions"] == [f"HGMMA.64x{tiles.channels}x16.F32.BF16"] and row["registers"] <= 168
    assert row["spills_among_products"] == 0 and row["spills"] <= 192  # once a tile: bytes, of 672 that a thread has
    # All of it together takes a tenth of the products' clocks at most, so that taking turns can hide it.
    assert row["after"]["issue"] < 0.1 * row["clocks"]["tensor"] and row["bound_ratio"] < (1.001 if turns else 1.1)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper_here")
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("turns", [False, True], ids=["together", "turns"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("role", "width"), [("q", "int8"), ("k", "int8"), ("q", "bf16"), ("k", "int4"), ("q", "fp8")])
def test_gpu_is_the_reference(role, width, head_dim, turns, cluster):
    """More tiles than programs, whose last is not whole, and tokens of three batch entries in one tile."""
    request = replace(REQUEST, heads=8, head_dim=head_dim)
    (tiles,) = (t for t in projection.candidates(request) if t.turns == turns and t.cluster == cluster)
    case = Case(
        width, role, norm="rms", mean=role == "k", batch=3, tokens=1030, heads=8, head_dim=head_dim, channels=520,
        tiles=tiles, programs=6,
    )  # fmt: skip
    check(case, *case.solve(nullcontext()))
