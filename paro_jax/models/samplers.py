"""Noise schedules and samplers.

CogVideoX predicts v with zero terminal SNR (arXiv 2305.08891) and is sampled by DDIM (arXiv 2010.02502). FLUX and Wan
predict the flow from data to noise (arXiv 2403.03206) and are sampled by Euler steps.
"""

from __future__ import annotations

import dataclasses
import math
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
        """`steps` training timesteps, falling, "trailing" spacing: the first is train_steps - 1, pure noise."""
        return np.round(self.train_steps - np.arange(steps) * (self.train_steps / steps)).astype(np.int32) - 1

    def signal(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """alpha-bar before and after each step, f64 `[steps]`.

        A step goes down by train_steps // steps, as CogVideoX's scheduler does, even where the timesteps lie a little
        further apart; below zero it lands on 1, clean latents (set_alpha_to_one).
        """
        times, alphas = self.timesteps(steps), self.alphas_cumprod()
        after = times - self.train_steps // steps
        return alphas[times], np.where(after >= 0, alphas[np.maximum(after, 0)], 1.0)


def ddim_step(x: Array, v: Array, index: Array, *, steps: int, schedule: VSchedule = VSchedule()) -> Array:
    """One deterministic DDIM step: latents and v at step `index` (0 is pure noise) -> latents at the next, f32."""
    now, after = schedule.signal(steps)
    # Signal and noise amplitudes from f64: 1 - alpha-bar in f32 would lose half its digits near clean latents.
    (a, s), (b, n) = (
        (jnp.asarray(np.sqrt(p), jnp.float32)[index], jnp.asarray(np.sqrt(1 - p), jnp.float32)[index])
        for p in (now, after)
    )
    clean, eps = a * x - s * v, a * v + s * x
    return b * clean + n * eps


def ddim(
    predict: Callable[[Array, Array, Array], Array], noise: Array, *, steps: int, schedule: VSchedule = VSchedule()
) -> Array:
    """Deterministic DDIM for a v-predicting model, one `lax.scan` over steps.

    `predict(latents [B, ...], timestep f32 [B], step int32) -> v [B, ...]`; steps count from 0, as `plan.at_step` does.
    Returns the denoised latents, f32. Raises ValueError for a step count the schedule does not have.
    """
    if not 1 <= steps <= schedule.train_steps:
        raise ValueError(f"steps: expected 1..{schedule.train_steps}, found {steps}; choose a number in between.")
    times = jnp.asarray(schedule.timesteps(steps), jnp.float32)

    def step(x, index):
        v = predict(x, jnp.broadcast_to(times[index], x.shape[:1]), index).astype(jnp.float32)
        return ddim_step(x, v, index, steps=steps, schedule=schedule), None

    return jax.lax.scan(step, noise.astype(jnp.float32), jnp.arange(steps))[0]


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """Noise levels of a flow-matching model, from 1 (pure noise) to 0; a `shift` above 1 spends more steps near noise.

    FLUX.1-dev: `flux_shift(image tokens)`; schnell: 1. Wan 2.1: 5 at 720p, 3 at 480p.
    """

    shift: float = 1.0

    def sigmas(self, steps: int) -> np.ndarray:
        """f64 `[steps + 1]` from 1 to 0: even down to 1 / steps, shifted (arXiv 2403.03206, eq. 23), then 0."""
        even = np.linspace(1.0, 1.0 / steps, steps)
        return np.append(self.shift * even / (1 + (self.shift - 1) * even), 0.0)


def flux_shift(tokens: int) -> float:
    """FLUX.1-dev's shift for that many image tokens: log-linear, exp(0.5) at 256 and exp(1.15) at 4096."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def flow_euler(
    predict: Callable[[Array, Array, Array], Array], noise: Array, *, steps: int, schedule: FlowSchedule
) -> Array:
    """Euler steps along the flow, one `lax.scan`: x += (next sigma - sigma) * prediction.

    `predict(latents [B, ...], sigma f32 [B] in (0, 1], step int32) -> flow [B, ...]`; FLUX takes sigma as its timestep,
    Wan 1000 sigma. Returns the denoised latents, f32. Raises ValueError for less than one step.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, found {steps}; FLUX.1-dev takes 28 to 50, schnell 4, Wan 50.")
    sigmas = schedule.sigmas(steps)
    now, down = jnp.asarray(sigmas[:-1], jnp.float32), jnp.asarray(np.diff(sigmas), jnp.float32)

    def step(x, index):
        flow = predict(x, jnp.broadcast_to(now[index], x.shape[:1]), index).astype(jnp.float32)
        return x + down[index] * flow, None

    return jax.lax.scan(step, noise.astype(jnp.float32), jnp.arange(steps))[0]
