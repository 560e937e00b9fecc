"""Our CogVideoX: rotation tables, modulation, layouts, and a plan that changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import drawn

from paro_jax import AttentionPlan, QuantSpec
from paro_jax.models.cogvideox import CogVideoX, CogVideoXConfig, rope_3d, rotate, timestep_embedding

# Every axis of another size, so that a swapped axis changes the answer.
TINY = CogVideoXConfig(
    num_layers=2,
    num_heads=2,
    head_dim=32,
    in_channels=3,
    out_channels=3,
    time_embed_dim=16,
    text_embed_dim=24,
    text_length=5,
    frames=3,
    height=8,
    width=12,
)


@pytest.fixture(scope="module")
def problem():
    """A model with every weight random (norms and gates too), latents, timesteps and text."""
    net, r = drawn(lambda: CogVideoX(TINY, rngs=nnx.Rngs(0))), np.random.default_rng(1)
    latents = r.standard_normal((2, 3, 3, 8, 12)).astype(np.float32)
    text = r.standard_normal((2, 5, 24)).astype(np.float32)
    return net, jnp.asarray(latents), jnp.asarray([700.0, 20.0]), jnp.asarray(text)


@jax.jit
def run(net, latents, t, text, plan=None):
    return net(latents, t, text, plan=plan)


def test_output_depends_on_every_input(problem):
    net, latents, t, text = problem
    base = run(net, latents, t, text)
    assert base.shape == latents.shape
    for changed in ((latents + 0.1, t, text), (latents, t + 50, text), (latents, t, text + 0.1)):
        assert float(jnp.abs(run(net, *changed) - base).max()) > 1e-3
    # Batch rows do not see each other.
    np.testing.assert_allclose(run(net, latents[:1], t[:1], text[:1])[0], base[0], atol=1e-5)


@pytest.mark.parametrize("order", ["FHW", "WFH", ["HWF", "FWH"]])
def test_a_dense_plan_in_any_order_changes_nothing(problem, order):
    net, latents, t, text = problem
    plan = AttentionPlan.dense(TINY.grid, heads=2, sites=2, order=order)
    np.testing.assert_allclose(run(net, latents, t, text, plan), run(net, latents, t, text), atol=1e-5)


def test_int8_is_close_and_not_equal(problem):
    net, latents, t, text = problem
    plan = AttentionPlan.dense(TINY.grid, heads=2, sites=2, order="HWF", quant=QuantSpec(qk="int8", pv="int8"))
    dense, got = run(net, latents, t, text), run(net, latents, t, text, plan)
    error = float(jnp.abs(got - dense).sum() / jnp.abs(dense).sum())
    assert 0 < error < 0.02


def test_captured_queries_are_normed(problem):
    """Layer norm over D before the rotation, which keeps lengths: with unit scale and no bias, q has norm sqrt(D)."""
    net, latents, t, text = problem
    plain = nnx.clone(net)
    plain.blocks.norm_q.scale[...] = jnp.ones_like(plain.blocks.norm_q.scale[...])
    plain.blocks.norm_q.bias[...] = jnp.zeros_like(plain.blocks.norm_q.bias[...])
    for q, _, _ in plain.capture(latents, t, text):
        np.testing.assert_allclose(jnp.linalg.norm(q, axis=-1), np.sqrt(32), rtol=1e-3)


def test_one_trace_serves_all_layers(problem):
    net, latents, t, text = problem
    traces = 0

    @jax.jit
    def run(net, plan):
        nonlocal traces
        traces += 1
        return net(latents, t, text, plan=plan)

    a = run(net, AttentionPlan.dense(TINY.grid, heads=2, sites=2, order="FHW"))
    b = run(net, AttentionPlan.dense(TINY.grid, heads=2, sites=2, order="WHF"))
    assert traces == 1
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_remat_gives_the_same_gradient(problem):
    net, latents, t, text = problem

    def loss(net, remat):
        return jnp.sum(net(latents, t, text, remat=remat) ** 2)

    one, two = (jax.jit(jax.grad(loss), static_argnums=1)(net, remat) for remat in (False, True))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_rotation_is_relative_and_spares_text():
    rope = rope_3d((3, 4, 6), 32, text=5)
    assert rope.cos.shape == (77, 16)
    np.testing.assert_array_equal(rope.cos[:5], 1)
    np.testing.assert_array_equal(rope.sin[:5], 0)
    q, k = (np.random.default_rng(i).standard_normal(32).astype(np.float32) for i in range(2))
    at = lambda x: rotate(jnp.broadcast_to(x, (1, 77, 1, 32)), rope)[0, :, 0]  # noqa: E731
    scores = np.asarray(at(q) @ at(k).T)[5:, 5:].reshape(3, 4, 6, 3, 4, 6)
    # Equal distance along each axis, equal score.
    np.testing.assert_allclose(scores[0, 1, 2, 1, 2, 4], scores[1, 2, 3, 2, 3, 5], rtol=1e-4)
    assert abs(scores[0, 0, 0, 0, 0, 1] - scores[0, 0, 0, 0, 1, 0]) > 1e-3


def test_timestep_embedding_is_cosines_then_sines():
    e = np.asarray(timestep_embedding(jnp.asarray([3.0]), 8))[0]
    f = 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(e, np.concatenate([np.cos(3 * f), np.sin(3 * f)]), rtol=1e-5)


def test_mis_shaped_latents_are_refused(problem):
    net, latents, t, text = problem
    with pytest.raises(ValueError, match=r"latents: expected \[B, F, 3, H, W\].*found \(2, 3, 2, 8, 12\)"):
        net(latents[:, :, :2], t, text)


def test_presets_are_the_published_sizes():
    config = CogVideoXConfig()
    assert config.dim == 3072 and config.grid.shape == (13, 30, 45) and config.grid.tokens == 17776
    small = dataclasses.replace(config, num_layers=1)
    shapes = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: CogVideoX(small, rngs=nnx.Rngs(0))), nnx.Param))
    layer = 2 * (512 * 6 * 3072 + 6 * 3072 + 2 * 3072) + 4 * (3072**2 + 3072) + 4 * 64 + 8 * 3072**2 + 5 * 3072
    rest = 64 * 3072 + 3072 + 4097 * 3072 + 3073 * 512 + 513 * 512 + 4 * 3072 + 513 * 6144 + 3073 * 64
    assert sum(np.prod(x.shape) for x in shapes) == layer + rest
