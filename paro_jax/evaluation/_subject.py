"""What is evaluated: a model with its prompts and sampler, generating under any `Setting` of its attention."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import calibrate
from paro_jax import AttentionPlan, TokenGrid
from paro_jax.models import samplers

# One layer's attention at one step: (q, k, v, *, plan, knobs, memory, step) -> (output [B, N, heads, D], next memory,
# what was decided: a tuple of the density executed, float32 [], and all that it cost time to make, such as the mask).
# `knobs` are the layer's own constants, `memory` what it remembers of earlier steps.
Rule = Callable[..., tuple[jax.Array, Any, tuple[Any, ...]]]


@dataclass(frozen=True)
class Setting:
    """How the attention of a model is computed in one generation.

    `plan`: leading axis (sites,) or (buckets, sites). Without a `rule` it is all there is, and runs as in production:
    projected, arranged, attended. A `rule` computes attention itself; `knobs` and `memory` are pytrees whose leading
    axis is sites. Rules are compared by identity: make one and use it for all densities.
    """

    plan: AttentionPlan
    rule: Rule | None = None
    knobs: Any = None
    memory: Any = None


@dataclass(frozen=True)
class Case:
    """One generation: a prompt (its `caption`, and `inputs`, what the model takes after the timestep), and noise."""

    caption: str
    seed: int
    inputs: tuple[Any, ...]
    noise: np.ndarray  # [1, ...]
    guidance: float | None = (
        None  # scale of classifier-free guidance; `inputs` then hold two rows, without prompt first
    )


@dataclass(frozen=True)
class Made:
    """A generated sample: `view` is what metrics see, float32 [F, H, W, C]; see `Subject.view`."""

    view: np.ndarray
    density: float  # executed: mean over steps and sites
    seconds: float  # of denoising, compilation excluded


@dataclass(frozen=True)
class Subject:
    """A model, and how it is sampled.

    Of the prompts that are not in the table, plans are made on `calibration`, knobs of online methods fitted on
    `fitting`, and single attention calls judged on `heldout`. `sample(predict, noise, steps=, progress=, carry=)` is
    one of `paro_jax.models.samplers`. `view` makes of latents what is compared: float32 [F, H, W, C], pixels in [0, 1]
    if there is a decoder (`pixels` says so), latents if not.
    """

    name: str
    net: Any
    grid: TokenGrid
    sites: int
    heads: int
    head_dim: int
    steps: int
    sample: Callable[..., Any]
    view: Callable[[np.ndarray], np.ndarray]
    pixels: bool
    cases: Sequence[Case]
    calibration: Sequence[Case]
    fitting: Case
    heldout: Case
    dtype: Any = jnp.float32
    compiled: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def dense(self, block: tuple[int, int], grid: TokenGrid | None = None) -> AttentionPlan:
        """Everything, in model order: leading axis (sites,)."""
        return AttentionPlan.dense(grid or self.grid, heads=self.heads, sites=self.sites, block=block)

    def generate(self, case: Case, setting: Setting) -> Made:
        """A sample from its noise. Compiles once for every rule and every kind of plan."""
        carry = None
        if setting.rule is not None:
            count = np.zeros(self.sites, np.int32)
            carry = (setting.knobs, setting.memory, count, np.zeros(self.sites, np.float32))
        args = (self.net, case.inputs, case.noise, setting.plan, carry)
        shapes = jax.tree.map(lambda x: (np.shape(x), jnp.result_type(x)), args[1:])
        key = (setting.rule, case.guidance, str(shapes), jax.tree.structure(args[1:]))
        if key not in self.compiled:
            how = dict(sample=self.sample, steps=self.steps, guidance=case.guidance, rule=setting.rule)
            self.compiled[key] = _generate.lower(*args, **how, dtype=self.dtype).compile()
        start = time.perf_counter()
        latents, carry = jax.block_until_ready(self.compiled[key](*args))
        seconds = time.perf_counter() - start
        if carry is not None:
            density = float(np.mean(carry[3])) / self.steps
        else:
            density = float(np.mean([float(setting.plan.at_step(i, self.steps).density) for i in range(self.steps)]))
        return Made(self.view(np.asarray(latents, np.float32)), density, seconds)

    def capture(self, cases: Sequence[Case], at: Sequence[int], block: tuple[int, int]) -> list[calibrate.Sample]:
        """Attention inputs of dense generations at some of their steps, all sites."""
        found = []
        for case in cases:
            for step, (x, timestep) in self._watch(case, at, block).items():
                for site, qkv in enumerate(self.net.capture(x, timestep, *case.inputs)):
                    found.append(calibrate.Sample(site, step / self.steps, *map(np.asarray, qkv)))
        return found

    def _watch(self, case: Case, at: Sequence[int], block: tuple[int, int]) -> dict[int, tuple[jax.Array, jax.Array]]:
        """Latents and timestep that the model is given at each step in `at`."""
        seen: dict[int, tuple[jax.Array, jax.Array]] = {}
        plan = self.dense(block)

        def predict(x: jax.Array, timestep: jax.Array, step: jax.Array) -> jax.Array:
            x = x.astype(self.dtype)
            if int(step) in at:
                seen[int(step)] = (x, timestep)
            return _call(self.net, x, timestep, case.inputs, plan)

        self.sample(_guided(predict, case.guidance), jnp.asarray(case.noise), steps=self.steps, progress=True)
        return seen


@jax.jit
def _call(net: Any, x: jax.Array, timestep: jax.Array, inputs: tuple, plan: AttentionPlan) -> jax.Array:
    return net(x, timestep, *inputs, plan=plan)


def _guided(predict: samplers.Predict, guidance: float | None) -> samplers.Predict:
    return predict if guidance is None else samplers.guided(predict, guidance)


@functools.partial(jax.jit, static_argnames=("sample", "steps", "guidance", "rule", "dtype"))
def _generate(
    net: Any,
    inputs: tuple,
    noise: jax.Array,
    plan: AttentionPlan,
    carry: Any,
    *,
    sample: Callable[..., Any],
    steps: int,
    guidance: float | None,
    rule: Rule | None,
    dtype: Any,
) -> tuple[jax.Array, Any]:
    """The latents, and (knobs, memory, steps seen, density summed) of every site, or None."""

    def attention_fn(q, k, v, *, plan, carry):
        knobs, memory, step, executed = carry
        out, memory, decided = rule(q, k, v, plan=plan, knobs=knobs, memory=memory, step=step)  # type: ignore[misc]
        return out, (knobs, memory, step + 1, executed + decided[0])

    def predict(x, timestep, step, *carry):
        mine = plan.at_step(step, steps)
        if not carry:
            return net(x.astype(dtype), timestep, *inputs, plan=mine)
        return net(x.astype(dtype), timestep, *inputs, plan=mine, attention_fn=attention_fn, carry=carry[0])

    found = sample(_guided(predict, guidance), noise, steps=steps, carry=carry)
    return (found, None) if carry is None else found
