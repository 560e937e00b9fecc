"""Flax adapters: the same function in NNX and Linen, nothing dropped in silence, plans that modules can hold."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import paro_jax.flax
from paro_jax import AttentionPlan, BlockMask, QuantSpec, TokenGrid, attention
from paro_jax.flax import PAROAttention, PAROTable, attention_fn

GRID = TokenGrid((3, 4, 5), text=7)
N, HEADS, FEATURES = GRID.tokens, 2, 16
DENSE = AttentionPlan.dense(GRID, heads=HEADS, order=["WFH", "HFW"], block=(32, 32))


def sparse_plan(seed=0, lead=()) -> AttentionPlan:
    rng = np.random.default_rng(seed)
    keep = rng.random((*lead, HEADS, *GRID.blocks((32, 32)))) < 0.6
    keep[..., 0] = True
    order = rng.choice(GRID.orders, (*lead, HEADS)).tolist()
    return AttentionPlan.build(GRID, order=order, mask=BlockMask(keep, (32, 32)))


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((2, N, FEATURES)), jnp.float32)


def nnx_layer(fn=None, **settings) -> nnx.MultiHeadAttention:
    arguments = {} if fn is None else {"attention_fn": fn}
    return nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=nnx.Rngs(0), **arguments, **settings)


def plain(q, k, v, plan, **settings):
    return attention(q, k, v, plan=plan, **settings)


# --- in the slots that Flax has -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [attention_fn, PAROAttention])
def test_in_nnx_a_dense_plan_is_the_default(x, make):
    expected = nnx_layer()(x)
    np.testing.assert_allclose(nnx_layer(make(DENSE))(x), expected, atol=1e-5)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(nnx_layer(make(DENSE)), x), expected, atol=1e-5)


@pytest.mark.parametrize("make", [attention_fn, PAROAttention])
def test_in_linen_a_dense_plan_is_the_default(x, make):
    default = linen.MultiHeadDotProductAttention(HEADS, qkv_features=FEATURES)
    variables = default.init(jax.random.key(0), x)
    ours = linen.MultiHeadDotProductAttention(HEADS, qkv_features=FEATURES, attention_fn=make(DENSE))
    np.testing.assert_allclose(ours.apply(variables, x), default.apply(variables, x), atol=1e-5)


def test_the_plan_is_used(x):
    plan = sparse_plan()
    assert np.abs(nnx_layer(attention_fn(plan))(x) - nnx_layer()(x)).max() > 1e-3


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_any_number_of_batch_axes_as_in_flax(rng, batch):
    q, k, v = jnp.asarray(rng.standard_normal((3, *batch, N, HEADS, 8)), jnp.float32)
    expected = nnx.dot_product_attention(q, k, v)
    np.testing.assert_allclose(attention_fn(DENSE)(q, k, v), expected, atol=1e-5)


def test_it_names_every_argument_that_flax_passes():
    """Linen drops what a function does not name: a mask would vanish."""
    for fn in (attention_fn(DENSE), PAROAttention(DENSE)):
        ours = inspect.signature(fn).parameters
        for theirs in (linen.dot_product_attention, nnx.dot_product_attention):
            missing = set(inspect.signature(theirs).parameters) - set(ours)
            assert missing <= {"einsum_dot_general", "einsum"}, missing
        kinds = {p.kind for p in ours.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("make", [attention_fn, PAROAttention])
@pytest.mark.parametrize(
    "argument, value",
    [
        ("mask", np.ones((1, 1, N, N), bool)),
        ("bias", np.zeros((1, 1, N, N), np.float32)),
        ("is_causal", True),
        ("dropout_rate", 0.1),
        ("module", nnx.Module()),
        ("precision", "highest"),
        ("qk_attn_weights_einsum", jnp.einsum),
        ("attn_weights_value_einsum", jnp.einsum),
        ("input_positions", np.arange(N)),
    ],
)
def test_what_a_plan_cannot_honour_is_refused(says, make, argument, value):
    q = jnp.zeros((1, N, HEADS, 8))
    with says(argument, "plan"):
        make(DENSE)(q, q, q, **{argument: value})


def test_refused_through_the_layers_too(says, x):
    mask = np.ones((1, 1, N, N), bool)
    layer = linen.MultiHeadDotProductAttention(HEADS, qkv_features=FEATURES, attention_fn=attention_fn(DENSE))
    variables = layer.init(jax.random.key(0), x)
    with says("mask"):
        layer.apply(variables, x, mask=mask)
    with says("module", "sow_weights=False"):
        layer.apply(variables, x, sow_weights=True)
    with says("dropout_rate", "0.5", "deterministic=True"):
        dropping = linen.MultiHeadDotProductAttention(
            HEADS, qkv_features=FEATURES, dropout_rate=0.5, deterministic=False, attention_fn=attention_fn(DENSE)
        )
        dropping.apply(variables, x, rngs={"dropout": jax.random.key(0)})
    with says("mask"):
        nnx_layer(attention_fn(DENSE))(x, mask=mask)
    with says("is_causal"):
        nnx_layer(attention_fn(DENSE))(x, is_causal=True)
    with says("module"):
        nnx_layer(attention_fn(DENSE))(x, sow_weights=True)
    with says("dropout_rate", "0.5"):
        nnx_layer(attention_fn(DENSE), dropout_rate=0.5)(x, deterministic=False)


def test_inactive_dropout_and_harmless_arguments_pass(x):
    layer = nnx_layer(attention_fn(DENSE), dropout_rate=0.5)
    np.testing.assert_allclose(layer(x, deterministic=True), nnx_layer()(x), atol=1e-5)
    q = jnp.ones((1, N, HEADS, 8))
    attention_fn(DENSE)(q, q, q, broadcast_dropout=False, dropout_rng=jax.random.key(0), force_fp32_for_softmax=True)


def test_dtype_and_promote_dtype_are_honoured(rng):
    q, k, v = jnp.asarray(rng.standard_normal((3, 1, N, HEADS, 8)), jnp.float32)
    fn = attention_fn(DENSE)
    assert fn(q, k, v, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert fn(q, k.astype(jnp.bfloat16), v).dtype == jnp.float32
    halves = fn(q, k, v, promote_dtype=lambda arrays, dtype: [a.astype(jnp.float16) for a in arrays])
    assert halves.dtype == jnp.float16


def test_quant_and_implementation_are_passed_on(rng):
    q, k, v = jnp.asarray(rng.standard_normal((3, 1, N, HEADS, 8)), jnp.float32)
    int8 = QuantSpec(qk="int8", pv="int8")
    for make in (attention_fn, PAROAttention):
        fn = make(DENSE, quant=int8, implementation="reference")
        expected = plain(q, k, v, DENSE, quant=int8, implementation="reference")
        np.testing.assert_array_equal(fn(q, k, v), expected)


@pytest.mark.parametrize("make", [attention_fn, PAROAttention])
def test_what_is_not_a_plan_is_refused(says, make):
    with says("plan", "AttentionPlan", "str", "load_plan"):
        make("plan.safetensors")


# --- a module that holds its plan -----------------------------------------------------------------------------------


def test_the_plan_is_in_the_state_and_not_among_the_parameters(x):
    layer = nnx_layer(PAROAttention(sparse_plan()))
    leaves = jax.tree.leaves(nnx.state(layer, PAROTable))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("int8"), jnp.dtype("uint8")}
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))


def test_another_plan_of_the_same_shapes_does_not_recompile(x):
    traces = []

    @nnx.jit
    def run(layer, x):
        traces.append(1)
        return layer(x)

    layer = nnx_layer(PAROAttention(sparse_plan(0)))
    first = run(layer, x)
    layer.attention_fn.table.set_value(sparse_plan(1))
    second = run(layer, x)
    assert traces == [1] and np.abs(first - second).max() > 1e-3
    np.testing.assert_allclose(second, nnx_layer(attention_fn(sparse_plan(1)))(x), atol=1e-5)


def test_it_runs_under_plain_jit_and_split_and_merge(x):
    layer = nnx_layer(PAROAttention(sparse_plan()))
    expected = layer(x)
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(layer, x), expected, atol=1e-6)
    graph, state = nnx.split(layer)
    np.testing.assert_allclose(jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, x), expected, atol=1e-6)


def test_a_training_step_leaves_the_plan_alone(x):
    layer = nnx_layer(PAROAttention(sparse_plan()))
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
    before = nnx_layer(PAROAttention(sparse_plan()))(x)

    @nnx.jit
    def step(layer, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean(), argnums=nnx.DiffState(0, nnx.Param))(layer)
        optimizer.update(layer, grads)
        return loss

    losses = [float(step(layer, optimizer, x)) for _ in range(3)]
    assert losses == sorted(losses, reverse=True) and np.abs(layer(x) - before).max() > 1e-4
    for ours, theirs in zip(
        jax.tree.leaves(layer.attention_fn.table.get_value()), jax.tree.leaves(sparse_plan()), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


class Layer(nnx.Module):
    """One layer of a scanned model: a projection and attention with the layer's own plan."""

    def __init__(self, plan: AttentionPlan, rngs: nnx.Rngs):
        self.qkv = nnx.Linear(FEATURES, 3 * FEATURES, rngs=rngs)
        self.attention = PAROAttention(plan)

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        heads = (*x.shape[:2], HEADS, FEATURES // HEADS)
        return x + self.attention(q.reshape(heads), k.reshape(heads), v.reshape(heads)).reshape(x.shape)


def stacked_layers(plan: AttentionPlan) -> Layer:
    layers = [Layer(one, nnx.Rngs(i)) for i, one in enumerate(plan)]
    graph = nnx.split(layers[0])[0]
    return nnx.merge(graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.split(m)[1] for m in layers)))


@pytest.fixture(params=[False, True], ids=["tree mode", "graph mode"])
def mode(request):
    """Both worlds of NNX; tree mode is to become the default."""
    with nnx.set_graph_mode(request.param):
        yield request.param


def test_nnx_scan_hands_each_layer_its_own_plan(x, mode):
    plan = sparse_plan(lead=(3,))
    traces = []

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        traces.append(layer.attention.table.get_value().lead)
        return layer(x)

    expected = x
    for i, one in enumerate(plan):
        expected = Layer(one, nnx.Rngs(i))(expected)
    np.testing.assert_allclose(run(stacked_layers(plan), x), expected, atol=1e-5)
    assert set(traces) == {()} and len(traces) <= 2


def test_modules_with_plans_jit_in_both_modes(x, mode):
    layer = Layer(sparse_plan(), nnx.Rngs(0))
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, x), layer(x), atol=1e-6)


def test_the_module_is_documented():
    for name in ("attention_fn", "PAROAttention", "PAROTable"):
        assert inspect.getdoc(getattr(paro_jax.flax, name))
