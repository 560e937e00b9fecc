"""Noise schedules and samplers. CogVideoX: v-prediction with zero terminal SNR (arXiv 2305.08891), DDIM (arXiv 2010.02502)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class VSchedule:
    """CogVideoX's schedule: scaled-linear betas, SNR shift, rescaled to zero terminal SNR. 1000 training steps."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    snr_shift: float = 1.0  # 3.0 for 2B, 1.0 for 5B
    train_steps: int = 1000

    def alphas_cumprod(self) -> np.ndarray:
        """Signal power alpha-bar_t, f64 `[train_steps]`; the last is exactly 0."""
        betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.train_steps, dtype=np.float64) ** 2
        a = np.cumprod(1 - betas)
        a = a / (self.snr_shift + (1 - self.snr_shift) * a)
        root = np.sqrt(a)
        first, last = root[0], root[-1]
        return ((root - last) * first / (first - last)) ** 2

    def timesteps(self, steps: int) -> np.ndarray:
        """`steps` training timesteps, falling, "trailing" spacing: starts at train_steps - 1, where only noise is left."""
        return np.round(np.arange(self.train_steps, 0, -self.train_steps / steps)).astype(np.int32) - 1


def ddim(
    predict: Callable[[Array, Array, Array], Array],
    noise: Array,
    *,
    steps: int,
    schedule: VSchedule = VSchedule(),
) -> Array:
    """Deterministic DDIM for a v-predicting model, one `lax.scan` over steps.

    `predict(latents, timestep f32 [B], step int32) -> v`, all `[B, ...]`; step counts 0 .. steps-1, for `plan.at_step`.
    Returns the denoised latents at f32.
    """
    if steps < 1 or steps > schedule.train_steps:
        raise ValueError(f"steps: expected 1..{schedule.train_steps}, found {steps}.")
    times = schedule.timesteps(steps)
    alphas = schedule.alphas_cumprod()
    here = alphas[times]
    # The last step lands on alpha-bar 1 (clean latents), as CogVideoX's scheduler sets (set_alpha_to_one).
    there = np.append(alphas[times[1:]], 1.0)
    table = (np.arange(steps, dtype=np.int32), times.astype(np.float32), here.astype(np.float32), there.astype(np.float32))

    def step(x, row):
        index, time, a, b = row
        v = predict(x, jnp.broadcast_to(time, x.shape[:1]), index).astype(jnp.float32)
        clean = jnp.sqrt(a) * x - jnp.sqrt(1 - a) * v
        eps = jnp.sqrt(a) * v + jnp.sqrt(1 - a) * x
        return jnp.sqrt(b) * clean + jnp.sqrt(1 - b) * eps, None

    return jax.lax.scan(step, noise.astype(jnp.float32), jax.tree.map(jnp.asarray, table))[0]
