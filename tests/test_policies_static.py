"""Policies of the geometry, and the offline searches among them, against their definitions token by token."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paro_jax import AttentionPlan, BlockMask, TokenGrid, policies

GRID = TokenGrid((4, 5, 6), text=7, bricks=((2, 2, 3),), gilbert=True)  # 127 tokens, ragged bricks
BLOCK = (16, 8)


def any_pair(grid, order, block, sees):
    """bool [nq, nk] from sees(place, place) of grid tokens in kernel order; text rows and columns kept."""
    slots = grid.index(order)[: grid.grid_tokens] - (grid.text if grid.text_position == "first" else 0)
    places = [np.unravel_index(i, grid.shape) for i in slots]
    keep = grid.always_keep(block)
    for (i, a), (j, b) in itertools.product(enumerate(places), enumerate(places)):
        if not keep[i // block[0], j // block[1]]:
            keep[i // block[0], j // block[1]] = sees(a, b)
    return keep


# --- windows of tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0, 3, 20])
def test_a_window_of_tokens_keeps_what_it_touches(width):
    slot = np.arange(GRID.tokens)
    near = np.abs(slot[:, None] - slot[None]) <= width
    expected = GRID.always_keep(BLOCK)
    for i, j in np.ndindex(expected.shape):
        expected[i, j] |= near[i * 16 : (i + 1) * 16, j * 8 : (j + 1) * 8].any()
    mask = policies.window(GRID, width=width, block=BLOCK, heads=2)
    np.testing.assert_array_equal(mask.keep, [expected] * 2)
    if width == 0:
        np.testing.assert_array_equal(policies.skip(GRID, block=BLOCK, heads=2).keep, mask.keep)


@pytest.mark.parametrize("width, stride", [(0, None), (4, None), (2, 11)])
def test_multi_diagonals_are_bands_at_multiples_of_the_stride(width, stride):
    step = stride or 30  # a frame
    offset = np.subtract.outer(np.arange(GRID.tokens), np.arange(GRID.tokens)) % step
    near = np.minimum(offset, step - offset) <= width
    expected = GRID.always_keep(BLOCK)
    for i, j in np.ndindex(expected.shape):
        expected[i, j] |= near[i * 16 : (i + 1) * 16, j * 8 : (j + 1) * 8].any()
    mask = policies.multi_diagonal(GRID, width=width, stride=stride, block=BLOCK)
    np.testing.assert_array_equal(mask.keep[0], expected)


# --- STA -------------------------------------------------------------------------------------------------------------


def axis_window(tiles, window, query):
    if window >= tiles:
        return range(tiles)
    left, right = window // 2, window // 2 + window % 2 - 1
    centre = min(max(query, left), tiles - 1 - right)
    return range(centre - left, centre + right + 1)


@pytest.mark.parametrize("window", [(1, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2), (9, 9, 9)])
def test_sliding_tile_is_its_definition(window):
    tile, tiles = (2, 2, 3), (2, 3, 2)

    def sees(a, b):
        return all(y // t in axis_window(n, w, x // t) for x, y, t, n, w in zip(a, b, tile, tiles, window, strict=True))

    mask = policies.sliding_tile(GRID, tile=tile, window=window, block=BLOCK, heads=2)
    np.testing.assert_array_equal(mask.keep, [any_pair(GRID, "brick2x2x3", BLOCK, sees)] * 2)
    assert mask.keep.all() == (window == (9, 9, 9))


def test_an_even_window_is_one_tile_shorter_after_and_is_exact_where_tiles_are_blocks():
    grid = TokenGrid((8, 4, 4), bricks=((1, 4, 4),))
    mask = policies.sliding_tile(grid, tile=(1, 4, 4), window=(4, 1, 1), block=(16, 16))
    seen = [np.flatnonzero(row).tolist() for row in mask.keep[0]]
    # Two before, itself, one after; at the edges the window is shifted inside.
    expected = [[0, 1, 2, 3]] * 3 + [[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6], [4, 5, 6, 7], [4, 5, 6, 7]]
    assert seen == expected and mask.density == 0.5


def test_sliding_windows_may_differ_by_head():
    both = policies.sliding_tile(GRID, tile=(2, 2, 3), window=[(1, 1, 1), (2, 1, 2)], block=BLOCK)
    for h, window in enumerate([(1, 1, 1), (2, 1, 2)]):
        alone = policies.sliding_tile(GRID, tile=(2, 2, 3), window=window, block=BLOCK)
        np.testing.assert_array_equal(both.keep[h], alone.keep[0])


# --- neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["gilbert", "FHW", "brick2x2x3"])
def test_neighbours_are_at_most_one_apart_on_each_axis(order):
    expected = any_pair(GRID, order, BLOCK, lambda a, b: all(abs(x - y) <= 1 for x, y in zip(a, b, strict=True)))
    mask = policies.neighbours(GRID, order=order, block=BLOCK, heads=3)
    np.testing.assert_array_equal(mask.keep, [expected] * 3)


def test_neighbours_may_be_those_of_each_heads_order():
    mask = policies.neighbours(GRID, order=["gilbert", "FHW"], block=BLOCK)
    for h, order in enumerate(["gilbert", "FHW"]):
        np.testing.assert_array_equal(mask.keep[h], policies.neighbours(GRID, order=order, block=BLOCK).keep[0])
    assert (mask.keep[0] != mask.keep[1]).any()


# --- radial ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, decay, block, sink",
    [
        ((9, 4, 10), 1.0, (16, 16), True),
        ((9, 4, 10), 0.3, (8, 16), False),
        ((12, 3, 7), 0.5, (8, 8), False),
        ((4, 8, 16), 0.4375, (16, 16), False),  # a band of 28: at its edge 7 of 12 keys are seen enough, below 60 %
    ],
)
def test_radial_is_its_definition(shape, decay, block, sink):
    grid = TokenGrid(shape, text=5)
    frames, places = shape[0], shape[1] * shape[2]
    side = max(block)
    nq, nk = grid.blocks(block)
    expected = grid.always_keep(block)
    row, column = np.arange(places)[:, None], np.arange(places)[None]
    for f, g in itertools.product(range(frames), repeat=2):
        distance = abs(f - g)
        length = 2 ** len(f"{places:b}") / 2 ** len(f"{distance:b}")
        near = np.ones((places, places), bool) if distance <= 1 else np.abs(row - column) <= max(length * decay, side)
        if distance > 1 and length < side and distance % int(side // length):
            continue
        element = np.zeros((nq * block[0], nk * block[1]), bool)
        element[f * places : (f + 1) * places, g * places : (g + 1) * places] = near
        of_frames = (
            range(x * places // b, (x * places + places - 1) // b + 1) for x, b in zip((f, g), block, strict=True)
        )
        for i, j in itertools.product(*of_frames):
            part = element[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            share = part.sum(0) / min(block[0], frames * places - i * block[0])
            if (share > 0).any():
                expected[i, j] |= (share > 1 / 3).sum() / (share > 0).sum() > 0.6
    for i, j in np.ndindex(nq, nk):
        expected[i, j] |= max(i * block[0], j * block[1]) < min((i + 1) * block[0], (j + 1) * block[1])
        expected[i, j] |= sink and j * block[1] < places
    if grid.tokens % block[0]:
        expected[-1] = True
    if grid.tokens % block[1]:
        expected[:, -1] = True
    mask = policies.radial(grid, decay=decay, sink=sink, block=block, heads=2)
    np.testing.assert_array_equal(mask.keep, [expected] * 2)
    assert not expected.all()


def test_radial_sees_less_the_farther_the_frame():
    grid = TokenGrid((16, 16, 16))
    keep = np.asarray(policies.radial(grid, sink=False, block=(32, 32)).keep)[0]
    per_frame = keep.reshape(16, 8, 16, 8).mean((1, 3))
    assert (per_frame[0, :2] == 1).all() and per_frame[0, 2] > per_frame[0, 4] > per_frame[0, 8] > 0
    knob = policies.at_density(
        lambda d: policies.radial(grid, decay=d, sink=False, block=(32, 32)), 0.5, low=0.05, high=1
    )
    assert 0.4 < policies.radial(grid, decay=knob, sink=False, block=(32, 32)).density <= 0.5


# --- the knob for a density ------------------------------------------------------------------------------------------


def test_at_density_comes_from_below_and_refuses_what_cannot_be_reached(says):
    def policy(width):
        return policies.window(GRID, width=int(width), block=BLOCK)

    knob = policies.at_density(policy, 0.6, low=0, high=126)
    assert policy(knob).density <= 0.6 < policy(int(knob) + 8).density
    least = policy(0).density
    with says("density", f"{least:.4g}", "0.05", "reach"):
        policies.at_density(policy, 0.05, low=0, high=126)
    assert policies.at_density(policy, 1.0, low=0, high=126) == 126
    falling = policies.at_density(lambda knob: policy(-knob), 0.6, low=-126, high=0)
    assert policy(-falling).density == policy(knob).density


# --- Sparse-vDiT -----------------------------------------------------------------------------------------------------


def planted():
    """q, k, v of four heads on a grid of 4 frames of 64: near, same place, three keys for all, everything."""
    grid = TokenGrid((4, 8, 8))
    token = np.arange(256)
    rng = np.random.default_rng(0)
    q = np.zeros((1, 256, 4, 64), np.float32)
    k = np.zeros_like(q)
    near = np.exp(1j * np.outer(token, np.pi * np.arange(1, 17) / 256))
    q[0, :, 0, :32] = k[0, :, 0, :32] = 4 * np.concatenate([near.real, near.imag], -1)
    q[0, :, 1] = k[0, :, 1] = 10 * np.eye(64)[token % 64]
    q[0, :, 2, 0] = 10
    k[0, [40, 41, 200], 2, 0] = 10
    v = rng.standard_normal(q.shape).astype(np.float32)
    v[0, :, 3] += np.eye(64)[token // 4]  # what is skipped is missed
    return grid, q, k, v


def test_sparse_vdit_finds_planted_patterns():
    grid, q, k, v = planted()
    plan = AttentionPlan.dense(grid, heads=4, block=(16, 16))
    mask, names = policies.sparse_vdit([(q, k, v)], plan=plan, density=0.5, widths=(0, 24), stripes=(0.125,))
    assert names == ["diagonal 24", "multi-diagonal 0", "vertical 0.125", "full"]
    assert mask.density <= 0.5
    mass = np.asarray(policies.column_mass(q, k, plan=plan))
    np.testing.assert_array_equal(np.flatnonzero(mask.keep[2, 0]), np.sort(np.argsort(-mass[0, 2])[:2]))
    sparse, names = policies.sparse_vdit([(q, k, v)], plan=plan, density=0.2, widths=(0, 24), stripes=(0.125,))
    assert sparse.density <= 0.2 < mask.density and names[3] != "full"
    assert sparse.keep.any(-1).all()


def test_column_mass_is_what_keys_get_in_the_plans_order():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 2, GRID.tokens, 2, 8)).astype(np.float32)
    plan = AttentionPlan.dense(GRID, heads=2, order=["WHF", "gilbert"], block=BLOCK)
    mass = np.asarray(policies.column_mass(q, k, plan=plan))
    for b, h in np.ndindex(2, 2):
        slots = GRID.index(plan.order_list()[h])
        p = np.exp(q[b, slots, h].astype(float) @ k[b, slots, h].T / 8**0.5)
        columns = (p / p.sum(1, keepdims=True)).mean(0)
        np.testing.assert_allclose(mass[b, h], [columns[j : j + 8].sum() for j in range(0, 127, 8)], atol=1e-6)


def test_errors_of_masks_and_the_pick_among_them():
    grid, q, k, v = planted()
    plan = AttentionPlan.dense(grid, heads=4, block=(16, 16))
    masks = [policies.dense(grid, block=(16, 16), heads=4), policies.window(grid, width=8, block=(16, 16))]
    errors = policies.mask_errors([(q, k, v)], plan=plan, masks=masks)
    dense = np.asarray(jax.nn.dot_product_attention(q, k, v))
    for h in range(4):
        p = np.where(
            np.kron(np.asarray(masks[1].keep[0]), np.ones((16, 16))),
            np.exp(q[0, :, h] @ k[0, :, h].T / 8 - 50 * (h < 3)),
            0,
        )
        out = p / p.sum(1, keepdims=True) @ v[0, :, h]
        assert errors[1, h] == pytest.approx(
            ((out - dense[0, :, h]) ** 2).sum() / (dense[0, :, h] ** 2).sum(), rel=1e-2, abs=1e-6
        )
    assert (errors[0] == 0).all()
    assert policies.pick_masks(errors, masks, cost=0.0)[1] == [0, 0, 0, 0]
    mask, chosen = policies.pick_masks(errors, masks, cost=1e9)
    assert chosen == [1, 1, 1, 1] and (mask.keep == masks[1].keep).all()


def test_vertical_stripes_are_the_same_for_all_rows():
    columns = np.random.default_rng(0).random((2, 16)) < 0.3
    keep = np.asarray(jax.jit(lambda c: policies.vertical_stripe(GRID, c, block=BLOCK).keep)(columns))
    always = GRID.always_keep(BLOCK)
    np.testing.assert_array_equal(keep, np.broadcast_to(columns[:, None], keep.shape) | always)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused(says):
    with says("density", "width", "not both"):
        policies.window(GRID, density=0.5, width=3)
    with says("width", ">= 0", "-1"):
        policies.window(GRID, width=-1)
    with says("grid", "TokenGrid", "None"):
        policies.window(None, density=0.5)  # type: ignore[arg-type]
    with says("tile", "bricks=((4, 4, 4),)", "(4, 4, 4)"):
        policies.sliding_tile(GRID, tile=(4, 4, 4), window=(1, 1, 1))
    for window in ((1, 1), (0, 1, 1), [(1, 1, 1), (1, 1)], 3, "all"):
        with says("window", "3 positive ints"):
            policies.sliding_tile(GRID, tile=(2, 2, 3), window=window)
    with says("window", "3 heads", "2"):
        policies.sliding_tile(GRID, tile=(2, 2, 3), window=[(1, 1, 1)] * 2, heads=3)
    with says("order", "gilbert=True", "'gilbert'"):
        policies.neighbours(TokenGrid((4, 5, 6)))
    with says("order", "3 heads", "2"):
        policies.neighbours(GRID, order=["FHW", "FHW"], heads=3)
    for decay in (0, -1, 1.5, float("nan"), True, "x"):
        with says("decay", repr(decay)):
            policies.radial(GRID, decay=decay)
    with says("grid", "video", "(20, 6)"):
        policies.radial(TokenGrid((20, 6)))
    with says("grid", "TokenGrid", "4"):
        policies.radial((4, 5, 6))  # type: ignore[arg-type]
    with says("width", ">= 0", "1.5"):
        policies.multi_diagonal(GRID, width=1.5)  # type: ignore[arg-type]
    with says("stride", ">= 1", "0"):
        policies.multi_diagonal(GRID, width=1, stride=0)
    with says("columns", "[heads, 16]", "[16]"):
        policies.vertical_stripe(GRID, np.ones(16, bool), block=BLOCK)
    with says("columns", "without text", "none"):
        policies.vertical_stripe(TokenGrid((64,)), np.zeros((2, 4), bool), block=(16, 16))
    for heads in (0, True, 1.5):
        with says("heads", "positive int", repr(heads)):
            policies.skip(GRID, heads=heads)


def test_a_search_that_cannot_work_is_refused(says):
    plan = AttentionPlan.dense(GRID, heads=2, block=BLOCK)
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((3, 1, GRID.tokens, 2, 8)).astype(np.float32)
    with says("samples", "at least one"):
        policies.sparse_vdit([], plan=plan, density=0.5)
    with says("samples", "zero"):
        policies.mask_errors([sample * 0], plan=plan, masks=[policies.dense(GRID, block=BLOCK)])
    with says("stripes", "(0, 1]", "1.5"):
        policies.sparse_vdit([sample], plan=plan, density=0.5, stripes=(1.5,))
    with says("density", "0.01"):
        policies.sparse_vdit([sample], plan=plan, density=0.01, widths=(8,), stripes=())
    masks = [BlockMask(jnp.ones((1, 8, 16), bool), BLOCK)]
    with says("errors", "masks = 1", "[2, 2]"):
        policies.pick_masks(np.zeros((2, 2)), masks, cost=1.0)
    with says("cost", "-1"):
        policies.pick_masks(np.zeros((1, 2)), masks, cost=-1)
