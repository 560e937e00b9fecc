"""DiTFastAttn: what a step takes over from the one before, and samplers that carry what a model remembers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paro_jax
from paro_jax import AttentionPlan, TokenGrid, policies
from paro_jax.models.samplers import FlowSchedule, ddim, dpm, flow_euler, fresh_noise, guided, unipc
from paro_jax.policies import Memory, Share

GRID = TokenGrid((3, 4, 5), text=4)
PLAN = AttentionPlan.dense(GRID, heads=2, block=(16, 16))
WINDOW = PLAN.with_mask(policies.window(GRID, width=8, block=(16, 16), heads=2))


def heads(seed):
    return [jnp.asarray(x) for x in np.random.default_rng(seed).standard_normal((3, 2, 64, 2, 8)).astype(np.float32)]


def full(q, k, v):
    return paro_jax.attention(q, k, v, plan=PLAN)


def windowed(q, k, v):
    return paro_jax.attention(q, k, v, plan=WINDOW)


@pytest.fixture(scope="module")
def step():
    """shared_attention with the method traced, compiled once."""
    return jax.jit(lambda q, k, v, memory, method: policies.shared_attention(q, k, v, memory, method, window=WINDOW))


def test_each_method_is_its_definition(step):
    first, second = heads(0), heads(1)
    empty = Memory.empty((2, 64, 2, 8))
    out, memory = step(*first, empty, int(Share.FULL))
    np.testing.assert_allclose(out, full(*first), atol=1e-6)
    residual = full(*first) - windowed(*first)
    np.testing.assert_allclose(memory.residual, residual, atol=1e-6)
    half = [x[1:] for x in second]
    expected = {
        Share.OUTPUT: full(*first),
        Share.WINDOW: windowed(*second) + residual,
        Share.WINDOW_HALF: jnp.concatenate([windowed(*half) + residual[1:]] * 2),
        Share.FULL_HALF: jnp.concatenate([full(*half)] * 2),
        Share.FULL: full(*second),
    }
    for method in Share:
        out, after = step(*second, memory, int(method))
        np.testing.assert_allclose(out, expected[method], atol=2e-6, err_msg=method.name)
        np.testing.assert_array_equal(after.output, out)
        fresh = method >= Share.FULL_HALF
        assert bool((after.residual == memory.residual).all()) != fresh
        known, _ = policies.shared_attention(*second, memory, method, window=WINDOW)
        np.testing.assert_allclose(known, out, atol=1e-6, err_msg=method.name)


def test_a_window_and_its_residual_are_exact_while_nothing_changes(step):
    qkv = heads(2)
    out, memory = step(*qkv, Memory.empty((2, 64, 2, 8)), int(Share.FULL))
    again, _ = step(*qkv, memory, int(Share.WINDOW))
    np.testing.assert_allclose(again, out, atol=2e-6)
    assert np.abs(windowed(*qkv) - out).max() > 0.05  # the window alone is not


def test_a_sampler_carries_the_memory_of_every_layer_in_one_trace():
    """The recipe of the module: layers scanned inside, steps outside, methods from a table."""
    layers, steps, traces = 3, 4, []
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.standard_normal((layers, 3, 16, 16)) / 4, jnp.float32)
    table = np.full((steps, layers), Share.FULL, np.int8)
    table[1:3] = [[Share.WINDOW, Share.OUTPUT, Share.FULL_HALF], [Share.WINDOW_HALF, Share.WINDOW, Share.OUTPUT]]

    def layer(x, per_layer):
        weights, memory, method = per_layer
        q, k, v = ((x @ w).reshape(*x.shape[:2], 2, 8) for w in weights)
        out, memory = policies.shared_attention(q, k, v, memory, method, window=WINDOW)
        return x + out.reshape(x.shape), memory

    @jax.jit
    def generate(noise, methods):
        traces.append(1)

        def predict(x, timestep, step, memories):
            x = x + jnp.asarray([0.0, 0.1])[:, None, None]  # the halves differ, as with and without a prompt
            return jax.lax.scan(layer, x, (weights, memories, methods[step]))

        memories = Memory.empty((layers, 2, 64, 2, 8))
        return ddim(guided(predict, 2.0), noise, steps=steps, carry=memories)

    noise = jnp.asarray(rng.standard_normal((1, 64, 16)), jnp.float32)
    latents, memories = generate(noise, table)

    by_hand = [Memory.empty((2, 64, 2, 8))] * layers

    def predict(x, timestep, step):
        x = x + jnp.asarray([0.0, 0.1])[:, None, None]
        for i in range(layers):
            x, by_hand[i] = layer(x, (weights[i], by_hand[i], int(table[int(step), i])))
        return x

    expected = ddim(guided(predict, 2.0), noise, steps=steps, progress=True)
    np.testing.assert_allclose(latents, expected, atol=1e-4)
    np.testing.assert_allclose(memories.output[2], by_hand[2].output, atol=1e-4)
    everything, _ = generate(noise, np.full_like(table, Share.FULL))
    assert len(traces) == 1 and np.abs(everything - latents).max() > 1e-3


SAMPLERS = {
    "ddim": ddim,
    "dpm": functools.partial(dpm, fresh=lambda step: fresh_noise(jax.random.key(0), jnp.zeros((1, 6)))(step)),
    "flow_euler": functools.partial(flow_euler, schedule=FlowSchedule(2.0)),
    "unipc": functools.partial(unipc, schedule=FlowSchedule(2.0)),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("progress", [False, True])
def test_every_sampler_carries(name, progress):
    """A model that counts its calls says what one says that is told the step."""
    sample, noise = SAMPLERS[name], jnp.asarray(np.random.default_rng(0).standard_normal((1, 6)), jnp.float32)

    def told(x, timestep, step):
        return 0.3 * x + 0.1 * step

    def counts(x, timestep, step, calls):
        return 0.3 * x + 0.1 * calls["n"], {"n": calls["n"] + 1}

    expected = sample(told, noise, steps=4)
    latents, calls = sample(counts, noise, steps=4, carry={"n": jnp.float32(0)}, progress=progress)
    np.testing.assert_allclose(latents, expected, atol=1e-6)
    assert calls["n"] == 4


def test_the_greedy_search_takes_the_cheapest_that_is_good_enough():
    """Losses by hand: sharing output costs 4 a layer, the window 1, and double at layer 0; their sum must stay low."""
    asked = []

    def loss(table, step):
        asked.append((step, table[step].tolist()))
        price = {Share.OUTPUT: 4, Share.WINDOW: 1, Share.FULL: 0}
        return sum(price[Share(m)] * (2 - (layer > 0)) for layer, m in enumerate(table[step]))

    methods = (Share.WINDOW, Share.OUTPUT)
    table = policies.greedy_sharing(loss, steps=2, layers=3, threshold=6, methods=methods)
    # Allowed are 2, 4 and 6, strictly: nothing at layer 0, where a window costs 2; then a window; then output.
    assert table.tolist() == [[Share.FULL] * 3, [Share.FULL, Share.WINDOW, Share.OUTPUT]]
    assert len(asked) <= 2 * 3 and asked[0] == (1, [Share.OUTPUT, Share.FULL, Share.FULL])
    assert table.dtype == np.int8


def test_the_loss_is_relative_to_the_larger_magnitude():
    loss = policies.sharing_loss(np.array([-1.0, 2.0, 0.0]), np.array([-2.0, 2.0, 0.0]))
    assert loss == pytest.approx((0.5 + 0 + 0) / 3, rel=1e-5)  # not -1 / -1, whatever the sign


def test_bad_input_is_refused(says):
    q, k, v = heads(0)
    memory = Memory.empty(q.shape)
    with says("memory.output", "[2, 64, 2, 8]", "[1, 64, 2, 8]"):
        policies.shared_attention(q, k, v, Memory.empty((1, 64, 2, 8)), Share.FULL, window=WINDOW)
    with says("memory.output", "float32", "bfloat16"):
        policies.shared_attention(q, k, v, Memory.empty(q.shape, jnp.bfloat16), Share.FULL, window=WINDOW)
    with says("method", "4 (FULL)", "5"):
        policies.shared_attention(q, k, v, memory, 5, window=WINDOW)
    one = [x[:1] for x in (q, k, v)]
    for method in (Share.FULL_HALF, jnp.int32(4)):
        with says("query", "even batch", "1"):
            policies.shared_attention(*one, Memory.empty((1, 64, 2, 8)), method, window=WINDOW)
    with says("threshold", "-1"):
        policies.greedy_sharing(lambda table, step: 0.0, steps=2, layers=2, threshold=-1)
    with says("methods", "Share"):
        policies.greedy_sharing(lambda table, step: 0.0, steps=2, layers=2, threshold=1, methods=(3,))  # type: ignore
