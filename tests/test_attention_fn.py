"""Models with attention of one's own: masks made from a layer's q and k, and what is remembered from step to step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import TINY

import paro_jax
from paro_jax import AttentionPlan, BlockMask, policies
from paro_jax.models.layers import activate
from paro_jax.models.samplers import ddim, guided

BLOCK = (16, 8)


@pytest.fixture(scope="module", params=TINY)
def case(request):
    tiny = TINY[request.param]
    return tiny, tiny.net(), tiny.inputs()


def sparse_plan(tiny, density=0.5):
    """Another order and another mask for every head of every layer."""
    rng, grid = np.random.default_rng(0), tiny.config.grid
    keep = rng.random((tiny.sites, 2, *grid.blocks(BLOCK))) < density
    keep[..., 0] |= ~keep.any(-1)
    order = rng.choice(grid.orders, (tiny.sites, 2)).tolist()
    return AttentionPlan.build(grid, order=order, mask=BlockMask(jnp.asarray(keep | grid.always_keep(BLOCK)), BLOCK))


def with_scaled_values(tiny, net, factors):
    """The model whose layers multiply the values of self-attention by a factor each."""
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    flat = []
    for path, x in nnx.to_flat_state(params):
        if "to_v" in path and "cross" not in path:
            mine = factors[tiny.config.num_double :] if "single" in path else factors[: x.shape[0]]
            x = x.replace(x.get_value() * mine.reshape(-1, *[1] * (x.ndim - 1)))
        flat.append((path, x))
    return nnx.merge(graph, nnx.from_flat_state(flat), rest)


def test_every_layer_has_its_own_part_of_plan_and_carry(case):
    """q, k and v as they come, and attention as `paro_jax` would have computed it inside the projections."""
    tiny, net, inputs = case
    plan, factors = sparse_plan(tiny), jnp.linspace(0.5, 1.5, tiny.sites)

    def scaled(q, k, v, *, plan, carry):
        return paro_jax.attention(q, k, carry["factor"] * v, plan=plan), carry["factor"] + 1

    given = dict(plan=plan, attention_fn=scaled, carry={"factor": factors}, remat="attention")
    found, after = jax.jit(lambda net: net(*inputs, **given))(net)
    np.testing.assert_array_equal(after, factors + 1)
    expected = jax.jit(lambda net: net(*inputs, plan=plan))(with_scaled_values(tiny, net, factors))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_paro_united_with_sparge_is_what_each_layer_does_by_hand():
    tiny = TINY["cogvideox"]
    net, inputs, plan = tiny.net(), tiny.inputs(), sparse_plan(tiny, density=0.1)

    def united(q, k, v, *, plan):
        mask = plan.mask() | policies.sparge(q, k, plan=plan, topk=0.2)
        return policies.masked_attention(q, k, v, mask, plan=plan)

    found = jax.jit(lambda net, plan: net(*inputs, plan=plan, attention_fn=united))(net, plan)

    x, (temb, is_text, rope) = net.enter(*inputs)
    for layer in range(tiny.sites):
        block, mine = jax.tree.map(lambda a, i=layer: a[i], net.blocks), plan[layer]
        h, gate = block.norm1(x, temb, is_text)
        q, k, v = block.qkv(h, rope)
        dynamic = policies.sparge(q, k, plan=mine, topk=0.2)
        both = np.asarray(mine.mask().keep)[None] | np.asarray(dynamic.keep)
        assert both.sum() > max(dynamic.keep.sum(), 2 * mine.mask().keep.sum())  # each adds to the other
        rows = [slice(row, row + 1) for row in range(len(x))]
        o = [
            paro_jax.attention(q[row], k[row], v[row], plan=mine.with_mask(BlockMask(both[i], BLOCK)))
            for i, row in enumerate(rows)
        ]
        x = x + gate * block.to_out(jnp.concatenate(o).reshape(x.shape))
        h, gate = block.norm2(x, temb, is_text)
        x = x + gate * block.mlp_out(activate(block.mlp_in(h)))
    tokens = net.norm_final(x)[:, tiny.config.grid.text :]
    shift, scale = jnp.split(net.modulation_out(jax.nn.silu(temb)), 2, axis=-1)
    tokens = net.proj_out(net.norm_out(tokens) * (1 + scale[:, None]) + shift[:, None])
    shape = (2, *tiny.config.grid.shape, 4, *tiny.config.patch)
    expected = tokens.reshape(shape).transpose(0, 1, 5, 4, 2, 6, 3, 7).reshape(inputs[0].shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - net(*inputs, plan=plan)).max() > 1e-3


def test_ditfastattn_generates_with_a_whole_model():
    """Memories of all layers in the sampler's carry, the methods of a step beside them, a table of methods traced."""
    tiny, steps = TINY["cogvideox"], 3
    net, (latents, _, text) = tiny.net(), tiny.inputs()
    grid, shape = tiny.config.grid, (tiny.sites, 2, tiny.config.grid.tokens, 2, tiny.config.head_dim)
    window = policies.window(grid, width=8, block=BLOCK, heads=2)
    window = BlockMask(jnp.broadcast_to(window.keep, (tiny.sites, *window.keep.shape)), BLOCK)
    plan = AttentionPlan.build(grid, order=grid.orders[0], mask=window)

    def attention_fn(q, k, v, *, plan, carry):
        memory, method = carry
        return policies.shared_attention(q, k, v, memory, method, window=plan)

    @jax.jit
    def generate(net, noise, methods):
        def predict(x, timestep, step, memories):
            return net(x, timestep, text, plan=plan, attention_fn=attention_fn, carry=(memories, methods[step]))

        return ddim(guided(predict, 2.0), noise, steps=steps, carry=policies.Memory.empty(shape))

    full = np.full((steps, tiny.sites), policies.Share.FULL, np.int8)
    shared = full.copy()
    shared[1] = policies.Share.WINDOW
    dense = ddim(guided(lambda x, t, step: net(x, t, text), 2.0), latents[:1], steps=steps)
    exact, memories = generate(net, latents[:1], full)
    np.testing.assert_allclose(exact, dense, atol=1e-4)
    assert memories.output.shape == shape and np.abs(memories.residual).max() > 0
    near, _ = generate(net, latents[:1], shared)
    assert 1e-5 < np.abs(near - dense).max() < 0.1 * np.abs(dense).max()


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(carry=np.zeros(3)), ("carry", "attention_fn", "None")),
        (dict(carry=(np.zeros(3), np.zeros((2, 3))), attention_fn=paro_jax.attention), ("carry", "3 layers", "(2, 3)")),
        (dict(carry=0.5, attention_fn=paro_jax.attention), ("carry", "3 layers", "()")),
    ],
    ids=["nobody takes it", "layers", "a number"],
)
def test_a_carry_that_does_not_fit_is_refused(says, given, words):
    tiny = TINY["cogvideox"]
    with says(*words):
        jax.eval_shape(functools.partial(tiny.net(), **given), *tiny.inputs())
