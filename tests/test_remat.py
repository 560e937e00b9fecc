"""Rematerialisation by name, and layers scanned or unrolled: the same answer and gradient, and exactly what was asked.

What the backward pass keeps is read off the residuals that `jax.vjp` returns: their shapes, stacked over layers.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import TINY

from paro_jax import AttentionPlan
from paro_jax.models.layers import NAMES

BATCH = 2


@pytest.fixture(scope="module", params=TINY)
def problem(request):
    tiny = TINY[request.param]
    return tiny, tiny.net(), tiny.inputs(BATCH)


def dense_plan(tiny, sites=None):
    order = "WHF" if len(tiny.config.grid.shape) == 3 else "WH"
    return AttentionPlan.dense(tiny.config.grid, heads=2, sites=sites or tiny.sites, order=order, block=(16, 16))


def loss(tiny, inputs, plan=None, **how):
    return lambda net: jnp.square(net(*inputs, plan=plan, **how)).mean()


def residuals(tiny, net, inputs, remat, plan=None):
    """Shapes (and how many of each) of what the backward pass is handed, of all layers together."""
    kept = jax.eval_shape(lambda net: jax.vjp(loss(tiny, inputs, plan, remat=remat), net)[1], net)
    return collections.Counter(leaf.shape for leaf in jax.tree.leaves(kept))


def named(tiny, name):
    """Shapes of what bears a name, stacked over layers: of each kind of layer that the model has."""
    config, tokens = tiny.config, tiny.config.grid.tokens
    heads = lambda n: (BATCH, n, config.num_heads, config.head_dim)  # noqa: E731
    if tiny is TINY["wan"]:  # the second attention looks at text
        each = {
            "qkv": [(3, heads(tokens))] * 4 + [(3, heads(6))] * 2,
            "attention": [(3, heads(tokens))] * 2,
            "mlp": [(3, (BATCH, tokens, config.mlp_dim))],
        }
        return collections.Counter((layers, *shape) for layers, shape in each[name])
    wide = config.mlp_ratio * config.dim
    if tiny is TINY["cogvideox"]:
        shapes = {"qkv": [heads(tokens)] * 3, "attention": [heads(tokens)], "mlp": [(BATCH, tokens, wide)]}[name]
        return collections.Counter((3, *shape) for shape in shapes)
    text = config.text_length  # double layers have a feed-forward for text and one for the image
    parts = [tokens] if name != "mlp" else [text, tokens - text]
    shapes = {"qkv": [heads(tokens)] * 3, "attention": [heads(tokens)], "mlp": [(BATCH, n, wide) for n in parts]}[name]
    single = [(BATCH, tokens, wide)] if name == "mlp" else shapes
    return collections.Counter([(2, *s) for s in shapes] + [(3, *s) for s in single])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_named_is_kept_and_nothing_else(problem, name):
    tiny, net, inputs = problem
    without, kept = residuals(tiny, net, inputs, True), residuals(tiny, net, inputs, name)
    assert kept - without == named(tiny, name)
    # What computed it is needed no more: the biases, as a product's gradient does not ask for them.
    biases = {x.get_value().shape for path, x in nnx.to_flat_state(nnx.state(net, nnx.Param)) if path[-1] == "bias"}
    assert set(without - kept) <= biases
    # Without rematerialisation much more is kept.
    everything = residuals(tiny, net, inputs, False)
    assert sum(map(np.prod, everything.elements())) > 1.5 * sum(map(np.prod, kept.elements()))


def test_names_add_up_and_a_policy_is_taken(problem):
    tiny, net, inputs = problem
    both = residuals(tiny, net, inputs, ("attention", "mlp"))
    assert both - residuals(tiny, net, inputs, True) == named(tiny, "attention") + named(tiny, "mlp")
    policy = jax.checkpoint_policies.save_only_these_names("attention", "mlp")
    assert residuals(tiny, net, inputs, policy) == both


def test_gradients_are_the_same(problem):
    """Rematerialised by name or not at all; under a plan, where q, k and v are named as they are stored."""
    tiny, net, inputs = problem
    plan = dense_plan(tiny)
    expected = jax.jit(jax.grad(loss(tiny, inputs, plan)))(net)
    got = jax.jit(jax.grad(loss(tiny, inputs, plan, remat=("qkv", "mlp"))))(net)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("remat", ["attn", ("mlp", "softmax"), (), 1])
def test_a_name_that_nothing_bears_is_refused(problem, remat, says):
    tiny, net, inputs = problem
    with says("remat", "qkv, attention, mlp", "found"):
        jax.eval_shape(lambda net: net(*inputs, remat=remat), net)


def test_layers_scanned_or_unrolled(problem):
    """One loop for each kind of layer, or no loop at all and every layer compiled by itself; the answer is the same."""
    tiny, _, inputs = problem
    net, kinds = tiny.net(tiny.layers(2)), 2 if tiny is TINY["flux"] else 1
    plan = dense_plan(tiny, sites=2 * kinds)

    def lowered(unroll):
        return jax.jit(lambda net, plan: net(*inputs, plan=plan, unroll=unroll)).lower(net, plan)

    scanned, unrolled = lowered(False), lowered(True)
    loops = [how.as_text().count("stablehlo.while") for how in (scanned, unrolled)]
    assert loops[0] - loops[1] == kinds, loops  # the rest are attention's own
    a, b = (how.compile()(net, plan) for how in (scanned, unrolled))
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
