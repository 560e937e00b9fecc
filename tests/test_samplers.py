"""Schedules, samplers and guidance against their definitions, and against whole runs of diffusers."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from paro_jax.models.samplers import (
    FlowSchedule,
    VSchedule,
    cosine_guidance,
    ddim,
    dpm,
    flow_euler,
    flux_shift,
    fresh_noise,
    guided,
    unipc,
)


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


def one_point(schedule, clean):
    """The best v when the data are one point."""
    alphas = jnp.asarray(schedule.alphas_cumprod(), jnp.float32)

    def v(x, t, step):
        a = alphas[t.astype(jnp.int32)][:, None, None]
        eps = (x - jnp.sqrt(a) * clean) / jnp.sqrt(1 - a)
        return jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * clean

    return v


def test_ddim_with_the_true_v_of_one_point_returns_it():
    """When the data are one point, the best v is known; DDIM must land on the point from any noise."""
    clean = np.random.default_rng(0).standard_normal((1, 4, 5)).astype(np.float32)
    schedule = VSchedule(snr_shift=3.0)
    v = one_point(schedule, clean)
    noise = jnp.asarray(np.random.default_rng(1).standard_normal((2, 4, 5)), jnp.float32)
    np.testing.assert_allclose(ddim(v, noise, steps=8, schedule=schedule), np.concatenate([clean, clean]), atol=2e-4)


def test_steps_are_counted_for_the_plan():
    def v(x, t, step):
        return jnp.broadcast_to(step.astype(jnp.float32), x.shape)

    out = ddim(v, jnp.zeros((1, 1)), steps=2)
    # Only the step index 1 predicts something: x1 = 0 (v = 0 at pure noise 0), then clean = -sqrt(1 - a) * 1.
    a = VSchedule().alphas_cumprod()[VSchedule().timesteps(2)[1]]
    np.testing.assert_allclose(out, -np.sqrt(1 - a), rtol=1e-5)


def tanh_flow(x, timestep, step):
    """The model of the golden runs; timestep from 0 to 1000."""
    return jnp.tanh(0.7 * x + timestep[0] / 1000) - 0.3 * jnp.roll(x, 1, -1)


def two_halves(x, timestep, step):
    """The same, as a model that sees less of its input without a prompt."""
    without, prompted = jnp.split(x, 2)
    return tanh_flow(jnp.concatenate([0.5 * without, prompted]), timestep, step)


def run_ddim(golden, steps, shift, **options):
    return ddim(tanh_flow, golden["noise"], steps=steps, schedule=VSchedule(snr_shift=shift), **options)


def run_dpm(golden, steps, shift, predict=tanh_flow, **options):
    fresh = golden["fresh"].__getitem__
    return dpm(predict, golden["noise"], steps=steps, schedule=VSchedule(snr_shift=shift), fresh=fresh, **options)


def run_euler(golden, steps, shift, **options):
    def predict(x, sigma, step):
        return tanh_flow(x, 1000 * sigma, step)

    return flow_euler(predict, golden["noise"], steps=steps, schedule=FlowSchedule(shift), **options)


def run_unipc(golden, steps, shift, **options):
    return unipc(tanh_flow, golden["noise"], steps=steps, schedule=FlowSchedule(shift), **options)


# Every run in the golden files: (file, tensor) -> our run of it.
RUNS = {
    **{
        (name, f"shift{shift:g}.steps{steps}"): functools.partial(run, steps=steps, shift=shift)
        for name, run, shifts, counts in (
            ("ddim", run_ddim, (1.0, 3.0), (7, 30, 50)),
            ("dpm", run_dpm, (1.0, 3.0), (1, 2, 7, 30, 50)),
            ("unipc", run_unipc, (3.0, 5.0, 12.0), (1, 2, 3, 7, 30, 50)),
        )
        for shift in shifts
        for steps in counts
    },
    ("dpm", "guided"): functools.partial(
        run_dpm, steps=50, shift=1.0, predict=guided(two_halves, cosine_guidance(6.0, steps=50))
    ),
    ("flow_euler", "300"): functools.partial(run_euler, steps=28, shift=flux_shift(300)),
    ("flow_euler", "4096"): functools.partial(run_euler, steps=28, shift=flux_shift(4096)),
    ("flow_euler", "none"): functools.partial(run_euler, steps=4, shift=1),
    ("flow_euler", "5"): functools.partial(run_euler, steps=50, shift=5),
}


def golden_runs(name, folder=pathlib.Path(__file__).parent / "golden"):
    return {key: jnp.asarray(value) for key, value in load_file(folder / f"{name}.safetensors").items()}


@pytest.mark.parametrize(("name", "key"), RUNS)
def test_a_whole_run_equals_diffusers(name, key):
    """Schedulers of diffusers 0.42.1 around the same model, by tests/golden/make_models.py: CogVideoXDDIMScheduler and
    CogVideoXDPMScheduler, FlowMatchEulerDiscreteScheduler as for FLUX.1-dev at 300 and 4096 tokens, schnell and Wan,
    UniPCMultistepScheduler as for Wan."""
    golden = golden_runs(name)
    np.testing.assert_allclose(RUNS[name, key](golden), golden[key], atol=2e-6, rtol=0)


def test_every_golden_run_is_compared():
    for name in {name for name, _ in RUNS}:
        assert {key for other, key in RUNS if other == name} == golden_runs(name).keys() - {"noise", "fresh"}


@pytest.mark.parametrize("run", [run_ddim, run_dpm, run_euler, run_unipc])
def test_progress_changes_nothing_but_the_place(run, capsys):
    golden = golden_runs("dpm")
    shown = run(golden, steps=7, shift=3.0, progress=True)
    assert "sample: 100%" in capsys.readouterr().err
    np.testing.assert_allclose(run(golden, steps=7, shift=3.0), shown, atol=1e-6, rtol=0)
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="progress: expected False inside jit, found True"):
        jax.jit(lambda golden: run(golden, steps=7, shift=3.0, progress=True))(golden)


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize("run", [run_ddim, run_dpm, run_euler, run_unipc])
def test_an_answer_of_another_shape_is_refused(run, progress, monkeypatch):
    """One row for two would broadcast: both latents would become one picture."""
    monkeypatch.setitem(globals(), "tanh_flow", lambda x, timestep, step: x[:1])
    if run is run_dpm:
        run = functools.partial(run, predict=tanh_flow)
    golden = golden_runs("dpm")
    golden["noise"] = jnp.concatenate([golden["noise"]] * 2)
    golden["fresh"] = jnp.concatenate([golden["fresh"]] * 2, axis=1)
    with pytest.raises(ValueError, match="predict: expected an answer of the latents' shape"):
        run(golden, steps=2, shift=3.0, progress=progress)


def test_progress_refuses_a_model_that_is_traced():
    """The noise is not, so only the first answer tells."""
    with pytest.raises(ValueError, match="progress: expected False inside jit, found True"):
        jax.jit(lambda w: ddim(lambda x, t, step: w * x, jnp.ones((1, 2)), steps=3, progress=True))(2.0)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("inf"), float("nan")])
def test_a_shift_that_is_none(shift):
    with pytest.raises(ValueError, match="shift: expected a number above 0"):
        FlowSchedule(shift)


def test_with_progress_predict_runs_on_the_host():
    seen = []

    def predict(x, timestep, step):
        seen.append((int(step), float(timestep[0])))  # fails on a tracer
        return x

    unipc(predict, jnp.ones((2, 3)), steps=3, schedule=FlowSchedule(5.0), progress=True)
    # Even levels 1, 0.667, 0.334, shifted: 5 s / (1 + 4 s), in whole thousandths, the first a millionth below 1.
    assert seen == [(0, 999), (1, 909), (2, 714)]


def test_dpm_adds_as_much_noise_as_the_schedule_says():
    """Around one point, latents after a step are Gaussian with the schedule's variance, whatever the step."""
    schedule, clean = VSchedule(), jnp.zeros((1, 1, 1))
    v, powers = one_point(schedule, clean), []

    def watch(x, t, step):
        powers.append(float(jnp.var(x)))
        return v(x, t, step)

    noise = jax.random.normal(jax.random.key(0), (1, 100, 200))
    out = dpm(watch, noise, steps=10, fresh=fresh_noise(jax.random.key(1), noise), schedule=schedule, progress=True)
    np.testing.assert_allclose(powers, 1 - schedule.signal(10)[0], rtol=0.05)
    np.testing.assert_allclose(out, 0, atol=1e-3)


def test_fresh_noise_comes_from_the_key_alone():
    like = jnp.zeros((3, 2), jnp.bfloat16)
    one, two = (fresh_noise(jax.random.key(i), like) for i in (0, 1))
    np.testing.assert_array_equal(one(4), fresh_noise(jax.random.key(0), like)(jnp.asarray(4)))
    draws = np.stack([one(0), one(1), two(0)])
    assert draws.shape == (3, 3, 2) and draws.dtype == np.float32 and len(np.unique(draws)) == draws.size


@pytest.mark.parametrize(("sampler", "falls"), [(flow_euler, 1.95), (unipc, 4)])
def test_the_error_falls_as_the_order_says(sampler, falls):
    """A flow of one Gaussian, whose path is known: from N(0, 1) to N(0, 0.5^2), latents shrink to half."""

    def predict(x, sigma, step):
        if sampler is unipc:
            sigma = exact[step]  # the model gets whole timesteps, the path wants the level itself
        spread = (1 - sigma) ** 2 * 0.25 + sigma**2
        return (sigma - (1 - sigma) * 0.25) / spread * x

    errors = []
    for steps in (32, 64):
        exact = jnp.asarray(FlowSchedule().unipc_sigmas(steps), jnp.float32)
        errors.append(abs(float(sampler(predict, jnp.ones((1,)), steps=steps, schedule=FlowSchedule())[0]) - 0.5))
    assert errors[0] / errors[1] > falls


def test_guidance_leaves_the_plain_answer_at_scale_one_and_zero():
    x, t, step = jnp.asarray([[1.0, -2.0]]), jnp.asarray([500.0]), jnp.asarray(3)
    with_prompt, without = tanh_flow(x, t, step), tanh_flow(0.5 * x, t, step)
    for scale, expected in ((1, with_prompt), (0, without), (3.0, 3 * with_prompt - 2 * without)):
        np.testing.assert_allclose(guided(two_halves, scale)(x, t, step), expected, atol=1e-6)
    # Two experts, two scales, as in Wan 2.2.
    scale = guided(two_halves, lambda timestep: jnp.where(timestep >= 875, 4.0, 3.0))
    np.testing.assert_allclose(scale(x, t, step), 3 * with_prompt - 2 * without, atol=1e-6)
    with pytest.raises(ValueError, match="predict: expected 2 rows, without the prompt and with it, found 1"):
        guided(lambda x, t, step: x[:1], 3.0)(x, t, step)


def test_cosine_guidance_settles_at_the_end():
    scale = cosine_guidance(6.0, steps=50)
    every = np.asarray([scale(jnp.asarray(t, jnp.float32)) for t in range(1000)])
    assert every.min() >= 1 and every.max() <= 7
    np.testing.assert_allclose(every[[0, 50]], [7, 1], atol=1e-6)
    assert (np.diff(every[:51]) <= 0).all()


@pytest.mark.parametrize("steps", [0, 1001])
def test_bad_step_counts(steps):
    golden = golden_runs("dpm")
    for run in (run_ddim, run_dpm, run_unipc):
        with pytest.raises(ValueError, match=rf"steps: expected 1..1000, found {steps}"):
            run(golden, steps=steps, shift=1.0)
    if steps == 0:
        with pytest.raises(ValueError, match="steps: expected at least 1, found 0"):
            run_euler(golden, steps=steps, shift=1.0)


def test_a_straight_flow_lands_on_its_data():
    """The flow to one point is noise - data everywhere on the way: any number of steps is exact."""
    data, noise = (np.random.default_rng(i).standard_normal((1, 4)).astype(np.float32) for i in range(2))
    got = flow_euler(
        lambda x, sigma, step: jnp.asarray(noise - data), jnp.asarray(noise), steps=3, schedule=FlowSchedule(3)
    )
    np.testing.assert_allclose(got, data, atol=1e-6)
