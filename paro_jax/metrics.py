"""How close one array is to another: images and videos in dB and SSIM, attention outputs, attention mass, outliers.

PSNR and SSIM come from dm-pix (imported on first use); the rest is a line of arithmetic each. Every function computes
in f32, works under `jit` and returns an f32 array. NaN in, NaN out.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_SSIM_WINDOW = 11  # pixels; the Gaussian window of Wang et al. 2004, "Image quality assessment"


def psnr(reference, image, *, data_range: float) -> jax.Array:
    """Peak signal-to-noise ratio in dB, one number: 10 log10(data_range^2 / mean squared error).

    Args:
      reference, image: [H, W, C], or a video [F, H, W, C], or any number of axes before H, W, C. Of one shape.
      data_range: largest possible value minus smallest possible value: 1.0 for [0, 1], 2.0 for [-1, 1], 255 for uint8.

    Returns:
      f32 []. The squared error is averaged over everything, frames included, before the logarithm, so a frame that
      happens to be equal does not make a video's PSNR infinite. Equal arrays give inf.

    Raises:
      ValueError: shapes differ, fewer than three axes, an empty array, `data_range` not a positive number.
    """
    a, b = _images(reference, image, data_range)
    import dm_pix

    # dm-pix averages over H, W, C of each image; ours is the mean over images of what it puts into the logarithm.
    return -10.0 * jnp.log10(jnp.mean(dm_pix.mse(a, b)))


def ssim(reference, image, *, data_range: float) -> jax.Array:
    """Structural similarity, one number in [-1, 1]: the mean over frames, pixels and channels.

    Wang, Bovik, Sheikh, Simoncelli 2004: Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03, no padding.

    Args: as `psnr`. H and W are at least 11 pixels.

    Returns:
      f32 [].

    Raises:
      ValueError: as `psnr`, and H or W under 11.
    """
    a, b = _images(reference, image, data_range)
    if min(a.shape[1:3]) < _SSIM_WINDOW:
        raise ValueError(
            f"reference: SSIM needs height and width of at least {_SSIM_WINDOW} pixels, got {np.shape(reference)}; "
            "use psnr for smaller images"
        )
    import dm_pix

    return jnp.mean(dm_pix.ssim(a, b, max_val=1.0))


def cosine(reference, other) -> jax.Array:
    """Cosine similarity of two arrays of one shape, flattened: f32 [] in [-1, 1].

    Two zero arrays give 1, one zero array gives 0.

    Raises:
      ValueError: shapes differ, or the arrays are empty.
    """
    a, b = _pair("reference", reference, "other", other)
    # Divided by the largest entry first, so that squares neither overflow nor vanish.
    a_max, b_max = jnp.max(jnp.abs(a)), jnp.max(jnp.abs(b))
    a, b = a / jnp.where(a_max == 0, 1, a_max), b / jnp.where(b_max == 0, 1, b_max)
    norm = jnp.sqrt(jnp.sum(a * a) * jnp.sum(b * b))
    # Not from the maxima: on a CPU XLA's max can lose a NaN, and a NaN must stay one.
    both_zero = jnp.all(a == 0) & jnp.all(b == 0)
    value = jnp.clip(jnp.sum(a * b) / jnp.where(norm == 0, 1, norm), -1, 1)
    return jnp.where(both_zero, 1.0, value)


def relative_l1(reference, other) -> jax.Array:
    """sum |other - reference| / sum |reference|: f32 [], 0 when equal.

    A zero reference gives inf, or 0 when `other` is zero too.

    Raises:
      ValueError: shapes differ, or the arrays are empty.
    """
    a, b = _pair("reference", reference, "other", other)
    # Means, not sums: f32 sums of long arrays would lose digits first.
    error, size = jnp.mean(jnp.abs(b - a)), jnp.mean(jnp.abs(a))
    return jnp.where(error == 0, 0.0, error / size)


def retained_mass(mass, keep) -> jax.Array:
    """The part of the attention that a mask keeps: sum of `mass` over kept blocks / sum of `mass`.

    Args:
      mass: [..., nq, nk] attention mass of each block, summed over its elements (softmax rows sum to 1), >= 0.
      keep: bool [..., nq, nk], True where the block is kept; of the same shape. A `BlockMask`'s `.keep` fits.

    Returns:
      f32 [...] in [0, 1], one number per leading index (per head, say). Where there is no mass at all, NaN.

    Raises:
      ValueError: shapes differ, fewer than two axes, or `keep` is not boolean.
    """
    mass, keep = jnp.asarray(mass, jnp.float32), jnp.asarray(keep)
    if mass.ndim < 2 or mass.shape != keep.shape:
        raise ValueError(
            f"keep: expected the shape of mass, [..., nq, nk]; got mass {mass.shape} and keep {keep.shape}; "
            "nothing is broadcast, repeat the mask for each head first"
        )
    if keep.dtype != jnp.bool_:
        raise ValueError(f"keep: expected booleans (True = kept), got {keep.dtype}; compare it with a threshold first")
    return jnp.sum(jnp.where(keep, mass, 0), axis=(-2, -1)) / jnp.sum(mass, axis=(-2, -1))


def incoherence(x, *, group: Sequence[int] | None = None) -> jax.Array:
    """max |x| / mean |x| in each group: 1 for a constant group, its size for a single spike.

    The paper's Psi (PAROAttention, eq. 1-3): what makes a group hard to quantise with one scale.

    Args:
      x: [..., R, C].
      group: (rows, columns) that one scale covers, both >= 1; None for all of R and C. The groups of the last rows and
        columns may be smaller; they are measured over the elements they have.

    Returns:
      f32 [..., ceil(R/rows), ceil(C/columns)]. A group of zeros gives 1.

    Raises:
      ValueError: fewer than two axes, an empty array, or a group that is not two positive integers.
    """
    x = jnp.abs(jnp.asarray(x, jnp.float32))
    if x.ndim < 2 or x.size == 0:
        raise ValueError(f"x: expected a non-empty array [..., rows, columns], got shape {x.shape}")
    rows, columns = x.shape[-2:] if group is None else _group(group)
    n_rows, n_columns = -(-x.shape[-2] // rows), -(-x.shape[-1] // columns)
    pad = [(0, 0)] * (x.ndim - 2) + [(0, n_rows * rows - x.shape[-2]), (0, n_columns * columns - x.shape[-1])]
    tiles = jnp.pad(x, pad).reshape(*x.shape[:-2], n_rows, rows, n_columns, columns)
    # The padding adds nothing to a sum of magnitudes, but it must not be counted.
    height = np.minimum(rows, x.shape[-2] - rows * np.arange(n_rows))
    width = np.minimum(columns, x.shape[-1] - columns * np.arange(n_columns))
    # On a CPU XLA's max can lose a NaN, hence the question.
    peak = jnp.where(jnp.isnan(tiles).any(axis=(-3, -1)), jnp.nan, jnp.max(tiles, axis=(-3, -1)))
    # Relative to the peak before summing, so that a group of tiny numbers does not vanish in f32.
    tiles = tiles / jnp.where(peak == 0, 1, peak)[..., :, None, :, None]
    elements = np.broadcast_to(np.outer(height, width).astype(np.float32), peak.shape)
    mean = jnp.sum(tiles, axis=(-3, -1)) / elements
    return jnp.where(peak == 0, 1.0, 1.0 / mean)


def _group(group: Sequence[int]) -> tuple[int, int]:
    if len(group) != 2 or any(not isinstance(n, int | np.integer) or n < 1 for n in group):
        raise ValueError(f"group: expected two positive integers (rows, columns), got {group!r}")
    return int(group[0]), int(group[1])


def _pair(name_a: str, a, name_b: str, b) -> tuple[jax.Array, jax.Array]:
    """Both as f32, of one non-empty shape."""
    if np.shape(a) != np.shape(b):
        raise ValueError(
            f"{name_b}: expected the shape of {name_a}, {np.shape(a)}, got {np.shape(b)}; nothing is broadcast"
        )
    if np.size(a) == 0:
        raise ValueError(f"{name_a}: expected at least one element, got shape {np.shape(a)}")
    return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)


def _images(reference, image, data_range: float) -> tuple[jax.Array, jax.Array]:
    """Both as f32 [images, H, W, C], divided by `data_range`, which is the range dm-pix assumes for PSNR."""
    a, b = _pair("reference", reference, "image", image)
    if a.ndim < 3:
        raise ValueError(f"reference: expected [H, W, C] or [frames, H, W, C], got shape {a.shape}")
    if not (np.ndim(data_range) == 0 and np.isfinite(data_range) and data_range > 0):
        raise ValueError(
            f"data_range: expected a positive number (1.0 for images in [0, 1], 2.0 for [-1, 1]), got {data_range!r}"
        )
    shape = (-1, *a.shape[-3:])
    return a.reshape(shape) / data_range, b.reshape(shape) / data_range
