"""FLUX.1 equals diffusers 0.42.1 and its authors' own code, every weight random, unequal axes, two different rows."""

import dataclasses
import functools

import jax
import numpy as np
import parity
import pytest
from flax import nnx

from paro_jax.models import flux
from paro_jax.models.flux import FLUX_DEV, FLUX_SCHNELL, Flux, FluxConfig

SMALL = FluxConfig(num_double=2, num_single=2, num_heads=2, head_dim=16, in_channels=3, rope_dims=(4, 6, 6))
SMALL = dataclasses.replace(SMALL, text_embed_dim=20, pooled_dim=24, text_length=10, height=16, width=12)
STYLES = {
    "flux_dev": SMALL,
    "flux_schnell": dataclasses.replace(SMALL, guided=False),
    "flux_dev_bfl": SMALL,
}


def model(config):
    return Flux(config, rngs=nnx.Rngs(0))


def names(style, config):
    return flux.bfl_names(config) if style.endswith("bfl") else flux.diffusers_names(config)


@pytest.fixture(scope="module", params=STYLES)
def style(request, tmp_path_factory):
    config = STYLES[request.param]
    weights, inputs, output = parity.read(request.param)
    folder = tmp_path_factory.mktemp("weights")
    net = parity.load(weights, lambda: model(config), names(request.param, config), folder)
    return config, functools.partial(parity.answer, net), inputs, output


def test_equals_the_original(style):
    _, run, inputs, output = style
    np.testing.assert_allclose(run(inputs), output, atol=1e-5, rtol=0)


def test_a_dense_plan_in_any_order_changes_nothing(style):
    config, run, inputs, output = style
    for plan in parity.dense_plans(config.grid, sites=config.sites):
        np.testing.assert_allclose(run(inputs, plan), output, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "tensors"), [("flux_dev", 1160), ("flux_dev_bfl", 780)])
def test_the_published_model_maps_without_a_leftover(name, tensors):
    parity.assert_nothing_left_over(lambda: model(FLUX_DEV), names(name, FLUX_DEV), name, tensors)


def test_presets_have_the_published_size():
    for config, billions in ((FLUX_DEV, 11.901), (FLUX_SCHNELL, 11.891)):
        params = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda c=config: model(c)), nnx.Param))
        assert sum(p.size for p in params) / 1e9 == pytest.approx(billions, abs=6e-4)
    assert (FLUX_DEV.grid.tokens, FLUX_SCHNELL.grid.tokens) == (4608, 4352)


def test_guidance_only_where_the_model_takes_it():
    inputs = [np.zeros(s, np.float32) for s in ((1, 3, 16, 12), (1,), (1, 10, 20), (1, 24))]
    with pytest.raises(ValueError, match=r"guidance: expected an array \[B\].*found None"):
        model(SMALL)(*inputs)
    with pytest.raises(ValueError, match=r"guidance: expected None.*found \(1,\)"):
        model(STYLES["flux_schnell"])(*inputs, np.ones(1, np.float32))
    with pytest.raises(ValueError, match=r"latents: expected \[B, 3, H, W\].*multiples of 2, found \(1, 3, 16, 11\)"):
        model(SMALL)(inputs[0][..., :11], *inputs[1:], np.ones(1, np.float32))
