"""Whole models in their samplers: one trace for all steps and layers, the plan's bucket by step, latents donated."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import test_parity_cogvideox as cogvideox
import test_parity_flux as flux
import test_parity_wan as wan
from flax import nnx
from tiny_models import drawn

from paro_jax import AttentionPlan, BlockMask
from paro_jax.models.cogvideox import Block as CogVideoXBlock
from paro_jax.models.flux import DoubleBlock, SingleBlock
from paro_jax.models.samplers import (
    FlowSchedule,
    cosine_guidance,
    dpm,
    experts,
    flow_euler,
    fresh_noise,
    guided,
    unipc,
)
from paro_jax.models.wan import Block as WanBlock

STEPS = 5
BLOCK = (16, 32)


class Case(NamedTuple):
    """A tiny model and the way it is sampled; blocks: the classes whose calls are counted."""

    build: Callable[[], nnx.Module]
    config: Any
    sites: int
    noise: tuple[int, ...]  # one row
    inputs: tuple[tuple[int, ...], ...]  # of one row, after the timestep
    guidance: float | Callable | None
    sample: Callable
    blocks: tuple[type, ...]


COGVIDEOX, FLUX, WAN = cogvideox.STYLES["cogvideox_5b"], flux.STYLES["flux_dev"], wan.STYLES["wan"]
# As many channels out as in, so that latents can go round.
WAN = dataclasses.replace(WAN, out_channels=4)
VIDEO = (3, 4, 8, 12)
DYNAMIC = cosine_guidance(6.0, steps=STEPS)


def dpm_from_a_key(predict, noise, **options):
    return dpm(predict, noise, fresh=fresh_noise(jax.random.key(7), noise), **options)


CASES = {
    "cogvideox": Case(
        lambda: cogvideox.model(COGVIDEOX), COGVIDEOX, 2, VIDEO, ((10, 24),), DYNAMIC, dpm_from_a_key, (CogVideoXBlock,)
    ),
    "flux": Case(
        lambda: flux.model(FLUX),
        FLUX,
        4,
        (3, 16, 12),
        ((10, 20), (24,), ()),
        None,
        functools.partial(flow_euler, schedule=FlowSchedule(1.2)),
        (DoubleBlock, SingleBlock),
    ),
    "wan": Case(
        lambda: wan.model(WAN),
        WAN,
        2,
        (4, 3, 8, 12),
        ((10, 16),),
        5.0,
        functools.partial(unipc, schedule=FlowSchedule(3.0)),
        (WanBlock,),
    ),
}


def plan_in_buckets(case: Case, seed: int) -> AttentionPlan:
    """Another mask and other orders in each of two buckets, site and head; three steps and two."""
    grid, rng = case.config.grid, np.random.default_rng(seed)
    keep = rng.random((2, case.sites, 2, *grid.blocks(BLOCK))) < 0.6
    keep[..., 0] = True
    order = rng.choice(grid.orders, keep.shape[:3]).tolist()
    return AttentionPlan.build(grid, order=order, mask=BlockMask(keep, BLOCK), bucket_edges=(0.0, 0.5, 1.0))


def inputs(case: Case, rows: int) -> list[jax.Array]:
    rng = np.random.default_rng(5)
    return [jnp.asarray(rng.standard_normal((rows, *shape)), jnp.float32) for shape in case.inputs]


def noise(case: Case, rows: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(6).standard_normal((rows, *case.noise)), jnp.float32)


def around(case: Case, predict):
    return predict if case.guidance is None else guided(predict, case.guidance)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_one_trace_for_all_steps_layers_and_plans(case, monkeypatch):
    """The module docstring's recipe; counted: traces of the whole, of a step, and of each kind of block."""
    traces = {"generate": 0, "step": 0} | {kind.__name__: 0 for kind in case.blocks}
    for kind in case.blocks:

        def counted(self, *args, _call=kind.__call__, _name=kind.__name__):
            traces[_name] += 1
            return _call(self, *args)

        monkeypatch.setattr(kind, "__call__", counted)

    @functools.partial(jax.jit, donate_argnames="noise")
    def generate(net, plan, inputs, noise):
        traces["generate"] += 1

        def predict(x, timestep, step):
            traces["step"] += 1
            return net(x, timestep, *inputs, plan=plan.at_step(step, STEPS))

        return case.sample(around(case, predict), noise, steps=STEPS)

    net, given = drawn(case.build), inputs(case, 1 if case.guidance is None else 2)
    plans = [plan_in_buckets(case, seed) for seed in (0, 1)]
    start = noise(case, 1)
    outs = [np.asarray(generate(net, plan, given, jnp.copy(start))) for plan in plans]
    assert set(traces.values()) == {1}, traces
    # The plans differ, so do the latents.
    assert np.abs(outs[0] - outs[1]).max() > 1e-4

    # The noise's memory is used again, and holds no noise any more.
    generate(net, plans[0], given, start)
    assert start.is_deleted() and set(traces.values()) == {1}


def test_each_step_has_the_plan_of_its_bucket():
    """Scanned with the bucket chosen by a traced step, and step by step from the host with the bucket named."""
    case = CASES["wan"]
    net, given, plan, asked = drawn(case.build), inputs(case, 2), plan_in_buckets(case, 0), []

    @jax.jit
    def answer(net, plan, x, timestep):
        return net(x, timestep, *given, plan=plan)

    def scanned(x, timestep, step):
        return answer(net, plan.at_step(step, STEPS), x, timestep)

    def named(x, timestep, step):
        asked.append(int(step) // 3)  # steps 0, 1, 2 are below the edge 0.5, steps 3 and 4 above
        return answer(net, plan[asked[-1]], x, timestep)

    expected = case.sample(around(case, named), noise(case, 1), steps=STEPS, progress=True)
    assert asked == [0, 0, 0, 1, 1]
    got = case.sample(around(case, scanned), noise(case, 1), steps=STEPS)
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0)


def test_two_nets_share_a_run():
    """Wan 2.2 A14B's recipe: two experts, each with weights, plan and guidance of its own, in one compiled call."""
    case, scales = CASES["wan"], (4.0, 3.0)
    net, given, asked = drawn(case.build), inputs(case, 2), []
    nets = (net, jax.tree.map(lambda w: 0.9 * w, net))
    plans = [plan_in_buckets(case, seed) for seed in (0, 1)]

    @jax.jit
    def generate(nets, plans, noise):
        def by(net, plan, scale):
            return guided(lambda x, t, step: net(x, t, *given, plan=plan.at_step(step, STEPS)), scale)

        pair = [by(*one) for one in zip(nets, plans, scales, strict=True)]
        return case.sample(experts(*pair, boundary=0.9), noise, steps=STEPS)

    answer = jax.jit(lambda net, plan, x, t: net(x, t, *given, plan=plan))

    def named(x, timestep, step):
        asked.append(which := int(timestep[0] < 900))
        plan = plans[which].at_step(int(step), STEPS)
        return guided(lambda x, t, _: answer(nets[which], plan, x, t), scales[which])(x, timestep, step)

    expected = case.sample(named, noise(case, 1), steps=STEPS, progress=True)
    assert asked == [0, 0, 1, 1, 1]
    np.testing.assert_allclose(generate(nets, plans, noise(case, 1)), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("module", "name"),
    [(cogvideox, "cogvideox_5b"), (flux, "flux_dev"), (wan, "wan")],
    ids=["cogvideox", "flux", "wan"],
)
def test_the_tree_mode_of_nnx(module, name, tmp_path):
    """Made, loaded, split and merged, compiled and differentiated in the mode that is to become the default."""
    config = module.STYLES[name]
    weights, given, expected = parity.read(name)
    names = module.names(name, config) if module is flux else module.diffusers_names(config)
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        net = parity.load(weights, lambda: module.model(config), names, tmp_path)
        net = nnx.merge(*nnx.split(net))
        out = nnx.jit(lambda net, given: net(**given))(net, given)
        np.testing.assert_allclose(out, expected, atol=1e-5, rtol=0)
        gradients = jax.eval_shape(nnx.grad(lambda net: jnp.square(net(**given)).mean()), net)
        params, gradients = (jax.tree.leaves(tree) for tree in (nnx.state(net, nnx.Param), gradients))
        assert [g.shape for g in gradients] == [p.shape for p in params]
