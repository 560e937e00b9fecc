"""Small samples of attention for the tests of calibration."""

import jax
import numpy as np

import calibrate
from calibrate import Sample
from paro_jax import TokenGrid

GRID = TokenGrid((3, 4, 5), text=4)  # 64 tokens; in blocks of 16 x 16, 4 x 4 blocks of which 7 are always kept
BLOCK = (16, 16)


def sample(site=0, step=0.0, seed=0, grid=GRID, heads=2, dim=8, batch=1, v=True):
    rng = np.random.default_rng((site, round(step * 1000), seed))
    q, k, value = rng.normal(scale=1.5, size=(3, batch, grid.tokens, heads, dim)).astype(np.float32)
    return Sample(site, step, q, k + 1, value if v else None)


def samples(sites=2, steps=(0.1, 0.6), prompts=1, **options):
    return [sample(s, t, p, **options) for p in range(prompts) for t in steps for s in range(sites)]


def make(given=None, grid=GRID, *, density=0.6, block=BLOCK, progress=False, **options):
    return calibrate.make_plan(
        samples() if given is None else given, grid, density=density, block=block, progress=progress, **options
    )


def keep(plan):
    return np.asarray(plan.mask().keep)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
