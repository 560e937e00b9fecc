"""Streaming statistics against an attention map that is held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import calibrate
from calibrate import _mass, bench
from paro_jax import TokenGrid, metrics

GRIDS = {
    "video, text first": (TokenGrid((5, 6, 7), text=9), (32, 32)),
    "video, text last, blocks not square": (TokenGrid((5, 6, 7), text=9, text_position="last"), (16, 64)),
    "bricks, no text": (TokenGrid((4, 6, 5), bricks=((2, 3, 2),)), (64, 16)),
    "no partial block": (TokenGrid((4, 4, 8)), (32, 32)),
    "image": (TokenGrid((9, 11), text=3), (64, 64)),
    "text fills blocks": (TokenGrid((8, 8), text=64), (32, 32)),
    "one token": (TokenGrid((1,)), (64, 64)),
    "63": (TokenGrid((63,)), (64, 64)),
    "65": (TokenGrid((65,)), (64, 64)),
    "text only beside one token": (TokenGrid((1, 1, 1), text=70), (64, 64)),
    "block larger than strip": (TokenGrid((700,)), (512, 128)),
    "block that divides nothing": (TokenGrid((20, 30), text=7), (48, 80)),
    "2048": (TokenGrid((8, 15, 17), text=8), (64, 64)),
}


def qkv(grid, heads=2, dim=16, batch=1, seed=0, scale=2.0):
    return np.random.default_rng(seed).normal(scale=scale, size=(3, batch, grid.tokens, heads, dim)).astype(np.float32)


def full_map(q, k):
    """float64 [heads, B, N, N], model order"""
    q, k = (x.astype(np.float64).transpose(2, 0, 1, 3) for x in (q, k))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def blocks_of(p, block, reduce=np.sum):
    """`reduce` of each block of [..., N, M]"""
    rows, columns = (range(0, n, b) for n, b in zip(p.shape[-2:], block, strict=True))
    cut = [[reduce(p[..., i : i + block[0], j : j + block[1]], axis=(-2, -1)) for j in columns] for i in rows]
    return np.moveaxis(np.array(cut), (0, 1), (-2, -1))


@pytest.mark.parametrize("name", GRIDS)
def test_block_mass_is_that_of_the_held_map_in_every_order(name):
    grid, block = GRIDS[name]
    q, k, _ = qkv(grid, batch=2)
    p = full_map(q, k)
    for order in grid.orders:
        slots = grid.index(order)
        expected = blocks_of(p[..., slots, :][..., slots], block).mean(1)
        mass = np.asarray(calibrate.block_mass(q, k, grid, order, block))
        assert mass.dtype == np.float32
        np.testing.assert_allclose(mass, expected, rtol=3e-5, atol=1e-7)
        np.testing.assert_allclose(mass.sum(-1), grid.block_tokens(block[0])[None].repeat(2, 0), rtol=1e-5)


def test_an_order_is_model_order_on_permuted_tokens():
    grid, block = GRIDS["video, text first"]
    q, k, _ = qkv(grid)
    plain = TokenGrid((grid.tokens,))
    for order in grid.orders:
        slots = grid.index(order)
        expected = calibrate.block_mass(q[:, slots], k[:, slots], plain, "N", block)
        np.testing.assert_allclose(calibrate.block_mass(q, k, grid, order, block), expected, rtol=1e-5)


def test_each_head_has_its_order_and_its_batch_is_averaged():
    grid, block = GRIDS["video, text first"]
    q, k, _ = qkv(grid, heads=3, batch=2)
    names = ["HWF", "FHW", "WFH"]
    mixed = np.asarray(calibrate.block_mass(q, k, grid, names, block))
    for head, name in enumerate(names):
        np.testing.assert_array_equal(mixed[head], calibrate.block_mass(q, k, grid, name, block)[head])
    alone = [np.asarray(calibrate.block_mass(q[i : i + 1], k[i : i + 1], grid, names, block)) for i in range(2)]
    np.testing.assert_allclose(mixed, np.mean(alone, 0), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    grid, block = GRIDS["image"]
    q, k, _ = (jnp.asarray(x, dtype) for x in qkv(grid))
    p = full_map(*(np.asarray(x, np.float32) for x in (q, k)))
    slots = grid.index("WH")
    mass = calibrate.block_mass(q, k, grid, "WH", block)
    np.testing.assert_allclose(mass, blocks_of(p[..., slots, :][..., slots], block).mean(1), rtol=3e-5, atol=1e-7)


def test_scores_in_the_thousands():
    grid, block = GRIDS["image"]
    q, k, _ = qkv(grid, scale=60.0)
    assert abs(q[0, :, 0] @ k[0, :, 0].T).max() / 4 > 4000
    slots = grid.index("HW")
    mass = np.asarray(calibrate.block_mass(q, k, grid, "HW", block))
    expected = blocks_of(full_map(q, k)[..., slots, :][..., slots], block).mean(1)
    np.testing.assert_allclose(mass, expected, rtol=2e-3, atol=1e-3)  # a score of 4000 has 3e-4 of float32 rounding
    np.testing.assert_allclose(mass.sum(), grid.tokens * 2, rtol=1e-3)


@pytest.mark.parametrize("name", ["video, text first", "bricks, no text", "63", "block larger than strip"])
def test_what_the_paper_sees_of_a_block(name):
    """Shares of small elements and max / mean, over the grid part only."""
    grid, block = GRIDS[name]
    q, k, _ = qkv(grid, batch=2)
    p, eps = full_map(q, k), 0.7 / grid.tokens
    for order in grid.orders:
        slots = grid.index(order)[: grid.grid_tokens]
        part = p[..., slots, :][..., slots]
        small, psi = _mass.block_shapes(q, k, _mass.row_lse(q, k), np.stack([slots] * 2), eps, block=block)
        np.testing.assert_allclose(small, blocks_of(part < eps, block, np.mean), atol=2e-4)
        np.testing.assert_allclose(psi, blocks_of(part, block, np.max) / blocks_of(part, block, np.mean), rtol=1e-4)


def test_a_block_beyond_float32_is_even():
    """exp underflows to 0 in a whole block: max / mean is 1 there, not NaN."""
    grid = TokenGrid((128,))
    q = np.zeros((1, 128, 1, 8), np.float32)
    q[:, :64, :, 0], q[:, 64:, :, 1] = 100, 100
    small, psi = _mass.block_shapes(q, q, _mass.row_lse(q, q), grid.index("N")[None], 1e-9, block=(64, 64))
    np.testing.assert_array_equal(psi[0, 0], np.ones((2, 2)))
    np.testing.assert_array_equal(small[0, 0], [[0, 1], [1, 0]])


def test_attention_map_is_the_mean_of_the_map():
    grid, _ = GRIDS["video, text first"]
    q, k, _ = qkv(grid)
    slots = grid.index("WFH")
    p = full_map(q, k)[..., slots, :][..., slots].mean(1)
    picture = calibrate.attention_map(q, k, grid, "WFH", size=50)
    np.testing.assert_allclose(picture, blocks_of(p, (5, 5), np.mean), rtol=3e-5)
    assert picture.shape == (2, 44, 44)
    assert calibrate.attention_map(q, k, grid, "WFH", size=1000).shape == (2, grid.tokens, grid.tokens)


def test_no_array_of_tokens_by_tokens():
    """The largest array of the whole computation is a strip."""
    tokens, block = 8192, (64, 64)
    x = jax.ShapeDtypeStruct((1, tokens, 2, 8), jnp.float32)
    lse = jax.eval_shape(_mass.row_lse, x, x)
    slots = jax.ShapeDtypeStruct((2, tokens), jnp.int32)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "size"))
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    def largest(f, *args):
        return max(sizes(jax.make_jaxpr(f)(*args).jaxpr))

    strip = 256 * tokens
    assert strip < tokens * tokens / 30
    assert largest(_mass.row_lse, x, x) == strip
    assert largest(lambda *a: _mass.block_sums(*a, block=block), x, x, lse, slots) == strip
    assert largest(lambda *a: _mass.block_shapes(*a, 1e-3, block=block), x, x, lse, slots) == strip


def test_twice_the_same_bits():
    grid, block = GRIDS["2048"]
    q, k, _ = qkv(grid)
    first, again = (np.asarray(calibrate.block_mass(q, k, grid, "HFW", block)) for _ in range(2))
    np.testing.assert_array_equal(first, again)


GRID = TokenGrid((3, 4, 5), text=4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": np.zeros((1, 64, 2))}, r"q and k must both be \[B, 64, heads, D\] .*got q \(1, 64, 2\)"),
        (
            {"q": np.zeros((1, 60, 2, 8))},
            r"\[B, 64, heads, D\] for 64 tokens \(grid \(3, 4, 5\), text 4\); got q \(1, 60",
        ),
        ({"k": np.zeros((1, 64, 3, 8))}, r"got q \(1, 64, 2, 8\) and k \(1, 64, 3, 8\)"),
        ({"order": "XYZ"}, "order must be one of FHW, .*got 'XYZ'"),
        ({"order": ["FHW"]}, r"one per head of q, 2; got 1: \['FHW'\]"),
        ({"block": (64, 0)}, r"block must be .*positive ints.*got \(64, 0\)"),
    ],
)
def test_bad_arguments(change, named):
    arguments = {
        "q": np.zeros((1, 64, 2, 8)),
        "k": np.zeros((1, 64, 2, 8)),
        "grid": GRID,
        "order": "FHW",
        "block": (16, 16),
    }
    with pytest.raises(ValueError, match=named):
        calibrate.block_mass(**arguments | change)


def test_a_picture_without_pixels():
    with pytest.raises(ValueError, match="size must be a positive number of pixels; got 0"):
        calibrate.attention_map(np.zeros((1, 64, 2, 8)), np.zeros((1, 64, 2, 8)), GRID, "FHW", size=0)


@pytest.mark.parametrize("name", ["video, text first", "one token", "65", "block larger than strip"])
def test_incoherence_is_that_of_the_held_map_in_every_order(name):
    grid, block = GRIDS[name]
    q, k, _ = qkv(grid, batch=2)
    p = full_map(q, k)
    for order in grid.orders[:2]:
        slots = grid.index(order)
        moved = jnp.asarray(p[..., slots, :][..., slots], jnp.float32)
        groups = {"row": (1, grid.tokens), "block": block, "block row": (1, block[1])}
        found = calibrate.incoherence(q, k, grid, order, block)
        assert list(found) == list(groups)
        for group, shape in groups.items():
            expected = metrics.incoherence(moved, group=shape).mean((1, 2, 3))
            np.testing.assert_allclose(found[group], expected, rtol=1e-4)


def test_reordering_lowers_the_incoherence_of_blocks_and_leaves_that_of_rows():
    """PAROAttention, figure 3: 483 in rows, 93 in blocks, 22 in blocks of the right order; here on a planted head."""
    grid = TokenGrid((8, 8, 8))
    q, k = bench.local_head(grid, (0.03, 0.3, 1.5), 64, np.random.default_rng(1), 9.0)  # sees far along F only
    before, after = (calibrate.incoherence(q, k, grid, order, (64, 64)) for order in ("FHW", "WHF"))
    np.testing.assert_allclose(before["row"], after["row"], rtol=1e-5)
    assert (after["block"] < 0.6 * before["block"]).all() and (after["block"] < after["row"]).all()
    with pytest.raises(ValueError, match="'XYZ'"):
        calibrate.incoherence(q, k, grid, "XYZ")


@pytest.mark.parametrize("name", [*list(GRIDS)[:2], "block larger than strip"])
def test_the_error_of_a_skipped_block_is_that_of_the_held_map(name):
    """E_ij sums the squared changes of each query's output when j alone is skipped, times the weight that is left."""
    grid, (bq, bk) = GRIDS[name]
    q, k, v = qkv(grid, batch=2)
    slots = np.stack([grid.index(order) for order in (grid.orders * 2)[:2]])
    errors, size = _mass.block_errors(q, k, v, _mass.row_lse(q, k), slots, block=(bq, bk))
    p = np.stack([x[:, s][..., s] for x, s in zip(full_map(q, k), slots, strict=True)])
    value = np.stack([x[:, s] for x, s in zip(v.astype(np.float64).transpose(2, 0, 1, 3), slots, strict=True)])
    dense = p @ value
    np.testing.assert_allclose(size, (dense**2).sum((-1, -2)).mean(1), rtol=1e-5)
    expected = np.zeros(errors.shape)
    for j in range(expected.shape[-1]):
        rest = p.copy()
        rest[..., j * bk : (j + 1) * bk] = 0
        kept = rest.sum(-1, keepdims=True)
        change = (kept * (rest @ value / np.where(kept > 0, kept, 1) - dense) ** 2 * kept).sum(-1).mean(1)
        expected[..., j] = np.add.reduceat(change, range(0, grid.tokens, bq), axis=-1)
    np.testing.assert_allclose(errors, expected, rtol=1e-4, atol=1e-6 * expected.max())
