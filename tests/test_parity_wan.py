"""Wan text to video equals diffusers 0.42.1, with every weight random, unequal axes and two different rows."""

import dataclasses
import functools

import jax
import numpy as np
import parity
import pytest
from flax import nnx
from tiny_models import drawn

from paro_jax import AttentionPlan
from paro_jax.models.wan import WAN_1_3B, WAN_2_2_5B, WAN_14B, Wan, WanConfig, diffusers_names

SMALL = WanConfig(num_layers=2, num_heads=2, head_dim=24, in_channels=4, out_channels=6)
SMALL = dataclasses.replace(SMALL, text_embed_dim=16, time_embed_dim=32, mlp_dim=64, frames=3, height=8, width=12)
STYLES = {"wan": SMALL, "wan_per_token": SMALL}  # one timestep per video, and one per token (Wan 2.2 5B)


def model(config):
    return Wan(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module", params=STYLES)
def style(request, tmp_path_factory):
    weights, inputs, output = parity.read(request.param)
    net = parity.load(weights, lambda: model(SMALL), diffusers_names(SMALL), tmp_path_factory.mktemp("weights"))
    return functools.partial(parity.answer, net), inputs, output


def test_equals_diffusers(style):
    run, inputs, output = style
    np.testing.assert_allclose(run(inputs), output, atol=1e-5, rtol=0)


def test_a_dense_plan_in_any_order_changes_nothing(style):
    run, inputs, output = style
    for plan in parity.dense_plans(SMALL.grid, sites=2):
        np.testing.assert_allclose(run(inputs, plan), output, atol=1e-5, rtol=0)


def test_one_trace_serves_all_layers_and_plans():
    net, traces = drawn(lambda: model(SMALL)), 0
    inputs = (np.ones((1, 4, 3, 8, 12), np.float32), np.ones(1, np.float32), np.ones((1, 10, 16), np.float32))

    @jax.jit
    def run(net, plan):
        nonlocal traces
        traces += 1
        return net(*inputs, plan=plan)

    a, b = (run(net, AttentionPlan.dense(SMALL.grid, heads=2, sites=2, order=o)) for o in ("FHW", "WHF"))
    assert traces == 1
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_published_model_maps_without_a_leftover():
    parity.assert_nothing_left_over(lambda: model(WAN_14B), diffusers_names(WAN_14B), "wan_14b", tensors=1095)


@pytest.mark.parametrize(("config", "billions"), [(WAN_1_3B, 1.419), (WAN_14B, 14.288), (WAN_2_2_5B, 5.000)])
def test_presets_have_the_published_size(config, billions):
    params = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: model(config)), nnx.Param))
    assert sum(p.size for p in params) / 1e9 == pytest.approx(billions, abs=6e-4)


def test_presets_have_the_published_grid():
    assert (WAN_1_3B.grid.tokens, WAN_14B.grid.tokens, WAN_2_2_5B.grid.tokens) == (32760, 75600, 27280)


def test_odd_sizes_are_refused():
    with pytest.raises(
        ValueError, match=r"latents: expected \[B, 4, F, H, W\].*multiples of 2, found \(1, 4, 3, 8, 11\)"
    ):
        model(SMALL)(np.zeros((1, 4, 3, 8, 11), np.float32), np.zeros(1), np.zeros((1, 10, 16), np.float32))
