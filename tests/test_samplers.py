"""Schedule and sampler against their definitions."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from paro_jax.models.samplers import FlowSchedule, VSchedule, ddim, flow_euler, flux_shift


def test_schedule_ends_in_pure_noise_and_falls():
    a = VSchedule(snr_shift=3.0).alphas_cumprod()
    assert a.shape == (1000,) and a[-1] == 0 and (np.diff(a) < 0).all()
    # Rescaling to zero terminal SNR keeps the first value (arXiv 2305.08891, algorithm 1).
    plain = (1 - 0.00085) / (3.0 - 2.0 * (1 - 0.00085))
    np.testing.assert_allclose(a[0], plain, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 7, 16, 30, 50, 1000])
def test_trailing_timesteps(steps):
    t = VSchedule().timesteps(steps)
    assert len(t) == steps and t[0] == 999 and (np.diff(t) < 0).all() and t[-1] >= 0
    if steps == 50:
        np.testing.assert_array_equal(t, np.arange(999, 0, -20))


def test_ddim_with_the_true_v_of_one_point_returns_it():
    """When the data are one point, the best v is known; DDIM must land on the point from any noise."""
    clean = np.random.default_rng(0).standard_normal((1, 4, 5)).astype(np.float32)
    schedule = VSchedule(snr_shift=3.0)
    alphas = jnp.asarray(schedule.alphas_cumprod(), jnp.float32)

    def v(x, t, step):
        a = alphas[t.astype(jnp.int32)][:, None, None]
        eps = (x - jnp.sqrt(a) * clean) / jnp.sqrt(1 - a)
        return jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * clean

    noise = jnp.asarray(np.random.default_rng(1).standard_normal((2, 4, 5)), jnp.float32)
    np.testing.assert_allclose(ddim(v, noise, steps=8, schedule=schedule), np.concatenate([clean, clean]), atol=2e-4)


def test_steps_are_counted_for_the_plan():
    def v(x, t, step):
        return jnp.broadcast_to(step.astype(jnp.float32), x.shape)

    out = ddim(v, jnp.zeros((1, 1)), steps=2)
    # Only the step index 1 predicts something: x1 = 0 (v = 0 at pure noise 0), then clean = -sqrt(1 - a) * 1.
    a = VSchedule().alphas_cumprod()[VSchedule().timesteps(2)[1]]
    np.testing.assert_allclose(out, -np.sqrt(1 - a), rtol=1e-5)


@pytest.mark.parametrize("steps", [0, 1001])
def test_bad_step_counts(steps):
    with pytest.raises(ValueError, match=rf"steps: expected 1..1000, found {steps}"):
        ddim(lambda x, t, i: x, jnp.zeros((1, 1)), steps=steps)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [7, 30, 50])
def test_a_whole_run_equals_diffusers(steps, shift):
    """CogVideoXDDIMScheduler of diffusers 0.42.1 around the same model, by tests/golden/make_models.py."""
    golden = load_file(pathlib.Path(__file__).parent / "golden" / "ddim.safetensors")

    def v(x, t, step):
        return jnp.tanh(0.7 * x + t[0] / 1000) - 0.3 * jnp.roll(x, 1, -1)

    got = ddim(v, jnp.asarray(golden["noise"]), steps=steps, schedule=VSchedule(snr_shift=shift))
    np.testing.assert_allclose(got, golden[f"shift{shift:g}.steps{steps}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "steps", "shift"),
    [("300", 28, flux_shift(300)), ("4096", 28, flux_shift(4096)), ("none", 4, 1), ("5", 50, 5)],
)
def test_a_whole_flow_run_equals_diffusers(name, steps, shift):
    """FlowMatchEulerDiscreteScheduler of diffusers 0.42.1: FLUX.1-dev at 300 and 4096 tokens, schnell, Wan."""
    golden = load_file(pathlib.Path(__file__).parent / "golden" / "flow_euler.safetensors")

    def flow(x, sigma, step):
        return jnp.tanh(0.7 * x + sigma[0]) - 0.3 * jnp.roll(x, 1, -1)

    got = flow_euler(flow, jnp.asarray(golden["noise"]), steps=steps, schedule=FlowSchedule(shift))
    np.testing.assert_allclose(got, golden[name], atol=1e-5, rtol=0)


def test_a_straight_flow_lands_on_its_data():
    """The flow to one point is noise - data everywhere on the way: any number of steps is exact."""
    data, noise = (np.random.default_rng(i).standard_normal((1, 4)).astype(np.float32) for i in range(2))
    got = flow_euler(
        lambda x, sigma, step: jnp.asarray(noise - data), jnp.asarray(noise), steps=3, schedule=FlowSchedule(3)
    )
    np.testing.assert_allclose(got, data, atol=1e-6)
    with pytest.raises(ValueError, match="steps: expected at least 1, found 0"):
        flow_euler(lambda x, sigma, step: x, jnp.asarray(noise), steps=0, schedule=FlowSchedule())
