"""Policies: who keeps which blocks, and that the budget is what was asked for."""

import inspect
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paro_jax import AttentionPlan, BlockMask, TokenGrid, policies

GRID = TokenGrid((6, 10, 20), text=50, bricks=((2, 5, 5),), gilbert=True)
BLOCK = (64, 32)


@given(st.integers(0, 2**32 - 1), st.sampled_from((0.3, 0.5, 0.77, 1.0)))
def test_top_blocks_keeps_the_forced_the_best_of_each_row_and_the_heaviest(seed, density):
    mass = np.random.default_rng(seed).random((2, 3, *GRID.blocks(BLOCK)))
    always = GRID.always_keep(BLOCK)
    mask = policies.top_blocks(mass, density, always, block=BLOCK)
    keep = np.asarray(mask.keep)
    assert mask.block == BLOCK and keep.shape == mass.shape
    assert (keep.sum((-2, -1)) == round(density * always.size)).all()
    assert keep[..., always].all()
    for head in np.ndindex(keep.shape[:2]):
        best = np.eye(mass.shape[-1], dtype=bool)[mass[head].argmax(-1)] & ~always.any(-1, keepdims=True)
        assert keep[head][best].all()
        free = ~always & ~best
        assert (
            not (free & keep[head]).any()
            or not (free & ~keep[head]).any()
            or (mass[head][free & keep[head]].min() >= mass[head][free & ~keep[head]].max())
        )


def test_top_blocks_breaks_ties_from_the_top_left_and_works_under_jit():
    mass = np.zeros((1, 3, 4), np.float32)
    eager = policies.top_blocks(mass, 0.5)
    np.testing.assert_array_equal(eager.keep[0], [[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]])
    jitted = jax.jit(lambda m: policies.top_blocks(m, 0.5))(mass)
    np.testing.assert_array_equal(jitted.keep, eager.keep)


def test_a_row_of_low_mass_keeps_its_best_block():
    mass = np.ones((1, 4, 4), np.float32)
    mass[0, 2] = [0.1, 0.3, 0.2, 0.1]
    assert np.asarray(policies.top_blocks(mass, 0.5).keep)[0, 2].tolist() == [False, True, False, False]


@pytest.mark.parametrize("block", [(64, 64), (128, 64), (64, 128)])
@pytest.mark.parametrize("density", [0.25, 0.5, 0.9, 1.0])
def test_window_is_a_band_of_the_density_with_text_kept(block, density):
    grid = TokenGrid((6, 20, 20), text=50, text_position="last")
    mask = policies.window(grid, density=density, block=block, heads=3)
    nq, nk = grid.blocks(block)
    keep = np.asarray(mask.keep)
    assert keep.shape == (3, nq, nk) and mask.block == block
    assert abs(mask.density - density) <= 0.5 / (nq * nk) + 1e-9
    assert (keep == keep[:1]).all() and keep[0][grid.always_keep(block)].all()
    always = grid.always_keep(block)
    video_rows, video_columns = np.flatnonzero(~always.all(1)), np.flatnonzero(~always.all(0))
    for i in video_rows:
        kept = keep[0][i, video_columns]
        distance = np.abs((video_columns + 0.5) / nk - (i + 0.5) / nq)
        assert (np.diff(np.flatnonzero(kept)) == 1).all()  # one run ...
        assert distance[kept].max(initial=0) <= distance[~kept].min(initial=1) + 1e-9  # ... of the nearest


def test_dense_keeps_all():
    mask = policies.dense(GRID, block=BLOCK, heads=2)
    assert mask.density == 1.0 and mask.keep.shape == (2, *GRID.blocks(BLOCK))


# One line a policy: the test fails for a public function that is neither here nor in TOOLS. `x`: q, k, v [2, N, 2, 8].
_PLAN = AttentionPlan.dense(GRID, heads=2, order=["FHW", "gilbert"], block=BLOCK)
_TILES = dict(tile=(2, 5, 5), window=(2, 1, 3))
_COLUMNS = np.arange(GRID.blocks(BLOCK)[1])[None] % 7 == 3
STATIC = {
    "dense": lambda: policies.dense(GRID, block=BLOCK),
    "window": lambda: policies.window(GRID, density=0.5, block=BLOCK),
    "top_blocks": lambda: policies.top_blocks(
        np.ones((1, *GRID.blocks(BLOCK))), 0.5, GRID.always_keep(BLOCK), block=BLOCK
    ),
    "sliding_tile": lambda: policies.sliding_tile(GRID, block=BLOCK, **_TILES),
    "neighbours": lambda: policies.neighbours(GRID, block=BLOCK),
    "radial": lambda: policies.radial(GRID, decay=0.3, block=BLOCK),
    "multi_diagonal": lambda: policies.multi_diagonal(GRID, width=5, block=BLOCK),
    "vertical_stripe": lambda: policies.vertical_stripe(GRID, _COLUMNS, block=BLOCK),
    "skip": lambda: policies.skip(GRID, block=BLOCK),
}
ONLINE = {
    "sparge": lambda q, k, v, plan: policies.sparge(q, k, plan=plan, topk=0.3),
    "sparge_pv_skip": lambda q, k, v, plan: policies.sparge_pv_skip(q, k, plan.mask(), plan=plan, pv_skip=1.0),
    "xattention": lambda q, k, v, plan: policies.xattention(q, k, plan=plan, tau=0.5),
    "sparse_videogen": lambda q, k, v, plan: policies.sparse_videogen(
        q, k, v, grid=plan.grid, density=0.4, rng=jax.random.key(0), block=plan.block
    )[0],
    "sparse_videogen2": lambda q, k, v, plan: (
        policies.sparse_videogen2(
            q, k, grid=plan.grid, q_clusters=6, k_clusters=8, top_p=0.5, block=plan.block, start=jax.random.key(0)
        ).mask
    ),
}
# Offline searches, shown with the policy they serve, and what attends: tested beside them.
TOOLS = {
    "at_density", "column_mass", "compensated_attention", "greedy_sharing", "mask_errors", "masked_attention",
    "pick_masks", "shared_attention", "sharing_loss", "slot_attention", "sparse_vdit", "tune_sparge",
}  # fmt: skip


def test_the_conformance_lists_are_complete():
    """A new policy joins by being in the package."""
    public = {name for name, f in vars(policies).items() if inspect.isfunction(f) and not name.startswith("_")}
    assert {*STATIC, *ONLINE} | TOOLS == public


def conforms(mask, lead):
    keep = np.asarray(mask.keep)
    assert isinstance(mask, BlockMask) and mask.block == BLOCK and keep.dtype == bool
    assert keep.shape == (*lead, *GRID.blocks(BLOCK))
    assert keep[..., GRID.always_keep(BLOCK)].all()  # text
    assert keep.any(-1).all()  # no empty row
    assert mask.density == pytest.approx(keep.mean())
    return keep


@pytest.mark.parametrize("name", STATIC)
def test_a_static_policy_keeps_text_and_every_row_and_is_deterministic(name):
    keep = conforms(STATIC[name](), (1,))
    np.testing.assert_array_equal(keep, STATIC[name]().keep)
    assert keep.all() == (name == "dense")
    np.testing.assert_array_equal(jax.jit(lambda: STATIC[name]().keep)(), keep)


@pytest.mark.parametrize("name", ONLINE)
def test_an_online_policy_keeps_text_and_every_row_and_jits_in_one_trace(name):
    traces = []

    @jax.jit
    def policy(q, k, v, plan):
        traces.append(1)
        return ONLINE[name](q, k, v, plan)

    first, second = np.random.default_rng(0).standard_normal((2, 3, 2, GRID.tokens, 2, 8)).astype(np.float32) * 2
    keep = conforms(policy(*first, _PLAN), (2, 2))
    other = conforms(policy(*second, AttentionPlan.dense(GRID, heads=2, order="WHF", block=BLOCK)), (2, 2))
    assert len(traces) == 1 and not keep.all()
    assert (keep != other).any() or name == "sparse_videogen"  # one band for all; its orders differ
    np.testing.assert_array_equal(policy(*first, _PLAN).keep, keep)


@pytest.mark.parametrize("name", [*ONLINE, "column_mass"])
def test_no_policy_holds_the_attention_map(name):
    """The largest array of any step of the program stays far below tokens x tokens."""
    grid = TokenGrid((16, 16, 16))
    plan = AttentionPlan.dense(grid, heads=1)
    x = jax.ShapeDtypeStruct((1, grid.tokens, 1, 8), np.float32)
    function = ONLINE.get(name, lambda q, k, v, plan: policies.column_mass(q, k, plan=plan))
    program = jax.make_jaxpr(lambda q, k, v: function(q, k, v, plan))(x, x, x)
    assert largest(program.jaxpr) <= max(64 * grid.tokens, 16 * grid.tokens * 8)


def largest(jaxpr) -> int:
    sizes = [math.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "shape")]
    values = [value for e in jaxpr.eqns for value in e.params.values()]
    parameters = [p for value in values for p in (value if isinstance(value, (tuple, list)) else (value,))]
    inner = [largest(getattr(p, "jaxpr", p)) for p in parameters if hasattr(getattr(p, "jaxpr", p), "eqns")]
    return max(sizes + inner, default=0)


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.01, float("nan"), "half", True, None])
def test_a_density_outside_0_1_is_refused(says, density):
    with says("density", "(0, 1]", repr(density)):
        policies.window(GRID, density=density)
    with says("density", "(0, 1]", repr(density)):
        policies.top_blocks(np.ones((1, 4, 4)), density)


def test_a_density_below_the_floor_is_refused_not_clipped(says):
    always = GRID.always_keep((64, 64))
    floor = (always.sum() + (~always.any(-1)).sum()) / always.size
    with says("density", f"{floor:.4g}", "0.01"):
        policies.window(GRID, density=0.01)
    assert policies.window(GRID, density=floor).density == pytest.approx(floor)


def test_other_bad_input_is_refused(says):
    with says("heads", "positive int", "0"):
        policies.window(GRID, density=0.5, heads=0)
    with says("always", "[4, 5]", "(5, 4)"):
        policies.top_blocks(np.ones((1, 4, 5)), 0.5, np.ones((5, 4), bool))
    with says("mass", "nq, nk", "[4]"):
        policies.top_blocks(np.ones(4), 0.5)
    with says("block", "(64, 0)"):
        policies.top_blocks(np.ones((1, 4, 4)), 0.5, block=(64, 0))
