"""`paro demo`: generate dense, calibrate, generate again with PARO and with what PARO is compared to, and report."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

import calibrate
from paro_jax import AttentionPlan, QuantSpec, Width, metrics, policies, save_plan
from paro_jax.demo import data, model, pictures
from paro_jax.models import samplers, weights
from paro_jax.models.layers import AttentionFn

STEPS, QUICK_STEPS = 12, 6
GUIDANCE = 3.0
BLOCK = (64, 64)
DENSITIES = (0.5, 0.3, 0.2)
BUCKETS = (0.0, 0.25, 0.5, 1.0)  # attention changes most in the first half of the schedule
# The same budget for every row of blocks: less mass in all than one threshold for everything keeps (0.51 against 0.54
# at 20 %), but no query is starved, and the video is nearer to the dense one (24.9 against 23.2 dB at 20 %).
RULE = "row"
WIDTHS: tuple[Width, ...] = ("bf16", "int8", "int4")
# Training draws seeds below a million; these ranges, 2^40 apart, were never trained on and do not meet.
CALIBRATION_SEED, DEMO_SEED = 1 << 40, 2 << 40

Report = dict[str, Any]


def load_model() -> model.DemoModel:
    """The trained model that ships with the project, f32."""
    return weights.load(lambda: model.DemoModel(rngs=nnx.Rngs(0)), model.WEIGHTS)


def predict(
    net: model.DemoModel,
    words: jax.Array,
    x: jax.Array,
    t: jax.Array,
    plan: AttentionPlan | None = None,
    attention_fn: AttentionFn | None = None,
):
    """v with classifier-free guidance: one batch holds the captioned half, then the uncaptioned half."""
    captioned, plain = jnp.split(net(_twice(x), _twice(t), words, plan=plan, attention_fn=attention_fn), 2)
    return plain + GUIDANCE * (captioned - plain)


def _twice(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, x])


@functools.partial(jax.jit, static_argnames=("steps", "attention_fn"))
def _sample(
    net: model.DemoModel,
    words: jax.Array,
    noise: jax.Array,
    plan: AttentionPlan | None,
    *,
    steps: int,
    attention_fn: AttentionFn | None = None,
):
    """The video's latents, and the latents `[steps, ...]` that the model was given at every step."""

    def step(x, index):
        local = None if plan is None else plan.at_step(index, steps)
        v = predict(net, words, x, _time(index, steps), local, attention_fn)
        return samplers.ddim_step(x, v, index, steps=steps, schedule=model.SCHEDULE), x

    return jax.lax.scan(step, noise, jnp.arange(steps, dtype=jnp.int32))


def _time(index: jax.Array | int, steps: int) -> jax.Array:
    """Timestep f32 `[1]` of a step."""
    return jnp.asarray(model.SCHEDULE.timesteps(steps), jnp.float32)[index][None]


def words_for(scene: data.Scene) -> np.ndarray:
    """Word ids `[2, T]`: the caption, and nothing."""
    ids = data.tokenise(scene.caption)
    return np.stack([ids, np.zeros_like(ids)])


@dataclasses.dataclass(frozen=True)
class Video:
    """A generated video f32 `[F, H, W, 3]` in [-1, 1], the seconds of its denoising, and what the model was given."""

    scene: data.Scene
    pixels: np.ndarray
    seconds: float
    latents: np.ndarray  # [steps, 1, F, C, H, W], before each step


class Generator:
    """Makes videos; compiles once for every kind of plan and keeps compile time out of the seconds it reports.

    `attention_fn`: what computes attention in place of `paro_jax.attention`, as the models take it.
    """

    def __init__(self, net: model.DemoModel, steps: int, attention_fn: AttentionFn | None = None):
        self.net, self.steps, self.attention_fn, self.compiled = net, steps, attention_fn, {}

    def __call__(self, scene: data.Scene, plan: AttentionPlan | None = None) -> Video:
        args = (self.net, words_for(scene), model.initial_noise(scene.seed), plan)
        key = jax.tree.structure(plan)
        if key not in self.compiled:
            self.compiled[key] = _sample.lower(*args, steps=self.steps, attention_fn=self.attention_fn).compile()
        start = time.perf_counter()
        last, given = jax.block_until_ready(self.compiled[key](*args))
        seconds = time.perf_counter() - start
        return Video(scene, data.to_video(np.asarray(last[0])), seconds, np.asarray(given))


def capture(net: model.DemoModel, video: Video, at: Sequence[int]) -> list[calibrate.Sample]:
    """Attention inputs of a dense video at some of its steps, all layers."""
    steps, words = len(video.latents), jnp.asarray(words_for(video.scene))
    return [
        calibrate.Sample(site, index / steps, *map(np.asarray, qkv))
        for index in at
        for site, qkv in enumerate(net.capture(_twice(video.latents[index]), _twice(_time(index, steps)), words))
    ]


def bucket_edges(steps: int) -> tuple[float, ...]:
    """`BUCKETS`, or a single bucket where there are too few steps to fill them."""
    return BUCKETS if steps >= 4 else (0.0, 1.0)


def capture_steps(steps: int, buckets: Sequence[float] = BUCKETS) -> list[int]:
    """One step in the middle of every bucket, and a second where the bucket is long: what calibration looks at."""
    # The first step of a bucket, as `plan.at_step` counts: exact, in fractions.
    edges = [math.ceil(Fraction(e).limit_denominator(10**6) * steps) for e in buckets]
    long = [(a + 3 * b) // 4 for a, b in zip(edges, edges[1:], strict=False) if b - a > steps / 3]
    return sorted({(a + b) // 2 for a, b in zip(edges, edges[1:], strict=False)} | set(long))


def run_demo(
    *,
    out: str | os.PathLike,
    quick: bool = False,
    prompts: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    progress: bool = True,
) -> Report:
    """The main job on real input; writes report.json, the plans and pictures to `out` and returns the report.

    `prompts` held-out scenes (default 2) are drawn from `seed`. `quick` takes one prompt, few steps, one density,
    where nothing else is asked for. Report rows are averages over prompts of PSNR (dB), SSIM and cosine against the
    dense video from the same noise, the attention mass the masks keep on the dense run's own attention, and denoising
    seconds per video, compilation excluded.

    Raises ValueError for less than one prompt, a negative seed, or a number of steps the schedule does not have.
    """
    prompts = prompts if prompts is not None else 1 if quick else 2
    if prompts < 1:
        raise ValueError(f"prompts: expected at least 1, found {prompts}; ask for one video or more.")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, found {seed}; choose another.")
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    steps = steps if steps is not None else QUICK_STEPS if quick else STEPS
    if not 1 <= steps <= model.SCHEDULE.train_steps:
        raise ValueError(f"steps: expected 1 to {model.SCHEDULE.train_steps}, found {steps}; the default is {STEPS}.")
    densities = (0.3,) if quick else DENSITIES
    scenes = [data.random_scene(DEMO_SEED + (seed << 20) + i) for i in range(prompts)]
    grid = model.CONFIG.grid
    net = load_model()

    videos = prompts * (1 + len(densities) * (len(WIDTHS) + 2))
    bar = tqdm(total=videos + 4, disable=None if progress else True, desc="demo", unit="job", leave=False)

    def tick(what: str) -> None:
        bar.set_description(what)
        bar.update()

    edges = bucket_edges(steps)
    at = capture_steps(steps, edges)
    generate = Generator(net, steps)
    calibration = capture(net, generate(data.random_scene(CALIBRATION_SEED)), at)
    tick("capture")
    dense = []
    for scene in scenes:
        dense.append(generate(scene))
        tick("dense")
    heldout = capture(net, dense[0], at)
    tick("capture held-out")

    make = functools.partial(
        calibrate.make_plans, calibration, grid, densities=densities, block=BLOCK, bucket_edges=edges, rule=RULE,
        progress=False,
    )  # fmt: skip
    made_plans = {"PARO": make(heldout=heldout), "no reorder": make(orders=grid.orders[:1])}
    plans = {(m, d): plan for m, all_ in made_plans.items() for d, (plan, _) in zip(densities, all_, strict=True)}
    for density in densities:
        plans["window", density] = window_plan(plans["PARO", density], density)
    tick("calibrate")

    retained = dict(zip(plans, retained_mass(list(plans.values()), heldout, steps), strict=True))
    tick("retained mass")

    methods = ("PARO", "no reorder", "window")
    jobs: list[tuple[str, float, Width]] = []
    for width, compared in zip(WIDTHS, (methods, methods[:1], methods[:1]), strict=True):
        jobs.extend((method, density, width) for density in densities for method in compared)
    rows = [_row("dense", 1.0, "bf16", 1.0, dense, dense)]
    made: dict[tuple[str, float, str], list[Video]] = {("dense", 1.0, "bf16"): dense}
    for method, density, width in jobs:
        plan = plans[method, density]
        if width != "bf16":
            plan = dataclasses.replace(plan, quant=QuantSpec(qk=width, pv=width))
        results = []
        for scene in scenes:
            results.append(generate(scene, plan))
            tick(f"{method} {density:.0%} {width}")
        made[method, density, width] = results
        rows.append(_row(method, float(plan.density), width, retained[method, density], dense, results))
    bar.close()

    rows.sort(
        key=lambda r: (
            -r["density"] if r["method"] != "dense" else -2,
            r["method"] != "PARO",
            r["method"],
            WIDTHS.index(r["qk"]),
        )
    )
    report = {
        "rows": rows,
        "prompts": [scene.caption for scene in scenes],
        "steps": steps,
        "guidance": GUIDANCE,
        "grid": list(grid.shape),
        "text": grid.text,
        "block": list(BLOCK),
        "buckets": list(edges),
        "orders": {f"{density:.0%}": _orders(plans["PARO", density]) for density in densities},
        "versions": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
    }
    temporary = out / "report.json.tmp"
    temporary.write_text(json.dumps(report, indent=1, allow_nan=False))
    os.replace(temporary, out / "report.json")
    main = densities[len(densities) // 2]
    pictures.attention(out / "attention.png", plans["PARO", main], heldout, steps)
    made_plans["PARO"][densities.index(main)][1].save(out / "calibration")
    for density in densities:
        save_plan(plans["PARO", density], out / f"plan-{density:g}.safetensors", model="demo")
    pictures.orders(out / "orders.png", plans["PARO", main])
    pictures.blocks(out / "blocks.png", plans["PARO", main])
    pictures.frames(out / "frames.png", made, [scene.caption for scene in scenes])
    pictures.movie(out / "video.gif", made, main)
    pictures.psnr(out / "psnr.png", rows)
    return report


def window_plan(like: AttentionPlan, density: float) -> AttentionPlan:
    """A 1-D window of the given density in model order, for every bucket, site and head of another plan."""
    band = policies.window(like.grid, density=density, block=like.block, heads=like.heads)
    keep = jnp.broadcast_to(band.keep, (*like.lead, *band.keep.shape))
    mask = dataclasses.replace(band, keep=keep)
    return AttentionPlan.build(like.grid, order=like.grid.orders[0], mask=mask, bucket_edges=like.bucket_edges)


def retained_mass(plans: Sequence[AttentionPlan], samples: Iterable[calibrate.Sample], steps: int) -> list[float]:
    """Attention mass inside each plan's kept blocks, over all samples and heads: 1 is all of it."""
    kept: list[list[float]] = [[] for _ in plans]
    for sample in samples:
        masses = {}  # plans share orders, and mass knows nothing else of a plan
        for mine, plan in zip(kept, plans, strict=True):
            site = plan.at_step(round(sample.step * steps), steps)[sample.site]
            key = tuple(site.order_list()), plan.block
            if key not in masses:
                masses[key] = calibrate.block_mass(sample.q, sample.k, plan.grid, *key)
            mine.append(float(np.mean(metrics.retained_mass(masses[key], site.mask().keep))))
    return [float(np.mean(mine)) for mine in kept]


def _orders(plan: AttentionPlan) -> list[list[str]]:
    """Order name of every (site, head); buckets share them."""
    names = np.asarray(plan.order)
    names = names[0] if names.ndim == 3 else names
    return [[plan.order_names[i] for i in row] for row in names]


def _row(
    method: str, density: float, width: str, kept: float, dense: list[Video], results: list[Video]
) -> dict[str, Any]:
    both = [(a.pixels, b.pixels) for a, b in zip(dense, results, strict=True)]
    # Pixels in [0, 1]: SSIM's luminance term is not the same for shifted values.
    pairs = [((a + 1) / 2, (b + 1) / 2) for a, b in both]

    def mean(f) -> float:
        return float(np.mean([float(f(a, b)) for a, b in pairs]))

    psnr = mean(lambda a, b: metrics.psnr(a, b, data_range=1.0))
    return {
        "method": method,
        "density": round(density, 4),
        "qk": width,
        "pv": width,
        # Equal videos have infinite PSNR, which JSON cannot say: null.
        "psnr": psnr if np.isfinite(psnr) else None,
        "ssim": mean(lambda a, b: metrics.ssim(a, b, data_range=1.0)),
        "cosine": float(np.mean([float(metrics.cosine(a, b)) for a, b in both])),
        "retained_mass": float(kept),
        "seconds": float(np.mean([video.seconds for video in results])),
    }
