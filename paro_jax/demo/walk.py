"""In which order kept blocks are best walked: `python -m paro_jax.demo.walk`.

A GPU kernel rescales the output of a warp, 16 rows of a query block, in each step in which a maximum of its rows rises,
or might do so only where P would pass 2^8 ("lazy", as in FlashAttention-4). Counted here by walk, on the demo model's q
and k, in the orders and under the masks that calibration chose on another scene; and what P rounded to int8 costs by
walk: relative L1 distance of a head's output from unquantised attention over the same blocks. Minutes on two cores; the
tables are kept in pallas_kernels/NOTES.md.
"""

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import calibrate
from pallas_kernels import block_attention
from paro_jax import AttentionPlan, QuantSpec, arrange
from paro_jax.demo import data, p_scale, run

Row = dict[str, Any]

BLOCKS = ((128, 128), (64, 64))
DENSITIES = (1.0, 0.5, 0.3, 0.2)
WARP = 16  # rows of a query block that share a branch
LAZY = 8 * math.log(2)  # how far a score may pass the maximum of the last rescaling
ASCENDING, TEXT, HEAVIEST, CALIBRATED, OWN = "ascending", "text", "1 heaviest", "all by mass", "all by own mass"
WALKS = (ASCENDING, TEXT, HEAVIEST, "2 heaviest", "4 heaviest", CALIBRATED, OWN)
ROUNDED = (ASCENDING, HEAVIEST, CALIBRATED)  # walks and
ROUNDED_DENSITIES = (1.0, 0.2)  # densities of which the error of a rounded P is measured


class Site(NamedTuple):
    """What a sample shows under a plan: the plan of its site and bucket, q, k, v [B, N, heads, D] in model order, and
    the calibrated mass of its blocks, float32 [heads, nq, nk]."""

    plan: AttentionPlan
    q: jax.Array
    k: jax.Array
    v: jax.Array
    mass: np.ndarray


def sites(
    samples: Iterable[calibrate.Sample], calibration: Sequence[calibrate.Sample], plan: AttentionPlan
) -> Iterator[Site]:
    """Of each sample with v a `Site`; `plan` has leading axes (sites,) or (buckets, sites) and is of `calibration`."""

    def place(x: calibrate.Sample) -> tuple[int, int]:
        return sum(x.step >= edge for edge in plan.bucket_edges[1:-1]), x.site

    for sample in samples:
        bucket, site = place(sample)
        here = (plan[bucket] if len(plan.lead) == 2 else plan)[site]
        seen = [x for x in calibration if place(x) == (bucket, site)]
        mass = [calibrate.block_mass(x.q, x.k, plan.grid, here.order_list(), plan.block) for x in seen]
        assert sample.v is not None, "samples are captured with v"
        q, k, v = map(jnp.asarray, (sample.q, sample.k, sample.v))
        yield Site(here, q, k, v, np.mean(mass, axis=0))


def walked_first(walk: str, plan: AttentionPlan, mass: np.ndarray) -> np.ndarray | None:
    """The blocks that `walk` puts first, int [heads, nq, m], heaviest first where it goes by mass; None for none."""
    if walk == ASCENDING:
        return None
    if walk == TEXT:  # kernel order has it last
        text = np.arange(plan.grid.grid_tokens // plan.block[1], mass.shape[-1])
        return np.broadcast_to(text, (*mass.shape[:-1], len(text)))
    heaviest = np.argsort(-np.where(np.asarray(plan.mask().keep), mass, -1), axis=-1, kind="stable")
    return heaviest if walk in (CALIBRATED, OWN) else heaviest[..., : int(walk.split()[0])]


@functools.partial(jax.jit, static_argnames="block")
def block_maxima(q: jax.Array, k: jax.Array, *, block: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """The largest score of each row in each key block, f32 [heads, N, nk], and the attention mass of each block, f32
    [heads, nq, nk]. q, k: f32 [heads, N, D] in kernel order."""
    tokens = q.shape[1]

    def head(qk):
        q, k = qk
        scores = q @ k.T * q.shape[1] ** -0.5
        p = jnp.pad(jax.nn.softmax(scores), ((0, -tokens % block[0]), (0, -tokens % block[1])))
        scores = jnp.pad(scores, ((0, 0), (0, -tokens % block[1])), constant_values=-jnp.inf)
        mass = p.reshape(-1, block[0], p.shape[1]).sum(1)
        return scores.reshape(tokens, -1, block[1]).max(-1), mass.reshape(len(mass), -1, block[1]).sum(-1)

    return jax.lax.map(head, (q, k))


def rises(maxima: Any, count: Any, index: Any, bq: int, lazy: float = 0.0) -> tuple[int, int]:
    """(in how many steps of its warps a maximum of their rows rises by more than `lazy`, of how many steps).

    The first step of a query block is not counted. A warp that rises takes all its rows' maxima, else it keeps its own.
    `maxima` as of `block_maxima`; count, index as of `BlockMask.schedule`.
    """
    maxima, count, index = (np.asarray(x) for x in (maxima, count, index))
    heads, tokens, nk = maxima.shape
    maxima = np.pad(maxima, ((0, 0), (0, -tokens % bq), (0, 0)), constant_values=-np.inf)
    walked = np.take_along_axis(maxima.reshape(heads, -1, bq // WARP, WARP, nk), index[:, :, None, None], axis=-1)
    real = (np.arange(0, maxima.shape[1], WARP) < tokens).reshape(1, -1, bq // WARP)
    top, rising, steps = walked[..., 0], 0, 0
    for i in range(1, nk):
        live = (i < count)[..., None] & real
        rise = (walked[..., i] > top + lazy).any(-1) & live  # -inf, a row past the end, is above nothing
        top = np.where(rise[..., None], np.maximum(top, walked[..., i]), top)
        rising, steps = rising + int(rise.sum()), steps + int(live.sum())
    return rising, steps


def measure(
    samples: Sequence[calibrate.Sample],
    calibration: Sequence[calibrate.Sample],
    plans: Iterable[AttentionPlan],
    *,
    note: Callable[[str], Any] = lambda message: None,
) -> list[Row]:
    """One row per plan and walk: `block, density, walk`, and of every (warp, step after its first), all heads and
    samples together, the share in which a maximum `rises`, and in which it does so by more than `LAZY`, `lazy`."""
    rows = []
    for plan in plans:
        found = {walk: np.zeros((2, 2)) for walk in WALKS}
        note(f"blocks of {plan.block}, density {plan.density:.2f}")
        for here in sites(samples, calibration, plan):
            mask, slots = here.plan.mask(), jnp.asarray(here.plan.slots).T[:, :, None]
            for entry in zip(here.q, here.k, strict=True):  # of the batch
                q, k = (jnp.swapaxes(jnp.take_along_axis(x, slots, axis=0), 0, 1).astype(jnp.float32) for x in entry)
                maxima, own = map(np.asarray, block_maxima(q, k, block=plan.block))
                for walk, sums in found.items():
                    first = walked_first(walk, here.plan, own if walk == OWN else here.mass)
                    schedule = mask.schedule(first)
                    sums += [rises(maxima, *schedule, plan.block[0], lazy) for lazy in (0.0, LAZY)]
        for walk, sums in found.items():
            shares = dict(zip(("rises", "lazy"), (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
            rows.append({"block": plan.block, "density": float(plan.density), "walk": walk} | shares)
    return rows


def measure_errors(
    samples: Sequence[calibrate.Sample],
    calibration: Sequence[calibrate.Sample],
    plans: Iterable[AttentionPlan],
    *,
    note: Callable[[str], Any] = lambda message: None,
) -> list[Row]:
    """One row per plan and walk of `ROUNDED`: `block, density, walk`, and of P at int8 / int8 by each rule the mean
    error over all heads and samples and the worst."""
    rows = []
    for plan in plans:
        found: dict[tuple[str, str], list[np.ndarray]] = {}
        note(f"errors, blocks of {plan.block}, density {plan.density:.2f}")
        for here in sites(samples, calibration, plan):
            exact = _attend(here.q, here.k, here.v, here.plan, here.plan.mask().schedule())
            for walk in ROUNDED:
                schedule = here.plan.mask().schedule(walked_first(walk, here.plan, here.mass))
                for rule in p_scale.RULES:
                    rounded = dataclasses.replace(here.plan, quant=QuantSpec(qk="int8", pv="int8", p_scale=rule))
                    off = jnp.abs(_attend(here.q, here.k, here.v, rounded, schedule) - exact)
                    error = off.sum((1, 3)) / jnp.abs(exact).sum((1, 3))  # [B, heads]
                    found.setdefault((walk, rule), []).append(np.asarray(error))
        for walk in ROUNDED:
            row: Row = {"block": plan.block, "density": float(plan.density), "walk": walk}
            for rule in p_scale.RULES:
                error = np.concatenate(found[walk, rule])
                row |= {f"{rule}_mean": float(error.mean()), f"{rule}_worst": float(error.max())}
            rows.append(row)
    return rows


@jax.jit
def _attend(q, k, v, plan: AttentionPlan, schedule: tuple[jax.Array, jax.Array]) -> jax.Array:
    """`paro_jax.attention` by any walk: a plan walks by its own, and by none where that would cost."""
    at = functools.partial(arrange, plan=plan, implementation="xla")
    q, k, v = at(q, role="q"), at(k, role="k"), at(v, role="v")
    return block_attention(
        q.values, k.values, v.values, *schedule, block=plan.block, scale=q.head_dim**-0.5, slots=plan.slots,
        qk=plan.quant.qk, pv=plan.quant.pv, p_scale=plan.quant.p_scale, q_scale=q.scales, k_scale=k.scales,
        v_scale=v.scales, implementation="xla",
    )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The rows as in NOTES.md, per cent: walks by blocks and density, or walks with their errors."""
    if "rises" not in rows[0]:
        names = "blocks", "kept", "walk", "block: mean", "worst", "running: mean", "worst"
        lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
        for row in rows:
            found = [f"{100 * row[f'{rule}_{what}']:.2f}" for rule in p_scale.RULES for what in ("mean", "worst")]
            lines.append("| " + " | ".join([*_case(row), row["walk"], *found]) + " |")
        return "\n".join(lines)
    cases = list(dict.fromkeys(_case(row) for row in rows))
    found = {(row["walk"], _case(row)): f"{100 * row['rises']:.0f} / {100 * row['lazy']:.0f}" for row in rows}
    lines = ["| walk | " + " | ".join(", ".join(case) for case in cases) + " |", "|---" * (1 + len(cases)) + "|"]
    for walk in dict.fromkeys(row["walk"] for row in rows):
        lines.append("| " + " | ".join([walk, *(found[walk, case] for case in cases)]) + " |")
    return "\n".join(lines)


def _case(row: Row) -> tuple[str, str]:
    return "x".join(map(str, row["block"])), f"{100 * row['density']:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m paro_jax.demo.walk", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args()
    note = (lambda message: None) if args.json else print
    steps = run.QUICK_STEPS
    samples, grid = p_scale.captured(steps)
    generate = run.Generator(run.load_model(), steps)
    scene = generate(data.random_scene(run.CALIBRATION_SEED))
    calibration = run.capture(generate.net, scene, run.capture_steps(steps))
    plans = []
    for block in BLOCKS:
        note(f"calibrating, blocks of {block}")
        made = calibrate.make_plans(
            calibration, grid, densities=DENSITIES, block=block, bucket_edges=run.bucket_edges(steps), rule=run.RULE,
            progress=False,
        )  # fmt: skip
        plans += [plan for plan, _ in made]
    rows = measure(samples, calibration, plans, note=note)
    rounded = [plans[DENSITIES.index(density)] for density in ROUNDED_DENSITIES]
    errors = measure_errors(samples, calibration, rounded, note=note)
    print(json.dumps([rows, errors], indent=1) if args.json else f"{table(rows)}\n\n{table(errors)}")


if __name__ == "__main__":
    main()
