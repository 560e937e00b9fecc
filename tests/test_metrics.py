"""Metrics against float64 numpy written out independently, and the claims in their docstrings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paro_jax import metrics


def video(rng, *shape, low=0.0, high=1.0):
    """A smooth video and a noisy copy of it."""
    grid = np.meshgrid(*[np.linspace(0, 3, n) for n in shape], indexing="ij")
    clean = low + (high - low) * (0.5 + 0.4 * np.sin(sum((i + 1) * g for i, g in enumerate(grid))))
    return clean, np.clip(clean + (high - low) * 0.05 * rng.standard_normal(shape), low, high)


def psnr_float64(a, b, data_range):
    return 10 * np.log10(data_range**2 / np.mean((np.float64(a) - np.float64(b)) ** 2))


def ssim_float64(a, b, data_range):
    """Wang et al. 2004, eq. 13, window by window."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for x, y in zip(np.float64(a).reshape(-1, *a.shape[-3:]), np.float64(b).reshape(-1, *b.shape[-3:]), strict=True):
        # [rows, columns, channels, 11, 11]
        x = np.lib.stride_tricks.sliding_window_view(x, (11, 11), axis=(0, 1))
        y = np.lib.stride_tricks.sliding_window_view(y, (11, 11), axis=(0, 1))

        def mean(z):
            return np.sum(window * z, axis=(-2, -1))

        mx, my = mean(x), mean(y)
        vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(values)


@pytest.mark.parametrize("shape", [(16, 19, 3), (5, 13, 17, 3), (2, 3, 12, 11, 1)], ids=["image", "video", "batch"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_psnr_and_ssim_match_float64_numpy(shape, low, high):
    a, b = video(np.random.default_rng(0), *shape, low=low, high=high)
    data_range = high - low
    assert metrics.psnr(a, b, data_range=data_range) == pytest.approx(psnr_float64(a, b, data_range), abs=1e-3)
    assert metrics.ssim(a, b, data_range=data_range) == pytest.approx(ssim_float64(a, b, data_range), abs=1e-4)


def test_uint8_is_not_subtracted_as_uint8():
    a, b = np.full((12, 12, 3), 10, np.uint8), np.full((12, 12, 3), 20, np.uint8)
    expected = 20 * np.log10(255 / 10)
    assert metrics.psnr(a, b, data_range=255) == pytest.approx(expected, abs=1e-4)
    assert metrics.psnr(b, a, data_range=255) == pytest.approx(expected, abs=1e-4)


def test_equal_videos():
    a, _ = video(np.random.default_rng(1), 3, 12, 13, 3)
    assert metrics.psnr(a, a, data_range=1.0) == np.inf
    assert metrics.ssim(a, a, data_range=1.0) == pytest.approx(1.0, abs=1e-6)
    assert metrics.cosine(a, a) == pytest.approx(1.0, abs=1e-6)
    assert metrics.relative_l1(a, a) == 0


def test_one_equal_frame_leaves_a_videos_psnr_finite():
    a, b = video(np.random.default_rng(2), 4, 12, 12, 3)
    b[0] = a[0]
    assert np.isfinite(metrics.psnr(a, b, data_range=1.0))


def test_nan_is_reported_not_hidden():
    a, b = video(np.random.default_rng(3), 12, 12, 3)
    b[0, 0, 0] = np.nan
    for value in (
        metrics.psnr(a, b, data_range=1.0),
        metrics.ssim(a, b, data_range=1.0),
        metrics.cosine(a, b),
        metrics.relative_l1(a, b),
    ):
        assert np.isnan(value)


# Every shape that hypothesis draws is compiled: as one program, not operation by operation.
compiled = jax.jit(lambda a, b: (metrics.cosine(a, b), metrics.relative_l1(a, b)))
compiled_incoherence = jax.jit(metrics.incoherence, static_argnames="group")


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40)),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_cosine_and_relative_l1_match_float64_numpy_at_any_scale(seed, shape, scale):
    a, b = np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32) * np.float32(scale)
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    cosine, relative_l1 = compiled(a, b)
    assert cosine == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)), abs=1e-5)
    assert relative_l1 == pytest.approx(np.abs(y - x).sum() / np.abs(x).sum(), rel=1e-5)


def test_cosine_and_relative_l1_of_zeros():
    zero, one = np.zeros(4), np.ones(4)
    assert metrics.cosine(zero, zero) == 1
    assert metrics.cosine(zero, one) == 0
    assert metrics.cosine(one, -one) == -1
    assert metrics.relative_l1(zero, zero) == 0
    assert metrics.relative_l1(zero, one) == np.inf
    assert metrics.relative_l1(one, zero) == 1


def test_retained_mass_counts_kept_blocks_per_head():
    mass = np.array([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]])
    keep = np.array([[[True, False], [False, True]], [[True, True], [True, True]]])
    np.testing.assert_allclose(metrics.retained_mass(mass, keep), [0.5, 1.0])
    np.testing.assert_allclose(metrics.retained_mass(mass[0], keep[0]), 0.5)


def test_retained_mass_of_no_kept_block_and_of_no_mass():
    mass, keep = np.array([[1.0, 1.0]]), np.array([[True, False]])
    assert metrics.retained_mass(mass, np.zeros_like(keep)) == 0
    assert np.isnan(metrics.retained_mass(np.zeros_like(mass), keep))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)),
    group=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_incoherence_matches_a_loop_over_groups(seed, shape, group):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    got = compiled_incoherence(x, group=group)
    assert got.shape == (shape[0], -(-shape[1] // group[0]), -(-shape[2] // group[1]))
    for head, i, j in np.ndindex(got.shape):
        tile = np.abs(x[head, i * group[0] : (i + 1) * group[0], j * group[1] : (j + 1) * group[1]].astype(np.float64))
        assert got[head, i, j] == pytest.approx(tile.max() / tile.mean(), rel=1e-5)


def test_incoherence_of_a_constant_a_spike_and_nothing():
    spike = np.zeros((8, 8))
    spike[3, 4] = 7.0
    assert metrics.incoherence(spike) == 64
    assert metrics.incoherence(np.full((8, 8), -2.0)) == 1
    assert metrics.incoherence(np.zeros((8, 8))) == 1
    # A diagonal is the paper's hard case: one value per row of a 64 x 64 block.
    np.testing.assert_allclose(metrics.incoherence(np.eye(128), group=(64, 64)), [[64, 1], [1, 64]])


def test_all_work_under_jit():
    a, b = video(np.random.default_rng(4), 2, 12, 12, 3)
    mass, keep = np.ones((2, 3, 3)), np.eye(3, dtype=bool)[None].repeat(2, 0)

    @jax.jit
    def everything(a, b, mass, keep):
        return (
            metrics.psnr(a, b, data_range=1.0),
            metrics.ssim(a, b, data_range=1.0),
            metrics.cosine(a, b),
            metrics.relative_l1(a, b),
            metrics.retained_mass(mass, keep),
            metrics.incoherence(a[0, ..., 0], group=(5, 5)),
        )

    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    jitted = everything(a, b, mass, keep)
    with jax.disable_jit():
        plain = everything(a, b, mass, keep)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), jitted, plain)
    assert all(x.dtype == jnp.float32 for x in jitted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m.psnr(np.ones((4, 4, 3)), np.ones((4, 4, 1)), data_range=1.0),
            r"image: .*\(4, 4, 3\).*\(4, 4, 1\)",
        ),
        (lambda m: m.psnr(np.ones((4, 4)), np.ones((4, 4)), data_range=1.0), r"reference: .*\[H, W, C\].*\(4, 4\)"),
        (lambda m: m.psnr(np.ones((0, 4, 3)), np.ones((0, 4, 3)), data_range=1.0), r"reference: .*at least one.*\(0,"),
        (lambda m: m.psnr(np.ones((4, 4, 3)), np.ones((4, 4, 3)), data_range=0.0), r"data_range: .*positive.*0\.0"),
        (lambda m: m.psnr(np.ones((4, 4, 3)), np.ones((4, 4, 3)), data_range=np.nan), r"data_range: .*positive.*nan"),
        (lambda m: m.ssim(np.ones((10, 40, 3)), np.ones((10, 40, 3)), data_range=1.0), r"at least 11 pixels.*\(10, 40"),
        (lambda m: m.cosine(np.ones(3), np.ones((3, 1))), r"other: .*\(3,\).*\(3, 1\).*broadcast"),
        (lambda m: m.relative_l1(np.ones(3), np.ones(1)), r"other: .*\(3,\).*\(1,\)"),
        (lambda m: m.retained_mass(np.ones((2, 3, 3)), np.ones((3, 3), bool)), r"keep: .*\(2, 3, 3\).*\(3, 3\)"),
        (lambda m: m.retained_mass(np.ones((3, 3)), np.ones((3, 3))), r"keep: expected booleans.*float"),
        (lambda m: m.incoherence(np.ones(3)), r"x: .*\(3,\)"),
        (lambda m: m.incoherence(np.ones((3, 3)), group=(0, 2)), r"group: .*two positive integers.*\(0, 2\)"),
        (lambda m: m.incoherence(np.ones((3, 3)), group=(2,)), r"group: .*two positive integers.*\(2,\)"),
    ],
)
def test_a_mistake_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(metrics)
