"""Recording the attention of a model while it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import GRID, make

import calibrate


def test_capture_records_every_call():
    def model(x, attention):
        @jax.jit
        def run(x):
            def layer(x, w):
                q, k, v = jnp.split(x @ w, 3, axis=-1)
                return x + attention(q, k, v), None

            return jax.lax.scan(layer, x, weights)[0]

        return run(x)

    keys = jax.random.split(jax.random.key(0))
    weights = jax.random.normal(keys[0], (3, 8, 24)) / 3
    x = jax.random.normal(keys[1], (1, GRID.tokens, 2, 8))
    seen = calibrate.capture(lambda attention: model(x, attention), step=0.25)
    assert [(s.site, s.step) for s in seen] == [(0, 0.25), (1, 0.25), (2, 0.25)]
    expected = x
    for s, w in zip(seen, weights, strict=True):
        q, k, v = jnp.split(expected @ w, 3, axis=-1)
        for mine, other_ in ((s.q, q), (s.k, k), (s.v, v)):
            np.testing.assert_allclose(mine, other_, rtol=1e-5, atol=1e-5)
        expected = expected + jax.nn.dot_product_attention(q, k, v)
    plan, _ = make(seen)
    assert plan.lead == (3,)


def test_capture_with_the_models_own_attention():
    x = jnp.ones((1, GRID.tokens, 2, 8))

    def own(q, k, v, mask, *, scale):
        return q * scale + mask

    outputs = []
    seen = calibrate.capture(
        lambda attention: outputs.append(attention(x, x, x, 1.0, scale=2.0)), step=0.0, attention=own
    )
    assert len(seen) == 1 and (outputs[0] == 3).all()


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_capture_streams_unless_it_cannot(monkeypatch, jit):
    """Without a bias the model runs on a dense plan, whose attention holds no N x N map."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 60, 2, 8))
    dense, seen, outputs = jax.nn.dot_product_attention, [], []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **b: seen.append(1) or dense(*a, **b))

    def run(*more, key=k, value=v, **named):
        calibrate.capture(
            lambda attention: outputs.append(jit(lambda q: attention(q, key, value, *more, **named))(q)), step=0.0
        )

    run()
    run(scale=0.5)
    assert seen == []
    bias = jnp.ones((1, 2, 60, 60)).at[..., 5].set(9)
    run(bias)
    run(key=k[:, :7], value=v[:, :7])
    assert len(seen) == 2
    expected = [dense(q, k, v), dense(q, k, v, scale=0.5), dense(q, k, v, bias), dense(q, k[:, :7], v[:, :7])]
    for output, other_ in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(output, other_, atol=1e-5)


def test_capture_of_a_flax_layer():
    from flax import nnx

    layer = nnx.MultiHeadAttention(num_heads=2, in_features=16, decode=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, GRID.tokens, 16))
    expected, outputs = layer(x), []

    def run(attention):
        layer.attention_fn = attention
        outputs.append(layer(x))

    (seen,) = calibrate.capture(run, step=0.5, attention=nnx.dot_product_attention)
    np.testing.assert_allclose(outputs[0], expected, atol=1e-6)
    np.testing.assert_allclose(seen.k, layer.key(x), atol=1e-6)
    assert make([seen])[0].lead == (1,)


def test_capture_of_a_model_that_ignores_it():
    with pytest.raises(
        ValueError, match="run must call the attention function it is given.*never called.*jit the model inside run"
    ):
        calibrate.capture(lambda attention: jnp.zeros(3), step=0.0)
