"""What makes four bits usable, by the error they leave: `python -m paro_jax.demo.int4`.

The demo model's own q, k and v, all blocks kept, in model order and in the order that calibration chose for each
head. Q is rounded by row, K by block, V by channel, P relative to its row's maximum in the key block. Three questions,
each by the relative L1 distance of a head's output from unquantised attention: what K less its mean is worth, what Q
less the mean of each query block is worth (its product with K is added back in full: SageAttention2, arXiv 2411.10958,
section 3.1), and on which levels P is best rounded. Minutes on two cores.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import calibrate
from paro_jax import AttentionPlan
from paro_jax.demo import data, model, run

Row = dict[str, Any]

BLOCK = (128, 128)
# (name, Q and K at int4, K less its mean, Q less its block's, steps between P = 0 and P = 1; None: P and V as they are)
VARIANTS: tuple[tuple[str, bool, bool, bool, int | None], ...] = (
    ("Q K int4, nothing smoothed", True, False, False, None),
    ("Q K int4, K less its mean", True, True, False, None),
    ("Q K int4, K and Q less their means", True, True, True, None),
    ("P V int4, P on [0, 15]", False, False, False, 15),
    ("P V int4, P on [-7, 7]", False, False, False, 14),
    ("P V int4, P on [0, 7]", False, False, False, 7),
    ("all int4, K less its mean, P on [0, 15]", True, True, False, 15),
    ("all int4, K and Q less their means, P on [0, 15]", True, True, True, 15),
)


def measure(
    samples: Iterable[calibrate.Sample],
    plans: dict[str, AttentionPlan],
    steps: int,
    *,
    note: Callable[[str], Any] = lambda message: None,
) -> list[Row]:
    """One row per variant and order: `name, order, heads`, then the error's `mean`, `median` and `worst` over heads.

    `samples`: with v, tokens as in the plans' grid. `plans`: by the order's name, one plan for all sites and steps, or
    with leading axes for them. `steps`: of the denoising that samples were captured from.
    """
    errors: dict[tuple[str, str], list[np.ndarray]] = {}
    for sample in samples:
        note(f"site {sample.site}, step {sample.step:.2f}")
        assert sample.v is not None
        for order, plan in plans.items():
            here = plan.at_step(round(sample.step * steps), steps)[sample.site] if plan.lead else plan
            found = _errors(*map(jnp.asarray, (sample.q, sample.k, sample.v)), here.slots)
            for (name, *_), error in zip(VARIANTS, found, strict=True):
                errors.setdefault((name, order), []).append(np.asarray(error).ravel())
    rows = []
    for (name, order), found in errors.items():
        every = np.concatenate(found)
        rows.append({"name": name, "order": order, "heads": len(every), "mean": float(every.mean()),
                     "median": float(np.median(every)), "worst": float(every.max())})  # fmt: skip
    return rows


@jax.jit
def _errors(q: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> list[jax.Array]:
    """Of each of `VARIANTS` [B, heads]: the relative L1 error of q, k, v [B, N, heads, D] in each head's order."""
    by_head = functools.partial(jnp.take_along_axis, indices=slots.T[None, :, :, None], axis=1)
    q, k, v = (jnp.swapaxes(by_head(x), 1, 2).astype(jnp.float32) for x in (q, k, v))
    exact = _attention(q, k, v, False, False, False, None)
    size = jnp.abs(exact).sum((2, 3))
    return [jnp.abs(_attention(q, k, v, *variant) - exact).sum((2, 3)) / size for _, *variant in VARIANTS]


def _attention(q, k, v, narrow: bool, smooth_k: bool, smooth_q: bool, steps: int | None) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v of [B, heads, N, D], rounded as a variant says."""
    bq, bk = BLOCK
    product = functools.partial(jnp.einsum, "bhqd,bhkd->bhqk", precision="highest")
    if smooth_k:
        k = k - k.mean(axis=2, keepdims=True)
    common = 0.0
    if smooth_q:
        mean = _by_block(q, bq).sum(axis=3, keepdims=True) / _real(q, bq)
        mean = _tokens(jnp.broadcast_to(mean, _by_block(q, bq).shape), q)
        q, common = q - mean, product(mean, k)
    if narrow:
        q = _rounded(q, jnp.abs(q).max(axis=3, keepdims=True))
        largest = jnp.abs(_by_block(k, bk)).max(axis=(3, 4), keepdims=True)
        k = _rounded(k, _tokens(jnp.broadcast_to(largest, _by_block(k, bk).shape), k))
    scores = (product(q, k) + common) / np.sqrt(q.shape[3])
    if steps is None:
        return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores), v, precision="highest")
    v = _rounded(v, jnp.abs(v).max(axis=2, keepdims=True))
    tail = -scores.shape[3] % bk
    blocks = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (0, tail)), constant_values=-jnp.inf)
    blocks = blocks.reshape(*scores.shape[:3], -1, bk)
    top = blocks.max(axis=4, keepdims=True)
    p = jnp.round(steps * jnp.exp(blocks - top)) / steps * jnp.exp(top - top.max(axis=3, keepdims=True))
    p = p.reshape(*scores.shape[:3], -1)[..., : scores.shape[3]]
    return jnp.einsum("bhqk,bhkd->bhqd", p, v, precision="highest") / p.sum(axis=3, keepdims=True)


def _by_block(x: jax.Array, block: int) -> jax.Array:
    """[B, heads, N, D] -> [B, heads, blocks, block, D], the last block filled with zeros."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)))
    return x.reshape(*x.shape[:2], -1, block, x.shape[3])


def _tokens(blocks: jax.Array, like: jax.Array) -> jax.Array:
    """[B, heads, blocks, block, D] -> [B, heads, N, D]."""
    return blocks.reshape(*like.shape[:2], -1, like.shape[3])[:, :, : like.shape[2]]


def _real(x: jax.Array, block: int) -> jax.Array:
    """How many tokens each block has, [1, 1, blocks, 1, 1]."""
    blocks = -(-x.shape[2] // block)
    return jnp.clip(x.shape[2] - block * jnp.arange(blocks), 0, block).reshape(1, 1, -1, 1, 1)


def _rounded(x: jax.Array, largest: jax.Array) -> jax.Array:
    scale = jnp.maximum(largest, 1e-7) / 7.0
    return jnp.round(x / scale) * scale


def table(rows: Sequence[Row]) -> str:
    """The rows as the table in NOTES.md: per cent."""
    lines = ["| | order | mean | median | worst |", "|---|---|---|---|---|"]
    for row in rows:
        found = " | ".join(f"{100 * row[column]:.2f}" for column in ("mean", "median", "worst"))
        lines.append(f"| {row['name']} | {row['order']} | {found} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m paro_jax.demo.int4", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args()
    note = (lambda message: None) if args.json else print
    steps = run.QUICK_STEPS
    generate, at, grid = run.Generator(run.load_model(), steps), run.capture_steps(steps), model.CONFIG.grid
    calibration = run.capture(generate.net, generate(data.random_scene(run.CALIBRATION_SEED)), at)
    note("calibrating")
    plan, _ = calibrate.make_plan(
        calibration, grid, density=0.5, block=run.BLOCK, bucket_edges=run.bucket_edges(steps), progress=False
    )
    samples = run.capture(generate.net, generate(data.random_scene(run.DEMO_SEED)), at)
    heads = samples[0].q.shape[2]
    rows = measure(samples, {"model": AttentionPlan.dense(grid, heads=heads), "PARO": plan}, steps, note=note)
    print(json.dumps(rows, indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()
