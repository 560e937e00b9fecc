"""Noise schedules, samplers and guidance.

CogVideoX predicts v with zero terminal SNR (arXiv 2305.08891) and is sampled by DDIM (`ddim`, arXiv 2010.02502) or by
the second-order SDE solver of DPM-Solver++ (`dpm`, arXiv 2211.01095). FLUX and Wan predict the flow from data to noise
(arXiv 2403.03206): FLUX is sampled by Euler steps (`flow_euler`), Wan by UniPC (`unipc`, arXiv 2302.04867).

A sampler asks `predict(latents, timestep, step)` once per step. Latents stay f32 between steps; a model of another
width is cast to inside `predict`. A whole generation in one compiled call, the memory of the noise (f32) used again for
the latents, the plan's bucket chosen by step:

    @functools.partial(jax.jit, donate_argnames="noise")
    def generate(net, plan, text, noise):  # text [2B, T, E]: B rows without the prompt, then B with it
        def predict(x, timestep, step):
            return net(x, timestep, text, plan=plan.at_step(step, 50))

        return ddim(guided(predict, 6.0), noise, steps=50)

With `progress=True` the same steps run one by one from the host, under a progress bar if stderr is a terminal: outside
`jit`, around a `predict` that is compiled itself and may do more than predict, such as keeping what attention saw.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from tqdm import tqdm

# latents f32 [B, ...], timestep f32 [B] in the model's unit, step int32 [] from 0 -> the model's answer [B, ...];
# where a sampler has a carry, predict takes it fourth and returns (answer, the next carry)
Predict = Callable[..., Any]


# --- v prediction: CogVideoX ----------------------------------------------------------------------------------------


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
    predict: Predict,
    noise: Array,
    *,
    steps: int,
    schedule: VSchedule = VSchedule(),
    progress: bool = False,
    carry: Any = None,
) -> Any:
    """Deterministic DDIM for a v-predicting model, one `lax.scan` over steps.

    `predict(latents [B, ...], timestep f32 [B], step int32) -> v [B, ...]`; steps count from 0, as `plan.at_step` does.
    `carry`: what a model remembers from step to step (DiTFastAttn's layers do), any pytree of arrays; then
    `predict(latents, timestep, step, carry) -> (v, the next carry)`, here and in every sampler.
    Returns the denoised latents, f32, and with `carry` the last carry. Raises ValueError for a step count the schedule
    does not have, and for `progress` under `jit`.
    """
    _check_steps(steps, schedule.train_steps)
    times = jnp.asarray(schedule.timesteps(steps), jnp.float32)

    def step(state, index):
        x, carry = state
        v, carry = _ask(predict, x, times, index, carry)
        return ddim_step(x, v, index, steps=steps, schedule=schedule), carry

    return _result(_run(step, (noise.astype(jnp.float32), carry), steps, progress))


def fresh_noise(key: Array, like: Array) -> Callable[[Array], Array]:
    """Standard normal noise f32 of the shape of `like` for every step, always the same for the same key."""
    return lambda step: jax.random.normal(jax.random.fold_in(key, step), like.shape, jnp.float32)


def dpm(
    predict: Predict,
    noise: Array,
    *,
    steps: int,
    fresh: Callable[[Array], Array],
    schedule: VSchedule = VSchedule(),
    progress: bool = False,
    carry: Any = None,
) -> Any:
    """CogVideoX's DPM sampler for a v-predicting model, SDE-DPM-Solver++(2M), one `lax.scan` over steps.

    `predict` as for `ddim`. `fresh(step int32) -> [B, ...]`: the noise that step adds, standard normal;
    `fresh_noise(key, noise)` makes it from a key, and `lambda step: stored[step]` reads what another program drew.
    Returns the denoised latents, f32, and with `carry` the last carry. Raises ValueError as `ddim` does.
    """
    _check_steps(steps, schedule.train_steps)
    times = jnp.asarray(schedule.timesteps(steps), jnp.float32)
    now = schedule.signal(steps)[0]
    signal, spread = (jnp.asarray(np.sqrt(p), jnp.float32) for p in (now, 1 - now))
    table = jnp.asarray(_dpm_table(*schedule.signal(steps)), jnp.float32)

    def step(state, index):
        x, carry, before = state
        v, carry = _ask(predict, x, times, index, carry)
        clean = signal[index] * x - spread[index] * v
        return _combine(table[:, index], x, clean, before, fresh(index)), carry, clean

    x = noise.astype(jnp.float32)
    return _result(_run(step, (x, carry, jnp.zeros_like(x)), steps, progress))


def _dpm_table(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What a step multiplies (latents, clean now, clean one step before, fresh noise) by, f64 `[4, steps]`.

    a, b: signal power before and after each step. exp(-2h), h the step in log-SNR, is a (1 - b) / (b (1 - a)), which is
    put in by hand: at pure noise and at clean latents h is infinite and the products are not.
    """
    keep = np.sqrt(a / b) * (1 - b) / (1 - a)
    clean = (b - a) / ((1 - a) * np.sqrt(b))
    added = np.sqrt((1 - b) * (b - a) / ((1 - a) * b))
    with np.errstate(divide="ignore"):
        start, end = (0.5 * (np.log(p) - np.log1p(-p)) for p in (a, b))
    # Second order: clean + (clean - before) h / (2 h_last). Not at the first step, which has nothing before, nor at the
    # second, whose h_last begins at pure noise and is infinite, nor at one that ends in clean latents.
    slope = np.zeros_like(a)
    second = np.flatnonzero(np.isfinite(end[2:])) + 2
    slope[second] = (end[second] - start[second]) / (2 * (start[second] - start[second - 1]))
    return np.stack([keep, clean * (1 + slope), -clean * slope, added])


# --- flow prediction: FLUX and Wan ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """Noise levels of a flow-matching model, from 1 (pure noise) to 0; a `shift` above 1 spends more steps near noise.

    FLUX.1-dev: `flux_shift(image tokens)`; schnell: 1. Wan 2.1: 5 at 720p, 3 at 480p.
    """

    shift: float = 1.0
    train_steps: int = 1000

    def __post_init__(self):
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift: expected a number above 0, such as 3, found {self.shift}; 1 shifts nothing.")

    def sigmas(self, steps: int) -> np.ndarray:
        """f64 `[steps + 1]` from 1 to 0: even down to 1 / steps, shifted (arXiv 2403.03206, eq. 23), then 0."""
        return np.append(self._shifted(np.linspace(1.0, 1.0 / steps, steps)), 0.0)

    def unipc_sigmas(self, steps: int) -> np.ndarray:
        """f64 `[steps + 1]` as Wan's UniPC has them: even from 1 towards 1 / train_steps, shifted, then 0.

        The first lies a millionth below 1, where the log-SNR is finite.
        """
        sigmas = self._shifted(np.linspace(1.0, 1.0 / self.train_steps, steps + 1)[:-1])
        return np.concatenate([[sigmas[0] - 1e-6], sigmas[1:], [0.0]])

    def _shifted(self, even: np.ndarray) -> np.ndarray:
        return self.shift * even / (1 + (self.shift - 1) * even)


def flux_shift(tokens: int) -> float:
    """FLUX.1-dev's shift for that many image tokens: log-linear, exp(0.5) at 256 and exp(1.15) at 4096."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def flow_euler(
    predict: Predict, noise: Array, *, steps: int, schedule: FlowSchedule, progress: bool = False, carry: Any = None
) -> Any:
    """Euler steps along the flow, one `lax.scan`: x += (next sigma - sigma) * prediction.

    `predict(latents [B, ...], sigma f32 [B] in (0, 1], step int32) -> flow [B, ...]`; FLUX takes sigma as its timestep,
    Wan 1000 sigma. Returns the denoised latents, f32, and with `carry` the last carry. Raises ValueError for less than
    one step, and for `progress` under `jit`.
    """
    _check_steps(steps)
    sigmas = schedule.sigmas(steps)
    now, down = jnp.asarray(sigmas[:-1], jnp.float32), jnp.asarray(np.diff(sigmas), jnp.float32)

    def step(state, index):
        x, carry = state
        flow, carry = _ask(predict, x, now, index, carry)
        return x + down[index] * flow, carry

    return _result(_run(step, (noise.astype(jnp.float32), carry), steps, progress))


def unipc(
    predict: Predict, noise: Array, *, steps: int, schedule: FlowSchedule, progress: bool = False, carry: Any = None
) -> Any:
    """Wan's sampler: UniPC of second order with B(h) = e^h - 1 ("bh2") on clean latents, one `lax.scan` over steps.

    Each step first corrects the latents with what the model now says of them, then predicts the next; one call of the
    model per step. The first and the last step are of first order.
    `predict(latents [B, ...], timestep f32 [B], step int32) -> flow [B, ...]`; timesteps are whole, 999 to 0, as Wan
    takes them. Returns the denoised latents, f32, and with `carry` the last carry. Raises ValueError for a step count
    the schedule does not have, and for `progress` under `jit`.
    """
    _check_steps(steps, schedule.train_steps)
    sigmas = schedule.unipc_sigmas(steps)
    times = jnp.asarray(np.floor(sigmas * schedule.train_steps), jnp.float32)
    correct, advance = (jnp.asarray(table, jnp.float32) for table in _unipc_tables(sigmas))
    level = jnp.asarray(sigmas, jnp.float32)

    def step(state, index):
        x, carry, last, before, older = state
        flow, carry = _ask(predict, x, times, index, carry)
        clean = x - level[index] * flow
        x = _combine(correct[:, index], x, last, clean, before, older)
        return _combine(advance[:, index], x, clean, before), carry, x, clean, before

    x = noise.astype(jnp.float32)
    return _result(_run(step, (x, carry, *[jnp.zeros_like(x)] * 3), steps, progress))


def _unipc_tables(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each step multiplies by, f64: to correct (latents, latents it left from, clean latents now, one and two
    steps before) `[5, steps]`, and to advance (corrected latents, clean latents now, one step before) `[3, steps]`.

    A step over h in log-SNR from s to t, D = clean differences over their relative distance r (arXiv 2302.04867):
    x_t = sigma_t / sigma_s x_s - alpha_t (e^-h - 1) (clean_s + sum of rho D).
    """
    # The original keeps its levels in f32, where the first alpha, 1e-6, has two digits: other digits, other latents.
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    alphas, steps = 1 - sigmas, len(sigmas) - 1
    with np.errstate(divide="ignore"):
        snr = np.log(alphas) - np.log(sigmas)
    correct, advance = np.zeros((5, steps)), np.zeros((3, steps))
    correct[0, 0] = 1  # nothing to correct yet
    for s in range(steps):
        t, h = s + 1, snr[s + 1] - snr[s]
        phi = np.expm1(-h)
        second = 1 <= s < steps - 1
        r = (snr[s - 1] - snr[s]) / h if second else 1.0

        # Predictor: rho = 1/2, D of the step before.
        bent = 0.5 / r if second else 0.0
        advance[:, s] = sigmas[t] / sigmas[s], -alphas[t] * phi * (1 - bent), -alphas[t] * phi * bent

        # Corrector of this step, applied at the next: one more D, from what the model says at t.
        if t < steps:
            first, now = 0.0, 0.5
            if second:
                b1 = (phi / -h - 1) / phi
                b2 = 2 * ((phi / -h - 1) / -h - 0.5) / phi
                first = (b1 - b2) / (1 - r)
                now = b1 - first
            weights = np.array([now, 1 - now - first / r, first / r])
            correct[1:, t] = sigmas[t] / sigmas[s], *(-alphas[t] * phi * weights)
    return correct, advance


# --- guidance -------------------------------------------------------------------------------------------------------


def guided(predict: Predict, scale: float | Callable[[Array], Array]) -> Predict:
    """`predict` with classifier-free guidance (arXiv 2207.12598), both halves in one call of the model.

    `predict` is asked with 2B rows, the B latents twice: its first half must be conditioned on nothing (or a negative
    prompt), its second on the prompt. The answer is without + scale (with - without). `scale`: a number, or a function
    of the timestep (f32 scalar), such as `cosine_guidance(6.0, steps=50)`. A carry passes through.

    CogVideoX 6, Wan 2.1 5; FLUX.1 takes none: dev was distilled to take its guidance as an input.
    """

    def both(x: Array, timestep: Array, step: Array, *carry: Any) -> Any:
        answer = predict(jnp.concatenate([x, x]), jnp.concatenate([timestep, timestep]), step, *carry)
        answer, after = answer if carry else (answer, None)
        answer = answer.astype(jnp.float32)
        if answer.shape[0] != 2 * x.shape[0]:
            raise ValueError(
                f"predict: expected {2 * x.shape[0]} rows, without the prompt and with it, found {answer.shape[0]}; "
                "give the text of both halves, without first."
            )
        without, prompted = jnp.split(answer, 2)
        answer = without + (scale(timestep[0]) if callable(scale) else scale) * (prompted - without)
        return (answer, after) if carry else answer

    return both


def cosine_guidance(scale: float, *, steps: int, power: float = 5.0, train_steps: int = 1000) -> Callable:
    """CogVideoX's dynamic guidance: 1 + scale (1 - cos(pi ((steps - timestep) / steps) ** power)) / 2.

    The timestep counts training steps and `steps` sampling steps, here as in the original: the scale turns fast between
    1 and 1 + scale until the timestep falls below `steps`, and then settles.
    """
    # From f64, as angles reach millions.
    turns = ((steps - np.arange(train_steps)) / steps) ** power
    table = jnp.asarray(1 + scale * (1 - np.cos(np.pi * turns)) / 2, jnp.float32)
    return lambda timestep: table[timestep.astype(jnp.int32)]


def experts(high: Predict, low: Predict, *, boundary: float, train_steps: int = 1000) -> Predict:
    """`predict` of a mixture of two experts, one for noise and one for detail: Wan 2.2 A14B (wan.A14B has its numbers).

    `high` answers while timestep >= `boundary` * `train_steps`, `low` below, as the original; `boundary` is a noise
    level in (0, 1). Each takes and gives what `predict` does, for a whole batch at one timestep. Inside `jit` only the
    one that is asked computes. Give each its own net, its own plan and its own guidance around it:

        predict = experts(guided(by(net, plan), 4.0), guided(by(net_2, plan_2), 3.0), boundary=0.875)

    Raises ValueError for a boundary that leaves one of them nothing to do.
    """
    if not 0 < boundary < 1:
        raise ValueError(
            f"boundary: expected a noise level between 0 and 1, such as 0.875, found {boundary}; timesteps count to "
            f"{train_steps}."
        )

    def predict(x: Array, timestep: Array, step: Array) -> Array:
        def by(expert: Predict) -> Callable[[], Array]:
            return lambda: expert(x, timestep, step).astype(jnp.float32)

        is_high = timestep[0] >= boundary * train_steps
        if isinstance(is_high, Tracer):
            return jax.lax.cond(is_high, by(high), by(low))
        return by(high if is_high else low)()

    return predict


# --- what all samplers share ----------------------------------------------------------------------------------------


def _check_steps(steps: int, most: int | None = None) -> None:
    if steps < 1 or (most is not None and steps > most):
        wanted = "at least 1" if most is None else f"1..{most}"
        raise ValueError(f"steps: expected {wanted}, found {steps}; FLUX.1-schnell takes 4, other models 28 to 50.")


def _ask(predict: Predict, x: Array, times: Array, index: Array, carry: Any) -> tuple[Array, Any]:
    timestep = jnp.broadcast_to(times[index], x.shape[:1])
    answer, carry = (predict(x, timestep, index), None) if carry is None else predict(x, timestep, index, carry)
    if answer.shape != x.shape:  # it would broadcast, or fail far from here
        raise ValueError(f"predict: expected an answer of the latents' shape {x.shape}, found {answer.shape}.")
    return answer.astype(jnp.float32), carry


def _result(state: tuple[Any, ...]) -> Any:
    """The latents, and the carry where there is one, out of a sampler's last state."""
    x, carry = state[:2]
    return x if carry is None else (x, carry)


def _combine(weights: Array, *terms: Array) -> Array:
    return sum((w * x for w, x in zip(weights[1:], terms[1:], strict=True)), weights[0] * terms[0])


def _run(step: Callable[[Any, Array], Any], state: Any, steps: int, progress: bool) -> Any:
    """step(state, index) for every index: scanned, or from the host under a progress bar."""
    if not progress:
        indices = jnp.arange(steps, dtype=jnp.int32)
        return jax.lax.scan(lambda state, index: (step(state, index), None), state, indices)[0]
    _refuse_traced(state)
    for index in tqdm(range(steps), desc="sample", unit="step", disable=None):  # None: only where a person looks
        state = step(state, jnp.asarray(index, jnp.int32))
        _refuse_traced(state)  # of a model that is traced, though its noise is not
        jax.block_until_ready(state)
    return state


def _refuse_traced(state: Any) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state)):
        raise ValueError(
            "progress: expected False inside jit, found True; the bar needs every step on the host: compile `predict` "
            "instead of the whole sampler, or leave it off."
        )
