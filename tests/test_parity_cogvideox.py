"""CogVideoX in every style equals diffusers 0.42.1, with every weight random, unequal axes and two different rows."""

import dataclasses
import functools

import jax
import numpy as np
import parity
import pytest
from flax import nnx

from paro_jax.models.cogvideox import COGVIDEOX_1_5_5B, COGVIDEOX_2B, COGVIDEOX_5B, CogVideoX, diffusers_names
from paro_jax.models.weights import WeightsError

SMALL = dict(num_layers=2, num_heads=2, head_dim=32, in_channels=4, out_channels=4, time_embed_dim=16)
SMALL |= dict(text_embed_dim=24, text_length=10, frames=3, height=8, width=12)
STYLES = {
    "cogvideox_2b": dataclasses.replace(COGVIDEOX_2B, **SMALL),
    "cogvideox_5b": dataclasses.replace(COGVIDEOX_5B, **SMALL),
    "cogvideox_5b_tall": dataclasses.replace(COGVIDEOX_5B, **SMALL),  # asked for 12 x 8, trained at 8 x 12
    "cogvideox_1_5": dataclasses.replace(COGVIDEOX_1_5_5B, **SMALL),
}


def model(config):
    return CogVideoX(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module", params=STYLES)
def style(request, tmp_path_factory):
    config = STYLES[request.param]
    weights, inputs, output = parity.read(request.param)
    net = parity.load(weights, lambda: model(config), diffusers_names(config), tmp_path_factory.mktemp("weights"))
    return config, functools.partial(parity.answer, net), inputs, output


def test_equals_diffusers(style):
    _, run, inputs, output = style
    np.testing.assert_allclose(run(inputs), output, atol=1e-5, rtol=0)


def test_a_dense_plan_in_any_order_changes_nothing(style):
    config, run, inputs, output = style
    batch, frames, _, height, width = inputs["latents"].shape
    config = dataclasses.replace(config, frames=frames, height=height, width=width)
    for plan in parity.dense_plans(config.grid, sites=2):
        np.testing.assert_allclose(run(inputs, plan), output, atol=1e-5, rtol=0)


def test_the_published_model_maps_without_a_leftover():
    parity.assert_nothing_left_over(
        lambda: model(COGVIDEOX_5B), diffusers_names(COGVIDEOX_5B), "cogvideox_5b", tensors=1024
    )


@pytest.mark.parametrize(
    ("config", "billions"), [(COGVIDEOX_2B, 1.694), (COGVIDEOX_5B, 5.570), (COGVIDEOX_1_5_5B, 5.571)]
)
def test_presets_have_the_published_size(config, billions):
    params = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: model(config)), nnx.Param))
    assert sum(p.size for p in params) / 1e9 == pytest.approx(billions, abs=6e-4)


def test_the_grid_of_1_5_has_whole_patches_of_frames():
    assert COGVIDEOX_1_5_5B.padded_frames == 22
    assert COGVIDEOX_1_5_5B.grid.shape == (11, 48, 85) and COGVIDEOX_1_5_5B.grid.tokens == 45106
    with pytest.raises(
        ValueError, match=r"latents: expected \[B, F, 4, H, W\] with F a multiple of 2.*found \(1, 3, 4"
    ):
        config = STYLES["cogvideox_1_5"]
        model(config)(np.zeros((1, 3, 4, 8, 12), np.float32), np.zeros(1), np.zeros((1, 10, 24), np.float32))


def test_every_problem_of_a_checkpoint_is_named(tmp_path):
    config = STYLES["cogvideox_5b"]
    weights, _, _ = parity.read("cogvideox_5b")
    del weights["transformer_blocks.1.attn1.to_q.bias"]
    weights["transformer_blocks.2.attn1.to_q.bias"] = np.zeros(64, np.float32)
    weights["patch_embed.proj.weight"] = np.zeros((64, 3, 2, 2), np.float32)
    weights["norm_final.bias"] = np.zeros(63, np.float32)
    with pytest.raises(WeightsError) as e:
        parity.load(weights, lambda: model(config), diffusers_names(config), tmp_path)
    text = str(e.value)
    assert "4 problems" in text and "weights.safetensors" in text
    assert "missing transformer_blocks.1.attn1.to_q.bias" in text
    assert "unexpected transformer_blocks.2.attn1.to_q.bias" in text
    assert "patch_embed.proj.weight: expected shape (64, 16), found (64, 3, 2, 2)" in text
    assert "norm_final.bias: expected shape (64,), found (63,)" in text
