"""What P may be rounded relative to, by the error it leaves: `python -m paro_jax.demo.p_scale`.

The demo model's own q, k and v, in model order, blocks of 128 x 128. P is rounded relative to its row's maximum in the
key block ("block") or to the running maximum ("running"), once with Q and K rounded too and once without. The error is
the relative L1 distance of a head's output from unquantised attention over the same blocks. Minutes on two cores; the
table is kept in pallas_kernels/NOTES.md.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import calibrate
from paro_jax import AttentionPlan, QuantSpec, TokenGrid, Width, attention
from paro_jax.demo import data, model, run

Row = dict[str, Any]

BLOCK = (128, 128)
RULES: tuple[Literal["block"], Literal["running"]] = ("block", "running")
DENSITIES = (1.0, 0.3)
WIDTHS: tuple[Width, ...] = ("int8", "int4")


def measure(
    samples: Iterable[calibrate.Sample],
    grid: TokenGrid,
    *,
    densities: Sequence[float] = DENSITIES,
    widths: Sequence[Width] = WIDTHS,
    note: Callable[[str], Any] = lambda message: None,
) -> list[Row]:
    """One row per density and pair of widths: `density, qk, pv, heads`, then of each rule the mean error over all heads
    and samples and the worst, and in how many heads "block" leaves less.

    `samples`: with v; tokens as in `grid`. A density under 1 keeps a band of blocks around the diagonal of every head.
    """
    errors: dict[tuple[float, Width, Width], dict[str, list[np.ndarray]]] = {}
    for sample in samples:
        dense = AttentionPlan.dense(grid, heads=sample.q.shape[2], block=BLOCK)
        for density in densities:
            note(f"site {sample.site}, step {sample.step:.2f}, density {density:g}")
            plan = dense if density == 1 else run.window_plan(dense, density)
            exact = _attend(sample, plan, QuantSpec())
            for width in widths:
                for qk in (width, "bf16"):
                    for rule in RULES:
                        found = _attend(sample, plan, QuantSpec(qk=qk, pv=width, p_scale=rule))
                        error = jnp.abs(found - exact).sum((1, 3)) / jnp.abs(exact).sum((1, 3))  # [B, heads]
                        of_rules = errors.setdefault((density, qk, width), {rule: [] for rule in RULES})
                        of_rules[rule].append(np.asarray(error).ravel())
    rows = []
    for (density, qk, pv), of_rules in sorted(errors.items(), key=lambda item: -item[0][0]):
        found = {rule: np.concatenate(of_rules[rule]) for rule in RULES}
        row: Row = {"density": density, "qk": qk, "pv": pv, "heads": len(found["block"])}
        for rule, error in found.items():
            row |= {f"{rule}_mean": float(error.mean()), f"{rule}_worst": float(error.max())}
        rows.append(row | {"block_better": int((found["block"] < found["running"]).sum())})
    return rows


def _attend(sample: calibrate.Sample, plan: AttentionPlan, quant: QuantSpec) -> jax.Array:
    return _attention(*map(jnp.asarray, (sample.q, sample.k, sample.v)), plan, quant)


@functools.partial(jax.jit, static_argnames="quant")
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, plan: AttentionPlan, quant: QuantSpec) -> jax.Array:
    return attention(q, k, v, plan=plan, quant=quant)


def table(rows: Sequence[Row]) -> str:
    """The rows as the table in NOTES.md: per cent."""
    names = "density", "qk / pv", "block: mean", "worst", "running: mean", "worst", "block better in"
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        found = [f"{100 * row[name]:.2f}" for name in ("block_mean", "block_worst", "running_mean", "running_worst")]
        lines.append(
            f"| {100 * row['density']:g} % | {row['qk']} / {row['pv']} | {' | '.join(found)} | "
            f"{row['block_better']} of {row['heads']} |"
        )
    return "\n".join(lines)


def captured(steps: int = run.QUICK_STEPS) -> tuple[list[calibrate.Sample], TokenGrid]:
    """q, k and v of one scene, every site at some of the steps, both halves of guidance; and their grid."""
    generate = run.Generator(run.load_model(), steps)
    video = generate(data.random_scene(run.DEMO_SEED))
    return run.capture(generate.net, video, run.capture_steps(steps)), model.CONFIG.grid


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m paro_jax.demo.p_scale", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args()
    rows = measure(*captured(), note=(lambda message: None) if args.json else print)
    print(json.dumps(rows, indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()
