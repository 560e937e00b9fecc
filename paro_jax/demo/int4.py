"""What makes four bits usable, by the error they leave: `python -m paro_jax.demo.int4`.

The demo model's own q, k and v, blocks of 128 x 128, all of them kept in model order, then in the order that
calibration chose for each head, then there with its mask. By the emulation of `head_errors`: what K less its mean is
worth, what Q less the mean of each block is worth (its product with K is added back in full: SageAttention2, arXiv
2411.10958, section 3.1), and on which levels P is best rounded. The error is the relative L1 distance from unquantised
attention over the same blocks. Minutes on two cores; the table is kept in pallas_kernels/NOTES.md.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import calibrate
from paro_jax import AttentionPlan, BlockMask
from paro_jax.demo import data, head_errors, p_scale, run
from paro_jax.demo.head_errors import LIMITS, Numerics

Row = dict[str, Any]

DENSITY = 0.3  # of the calibrated mask
# By name; those at 8 bits are held to the limit of 8 bits.
VARIANTS: Mapping[str, Numerics] = {
    "int8 / int8": Numerics(q=127, k=127, p=127, v=127),
    "int8 / int8, P by 64 keys": Numerics(q=127, k=127, p=127, v=127, p_keys=64),
    "Q K at 4 bits": Numerics(q=7, k=7, k_mean=False),
    "Q K at 4 bits, K less its mean": Numerics(q=7, k=7),
    "Q K at 4 bits, K and Q less their means": Numerics(q=7, k=7, q_mean=True),
    "P V at 4 bits, P on [0, 15]": Numerics(p=15, v=7),
    "P V at 4 bits, P on [-7, 7]": Numerics(p=14, v=7),
    "P V at 4 bits, P on [0, 7]": Numerics(p=7, v=7),
    "int4 / int4": Numerics(q=7, k=7, p=15, v=7),
    "int4 / int4, Q less its mean": Numerics(q=7, k=7, p=15, v=7, q_mean=True),
    "int4 / int4, Q less its mean, K by token, V by block, P by 64 keys": Numerics(
        q=7, k=7, p=15, v=7, q_mean=True, k_tokens=1, v_tokens=head_errors.BLOCK, p_keys=64
    ),
}


def measure(
    samples: Iterable[calibrate.Sample],
    plans: Mapping[str, AttentionPlan],
    steps: int,
    *,
    note: Callable[[str], Any] = lambda message: None,
) -> list[Row]:
    """One row per plan and variant: `plan, density, what`, then `head_errors.summary` by the limit of its width.

    `samples`: with v, tokens as in the plans' grid. `plans`: by name, with the order and the blocks kept; of all sites
    and steps, or with leading axes for them. `steps`: of the denoising that samples were captured from.
    """
    sums: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    for sample in samples:
        batch, _, heads, dim = sample.q.shape
        assert sample.v is not None, "samples are captured with v"
        for kind, plan in plans.items():
            note(f"site {sample.site}, step {sample.step:.2f}, {kind}")
            here = plan.at_step(round(sample.step * steps), steps)[sample.site] if plan.lead else plan
            slots = np.asarray(here.slots).T[None, :, :, None]
            by_head = (np.take_along_axis(x, slots, axis=1) for x in (sample.q, sample.k, sample.v))
            q, k, v = (jnp.asarray(np.swapaxes(x, 1, 2), jnp.float32).reshape(batch * heads, -1, dim) for x in by_head)
            keep = jnp.repeat(here.mask().keep, here.block[0], axis=1)[:, : q.shape[1]]
            found = head_errors.distances(q, k, v, jnp.tile(keep, (batch, 1, 1)), VARIANTS)
            for name, distance in found.items():
                sums.setdefault((kind, name), []).append(distance)
    rows = []
    for (kind, name), found in sums.items():
        limit = LIMITS["int8" if VARIANTS[name].v == 127 else "int4"]
        rows.append(
            {"plan": kind, "density": float(plans[kind].density), "what": name} | head_errors.summary(found, limit)
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as the table in NOTES.md: per cent."""
    names = "order", "blocks kept", "rounded", "head: mean", "worst", "above the limit", "site: worst", "together"
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        mean, worst, site, together = (f"{100 * row[x]:.2f}" for x in ("mean", "worst", "worst_site", "together"))
        cells = [row["plan"], f"{100 * row['density']:.0f} %", row["what"], mean, worst]
        lines.append("| " + " | ".join([*cells, f"{row['above']} of {row['heads']}", site, together]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m paro_jax.demo.int4", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args()
    note = (lambda message: None) if args.json else print
    steps = run.QUICK_STEPS
    samples, grid = p_scale.captured(steps)
    generate, at = run.Generator(run.load_model(), steps), run.capture_steps(steps)
    note("calibrating")
    plan, _ = calibrate.make_plan(
        run.capture(generate.net, generate(data.random_scene(run.CALIBRATION_SEED)), at), grid, density=DENSITY,
        block=p_scale.BLOCK, bucket_edges=run.bucket_edges(steps), progress=False,
    )  # fmt: skip
    model = AttentionPlan.dense(grid, heads=samples[0].q.shape[2], block=p_scale.BLOCK)
    whole = plan.with_mask(BlockMask(jnp.ones_like(plan.mask().keep), plan.block))
    plans = {"model": model, "PARO": whole, "PARO, masked": plan}
    rows = measure(samples, plans, steps, note=note)
    print(json.dumps(rows, indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()
