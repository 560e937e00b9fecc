"""BlockMask: packing, schedules, density, drawing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paro_jax import BlockMask

# Each shape compiles, so they come from a pool: every remainder of nk by 8 that matters, 0 to 2 leading axes.
SHAPES = ((1, 1), (3, 7), (2, 5, 8), (2, 3, 9), (2, 1, 4, 16), (3, 2, 6, 17), (1, 20, 31))


@st.composite
def masks(draw):
    shape, fill = draw(st.sampled_from(SHAPES)), draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1))).random(shape) < fill


@given(masks())
def test_unpack_undoes_pack_for_any_number_of_blocks(keep):
    mask = BlockMask(keep, (64, 128))
    bits = mask.pack()
    nk = keep.shape[-1]
    assert bits.dtype == jnp.uint8 and bits.shape == (*keep.shape[:-1], -(-nk // 8))
    back = BlockMask.unpack(bits, nk=nk, block=(64, 128))
    np.testing.assert_array_equal(back.keep, keep)
    assert back.keep.dtype == bool and back.block == (64, 128)
    # Bit j % 8 of byte j / 8, and zeros behind the last block: files and kernels rely on both.
    numbers = np.asarray(bits)
    for j in range(8 * bits.shape[-1]):
        bit = numbers[..., j // 8] >> (j % 8) & 1
        np.testing.assert_array_equal(bit, keep[..., j] if j < nk else 0)


@given(masks())
def test_the_schedule_lists_kept_blocks_ascending(keep):
    count, index = map(np.asarray, BlockMask(keep, (64, 64)).schedule())
    assert count.dtype == index.dtype == jnp.int32
    assert count.shape == keep.shape[:-1] and index.shape == keep.shape
    assert ((index >= 0) & (index < keep.shape[-1])).all()
    for row in np.ndindex(count.shape):
        assert index[row][: count[row]].tolist() == np.flatnonzero(keep[row]).tolist()


@given(masks(), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_what_is_first_comes_first_if_it_is_kept(keep, m, seed):
    """Skipped blocks, repeats and numbers beyond the last block among it."""
    nk = keep.shape[-1]
    first = np.random.default_rng(seed).integers(0, nk + 2, (*keep.shape[:-1], m)).astype(np.uint16)
    count, index = map(np.asarray, BlockMask(keep, (64, 64)).schedule(first))
    np.testing.assert_array_equal(count, keep.sum(-1))
    assert index.shape == keep.shape and ((index >= 0) & (index < nk)).all()
    for row in np.ndindex(count.shape):
        kept = np.flatnonzero(keep[row]).tolist()
        ahead = [j for j in dict.fromkeys(first[row].tolist()) if j in kept]
        assert index[row][: count[row]].tolist() == ahead + [j for j in kept if j not in ahead]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_the_schedule_works_under_jit_and_vmap_for_any_lead(rng, lead):
    keep = rng.random((*lead, 4, 5, 9)) < 0.4
    mask = BlockMask(keep, (64, 64))
    count, index = jax.jit(BlockMask.schedule)(mask)
    np.testing.assert_array_equal(count, keep.sum(-1))
    again = jax.vmap(BlockMask.schedule)(mask)
    np.testing.assert_array_equal(again[1], index)
    first = rng.integers(0, 9, (*lead, 4, 5, 2)).astype(np.uint16)
    expected = mask.schedule(first)[1]
    assert (expected != index).any()
    for schedule in (jax.jit(BlockMask.schedule), jax.vmap(BlockMask.schedule)):
        np.testing.assert_array_equal(schedule(mask, first)[1], expected)


@given(masks())
def test_density_is_kept_over_all(keep):
    mask = BlockMask(keep, (64, 64))
    assert isinstance(mask.density, float)
    assert mask.density == keep.sum() / keep.size
    assert float(jax.jit(lambda m: m.density)(mask)) == pytest.approx(keep.mean(), abs=1e-6)


def test_density_of_many_blocks_does_not_round():
    keep = np.zeros((300, 278, 278), bool)
    keep[0, 0, :3] = True
    assert BlockMask(keep, (64, 64)).density == 3 / keep.size


def test_masks_combine(rng):
    a, b = rng.random((2, 3, 4, 5)) < 0.5
    both, either = BlockMask(a, (64, 64)) & BlockMask(b, (64, 64)), BlockMask(a, (64, 64)) | BlockMask(b, (64, 64))
    np.testing.assert_array_equal(both.keep, a & b)
    np.testing.assert_array_equal(either.keep, a | b)
    assert both.block == (64, 64)


def test_a_small_mask_prints_block_by_block():
    keep = np.array([[1, 0, 1, 1], [1, 0, 0, 1], [0, 1, 0, 0]], bool)
    assert str(BlockMask(keep, (64, 64))).splitlines() == [
        "3 x 4 blocks of 64 x 64 tokens, density 0.500",
        "█ ▀█",
        " ▀  ",
    ]


def test_several_heads_print_with_their_place(rng):
    keep = np.zeros((2, 3, 2, 5), bool)
    keep[0, 1, :, 2] = True
    lines = str(BlockMask(keep, (64, 32))).splitlines()
    assert lines[0] == "2 x 5 blocks of 64 x 32 tokens, density 0.033"
    assert lines[3:5] == ["[0, 1] density 0.200", "  █  "]
    assert lines[-1] == "... and 2 more"


def test_a_large_mask_is_shrunk_and_a_thin_diagonal_stays():
    keep = np.eye(300, dtype=bool)
    lines = BlockMask(keep, (64, 64)).draw(width=40).splitlines()
    assert "a mark is 8 x 8 blocks" in lines[0] and max(map(len, lines[1:])) <= 40
    drawn = [[(half in (c, "█")) for c in line.ljust(38)] for line in lines[1:] for half in ("▀", "▄")]
    np.testing.assert_array_equal(np.array(drawn), np.eye(38, dtype=bool))


@pytest.mark.parametrize("fill, mark", [(True, "█"), (False, " ")])
def test_full_and_empty_masks_draw_as_such_at_any_size(fill, mark):
    for n in (6, 512):
        lines = BlockMask(np.full((n, n), fill), (64, 64)).draw().splitlines()[1:]
        assert set("".join(lines)) == {mark}


def test_repr_is_one_line_and_a_traced_mask_prints():
    mask = BlockMask(np.ones((2, 3, 3), bool), (64, 64))
    assert repr(mask) == "BlockMask(keep=(2, 3, 3), block=(64, 64))"
    seen = []
    jax.jit(lambda m: seen.append(str(m)))(mask)
    assert seen == [repr(mask)]


def test_bad_input_is_refused(says):
    bits = np.zeros((2, 3, 2), np.uint8)
    with says("bits", "[..., 3]", "nk = 17", "(2, 3, 2)"):
        BlockMask.unpack(bits, nk=17, block=(64, 64))
    with says("bits", "uint8", "int32"):
        BlockMask.unpack(bits.astype(np.int32), nk=16, block=(64, 64))
    with says("block", "two positive ints", "(64, 0)"):
        BlockMask.unpack(bits, nk=16, block=(64, 0))
    mask = BlockMask(np.ones((2, 2), bool), (64, 64))
    with says("first", "integers [2, 'm']", "int32 [3, 1]"):
        mask.schedule(np.zeros((3, 1), np.int32))
    with says("first", "integers", "float32"):
        mask.schedule(np.zeros((2, 1), np.float32))
    with says("equal blocks", "(64, 64)", "(64, 128)"):
        mask & BlockMask(np.ones((2, 2), bool), (64, 128))
    with says("BlockMask", "(64, 64)", "True"):
        mask | True
