"""The methods of the table: each makes, of captured attention and a density, the `Setting` of a generation.

All see the same calibration samples and end in the same `paro_jax.attention`; knobs of online methods are fitted so
that the mean density over those samples is the one asked for, and the density executed is counted while generating.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import calibrate
from calibrate import _mass
from calibrate._capture import bucket_of
from paro_jax import AttentionPlan, BlockMask, QuantSpec, TokenGrid, policies, recipes
from paro_jax.evaluation._subject import Rule, Setting, Subject

Policy = Callable[[jax.Array, jax.Array, AttentionPlan, Any], BlockMask]  # q, k, a site's plan, its knobs -> mask


class Context:
    """What methods are made from: the subject, captured attention of prompts that are not in the table, buckets.

    `samples` are what plans are made of. Knobs are fitted on `fitting`: a mask made on the same samples overlaps with
    what an online method finds there more than it will elsewhere.
    """

    def __init__(
        self,
        subject: Subject,
        samples: Sequence[calibrate.Sample],
        fitting: Sequence[calibrate.Sample],
        *,
        densities: Sequence[float],
        edges: Sequence[float],
        block: tuple[int, int],
    ):
        self.subject, self.samples, self.fitting = subject, samples, few(fitting)
        self.edges, self.block = tuple(edges), block
        self.densities = tuple(sorted({d for d in densities if d < 1}, reverse=True))
        self._plans: dict[Any, dict[float, AttentionPlan]] = {}

    @property
    def grid(self) -> TokenGrid:
        return self.subject.grid

    @property
    def batch(self) -> int:
        return int(np.shape(self.samples[0].q)[0])

    def bricks(self) -> TokenGrid:
        """The grid with the brick order whose tile is nearest to a cube of one block of tokens."""
        size = max(round(self.block[1] ** (1 / len(self.grid.shape))), 1)
        return dataclasses.replace(self.grid, bricks=(tuple(min(size, n) for n in self.grid.shape),))

    def calibrated(self, density: float, grid: TokenGrid | None = None, **options: Any) -> AttentionPlan:
        """`calibrate.make_plans` of all densities of the table at once, made on first use."""
        if density >= 1:
            plan = self.calibrated(self.densities[0] if self.densities else 0.5, grid, **options)
            mask = policies.dense(plan.grid, block=plan.block, heads=plan.heads)
            return plan.with_mask(_repeated(mask, plan.lead))
        grid, key = grid or self.grid, (grid or self.grid, tuple(sorted(options.items())))
        if density not in self._plans.get(key, {}):
            always = grid.always_keep(self.block)
            least = (always.sum() + (~always.any(1)).sum()) / always.size  # one that is out of reach must not fail all
            densities = tuple(d for d in self.densities if d >= least) if density in self.densities else ()
            densities = densities if density in densities else (density,)
            made = calibrate.make_plans(
                self.samples, grid, densities=densities, block=self.block, bucket_edges=self.edges, progress=False,
                **options,
            )  # fmt: skip
            self._plans.setdefault(key, {}).update(zip(densities, (plan for plan, _ in made), strict=True))
        return self._plans[key][density]

    def everywhere(self, mask: BlockMask, order: str | None = None, grid: TokenGrid | None = None) -> AttentionPlan:
        """One mask for all sites and steps, in one order: leading axis (sites,)."""
        grid, heads = grid or self.grid, self.subject.heads
        mask = BlockMask(jnp.broadcast_to(jnp.asarray(mask.keep), (heads, *mask.keep.shape[-2:])), mask.block)
        return AttentionPlan.build(grid, order=order or grid.orders[0], mask=_repeated(mask, (self.subject.sites,)))

    def fit(
        self, policy: Policy, plan: AttentionPlan, density: float, low: float = 0.0, high: float = 1.0
    ) -> np.ndarray:
        """The knob at which a policy's mean density comes nearest to `density` from below: float32 [sites]."""
        samples = self.fitting
        mask_of = jax.jit(lambda q, k, plan, knob: policy(q, k, plan, knob).keep)

        def at(knob: float) -> BlockMask:
            keep = [mask_of(s.q, s.k, at_sample(plan, s), jnp.float32(knob)) for s in samples]
            return BlockMask(jnp.stack(keep), plan.block)

        return np.full(self.subject.sites, policies.at_density(at, density, low=low, high=high), np.float32)


def few(samples: Sequence[calibrate.Sample]) -> list[calibrate.Sample]:
    """Those of two steps, early and late: enough to fit a number, or to judge a method."""
    steps = sorted({sample.step for sample in samples})
    chosen = {steps[len(steps) // 4], steps[-1 - len(steps) // 4]}
    return [sample for sample in samples if sample.step in chosen]


def at_sample(plan: AttentionPlan, sample: calibrate.Sample) -> AttentionPlan:
    """The part of a plan that a sample was captured under."""
    if len(plan.lead) == 2:
        plan = plan[bucket_of(sample.step, plan.bucket_edges)]
    return plan[sample.site]


def _repeated(mask: BlockMask, lead: tuple[int, ...]) -> BlockMask:
    return BlockMask(jnp.broadcast_to(mask.keep, (*lead, *mask.keep.shape)), mask.block)


# --- rules ----------------------------------------------------------------------------------------------------------


def _density(mask: BlockMask) -> jax.Array:
    return mask.keep.mean(dtype=jnp.float32)


@functools.cache
def masked(policy: Policy) -> Rule:
    """Attention under a policy's mask of every q and k."""

    def rule(q, k, v, *, plan, knobs, memory, step):
        mask = policy(q, k, plan, knobs)
        return policies.masked_attention(q, k, v, mask, plan=plan), memory, (_density(mask), mask)

    return rule


def sparge_top_k(q: Any, k: Any, plan: AttentionPlan, knob: Any) -> BlockMask:
    """SpargeAttn by count. Heads take turns to round up, so that every density can be had."""
    turns = (np.arange(plan.heads, dtype=np.float32) + 0.5) / plan.heads - 0.5
    return policies.sparge(q, k, plan=plan, topk=jnp.clip(knob + turns / plan.grid.blocks(plan.block)[1], 0, 1))


def sparge_cdf(q: Any, k: Any, plan: AttentionPlan, knob: Any) -> BlockMask:
    """SpargeAttn by mass, no block taken for dissimilar."""
    return policies.sparge(q, k, plan=plan, cdfthr=knob)


def sparge_tuned(q: Any, k: Any, plan: AttentionPlan, knobs: policies.SpargeTuning) -> BlockMask:
    mask = policies.sparge(q, k, plan=plan, cdfthr=knobs.cdfthr, simthr=knobs.simthr)
    return policies.sparge_pv_skip(q, k, mask, plan=plan, pv_skip=knobs.pv_skip)


def union_with_sparge(q: Any, k: Any, plan: AttentionPlan, knob: Any) -> BlockMask:
    return plan.mask() | sparge_top_k(q, k, plan, knob)


def union_with_sparge_cdf(q: Any, k: Any, plan: AttentionPlan, knob: Any) -> BlockMask:
    """xDiT's: similarity threshold 0.3."""
    return plan.mask() | policies.sparge(q, k, plan=plan, cdfthr=knob, simthr=0.3)


def xattention(q: Any, k: Any, plan: AttentionPlan, knob: Any) -> BlockMask:
    return policies.xattention(q, k, plan=plan, tau=knob, stride=math.gcd(16, *plan.block))


def compensated(q, k, v, *, plan, knobs, memory, step):
    """Rule: the plan's mask, and what it skips as its means."""
    return policies.compensated_attention(q, k, v, plan=plan), memory, (_density(plan.mask()),)


@functools.cache
def heaviest(density: float) -> Policy:
    """The blocks that hold the most attention, known exactly: what no method that has to guess can do."""

    def policy(q, k, plan, knobs):
        mass = _mass.block_sums(q, k, _mass.row_lse(q, k), plan.slots, block=plan.block)
        return policies.top_blocks(mass, density, plan.grid.always_keep(plan.block), block=plan.block)

    return policy


@functools.cache
def sparse_videogen(density: float, seed: int = 0) -> Rule:
    def rule(q, k, v, *, plan, knobs, memory, step):
        rng = jax.random.fold_in(jax.random.key(seed), step)
        mask, order = policies.sparse_videogen(
            q, k, v, grid=plan.grid, density=density, rng=rng, block=plan.block, rows=min(32, plan.grid.grid_tokens)
        )
        out = policies.masked_attention(q, k, v, mask, plan=plan, order=order)
        return out, memory, (_density(mask), mask, order)

    return rule


_TURNS = 10  # of k-means a step, where the original takes 2 after the first


def sparse_videogen2(q, k, v, *, plan, knobs, memory, step):
    """Rule: k-means orders warm from the step before; `memory` holds the centroids, `knobs` top-p."""
    chosen = _content_order(q, k, plan, knobs, memory)
    out = policies.slot_attention(
        q, k, v, chosen.mask, grid=plan.grid, q_slots=chosen.q_slots, k_slots=chosen.k_slots, quant=plan.quant
    )
    return out, chosen.centroids, (_density(chosen.mask), chosen)


def _content_order(q: Any, k: Any, plan: AttentionPlan, top_p: Any, start: Any, iterations: int = _TURNS) -> Any:
    queries, keys = _clusters(plan.grid, plan.block)
    return policies.sparse_videogen2(
        q, k, grid=plan.grid, q_clusters=queries, k_clusters=keys, top_p=top_p, min_ratio=0.0, block=plan.block,
        start=start, iterations=iterations,
    )  # fmt: skip


def _clusters(grid: TokenGrid, block: tuple[int, int]) -> tuple[int, int]:
    """One for each block of queries, two for each of keys: published are 250 tokens a query and 76 a key cluster."""
    tokens = grid.grid_tokens
    return max(tokens // block[0], 1), max(2 * tokens // block[1], 1)


def sharing(q, k, v, *, plan, knobs, memory, step):
    """DiTFastAttn's rule: `knobs` are the layer's methods, int8 [steps]; a full step computes the window as well."""
    method = knobs[step]
    out, memory = policies.shared_attention(q, k, v, memory, method, window=plan)
    window = _density(plan.mask())
    return out, memory, (jnp.where(method == policies.Share.FULL, 1 + window, window),)


# --- methods --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A row of the table. `prepare(context, density)` gives its Setting, or raises ValueError where it cannot."""

    name: str
    source: str
    prepare: Callable[[Context, float], Setting]
    densities: bool = True  # False: it has a density of its own


def _paro(context: Context, density: float) -> Setting:
    return Setting(context.calibrated(density, rule="row"))


def _paro_global(context: Context, density: float) -> Setting:
    return Setting(context.calibrated(density, rule="global"))


def _paro_error(context: Context, density: float) -> Setting:
    return Setting(context.calibrated(density, rule="error"))


def _compensated(prepare: Callable[[Context, float], Setting]) -> Callable[[Context, float], Setting]:
    return lambda context, density: Setting(prepare(context, density).plan, compensated)


def _paro_bricks(context: Context, density: float) -> Setting:
    return Setting(context.calibrated(density, context.bricks(), rule="row"))


def _paro_error_orders(context: Context, density: float) -> Setting:
    return Setting(context.calibrated(density, rule="error", objective="error"))


def _no_reorder(context: Context, density: float) -> Setting:
    return Setting(context.calibrated(density, rule="row", orders=context.grid.orders[:1]))


def _window(context: Context, density: float) -> Setting:
    return Setting(context.everywhere(policies.window(context.grid, density=density, block=context.block)))


def _ditfastattn(context: Context, density: float) -> Setting:
    """Half of the budget for full steps at even intervals, the rest for the window between them."""
    steps, sites = context.subject.steps, context.subject.sites
    full = max(math.floor(steps * density / 2), 1)
    window = density - full / steps
    plan = _window(context, window).plan
    table = np.full(steps, policies.Share.WINDOW, np.int8)
    table[np.arange(full) * steps // full] = policies.Share.FULL
    shape = sites, context.batch, context.grid.tokens, context.subject.heads, context.subject.head_dim
    memory = policies.Memory.empty(shape, context.subject.dtype)
    return Setting(plan, sharing, np.tile(table, (sites, 1)), memory)


def _fitted(
    policy: Policy, plan_of: Callable[[Context, float], AttentionPlan], high: float = 1.0
) -> Callable[[Context, float], Setting]:
    def prepare(context: Context, density: float) -> Setting:
        plan = plan_of(context, density)
        return Setting(plan, masked(policy), context.fit(policy, plan, density, high=high))

    return prepare


def _model_order(context: Context, density: float) -> AttentionPlan:
    return context.subject.dense(context.block)


def _paro_order(context: Context, density: float) -> AttentionPlan:
    return context.calibrated(1.0, rule="row")


def _paro_part(context: Context, density: float) -> AttentionPlan:
    """A static mask of two thirds of the budget; SpargeAttn adds the rest."""
    floor = context.grid.always_keep(context.block).mean()
    return context.calibrated(round(floor + (density - floor) * 2 / 3, 4), rule="row")


def _neighbours(context: Context, density: float) -> AttentionPlan:
    grid = dataclasses.replace(context.grid, gilbert=True)
    mask = policies.neighbours(grid, block=context.block)
    if (least := float(mask.keep.mean())) > density:
        raise ValueError(f"density: the neighbours alone are {least:.3g} of all blocks, more than {density:g}.")
    return context.everywhere(mask, "gilbert", grid)


def _sparge_tuned(context: Context, density: float) -> Setting:
    plan, found = context.subject.dense(context.block), []
    for site in range(context.subject.sites):
        samples = [(s.q, s.k, s.v) for s in context.fitting if s.site == site]
        found.append(policies.tune_sparge(samples, plan=plan[site], simthrs=(-0.5, 0.0, 0.5), progress=False))
    return Setting(plan, masked(sparge_tuned), jax.tree.map(lambda *x: np.stack(x), *found))


def _top_blocks(plan_of: Callable[[Context, float], AttentionPlan]) -> Callable[[Context, float], Setting]:
    return lambda context, density: Setting(plan_of(context, density), masked(heaviest(density)))


def _svg(context: Context, density: float) -> Setting:
    rule = sparse_videogen(density)
    plan = context.subject.dense(context.block)
    sample = context.samples[0]  # a density out of reach is known now
    jax.eval_shape(lambda q: rule(q, q, q, plan=plan[0], knobs=None, memory=None, step=0), jnp.asarray(sample.q))
    return Setting(plan, rule)


def _svg2(context: Context, density: float) -> Setting:
    plan, samples = context.subject.dense(context.block), context.fitting
    first = {}
    draw = jax.jit(lambda q, k, plan: _content_order(q, k, plan, 0.5, jax.random.key(0), 50).centroids)
    for sample in samples:
        first.setdefault(sample.site, draw(sample.q, sample.k, plan[sample.site]))

    mask_of = jax.jit(lambda q, k, plan, knob, start: _content_order(q, k, plan, knob, start).mask.keep)

    def at(knob: float) -> BlockMask:
        keep = [mask_of(s.q, s.k, plan[s.site], jnp.float32(knob), first[s.site]) for s in samples]
        return BlockMask(jnp.stack(keep), plan.block)

    knob = policies.at_density(at, density, low=0.0, high=1.0)
    memory = jax.tree.map(lambda *x: jnp.stack(x), *(first[site] for site in sorted(first)))
    return Setting(plan, sparse_videogen2, np.full(len(first), knob, np.float32), memory)


def _by_bucket(context: Context, grid: TokenGrid, order: str, pick: Callable[..., BlockMask]) -> Setting:
    """A static plan of what `pick(samples of one bucket and site, plan of a site)` says."""
    site_plan = AttentionPlan.dense(grid, heads=context.subject.heads, block=context.block, order=order)
    keep = []
    for bucket, site in product(range(len(context.edges) - 1), range(context.subject.sites)):
        mine = [s for s in context.samples if s.site == site and bucket_of(s.step, context.edges) == bucket]
        keep.append(pick([(s.q, s.k, s.v) for s in mine[:1]], site_plan).keep)
    lead = (len(context.edges) - 1, context.subject.sites) if len(context.edges) > 2 else (context.subject.sites,)
    mask = BlockMask(jnp.stack(keep).reshape(*lead, *keep[0].shape), context.block)
    return Setting(AttentionPlan.build(grid, order=order, mask=mask, bucket_edges=context.edges))


def _sparse_vdit(context: Context, density: float) -> Setting:
    def pick(samples, plan):
        return policies.sparse_vdit(samples, plan=plan, density=density)[0]

    return _by_bucket(context, context.grid, context.grid.orders[0], pick)


def _sliding_tile(context: Context, density: float) -> Setting:
    """STA with a window of its own for each head, the least error + cost x density, as its mask search does."""
    grid = context.bricks()
    tile = grid.bricks[0]
    counts = [-(-n // t) for n, t in zip(grid.shape, tile, strict=True)]
    windows = product(*(range(1, n + 1) for n in counts))
    every = [policies.sliding_tile(grid, tile=tile, window=window, block=context.block) for window in windows]
    # From all that fit, a dozen of different densities: each costs an attention of every sample.
    every = sorted((m for m in every if float(m.keep.mean()) <= 2 * density), key=lambda m: float(m.keep.mean()))
    if not every:
        raise ValueError(f"density: the smallest window of tiles {tile} is above {density:g}; take smaller tiles.")
    masks = [every[i] for i in sorted({round(x) for x in np.linspace(0, len(every) - 1, 12)})]

    def pick(samples, plan):
        errors = policies.mask_errors(samples, plan=plan, masks=masks)
        cost = policies.at_density(
            lambda c: policies.pick_masks(errors, masks, cost=10**c)[0], density, low=-12.0, high=6.0
        )
        return policies.pick_masks(errors, masks, cost=10**cost)[0]

    return _by_bucket(context, grid, "brick" + "x".join(map(str, tile)), pick)


def _radial(context: Context, density: float) -> Setting:
    def at(decay: float) -> BlockMask:
        return policies.radial(context.grid, decay=decay, sink=False, block=context.block)

    # Published at decays from 0.2 to 1, which on a short video of small frames are all the same mask.
    return Setting(context.everywhere(at(policies.at_density(at, density, low=0.01, high=1.0) if density else 1.0)))


METHODS = (
    Method("PARO", "arXiv 2506.16054, the same budget for every row of blocks", _paro),
    Method("PARO, one threshold", "arXiv 2506.16054, one mass threshold for all blocks", _paro_global),
    Method("PARO, error budget", "the budget by predicted output error", _paro_error),
    Method("PARO, error budget + orders", "orders by measured output error too", _paro_error_orders),
    Method("PARO + means", "what is skipped as its means", _compensated(_paro)),
    Method("PARO, error budget + means", "both", _compensated(_paro_error)),
    Method("PARO, bricks", "PARO with a brick order among the candidates", _paro_bricks),
    Method("PARO + SpargeAttn", "SpargeAttn on PARO's orders", _fitted(sparge_top_k, _paro_order)),
    Method("PARO ∪ SpargeAttn", "two thirds static, the rest online", _fitted(union_with_sparge, _paro_part)),
    Method("no reorder", "PARO's masks in model order", _no_reorder),
    Method("SpargeAttn", "arXiv 2502.18137, top-k", _fitted(sparge_top_k, _model_order)),
    Method("SpargeAttn, CDF", "arXiv 2502.18137, cdfthr", _fitted(sparge_cdf, _model_order)),
    Method("SpargeAttn, tuned", "arXiv 2502.18137, section 3.6", _sparge_tuned, densities=False),
    Method("SparseVideoGen", "arXiv 2502.01776", _svg),
    Method("SparseVideoGen2", "arXiv 2505.18875", _svg2),
    Method("window", "DiTFastAttn's window, arXiv 2406.08552", _window),
    Method("DiTFastAttn", "arXiv 2406.08552, window and residual, full steps at even intervals", _ditfastattn),
    Method("Sparse-vDiT", "arXiv 2506.03065", _sparse_vdit),
    Method("STA", "arXiv 2502.04507", _sliding_tile),
    Method("Radial", "arXiv 2506.19852, at its own density", _radial, densities=False),
    Method("Gilbert + SpargeAttn", "xDiT: neighbours on a Gilbert curve", _fitted(union_with_sparge_cdf, _neighbours)),
    Method("XAttention", "arXiv 2503.16428", _fitted(xattention, _model_order)),
    Method("PARO + XAttention", "XAttention on PARO's orders", _fitted(xattention, _paro_order)),
    Method("top-k blocks", "the heaviest blocks, known exactly; model order", _top_blocks(_model_order)),
    Method("PARO + top-k blocks", "the heaviest blocks, known exactly; PARO's orders", _top_blocks(_paro_order)),
)  # fmt: skip


# --- widths ---------------------------------------------------------------------------------------------------------


def _mixed(plan: AttentionPlan) -> AttentionPlan:
    sites = np.arange(plan.lead[-1])
    plan = dataclasses.replace(plan, quant=recipes.PARO_INT4)
    return plan.with_wide(recipes.PARO_INT8, (sites == 0) | (sites == sites[-1]))


def _at(quant: QuantSpec) -> Callable[[AttentionPlan], AttentionPlan]:
    return lambda plan: dataclasses.replace(plan, quant=quant)


# What a row's width is called, and what it makes of a plan.
WIDTHS: dict[str, Callable[[AttentionPlan], AttentionPlan]] = {
    "bf16": lambda plan: plan,
    "INT8": _at(QuantSpec(qk="int8", pv="int8")),
    "INT4": _at(QuantSpec(qk="int4", pv="int4")),
    **{name: _at(spec) for name, spec in recipes.ALL.items()},
    "PARO INT4, ends INT8": _mixed,
}
