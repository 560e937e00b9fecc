"""SpargeAttn (arXiv 2502.18137): the blocks that a map of block means keeps, and whole those it cannot judge."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paro_jax._attention import attention
from paro_jax._mask import BlockMask
from paro_jax._plan import AttentionPlan
from paro_jax.policies._apply import masked_attention
from paro_jax.policies._parts import (
    block_tokens,
    check_number,
    check_site,
    check_tokens,
    cut,
    dot,
    each,
    kernel_order,
    largest,
    top_p,
    with_text,
)

_PUBLISHED_SIMTHRS = tuple(i / 16 for i in range(-16, 16))
_BIN = 1 / 8  # simthr of all samples that lie this close count as one
_DENSE_BELOW = 0.1  # a head that skips less than this is not worth a mask
_NEVER_SIMILAR = 1.0  # self-similarity is at most 1, so no block is above it and every block is kept


def sparge(
    q: Any,
    k: Any,
    *,
    plan: AttentionPlan,
    topk: Any = None,
    cdfthr: Any = None,
    simthr: Any = -0.1,
    smooth_k: bool = True,
    sink: bool = False,
) -> BlockMask:
    """SpargeAttn's mask (arXiv 2502.18137, section 3.3) in the order of each head of the plan: keep [B, heads, nq, nk].

    q, k [B, N, heads, D], model order. Attention between the means of blocks says which blocks matter: with `topk` the
    floor(topk nk) heaviest of a row, with `cdfthr` the heaviest while their sum stays at or under it (the block that
    crosses is left out); at least one. A mean says nothing of a block whose tokens differ: rows and columns of blocks
    with mean pairwise cosine at or under `simthr` are kept whole, and do not compete. Only real tokens are averaged in
    the last, partial block. `smooth_k`: subtract the mean of K first. `sink`: keep the first key block. Knobs are
    numbers in [0, 1] (simthr [-1, 1]) or one per head, and may be traced.

    The published knobs are topk 0.5 with simthr -0.1 (nothing is dissimilar), before that cdfthr 0.98 with simthr 0.6;
    `tune_sparge` finds them per head. On PARO-ordered tokens means say more: pass PARO's plan. With the plan
    `AttentionPlan.dense(grid, heads=...)` this is SpargeAttn alone.
    """
    plan = check_site(plan)
    q, k = check_tokens(plan.grid.tokens, plan.heads, q=q, k=k)
    if (topk is None) == (cdfthr is None):
        raise ValueError(f"topk or cdfthr must be given, and not both; got topk={topk!r} and cdfthr={cdfthr!r}.")
    simthr = check_number("simthr", simthr, -1, 1, plan.heads)
    name, given = ("topk", topk) if cdfthr is None else ("cdfthr", cdfthr)
    return _sparge(q, k, plan, check_number(name, given, 0, 1, plan.heads), simthr, cdfthr is None, smooth_k, sink)


@partial(jax.jit, static_argnames=("count", "smooth_k", "sink"))
def _sparge(q, k, plan: AttentionPlan, limit, simthr, count: bool, smooth_k: bool, sink: bool) -> BlockMask:
    q, k = kernel_order(plan, q=q, k=k)
    simthr, limit = simthr[None, :, None], limit[None, :, None]
    if smooth_k:
        k = k - k.mean(-2, keepdims=True)
    (mean_q, similar_q), (mean_k, similar_k) = (_pooled(x, size) for x, size in zip((q, k), plan.block, strict=True))
    free_rows, free_columns = similar_q > simthr, (similar_k > simthr)[:, :, None]
    scores = jnp.where(free_columns, dot(mean_q, mean_k) / math.sqrt(q.shape[-1]), -jnp.inf)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))  # not softmax: a row may be all -inf
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    if count:
        # A share such as 0.7 of 10 blocks is 7, whatever float32 makes of it.
        keep = largest(weights, jnp.maximum(1, jnp.floor(limit * weights.shape[-1] + 1e-4)))
    else:
        keep = top_p(weights, limit, include_crossing=False)
    keep = keep | ~free_rows[..., None] | ~free_columns
    if sink:
        keep = keep.at[..., 0].set(True)
    return with_text(keep, plan.grid, plan.block)


def _pooled(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Means [B, heads, blocks, D] of the real tokens of each block, and their mean pairwise cosine [B, heads, blocks].

    The cosines of all pairs, themselves included, are the square of the summed directions.
    """
    tokens = jnp.asarray(block_tokens(x.shape[-2], size))[None, None]
    directions = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
    mean, direction = (cut(y, size).sum(-2) / tokens[..., None] for y in (x, directions))
    return mean, jnp.minimum(jnp.square(direction).sum(-1), 1)


def sparge_pv_skip(q: Any, k: Any, mask: BlockMask, *, plan: AttentionPlan, pv_skip: Any = 50.0) -> BlockMask:
    """`mask` less the blocks that SpargeAttn's kernel leaves out of PV (arXiv 2502.18137, section 3.4).

    q, k [B, N, heads, D]; mask [heads, nq, nk] or [B, heads, nq, nk]. Key blocks are visited in order; one is skipped
    when no query of the block has a score in it above the running maximum less `pv_skip` (in powers of two, >= 0, one
    number or one per head): each weight lost is at most 2^-pv_skip of the largest. Text stays.

    A fidelity study, not a saving: the kernel needs QK^T of those blocks to find out, and so does this, in strips of
    one query block by all keys. The density returned is that of PV.
    """
    plan = check_site(plan)
    q, k = check_tokens(plan.grid.tokens, plan.heads, q=q, k=k)
    pv_skip = check_number("pv_skip", pv_skip, 0, math.inf, plan.heads)
    shape = (q.shape[0], plan.heads, *plan.grid.blocks(plan.block))
    keep = jnp.asarray(mask.keep)
    if mask.block != plan.block or keep.ndim not in (3, 4) or keep.shape[-3:] != shape[1:]:
        raise ValueError(f"mask must be {list(shape)} in blocks of {plan.block}; got {list(keep.shape)}, {mask.block}.")
    return _pv_skip(q, k, plan, jnp.broadcast_to(keep if keep.ndim == 4 else keep[None], shape), pv_skip)


@jax.jit
def _pv_skip(q, k, plan: AttentionPlan, keep, pv_skip) -> BlockMask:
    q, k = kernel_order(plan, q=q, k=k)
    (bq, bk), grid, shape = plan.block, plan.grid, keep.shape
    q = q * (math.log2(math.e) / math.sqrt(q.shape[-1]))
    real_q, real_k = (np.arange(n * b).reshape(n, b) < grid.tokens for n, b in zip(shape[2:], plan.block, strict=True))

    def head(q, k, keep, allowed):
        def strip(args):
            rows, real, keep = args
            scores = jnp.where(jnp.asarray(real_k)[None], dot(rows, k).reshape(bq, *real_k.shape), -jnp.inf)
            peak = jnp.where(keep[None], scores.max(-1), -jnp.inf)
            before = jax.lax.cummax(jnp.pad(peak, ((0, 0), (1, 0)), constant_values=-jnp.inf)[:, :-1], axis=1)
            # Not peak - before: both are -inf where nothing has been kept yet.
            return keep & ((peak + allowed > before) & real[:, None]).any(0)

        return jax.lax.map(strip, (cut(q, bq), jnp.asarray(real_q), keep))

    allowed = jnp.broadcast_to(pv_skip[None], shape[:2])
    padded = cut(k, bk).reshape(*shape[:2], -1, k.shape[-1])
    return with_text(each(head, q, padded, keep, allowed), grid, plan.block) & BlockMask(keep, plan.block)


class SpargeTuning(NamedTuple):
    """Knobs of `sparge` and `sparge_pv_skip` per head, float32 [heads] each; a head with simthr 1 is dense."""

    simthr: jax.Array
    cdfthr: jax.Array
    pv_skip: jax.Array


def tune_sparge(
    samples: Iterable[tuple[Any, Any, Any]],
    *,
    plan: AttentionPlan,
    l1: float = 0.07,
    pv_l1: float = 0.08,
    simthrs: Sequence[float] = _PUBLISHED_SIMTHRS,
    progress: bool = True,
) -> SpargeTuning:
    """SpargeAttn's search for the knobs of each head (arXiv 2502.18137, section 3.6); offline, all heads at a time.

    samples: (q, k, v) of one site, [B, N, heads, D] each. For every `simthr`, rising until a head skips less than a
    tenth, bisects cdfthr to 1e-3 so that the relative L1 error of the head's output, sum |o - dense| / sum |dense|,
    stays under `l1`, then pv_skip in [0, 50] to 0.1 so that it stays under `pv_l1`. What was found is pooled over
    samples in bins of simthr 1/8 wide; the bin that skips most gives the largest of each of its knobs. A head that
    skips a tenth or less on average there becomes dense.

    Raises ValueError unless 0 < l1 < pv_l1, and without samples.
    """
    from tqdm import tqdm  # not for those who only attend

    plan = check_site(plan)
    if not 0 < l1 < pv_l1:
        raise ValueError(f"l1 must be above 0 and below pv_l1, errors add up; got l1={l1!r} and pv_l1={pv_l1!r}.")
    for simthr in simthrs:
        check_number("simthrs", simthr, -1, 1)
    rows = []
    for sample in samples:
        q, k, v = check_tokens(plan.grid.tokens, plan.heads, q=sample[0], k=sample[1], v=sample[2])
        full = AttentionPlan.dense(plan.grid, heads=plan.heads, block=plan.block)
        trial = partial(_trial, q, k, v, attention(q, k, v, plan=full), plan)
        rows.append(_tune_sample(trial, l1, pv_l1, tqdm(sorted(simthrs), "tune", disable=not progress), plan.heads))
    if not rows or not len(simthrs):
        raise ValueError("samples must hold at least one (q, k, v), and simthrs at least one number; got none.")
    return _pool(np.concatenate(rows), plan.heads)


_Trial = Callable[[Any, Any, Any], tuple[np.ndarray, np.ndarray]]  # knobs [heads] -> error and density [heads]


def _tune_sample(trial: _Trial, l1: float, pv_l1: float, simthrs: Iterable[float], heads: int) -> np.ndarray:
    """float64 [found, heads, (simthr, cdfthr, pv_skip, skipped)]; NaN where a head was given up."""
    rows, alive = [], np.ones(heads, bool)
    for simthr in simthrs:
        cdfthr = _bisect(lambda knob, s=simthr: trial(s, knob, np.inf)[0] < l1, 1.0, 1e-3, heads)
        alive &= 1 - trial(simthr, cdfthr, np.inf)[1] >= _DENSE_BELOW
        if not alive.any():
            break
        skip = _bisect(lambda knob, s=simthr, c=cdfthr: trial(s, c, knob)[0] < pv_l1, 50.0, 0.1, heads)
        row = np.stack([np.full(heads, simthr), cdfthr, skip, 1 - trial(simthr, cdfthr, skip)[1]], -1)
        rows.append(np.where(alive[:, None], row, np.nan))
    return np.array(rows).reshape(-1, heads, 4)


def _bisect(good: Any, high: float, width: float, heads: int) -> np.ndarray:
    """float64 [heads]: the least knob in [0, high] with good(knobs) [heads], to `width`; `high` where none is."""
    low, top = np.zeros(heads), np.full(heads, high)
    while (top - low).max() > width:
        middle = (low + top) / 2
        fits = np.asarray(good(middle))
        low, top = np.where(fits, low, middle), np.where(fits, middle, top)
    return top


def _pool(found: np.ndarray, heads: int) -> SpargeTuning:
    knobs = np.zeros((heads, 3))
    for head in range(heads):
        rows = found[:, head]
        rows = rows[~np.isnan(rows).any(1)]
        bins = np.floor(rows[:, 0] / _BIN)
        totals = {b: rows[bins == b, 3].sum() for b in np.unique(bins)}
        chosen = rows[bins == max(totals, key=lambda b: totals[b])] if totals else rows
        dense = len(chosen) == 0 or chosen[:, 3].mean() <= _DENSE_BELOW
        knobs[head] = (_NEVER_SIMILAR, 1, 50) if dense else chosen[:, :3].max(0)
    return SpargeTuning(*jnp.asarray(knobs.T, jnp.float32))


@jax.jit
def _errors(q, k, v, dense, plan: AttentionPlan, simthr, cdfthr, pv_skip):
    """Relative L1 error and density of each head, float32 [heads]."""
    mask = sparge(q, k, plan=plan, cdfthr=cdfthr, simthr=simthr)
    mask = sparge_pv_skip(q, k, mask, plan=plan, pv_skip=pv_skip)
    out = masked_attention(q, k, v, mask, plan=plan).astype(jnp.float32)
    dense = dense.astype(jnp.float32)
    error = jnp.abs(out - dense).sum((0, 1, 3)) / jnp.abs(dense).sum((0, 1, 3))
    return error, mask.keep.mean((0, 2, 3))


def _trial(q, k, v, dense, plan, simthr, cdfthr, pv_skip) -> tuple[np.ndarray, np.ndarray]:
    heads = plan.heads
    knobs = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), (heads,)) for x in (simthr, cdfthr, pv_skip))
    error, density = _errors(q, k, v, dense, plan, *knobs)
    return np.asarray(error), np.asarray(density)
