"""A workload made concrete: its grid, its tensors, and plans with masks that look like a model's."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

import calibrate
from calibrate.bench import local_head
from pallas_kernels.workloads import WORKLOADS
from paro_jax import AttentionPlan, BlockMask, QuantSpec, TokenGrid

GRIDS = {
    "cogvideox_5b": TokenGrid((13, 30, 45), text=226),
    "flux_2048": TokenGrid((128, 128), text=512),
    "flux_1024": TokenGrid((64, 64), text=512),
    "wan_14b_480p": TokenGrid((21, 30, 52)),
    "wan_14b_720p": TokenGrid((21, 45, 80)),
}
DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.125)
# How much a step along the head's own axis and along the others counts, and how sharp it looks. Heads take turns.
_LOOKS = ((0.04, 0.6, 6.0), (0.15, 1.0, 9.0))


@dataclass(frozen=True)
class Case:
    """One workload at one size: what tensors and masks are made from. Static and hashable."""

    workload: str
    grid: TokenGrid
    batch: int
    heads: int
    head_dim: int
    dtype: str
    block: tuple[int, int]
    densities: tuple[float, ...] = DENSITIES  # calibrated together

    @property
    def channels(self) -> int:
        """Of the model's hidden states."""
        return self.heads * self.head_dim

    def operations(self, keep: np.ndarray | None = None) -> float:
        """Of both products over the kept blocks, a multiply-add as two; over all where keep is None."""
        if keep is None:
            pairs = float(self.heads * self.grid.tokens**2)
        else:
            rows, columns = (self.grid.block_tokens(size).astype(np.float64) for size in self.block)
            pairs = float((rows @ keep.sum(0) @ columns).item())
        return 4.0 * self.batch * self.head_dim * pairs


def case(
    workload: str,
    *,
    dtype: str,
    block: tuple[int, int],
    tokens: int | None = None,
    heads: int | None = None,
    densities: tuple[float, ...] = DENSITIES,
) -> Case:
    """A workload of `pallas_kernels.workloads`, shrunk to about `tokens` tokens and `heads` heads where they are given.

    Shrinking scales every axis of the grid alike and the text with it, and takes one batch entry.
    Raises ValueError for a name without a grid.
    """
    if workload not in GRIDS:
        raise ValueError(f"workload: expected one of {', '.join(GRIDS)}, got {workload!r}.")
    request, grid = WORKLOADS[workload], GRIDS[workload]
    assert request.q_tokens == grid.tokens, f"{workload=}"
    batch, most = request.batch, request.heads
    if tokens is not None and tokens < grid.tokens:
        part = tokens / grid.tokens
        shape = tuple(max(2, round(n * part ** (1 / len(grid.shape)))) for n in grid.shape)
        grid, batch = TokenGrid(shape, text=round(grid.text * part)), 1
    return Case(workload, grid, batch, min(heads or most, most), request.head_dim, dtype, block, densities)


def looks(grid: TokenGrid) -> list[tuple[tuple[float, ...], float]]:
    """The kinds of heads: (what a step along each axis counts, sharpness). A head sees far along one axis only."""
    axes = len(grid.shape)
    kinds = []
    for near, far, strength in _LOOKS:
        for axis in range(axes):
            kinds.append((tuple(near if i == axis else far for i in range(axes)), strength))
    return kinds


@lru_cache(maxsize=2)
def _kinds(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """q and k of one head of each kind, float32 [1, N, kinds, D]."""
    rng = np.random.default_rng(0)
    heads = [local_head(case.grid, rates, case.head_dim, rng, strength) for rates, strength in looks(case.grid)]
    q, k = (np.concatenate(x, axis=2) for x in zip(*heads, strict=True))
    return q[:, :, : case.heads], k[:, :, : case.heads]


@lru_cache(maxsize=2)
def tensors(case: Case) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v [B, N, H, D] in model order: axis-local heads, no two heads or batch entries with the same numbers.

    Where no plan will be calibrated, of a workload without a name, they are plain noise.
    """
    shape, keys = (case.batch, case.grid.tokens, case.heads, case.head_dim), jax.random.split(jax.random.key(0), 3)
    if case.workload not in GRIDS:
        q, k, v = (jax.random.normal(key, shape, case.dtype) for key in keys)
        return q, k, v

    @jax.jit
    def filled(x, key):
        kinds = x.shape[2]
        x = jnp.take(x, jnp.arange(case.heads) % kinds, axis=2)
        noise = jax.random.normal(key, (case.batch, *x.shape[1:]), jnp.float32)
        return (x + 0.1 * noise).astype(case.dtype)

    q, k = (filled(x, key) for x, key in zip(_kinds(case), keys, strict=False))
    return q, k, jax.random.normal(keys[2], shape, case.dtype)


def plan(case: Case, mask: str, density: float, qk: str, pv: str) -> AttentionPlan:
    """The plan of a row: `mask` is "dense", "calibrated" (by `calibrate`, from heads as in `tensors`) or "random".

    Raises ValueError where a calibrated mask of this density cannot be: text and one block a row are always kept.
    """
    if mask == "calibrated" and density < 1:
        if density < (least := _least(case)):
            raise ValueError(
                f"density: expected at least {least:.3f}, what is always kept of {case.grid.tokens} tokens with "
                f"{case.grid.text} of text in blocks of {case.block}; got {density}."
            )
        found = _calibrated(case)[density]
    else:
        found = _made(case, mask, density)
    # bf16 has no use for a K mean, and jit no use for another key.
    k_mean = None if qk == "bf16" else found.k_mean
    return replace(found, quant=QuantSpec(qk=qk, pv=pv), k_mean=k_mean)  # type: ignore[arg-type]


def _made(case: Case, mask: str, density: float) -> AttentionPlan:
    shape = (case.heads, *case.grid.blocks(case.block))
    keep = np.ones(shape, bool)
    if mask == "random" and density < 1:
        keep = random_mask(shape, density)
    axes = case.grid.orders[: math.factorial(len(case.grid.shape))]
    orders = [axes[head % len(axes)] for head in range(case.heads)]
    k_mean = np.asarray(jnp.mean(tensors(case)[1].astype(jnp.float32), axis=(0, 1)))
    # Block 0 is first anyway: no other walk, but the structure of a calibrated plan, so that jit compiles once.
    first = np.zeros((*shape[:2], 1), np.uint16)
    return AttentionPlan.build(case.grid, order=orders, mask=BlockMask(keep, case.block), k_mean=k_mean, first=first)


def random_mask(shape: tuple[int, int, int], density: float, seed: int = 0) -> np.ndarray:
    """bool [H, nq, nk]: blocks drawn uniformly, exactly `density` of them where every row can keep one at least."""
    rng = np.random.default_rng(seed)
    score = rng.random(shape)
    np.put_along_axis(score, score.argmin(-1)[..., None], -1.0, -1)  # each row's first comes first
    kept = max(shape[0] * shape[1], round(density * score.size))
    return (score <= np.partition(score.ravel(), kept - 1)[kept - 1]).reshape(shape)


@lru_cache(maxsize=2)
def _calibrated(case: Case) -> dict[float, AttentionPlan]:
    """A plan per density that can be, calibrated on one head of each kind and dealt out to all heads."""
    q, k = _kinds(case)
    densities = [density for density in case.densities if _least(case) <= density < 1]
    if not densities:
        return {}
    made = calibrate.make_plans(
        [calibrate.Sample(0, 0.0, q, k)], case.grid, densities=densities, block=case.block, progress=False,
        text_columns="sparse", quant=QuantSpec(qk="int8", pv="int8"),
    )  # fmt: skip
    return {density: _dealt(plan[0], case.heads) for density, (plan, _) in zip(densities, made, strict=True)}


def _least(case: Case) -> float:
    """Least density of a calibrated mask: text queries are dense, their columns compete, and a row has one block."""
    always = case.grid.always_keep(case.block, columns=False)
    return (int(always.sum()) + int((~always.any(1)).sum())) / always.size


def _dealt(plan: AttentionPlan, heads: int) -> AttentionPlan:
    kind = np.arange(heads) % plan.heads
    return jax.tree.map(lambda x: x[kind], plan)
