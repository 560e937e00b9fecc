"""Samples in, plan and report out: two streaming passes over the samples, and one over held-out ones."""

import os
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from calibrate import _capture, _checkpoint, _choose, _mass, _report, _score
from calibrate._capture import Checked, Samples
from calibrate._checkpoint import Checkpoint, State
from calibrate._score import Objective, ParoMetric, Task
from paro_jax import AttentionPlan, BlockMask, QuantSpec, TokenGrid

Names = Callable[[int, int, int], list[str]]  # (number of the density, site, heads) -> name of each head's order
Parts = list[tuple[_checkpoint.Sums, tuple[int, ...], np.ndarray]]  # what one sample adds to which running means


def make_plan(
    samples: Samples,
    grid: TokenGrid,
    *,
    density: float,
    block: tuple[int, int] = (64, 64),
    objective: Objective = "mass",
    orders: Sequence[str] | None = None,
    quant: QuantSpec = QuantSpec(),
    bucket_edges: Sequence[float] = (0.0, 1.0),
    heldout: Samples | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike | None = None,
    rule: str = "global",
    text_columns: str = "keep",
) -> tuple[AttentionPlan, _report.Report]:
    """Decide every head's order and every (bucket, head)'s mask from samples of its attention.

    Args:
      samples: a re-iterable of `Sample`; at least one for every site and bucket. It is iterated twice, one sample in
        memory at a time, and must give the same samples both times. Several prompts and a batch are averaged: for
        masks within a bucket, for orders and K means within each bucket first and then over buckets, so that a bucket
        with more samples does not count for more.
      grid: the tokens of the samples.
      density: kept blocks / all blocks, text included, in (0, 1]; the average over everything. The plan's density is
        not above it, and falls short by less than a block and those of equal share that would have come with it.
      block: (query tokens, key tokens) of a block.
      objective: what makes an order good. "mass": most attention mass retained at `density` by the head on its own.
        "paro": the paper's metric, with its options as a `ParoMetric`. "error": least relative L1 error of the sparse
        and quantised output; needs v. Orders closer than 1e-6 are equal and the first of `grid.orders` wins: model
        order is free.
      orders: names of the candidates, of `grid.orders` (which has the bricks of the grid); None for all of them.
      quant: widths that the plan computes at.
      bucket_edges: fractions of the schedule from 0 to 1; each interval gets masks of its own. Orders and K means are
        shared by all buckets.
      heldout: samples that decided nothing; the report then tells how well the plan does on them.
      progress: show a progress bar with the time left, on stderr, where that is a terminal.
      checkpoint: a file that keeps what was computed so far, saved every half minute and when the run stops; the same
        call goes on from it and gives the plan that an undisturbed run gives, bit for bit. Deleted when the plan is
        made.
      rule: where the budget is shared. "global": one threshold for all buckets, sites and heads. "head": `density` for
        each head. "row": the same number of blocks in each row of query blocks, but for one more in some, so that each
        head has `density`. "error": where it saves most of the output's squared error, as the samples' v tell it; total
        of the relative errors of all sites and buckets. It costs one more attention per sample and needs v.
      text_columns: "keep" all of them, as the paper does, or let them compete like any other block, "sparse": the text
        queries stay dense. For a model with much text, whose density cannot fall far otherwise.

    Returns:
      The plan, with leading axes (sites,) for one bucket and (buckets, sites) for several and each row's heaviest kept
      block in `first`, and its `Report`.

    Raises:
      ValueError: an argument of these, or a sample, is not as said here; the message names it.
    """
    task = check_settings(grid, [density], block, objective, orders, quant, bucket_edges, rule, text_columns)
    return _calibrate(samples, task, heldout, progress, checkpoint, False)[0]


def make_plans(
    samples: Samples,
    grid: TokenGrid,
    *,
    densities: Sequence[float],
    block: tuple[int, int] = (64, 64),
    objective: Objective = "mass",
    orders: Sequence[str] | None = None,
    quant: QuantSpec = QuantSpec(),
    bucket_edges: Sequence[float] = (0.0, 1.0),
    heldout: Samples | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike | None = None,
    rule: str = "global",
    text_columns: str = "keep",
    keep_checkpoint: bool = False,
) -> list[tuple[AttentionPlan, _report.Report]]:
    """`make_plan` for each of several densities, for about the price of one: the samples are looked at together.

    `keep_checkpoint`: leave the finished checkpoint, for the caller to delete once the plans are safe; called again
    with it, this returns the same plans without calibrating.

    Returns a plan and a report per density, the same as `make_plan` gives.
    """
    given = None if isinstance(densities, str) else _as_tuple(densities)
    if not given:
        raise ValueError(f"densities must be a sequence of at least one density, e.g. (0.5, 0.3); got {densities!r}.")
    task = check_settings(grid, given, block, objective, orders, quant, bucket_edges, rule, text_columns)
    return _calibrate(samples, task, heldout, progress, checkpoint, keep_checkpoint)


@dataclass
class _Run:
    """One calibration under way."""

    task: Task
    samples: Samples
    state: State
    file: Checkpoint
    bar: "_Bar"
    heldout: Checked | None  # the first of them


def _calibrate(
    samples: Samples,
    task: Task,
    heldout: Samples | None,
    progress: bool,
    checkpoint: str | os.PathLike | None,
    keep_checkpoint: bool,
) -> list[tuple[AttentionPlan, _report.Report]]:
    _capture.check_reiterable(samples)
    first = None
    if heldout is not None:  # a mistake there must not show after all the work
        _capture.check_reiterable(heldout, "heldout")
        first = next(_capture.read(heldout, task.grid, task.bucket_edges, name="heldout"), None)
    start = time.perf_counter()
    file = Checkpoint(checkpoint, task)
    state = file.load()
    work = {
        "orders": (len(task.orders) + 1 if len(task.orders) > 1 else 0, samples),
        "mass": (4 if task.rule == "error" else 2, samples),
    }
    if heldout is not None:
        work["heldout"] = (6 * len(task.densities), heldout)
    with _Bar(progress, work, state.passed) as bar:
        run = _Run(task, samples, state, file, bar, first)
        names = _decide_orders(run)
        _pass(run, "mass", "block mass", _count_mass(task, names, state))
        built = [_build(task, i, names, state) for i in range(len(task.densities))]
        plans = [plan for plan, _ in built]
        held = [None] * len(plans) if heldout is None else _judge(task, plans, heldout, bar)
    seconds = time.perf_counter() - start
    made = []
    for i, (plan, threshold) in enumerate(built):
        made.append((plan, _report.make(task, i, plan, state, threshold, held[i], seconds)))
    if not keep_checkpoint:
        file.done()
    return made


def _as_tuple(x: Any) -> tuple | None:
    return tuple(x) if isinstance(x, Iterable) else None


def check_settings(
    grid, densities, block, objective, orders, quant, bucket_edges, rule="global", text_columns="keep"
) -> Task:
    """The arguments of `make_plans`, validated: known to be right before a model has run to make its samples."""
    for name, value, kind in (("grid", grid, TokenGrid), ("quant", quant, QuantSpec)):
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be a {kind.__name__}; got {value!r}.")
    for density in densities:
        if isinstance(density, bool) or not isinstance(density, (int, float, np.number)) or not 0 < density <= 1:
            raise ValueError(f"density must be kept blocks / all blocks, in (0, 1]; got {density!r}.")
    nq, nk = grid.blocks(block)
    if objective == "paro":
        objective = ParoMetric()
    if not isinstance(objective, ParoMetric) and objective not in _score.OBJECTIVES:
        allowed = ", ".join(map(repr, _score.OBJECTIVES))
        raise ValueError(f"objective must be one of {allowed}, or a calibrate.ParoMetric; got {objective!r}.")
    if rule not in _choose.RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, _choose.RULES))}; got {rule!r}.")
    if text_columns not in _score.TEXT_COLUMNS:
        allowed = ", ".join(map(repr, _score.TEXT_COLUMNS))
        raise ValueError(f"text_columns must be one of {allowed}; got {text_columns!r}.")
    given, orders = orders, None if orders is None or isinstance(orders, str) else _as_tuple(orders)
    if given is not None and not orders:
        raise ValueError(
            f"orders must be a sequence of names of grid.orders ({', '.join(grid.orders)}), or None for all; got "
            f"{given!r}."
        )
    ids = range(len(grid.orders)) if orders is None else sorted(set(map(grid.order_id, orders)))
    densities, density = tuple(map(float, densities)), float(min(densities))
    always = grid.always_keep(block, columns=text_columns == "keep")
    floor, blocks = _choose.floor_blocks(always), nq * nk
    if _choose.budget_of(density, blocks) < floor:
        kept = "text rows and columns" if text_columns == "keep" else "text rows"
        raise ValueError(
            f"density must be at least {floor / blocks:.4f} here: {floor} of a head's {nq} x {nk} blocks of "
            f"{tuple(block)} tokens are always kept ({kept}, one block a row); got {density}, which is "
            f"{_choose.budget_of(density, blocks)} blocks. Raise the density or use smaller blocks"
            + (', or text_columns="sparse".' if text_columns == "keep" and grid.text else ".")
        )
    names = tuple(grid.orders[i] for i in ids)
    edges = _capture.check_edges(bucket_edges)
    tiles = int(block[0]), int(block[1])
    return Task(grid, tiles, densities, names, objective, quant, edges, rule, text_columns)


def _decide_orders(run: _Run) -> Names:
    """The first pass; returns what names the orders of a site's heads."""
    task, state = run.task, run.state
    if len(task.orders) == 1:  # nothing to decide, so nothing to look at
        return lambda density, site, heads: list(task.orders) * heads

    def count(sample: Checked) -> Parts:
        return [(state.errors, (sample.bucket, sample.site), _score.errors(task, sample))]

    _pass(run, "orders", "scoring orders", count)
    sites = {site for _, site in state.errors}
    chosen = {site: _choose.orders(_checkpoint.over_buckets(state.errors, site)) for site in sites}
    return lambda density, site, heads: [task.orders[i] for i in chosen[site][density]]


def _count_mass(task: Task, names: Names, state: State) -> Callable[[Checked], Parts]:
    def count(sample: Checked) -> Parts:
        parts: Parts = [(state.k, (sample.bucket, sample.site), np.asarray(_mass.token_mean(sample.k), np.float64))]
        seen: dict[tuple[str, ...], Parts] = {}
        for density in range(len(task.densities)):
            chosen = tuple(names(density, sample.site, sample.q.shape[2]))
            if chosen not in seen:  # most densities agree
                seen[chosen] = [(state.mass, (), _score.chosen_mass(task, sample, chosen))]
                if task.rule == "error":
                    seen[chosen].append((state.block_errors, (), _score.block_errors(task, sample, chosen)))
            parts.extend((sums, (density, sample.bucket, sample.site), x) for sums, _, x in seen[chosen])
        return parts

    return count


def _pass(run: _Run, name: str, about: str, count: Callable[[Checked], Parts]) -> None:
    """One look at every sample, from where a checkpoint left off; samples behind it are only compared."""
    task, state, file = run.task, run.state, run.file
    if state.finished[name] and name != "mass":  # the pass over masses will see whether they are the same samples
        return
    run.bar.begin(about)
    whole = True
    number, sites = 0, set()
    try:
        for sample in _capture.read(run.samples, task.grid, task.bucket_edges):
            if run.heldout is not None and sample.number == 0:
                _check_heldout(run.heldout, sample.q.shape[2:])
            sites.add((sample.bucket, sample.site))
            _same_again(sample, state)
            number += 1
            if number <= state.passed[name]:
                continue
            parts = count(sample)
            whole = False
            for sums, key, x in parts:
                _checkpoint.add(sums, key, x)
            state.passed[name] = number
            whole = True
            file.save(state)
            run.bar.step(name)
    except BaseException:
        if whole and not state.finished[name]:  # Ctrl-C may come between two sums; then the last save stands
            file.save(state, now=True)
        raise
    _check_coverage(number, sites, task, state)
    if not state.finished[name]:
        state.finished[name] = True
        file.save(state, now=True)


def _same_again(sample: Checked, state: State) -> None:
    """Each pass, and each run that goes on from a checkpoint, must see the same samples."""
    digest = sample.digest()
    if sample.number == len(state.digests):
        if any(state.finished.values()):
            raise ValueError(
                "samples must be the same each time they are iterated, and those of the checkpoint if there is one; "
                f"there were {len(state.digests)}, now there are more: number {sample.number} is {sample.name}. Fix "
                "the seeds or store the samples."
            )
        state.digests.append(digest)
    elif state.digests[sample.number] != digest:
        raise ValueError(
            "samples must be the same each time they are iterated, and those of the checkpoint if there is one; "
            f"number {sample.number}, {sample.name}, is not what it was. Fix the seeds or store the samples."
        )


def _check_coverage(number: int, found: set[tuple[int, int]], task: Task, state: State) -> None:
    if number == 0 and not state.digests:
        raise ValueError("samples must hold at least one calibrate.Sample; it is empty.")
    if number != len(state.digests):
        raise ValueError(
            f"samples must be the same each time they are iterated; there were {len(state.digests)}, now there are "
            f"{number}."
        )
    sites = 1 + max(site for _, site in found)
    missing = sorted(set(range(sites)) - {site for _, site in found})
    if missing:
        raise ValueError(
            f"samples must number sites from 0 without gaps; the highest is {sites - 1}, but there is none of site "
            f"{', '.join(map(str, missing))}. Capture every attention layer, or renumber."
        )
    for bucket, (low, high) in enumerate(zip(task.bucket_edges, task.bucket_edges[1:], strict=False)):
        missing = [site for site in range(sites) if (bucket, site) not in found]
        if missing:
            raise ValueError(
                f"samples must cover every site in every bucket; there is none for bucket {bucket} (steps from "
                f"{low:g} to under {high:g}) of site {', '.join(map(str, missing))}. Capture a step there, or give "
                "fewer bucket_edges."
            )


def _build(task: Task, density: int, names: Names, state: State) -> tuple[AttentionPlan, np.ndarray]:
    buckets = len(task.bucket_edges) - 1
    sites = 1 + max(site for _, site in state.k)
    one = state.mass[density, 0, 0].total
    share = np.empty((buckets, sites, *one.shape), np.float32)  # gigabytes for a large model: one array, filled
    errors = np.empty_like(share) if task.rule == "error" else None
    for bucket, site in np.ndindex(buckets, sites):
        share[bucket, site] = _score.share(task, state.mass[density, bucket, site].mean)
        if errors is not None:
            errors[bucket, site] = state.block_errors[density, bucket, site].mean
    keep, threshold = _choose.mask(share, task.always, task.densities[density], task.rule, errors)
    first = _choose.heaviest(share, keep)
    order = [names(density, site, len(one)) for site in range(sites)]
    k_mean = np.broadcast_to(
        np.stack([_checkpoint.over_buckets(state.k, site) for site in range(sites)]).astype(np.float32),
        (buckets, sites, *state.k[0, 0].total.shape),
    )
    if buckets == 1:
        keep, k_mean, first = keep[0], k_mean[0], first[0]
    plan = AttentionPlan.build(
        task.grid,
        order=order,
        mask=BlockMask(jnp.asarray(keep), task.block),
        quant=task.quant,
        k_mean=k_mean,
        bucket_edges=task.bucket_edges,
        first=first,
    )
    return plan, threshold


def _judge(task: Task, plans: list[AttentionPlan], heldout: Samples, bar: "_Bar") -> list[_report.Held]:
    """What each plan retains of samples that decided nothing, and how far its output is off."""
    bar.begin("held out")
    helds = [_report.Held() for _ in plans]
    assert plans[0].k_mean is not None
    sites, heads, dim = plans[0].lead[-1], plans[0].heads, plans[0].k_mean.shape[-1]
    for sample in _capture.read(heldout, task.grid, task.bucket_edges, name="heldout"):
        _check_heldout(sample, (heads, dim), sites)
        key = (sample.bucket, sample.site)
        for plan, held in zip(plans, helds, strict=True):
            local = plan[sample.bucket][sample.site] if len(plan.lead) == 2 else plan[sample.site]
            mass = _score.chosen_mass(task, sample, local.order_list())
            _checkpoint.add(held.mass, key, _choose.kept_mass(mass, np.asarray(local.mask().keep)))
            after, before = _score.incoherence(task, sample, local.order_list())
            _checkpoint.add(held.incoherence, key, after)
            _checkpoint.add(held.model_incoherence, key, before)
            if sample.v is not None:
                error, cosine = _score.output_error(sample, local)
                _checkpoint.add(held.error, key, error)
                _checkpoint.add(held.cosine, key, cosine)
        bar.step("heldout")
    return helds


def _check_heldout(sample: Checked, shape: tuple[int, ...], sites: int | None = None) -> None:
    """ValueError unless the plan has the heads, and the site if `sites` are known, of this held-out sample."""
    if (sites is not None and sample.site >= sites) or sample.q.shape[2:] != shape:
        where = "" if sites is None else f"sites 0 to {sites - 1}, "
        raise ValueError(
            f"heldout must hold samples of the sites that were calibrated: {where}{shape[0]} heads of {shape[1]}; got "
            f"{sample.name}, {sample.q.shape[2]} heads of {sample.q.shape[3]}."
        )


class _Bar:
    """A progress bar over all passes. A unit is about one QK^T over a sample, so the time left is honest."""

    def __init__(self, show: bool, work: dict[str, tuple[int, Samples]], passed: dict[str, int]):
        """work: of each pass, units a sample and the samples; passed: samples that a checkpoint has done already."""
        self.units = {name: units for name, (units, _) in work.items()}
        sizes = [units * len(samples) if isinstance(samples, Sized) else None for units, samples in work.values()]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        form = "{desc}{percentage:3.0f}% |{bar:20}| {elapsed} passed, {remaining} left" if total else None
        done = sum(self.units[name] * number for name, number in passed.items())
        # None: only where a person looks.
        disable = None if show else True
        self.bar = tqdm(total=total, initial=done, disable=disable, bar_format=form, desc="calibrate: ")

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def begin(self, about: str) -> None:
        self.bar.set_description(about)

    def step(self, name: str) -> None:
        self.bar.update(self.units[name])
