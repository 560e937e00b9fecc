"""What the choices of calibration bring, measured on the demo model: `python -m paro_jax.demo.budgets TABLE`.

Every table changes one thing and keeps the density. Plans are calibrated on one video, as `paro demo` does, and judged
on another: by how far each head's output is from dense attention on the dense video's own q, k and v, and with
`--prompts N` by the PSNR of N whole videos against the dense ones. Minutes on two cores, but for videos, of which one
takes ten seconds. The tables are kept, and read, in docs/better_than_the_paper.md.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import calibrate
import paro_jax
from calibrate._choose import RULES
from paro_jax import AttentionPlan, QuantSpec, metrics, policies, recipes
from paro_jax.demo import data, model, run
from paro_jax.models.layers import AttentionFn

Row = dict[str, Any]
Samples = Sequence[calibrate.Sample]

DENSITIES = (0.5, 0.3, 0.2)
COUNTS = (1, 3, 6, 12)  # buckets
UNEVEN = run.BUCKETS


class Bench:
    """Samples to decide on and to judge by, and videos if there are `prompts`; computes what rows have in common."""

    def __init__(
        self,
        calibration: Samples,
        heldout: Samples,
        *,
        densities: Sequence[float] = DENSITIES,
        prompts: int = 0,
        steps: int = run.STEPS,
        note: Callable[[str], Any] = lambda message: None,
    ):
        self.calibration, self.heldout, self.densities = calibration, heldout, tuple(densities)
        self.steps, self.note, self.grid, self.block = steps, note, model.CONFIG.grid, run.BLOCK
        self.scenes = [data.random_scene(run.DEMO_SEED + i) for i in range(prompts)]
        self.generators: dict[AttentionFn | None, run.Generator] = {}
        self.dense: list[np.ndarray] = []

    def plans(self, **settings: Any) -> list[AttentionPlan]:
        """A plan per density, with the demo's settings and this bench's densities but for what is given."""
        own = {"rule": run.RULE, "bucket_edges": run.bucket_edges(self.steps), "block": self.block}
        settings = own | {"densities": self.densities} | settings
        made = calibrate.make_plans(self.calibration, self.grid, progress=False, **settings)
        return [plan for plan, _ in made]

    def rows(self, name: Row, plans: Sequence[AttentionPlan], attention_fn: AttentionFn | None = None) -> list[Row]:
        """A row per plan: `name`, density, retained mass, output errors, and PSNR where there are prompts.

        l1: relative L1 error of a head's output, mean and worst over heads and held-out samples; squared: squared error
        over squared output of a site, mean over samples.
        """
        retained, rows = run.retained_mass(plans, self.heldout, self.steps), []
        for plan, kept in zip(plans, retained, strict=True):
            l1, squared = output_errors(self.heldout, plan, self.steps, attention_fn)
            row = {**name, "density": float(plan.density), "retained mass": kept}
            row |= {"l1": float(l1.mean()), "worst l1": float(l1.max()), "squared": float(squared.mean())}
            if self.scenes:
                found = self._psnr(plan, attention_fn)
                row |= {"psnr": float(np.mean(found)), "each": [round(x, 2) for x in found]}
            self.note(f"{row}")
            rows.append(row)
        return rows

    def _psnr(self, plan: AttentionPlan, attention_fn: AttentionFn | None) -> list[float]:
        """dB against the dense video, of each prompt."""
        for kind in {None, attention_fn} - set(self.generators):
            net = self.generators[None].net if self.generators else run.load_model()
            self.generators[kind] = run.Generator(net, self.steps, kind)
        if not self.dense:
            self.dense = [self.generators[None](scene).pixels for scene in self.scenes]
        videos = [self.generators[attention_fn](scene, plan).pixels for scene in self.scenes]
        return [float(metrics.psnr(a, b, data_range=2.0)) for a, b in zip(self.dense, videos, strict=True)]


def output_errors(
    samples: Samples, plan: AttentionPlan, steps: int, attention_fn: AttentionFn | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample: relative L1 [samples, heads] and, of the site, relative squared error [samples]."""
    l1, squared = [], []
    for sample in samples:
        local = plan.at_step(round(sample.step * steps), steps)[sample.site]
        dense = AttentionPlan.dense(plan.grid, heads=plan.heads, block=plan.block)
        qkv = map(jnp.asarray, (sample.q, sample.k, sample.v))
        found = _errors(*qkv, local, dense, attention_fn or paro_jax.attention)
        l1.append(np.asarray(found[0]))
        squared.append(float(found[1]))
    return np.stack(l1), np.array(squared)


@functools.partial(jax.jit, static_argnames="attention_fn")
def _errors(q, k, v, plan: AttentionPlan, dense: AttentionPlan, attention_fn: AttentionFn):
    exact = paro_jax.attention(q, k, v, plan=dense)
    change = attention_fn(q, k, v, plan=plan) - exact
    return jnp.abs(change).sum((0, 1, 3)) / jnp.abs(exact).sum((0, 1, 3)), jnp.sum(change**2) / jnp.sum(exact**2)


def rules(bench: Bench) -> list[Row]:
    """Where the budget goes; and what is skipped left out, or standing in as its means."""
    rows = []
    for rule in RULES:
        plans = bench.plans(rule=rule)
        rows += bench.rows({"rule": rule, "skipped blocks": "left out"}, plans)
        if rule in ("row", "error"):
            rows += bench.rows({"rule": rule, "skipped blocks": "means"}, plans, policies.compensated_attention)
    return rows


def text(bench: Bench) -> list[Row]:
    """Text columns kept, and competing like any other block."""
    kinds = ("keep", "sparse")
    return [
        row
        for rule in ("row", "error")
        for kind in kinds
        for row in bench.rows({"rule": rule, "text columns": kind}, bench.plans(rule=rule, text_columns=kind))
    ]


def buckets(bench: Bench) -> list[Row]:
    """How many masks share the schedule; samples of every step, so that each bucket has some."""
    edges = {str(count): tuple(i / count for i in range(count + 1)) for count in COUNTS} | {"3, as the demo": UNEVEN}
    return [
        row
        for rule in ("row", "error")
        for name, at in edges.items()
        for row in bench.rows({"rule": rule, "buckets": name}, bench.plans(rule=rule, bucket_edges=at))
    ]


def orders(bench: Bench) -> list[Row]:
    """Orders by attention mass, and by the error of the sparse and quantised output."""
    rows = []
    for width in run.WIDTHS:
        before: list[AttentionPlan] = []
        for objective in ("mass", "error"):
            plans = bench.plans(objective=objective, quant=QuantSpec(qk=width, pv=width))
            before = before or plans
            for row, a, b in zip(
                bench.rows({"width": width, "objective": objective}, plans), before, plans, strict=True
            ):
                # Buckets share orders.
                rows.append(row | {"heads that changed": int(np.sum(np.asarray(a.order)[0] != np.asarray(b.order)[0]))})
    return rows


def integers(bench: Bench) -> list[Row]:
    """Integer attention in PARO's orders and in model order, head by head: dense, and each under its own masks.

    Orders by attention mass at the least density, and by the error of the quantised output itself. better: heads whose
    output is nearer to dense attention in PARO's orders, mean over held-out samples, of the `heads` whose order is not
    model order; of those others the two are one computation.
    """
    densities = (1.0, *bench.densities)
    rows = []
    for name in ("PARO INT8", "naive INT8", "PARO INT4", "naive INT4"):
        options: dict[str, Any] = {"densities": densities, "quant": recipes.ALL[name]}
        ours = {"mass": bench.plans(**options), "error": bench.plans(objective="error", **options)}
        ours["mass"][0] = ours["mass"][-1].with_mask(ours["mass"][0].mask())  # dense, all orders have all mass
        for i, there in enumerate(bench.plans(orders=bench.grid.orders[:1], **options)):
            before = by_head(bench.heldout, there, bench.steps)
            for objective, plans in ours.items():
                found = by_head(bench.heldout, plans[i], bench.steps)
                moved = (np.asarray(plans[i].order) != np.asarray(there.order))[0]  # buckets share orders
                better = (found < before)[moved]
                row: Row = {"recipe": name, "density": densities[i], "orders by": objective}
                row |= {"l1": float(found.mean()), "l1, model order": float(before.mean())}
                rows.append(row | {"better": int(better.sum()), "heads": better.size, "of": moved.size})
                bench.note(f"{rows[-1]}")
    return rows


def by_head(samples: Samples, plan: AttentionPlan, steps: int) -> np.ndarray:
    """Relative L1 of each head's output, [layers, heads]: mean over the samples of a layer."""
    l1, _ = output_errors(samples, plan, steps)
    sites = np.array([sample.site for sample in samples])
    return np.stack([l1[sites == site].mean(axis=0) for site in range(sites.max() + 1)])


TABLES = {table.__name__: table for table in (rules, text, buckets, orders, integers)}


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table, in the order they have."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(_cell(name, row[name]) for name in names) + " |")
    return "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{x:.1f}" for x in value)
    return f"{value:.2f}" if name == "psnr" else f"{value:.4f}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m paro_jax.demo.budgets", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--prompts", type=int, default=0, help="whole videos to judge by (default 0: none)")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args(arguments)
    generate = run.Generator(run.load_model(), run.STEPS)
    at = run.capture_steps(run.STEPS)
    scenes = [data.random_scene(seed) for seed in (run.CALIBRATION_SEED, run.DEMO_SEED)]
    calibration, heldout = (
        run.capture(generate.net, generate(scene), steps)
        for scene, steps in zip(scenes, (range(run.STEPS) if args.table == "buckets" else at, at), strict=True)
    )
    note = (lambda message: None) if args.json else functools.partial(print, file=sys.stderr, flush=True)
    bench = Bench(calibration, heldout, densities=args.densities, prompts=args.prompts, note=note)
    rows = TABLES[args.table](bench)
    print(json.dumps(rows, indent=1) if args.json else markdown(rows))


if __name__ == "__main__":
    main()
