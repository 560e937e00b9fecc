"""Inputs and plans that do not fit a model: one line that names the argument, before anything is computed.

Models are traced over shapes alone, so nothing here costs more than a trace.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import TINY

from paro_jax import AttentionPlan, BlockMask, TokenGrid

MODELS = {
    name: (tiny, nnx.eval_shape(lambda tiny=tiny: tiny.build(tiny.config)), tiny.inputs())
    for name, tiny in TINY.items()
}


def trace(net, inputs, plan=None):
    """The shape of what the model answers."""
    return jax.eval_shape(lambda net, inputs, plan: net(*inputs, plan=plan), net, inputs, plan)


def dense(tiny, **changed):
    return AttentionPlan.dense(**(dict(grid=tiny.config.grid, heads=2, sites=tiny.sites) | changed))


def in_buckets(tiny):
    grid, block = tiny.config.grid, (64, 64)
    mask = BlockMask(np.ones((2, tiny.sites, 2, *grid.blocks(block)), bool), block)
    return AttentionPlan.build(grid, order=grid.orders[0], mask=mask, bucket_edges=(0.0, 0.5, 1.0))


def turned(tiny):
    """Another grid with as many tokens: it would run, with every token in a wrong place."""
    *frames, height, width = tiny.config.grid.shape
    return dense(tiny, grid=dataclasses.replace(tiny.config.grid, shape=(*frames, width, height)))


def text_last(tiny):
    return dense(tiny, grid=dataclasses.replace(tiny.config.grid, shape=tiny.config.grid.shape, text_position="last"))


PLANS = {
    "of fewer layers": (lambda t: dense(t, sites=t.sites - 1), "leading axes"),
    "of more layers": (lambda t: dense(t, sites=t.sites + 1), "leading axes"),
    "of one layer": (lambda t: dense(t, sites=None), "found ()"),
    "of one layer, as many heads as layers": (lambda t: dense(t, sites=None, heads=t.sites), "found ()"),
    "of all buckets": (in_buckets, "take plan.at_step(step, steps)"),
    "of other heads": (lambda t: dense(t, heads=3), "expected 2 heads as the model has, found 3"),
    "of a grid turned over": (turned, "calibrate for this resolution"),
    "of another text": (lambda t: dense(t, grid=TokenGrid(t.config.grid.shape, text=7)), "length of text"),
}


@pytest.mark.parametrize("wrong", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_of_something_else_is_refused(says, name, wrong):
    (tiny, net, inputs), (make, word) = MODELS[name], PLANS[wrong]
    with says("plan: expected", word):
        trace(net, inputs, make(tiny))


@pytest.mark.parametrize("name", ["flux", "cogvideox"])
def test_text_is_where_the_plan_says(says, name):
    tiny, net, inputs = MODELS[name]
    with says("plan: expected", "'first'", "'last'"):
        trace(net, inputs, text_last(tiny))


def test_a_path_is_no_plan(says):
    _, net, inputs = MODELS["wan"]
    with says("plan: expected an AttentionPlan, found str", "load_plan"):
        jax.eval_shape(lambda net: net(*inputs, plan="plan.safetensors"), net)


def changed(inputs, at, change):
    return tuple(change(x) if i == at else x for i, x in enumerate(inputs))


INPUTS = {
    "latents of integers": (0, lambda x: x.astype(jnp.int32), "latents: expected floating point, found int32"),
    "no latents": (0, lambda x: x[:0], "latents: expected ["),
    "a timestep without rows": (1, lambda x: x[0], "timestep: expected [2] or [1]"),
    "timesteps of another batch": (1, lambda x: jnp.ones(3), "found [3]"),
    "text of another batch": (2, lambda x: x[:1], "text: expected [2, T, 24]"),
    "text of twice the batch": (2, lambda x: jnp.concatenate([x, x]), "`guided` asks with twice as many"),
    "text of another width": (2, lambda x: x[..., :-1], "found [2, 6, 23]"),
    "text without rows": (2, lambda x: x[0], "found [6, 24]"),
    "no text": (2, lambda x: x[:, :0], "found [2, 0, 24]"),
}
OF_FLUX = {
    "pooled text of another width": (3, lambda x: x[:, 1:], "pooled: expected [2, 20] or [1, 20]"),
    "pooled text of another batch": (3, lambda x: jnp.concatenate([x, x]), "found [4, 20]"),
    "guidance as a number": (4, lambda x: 3.5, "guidance: expected [2] or [1]"),
    "no guidance": (4, lambda x: None, "such as 3.5 for each image"),
}
WRONG = [(name, wrong) for name in MODELS for wrong in INPUTS] + [("flux", wrong) for wrong in OF_FLUX]


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_inputs_that_do_not_fit_are_named(says, name, wrong):
    (_, net, inputs), (at, change, word) = MODELS[name], (INPUTS | OF_FLUX)[wrong]
    with says(word):
        jax.eval_shape(lambda net: net(*changed(inputs, at, change)), net)


@pytest.mark.parametrize("name", MODELS)
def test_one_timestep_serves_all_rows(name):
    _, net, inputs = MODELS[name]
    assert trace(net, changed(inputs, 1, lambda x: x[:1])).shape == inputs[0].shape


@pytest.mark.parametrize("planned", [False, True], ids=["dense", "planned"])
@pytest.mark.parametrize("rest", [jnp.bfloat16, jnp.float32], ids=["rest_bf16", "rest_f32"])
@pytest.mark.parametrize("latents", [jnp.bfloat16, jnp.float32], ids=["latents_bf16", "latents_f32"])
@pytest.mark.parametrize("name", MODELS)
def test_the_latents_say_at_which_dtype(name, latents, rest, planned):
    """bf16 weights, with text of either dtype: computed at that of the latents, whatever text encoders gave."""
    tiny, net, inputs = MODELS[name]
    net = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), net)
    given = (inputs[0].astype(latents), *(x.astype(rest) for x in inputs[1:]))
    answer = trace(net, given, dense(tiny) if planned else None)
    assert answer.shape == inputs[0].shape and answer.dtype == latents
