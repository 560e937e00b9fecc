"""The adapter, on a stand-in for maxdiffusion's contract: kernel table, call layouts, scanned layers."""

import sys
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standin_maxdiffusion as host
from flax import nnx

from paro_jax import AttentionPlan, BlockMask, TokenGrid, maxdiffusion

GRID = TokenGrid((2, 3, 4))
IMAGE = TokenGrid((4, 5), text=4)
BLOCK = (8, 8)
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, host.DIM)), jnp.float32)
TEXT = jnp.asarray(np.random.default_rng(1).standard_normal((2, 7, host.DIM)), jnp.float32)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    for name in ("maxdiffusion", "maxdiffusion.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "maxdiffusion.models.attention_flax", host)
    monkeypatch.setattr(host, "KERNEL_REGISTRY", {"dot_product": host.dot_product})
    maxdiffusion.register()


def dense(grid, layers, order):
    return AttentionPlan.dense(grid, heads=host.HEADS, sites=layers, order=order, block=BLOCK)


def one_layer_blind(grid, layers, which):
    """Dense but for one layer, which keeps the first key block alone."""
    keep = np.ones((layers, host.HEADS, 3, 3), bool)
    keep[which, :, :, 1:] = False
    return AttentionPlan.build(grid, order=grid.orders[0], mask=BlockMask(jnp.asarray(keep), BLOCK))


def wan(kernel, scan=True):
    return host.WanModel(3, kernel, scan, nnx.Rngs(0))


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_wan_with_a_dense_plan_is_wan(scan):
    expected = wan("dot_product", scan)(X, TEXT)
    model = wan("paro", scan)
    np.testing.assert_allclose(model(X, TEXT), expected, atol=1e-5)
    maxdiffusion.put_in_wan(model, dense(GRID, 3, ["HWF", "WFH"]))
    np.testing.assert_allclose(model(X, TEXT), expected, atol=1e-5)


def test_every_layer_of_wan_gets_its_own_plan():
    """A plan that blinds one layer acts in that layer, as in the same model unrolled; no plan compiles again."""
    model, traces = wan("paro"), 0

    @nnx.jit
    def run(model):
        nonlocal traces
        traces += 1
        return model(X, TEXT)

    outputs = [run(model)]
    for which in range(3):
        maxdiffusion.put_in_wan(model, one_layer_blind(GRID, 3, which))
        outputs.append(run(model))
    assert traces == 2, "without a plan, and with one"
    for i, a in enumerate(outputs):
        assert all(float(jnp.abs(a - b).max()) > 1e-3 for b in outputs[:i])
    unrolled, stacked = wan("paro", scan=False), wan("paro")
    graph, states = nnx.split(stacked.blocks)
    for i in range(3):
        unrolled.blocks[i] = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], states))
    maxdiffusion.put_in_wan(unrolled, one_layer_blind(GRID, 3, 1))
    np.testing.assert_allclose(run(unrolled), outputs[2], atol=1e-5)


def flux(kernel) -> tuple[Any, Any]:
    model: Any = host.FluxTransformer2DModel(2, 3, kernel)
    return model, model.init(jax.random.key(0), X)["params"]


def test_flux_with_a_plan():
    """A dense plan changes nothing; one that blinds a layer acts in that layer; one program serves them all."""
    model, params = flux("dot_product")
    expected, traces = model.apply({"params": params}, X), 0
    np.testing.assert_allclose(flux("paro")[0].apply({"params": params}, X), expected, atol=1e-5)
    first, planned = maxdiffusion.put_in_flux(params, dense(IMAGE, 5, ["WH", "HW"]))
    assert "paro_0" not in params["scanned_double_blocks"]["FluxTransformerBlock_0"]["attn"]

    @jax.jit
    def run(params):
        nonlocal traces
        traces += 1
        with nn.intercept_methods(planned):
            return flux_model.apply({"params": params}, X)

    flux_model: Any = host.FluxTransformer2DModel(2, 3, "paro")
    outputs = [run(first)]
    np.testing.assert_allclose(outputs[0], expected, atol=1e-5)
    for which in range(5):
        outputs.append(run(maxdiffusion.put_in_flux(params, one_layer_blind(IMAGE, 5, which))[0]))
    assert traces == 1
    for i, a in enumerate(outputs):
        assert all(float(jnp.abs(a - b).max()) > 1e-3 for b in outputs[:i])


def test_the_kernel_honours_a_mask_and_refuses_causality():
    kernel = host.KERNEL_REGISTRY["paro"]
    context = dict(heads=2, scale=0.3, attention_mask=jnp.arange(7)[None, :] < jnp.asarray([[5], [3]]))
    kept, poison = kernel(X, TEXT, TEXT, context), TEXT.at[0, 5:].set(1e4).at[1, 3:].set(1e4)
    np.testing.assert_allclose(kernel(X, poison, poison, context), kept, atol=1e-5)
    with pytest.raises(ValueError, match="is_causal: expected False"):
        kernel(X, TEXT, TEXT, context | dict(is_causal=True))


def test_mistakes_are_named(says):
    for name in ("paro_ring", "ulysses", ""):
        with says("name", "ring", repr(name)):
            maxdiffusion.register(name)
    model = wan("paro")
    with says("plan", "expected leading axes (3,)", "(2,)"):
        maxdiffusion.put_in_wan(model, dense(GRID, 2, "FHW"))
    with says("plan", "expected 2 heads", "found 1"):
        maxdiffusion.put_in_wan(model, AttentionPlan.dense(GRID, heads=1, sites=3, block=BLOCK))
    with says("model", "blocks.attn1.attention_op", "Linear"):
        maxdiffusion.put_in_wan(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), dense(GRID, 3, "FHW"))
    with says("params", "scanned_double_blocks", "found a"):
        maxdiffusion.put_in_flux({"a": 1}, dense(IMAGE, 5, "HW"))
    maxdiffusion.put_in_wan(model, dense(IMAGE, 3, "HW"))
    with says("attention_mask", "expected None"):
        model.blocks.attn1.attention_op.apply_attention(X, X, X, jnp.ones((2, 24), bool))


def test_without_maxdiffusion_or_its_table(monkeypatch):
    monkeypatch.delattr(host, "register_kernel")
    with pytest.raises(ImportError, match="has no register_kernel; use a maxdiffusion of 2026"):
        maxdiffusion.register()
    for name in [name for name in sys.modules if name.split(".")[0] == "maxdiffusion"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="is not there; put a checkout of AI-Hypercomputer/maxdiffusion"):
        maxdiffusion.register()
