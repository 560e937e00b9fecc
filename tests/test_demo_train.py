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
    dropped = [not words.any() for step in range(60) for words in train.batch(step, 1, 4)[1]]
    assert 0.04 < np.mean(dropped) < 0.18


def test_frames_are_told_when_they_are():
    """What the model is told of places in a few frames is what it is told of the same frames of the whole."""
    latents, _, first = train.batch(5, 2, 3)
    whole = model.where((1, data.FRAMES, 12, data.HEIGHT // 2, data.WIDTH // 2))[0]
    for places, start in zip(model.where(latents.shape, first), first, strict=True):
        np.testing.assert_allclose(places, whole[start : start + 2], atol=1e-6)
    assert len(set(first.tolist())) > 1


def test_frames_drawn_alone_are_those_of_the_whole():
    scene = data.random_scene(3)
    np.testing.assert_array_equal(data.render(scene, range(4, 6)), data.render(scene)[4:6])
