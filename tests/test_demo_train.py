"""Training the demo model: its attention and its batches."""

import functools

import jax
import numpy as np
import pytest

from paro_jax.demo import data, model, train


@pytest.mark.parametrize("tokens", [2, 7, 16])
def test_attention_and_its_gradient_are_those_of_jax(tokens):
    q, k, v, weight = jax.random.normal(jax.random.key(tokens), (4, 2, tokens, 3, 8))

    def through(attention):
        return jax.value_and_grad(lambda *qkv: (attention(*qkv) * weight).sum(), (0, 1, 2))(q, k, v)

    theirs = through(jax.nn.dot_product_attention)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), through(train.attention), theirs)


def test_about_one_caption_in_ten_is_dropped():
    dropped = [not words.any() for step in range(60) for words in train.batch(step, (1, 1, 1), 4)[1]]
    assert 0.04 < np.mean(dropped) < 0.18


def test_a_crop_is_told_where_it_is():
    """What the model is told of places in a crop is what it is told of the same pixels of the whole."""
    grid = (2, 3, 4)
    latents, _, at = train.batch(5, grid, 3)
    whole = model.where((1, data.FRAMES, 12, data.HEIGHT // 2, data.WIDTH // 2))[0]
    for places, (f, y, x) in zip(model.where(latents.shape, at), at, strict=True):
        np.testing.assert_allclose(places, whole[f : f + 2, :, y : y + 6, x : x + 8], atol=1e-6)
    assert np.unique(at, axis=0).shape[0] > 1
