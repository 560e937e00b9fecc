"""TokenGrid: orders are permutations, text goes last, geometry is counted in one place."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paro_jax import TokenGrid

# PAROAttention's published code, cogvideox.py: axes of each order, and the order that undoes it on the permuted view.
OFFICIAL_INVERSE = {"FHW": "FHW", "FWH": "FWH", "HWF": "WFH", "HFW": "HFW", "WHF": "WHF", "WFH": "HWF"}


@st.composite
def grids(draw):
    rank = draw(st.integers(1, 3))
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank)))
    bricks = draw(st.lists(st.tuples(*[st.integers(1, 5)] * rank), max_size=2, unique=True))
    text, position = draw(st.integers(0, 20)), draw(st.sampled_from(("first", "last")))
    return TokenGrid(shape, text=text, text_position=position, bricks=tuple(bricks), gilbert=draw(st.booleans()))


@given(grids())
def test_every_order_is_a_permutation_and_its_inverse_undoes_it(grid):
    model_text = np.arange(grid.text) + (0 if grid.text_position == "first" else grid.grid_tokens)
    for order, row in zip(grid.orders, grid.table(), strict=True):
        index, inverse = grid.index(order), grid.inverse(order)
        assert index.dtype == inverse.dtype == np.int32
        np.testing.assert_array_equal(row, index)
        np.testing.assert_array_equal(np.sort(index), np.arange(grid.tokens))
        np.testing.assert_array_equal(index[inverse], np.arange(grid.tokens))
        np.testing.assert_array_equal(inverse[index], np.arange(grid.tokens))
        np.testing.assert_array_equal(index[grid.grid_tokens :], model_text)  # text last, itself never reordered


@pytest.mark.parametrize(
    "shape, orders",
    [((4, 5, 6), ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")), ((5, 6), ("HW", "WH")), ((7,), ("N",))],
)
def test_model_order_comes_first_and_changes_nothing(shape, orders):
    grid = TokenGrid(shape)
    assert grid.orders == orders
    np.testing.assert_array_equal(grid.index(orders[0]), np.arange(grid.tokens))


@pytest.mark.parametrize("order", OFFICIAL_INVERSE)
def test_the_official_inverse_table_undoes_our_orders(order):
    grid = TokenGrid((2, 3, 5))
    sizes = dict(zip("FHW", grid.shape, strict=True))
    x = np.random.default_rng(0).permutation(grid.tokens)
    permuted_view = x[grid.index(order)].reshape([sizes[axis] for axis in order])
    undone = permuted_view.transpose(["FHW".index(axis) for axis in OFFICIAL_INVERSE[order]])
    np.testing.assert_array_equal(undone.reshape(-1), x)


def test_an_order_walks_its_last_axis_fastest():
    grid = TokenGrid((2, 3, 5), text=4)
    frame, row, column = 1, 2, 3
    token = 4 + (frame * 3 + row) * 5 + column
    assert grid.inverse("HWF")[token] == (row * 5 + column) * 2 + frame
    assert grid.inverse("WFH")[token] == (column * 2 + frame) * 3 + row


def test_a_brick_order_fills_whole_bricks_first_and_ragged_ones_at_the_edges():
    grid = TokenGrid((4, 6), bricks=((2, 4),))
    assert grid.orders == ("HW", "WH", "brick2x4")
    places = [divmod(int(i), 6) for i in grid.index("brick2x4")]
    assert places[:8] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert places[8:12] == [(0, 4), (0, 5), (1, 4), (1, 5)]  # the brick at the edge is 2 x 2


def test_a_brick_of_64_tokens_is_one_block():
    grid = TokenGrid((8, 8, 12), text=3, bricks=((4, 4, 4),))
    first = np.stack(np.unravel_index(grid.index("brick4x4x4")[:64] - grid.text, grid.shape))
    assert first.max(axis=1).tolist() == [3, 3, 3]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_a_gilbert_curve_goes_from_a_place_to_one_beside_it(shape):
    grid = TokenGrid(shape, text=3, gilbert=True)
    assert grid.orders[-1] == "gilbert" and "gilbert" not in TokenGrid(shape, text=3).orders
    places = np.stack(np.unravel_index(grid.index("gilbert")[: grid.grid_tokens] - grid.text, grid.shape), -1)
    steps = np.abs(np.diff(places, axis=0))
    # Sides that halve evenly never break the curve; others may make it cut a corner.
    assert steps.max(initial=0) <= (1 if all(n & (n - 1) == 0 for n in shape) else 2)
    assert steps.sum(1).max(initial=0) <= (1 if all(n & (n - 1) == 0 for n in shape) else 2)


def test_a_gilbert_curve_stays_near_where_model_order_does_not():
    grid = TokenGrid((8, 12, 16), gilbert=True)

    def spread(order):  # of 64 tokens in a row, along the longest axis of their box
        places = np.stack(np.unravel_index(grid.index(order), grid.shape), -1).reshape(-1, 64, 3)
        return (places.max(1) - places.min(1) + 1).max(1).mean()

    assert spread("gilbert") < 8 < spread("FHW")


@pytest.mark.parametrize(
    "tokens, size, counts", [(1, 64, [1]), (63, 64, [63]), (64, 64, [64]), (65, 64, [64, 1]), (200, 128, [128, 72])]
)
def test_blocks_count_their_tokens(tokens, size, counts):
    grid = TokenGrid((tokens,))
    assert grid.block_tokens(size).tolist() == counts
    assert grid.blocks((size, 64)) == (len(counts), -(-tokens // 64))


def test_geometry_of_the_models_we_serve():
    assert TokenGrid((13, 30, 45), text=226).blocks((64, 64)) == (278, 278)
    assert TokenGrid((21, 45, 80)).blocks((64, 128)) == (1182, 591)
    assert TokenGrid((64, 64), text=512).tokens == 4608


@given(grids(), st.sampled_from((4, 16, 64)), st.sampled_from((4, 16, 64)))
def test_always_keep_is_the_rows_and_columns_of_blocks_with_text(grid, bq, bk):
    nq, nk = grid.blocks((bq, bk))
    is_text = np.arange(grid.tokens) >= grid.grid_tokens  # in kernel order
    rows = [is_text[i * bq : (i + 1) * bq].any() for i in range(nq)]
    columns = [is_text[j * bk : (j + 1) * bk].any() for j in range(nk)]
    keep = grid.always_keep((bq, bk))
    assert keep.shape == (nq, nk) and keep.dtype == bool
    np.testing.assert_array_equal(keep, np.logical_or.outer(rows, columns))


def test_equal_grids_are_equal_keys_and_tables_are_shared_and_read_only():
    grid = TokenGrid([np.int64(3), 4], text=np.int32(2))
    assert grid == TokenGrid((3, 4), text=2) and hash(grid) == hash(TokenGrid((3, 4), text=2))
    assert grid.index("WH") is TokenGrid((3, 4), text=2).index("WH")
    with pytest.raises(ValueError, match="read-only"):
        grid.index("WH")[0] = 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(shape=()), ("shape", "1 to 3 positive ints", "()")),
        (dict(shape=(2, 3, 4, 5)), ("shape", "1 to 3", "(2, 3, 4, 5)")),
        (dict(shape=(2, 0)), ("shape", "positive", "(2, 0)")),
        (dict(shape=(2.0, 3)), ("shape", "positive ints", "2.0")),
        (dict(shape=(True, 3)), ("shape", "positive ints", "True")),
        (dict(shape=12), ("shape", "12")),
        (dict(shape=(2, 3), text=-1), ("text", ">= 0", "-1")),
        (dict(shape=(2, 3), text=1.5), ("text", "int", "1.5")),
        (dict(shape=(2, 3), text_position="middle"), ("text_position", '"first" or "last"', "middle")),
        (dict(shape=(2, 3), bricks=((4, 4, 4),)), ("bricks", "2 positive ints", "(4, 4, 4)")),
        (dict(shape=(2, 3), bricks=((4, 0),)), ("bricks", "positive", "(4, 0)")),
        (dict(shape=(2, 3), bricks=(4, 4)), ("bricks", "tuple of 2", "4")),
        (dict(shape=(2, 3), bricks=8), ("bricks", "tuple", "8")),
        (dict(shape=(2, 3), bricks=((2, 2), (2, 2))), ("bricks", "repeat")),
        (dict(shape=(2, 3), gilbert=1), ("gilbert", "True or False", "1")),
    ],
)
def test_a_bad_grid_is_refused(says, arguments, words):
    with says(*words):
        TokenGrid(**arguments)


@pytest.mark.parametrize("block", [64, (64,), (64, 0), (64, -1), (64, 1.5), None, (64, 64, 64)])
def test_a_bad_block_is_refused(says, block):
    with says("block", "two positive ints", block):
        TokenGrid((4, 5)).blocks(block)


def test_an_unknown_order_is_refused(says):
    with says("order", "FHW, FWH", "'HW'"):
        TokenGrid((2, 3, 4)).index("HW")
    with says("order", "brick4x4x4", "bricks=((4, 4, 4),)"):
        TokenGrid((2, 3, 4)).inverse("brick4x4x4")


def test_the_place_of_tokens():
    """Bricks are other orders of the same tokens, and no text is nowhere."""
    assert TokenGrid((2, 3), text_position="last").place == TokenGrid((2, 3), bricks=((1, 3),)).place
    assert TokenGrid((2, 3), 1, "last").place != TokenGrid((2, 3), 1).place != TokenGrid((3, 2), 1).place
